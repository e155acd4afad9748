"""Metrics of graded lists against plain loops and scikit-learn, with ties, filled places and queries without answers."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, ndcg_score

from jdistill.errors import UsageError
from jdistill.metrics import list_metrics, lists
from tests.metrics import reference

QUERIES, PLACES = 50, 14


def queries(seed, levels):
    """Logits of few levels (ties), and grades of lists of different lengths."""
    rng = np.random.default_rng(seed)
    logits = rng.integers(0, levels, (QUERIES, PLACES)).astype(np.float32) / 3 - 1
    grades = rng.integers(0, 5, (QUERIES, PLACES)) * (rng.random((QUERIES, 1)) < 0.8)
    filled = np.arange(PLACES) >= rng.integers(0, PLACES + 1, (QUERIES, 1))
    return np.where(filled, 99, logits), np.where(filled, -1, grades).astype(np.int32)


@pytest.mark.parametrize("levels", [3, 10**6], ids=["ties", "no ties"])
@pytest.mark.parametrize("k", [1, 5, PLACES, 40])
def test_each_query_as_in_loops(levels, k):
    logits, grades = queries(0, levels)
    rows = [reference.query(z, g, k) for z, g in zip(logits, grades)]
    assert 0 < sum(row is None for row in rows) < QUERIES
    found = {"ndcg": lists.ndcg_at_k(logits, grades, k)}
    found |= {"mrr": lists.mrr(logits, grades), "map": lists.average_precision(logits, grades)}
    metrics = list_metrics(logits, grades, (k,))
    for name, values in found.items():
        wanted = np.array([np.nan if row is None else row[name] for row in rows])
        np.testing.assert_allclose(values, wanted, rtol=1e-12)
        np.testing.assert_allclose(metrics[f"ndcg_at_{k}" if name == "ndcg" else name], np.nanmean(wanted))


def test_scikit_learn_agrees():
    rng = np.random.default_rng(1)
    logits, grades = rng.normal(size=(QUERIES, PLACES)), rng.integers(0, 4, (QUERIES, PLACES))
    found = list_metrics(logits, grades, (3, 10))
    for k in (3, 10):
        np.testing.assert_allclose(found[f"ndcg_at_{k}"], ndcg_score(2.0**grades - 1, logits, k=k))
    np.testing.assert_allclose(found["map"], np.mean([average_precision_score(g > 0, z) for g, z in zip(grades, logits)]))


def test_equal_logits_do_not_gain_by_the_order_of_the_file():
    grades = np.array([[3, 0, 1], [0, 1, 3], [1, 3, 0]])
    np.testing.assert_allclose(lists.mrr(np.zeros((3, 3)), grades), 1 / 2)
    values = lists.ndcg_at_k(np.zeros((3, 3)), grades, 3)
    assert np.ptp(values) == 0
    np.testing.assert_allclose(values[0], (1 / np.log2(3) + 7 / 2) / (7 + 1 / np.log2(3)))


def test_a_network_that_gives_nan_ranks_worst():
    grades = np.array([[3, 0, 1, 2]])
    worst = list_metrics(np.array([[0.0, 3.0, 2.0, 1.0]]), grades, (4,))
    assert list_metrics(np.full((1, 4), np.nan), grades, (4,)) == worst


def test_perfect_and_bounds_and_order():
    logits, grades = queries(2, 4)
    perfect = list_metrics(grades * 1.0, grades, (1, 10))
    assert perfect == pytest.approx(dict.fromkeys(("ndcg_at_1", "ndcg_at_10", "mrr", "map"), 1))
    found = list_metrics(logits, grades, (1, 10))
    assert all(0 < value < 1 for value in found.values())
    order = np.random.default_rng(4).permutation(QUERIES)
    assert list_metrics(logits[order], grades[order], (1, 10)) == pytest.approx(found)
    places = np.random.default_rng(5).permutation(PLACES)
    assert list_metrics(logits[:, places], grades[:, places], (1, 10)) == pytest.approx(found)


def test_nothing_relevant_anywhere():
    assert np.isnan(list(list_metrics(np.zeros((2, 3)), np.array([[0, 0, -1]] * 2), (3,)).values())).all()


def test_a_cutoff_of_nothing():
    with pytest.raises(UsageError, match="whole numbers from 1 on"):
        list_metrics(np.zeros((1, 2)), np.zeros((1, 2), int), (0,))
