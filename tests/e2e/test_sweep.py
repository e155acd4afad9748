"""Multiruns: the folder, the records, the table; members that fail; what a second time repeats."""

import csv
import io
import statistics
from pathlib import Path

import pytest

from tests.e2e.helpers import TINY, call, files, jobs, result, rows, run, sole_error, succeed, teachers

GRID = ("loss=none,kd", "seed=0,1", "compression=none,prune", "hydra.launcher.strategy=loop")
DIVERGING = ("-m", *TINY, "loss=none", "optim=sgd", "optim.lr=1e-3,1e30", "seed=0,1", "hydra.sweep.dir=sweep")
FAILING = ("-m", *TINY, "loss=none", "optim=sgd", "optim.lr=1e30,1e-3", "seed=0,1", "hydra.sweep.dir=sweep")
ONE_BY_ONE = ("hydra.launcher.strategy=loop", "hydra.launcher.workers=1")


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """A sweep of 8 jobs: (its folder, what it printed, its cache)."""
    where = tmp_path_factory.mktemp("sweep")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(where)
        patch.setenv("JDISTILL_CACHE", str(where / "cache"))
        done = succeed("-m", *TINY, *GRID, "hydra.sweep.dir=sweep")
    return where / "sweep", done, where / "cache"


def stamps(sweep: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in sweep.glob("*/*") if path.name in ("result.json", "metrics.jsonl")}


def test_a_sweep_has_one_line_and_one_folder_a_job(swept):
    sweep, _, _ = swept
    found = jobs(sweep)
    assert [job["job"] for job in found] == list(range(8))
    assert {job["status"] for job in found} == {"finished"} and {job["error"] for job in found} == {None}
    assert all(job["started"] <= job["ended"] for job in found)
    wanted = {f"loss={loss} seed={s} compression={c}" for loss in ("none", "kd") for s in (0, 1) for c in ("none", "prune")}
    assert {" ".join(job["overrides"][-3:]) for job in found} == wanted
    assert {job["dir"] for job in found} == {path.name for path in sweep.iterdir() if path.is_dir()}
    for job in found:
        folder, record = sweep / job["dir"], result(sweep / job["dir"])
        assert {"result.json", "metrics.jsonl", "artifact.safetensors", ".hydra/config.yaml"} <= files(folder)
        assert record["overrides"] == job["overrides"] and record["choices"] == job["choices"]
        assert record["status"] == "finished" and record["fingerprint"] == job["dir"]
        assert f"seed={record['config']['seed']}" in job["overrides"]


def test_a_pruned_member_recovers_and_is_half_zeros(swept):
    sweep, _, _ = swept
    for job in jobs(sweep):
        record, stages = result(sweep / job["dir"]), [row["stage"] for row in rows(sweep / job["dir"])]
        pruned = "compression=prune" in job["overrides"]
        assert stages == ["train" if "loss=none" in job["overrides"] else "distil"] * 2 + ["recover1"] * (len(stages) - 2)
        assert (len(stages) > 2) == pruned
        if pruned:
            weights, biases = 64 * 16 + 16 * 10, 26
            assert abs(record["size"]["nonzero"] - (weights / 2 + biases)) <= 2 + 26


def test_all_members_share_one_teacher(swept):
    sweep, _, cache = swept
    (folder,) = teachers(cache)
    hashes = {result(sweep / job["dir"])["teacher"]["hash"] for job in jobs(sweep) if "loss=kd" in job["overrides"]}
    assert hashes == {folder.name.removeprefix("mlp-")}
    assert len(rows(folder)) == 2  # its epochs, once


def test_the_table_is_written_and_printed(swept):
    sweep, done, _ = swept
    assert {"table.md", "table.csv", "table.tex", "accuracy_bytes.png", "jobs.jsonl", "multirun.yaml"} <= files(sweep)
    assert "table: sweep/table.md (also .csv, .tex)" in done.out and "figure: sweep/accuracy_bytes.png" in done.out
    assert (sweep / "accuracy_bytes.png").read_bytes().startswith(b"\x89PNG")
    assert len([line for line in done.err.splitlines() if "test accuracy" in line]) == 8
    table = {(row["loss"], row["compression"]): row for row in csv.DictReader(io.StringIO((sweep / "table.csv").read_text()))}
    assert len(table) == 4
    for (loss, compression), row in table.items():
        members = [job["dir"] for job in jobs(sweep) if {f"loss={loss}", f"compression={compression}"} <= set(job["overrides"])]
        accuracies = [result(sweep / name)["metrics"]["test"]["accuracy"] for name in members]
        assert int(row["n"]) == len(accuracies) == 2
        assert float(row["test.accuracy.mean"]) == pytest.approx(statistics.mean(accuracies))
        assert float(row["test.accuracy.std"]) == pytest.approx(statistics.stdev(accuracies))


def test_table_and_status_of_a_sweep(swept):
    sweep, done, _ = swept
    text = succeed("table", str(sweep)).out
    assert text.strip() and text.strip() in done.out
    for name, suffix in (("markdown", "md"), ("latex", "tex"), ("csv", "csv")):
        assert succeed("table", str(sweep), "--format", name).out.strip() == (sweep / f"table.{suffix}").read_text().strip()
    assert succeed("table", str(sweep), "--format", "csv", "--out", "deep/t.csv").out == "deep/t.csv\n"
    assert Path("deep/t.csv").read_text() == (sweep / "table.csv").read_text()
    assert "\\toprule" in (sweep / "table.tex").read_text() and (sweep / "table.md").read_text().startswith("| ")
    status = succeed("status", str(sweep)).out.splitlines()
    assert status[0] == f"{sweep}: 8 jobs: 8 finished" and "groups done" in status[1]
    by_loss = list(csv.DictReader(io.StringIO(succeed("table", str(sweep), "--by", "loss", "--format", "csv").out)))
    assert {row["loss"]: int(row["n"]) for row in by_loss} == {"none": 4, "kd": 4}


def test_table_of_single_runs(swept):
    sweep, _, _ = swept
    folders = [str(sweep / job["dir"]) for job in jobs(sweep) if "compression=none" in job["overrides"]]
    found = list(csv.DictReader(io.StringIO(succeed("table", *folders, "--format", "csv").out)))
    assert {row["loss"]: int(row["n"]) for row in found} == {"none": 2, "kd": 2}


def test_the_same_sweep_again_repeats_nothing(swept, monkeypatch):
    sweep, first, cache = swept
    monkeypatch.chdir(sweep.parent)
    monkeypatch.setenv("JDISTILL_CACHE", str(cache))
    before, books = stamps(sweep), [(job["job"], job["dir"], job["overrides"]) for job in jobs(sweep)]
    again = succeed("-m", *TINY, *GRID, "hydra.sweep.dir=sweep")
    assert again.out == first.out and len(before) == 16 and stamps(sweep) == before
    assert [(job["job"], job["dir"], job["overrides"]) for job in jobs(sweep)] == books


@pytest.mark.parametrize("overrides", [("loss=kd", "seed=1", "compression=prune"), ("loss=none", "seed=0", "compression=none")])
def test_a_member_is_the_same_run_as_alone(swept, overrides, tmp_path):
    sweep, _, _ = swept
    (job,) = [job for job in jobs(sweep) if set(overrides) <= set(job["overrides"])]
    alone, member = run(tmp_path / "alone", *TINY, *overrides), result(sweep / job["dir"])
    for key in ("metrics", "fingerprint", "size", "config", "choices", "epoch", "steps"):
        assert alone[key] == member[key], key
    for name in ("artifact.safetensors", "metrics.jsonl"):
        assert (tmp_path / "alone" / name).read_bytes() == (sweep / job["dir"] / name).read_bytes()


@pytest.mark.slow
def test_a_diverging_member_is_shown_and_the_others_finish():
    done = call(*DIVERGING)
    assert done.code == 1 and "Traceback" not in done.err
    assert done.error_lines == ["jdistill: error: 2 of 4 jobs failed; `jdistill status sweep` shows why"]
    sweep = Path("sweep")
    found = jobs(sweep)
    assert [job["status"] for job in found] == ["finished", "finished", "diverged", "diverged"]
    assert all("diverged" in job["error"] for job in found[2:])
    assert [result(sweep / job["dir"])["status"] for job in found] == [job["status"] for job in found]
    table = {float(row["optim.lr"]): row for row in csv.DictReader(io.StringIO((sweep / "table.csv").read_text()))}
    assert (table[1e-3]["n"], table[1e30]["n"]) == ("2", "0")
    assert table[1e30]["failed"].startswith("2") and table[1e30]["test.accuracy.mean"] == ""
    assert "diverged (2)" in " ".join(table[1e30].values()) and table[1e-3]["failed"] == "0"
    for name in ("text", "markdown", "latex", "csv"):
        assert "diverged" in succeed("table", "sweep", "--format", name).out
    status = succeed("status", "sweep").out.splitlines()
    assert status[0] == "sweep: 4 jobs: 2 finished, 2 diverged"
    assert len([line for line in status if "optim.lr=1e+30" in line and "diverged" in line]) == 2
    before = stamps(sweep)
    again = call(*DIVERGING)  # to diverge is final
    assert again.code == 1 and again.error_lines == done.error_lines and len(before) == 8 and stamps(sweep) == before
    call(*DIVERGING, "force=true")
    assert all(stamps(sweep)[name] > when for name, when in before.items())


@pytest.mark.slow
def test_fail_fast_stops_at_the_first_failure():
    done = call(*FAILING, *ONE_BY_ONE, "fail_fast=true")
    assert done.code == 1
    assert [job["status"] for job in jobs(Path("sweep"))] == ["diverged", "pending", "pending", "pending"]
    assert len([path for path in Path("sweep").iterdir() if path.is_dir()]) == 1
    assert "sweep: 4 jobs: 1 diverged, 3 pending" in succeed("status", "sweep").out
    rest = call(*FAILING, *ONE_BY_ONE)
    assert rest.code == 1
    assert [job["status"] for job in jobs(Path("sweep"))] == ["diverged", "diverged", "finished", "finished"]


def test_a_sweep_by_an_experiments_own_parameters_can_be_narrowed():
    succeed("-m", "experiment=quickstart", *TINY, "loss=none", "compression=none", "seed=0,1", "hydra.sweep.dir=sweep")
    assert [set(job["overrides"]) & {"loss=none", "compression=none", "seed=0", "seed=1"} for job in jobs(Path("sweep"))] == [
        {"loss=none", "compression=none", f"seed={seed}"} for seed in (0, 1)
    ]


def test_a_sweep_of_everything_refused_by_the_table_is_one_line():
    succeed("-m", *TINY, "loss=none", "seed=0", "hydra.sweep.dir=sweep")
    sole_error(call("table", "sweep", "--metric", "test.accurracy"), "accurracy.*did you mean", 2)
    sole_error(call("table", "sweep", "--by", "los"), "los", 2)
    sole_error(call("table", "sweep", "--format", "html"), "html", 2)
