"""A user's own graded lists."""

import gzip

import numpy as np
import pandas as pd
import pytest
from sklearn.datasets import dump_svmlight_file, load_svmlight_file

from jdistill.data import ranking
from jdistill.errors import UsageError
from jdistill.registry import build


def frame(queries=12, seed=0):
    rng = np.random.default_rng(seed)
    rows = int(queries * 4)
    names = [f"q{i}" for i in rng.permutation(np.arange(rows) % queries)]
    table = pd.DataFrame({"qid": names, "rel": rng.integers(0, 3, rows)})
    return table.assign(**{name: rng.standard_normal(rows).round(3) for name in ("a", "b", "c")})


def csv(folder, table=None, name="my.csv", separator=","):
    (frame() if table is None else table).to_csv(folder / name, index=False, sep=separator)
    return {"path": str(folder / name), "query": "qid", "grade": "rel"}


def lists(dataset):
    """Query number -> (features, grades)."""
    splits = (dataset.train, dataset.validation, dataset.test)
    return {q: (i[g >= 0, :-1], g[g >= 0]) for s in splits for q, i, g in zip(s["index"], s["inputs"], s["grades"])}


def check(dataset, table, names):
    """Queries are numbered as they first occur, and hold their rows in order."""
    found = lists(dataset)
    assert len(found) == table["qid"].nunique()
    for number, query in enumerate(table["qid"].unique()):
        own = table[table["qid"] == query]
        np.testing.assert_allclose(found[number][0], own[list(names)].to_numpy(np.float32))
        np.testing.assert_array_equal(found[number][1], own["rel"])


@pytest.mark.parametrize(("name", "separator"), [("my.csv", ","), ("my.tsv", "\t"), ("my.csv.gz", ","), ("my.txt", ";")])
def test_csv_is_read_whole_and_by_chunks(tmp_path, monkeypatch, name, separator):
    monkeypatch.setattr("jdistill.data.tables.read.CHUNK", 7)
    keys = csv(tmp_path, name=name, separator=separator)
    dataset = ranking(**keys, separator=";" if separator == ";" else None, privileged=("c", "b"))
    check(dataset, frame(), "abc")
    assert dataset.privileged == (1, 2) and list(dataset.checksums) == [name]
    assert [len(s["label"]) for s in (dataset.train, dataset.validation, dataset.test)] == [9, 1, 2]


def test_chosen_features_keep_their_order_and_text_columns_may_stay_in_the_file(tmp_path):
    table = frame().assign(title="word")
    keys = csv(tmp_path, table)
    check(ranking(**keys, features=("c", "a")), table, "ca")
    with pytest.raises(UsageError, match=r"features: column 'title' of my\.csv is not of numbers"):
        ranking(**keys)
    built = build("data", {"name": "ranking", **keys, "features": ["c", "a"], "folds": 3, "fold": 2})
    assert len(built.test["label"]) == 4


def test_parquet_is_read_like_csv(tmp_path):
    pytest.importorskip("pyarrow")
    frame().to_parquet(tmp_path / "my.parquet")
    dataset = ranking(path=str(tmp_path / "my.parquet"), query="qid", grade="rel")
    check(dataset, frame(), "abc")


@pytest.mark.parametrize(("zero_based", "told"), [(True, "qid"), (False, "qid"), (False, "groups")])
def test_libsvm_is_read_as_scikit_learn_reads_it(tmp_path, zero_based, told):
    table = frame().sort_values("qid", kind="stable")
    values = np.where(table[["a", "b", "c"]] > 0, table[["a", "b", "c"]], 0)
    values[0, 0] = 0.5
    codes = pd.factorize(table["qid"])[0]
    path = tmp_path / "my.libsvm"
    query_id = codes if told == "qid" else None
    dump_svmlight_file(values, table["rel"], str(path), zero_based=zero_based, query_id=query_id)
    if told == "groups":
        (tmp_path / "my.libsvm.query").write_text("".join("4\n" for _ in range(12)))
    dataset = ranking(path=str(path), privileged=("2",))
    expected = load_svmlight_file(str(path), zero_based="auto")[0].toarray()
    check(dataset, pd.DataFrame(expected, columns=list("abc")).assign(qid=codes, rel=table["rel"].to_numpy()), "abc")
    assert dataset.privileged == ((2,) if zero_based else (1,))
    assert set(dataset.checksums) == {"my.libsvm"} | ({"my.libsvm.query"} if told == "groups" else set())


def test_libsvm_may_be_compressed_and_features_chosen(tmp_path):
    lines = "".join(f"{q % 2} qid:{q} 1:{q} 3:{q + 0.5}\n" for q in range(1, 11))
    with gzip.open(tmp_path / "my.svm.gz", "wt") as file:
        file.write(lines)
    found = lists(ranking(path=str(tmp_path / "my.svm.gz"), features=("3", "1")))
    assert [found[q][0].tolist() for q in range(10)] == [[[q + 0.5, q]] for q in range(1, 11)]


def test_single_documents_equal_grades_and_missing_features_are_kept(tmp_path):
    table = frame()
    table.loc[table["qid"] == "q3", "rel"] = 1
    table = table.drop(table.index[table["qid"] == "q4"][1:])
    table.loc[::5, "a"] = np.nan
    dataset = ranking(**csv(tmp_path, table))
    found, order = lists(dataset), table["qid"].unique().tolist()
    assert len(found[order.index("q4")][1]) == 1 and set(found[order.index("q3")][1]) == {1}
    train = table[table["qid"].isin([order[i] for i in dataset.train["index"]])]
    check(dataset, table.fillna({"a": train["a"].mean()}), "abc")


@pytest.mark.parametrize(
    ("change", "keys", "message"),
    [
        ({}, {"query": "quid"}, r"query has 'quid', no column of my\.csv; did you mean 'qid'\?"),
        ({}, {"grade": "grade"}, r"grade has 'grade', no column of my\.csv"),
        ({}, {"features": ("a", "bb")}, r"features has 'bb', no column of my\.csv"),
        ({}, {"features": ("a", "rel")}, "features must be different columns other than qid and rel"),
        ({}, {"features": ("a", "a")}, "features must be different columns"),
        ({}, {"privileged": ("z",)}, "privileged: unknown feature 'z'"),
        ({}, {"format": "tables"}, "format must be one of auto, table, libsvm"),
        ({}, {"folds": 13}, "folds needs at least as many queries, 13, and the data have 12"),
        ({"rel": -1}, {}, "column 'rel' has '-1.0' in row 3, expected a grade: a whole number from 0 on"),
        ({"rel": 0.5}, {}, "column 'rel' has '0.5' in row 3, expected a grade"),
        ({"rel": np.nan}, {}, "column 'rel' has 'nan' in row 3, expected a grade"),
        ({"qid": None}, {}, "column 'qid' has 'nan' in row 3, expected the name or number of a query"),
        ({"a": np.inf}, {}, "column 'a' has 'inf' in row 3, expected a finite float32"),
    ],
)
def test_what_cannot_be_is_one_clear_line(tmp_path, change, keys, message):
    table = frame().astype({"rel": float})
    for name, value in change.items():
        table.loc[2, name] = value
    with pytest.raises(UsageError, match=message) as error:
        ranking(**{**csv(tmp_path, table), **keys})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("my.csv", "", "my.csv is empty"),
        ("my.csv", "query,grade,a\n", "has a header line but no rows"),
        ("my.svm", "", "my.svm is empty"),
        ("my.svm", "1 1:2\n", r"does not tell every line's query \(0 of 1 lines have qid:\)"),
        ("my.svm", "1 qid:1 1:2\n0 1:3\n", r"does not tell every line's query \(1 of 2 lines"),
        ("my.svm", "1 qid:1 one:2\n", "is no LibSVM file"),
        ("my.svm", "-1 qid:1 1:2\n0 qid:2 1:2\n", "column 'grade' has '-1.0' in row 1, expected a grade"),
        ("my.svm", "1 qid:1 1:inf\n0 qid:2 1:2\n", "has an infinite feature in row 1"),
    ],
)
def test_broken_files_are_named(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(UsageError, match=message) as error:
        ranking(path=str(tmp_path / name))
    assert "\n" not in str(error.value)


def test_group_sizes_must_add_up(tmp_path):
    (tmp_path / "my.svm").write_text("1 1:2\n0 1:3\n2 1:3\n")
    for sizes, message in (("1 1", "whose sum is the 3 lines of my.svm; their sum is 2"), ("a", "must hold a whole number"),
                           ("3 0", "the smallest is 0")):  # fmt: skip
        (tmp_path / "my.svm.query").write_text(sizes)
        with pytest.raises(UsageError, match=message):
            ranking(path=str(tmp_path / "my.svm"))


def test_a_path_is_needed_and_must_exist(tmp_path):
    with pytest.raises(UsageError, match="path must name a CSV, Parquet or LibSVM file"):
        ranking()
    for name in ("none.csv", "none.svm"):
        with pytest.raises(UsageError, match=f"{name}.* (does not exist|cannot be read)"):
            ranking(path=str(tmp_path / name))
