"""Splits: stratified, disjoint, complete, reproducible, and what the common keys do to them."""

import numpy as np
import pytest

from jdistill.data.splits import Selection, as_split, hold_out_test, stratified_order
from jdistill.errors import UsageError

LABELS = np.random.default_rng(5).choice(4, 1000, p=[0.5, 0.3, 0.15, 0.05])


def selection(**changes):
    keys = {"published": 4, "validation": 0.1, "split_seed": 0, "limit": None, "classes_kept": None}
    return Selection(**{**keys, **changes})


def example_split(labels=LABELS):
    return as_split(10.0 * np.arange(len(labels), dtype=np.float32)[:, None], labels)


@pytest.mark.parametrize("seed", range(5))
def test_every_prefix_of_the_order_is_stratified(seed):
    order = stratified_order(LABELS, seed)
    assert sorted(order) == list(range(1000))
    running = np.cumsum(LABELS[order][:, None] == np.arange(4), axis=0)
    expected = np.arange(1, 1001)[:, None] * np.bincount(LABELS) / 1000
    assert np.abs(running - expected).max() < 1


def test_equal_classes_take_exact_turns():
    labels = np.tile(np.arange(10), 30)
    order = stratified_order(labels, 3)
    assert (np.sort(labels[order].reshape(30, 10), axis=1) == np.arange(10)).all()
    assert len({tuple(turn) for turn in labels[order].reshape(30, 10)}) > 20, "ties must be broken at random"


def test_order_is_uniform_within_a_class():
    labels = np.repeat([0, 1], 5)
    first = [stratified_order(labels, seed)[0] for seed in range(2000)]
    chi2 = ((np.bincount(first, minlength=10) - 200) ** 2 / 200).sum()
    assert chi2 < 27.9  # 9 degrees of freedom, p = 0.001


def test_splits_are_disjoint_complete_and_rows_keep_their_index():
    whole, test = example_split(), example_split(LABELS[:50])
    train, validation, kept_test = selection(validation=0.25)(whole, test)
    assert len(train["label"]) == 750 and len(validation["label"]) == 250
    assert sorted([*train["index"], *validation["index"]]) == list(range(1000))
    for part in (train, validation, kept_test):
        np.testing.assert_array_equal(part["inputs"][:, 0], 10 * part["index"])
        np.testing.assert_array_equal(part["label"], LABELS[part["index"]])
        assert part["label"].dtype == part["index"].dtype == np.int32
    share = np.bincount(validation["label"]) / np.bincount(LABELS)
    assert np.abs(share - 0.25).max() < 0.02


def test_seed_alone_decides_and_its_draw_never_changes():
    whole = example_split()
    first, again, other = (selection(split_seed=s)(whole, whole)[1]["index"] for s in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert set(first) != set(other)
    drawn = stratified_order(np.arange(100) % 4, 0)[:8].tolist()
    assert drawn == [82, 36, 83, 5, 94, 20, 11, 93], "another draw: results of old runs no longer compare"


def test_validation_0_gives_an_empty_split_of_the_same_form():
    whole = example_split()
    train, validation, _ = selection(validation=0.0)(whole, whole)
    assert len(train["label"]) == 1000
    assert validation["inputs"].shape == (0, 1) and validation["label"].shape == validation["index"].shape == (0,)


def test_limit_is_stratified_nested_and_leaves_validation_alone():
    whole = example_split()
    full, validation, _ = selection()(whole, whole)
    small, same, _ = selection(limit=20)(whole, whole)
    larger, _, _ = selection(limit=40)(whole, whole)
    np.testing.assert_array_equal(validation["index"], same["index"])
    assert len(small["label"]) == 20 and set(small["index"]) < set(larger["index"]) < set(full["index"])
    assert np.abs(np.bincount(small["label"], minlength=4) - 20 * np.bincount(LABELS) / 1000).max() < 2
    assert len(selection(limit=10**6)(whole, whole)[0]["label"]) == 900


def test_classes_kept_are_renamed_in_the_order_given():
    whole = example_split()
    chosen = selection(classes_kept=(3, 1))
    train, validation, test = chosen(whole, whole)
    assert chosen.classes == 2 and selection().classes == 4
    for part in (train, validation, test):
        np.testing.assert_array_equal(LABELS[part["index"]], np.array([3, 1])[part["label"]])
    assert len(test["label"]) == np.isin(LABELS, [1, 3]).sum()
    assert len(train["label"]) + len(validation["label"]) == len(test["label"])


def test_held_out_test_split_is_stratified_and_fixed():
    train, test = hold_out_test(np.arange(1000)[:, None], LABELS)
    assert sorted([*train["index"], *test["index"]]) == list(range(1000)) and len(test["label"]) == 200
    assert np.abs(np.bincount(test["label"]) / np.bincount(LABELS) - 0.2).max() < 0.02


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"validation": 1.0}, "validation must be at least 0 and below 1, got 1.0"),
        ({"validation": -0.1}, "validation must be"),
        ({"split_seed": -1}, "split_seed must be at least 0"),
        ({"limit": 0}, "limit must be positive, got 0"),
        ({"classes_kept": (3,)}, r"classes_kept must be two or more different labels between 0 and 3, got \[3\]"),
        ({"classes_kept": (1, 1)}, "classes_kept must be"),
        ({"classes_kept": (1, 4)}, "classes_kept must be"),
        ({"classes_kept": (-1, 2)}, "classes_kept must be"),
    ],
)
def test_impossible_values_are_refused_before_any_file_is_read(keys, message):
    with pytest.raises(UsageError, match=message):
        selection(**keys)


def test_no_row_left_to_train_on_is_refused():
    tiny = example_split(np.array([0, 1]))
    with pytest.raises(UsageError, match=r"validation 0\.9 leaves none of 2 examples"):
        selection(validation=0.9)(tiny, tiny)
