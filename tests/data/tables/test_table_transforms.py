"""Transforms against scikit-learn, and what they do with missing and unseen values."""

import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from sklearn.impute import SimpleImputer
from sklearn.preprocessing import KBinsDiscretizer, OrdinalEncoder, StandardScaler

from jdistill.data.tables.columns import Category, Features, Number
from jdistill.data.tables.transforms import Bins, Categories, Clip, Fill, as_numbers, hashed, moments, sorted_codes
from jdistill.errors import UsageError

RNG = np.random.default_rng(3)
TRAIN = RNG.lognormal(size=400).astype(np.float32)
TRAIN[::7] = np.nan
TEST = RNG.lognormal(sigma=3, size=200).astype(np.float32)
TEST[::5] = np.nan
WORDS, UNSEEN = pd.Series(["b", "a", None, "c", "a"]), pd.Series(["c", "z", None, "a"])


@pytest.mark.parametrize("how", ["mean", "median"])
def test_filling_is_that_of_scikit_learn(how):
    expected = SimpleImputer(strategy=how).fit(TRAIN[:, None]).transform(TEST[:, None])[:, 0]
    np.testing.assert_allclose(Fill.fit(TRAIN, how)(TEST), expected, rtol=1e-6)


def test_moments_are_those_of_scikit_learn_and_a_constant_has_std_1():
    table = np.stack([TRAIN[1:7], np.full(6, 0.1, np.float32), 1e6 + TRAIN[1:7]], axis=1)
    scaler = StandardScaler().fit(table.astype(np.float64))
    mean, std = moments(table)
    np.testing.assert_allclose(mean, scaler.mean_, rtol=1e-6)
    np.testing.assert_allclose(std, scaler.scale_, rtol=1e-6)
    assert std[1] == 1.0


def test_clipping_is_at_the_training_quantiles_of_known_values():
    clipped = Clip.fit(TRAIN, 0.05)(TEST)
    low, high = np.quantile(TRAIN[~np.isnan(TRAIN)].astype(np.float64), [0.05, 0.95])
    np.testing.assert_allclose(clipped, np.minimum(np.maximum(TEST, low), high), rtol=1e-6)
    assert np.isnan(clipped[::5]).all() and np.nanmax(TEST) > high and np.nanmin(TEST) < low


def test_bins_are_those_of_scikit_learn():
    known = TRAIN[~np.isnan(TRAIN)].astype(np.float64)
    binner = KBinsDiscretizer(6, encode="ordinal", strategy="quantile", quantile_method="linear").fit(known[:, None])
    bins = Bins.fit(TRAIN, 6)
    rows = TEST[~np.isnan(TEST)]
    np.testing.assert_array_equal(bins(rows), 1 + binner.transform(rows[:, None].astype(np.float64))[:, 0])
    assert bins.count == 7 and (bins(TEST)[::5] == 0).all()
    counts = np.bincount(bins(known))[1:]
    assert counts.max() - counts.min() <= 1
    assert Bins.fit(np.array([0, 0, 0, 0, 1.0]), 4).count == 3, "equal quantiles are one edge"


def test_categories_are_those_of_scikit_learn_with_0_for_unknown():
    encoder = OrdinalEncoder(handle_unknown="use_encoded_value", unknown_value=-1, encoded_missing_value=-1)
    encoder.fit(WORDS.dropna().to_frame())
    expected = 1 + encoder.transform(UNSEEN.to_frame())[:, 0]
    fitted = Categories.fit(WORDS)
    assert fitted(UNSEEN).tolist() == expected.tolist() == [3, 0, 0, 1]
    assert fitted.count == 4 and fitted(UNSEEN).dtype == np.int32


def test_how_a_column_was_read_changes_no_code():
    reversed_ = pd.Categorical(WORDS, categories=["z", "c", "b", "a"])
    known = Categories.fit(WORDS)
    assert Categories.fit(pd.Series(reversed_)).known.tolist() == known.known.tolist() == ["a", "b", "c"]
    assert known(pd.Series(reversed_)).tolist() == known(WORDS).tolist() == [2, 1, 0, 3, 1]
    codes, found = sorted_codes(pd.Series([10, 2, np.nan, 10]))
    assert codes.tolist() == [1, 0, -1, 1] and found.tolist() == [2, 10]


def test_one_hot_rows_are_zero_where_a_category_is_unknown():
    rows = Category(Categories.fit(WORDS), True)
    assert rows(UNSEEN).tolist() == [[0, 0, 1], [0, 0, 0], [0, 0, 0], [1, 0, 0]] and rows.fields == (0, 0, 0)
    index = Category(Categories.fit(WORDS), False)
    assert index(UNSEEN).tolist() == [[3], [0], [0], [1]] and index.fields == (4,)


def test_hashing_keeps_missing_values_spreads_the_others_and_is_the_same_in_every_process():
    words = pd.Series([f"item {i}" for i in range(5000)] + [None])
    found = hashed(words, 50)
    assert found[5000] is None or pd.isna(found[5000])
    counts = found.iloc[:5000].astype(int).value_counts()
    assert set(counts.index) == set(range(1, 51)) and counts.max() < 150
    code = "from jdistill.data.tables.transforms import hashed, pd; print(*hashed(pd.Series(['item 0', 'é']), 50))"
    again = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert again == hashed(pd.Series(["item 0", "é"]), 50).tolist()
    assert hashed(pd.Series([7, "7"], dtype=object), 1000).nunique() == 1, "a number is hashed by its text"


def test_a_number_is_clipped_then_logged_then_filled_and_flagged():
    features = Features(numbers=("x",), fill="mean", indicators=True, clip=0.1, log1p=("x",))
    number = Number.fit(TRAIN, features, True)
    known = TRAIN[~np.isnan(TRAIN)].astype(np.float64)
    low, high = np.quantile(known, [0.1, 0.9])
    out = number(pd.Series(TEST))
    missing = np.isnan(TEST)
    np.testing.assert_allclose(out[~missing, 0], np.log1p(np.clip(TEST[~missing], low, high)), rtol=1e-5)
    np.testing.assert_allclose(out[missing, 0], np.log1p(np.clip(known, low, high)).mean(), rtol=1e-5)
    np.testing.assert_array_equal(out[:, 1], missing)
    assert number.fields == (0, 0) and number.scaled == (True, False) and out.dtype == np.float32
    assert Number.fit(known, features, True).fields == (0,), "no indicator of a number that training never misses"


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([1, 2.5, None], [1, 2.5, np.nan]),
        (["1", " 2 ", None], [1, 2, np.nan]),
        ([True, None, False], [1, np.nan, 0]),
        (pd.array([1, None, 3], "Int64"), [1, np.nan, 3]),
    ],
)
def test_numbers_of_every_type_become_float32(rows, expected):
    numbers = as_numbers(pd.Series(rows))
    assert numbers.dtype == np.float32
    np.testing.assert_array_equal(numbers, np.array(expected, np.float32))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["1", "two"], "column 'x' has 'two' in row 2, expected a number"),
        ([1.0, 2.0, -np.inf], "column 'x' has '-inf' in row 3, expected a finite float32"),
        ([1e39], "column 'x' has '1e[+]39' in row 1, expected a finite float32"),
    ],
)
def test_values_that_are_no_numbers_are_named_by_column_and_row(rows, message):
    with pytest.raises(UsageError, match=message):
        as_numbers(pd.Series(rows, name="x"))
