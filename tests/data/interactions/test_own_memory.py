"""Repetitions in a user's own file: removed on the way, to the same result, and not held in memory."""

import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from jdistill.data.interactions import own
from jdistill.data.interactions.log import without_duplicates


def rows(count=500, seed=0):
    """Text of ratings with fractions, many of them of one user and item, unsorted in time."""
    rng = np.random.default_rng(seed)
    user, item = rng.integers(0, 12, count), rng.integers(0, 9, count)
    value, time = rng.integers(0, 1000, count) / 128, rng.integers(0, 40, count)
    return pd.DataFrame({"user": user, "item": item, "value": value, "time": time}).astype(str)


def log(frame, columns, duplicates, piece):
    reader = own.Reader("a.csv", {kind: kind for kind in columns}, duplicates)
    for start in range(0, len(frame), piece):
        reader.add(frame[start : start + piece].reset_index(drop=True))
    return reader.log()


@pytest.mark.parametrize("columns", [("user", "item"), ("user", "item", "value"), ("user", "item", "value", "time")])
@pytest.mark.parametrize("duplicates", ["last", "sum"])
@pytest.mark.parametrize(("folded", "piece"), [(1, 1), (7, 3), (100, 64), (10**6, 64)])
def test_removing_repetitions_on_the_way_changes_nothing(monkeypatch, columns, duplicates, folded, piece):
    monkeypatch.setattr(own, "_FOLDED", folded)
    frame = rows()
    expected = without_duplicates(log(frame, columns, "error", 64), duplicates)
    assert 50 < len(expected) < 110
    found = log(frame, columns, duplicates, piece)
    for name in ("user", "item", "value", "user_names", "item_names"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
        assert getattr(found, name).dtype == getattr(expected, name).dtype
    assert (found.time is None) == (expected.time is None)
    if found.time is not None:
        np.testing.assert_array_equal(found.time, expected.time)


def test_sums_of_many_pieces_are_not_rounded_again_and_again(monkeypatch):
    monkeypatch.setattr(own, "_FOLDED", 1)
    frame = pd.DataFrame({"user": ["a"] * 1000, "item": ["x"] * 1000, "value": ["0.1"] * 1000})
    assert log(frame, tuple(frame), "sum", 1).value.tolist() == [np.float32(1000 * float(np.float32(0.1)))]


def test_what_is_held_between_pieces_is_at_most_twice_the_different_pairs(monkeypatch):
    monkeypatch.setattr(own, "_FOLDED", 50)
    reader, frame = own.Reader("a.csv", {"user": "user", "item": "item"}, "last"), rows(10_000)
    held = []
    for start in range(0, len(frame), 10):
        reader.add(frame[start : start + 10].reset_index(drop=True))
        held.append(sum(map(len, reader._parts["user"])))
    assert reader.rows == 10_000 and len(reader.log()) == 108 and max(held) <= 2 * 108


PEAK = """
import resource, sys
import jdistill.data
from jdistill.registry import build

data = build("data", {"name": "interactions", "path": sys.argv[1], "value": "value", "time": "time"})
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024, len(data.train["label"]))
"""


@pytest.mark.slow
def test_a_file_ten_times_as_long_with_the_same_pairs_takes_no_more_memory(tmp_path):
    """300 MB, 7.5 million rows, of which 20 bytes each would be 150 MB, and twice that where they are put together."""
    rng, part = np.random.default_rng(0), 130_000
    users, items, times = rng.integers(0, 2000, part), rng.integers(0, 500, part), rng.integers(0, 10**8, part)
    lines = (f"user-{u:08d},item-{i:08d},{i % 5 + 1},{16 * 10**8 + t}\n" for u, i, t in zip(users, items, times, strict=True))
    block = "".join(lines).encode()
    found = []
    for name, size in (("small.csv", 30e6), ("large.csv", 300e6)):
        with (tmp_path / name).open("wb") as file:
            file.write(b"user,item,value,time\n")
            while file.tell() < size:
                file.write(block)
        command = [sys.executable, "-c", PEAK, str(tmp_path / name)]
        found.append(tuple(map(int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())))
        (tmp_path / name).unlink()
    (small, rows_of_small), (large, rows_of_large) = found
    assert rows_of_large == rows_of_small > 100_000
    assert large - small < 100, found  # MB
