"""Figures of a sweep: accuracy against a size or a cost, and learning curves. Matplotlib is loaded only when one is drawn."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jdistill.errors import UsageError, unknown
from jdistill.report import keys, stats
from jdistill.report.axes import axis_title, engineering, titles
from jdistill.report.baseline import parse_baseline
from jdistill.report.cells import is_percent, lower_is_better
from jdistill.report.collect import read_curves
from jdistill.report.table import column_of

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

# Okabe and Ito (2008), readable with every common colour blindness; yellow last, since it is faint on white.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#F0E442")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
_HEADING = "heading: "  # marks the legend entries that are printed bold
_NAMED = 40  # points a legend names one by one
ROWS = 12  # curves that can still be told apart
DASHES = ("-", "--", ":", "-.")
Looks = dict[tuple[Any, ...], tuple[str, str, str]]  # group -> colour, marker, dashes
Groups = dict[tuple[Any, ...], list[dict[str, Any]]]  # values of the keys -> runs
Points = dict[tuple[Any, ...], tuple[tuple[float, float], tuple[float, float]]]  # group -> (mean, std) of x, of y
Curves = dict[tuple[Any, ...], list[tuple[float, float, float]]]  # group -> (x, mean, std) along the curve
_STYLE: Any = {
    "svg.hashsalt": "jdistill",
    "text.parse_math": False,
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
_METADATA: dict[str, dict[str, Any]] = {  # no dates: the same runs give the same file
    "png": {"Software": None},
    "pdf": {"CreationDate": None},
    "svg": {"Date": None},
}


def scatter_figure(
    frame: pd.DataFrame,
    path: str | os.PathLike[str],
    x: str = "size.bytes",
    y: str | None = None,
    by: str | Sequence[str] | None = None,
) -> list[Path]:
    """One point a group (mean over its finished runs, bars: sample standard deviation), the Pareto front, the teacher.

    Where there are more groups than a legend can name, those that are not on the front are grey dots.

    Args:
      frame: from `collect`.
      path: the file to write; beside it a PNG is written where its suffix is another format (`.pdf`, `.svg`).
      x, y: numeric columns of the frame, or names of the table's (`flops`, `latency_1`); small x is good (a size, a time,
        operations), y by its name (losses: small).
      by: keys that tell groups apart, as for `make_table`. The first decides the colour, the rest the marker.

    Returns:
      The files written.

    Raises:
      UsageError: an unknown column or key, a suffix Matplotlib cannot write, no finished run with both numbers.
    """
    x, y = column_of(x), y or f"metrics.test.{keys.primary(frame)}"
    columns, groups = _groups(frame, by, (x, y))
    points = {
        values: (stats.mean_std([r[x] for r in runs]), stats.mean_std([r[y] for r in runs])) for values, runs in groups.items()
    }
    scale = 100.0 if is_percent(y) else 1.0

    def draw(axes: Axes) -> None:
        named = _named(points, columns, lower_is_better(y))
        looks = _looks(named, columns)
        _points(axes, points, looks, scale, lower_is_better(y))
        _teacher(axes, [r for runs in groups.values() for r in runs], x, y, scale)
        if 0 < 10 * min(px[0] for px, _ in points.values()) < axes.get_xlim()[1]:
            axes.set_xscale("log")
        engineering(axes, x)
        titles(axes, x, y)
        _legend(axes, columns, looks, lines=False)

    return write_figure(draw, path)


def curves_figure(
    frame: pd.DataFrame,
    path: str | os.PathLike[str],
    y: str | None = None,
    x: str = "epoch",
    by: str | Sequence[str] | None = None,
    most: int | None = None,
) -> list[Path]:
    """Learning curves out of each run's `metrics.jsonl`: a group's mean, in a band of one sample standard deviation.

    At each x the mean is over the runs that have a value there. Runs of any status but `pruned` count: a failed run's
    curve shows where it went; those a search stopped were chosen by their curves, and would bend the mean.

    Args:
      frame: from `collect`; its column `path` says where the runs are.
      path, by: as for `scatter_figure`.
      y, x: keys of the lines of `metrics.jsonl`, dotted; without a y the task's metric on the validation split.
      most: draw at most so many groups: those with the best mean `y` of finished runs (as in their results), the best
        one with `loss=none` always among them; the title says so. Only their files are read.

    Raises:
      UsageError: no run has such curves (the message lists the keys there are), an unknown key or suffix.
    """
    y = y or f"validation.{keys.primary(frame)}"
    columns, groups = _groups(frame[frame["status"] != "pruned"], by, ())
    groups, title = (groups, "") if most is None or len(groups) <= most else _best(groups, columns, y, most)
    lines = {
        values: [read_curves(r["path"]) for r in runs if not keys.missing(r.get("path"))] for values, runs in groups.items()
    }
    everything = [line for runs in lines.values() for run in runs for line in run]
    for name in (x, y):
        if not any(name in line for line in everything):
            if not everything:
                raise UsageError("no run has learning curves: none of the run folders holds a metrics.jsonl with lines")
            raise unknown("key of metrics.jsonl", name, {k for line in everything for k in line})
    scale = 100.0 if is_percent(y) else 1.0
    curves = {values: curve for values, runs in lines.items() if (curve := _curve(runs, x, y))}

    def draw(axes: Axes) -> None:
        from matplotlib.ticker import MaxNLocator

        looks = _looks(list(curves), columns)
        _lines(axes, curves, looks, scale)
        if x in ("epoch", "step"):
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        titles(axes, x, y)
        axes.set_title(title, fontsize=9, loc="left")
        _legend(axes, columns, looks, lines=True)

    return write_figure(draw, path)


def held_out_curves(frame: pd.DataFrame, path: str | os.PathLike[str], by: str | Sequence[str] | None = None) -> list[Path]:
    """`curves_figure` of the best rows by the task's metric on what was held out (validation, else test), else in training.

    Returns:
      The files written; none where no finished run has such curves.
    """
    name = keys.primary(frame)
    for y in (f"validation.{name}", f"test.{name}", f"train.{name}"):
        if f"metrics.{y}" in frame and frame[f"metrics.{y}"].notna().any():
            with contextlib.suppress(UsageError):  # runs that were evaluated on it only at their end have no curves of it
                return curves_figure(frame, path, y, by=by, most=ROWS)
    return []


def pareto(points: Sequence[tuple[float, float]], lower: bool = False) -> list[tuple[float, float]]:
    """The points that no other beats in both: smaller x and larger y (`lower`: smaller y); sorted by x."""
    front: list[tuple[float, float]] = []
    for px, py in sorted(points, key=lambda p: (p[0], p[1] if lower else -p[1])):
        if not front or (py < front[-1][1] if lower else py > front[-1][1]):
            front.append((px, py))
    return front


def _groups(frame: pd.DataFrame, by: str | Sequence[str] | None, needed: Sequence[str]) -> tuple[list[str], Groups]:
    from pandas.api.types import is_numeric_dtype

    names = list(map(str, frame.columns))
    for column in needed:
        if column not in names or not is_numeric_dtype(frame[column]):
            raise unknown("numeric column", column, [n for n in names if is_numeric_dtype(frame[n])])
    records: list[dict[str, Any]] = [{str(k): v for k, v in r.items()} for r in frame.to_dict("records")]
    given = [by] if isinstance(by, str) else by
    columns = keys.varying(records) if given is None else [keys.resolve(names, key) for key in given]
    if needed:
        records = [r for r in records if r["status"] == "finished" and not any(keys.missing(r[c]) for c in needed)]
    if not records:
        raise UsageError(f"no finished run has {' and '.join(needed)}" if needed else "there are no runs to draw")
    groups = keys.group(records, columns)
    return columns, {k: groups[k] for k in sorted(groups, key=lambda values: [keys.order(v) for v in values])}


def _best(groups: Groups, columns: Sequence[str], y: str, most: int) -> tuple[Groups, str]:
    """The groups with the best means of `y` in the results of finished runs, in their old order, and what was chosen."""

    def mean(values: tuple[Any, ...]) -> float:
        finished = (run for run in groups[values] if run["status"] == "finished")
        found = [float(run[f"metrics.{y}"]) for run in finished if not keys.missing(run.get(f"metrics.{y}"))]
        return (-1 if lower_is_better(y) else 1) * stats.mean_std(found)[0] if found else -math.inf

    ranked = sorted(groups, key=mean, reverse=True)
    baseline = parse_baseline(columns, [run for runs in groups.values() for run in runs], "auto", columns)
    marked = [v for v in ranked if any(baseline.holds(c, value) for c, value in zip(columns, v, strict=True))][:1]
    kept = ranked[:most]
    title = f"the best {most} of {len(groups)} rows by {axis_title(y).removesuffix(' (%)')}"
    if marked and marked[0] not in kept:
        kept = [*kept[:-1], *marked]
        title = title.replace(f"best {most}", f"best {most - 1}", 1) + f", and the best one with {baseline.text}"
    return {values: groups[values] for values in groups if values in set(kept)}, title


def _looks(groups: Sequence[tuple[Any, ...]], columns: Sequence[str]) -> Looks:
    """Colour, marker and dashes of each group: by its first key and by its rest; one key alone decides all.

    Where a legend has to name each group, each has a look of its own.
    """
    if len(columns) > 1 and not _by_key(columns, groups):
        own = _looks([(i,) for i in range(len(groups))], columns[:1])
        return dict(zip(groups, own.values(), strict=True))
    firsts = list(dict.fromkeys(values[:1] for values in groups))
    rests = list(dict.fromkeys(values[1:] for values in groups))
    looks = {}
    for values in groups:
        i, j = firsts.index(values[:1]), rests.index(values[1:])
        # More first values than colours: the next round differs in its markers.
        j += i if len(rests) == 1 else i // len(PALETTE)
        dashes = DASHES[(i // len(PALETTE) if len(rests) == 1 else j) % len(DASHES)]
        looks[values] = (PALETTE[i % len(PALETTE)], MARKERS[j % len(MARKERS)], dashes)
    return looks


def _by_key(columns: Sequence[str], groups: Sequence[tuple[Any, ...]]) -> bool:
    """Whether a legend explains colours by the first key and markers by the others, instead of naming each group."""
    firsts, rests = {values[:1] for values in groups}, {values[1:] for values in groups}
    return len(columns) > 1 and len(firsts) <= len(PALETTE) and len(rests) <= len(MARKERS)


def _named(points: Points, columns: Sequence[str], lower: bool) -> list[tuple[Any, ...]]:
    """The groups a legend can name: all, or those on the Pareto front."""
    if len(points) <= _NAMED or _by_key(columns, list(points)):
        return list(points)
    front = set(pareto([(px[0], py[0]) for px, py in points.values()], lower))
    return [values for values, (px, py) in points.items() if (px[0], py[0]) in front]


def _curve(runs: Sequence[Sequence[dict[str, Any]]], x: str, y: str) -> list[tuple[float, float, float]]:
    """(x, mean, sample standard deviation) over runs; a run's later line at the same x supersedes the earlier one."""
    values: dict[float, list[float]] = {}
    for run in runs:
        whole = [line for line in run if not (keys.missing(line.get(x)) or keys.missing(line.get(y)))]
        last = {float(line[x]): float(line[y]) for line in whole}
        for at, value in last.items():
            values.setdefault(at, []).append(value)
    return [(at, *stats.mean_std(values[at])) for at in sorted(values)]


def _points(axes: Axes, points: Points, looks: Looks, scale: float, lower: bool) -> None:
    """Means with error bars, and the step line of the Pareto front."""
    style: Any = {"ms": 6, "mec": "white", "mew": 0.6, "capsize": 2.5, "elinewidth": 1, "zorder": 3}
    others = [(px[0], py[0] * scale) for values, (px, py) in points.items() if values not in looks]
    if others:
        axes.plot(*zip(*others, strict=True), ".", color="0.7", ms=4, zorder=2, label=f"{len(others)} rows not on the front")
    for values, (color, marker, _) in looks.items():
        (mx, sx), (my, sy) = points[values]
        xerr, yerr = (None if keys.missing(s) else s for s in (sx, sy * scale))
        axes.errorbar(mx, my * scale, xerr=xerr, yerr=yerr, fmt=marker, color=color, **style)
    front = pareto([(px[0], py[0]) for px, py in points.values()], lower)
    if len(front) > 1:
        xs, ys = [p[0] for p in front], [p[1] * scale for p in front]
        axes.step(xs, ys, where="post", color="0.6", lw=1.2, zorder=1, label="Pareto front")


def _lines(axes: Axes, curves: Curves, looks: Looks, scale: float) -> None:
    """Mean curves, each in a band of one standard deviation."""
    for values, curve in curves.items():
        color, marker, dashes = looks[values]
        xs = [point[0] for point in curve]
        mean = [point[1] * scale for point in curve]
        spread = [0.0 if keys.missing(point[2]) else point[2] * scale for point in curve]
        every = max(1, len(xs) // 8)
        axes.plot(xs, mean, color=color, ls=dashes, marker=marker, ms=4, markevery=every, lw=1.4)
        low, high = ([m + sign * s for m, s in zip(mean, spread, strict=True)] for sign in (-1, 1))
        axes.fill_between(xs, low, high, color=color, alpha=0.18 if len(curves) <= 6 else 0.07, lw=0)


def _teacher(axes: Axes, runs: Sequence[dict[str, Any]], x: str, y: str, scale: float) -> None:
    """Each teacher as a dashed line; as a star too where its x is known."""
    wanted = {"size.bytes": "teacher.bytes", "size.parameters": "teacher.parameters"}.get(x)
    found: dict[str, tuple[Any, float]] = {}
    for run in runs:
        if not keys.missing(run.get("teacher.hash")) and not keys.missing(run.get(f"teacher.{y}")):
            found[run["teacher.hash"]] = (run.get(wanted) if wanted else None, run[f"teacher.{y}"] * scale)
    if len(found) > 4:  # one teacher a seed, say: their mean tells more than a bundle of lines
        xs = [px for px, _ in found.values() if not keys.missing(px)]
        found = {"mean": (stats.mean_std(xs)[0], stats.mean_std([py for _, py in found.values()])[0])}
    for i, (px, py) in enumerate(found.values()):
        axes.axhline(py, color="0.35", lw=1, ls=(0, (5, 3)), zorder=0, label=None if i else "teacher")
        if not keys.missing(px):
            axes.plot(px, py, marker="*", ms=11, color="0.35", mec="white", mew=0.6, ls="none", zorder=2)


def write_figure(draw: Any, path: str | os.PathLike[str], grid: bool = True) -> list[Path]:
    """Writes what `draw(axes)` draws, and beside it a PNG where the suffix is another; returns the files.

    Raises:
      UsageError: a suffix Matplotlib cannot write.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    target = Path(path)
    suffix = target.suffix.lower().removeprefix(".")
    if suffix not in FigureCanvasAgg.get_supported_filetypes() and suffix not in ("pdf", "svg"):
        raise UsageError(f"{path}: cannot write the format '{target.suffix}'; use .png, .pdf or .svg")
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(6.4, 4.0), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        draw(axes)
        if grid:
            axes.grid(color="0.9", lw=0.6)
        axes.set_axisbelow(True)
        target.parent.mkdir(parents=True, exist_ok=True)
        files = list(dict.fromkeys([target.with_suffix(".png"), target]))
        for file in files:
            figure.savefig(file, dpi=160, metadata=_METADATA.get(file.suffix.lower().removeprefix(".")))
    return files


def _legend(axes: Axes, columns: Sequence[str], looks: Looks, lines: bool) -> None:
    """Beside the axes, so that it never covers a point; the figure grows with it.

    With several keys, the colours are explained under the name of the first key and the markers under the others.
    """
    from matplotlib.lines import Line2D

    def entry(text: str, color: str, marker: str, dashes: str) -> Line2D:
        return Line2D([], [], color=color, marker=marker, ms=5, ls=dashes if lines else "none", label=text)

    firsts = {values[:1]: look for values, look in looks.items()}
    rests = {values[1:]: look for values, look in looks.items()}
    if _by_key(columns, list(looks)):
        names = keys.short(columns[0]), ", ".join(map(keys.short, columns[1:]))
        handles = [_heading(names[0]), *(entry(keys.show(v[0]), look[0], "s", "-") for v, look in firsts.items())]
        handles += [_heading(names[1])]
        handles += [entry(keys.label(columns[1:], v), "0.35", look[1], look[2]) for v, look in rests.items()]
    else:
        handles = [entry(keys.label(columns, values), *look) for values, look in looks.items()]
    named, labels = axes.get_legend_handles_labels()
    handles += [_heading(" ")] * bool(named) + named
    texts = [h.get_label().removeprefix(_HEADING) for h in handles[: len(handles) - len(named)]] + labels
    ncols = -(-len(texts) // 28)
    figure: Any = axes.figure
    width = 0.5 + 0.075 * max(map(len, texts))
    figure.set_size_inches(5.0 + ncols * width, max(3.6, 0.5 + 0.19 * min(len(texts), 28)))
    legend = axes.legend(
        handles,
        texts,
        loc="upper left",
        bbox_to_anchor=(1.01, 1.0),
        frameon=False,
        ncols=ncols,
        borderaxespad=0.0,
        fontsize=8,
    )
    for handle, text in zip(handles, legend.get_texts(), strict=True):
        if handle.get_label() == f"{_HEADING}{text.get_text()}":
            text.set_fontweight("bold")


def _heading(text: str) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], ls="none", label=f"{_HEADING}{text}")
