"""Ranks of methods over seeds: Friedman's test, Nemenyi's critical difference, paired tests, and Demsar's diagram of them."""

from __future__ import annotations

import math
import os
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jdistill.errors import UsageError
from jdistill.report import keys, stats
from jdistill.report.cells import is_percent, lower_is_better, title
from jdistill.report.figure import write_figure

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

Values = Mapping[str, Mapping[Any, float]]
"""Method -> block (a seed) -> value."""

BARS = ("pairwise", "nemenyi")


@dataclass(frozen=True)
class Ranks:
    """Ranks of k methods over n blocks, and what may be said of their differences.

    Attributes:
      methods: the methods, best average rank first.
      average: [k] float64: mean over blocks of the rank within a block; 1 is best, ties share their mean rank.
      means: [k] float64: mean value.
      blocks: the blocks that every method has.
      p_friedman: of "all methods are equal", chi-squared approximation; NaN where it cannot be computed.
      critical: Nemenyi's critical difference of two average ranks at `alpha`.
      p: [k, k] float64 of each pair, corrected over all pairs; 1 on the diagonal, NaN where it cannot be computed.
      groups: (first, last) positions in `methods` of each maximal run in which no two methods differ by `bars`.
      bars: what `groups` are from: `pairwise` (the values `p`) or `nemenyi` (`critical`).
      alpha: the level.
      left_out: methods without a value in some or all blocks, which are not ranked.
      note: what a reader must know, for the figure.
    """

    methods: tuple[str, ...]
    average: stats.Floats
    means: stats.Floats
    blocks: tuple[Any, ...]
    p_friedman: float
    critical: float
    p: stats.Floats
    groups: tuple[tuple[int, int], ...]
    bars: str
    alpha: float
    left_out: tuple[str, ...]
    note: str


def rank(
    values: Values, lower: bool = False, bars: str = "pairwise", test: str = "t", correction: str = "holm", alpha: float = 0.05
) -> Ranks:
    """Ranks methods within each block and compares all pairs of them.

    A method that lacks a value in a block that others have is left out as a whole: ranks need complete blocks.

    Args:
      values: method -> block -> value; NaN is no value. A block is a seed (or a data set).
      lower: whether small values are good.
      bars: `pairwise`: two methods differ where their paired test over blocks, corrected over all pairs, is below
        `alpha`; `nemenyi`: where their average ranks differ by more than the critical difference, as Demsar (2006) has it.
      test, correction: of the pairs, as for `stats.compare` and `stats.correct`.
      alpha: the level of both.

    Raises:
      UsageError: an unknown word, a level outside (0, 1), fewer than 2 methods or 2 blocks.
    """
    if bars not in BARS:
        raise UsageError(f"bars must be one of {', '.join(BARS)}, got {bars!r}")
    protocol = stats.Protocol(test=test, correction=correction, alpha=alpha)
    methods, blocks, left_out = _complete(values)
    if len(methods) < 2 or len(blocks) < 2:
        raise UsageError(
            "ranks need at least 2 methods with values in the same 2 or more blocks (seeds), found "
            f"{len(methods)} methods and {len(blocks)} blocks; run more seeds, or finish those that failed"
        )
    table = np.array([[values[m][b] for b in blocks] for m in methods], np.float64)  # [k, n]
    average = average_ranks(table.T, lower)
    best = np.argsort(average, kind="stable")
    methods, table, average = [methods[i] for i in best], table[best], average[best]
    critical = critical_difference(len(methods), len(blocks), alpha)
    p = _pairwise(table, protocol)
    same = (p >= alpha) | np.isnan(p) if bars == "pairwise" else np.abs(average[:, None] - average) <= critical
    note = _note(len(methods), len(blocks), bars, protocol, critical)
    return Ranks(
        tuple(methods), average, table.mean(axis=1), tuple(blocks), friedman(table.T), critical, p, _runs(same), bars, alpha,
        tuple(left_out), note,
    )  # fmt: skip


def average_ranks(table: Any, lower: bool = False) -> stats.Floats:
    """[n blocks, k methods] -> [k]: mean over blocks of the ranks in a block; 1 is best, ties share their mean rank."""
    from scipy.stats import rankdata

    x = np.asarray(table, np.float64)
    return np.asarray(rankdata(x if lower else -x, axis=1), np.float64).mean(axis=0)


def friedman(table: Any) -> float:
    """p of Friedman's test on [n blocks, k methods], by chi-squared with k - 1 degrees of freedom, corrected for ties.

    With k = 2, where SciPy's function refuses, it is the same formula; NaN where every block is one tie.
    """
    from scipy.special import chdtrc
    from scipy.stats import rankdata

    ranks = np.asarray(rankdata(np.asarray(table, np.float64), axis=1), np.float64)
    n, k = ranks.shape
    counts = [np.unique(row, return_counts=True)[1].astype(np.float64) for row in ranks]
    ties = 1 - sum(float((c**3 - c).sum()) for c in counts) / (n * k * (k * k - 1))
    if ties <= 0:
        return stats.NAN
    statistic = (12 / (n * k * (k + 1)) * float((ranks.sum(axis=0) ** 2).sum()) - 3 * n * (k + 1)) / ties
    return float(chdtrc(k - 1, max(statistic, 0.0)))


def critical_difference(methods: int, blocks: int, alpha: float = 0.05) -> float:
    """Nemenyi's critical difference of average ranks, q_alpha sqrt(k (k + 1) / (6 n)).

    q_alpha is the upper quantile of the studentised range of k groups and infinite degrees of freedom over sqrt(2):
    Demsar 2006, Statistical comparisons of classifiers over multiple data sets, JMLR 7, section 3.2.2 and table 5a.
    """
    from scipy.stats import studentized_range

    # Infinite degrees of freedom are integrated directly, which is also the fast path.
    q = float(studentized_range.ppf(1 - alpha, methods, np.inf)) / math.sqrt(2)
    return q * math.sqrt(methods * (methods + 1) / (6 * blocks))


def ranks_of_runs(
    frame: pd.DataFrame, by: str | Sequence[str] | None = None, metric: str | None = None, **options: Any
) -> Ranks:
    """`rank` with methods from the columns `by` of a frame (as for `make_table`) and seeds as blocks.

    Where a method has several runs of a seed, their mean counts. A method of which a seed did not finish is left out.

    Raises:
      UsageError: as `rank` and `make_table`.
    """
    from jdistill.report.table import make_table

    table = make_table(frame, by=by, baseline=None, metric=metric)
    columns = [next(iter(c.raw.values())) for c in table.columns if c.kind == "key"]
    values = {keys.label(columns, [row[c] for c in columns]): row["by_seed"] for row in table.rows}
    return rank(values, lower_is_better(table.metric), **options)


def ranks_text(ranks: Ranks, metric: str = "test.accuracy") -> str:
    """A line a method: average rank, mean, name; then what the figure's notes say. Ends with a newline."""
    scale = 100.0 if is_percent(metric) else 1.0
    lines = [f"rank   {title(metric)}"]
    lines += [
        f"{at:5.2f}  {scale * mean:8.3f}  {m}" for m, at, mean in zip(ranks.methods, ranks.average, ranks.means, strict=True)
    ]
    bars = [" - ".join(dict.fromkeys((ranks.methods[a], ranks.methods[b]))) for a, b in ranks.groups]
    lines += ["", f"not significantly different: {'; '.join(bars) or 'no two of them'}", *_notes(ranks), ""]
    return "\n".join(lines)


def ranks_figure(ranks: Ranks, path: str | os.PathLike[str], metric: str = "test.accuracy") -> list[Path]:
    """Demsar's diagram: methods at their average rank, best on top left, bars over those that do not differ.

    Args:
      ranks: from `rank`.
      path: the file to write; beside it a PNG is written where its suffix is another format (`.pdf`, `.svg`).
      metric: what was ranked, for the title.

    Returns:
      The files written.

    Raises:
      UsageError: a suffix Matplotlib cannot write.
    """

    def draw(axes: Axes) -> None:
        _diagram(axes, ranks)
        axes.set_title(f"{title(metric)}: average rank over {len(ranks.blocks)} seeds (1 is best)", fontsize=9)
        text = "\n".join(line for note in _notes(ranks) for line in textwrap.wrap(note, 150))
        axes.text(0, -0.01, text, transform=axes.transAxes, va="top", fontsize=7, color="0.3")

    return write_figure(draw, path, grid=False)


def _complete(values: Values) -> tuple[list[str], list[Any], list[str]]:
    """Methods with a value in every block, those blocks, and the methods left out."""
    known = {m: {b: v for b, v in found.items() if not math.isnan(v)} for m, found in values.items()}
    blocks = sorted({b for found in known.values() for b in found}, key=keys.order)
    methods = [m for m, found in known.items() if blocks and len(found) == len(blocks)]
    return methods, blocks, [m for m in values if m not in methods]


def _pairwise(table: stats.Floats, protocol: stats.Protocol) -> stats.Floats:
    """[k, n] -> corrected p [k, k] of the paired tests."""
    k = len(table)
    above = np.triu_indices(k, 1)
    raw = [stats.TESTS[protocol.test](stats.differences(table[i], table[j])) for i, j in zip(*above, strict=True)]
    p = np.ones((k, k))
    p[above] = stats.correct(raw, protocol.correction)
    p.T[above] = p[above]
    return p


def _runs(same: Any) -> tuple[tuple[int, int], ...]:
    """Maximal runs of neighbours in the order of ranks, of two or more, in which every pair is `same`."""
    found: list[tuple[int, int]] = []
    for first in range(len(same)):
        last = first
        while last + 1 < len(same) and all(same[last + 1][first : last + 1]):
            last += 1
        if last > first and (not found or last > found[-1][1]):
            found.append((first, last))
    return tuple(found)


def _note(k: int, n: int, bars: str, protocol: stats.Protocol, critical: float) -> str:
    pairs = k * (k - 1) // 2
    if bars == "nemenyi":
        widest = k - 1
        text = f"bars: average ranks closer than Nemenyi's critical difference {critical:.2f} (alpha = {protocol.alpha:g})."
        if critical > widest / 2:
            text += f" Low power: with {n} blocks and {k} methods it is more than half of the whole range of ranks, {widest}."
        return text
    text = (
        f"bars: no two of the methods differ by a {stats.TEST_TITLES[protocol.test]} over {n} paired seeds, "
        f"{stats.CORRECTIONS[protocol.correction]} over {pairs} pairs, alpha = {protocol.alpha:g} "
        f"(Nemenyi's critical difference would be {critical:.2f})."
    )
    floor = 2 ** (1 - n)  # the least p of a test of signs or signed ranks
    needed = protocol.alpha / (pairs if protocol.correction in ("holm", "bonferroni") else 1)
    if protocol.test != "t" and floor > needed:
        return f"{text} No power: with {n} seeds this test never gives p below {floor:.2g}; use test=t or more seeds."
    few = " Low power: few seeds; a bar is no proof that methods are equal." if n < 10 else ""
    return text + few


def _notes(ranks: Ranks) -> list[str]:
    p = "cannot be computed" if math.isnan(ranks.p_friedman) else f"p = {ranks.p_friedman:.2g}"
    notes = [f"Friedman test of all methods being equal: {p} (chi-squared approximation).", ranks.note]
    if ranks.left_out:
        notes.append(f"not ranked, as some seed has no value: {', '.join(ranks.left_out)}.")
    return notes


def _diagram(axes: Axes, ranks: Ranks) -> None:
    """Rows of labels on both sides of an axis of ranks, as Demsar's figure 1; the bars lie between axis and labels."""
    k = len(ranks.methods)
    left = -(-k // 2)
    lanes = _lanes(ranks.groups)
    depth = 0.5 + 0.25 * (max(lanes, default=-1) + 1)
    low, high = 1.0, float(k)
    margin = 0.04 * (high - low)
    for place, (method, at) in enumerate(zip(ranks.methods, ranks.average, strict=True)):
        row = place if place < left else k - 1 - place
        y, side = -(depth + 0.45 * (row + 1)), low - margin if place < left else high + margin
        axes.plot([at, at, side], [0, y, y], color="0.45", lw=0.7, zorder=1)
        align: Any = "right" if place < left else "left"
        text = f"{method}  {at:.1f}" if place < left else f"{at:.1f}  {method}"
        axes.text(side, y, f" {text} ", ha=align, va="center", fontsize=8)
    for (first, last), lane in zip(ranks.groups, lanes, strict=True):
        y = -0.3 - 0.25 * lane
        reach = (ranks.average[first] - 0.1 * margin, ranks.average[last] + 0.1 * margin)
        axes.plot(reach, [y, y], color="#0072B2", lw=2.5, solid_capstyle="butt", zorder=3)
    axes.plot([low, high], [0, 0], color="0", lw=1)
    for tick in np.unique(np.linspace(low, high, min(k, 10)).round()):
        axes.plot([tick, tick], [0, 0.12], color="0", lw=1)
        axes.text(tick, 0.2, f"{tick:.0f}", ha="center", va="bottom", fontsize=8)
    bottom = -(depth + 0.45 * (left + 1))
    axes.set_ylim(bottom, 0.8)
    axes.set_xlim(low - margin, high + margin)
    axes.set_axis_off()
    figure: Any = axes.figure
    figure.set_size_inches(9.0, 1.3 + 0.42 * (0.8 - bottom))


def _lanes(groups: Sequence[tuple[int, int]]) -> list[int]:
    """A lane for each bar, so that bars which share a method do not lie on each other."""
    ends: list[int] = []
    lanes = []
    for first, last in groups:
        lane = next((i for i, end in enumerate(ends) if end < first), len(ends))
        ends[lane : lane + 1] = [last]
        lanes.append(lane)
    return lanes
