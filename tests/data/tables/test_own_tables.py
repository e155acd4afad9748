"""`data=ctr`: a user's own CSV, TSV or Parquet file, read in pieces; every wrong file is one clear line."""

import builtins
import gzip
import hashlib
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from jdistill.data import ctr
from jdistill.data.tables import read
from jdistill.errors import UsageError
from jdistill.registry import build

ROWS = 500


def clicks(rows=ROWS):
    rng = np.random.default_rng(1)
    table = pd.DataFrame({
        "user": rng.integers(0, 40, rows), "item": [f"i{n}" for n in rng.integers(0, 90, rows)],
        "price": rng.lognormal(size=rows).round(3), "position": rng.integers(0, 10, rows),
        "when": pd.Timestamp("2024-03-01") + pd.to_timedelta(rng.permutation(rows), unit="h"),
        "label": rng.integers(0, 2, rows),
    })  # fmt: skip
    table.loc[::13, "price"] = np.nan
    table.loc[::17, "item"] = None
    return table


@pytest.fixture
def write(tmp_path):
    def to(name, table=None, **options):
        path = tmp_path / name
        (clicks() if table is None else table).to_csv(path, index=False, **options)
        return str(path)

    return to


def same(a, b):
    for left, right in zip((a.train, a.validation, a.test), (b.train, b.validation, b.test)):
        assert list(left) == list(right)
        for key in left:
            np.testing.assert_array_equal(left[key], right[key])
    assert (a.mean, a.std, a.schema) == (b.mean, b.std, b.schema)


KEYS = {"numbers": ("price", "position"), "categories": ("user", "item"), "group": "user"}


def test_columns_labels_groups_and_checksum(write):
    path = write("clicks.csv")
    data, table = ctr(path=path, **KEYS), clicks()
    trained = table.iloc[data.train["index"]]
    assert data.schema.fields == (0, 0, trained["user"].nunique() + 1, trained["item"].nunique() + 1) and data.classes == 2
    with open(path, "rb") as file:
        assert data.checksums == {"clicks.csv": hashlib.sha256(file.read()).hexdigest()}
    for split in (data.train, data.validation, data.test):
        rows = table.iloc[split["index"]]
        np.testing.assert_array_equal(split["label"], rows["label"])
        known = rows["price"].notna().to_numpy()
        np.testing.assert_array_equal(split["inputs"][known, 0], rows["price"].to_numpy(np.float32)[known])
        np.testing.assert_allclose(split["inputs"][~known, 0], table["price"].iloc[data.train["index"]].mean(), rtol=1e-6)
        assert ((split["inputs"][:, 3] > 0) == rows["item"].isin(trained["item"].dropna()).to_numpy()).all()
        assert len({*zip(split["group"], rows["user"])}) == rows["user"].nunique() == len({*split["group"]})
        known = rows["user"].isin(trained["user"]).to_numpy()
        codes = {*zip(split["inputs"][known, 2], rows["user"][known])}
        assert len(codes) == len({code for code, _ in codes}) == rows["user"][known].nunique()



WAYS = [("a.tsv", {"sep": "\t"}), ("a.csv.gz", {}), ("a.csv", {"encoding": "utf-8-sig"}), ("a.txt", {"sep": ";"})]


@pytest.mark.parametrize(("name", "options"), WAYS)
def test_every_way_of_writing_gives_the_same(write, name, options):
    separator = {"separator": ";"} if name == "a.txt" else {}
    same(ctr(path=write("b.csv"), **KEYS), ctr(path=write(name, **options), **KEYS, **separator))


@pytest.mark.parametrize("chunk", [7, 100])
def test_pieces_of_any_size_give_the_same(write, monkeypatch, chunk):
    path = write("clicks.csv")
    keys = {**KEYS, "split": "time", "time": "when", "hashed": ("item",), "buckets": 30}
    whole = ctr(path=path, **keys)
    monkeypatch.setattr(read, "CHUNK", chunk)
    same(whole, ctr(path=path, **keys))
    assert 2 < whole.schema.fields[3] <= 31


def test_columns_are_inferred_where_none_is_named(write):
    data = ctr(path=write("clicks.csv"), group="user", time="when")
    assert data.schema.fields[:2] == (0, 0) and len(data.schema.fields) == 3, "price, position, item"
    same(data, ctr(path=write("clicks.csv"), group="user", time="when", numbers=("price", "position"), categories=("item",)))


def test_a_column_of_row_numbers_without_a_name_is_not_inferred(write, tmp_path):
    clicks().to_csv(tmp_path / "indexed.csv")
    keys = {"group": "user", "time": "when"}
    same(ctr(path=str(tmp_path / "indexed.csv"), **keys), ctr(path=write("clicks.csv"), **keys))
    assert ctr(path=str(tmp_path / "indexed.csv"), numbers=("Unnamed: 0",)).schema.fields == (0,)


def test_time_and_group_may_be_read_as_columns_too(write):
    table = clicks().assign(when=np.random.default_rng(0).permutation(ROWS) + 1_600_000_000_000)
    path = write("clicks.csv", table)
    for keys in ({"numbers": ("when",)}, {"categories": ("when",)}):
        data = ctr(path=path, split="time", time="when", **keys)
        assert table["when"].iloc[data.train["index"]].max() < table["when"].iloc[data.test["index"]].min()


@pytest.mark.parametrize("kind", ["classes", "regression", "count"])
def test_other_kinds_of_labels(write, kind):
    data = ctr(path=write("clicks.csv"), label="position", kind=kind, numbers=("price",))
    assert data.classes == (10 if kind == "classes" else 1)
    np.testing.assert_array_equal(data.test["label"], clicks()["position"].iloc[data.test["index"]])
    assert data.test["label"].dtype == (np.int32 if kind == "classes" else np.float32)


def test_it_is_an_option_with_keys(write):
    config = {"name": "ctr", "path": write("clicks.csv"), "numbers": ["price"], "categories": ["item"]}
    same(build("data", config), ctr(path=config["path"], numbers=("price",), categories=("item",)))
    with pytest.raises(UsageError, match=r"data\.numbers has 'prise'.*did you mean 'price'"):
        build("data", {**config, "numbers": ["prise"]})


def test_parquet_gives_the_same_as_csv(write, tmp_path, monkeypatch):
    pytest.importorskip("pyarrow")
    table = clicks().astype({"user": "Int64", "item": "category"})
    table.loc[3, "user"] = pd.NA  # a gap must not turn "1" into "1.0"
    table.to_parquet(tmp_path / "clicks.parquet")
    keys = {**KEYS, "split": "time", "time": "when"}
    whole = ctr(path=write("clicks.csv", table), **keys)
    same(whole, ctr(path=str(tmp_path / "clicks.parquet"), **keys))
    monkeypatch.setattr(read, "CHUNK", 64)
    same(whole, ctr(path=str(tmp_path / "clicks.parquet"), **keys))
    with pytest.raises(UsageError, match=r"label has 'lable', no column of clicks\.parquet; did you mean 'label'"):
        ctr(path=str(tmp_path / "clicks.parquet"), label="lable")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 this is none")
    with pytest.raises(UsageError, match=r"broken\.parquet cannot be read as a table: [^\n]*$"):
        ctr(path=str(tmp_path / "broken.parquet"))


def test_parquet_without_pyarrow_says_how_to_install_it(tmp_path, monkeypatch):
    real = builtins.__import__

    def missing(name, *rest):
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(UsageError, match=r"a\.parquet needs pyarrow; run pip install 'jdistill\[parquet\]'"):
        ctr(path=str(tmp_path / "a.parquet"))


MEASURE = """
import resource, sys
import numpy as np
from jdistill.data import ctr
path = sys.argv[1]
ctr(path=sys.argv[2], numbers=("a",), categories=("word",))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
data = ctr(path=path, numbers=("a",), categories=("word",))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, len(data.train["label"]))
"""


def test_a_large_file_is_read_in_bounded_memory(tmp_path):
    """120 MB of text of which two columns are read: far less than the file is ever in memory."""
    block = "".join(f"{i % 2},{i}.5,w{i % 97},{'x' * 200}\n" for i in range(1000))
    large, small = tmp_path / "large.csv", tmp_path / "small.csv"
    with large.open("w") as file:
        file.write("label,a,word,unread\n")
        for _ in range(550):
            file.write(block)
    small.write_text("label,a,word,unread\n" + block)
    assert large.stat().st_size > 110e6
    done = subprocess.run([sys.executable, "-c", MEASURE, str(large), str(small)], capture_output=True, text=True, check=True)
    grown, trained = map(int, done.stdout.split())
    assert trained == 550_000 * 0.8 * 0.9
    assert grown < 75e3, f"{grown / 1e3:.0f} MB more for a file of {large.stat().st_size / 1e6:.0f} MB"


GOOD = "label,a,b\n1,1.5,x\n0,2.5,y\n"
FILES = {
    "empty": ("", {}, r"f\.csv is empty"),
    "header only": ("label,a,b\n", {}, r"f\.csv has a header line but no rows"),
    "blank": ("\n\n", {}, r"f\.csv cannot be read as a table: No columns"),
    "no header": ("1,1.5,x\n0,2.5,y\n", {}, r"f\.csv seems to have no header line: its first line is 1, 1\.5, x, and"),
    "missing label": ("lable,a\n1,2\n", {}, r"label has 'label', no column of f\.csv; did you mean 'lable'"),
    "missing number": (GOOD, {"numbers": ("aa",)}, r"numbers has 'aa', no column of f\.csv; did you mean 'a'\? \("),
    "missing category": (GOOD, {"categories": ("brand",)}, r"categories has 'brand', no column of f\.csv"),
    "missing group": (GOOD, {"group": "bb"}, r"group has 'bb', no column of f\.csv"),
    "missing time": (GOOD, {"time": "t"}, r"time has 't', no column of f\.csv"),
    "two names": ("label,a,a\n1,2,3\n", {}, r"f\.csv has two columns 'a'; rename one"),
    "ragged": ("label,a\n1,2\n0,3,4,5\n", {}, r"f\.csv cannot be read as a table: .*Expected 2 fields in line 3, saw 4"),
    "all ragged": ("label,a\n1,2,3\n0,3,4\n", {}, r"f\.csv cannot be read as a table: Length of header or names does"),
    "latin-1": ("label,a\n1,caf\xe9\n".encode("latin-1"), {}, r"f\.csv cannot be read as a table: .*utf-8"),
    "word": (GOOD, {"numbers": ("b",)}, r"column 'b' has 'x' in row 1, expected a number \(categories and"),
    "infinite": ("label,a\n1,2\n0,inf\n", {}, r"column 'a' has 'inf' in row 2, expected a finite float32"),
    "label": ("label,a\n1,2\n0,3\n3,4\n", {}, r"column 'label' has '3' in row 3, expected 0 or 1; set kind="),
    "count": ("label,a\n1,2\n-1,3\n", {"kind": "count"}, r"column 'label' has '-1\.0' in row 2, expected a count"),
    "one class": ("label,a\n" + "1,2\n" * 9, {}, r"label 'label' is 1 in all 9 rows, expected both 0 and 1"),
    "hashed": (GOOD, {"categories": ("b",), "hashed": ("a",)}, r"hashed has 'a', no column of categories \(known: b\)"),
    "hashed group": (GOOD, {"categories": ("b",), "group": "b", "hashed": ("b",)}, r"hashed must not name the group 'b'"),
    "buckets": (GOOD, {"buckets": 0}, r"buckets must be positive, got 0"),
    "both": (GOOD, {"numbers": ("a",), "group": "a"}, r"column 'a' cannot be a number and a category"),
    "kind": (GOOD, {"kind": "clicks"}, r"kind must be one of binary, classes, regression, count"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_cannot_be_read_is_one_clear_line(tmp_path, name):
    text, keys, message = FILES[name]
    path = tmp_path / "f.csv"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(UsageError, match=message) as error:
        ctr(path=str(path), **keys)
    assert "\n" not in str(error.value)


def test_rows_are_counted_through_all_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(read, "CHUNK", 5)
    path = tmp_path / "f.csv"
    path.write_text("label,a,day\n" + "1,2,3\n0,4,5\n" * 10 + "0,much,6\n")
    with pytest.raises(UsageError, match="column 'a' has 'much' in row 21, expected a number"):
        ctr(path=str(path), numbers=("a",))
    path.write_text("label,a,day\n" + "1,2,3\n0,4,5\n" * 10 + "0,1,2024-01-01\n")
    with pytest.raises(UsageError, match="column 'day' mixes numbers and text from row 21 on"):
        ctr(path=str(path), numbers=("a",), split="time", time="day")


def test_paths_that_name_no_file(tmp_path):
    (tmp_path / "clicks.csv").write_text(GOOD)
    (tmp_path / "clicks.xls").write_text(GOOD)
    (tmp_path / "cut.csv.gz").write_bytes(gzip.compress(GOOD.encode())[:20])
    for path, message in {
        "": r"path must name a file, such as data\.path=clicks\.csv",
        "click.csv": r"path '.*click\.csv' does not exist; did you mean 'clicks\.csv'",
        ".": r"path '.*' is a folder; name one file",
        "clicks.xls": r"clicks\.xls is not \.csv, \.tsv or \.parquet; set separator, or rename it",
        "cut.csv.gz": r"cut\.csv\.gz cannot be read as a table: Compressed file ended",
    }.items():
        with pytest.raises(UsageError, match=message):
            ctr(path=str(tmp_path / path) if path else "")
    with pytest.raises(UsageError, match=r"root '.*nowhere' is not a directory"):
        ctr(root=str(tmp_path / "nowhere"), path=str(tmp_path / "clicks.csv"))
