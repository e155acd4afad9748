"""Rows to padded lists and their splits, on made-up rows."""

import numpy as np
import pytest

from jdistill.data.search.lists import Queries, Rows, pad
from jdistill.errors import UsageError

KEYS = {"validation": 0.1, "split_seed": 0, "limit": None, "list_size": None}


def made(queries=40, longest=9, features=3, seed=0):
    rng = np.random.default_rng(seed)
    query = rng.permutation(np.repeat(np.arange(queries), rng.integers(1, longest + 1, queries)))
    features_ = (rng.standard_normal((len(query), features)) * 3 + 5).astype(np.float32)
    return Rows(query, features_, rng.integers(0, 4, len(query)))


def build(rows, **keys):
    return Queries(**{**KEYS, **keys})("made", rows, {})


def splits(dataset):
    return dataset.train, dataset.validation, dataset.test


def test_padding_puts_every_row_in_its_place():
    rows = made()
    lists = pad(rows, 12)
    assert lists["inputs"].shape == (40, 12, 4) and lists["inputs"].dtype == np.float32
    assert lists["grades"].dtype == lists["label"].dtype == np.int32
    for q in range(40):
        own = [(f, g) for a, f, g in zip(*rows) if a == q]
        for k in range(12):
            row = lists["inputs"][q, k]
            if k < len(own):
                np.testing.assert_array_equal(row, [*own[k][0], 1])
                assert lists["grades"][q, k] == own[k][1]
            else:
                assert not row.any() and lists["grades"][q, k] == -1
        grades = [g for _, g in own]
        assert lists["label"][q] == grades.index(max(grades))


@pytest.mark.parametrize("folds", [2, 5, 7])
def test_folds_partition_the_queries_whatever_the_split_seed(folds):
    rows, met = made(), []
    for fold in range(folds):
        dataset = build(rows, folds=folds, fold=fold, split_seed=fold)
        again = build(rows, folds=folds, fold=fold, split_seed=9)
        np.testing.assert_array_equal(dataset.test["index"], again.test["index"])
        parts = [set(split["index"]) for split in splits(dataset)]
        assert sum(map(len, parts)) == len(set.union(*parts)) == 40
        assert abs(len(parts[2]) - 40 / folds) < 1 and len(parts[1]) == round(0.1 * (40 - len(parts[2])))
        met += dataset.test["index"].tolist()
    assert sorted(met) == list(range(40))


def test_without_folds_a_fifth_of_the_queries_is_the_test_split():
    first, other = build(made()), build(made(), split_seed=1)
    assert [len(split["label"]) for split in splits(first)] == [29, 3, 8]
    np.testing.assert_array_equal(first.test["index"], other.test["index"])
    assert set(first.validation["index"]) != set(other.validation["index"])


def test_lists_hold_the_rows_of_their_query():
    rows = made()
    dataset = build(rows)
    for split in splits(dataset):
        for lists, grades, q in zip(split["inputs"], split["grades"], split["index"]):
            mask = grades >= 0
            np.testing.assert_array_equal(mask, lists[:, -1] == 1)
            np.testing.assert_array_equal(lists[mask, :-1], rows.features[rows.query == q])
            np.testing.assert_array_equal(grades[mask], rows.grade[rows.query == q])
    assert dataset.classes == 9 == dataset.test["inputs"].shape[1]


def test_mean_and_std_are_those_of_training_documents_alone():
    rows = made()
    dataset = build(rows)
    shifted = rows.features.copy()
    shifted[~np.isin(rows.query, dataset.train["index"])] += 1000
    other = build(rows._replace(features=shifted))
    assert dataset.mean == other.mean and dataset.std == other.std
    documents = dataset.train["inputs"][dataset.train["grades"] >= 0]
    np.testing.assert_allclose(dataset.mean[:-1], documents[:, :-1].mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(dataset.std[:-1], documents[:, :-1].std(axis=0), rtol=1e-5)
    out = np.asarray(dataset.preprocess(dataset.train["inputs"]))
    np.testing.assert_allclose(out[dataset.train["grades"] >= 0][:, :-1].std(axis=0), 1, rtol=1e-4)
    np.testing.assert_array_equal(out[..., -1], dataset.train["grades"] >= 0)


def test_nan_become_the_training_mean_and_constant_columns_keep_std_1():
    rows = made()
    features = rows.features.copy()
    features[::3, 0] = np.nan
    features[:, 1], features[:, 2] = np.nan, 0.1
    dataset = build(rows._replace(features=features))
    known = features[np.isin(rows.query, dataset.train["index"]), 0]
    assert dataset.mean[0] == pytest.approx(np.nanmean(known), rel=1e-6)
    assert dataset.mean[1] == 0 and dataset.std[1:3] == (1.0, 1.0)
    for split in splits(dataset):
        assert np.isfinite(split["inputs"]).all()
        for lists, grades, q in zip(split["inputs"], split["grades"], split["index"]):
            own = features[rows.query == q, 0]
            expected = np.where(np.isnan(own), np.float32(np.nanmean(known.astype(np.float64))), own)
            np.testing.assert_allclose(lists[grades >= 0, 0], expected, rtol=1e-6)


def test_list_size_cuts_training_lists_only_and_at_random():
    rows = made(longest=20)
    whole, cut = build(rows), build(rows, list_size=5)
    assert cut.train["inputs"].shape[1] == 5 and cut.test["inputs"].shape[1] == cut.classes == 20
    np.testing.assert_array_equal(cut.test["inputs"], whole.test["inputs"])
    np.testing.assert_array_equal(cut.validation["grades"], whole.validation["grades"])
    places = []
    for q, lists, grades in zip(cut.train["index"], cut.train["inputs"], cut.train["grades"]):
        own = rows.features[rows.query == q].tolist()
        kept = [own.index(row) for row in lists[grades >= 0, :-1].tolist()]
        assert kept == sorted(set(kept)) and len(kept) == min(5, len(own))
        places += kept
    assert max(places) > 10  # not the first five
    np.testing.assert_array_equal(cut.train["inputs"], build(rows, list_size=5).train["inputs"])


def test_limit_leaves_validation_alone():
    whole, few = build(made()), build(made(), limit=4)
    assert len(few.train["label"]) == 4 and set(few.train["index"]) <= set(whole.train["index"])
    np.testing.assert_array_equal(few.validation["index"], whole.validation["index"])


def test_an_empty_validation_split_keeps_its_shapes():
    empty = build(made(), validation=0.0).validation
    assert empty["inputs"].shape == (0, 9, 4) and empty["grades"].shape == (0, 9) and empty["label"].shape == (0,)


def test_a_published_test_file_is_numbered_on_its_own():
    dataset = Queries(**KEYS)("made", made(), {}, test=made(queries=7, longest=30, seed=1), privileged=(2,))
    np.testing.assert_array_equal(dataset.test["index"], np.arange(7))
    assert len(dataset.train["label"]) + len(dataset.validation["label"]) == 40 and dataset.privileged == (2,)
    longest = np.bincount(made(queries=7, longest=30, seed=1).query).max()
    assert all(split["inputs"].shape[1] == longest for split in splits(dataset))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"folds": 1}, "folds must be at least 2, got 1"),
        ({"folds": 5, "fold": 5}, "fold must be below folds = 5, got 5"),
        ({"fold": 1}, "fold is one of folds parts; set folds too"),
        ({"folds": 41}, "folds needs at least as many queries, 41, and the data have 40"),
        ({"validation": 0.99}, r"validation 0\.99 leaves none of 32 queries to train on"),
        ({"list_size": 0}, "list_size must be positive"),
        ({"limit": 0}, "limit must be positive"),
        ({"split_seed": -1}, "split_seed must be at least 0"),
    ],
)
def test_impossible_keys_are_refused(keys, message):
    with pytest.raises(UsageError, match=message):
        build(made(), **keys)
