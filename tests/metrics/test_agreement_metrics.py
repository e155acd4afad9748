"""Agreement of rankings against scipy.stats.kendalltau and plain loops, with ties, masks and lists of different items."""

import tracemalloc

import numpy as np
import pytest
from scipy.stats import kendalltau

from jdistill.metrics import agreement, kendall, kendall_of_tops, overlap_at_k
from tests.metrics import reference


def tops(seed, rows=40, width=9, items=14):
    rng = np.random.default_rng(seed)
    lists = np.argsort(rng.random((rows, items)), axis=1)[:, :width]
    length = rng.integers(0, width + 1, (rows, 1)) * (np.arange(rows)[:, None] > 0)  # nobody recommends to row 0
    return np.where(np.arange(width) < length, lists, -1).astype(np.int32)


def scores(levels, rows=30, width=17):
    rng = np.random.default_rng(0)
    a = rng.normal(size=(rows, width)) * levels
    return np.round(a).astype(np.float32), np.round(a + rng.normal(size=a.shape) * levels), rng.random(a.shape) < 0.7


@pytest.mark.parametrize("levels", [1, 10**6], ids=["ties", "no ties"])
def test_kendall_as_in_scipy(levels):
    a, b, mask = scores(levels)
    np.testing.assert_allclose(kendall(a, b), np.mean([kendalltau(x, y).statistic for x, y in zip(a, b)]))
    masked = [kendalltau(x[m], y[m]).statistic for x, y, m in zip(a, b, mask)]
    np.testing.assert_allclose(kendall(a, b, mask), np.mean(masked))


def test_rows_in_chunks_are_the_same(monkeypatch):
    a, b, mask = scores(2)
    whole = kendall(a, b, mask)
    monkeypatch.setattr(agreement, "CHUNK", 4 * a.shape[1])
    assert kendall(a, b, mask) == pytest.approx(whole)


def test_rows_without_an_order_are_left_out():
    a, b = np.array([[0, 0, 0], [1, 2, 3], [1, 2, 3]]), np.array([[1, 2, 3], [1, 3, 2], [5, 5, 5]])
    assert kendall(a, b) == pytest.approx(1 / 3)
    assert np.isnan(kendall(a[:1], b[:1])) and np.isnan(kendall(a[:, :1], b[:, :1])) and np.isnan(kendall(a[:0], b[:0]))


def test_kendall_of_the_same_and_of_the_reverse():
    a, _, _ = scores(10**6)
    assert kendall(a, a) == pytest.approx(1) and kendall(a, -a) == pytest.approx(-1)
    assert kendall(a, np.exp(a / 1e6)) == pytest.approx(1)
    assert kendall(np.array([[-np.inf, -np.inf, 1.0]]), np.array([[-np.inf, -np.inf, 2.0]])) == pytest.approx(1)


def test_memory_is_bounded():
    rng = np.random.default_rng(1)
    a = rng.normal(size=(3000, 200)).astype(np.float32)
    tracemalloc.start()
    kendall(a, a)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20e6


@pytest.mark.parametrize("k", [1, 4, 9, 20])
def test_overlap_as_in_loops(k):
    a, b = tops(0), tops(1)
    rows = []
    for x, y in zip(a, b):
        x, y = set(reference.items_of(x)[:k]), set(reference.items_of(y)[:k])
        rows += [len(x & y) / max(len(x), len(y))] if x or y else []
    assert len(rows) < len(a)
    np.testing.assert_allclose(overlap_at_k(a, b, k), np.mean(rows))
    assert overlap_at_k(a, a, k) == 1


@pytest.mark.parametrize("k", [2, 5, 9, 20])
def test_kendall_of_tops_as_in_loops(k):
    a, b = tops(2), tops(3)
    taus = []
    for x, y in zip(a, b):
        ranks = reference.ranks_over_union(x, y, k)
        if all(len(set(r)) > 1 for r in ranks):
            taus.append(kendalltau(*ranks).statistic)
    assert len(taus) < len(a)
    np.testing.assert_allclose(kendall_of_tops(a, b, k), np.mean(taus))
    assert kendall_of_tops(a, a, k) == pytest.approx(1)


def test_tops_of_other_items_disagree():
    a, b = np.array([[0, 1, 2]], np.int32), np.array([[3, 4, 5]], np.int32)
    assert overlap_at_k(a, b, 3) == 0 and kendall_of_tops(a, b, 3) < 0
    assert kendall_of_tops(a, a[:, ::-1].copy(), 3) == pytest.approx(-1)


def test_empty_lists():
    none = np.full((2, 3), -1, np.int32)
    assert np.isnan(overlap_at_k(none, none, 3)) and np.isnan(kendall_of_tops(none, none, 3))
