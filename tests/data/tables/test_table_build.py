"""`build_table`: splits, encodings, nothing fitted on rows that are not trained on, one line for every wrong value."""

import re

import numpy as np
import pandas as pd
import pytest
from sklearn.compose import ColumnTransformer
from sklearn.impute import SimpleImputer
from sklearn.model_selection import StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from jdistill.data.splits import Selection, hold_out_test
from jdistill.data.tables import Features, Splitting, build_table
from jdistill.errors import UsageError

N = 300


def frame(seed=0, rows=N):
    rng = np.random.default_rng(seed)
    table = pd.DataFrame({
        "price": rng.lognormal(size=rows), "age": rng.integers(18, 80, rows).astype(float),
        "brand": rng.choice(["a", "b", "c", "d"], rows), "user": rng.integers(0, 20, rows),
        "day": rng.permutation(rows), "clicked": rng.choice([0, 1], rows, p=[0.8, 0.2]),
    })  # fmt: skip
    table.loc[::9, "age"] = np.nan
    table.loc[::11, "brand"] = None
    return table


FEATURES = {"numbers": ("price", "age"), "categories": ("brand",)}


def build(table=None, *, splitting=None, features=None, **changes):
    keys = {"label": "clicked", "kind": "binary", "checksums": {}, **changes}
    table = frame() if table is None else table
    return build_table("mine", table, Features(**{**FEATURES, **(features or {})}), Splitting(**(splitting or {})), **keys)


def test_rows_are_those_of_every_other_data_set():
    table, data = frame(), build(splitting={"split_seed": 4, "limit": 50})
    whole, held = hold_out_test(np.zeros((N, 1), np.float32), table["clicked"].to_numpy())
    selection = Selection(published=2, validation=0.1, split_seed=4, limit=50, classes_kept=None)
    for found, expected in zip((data.train, data.validation, data.test), selection(whole, held)):
        np.testing.assert_array_equal(found["index"], expected["index"])
        np.testing.assert_array_equal(found["label"], expected["label"])
        assert found["label"].dtype == np.int32 and found["inputs"].dtype == np.float32
    assert data.classes == 2 and "group" not in data.train


def test_standardised_inputs_are_those_of_a_scikit_learn_pipeline():
    table, data = frame(), build()
    pipeline = ColumnTransformer([
        ("numbers", make_pipeline(SimpleImputer(), StandardScaler()), ["price", "age"]),
        ("words", OneHotEncoder(handle_unknown="ignore", categories=[["a", "b", "c", "d"]]), ["brand"]),
    ])  # fmt: skip
    pipeline.fit(table.iloc[data.train["index"]])
    for split in (data.train, data.validation, data.test):
        expected = pipeline.transform(table.iloc[split["index"]])
        np.testing.assert_allclose(data.preprocess(split["inputs"]), expected, atol=2e-5)
    assert data.schema.fields == (0,) * 6


@pytest.mark.parametrize("encoding", ["index", "one_hot"])
def test_other_rows_change_nothing_that_is_fitted(encoding):
    features = {"encoding": encoding, "indicators": True, "clip": 0.05, "log1p": ("price",), "binned": ("age",), "bins": 4}
    before = build(features=features)
    table = frame()
    other = np.concatenate([before.test["index"], before.validation["index"]])
    table.loc[other, ["price", "age", "brand"]] = [1e6, 0.0, "unseen"]
    after = build(table, features=features)
    assert (before.mean, before.std, before.schema) == (after.mean, after.std, after.schema)
    np.testing.assert_array_equal(before.train["inputs"], after.train["inputs"])
    assert (before.test["inputs"] != after.test["inputs"]).any()
    brand = after.test["inputs"][:, -1:] if encoding == "index" else after.test["inputs"][:, -4:]
    assert (brand == 0).all(), "categories that training has not are category 0"


def test_index_encoding_and_privileged_columns():
    data = build(features={"encoding": "index", "privileged": ("brand", "price")})
    assert data.schema.fields == (0, 0, 5) and data.privileged == (0, 2)
    assert data.mean[2] == 0.0 and data.std[2] == 1.0
    codes = {"a": 1, "b": 2, "c": 3, "d": 4}
    rows = frame()["brand"].iloc[data.test["index"]]
    assert data.test["inputs"][:, 2].tolist() == [codes.get(word, 0) for word in rows]


def test_every_column_made_of_a_privileged_one_is_privileged():
    data = build(features={"privileged": ("brand", "age"), "indicators": True})
    assert data.privileged == (1, 2, 3, 4, 5, 6), "age, its indicator, four brands"
    assert data.mean[2] == 0.0 and data.std[2] == 1.0, "an indicator is not scaled"
    np.testing.assert_array_equal(data.train["inputs"][:, 2], data.train["index"] % 9 == 0)


def test_folds_test_every_row_once_and_are_stratified():
    parts = [build(splitting={"folds": 4, "fold": fold, "validation": 0.2}) for fold in range(4)]
    assert sorted(np.concatenate([p.test["index"] for p in parts])) == list(range(N))
    assert {len(p.test["index"]) for p in parts} == {N // 4}
    positives = [p.test["label"].sum() for p in parts]
    label = frame()["clicked"]
    expected = [label.iloc[test].sum() for _, test in StratifiedKFold(4).split(np.zeros(N), label)]
    assert max(positives) - min(positives) <= 1 and sum(positives) == sum(expected)
    for p in parts:
        assert sorted([*p.train["index"], *p.validation["index"], *p.test["index"]]) == list(range(N))


def test_a_split_by_time_trains_on_the_past():
    data = build(splitting={"split": "time", "validation": 0.25}, time="day")
    day = frame()["day"].to_numpy()
    days = [day[s["index"]] for s in (data.train, data.validation, data.test)]
    assert [len(d) for d in days] == [180, 60, 60]
    assert days[0].max() < days[1].min() and days[1].max() < days[2].min()
    dates = pd.Series(pd.Timestamp("2024-01-31") + pd.to_timedelta(day, unit="D")).astype(str)
    again = build(frame().assign(day=dates), splitting={"split": "time", "validation": 0.25}, time="day")
    np.testing.assert_array_equal(again.test["index"], data.test["index"])
    none = build(splitting={"split": "time", "validation": 0.0}, time="day")
    assert len(none.train["label"]) == 240 and none.validation["inputs"].shape == (0, 6)


def test_groups_are_numbered_alike_in_all_splits():
    table = frame()
    table.loc[5, "user"] = np.nan
    data = build(table, group="user")
    ids = np.full(N, -1)
    for split in (data.train, data.validation, data.test):
        ids[split["index"]] = split["group"]
        assert split["group"].dtype == np.int32
    assert len(set(zip(ids, table["user"].fillna(-1)))) == len(set(ids)) == 21, "one number a user, one for the missing"
    assert ids.min() == 0 and ids.max() == 20


@pytest.mark.parametrize(
    ("values", "kind", "expected", "classes"),
    [
        ([True, False, True], "binary", [1, 0, 1], 2),
        (["TRUE", "false", "True"], "binary", [1, 0, 1], 2),
        ([1.0, 0.0, 0.0], "binary", [1, 0, 0], 2),
        (["cart", "view", "buy"], "classes", [1, 2, 0], 3),
        (["10", "2", "1"], "classes", [2, 1, 0], 3),
        ([3, 1, 7], "classes", [1, 0, 2], 3),
        ([-1.5, 0.5, 2], "regression", [-1.5, 0.5, 2], 1),
        ([0, 3, 1], "count", [0, 3, 1], 1),
    ],
)
def test_labels_of_every_kind(values, kind, expected, classes):
    table = frame(rows=30).assign(clicked=pd.Series(values * 10))
    data = build(table, kind=kind)
    rows = np.concatenate([s["index"] for s in (data.train, data.validation, data.test)])
    found = np.concatenate([s["label"] for s in (data.train, data.validation, data.test)])
    np.testing.assert_array_equal(found, np.array(expected * 10)[rows])
    assert data.classes == classes and found.dtype == (np.float32 if classes == 1 else np.int32)


def test_rows_without_a_label_and_repeated_rows(capsys):
    table = pd.concat([frame(), frame().iloc[:30]]).assign(day=0)
    table.iloc[3, table.columns.get_loc("clicked")] = np.nan
    data = build(table)
    assert capsys.readouterr().err == "jdistill: data=mine: 1 of 330 rows have no clicked and are left out\n"
    rows = np.concatenate([s["index"] for s in (data.train, data.validation, data.test)])
    assert sorted(rows) == [i for i in range(330) if i != 3], "index is the row of the table, gaps stay"
    unique = build(table, duplicates=False)
    assert sum(len(s["index"]) for s in (unique.train, unique.validation, unique.test)) == 300


def changed(**columns):
    return lambda: frame().assign(**columns)


def once(column, row, value):
    def make():
        table = frame().astype({column: object})
        table.loc[row, column] = value
        return table

    return make


ERRORS = {
    "label": ({"label": "clickd"}, "label has 'clickd', no column of mine; did you mean 'clicked'? (known: price, age, "),
    "number": ({"features": {"numbers": ("prise",)}}, "numbers has 'prise', no column of mine; did you mean 'price'?"),
    "category": ({"features": {"categories": ("brnd",)}}, "categories has 'brnd', no column of mine; did you mean 'brand'?"),
    "group": ({"group": "usr"}, "group has 'usr', no column of mine; did you mean 'user'?"),
    "time": ({"time": "dya"}, "time has 'dya', no column of mine; did you mean 'day'?"),
    "privileged": (
        {"features": {"privileged": ("pric",)}},
        "privileged has 'pric', no column of numbers or categories; did you mean 'price'?",
    ),
    "log1p": ({"features": {"log1p": ("brand",)}}, "log1p has 'brand', no column of numbers (known: price, age)"),
    "twice": ({"features": {"categories": ("age",)}}, "column 'age' is named twice in numbers and categories"),
    "nothing": ({"features": {"numbers": (), "categories": ()}}, "numbers and categories are both empty"),
    "label read": ({"features": {"numbers": ("clicked",)}}, "label 'clicked' is also named in numbers or categories"),
    "encoding": ({"features": {"encoding": "onehot"}}, "encoding must be one of index, one_hot, got 'onehot'; did you mean"),
    "fill": ({"features": {"fill": "zero"}}, "fill must be one of mean, median, got 'zero'"),
    "clip": ({"features": {"clip": 0.5}}, "clip must be at least 0 and below 0.5, got 0.5"),
    "bins": ({"features": {"bins": 1}}, "bins must be at least 2, got 1"),
    "kind": ({"kind": "ctr"}, "kind must be one of binary, classes, regression, count, got 'ctr'"),
    "split": ({"splitting": {"split": "date"}}, "split must be one of random, time, got 'date'"),
    "no time": ({"splitting": {"split": "time"}}, "time must name the column that split=time sorts by"),
    "fold": ({"splitting": {"fold": 5}}, "fold must be at least 0 and below folds (5), got 5"),
    "folds": ({"splitting": {"folds": 1}}, "folds must be at least 2, got 1"),
    "time folds": ({"splitting": {"split": "time", "fold": 1}, "time": "day"}, "split=time takes no folds"),
    "validation": ({"splitting": {"validation": 0.999}}, "validation 0.999 of 300 rows leaves 0 to train and 60 to test on"),
    "not binary": ({"table": once("clicked", 6, 2)}, "column 'clicked' has '2' in row 7, expected 0 or 1; set kind=classes"),
    "no binary word": ({"table": once("clicked", 6, "yes")}, "column 'clicked' has 'yes' in row 7, expected 0 or 1"),
    "one class": ({"table": changed(clicked=1)}, "label 'clicked' is 1 in all 300 rows, expected both 0 and 1"),
    "one word": ({"table": changed(clicked="x"), "kind": "classes"}, "label 'clicked' is x in all 300 rows, expected"),
    "one class trained": (
        {"table": lambda: frame().assign(clicked=lambda t: (t["day"] > 250).astype(int)),
         "splitting": {"split": "time"}, "time": "day"},
        "label 'clicked' is class 0 in all 216 training rows, expected two or more",
    ),
    "no labels": ({"table": changed(clicked=np.nan)}, "label 'clicked' is empty in every row"),
    "no rows": ({"table": lambda: frame().iloc[:0]}, "mine has no rows"),
    "count": ({"table": once("clicked", 9, -1), "kind": "count"}, "column 'clicked' has '-1' in row 10, expected a count"),
    "infinite": ({"table": once("price", 17, np.inf)}, "column 'price' has 'inf' in row 18, expected a finite float32"),
    "infinite label": ({"table": once("clicked", 2, np.inf), "kind": "regression"}, "column 'clicked' has 'inf' in row 3"),
    "word": ({"table": once("price", 0, "cheap")}, "column 'price' has 'cheap' in row 1, expected a number"),
    "negative log": (
        {"table": once("price", 40, -2.0), "features": {"log1p": ("price",)}},
        "column 'price' has '-2.0' in row 41, expected at least 0 for log1p",
    ),
    "empty column": ({"table": changed(price=np.nan)}, "column 'price' is empty in all 216 training rows; leave it out"),
    "missing time": (
        {"table": lambda: frame().assign(day=lambda t: t["day"].where(t.index != 4)),
         "splitting": {"split": "time"}, "time": "day"},
        "column 'day' has 'nan' in row 5, expected a number or a date",
    ),
    "no date": (
        {"table": changed(day="yesterday"), "splitting": {"split": "time"}, "time": "day"},
        "column 'day' has 'yesterday' in row 1, expected a number or a date",
    ),
    "too wide": (
        {"table": lambda: frame(rows=20000).assign(brand=np.arange(20000).astype(str))},
        "encoding one_hot makes 14,402 columns, at most 10,000 are allowed; set encoding=index",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_what_cannot_be_is_one_clear_line(name):
    changes, message = ERRORS[name]
    table = changes.get("table", frame)()
    rest = {key: value for key, value in changes.items() if key != "table"}
    with pytest.raises(UsageError, match=re.escape(message)) as error:
        build(table, **rest)
    assert "\n" not in str(error.value)
