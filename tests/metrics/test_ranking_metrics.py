"""Top-N metrics against plain loops and scikit-learn, on users with many, few and no relevant items and short lists."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, ndcg_score

from jdistill.errors import UsageError
from jdistill.metrics import popularity_groups, ranking, ranking_metrics
from tests.metrics import reference

ITEMS, USERS, LONGEST = 40, 60, 12
PER_USER = {name: getattr(ranking, f"{name}_at_k") for name in ("hit_rate", "recall", "precision", "ndcg", "mrr", "map")}


def lists(rng, users, width, at_least=0):
    """Random rows of different items, filled with -1 from a random length on."""
    rows = np.stack([rng.permutation(ITEMS)[:width] for _ in range(users)]).astype(np.int32)
    length = rng.integers(at_least, width + 1, users)
    return np.where(np.arange(width) < length[:, None], rows, -1).astype(np.int32)


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    top, relevant = lists(rng, USERS, LONGEST), lists(rng, USERS, 9)
    assert (relevant >= 0).any(1).min() == 0 and (top >= 0).sum(1).min() == 0
    return top, relevant, rng.integers(0, 30, ITEMS)


def expected(top, relevant, k, name):
    rows = [reference.ranking(t, r, k) for t, r in zip(top, relevant)]
    return np.array([np.nan if row is None else row[name] for row in rows])


@pytest.mark.parametrize("k", [1, 3, LONGEST, 30])
@pytest.mark.parametrize("name", PER_USER)
def test_each_user_as_in_loops(data, name, k):
    top, relevant, _ = data
    values = PER_USER[name](top, relevant, k)
    assert values.shape == (USERS,) and values.dtype == np.float64
    np.testing.assert_allclose(values, expected(top, relevant, k, name), rtol=1e-12)


def test_scikit_learn_agrees():
    rng = np.random.default_rng(1)
    top = np.argsort(rng.random((30, ITEMS)), axis=1).astype(np.int32)
    relevant = lists(rng, 30, 9, at_least=1)
    truth, score = np.zeros((30, ITEMS)), np.zeros((30, ITEMS))
    for m in range(30):
        truth[m, relevant[m][relevant[m] >= 0]] = 1
        score[m, top[m]] = -np.arange(ITEMS)
    for k in (5, 20):
        np.testing.assert_allclose(ranking.ndcg_at_k(top, relevant, k).mean(), ndcg_score(truth, score, k=k))
    precision = [average_precision_score(t, s) for t, s in zip(truth, score)]
    np.testing.assert_allclose(ranking.map_at_k(top, relevant, ITEMS), precision)


def test_names_and_means(data):
    top, relevant, popularity = data
    found = ranking_metrics(top, relevant, (3, 10), popularity, users=50)
    each = {f"{name}_at_{k}" for name in PER_USER for k in (3, 10)}
    recall = {f"recall_at_10_{group}{all_}" for group in ("popular", "unpopular") for all_ in ("", "_all_users")}
    assert set(found) == each | recall | {"coverage_at_10", "novelty_at_10"}
    for name in PER_USER:
        for k in (3, 10):
            np.testing.assert_allclose(found[f"{name}_at_{k}"], np.nanmean(expected(top, relevant, k, name)))
    assert set(ranking_metrics(top, relevant, (3, 10))) == each
    assert "novelty_at_10" not in ranking_metrics(top, relevant, (10,), popularity)
    assert not any("popular" in name for name in ranking_metrics(top, relevant, (10,), popularity, groups=0))


def test_coverage_and_novelty(data):
    top, relevant, popularity = data
    found = ranking_metrics(top, relevant, (5,), popularity, users=50)
    shown = [reference.items_of(row)[:5] for row in top]
    assert found["coverage_at_5"] == len({i for row in shown for i in row}) / ITEMS
    novelty = [np.mean([-np.log2((popularity[i] + 1) / 52) for i in row]) for row in shown if row]
    np.testing.assert_allclose(found["novelty_at_5"], np.mean(novelty))


def test_novelty_of_an_item_never_met_and_of_one_met_too_often():
    top = np.array([[0], [1], [2], [-1]], np.int32)
    values = ranking.novelty_at_k(top, np.array([0, 6, 100]), 6, 1)
    np.testing.assert_allclose(values, [3, -np.log2(7 / 8), 0, np.nan])


@pytest.mark.parametrize("groups", [2, 4])
def test_group_recall_as_in_loops(data, groups):
    top, relevant, popularity = data
    found = ranking_metrics(top, relevant, (4, 8), popularity, groups=groups)
    group = popularity_groups(popularity, groups)
    for g in range(groups):
        rows = []
        for t, r in zip(top, relevant):
            wanted = {i for i in reference.items_of(r) if group[i] == g}
            rows.append(len(wanted & set(reference.items_of(t)[:8])) / len(wanted) if wanted else np.nan)
        name = "recall_at_8_" + (("popular", "unpopular")[g] if groups == 2 else f"group{g + 1}")
        assert np.isnan(rows).sum() > (relevant < 0).all(1).sum()
        np.testing.assert_allclose(found[name], np.nanmean(rows))
        np.testing.assert_allclose(found[f"{name}_all_users"], np.nansum(rows) / (relevant >= 0).any(1).sum())


def test_one_group_is_plain_recall(data):
    found = ranking_metrics(data[0], data[1], (8,), data[2], groups=1)
    assert found["recall_at_8_group1"] == found["recall_at_8"] == found["recall_at_8_group1_all_users"]


@pytest.mark.parametrize("groups", [1, 2, 3, 5])
def test_groups_have_equal_popularity(groups):
    popularity = np.random.default_rng(2).zipf(1.6, 500).clip(0, 60) - 1
    group = popularity_groups(popularity, groups)
    assert group.dtype == np.int32 and set(group) == set(range(groups))
    totals = np.bincount(group, popularity)
    assert np.abs(totals - popularity.sum() / groups).max() <= popularity.max()
    for g in range(groups - 1):
        assert popularity[group == g].min() >= popularity[group == g + 1].max()
    assert (group[popularity == 0] == groups - 1).all()


def test_groups_by_hand():
    np.testing.assert_array_equal(popularity_groups(np.array([1, 5, 2, 0, 4]), 2), [1, 0, 1, 1, 0])  # 5 4 | 2 1 0
    np.testing.assert_array_equal(popularity_groups(np.array([9, 1]), 4), [0, 3])  # one item is more than two parts
    np.testing.assert_array_equal(popularity_groups(np.zeros(3, int), 2), [1, 1, 1])


def test_perfect_lists(data):
    relevant = data[1]
    found = ranking_metrics(relevant, relevant, (9,))
    assert all(found[f"{name}_at_9"] == pytest.approx(1) for name in PER_USER if name != "precision")
    assert ranking_metrics(np.full_like(relevant, -1), relevant, (9,))["ndcg_at_9"] == 0


def test_bounds_and_order_of_users(data):
    top, relevant, popularity = data
    order = np.random.default_rng(3).permutation(USERS)
    plain = ranking_metrics(top, relevant, (2, 10), popularity, users=60)
    assert ranking_metrics(top[order], relevant[order], (2, 10), popularity, users=60) == pytest.approx(plain)
    assert all(0 <= value <= 1 for name, value in plain.items() if "novelty" not in name)
    assert plain["recall_at_2"] <= plain["recall_at_10"]


def test_an_item_named_twice_counts_once():
    top = np.array([[3, 1, 2]], np.int32)
    twice, once = np.array([[1, 1, 7]], np.int32), np.array([[7, 1, -1]], np.int32)
    assert ranking_metrics(top, twice, (3,)) == ranking_metrics(top, once, (3,))


def test_no_user_has_relevant_items():
    none = np.full((3, 2), -1, np.int32)
    found = ranking_metrics(np.array([[0, 1]] * 3, np.int32), none, (2,), np.array([4, 0, 1]), users=5)
    assert np.isnan([v for name, v in found.items() if name not in ("coverage_at_2", "novelty_at_2")]).all()
    assert found["coverage_at_2"] == 2 / 3 and found["novelty_at_2"] > 0


def test_places():
    items, among = np.array([[5, -1, 2], [2, 9, 5]]), np.array([[2, 5, -1, 5], [-1, -1, 9, -1]])
    np.testing.assert_array_equal(ranking.places(items, among), [[1, -1, 0], [-1, 2, -1]])
    np.testing.assert_array_equal(ranking.places(items, np.full((2, 1), -1)), np.full((2, 3), -1))


@pytest.mark.parametrize("cutoffs", [(), (0, 10), (2.5,), (-1,)])
def test_cutoffs_that_are_none(cutoffs):
    with pytest.raises(UsageError, match="cutoffs are whole numbers from 1 on"):
        ranking_metrics(np.zeros((1, 3), np.int32), np.zeros((1, 1), np.int32), cutoffs)


def test_lists_shorter_than_the_cutoff(data):
    with pytest.raises(UsageError, match="cutoff 20 needs lists of the 20 best items, these hold 12"):
        ranking_metrics(data[0], data[1], (5, 20), data[2])
    whole = np.array([[2, 0, 1]], np.int32)
    assert ranking_metrics(whole, np.array([[1]], np.int32), (20,), np.ones(3, int))["recall_at_20"] == 1


def test_no_groups_below_one():
    with pytest.raises(UsageError, match="1 popularity group or more, got 0"):
        popularity_groups(np.ones(3), 0)
