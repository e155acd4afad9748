"""Statistics of a table: paired tests over seeds, corrections, intervals, minimum detectable differences."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from jdistill.errors import UsageError, unknown

Floats = NDArray[np.float64]
NAN = math.nan
_EXACT = 20  # up to 2**20 sign patterns are enumerated; beyond, as many are drawn
_DRAWS = 100_000


class Comparison(NamedTuple):
    """A paired comparison of a method with its baseline.

    Attributes:
      n: number of pairs (seeds in both).
      difference: mean of method - baseline.
      std: sample standard deviation (ddof=1) of the differences.
      low, high: confidence interval of the mean difference, by the t distribution.
      p: two-sided, uncorrected.
      detectable: the minimum detectable difference of a paired t test with this n and std.
    """

    n: int
    difference: float
    std: float
    low: float
    high: float
    p: float
    detectable: float


def mean_std(values: ArrayLike) -> tuple[float, float]:
    """Mean and sample standard deviation (ddof=1); NaN where there are too few values (0, or 1 for the latter)."""
    x = np.asarray(values, np.float64)
    if x.size > 1 and np.all(x == x[0]):
        return float(x[0]), 0.0  # without the rounding errors of summing
    return (float(x.mean()) if x.size else NAN, float(x.std(ddof=1)) if x.size > 1 else NAN)


def mean_interval(values: ArrayLike, level: float = 0.95) -> tuple[float, float]:
    """Two-sided confidence interval of the mean by the t distribution, n - 1 degrees of freedom; NaN where n < 2."""
    from scipy.special import stdtrit

    x = np.asarray(values, np.float64)
    if x.size < 2:
        return NAN, NAN
    mean, std = mean_std(x)
    half = float(stdtrit(x.size - 1, 0.5 + level / 2)) * std / math.sqrt(x.size)
    return mean - half, mean + half


def pair(method: Mapping[Any, float], baseline: Mapping[Any, float]) -> tuple[Floats, Floats]:
    """The values of the seeds that are in both, in the same order; two arrays [n] float64. NaN values are left out."""
    seeds = [s for s in method if s in baseline and not (math.isnan(method[s]) or math.isnan(baseline[s]))]
    return np.array([method[s] for s in seeds], np.float64), np.array([baseline[s] for s in seeds], np.float64)


def compare(
    method: ArrayLike,
    baseline: ArrayLike,
    test: str = "t",
    level: float = 0.95,
    alpha: float = 0.05,
    power: float = 0.8,
) -> Comparison:
    """Compares paired values [n] of a method and its baseline.

    n < 2 gives NaN for all but the difference. Where all differences are equal their spread is not known: interval
    and detectable difference are NaN, and so is the p of the t test, except that no difference at all has p = 1.

    Args:
      test: `t` (paired t test), `permutation` (sign flips of the differences) or `wilcoxon` (signed ranks).
      level: of the confidence interval.
      alpha, power: of the minimum detectable difference.

    Raises:
      UsageError: an unknown test.
    """
    if test not in TESTS:
        raise unknown("test", test, TESTS)
    d = differences(method, baseline)
    mean, std = mean_std(d)
    if d.size < 2 or std == 0:
        p = TESTS[test](d) if d.size > 1 else NAN
        return Comparison(d.size, mean, std, NAN, NAN, p, NAN)
    low, high = mean_interval(d, level)
    detectable = minimum_detectable_difference(d.size, std, alpha, power)
    return Comparison(d.size, mean, std, low, high, TESTS[test](d), detectable)


def differences(method: ArrayLike, baseline: ArrayLike) -> Floats:
    """method - baseline [n], where rounding errors (1e-12 of the largest value) do not count as a difference.

    Without this, equal differences such as 0.9 - 0.8 and 0.8 - 0.7 look like a tiny but real spread.
    """
    a, b = np.asarray(method, np.float64), np.asarray(baseline, np.float64)
    if a.shape != b.shape or a.ndim != 1:
        raise ValueError(f"method and baseline must be paired vectors, got shapes {a.shape} and {b.shape}")
    d = a - b
    if not d.size:
        return d
    noise = 1e-12 * float(max(np.abs(a).max(), np.abs(b).max()))
    d[np.abs(d) <= noise] = 0.0
    return np.full_like(d, d[0]) if np.ptp(d) <= noise else d


def paired_t(d: ArrayLike) -> float:
    """Two-sided p of the paired t test on differences [n]; equal differences: 1 where all are zero, else NaN."""
    from scipy.special import stdtr

    x = np.asarray(d, np.float64)
    if x.size < 2:
        return NAN
    if np.ptp(x) == 0:
        return 1.0 if x[0] == 0 else NAN
    mean, std = mean_std(x)
    return float(2 * stdtr(x.size - 1, -abs(mean) / (std / math.sqrt(x.size))))


def sign_flip(d: ArrayLike) -> float:
    """Two-sided p of the sign-flip permutation test of the mean of differences [n].

    Exact (all 2**n sign patterns) for n <= 20, so never below 2 / 2**n; beyond, 100000 patterns drawn with a fixed
    seed, p = (hits + 1) / (draws + 1).
    """
    x = np.asarray(d, np.float64)
    if x.size < 2:
        return NAN
    observed = abs(x.sum()) - 1e-9 * np.abs(x).sum()  # equal sums may differ in the last digits
    if x.size <= _EXACT:
        sums = np.zeros(1)
        for value in x:
            sums = np.concatenate([sums + value, sums - value])
        return float(np.mean(np.abs(sums) >= observed))
    rng = np.random.default_rng(0)
    signs = rng.integers(0, 2, (_DRAWS, x.size), dtype=np.int8) * 2 - 1
    return float((np.sum(np.abs(signs @ x) >= observed) + 1) / (_DRAWS + 1))


def wilcoxon(d: ArrayLike) -> float:
    """Two-sided exact p of the Wilcoxon signed-rank test on differences [n]; zeros are left out, ties share their rank.

    Exact also with ties (the distribution of the observed ranks under sign flips); 1 where all differences are zero.
    """
    x = np.asarray(d, np.float64)
    if x.size < 2:
        return NAN
    x = x[x != 0]
    if not x.size:
        return 1.0
    rounded = np.round(np.abs(x) / np.abs(x).max(), 9)  # differences equal but for rounding errors are ties
    _, inverse, count = np.unique(rounded, return_inverse=True, return_counts=True)
    ranks2 = (2 * np.cumsum(count) - count + 1)[inverse]  # twice the mean rank, an integer
    total = int(ranks2.sum())
    chance = np.zeros(total + 1)  # chance[s]: that the ranks of the positive differences sum to s / 2
    chance[0] = 1.0
    for rank in ranks2:
        moved = np.concatenate([np.zeros(rank), chance[:-rank]])
        chance = (chance + moved) / 2
    smaller = min(int(ranks2[x > 0].sum()), int(ranks2[x < 0].sum()))
    return float(min(1.0, 2 * chance[: smaller + 1].sum()))


TESTS: dict[str, Callable[[ArrayLike], float]] = {"t": paired_t, "permutation": sign_flip, "wilcoxon": wilcoxon}
TEST_TITLES = {
    "t": "paired t test",
    "permutation": "sign-flip permutation test",
    "wilcoxon": "Wilcoxon signed-rank test",
}


def correct(p_values: Sequence[float], method: str = "holm") -> Floats:
    """Adjusted p values [m] for m comparisons; NaN stay NaN and do not count.

    Args:
      method: `holm` (Holm 1979, step-down; family-wise error), `bonferroni`, `bh` (Benjamini and Hochberg 1995; false
        discovery rate) or `none`.

    Raises:
      UsageError: an unknown method.
    """
    if method not in CORRECTIONS:
        raise unknown("correction", method, CORRECTIONS)
    p = np.asarray(p_values, np.float64)
    out = np.full(p.shape, NAN)
    known = np.flatnonzero(~np.isnan(p))
    order = known[np.argsort(p[known], kind="stable")]
    m, ranked = len(order), p[order]
    if method == "holm":
        ranked = np.maximum.accumulate(ranked * np.arange(m, 0, -1))
    elif method == "bonferroni":
        ranked = ranked * m
    elif method == "bh":
        ranked = np.minimum.accumulate((ranked * m / np.arange(1, m + 1))[::-1])[::-1]
    out[order] = np.minimum(ranked, 1.0)
    return out


CORRECTIONS = {
    "holm": "Holm correction",
    "bonferroni": "Bonferroni correction",
    "bh": "Benjamini-Hochberg correction",
    "none": "no correction",
}


def paired_power(effect: float, n: int, alpha: float = 0.05) -> float:
    """Power of the two-sided paired t test; `effect` is mean / std of the differences. By noncentral t."""
    from scipy.special import nctdtr, stdtrit

    critical = float(stdtrit(n - 1, 1 - alpha / 2))
    shift = abs(effect) * math.sqrt(n)
    # The lower tail vanishes for large shifts, where its series may give NaN.
    return float(1 - nctdtr(n - 1, shift, critical) + np.nan_to_num(nctdtr(n - 1, shift, -critical)))


def minimum_detectable_difference(n: int, std: float, alpha: float = 0.05, power: float = 0.8) -> float:
    """The true difference that a two-sided paired t test with n pairs finds with probability `power`.

    Exact by the noncentral t distribution (Cohen 1988), solved for the effect. `std` is of the differences, in the
    unit of the result. NaN where n < 2 or `std` is NaN; 0 where `std` is 0.
    """
    if n < 2 or math.isnan(std):
        return NAN
    from scipy.optimize import brentq

    upper = 4 / math.sqrt(n)  # not much larger than needed: far in the tail the distribution's series gives NaN
    while paired_power(upper, n, alpha) < power:
        upper *= 1.5
    return float(std * brentq(lambda effect: paired_power(effect, n, alpha) - power, 0.0, upper, xtol=1e-12))


@dataclass(frozen=True)
class Protocol:
    """How differences are judged: the test, the correction, the levels of intervals and of power."""

    test: str = "t"
    correction: str = "holm"
    level: float = 0.95
    alpha: float = 0.05
    power: float = 0.8

    def __post_init__(self) -> None:
        if self.test not in TESTS:
            raise unknown("test", self.test, TESTS)
        if self.correction not in CORRECTIONS:
            raise unknown("correction", self.correction, CORRECTIONS)
        for name in ("level", "alpha", "power"):
            if not 0 < getattr(self, name) < 1:
                raise UsageError(f"{name} must be between 0 and 1, got {getattr(self, name)}")
