"""Every committed experiment composes and its jobs pass all checks; the quickstart runs."""

import csv
import io
import re
from pathlib import Path

import pytest

from jdistill.cli import conf_dir
from tests.e2e.helpers import files, jobs, result, rows, succeed, teachers
from tests.marks import slow_but
from tests.realdata import PUBLISHED, require, require_files

# `recommend` is for a file of the user's; a scenario is chosen by experiments/documents_scenarios.py.
OPEN = ("recommend", "documents_scenarios")
EXPERIMENTS = [path for path in sorted((conf_dir() / "experiment").glob("*.yaml")) if path.stem not in OPEN]


def data_sets(text: str) -> set[str]:
    """The data sets an experiment file names: its override, or what it sweeps over."""
    found = re.findall(r"^ *(?:- override /data|data): *([\w,]+) *$", text, re.M)
    return {name for words in found for name in words.split(",")}


NAMED = {path.stem: path for path in EXPERIMENTS}
LARGE = {"cifar100_kd", "documents_compression", "losses_fashion_mnist", "quickstart", "ranking_distillation", "search_icecat"}
"""Grids of many jobs or large data; the quickstart's plan is read below."""
READ = {
    "citeulike": "citeulike-t/train.csv", "movielens": "ml-latest-small/ratings.csv",
    "online_shoppers": "online-shoppers/online_shoppers_intention.csv",
}  # fmt: skip
"""A file of each data set, beside those of `PUBLISHED`, that these experiments read from $JDISTILL_DATA."""


@pytest.mark.parametrize("path", slow_but(NAMED.keys() - LARGE, NAMED))
def test_every_experiment_composes_and_passes_the_checks(path):
    data = data_sets(path.read_text())
    assert data, "an experiment names its data set"
    for name in data & set(PUBLISHED):
        require(name)
    for name in data & READ.keys():
        require_files(READ[name])
    published = data & set(PUBLISHED)
    download = ["data.download=false"] if published == data else []
    lines = succeed("plan", f"experiment={path.stem}", *download).out.splitlines()
    count = int(re.match(r"(\d+) jobs? in \d+ groups?; sweep folder sweeps/", lines[0])[1])
    assert count >= 1 and len([line for line in lines if re.match(r" +\d+  [0-9a-f]{12}  ", line)]) == count
    assert files(Path()) == set()


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_every_experiment_is_listed_and_says_what_it_is(path):
    lines = dict(line.split("\t") for line in succeed("list", "experiments").out.splitlines())
    assert len(lines[path.stem]) > 20
    assert path.read_text().startswith("# @package _global_\n")


def test_quickstart_has_36_students_and_8_programs():
    lines = succeed("plan", "experiment=quickstart").out.splitlines()
    assert lines[0].startswith("36 jobs in 8 groups; sweep folder sweeps/quickstart-")
    groups = [line for line in lines if line.startswith("group ")]
    for i, line in enumerate(groups):  # int8 trains as none does; pruning has a stage more
        assert line.startswith(f"group {i}: {3 if i % 2 else 6} jobs")
    assert len(groups) == 8


def test_quickstart_in_small(tmp_path):
    small = (
        "loss=none,kd",
        "compression=none",
        "seed=0,1",
        "optim.epochs=1",
        "teacher.optim.epochs=1",
        "evaluate.latency=false",
    )
    done = succeed("-m", "experiment=quickstart", *small)
    (sweep,) = Path("sweeps").iterdir()
    assert sweep.name.startswith("quickstart-") and [job["status"] for job in jobs(sweep)] == ["finished"] * 4
    assert len(teachers(tmp_path / "cache")) == 1
    assert f"table: {sweep}/table.md" in done.out and f"figure: {sweep}/accuracy_bytes.png" in done.out
    assert {result(sweep / job["dir"])["config"]["optim"]["lr"] for job in jobs(sweep)} == {3e-3}
    assert all(len(rows(sweep / job["dir"])) == 1 for job in jobs(sweep))


@pytest.mark.slow
def test_quickstart_in_full(tmp_path):
    done = succeed("-m", "experiment=quickstart")
    (sweep,) = Path("sweeps").iterdir()
    found = jobs(sweep)
    assert len(found) == 36 and {job["status"] for job in found} == {"finished"}
    (folder,) = teachers(tmp_path / "cache")
    assert len(rows(folder)) == 40
    results = [result(sweep / job["dir"]) for job in found]
    taught = [record for record in results if record["choices"]["loss"] != "none"]
    assert len(taught) == 27 and {record["teacher"]["hash"] for record in taught} == {folder.name.removeprefix("mlp-")}
    assert taught[0]["teacher"]["metrics"]["test"]["accuracy"] > 0.96
    assert min(record["metrics"]["test"]["accuracy"] for record in results) > 0.9
    table = {(row["loss"], row["compression"]): row for row in csv.DictReader(io.StringIO((sweep / "table.csv").read_text()))}
    assert len(table) == 12 and {row["n"] for row in table.values()} == {"3"}
    size = {name: float(table["kd", name]["bytes"]) for name in ("none", "prune", "int8")}
    assert size["int8"] < size["prune"] < size["none"]
    assert f"figure: {sweep}/accuracy_bytes.png" in done.out and (sweep / "accuracy_bytes.png").stat().st_size > 10_000
