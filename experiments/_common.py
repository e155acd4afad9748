"""What the experiment scripts share: sweeps as subprocesses, tables with published columns, figures, run records."""

import argparse
import dataclasses
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd

from jdistill.errors import did_you_mean
from jdistill.report import Table, collect, make_table, mean_interval, mean_std, render
from jdistill.report.cells import Column
from jdistill.report.keys import SEED

matplotlib.use("Agg")

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")  # Okabe and Ito
METHOD, PROBLEM = "choices.method", "choices.problem"


@dataclasses.dataclass(frozen=True)
class Method:
    """A row of the table: its label, the overrides that make it, and those of its runs that there are, not to be made again."""

    label: str
    overrides: tuple[str, ...]
    done: pd.DataFrame | None = dataclasses.field(default=None, compare=False)


def arguments(name: str, doc: str | None, seeds: int = 5) -> argparse.ArgumentParser:
    """The options every script has: `--seeds`, `--out`, `--sweeps`."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=seeds, help="seeds 0, 1, ... (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("results") / name, help="tables, figure, records: %(default)s")
    parser.add_argument("--sweeps", type=Path, default=Path("sweeps") / name, help="run folders: %(default)s")
    return parser


def add_choice(
    parser: argparse.ArgumentParser,
    option: str,
    known: Iterable[str],
    always: str = "",
    default: str = "",
    separator: str = ",",
) -> None:
    """Adds an option that takes some of the names in `known`, all of them where `default` is empty; its value is a list.

    `always` is among them unasked: what the others are compared with. An unknown name ends the program, with the nearest one.
    """
    known = list(known)

    def names(text: str) -> list[str]:
        asked = [name.strip() for name in text.split(separator) if name.strip()]
        for name in asked:
            if name not in known:
                raise argparse.ArgumentTypeError(f"unknown {name}{did_you_mean(name, known)} (known: {', '.join(known)})")
        return [name for name in known if not asked or name in asked or name == always]

    shown = f"separated by '{separator}': {f'{separator} '.join(known)} (default: {default or 'all'})"
    parser.add_argument(option, type=names, default=default, metavar="NAMES", help=shown.replace("%", "%%"))


def run_sweep(folder: Path, overrides: Sequence[str], seeds: Iterable[int]) -> pd.DataFrame:
    """`jdistill -m` over seeds in `folder`, where finished runs are not repeated; the collected runs.

    Failed runs stay in the frame, so that the table shows them. Ends the program where the sweep could not run.
    """
    command = [sys.executable, "-m", "jdistill", "-m", *overrides, f"seed={','.join(map(str, seeds))}"]
    command.append(f"hydra.sweep.dir={folder}")
    done = subprocess.run(command, stdout=subprocess.DEVNULL, check=False)  # progress and errors: standard error
    if done.returncode not in (0, 1) or not (folder / "jobs.jsonl").is_file():
        sys.exit(done.returncode or 1)
    return collect(folder)


def run_methods(experiment: str, methods: Sequence[Method], given: argparse.Namespace, problem: str = "") -> pd.DataFrame:
    """A sweep over seeds for every method; columns `choices.method` and, where given, `choices.problem` say which."""
    frames = []
    for method in methods:
        folder = given.sweeps / slug(f"{problem} {method.label}")
        own = [pd.DataFrame({SEED: []}) if method.done is None else method.done]
        if seeds := sorted(set(range(given.seeds)) - set(own[0][SEED])):
            own.append(run_sweep(folder, [f"experiment={experiment}", *method.overrides], seeds))
        frames += [frame.assign(**{METHOD: method.label} | ({PROBLEM: problem} if problem else {})) for frame in own]
    return joined(frames)


def joined(frames: Iterable[pd.DataFrame]) -> pd.DataFrame:
    """The rows of all frames; those without a row, which would change dtypes, are left out."""
    some = [frame for frame in frames if len(frame)]
    return pd.concat(some, ignore_index=True) if some else pd.DataFrame()


def slug(text: str) -> str:
    """Letters, digits and dashes: a folder's name that Hydra's override grammar takes as it is."""
    return re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-")


def make(frame: pd.DataFrame, by: Sequence[str] = ("method",), **options: Any) -> Table:
    """The table of labelled runs, each compared with the plain student."""
    return make_table(frame, by=list(by), **{"baseline": "method=plain", **options})


def with_column(
    table: Table, title: str, values: Callable[[Mapping[str, Any]], Any], name: str = "", scale: float = 1.0
) -> Table:
    """The table with another column: of text, or with `name` and `scale` of (mean, standard deviation or None)."""
    key = name or title
    rows, raw = [], {key: key}
    for row in table.rows:
        value = values(row)
        if name:
            mean, std = value or (None, None)
            rows.append({**row, f"{key}.mean": mean, f"{key}.std": std})
        else:
            rows.append({**row, key: value})
    if name:
        raw = {f"{key}.{part}": f"{key}.{part}" for part in ("mean", "std")}
    column = Column(key, title, "metric" if name else "key", raw, scale)
    return dataclasses.replace(table, rows=tuple(rows), columns=(*table.columns, column))


def with_notes(table: Table, *notes: str) -> Table:
    """The table with more lines in its footer."""
    return dataclasses.replace(table, footer=(*table.footer, *notes))


def teacher_accuracy(
    frame: pd.DataFrame, metric: str = "accuracy"
) -> Callable[[Mapping[str, Any]], tuple[float, float] | None]:
    """For `with_column`: mean and standard deviation of a test metric of a row's teachers, one a run."""
    column = f"teacher.metrics.test.{metric}"

    def values(row: Mapping[str, Any]) -> tuple[float, float] | None:
        own = frame[[all(frame.at[i, k] == row[k] for k in (METHOD, PROBLEM) if k in row) for i in frame.index]]
        found = own[column].dropna() if column in own else []
        return mean_std(found) if len(found) else None

    return values


def chance(table: Table, frame: pd.DataFrame, start: str) -> tuple[Table, list[str]]:
    """A column and notes for the rows whose problem begins with `start`: two balanced classes nothing can tell apart.

    All test examples of a row's seeds count as one sample, since each seed has its own data: exact binomial test of
    "half of them are right".
    """
    from scipy.stats import binomtest

    found: dict[tuple[str, str], Any] = {}
    for values, runs in frame[frame[PROBLEM].str.startswith(start)].groupby([PROBLEM, METHOD]):
        runs = runs[runs["status"] == "finished"]
        right = int((runs["metrics.test.accuracy"] * runs["data.test"]).round().sum())
        if len(runs):
            found[values] = binomtest(right, int(runs["data.test"].sum()))
    texts = {values: f"{test.k} of {test.n} right, p = {test.pvalue:.2f}" for values, test in found.items()}
    table = with_column(table, "against chance (50 %)", lambda row: texts.get((row[PROBLEM], row[METHOD])))
    note = "against chance: exact two-sided binomial test, all seeds' test examples pooled (each seed draws its own data)."
    return table, [note, *_verdicts(table, found)]


def _verdicts(table: Table, found: Mapping[tuple[str, str], Any]) -> list[str]:
    """What a table must say of data where nothing can be learned, as measured."""
    notes = []
    for problem in dict.fromkeys(problem for problem, _ in found):
        rows = [row for row in table.rows if row[PROBLEM] == problem and (problem, row[METHOD]) in found]
        mean = 100 * float(np.mean([row["test.accuracy.mean"] for row in rows]))
        beyond = [row[METHOD] for row in rows if found[problem, row[METHOD]].pvalue * len(found) < 0.05]
        differ = [row[METHOD] for row in rows if (row.get("p") or 1.0) < 0.05]
        notes.append(
            f"{problem}: labels do not depend on inputs, so nothing can be learned; mean over all students {mean:.1f} %. "
            f"Different from chance (Bonferroni over {len(found)} rows): {', '.join(beyond) or 'none'}. "
            f"Different from plain: {', '.join(differ) or 'none'}."
        )
    return notes


def write_tables(out: Path, table: Table, name: str = "table") -> None:
    """Writes `NAME.md` and `NAME.csv`, and prints the first."""
    out.mkdir(parents=True, exist_ok=True)
    for kind, suffix in (("markdown", "md"), ("csv", "csv")):
        (out / f"{name}.{suffix}").write_text(portable(render(table, format=kind)))
    print((out / f"{name}.md").read_text())


def portable(text: str) -> str:
    """Text without this machine's folders: the working folder, home, caches and temporary folders are cut off."""
    roots = {os.getcwd(), os.path.expanduser("~"), tempfile.gettempdir(), str(Path(__file__).resolve().parents[1])}
    roots |= {os.environ.get("JDISTILL_CACHE", ""), os.environ.get("JDISTILL_DATA", ""), sys.prefix}
    for root in sorted((r for r in roots if len(r) > 1), key=len, reverse=True):
        text = re.sub(re.escape(root) + r"(?:/+|(?=[\s\"']|$))", "", text)
    return text


def difference_figure(
    frame: pd.DataFrame, path: Path, baseline: str = "plain", title: str = "", metric: str = "accuracy", scale: float = 100.0
) -> None:
    """A test metric minus the baseline's of the same seed: a dot a seed, mean and 95 % interval, one panel a problem.

    `scale` is 100 for what is shown in percent, else 1.
    """
    import matplotlib.pyplot as plt

    problems = list(dict.fromkeys(frame[PROBLEM])) if PROBLEM in frame else [None]
    labels = [m for m in dict.fromkeys(frame[METHOD]) if m != baseline]
    across, down = min(2, len(problems)), -(-len(problems) // 2)
    size = (0.5 + 0.08 * max(map(len, labels)) + 4.2 * across, (0.9 + 0.45 * len(labels)) * down + 0.7)
    figure, axes = plt.subplots(down, across, figsize=size, squeeze=False, sharey=True, layout="constrained")
    for axis, problem in zip(axes.flat, problems):
        part = frame if problem is None else frame[frame[PROBLEM] == problem]
        values = part.pivot_table(index="config.seed", columns=METHOD, values=f"metrics.test.{metric}")
        for place, label in enumerate(labels):
            if label in values:
                gaps = scale * (values[label] - values[baseline]).dropna().to_numpy(float)
                _interval(axis, place, gaps, COLOURS[place % len(COLOURS)])
        mean = scale * values[baseline].mean()
        shown = f"{mean:.2f} %" if scale == 100 else f"{mean:.4f}"
        axis.axvline(0, color="0.4", linewidth=1)
        axis.set_title(f"{problem + ': ' if problem else ''}{baseline} student {shown}", fontsize=9)
        axis.set_yticks(range(len(labels)), labels)
        axis.set_ylim(len(labels) - 0.4, -0.6)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="x", color="0.9")
        axis.set_axisbelow(True)
    for axis in axes[-1]:
        unit = " (percentage points)" if scale == 100 else ""
        axis.set_xlabel(f"test {metric.replace('_', ' ')} minus {baseline}{unit}")
    figure.suptitle(f"{title}\ndots: seeds; diamond and bar: mean and 95 % interval", fontsize=9)
    save(figure, path)


def _interval(axis: Any, place: int, gaps: np.ndarray, colour: str) -> None:
    axis.plot(gaps, np.full(len(gaps), place + 0.18), "o", color=colour, alpha=0.45, markersize=4)
    low, high = mean_interval(gaps)
    if low == low:
        axis.plot([low, high], [place, place], color=colour, linewidth=2)
    axis.plot([gaps.mean()], [place], "D", color=colour, markersize=6)


def save(figure: Any, path: Path) -> None:
    """Writes a PNG without a date and closes the figure."""
    import matplotlib.pyplot as plt

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, metadata={"Software": None})
    plt.close(figure)
