"""A user's own file: what is read, what is refused and in which words, and in how much memory."""

import gzip
import os
import subprocess
import sys

import numpy as np
import pytest

import jdistill.data  # noqa: F401 (its options)
from jdistill.data.interactions import interactions_file, own
from jdistill.errors import UsageError
from jdistill.registry import build

ROWS = [("ann", "x1", "3", "30"), ("bob", "x2", "1", "10"), ("ann", "x3", "5", "10"), ("ann", "x2", "4", "20")]
ALL = {"value": "value", "time": "time"}


def write(path, rows=ROWS, header=("user", "item", "value", "time"), sep=",", open_=open):
    with open_(path, "wt", encoding="utf-8") as file:
        file.writelines(sep.join(row) + "\n" for row in [*([header] if header else []), *rows])
    return str(path)


def read(path, **keys):
    return build("data", {"name": "interactions", "path": str(path), **keys})


@pytest.mark.parametrize("rows", [1, 3, 1000])
@pytest.mark.parametrize(("name", "sep"), [("a.csv", ","), ("a.tsv", "\t"), ("a.csv", ";"), ("a.csv.gz", ",")])
def test_any_separator_and_piece_size_gives_the_same(tmp_path, monkeypatch, rows, name, sep):
    monkeypatch.setattr(own, "_ROWS", rows)
    path = write(tmp_path / name, sep=sep, open_=gzip.open if name.endswith("gz") else open)
    dataset = read(path, **ALL, split="leave_last_out", history=2)
    assert (dataset.schema.users, dataset.classes) == (2, 3)
    assert dataset.side.user_names.tolist() == ["ann", "bob"] and dataset.side.item_names.tolist() == ["x1", "x2", "x3"]
    # ann met x3, x2, x1 in this order, though the file says otherwise; bob's one row is for training
    assert dataset.train["inputs"].tolist() == [[1, 1], [0, 2]] and dataset.train["label"].tolist() == [1, 5]
    assert dataset.validation["inputs"].tolist() == [[0, 3, 2]] and dataset.validation["label"].tolist() == [[1]]
    assert dataset.test["inputs"].tolist() == [[0, 2, 1]] and dataset.test["label"].tolist() == [[0]]
    assert list(dataset.checksums) == [name] and len(dataset.checksums[name]) == 64


def test_column_names_order_and_further_columns_are_free(tmp_path):
    path = write(tmp_path / "a.csv", [("z", i, "", u) for u, i, _, _ in ROWS], ("note", "sku", "gap", "buyer"))
    dataset = read(path, user="buyer", item="sku")
    assert dataset.schema.users == 2 and dataset.train["label"].tolist() == [1, 1] and dataset.test["inputs"].tolist() == [[0]]


def test_ids_are_text_whatever_they_look_like(tmp_path):
    rows = [("7", "1", "1", "1"), ("07", "1.0", "1", "1"), ("seven", "é,1", "1", "1")]
    path = write(tmp_path / "a.csv", [(u, f'"{i}"', v, t) for u, i, v, t in rows])
    dataset = read(path)
    assert dataset.side.user_names.tolist() == ["7", "07", "seven"] and dataset.side.item_names.tolist() == ["1", "1.0", "é,1"]


@pytest.mark.parametrize("stamps", [
    ["2024-05-01T12:30:00Z", "2024-05-01 12:30:01", "2024-04-30", "2024-05-01T14:30:00.5+02:00"],
    ["1714566600", "1714566601", "1714435200", "1714566600.5"],
])  # fmt: skip
def test_times_as_numbers_and_as_iso_strings_order_alike(tmp_path, stamps):
    path = write(tmp_path / "a.csv", [("a", f"x{n}", "1", stamp) for n, stamp in enumerate(stamps)])
    dataset = read(path, time="time", split="leave_last_out", history=3)
    assert dataset.test["inputs"].tolist() == [[0, 2, 0, 3]] and dataset.test["label"].tolist() == [[1]]


def test_threshold_and_duplicates(tmp_path):
    path = write(tmp_path / "a.csv", [*ROWS, ("ann", "x1", "1", "5"), ("bob", "x2", "4", "11")])
    last, total = (read(path, **ALL, duplicates=d, split="temporal", test=0, validation=0) for d in ("last", "sum"))
    assert last.train["label"].tolist() == [3, 5, 4, 4] and total.train["label"].tolist() == [4, 5, 4, 5]
    kept = read(path, **ALL, duplicates="last", threshold=4, split="temporal", test=0, validation=0)
    assert kept.train["label"].tolist() == [1, 1, 1] and kept.classes == 2
    with pytest.raises(UsageError, match=r"rows 1 and 5 are both of user ann and item x1 \(2 such repetitions\)"):
        read(path, **ALL, duplicates="error")
    with pytest.raises(UsageError, match=r"threshold 9.* leaves none of the 6 rows of a.csv"):
        read(path, **ALL, threshold=9)


def test_a_user_without_history_and_an_item_never_trained_on(tmp_path):
    rows = [("old", f"x{n}", "1", str(n)) for n in range(8)] + [("new", "x9", "1", "90"), ("new", "x1", "1", "91")]
    path = write(tmp_path / "a.csv", rows)
    keys = {"time": "time", "split": "temporal", "validation": 0, "test": 0.2, "history": 2}
    dataset = read(path, **keys)
    assert dataset.test["inputs"].tolist() == [[1, 9, 9]] and dataset.test["label"].tolist() == [[8, 1]]
    assert read(path, **keys, unseen="drop").test["label"].tolist() == [[1]]
    with pytest.raises(UsageError, match="1 held-out interactions are of items without a training row, such as item x9"):
        read(path, **keys, unseen="error")


def test_a_single_user_is_enough(tmp_path):
    dataset = read(write(tmp_path / "a.csv", [r for r in ROWS if r[0] == "ann"]), history=3)
    assert dataset.schema.users == 1 and len(dataset.train["inputs"]) == 1 and len(dataset.test["inputs"]) == 1


@pytest.mark.parametrize(
    ("row", "line"),
    [
        (("", "x", "1", "1"), r"row 5: user \(column 'user'\) is missing; fill it in"),
        (("a", "NaN", "1", "1"), r"row 5: item \(column 'item'\) is missing"),
        (("a", "x", "", "1"), r"row 5: value \(column 'value'\) is missing"),
        (("a", "x", "-2", "1"), r"row 5: value '-2' \(column 'value'\) is negative; values are ratings or counts"),
        (("a", "x", "inf", "1"), r"row 5: value 'inf' .* is no finite number"),
        (("a", "x", "many", "1"), r"row 5: value 'many' .* is no finite number"),
        (("a", "x", "1", ""), r"row 5: time \(column 'time'\) is missing"),
        (("a", "x", "1", "yesterday"), r"row 5: time 'yesterday' .* is no number; write all times as numbers"),
        (("a", "x", "1", "2024-01-01"), r"row 5: time '2024-01-01' .* is no number"),
    ],
)
@pytest.mark.parametrize("rows", [2, 1000])
def test_a_wrong_entry_names_its_row(tmp_path, monkeypatch, rows, row, line):
    monkeypatch.setattr(own, "_ROWS", rows)
    with pytest.raises(UsageError, match=line) as error:
        read(write(tmp_path / "a.csv", [*ROWS, row]), **ALL)
    assert "\n" not in str(error.value) and "a.csv" in str(error.value)


def test_times_that_are_iso_must_all_be(tmp_path):
    path = write(tmp_path / "a.csv", [("a", "x", "1", "2024-01-01"), ("a", "y", "1", "May 2024")])
    with pytest.raises(UsageError, match=r"row 2: time 'May 2024' \(column 'time'\) is no time in ISO 8601"):
        read(path, time="time")


@pytest.mark.parametrize(
    ("text", "keys", "line"),
    [
        ("", {}, "is empty"),
        ("user,item\n", {}, "has a header and no rows"),
        ("user_id,item\n1,2\n", {}, r"has no column 'user'; did you mean 'user_id'\? \(columns: user_id, item\)"),
        ("user,item\n1,2\n", {"value": "rating"}, r"has no column 'rating' \(columns: user, item\)"),
        ("1,5,4.0\n1,6,3.0\n", {}, "has no header: its first line is '1,5,4.0'; write one, such as user,item"),
        ("user,item\n1,2\n1,2,3,4\n", {}, "cannot be read as CSV: .*line 3"),
        ("user,item\n1,2,3\n1,2,3\n", {}, "rows have more fields than the header; quote fields that hold ','"),
        (b"user,item\n\xff\xfe,2\n", {}, "cannot be read as CSV: .*utf-8"),
    ],
)
def test_a_wrong_file_is_one_line(tmp_path, text, keys, line):
    path = tmp_path / "a.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UsageError, match=line) as error:
        read(path, **keys)
    assert "\n" not in str(error.value) and "a.csv" in str(error.value)


def test_a_missing_path_is_one_line(tmp_path):
    with pytest.raises(UsageError, match=r"data.path 'nowhere.csv' is missing"):
        read("nowhere.csv")
    with pytest.raises(UsageError, match="is a folder"):
        read(tmp_path)
    with pytest.raises(UsageError, match="path is not set"):
        interactions_file()
    with pytest.raises(UsageError, match=r"data.split must be one of .* did you mean 'ratio'"):
        read("nowhere.csv", split="ratios")
    with pytest.raises(UsageError, match=r"unknown key 'data.usr'; did you mean 'user'"):
        read("nowhere.csv", usr="user")


def test_parquet_equals_csv(tmp_path, monkeypatch):
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(own, "_ROWS", 3)
    user, item, value, time = zip(*ROWS)
    stamps = arrow.array([int(t) for t in time], arrow.timestamp("s"))
    numbers = {"value": [float(v) for v in value], "item": [int(i[1:]) for i in item]}
    table = {"time": stamps, "user": user, "extra": user, **numbers}
    parquet.write_table(arrow.table(table), tmp_path / "a.parquet")
    path = write(tmp_path / "a.csv", [(u, i[1:], v, t) for u, i, v, t in ROWS])
    a, b = (read(p, **ALL, split="leave_last_out", history=2) for p in (path, tmp_path / "a.parquet"))
    for split in ("train", "validation", "test"):
        for name, array in getattr(a, split).items():
            np.testing.assert_array_equal(array, getattr(b, split)[name])
    assert b.side.item_names.tolist() == ["1", "2", "3"]
    with pytest.raises(UsageError, match=r"has no column 'usr'; did you mean 'user'"):
        read(tmp_path / "a.parquet", user="usr")
    (tmp_path / "b.parquet").write_text("no parquet")
    with pytest.raises(UsageError, match="cannot be read as Parquet"):
        read(tmp_path / "b.parquet")


def test_parquet_without_pyarrow_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_text("")
    with pytest.raises(UsageError, match=r"needs pyarrow: pip install 'jdistill\[parquet\]'"):
        read(tmp_path / "a.parquet")


MEASURE = """
import resource, sys
from pathlib import Path
from jdistill.data.interactions import own

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

own._ROWS = 20_000
small, large = map(Path, sys.argv[1:])
columns = {"user": "user", "item": "item", "value": "value", "time": "time"}

def read(file):
    reader = own.Reader(file, columns)
    for piece in own.pieces(file, list(columns), "auto"):
        reader.add(piece)
    return reader.log()

read(small)  # what importing and one piece cost
before = peak()
log = read(large)
print(peak() - before, len(log))
"""


@pytest.mark.slow
def test_a_large_file_is_read_in_bounded_memory(tmp_path):
    rng, part = np.random.default_rng(0), 100_000
    head = b"user,item,value,time\n"
    users, items = rng.integers(0, 20_000, part), rng.integers(0, 10_000, part)
    lines = (f"customer-{u:08d},product-{i:08d},{u % 5 + 1},17145666{i % 100:02d}\n" for u, i in zip(users, items))
    text = "".join(lines).encode()
    (tmp_path / "small.csv").write_bytes(head + text[: text.index(b"\n", len(text) // 3) + 1])
    with (tmp_path / "large.csv").open("wb") as file:
        file.write(head)
        for _ in range(13):
            file.write(text)
    size = os.path.getsize(tmp_path / "large.csv")
    assert size > 60e6
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "small.csv"), str(tmp_path / "large.csv")]
    grown, rows = map(int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    assert rows == 13 * part
    # 20 bytes a row, once in pieces and once whole; the text of this file alone is 48 bytes a row
    assert grown < 2 * 20 * rows + 15e6 < 1.2 * size
