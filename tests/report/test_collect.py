import json
import subprocess
import sys

import fake_runs as fake
import pytest

from jdistill.errors import UsageError
from jdistill.report import collect
from jdistill.report.collect import flatten, parse_overrides, read_curves, read_jobs


def test_every_job_is_a_row(tmp_path):
    frame = collect(fake.small_sweep(tmp_path / "sweep"))
    assert list(frame["job"]) == list(range(9))
    assert frame["status"].value_counts().to_dict() == {"finished": 8, "failed": 1}
    first = frame.iloc[0]
    assert first["choices.loss"] == "none"
    assert first["metrics.test.accuracy"] == 0.90
    assert first["size.bytes"] == 9900
    assert first["latency_ms.256.p50"] == 0.2
    assert first["config.student.widths"] == "[64, 64]"
    assert first["teacher.metrics.test.accuracy"] == 0.97
    assert frame.iloc[8]["error"] == "out of memory"
    assert frame.iloc[8]["config.loss.beta"] == 8.0
    assert [type(seed) for seed in frame["config.seed"]] == [int] * 9


def test_corrupt_missing_and_unstarted_jobs_stay(tmp_path):
    records = [fake.result(0, 0.9), fake.result(1, 0.9), fake.result(2, 0.9), fake.result(3, 0.9)]
    records.append({**fake.failure(4, "diverged at step 7"), "status": "diverged"})
    records += [
        {"status": "running", "overrides": ["loss=kd", "seed=5"]},
        {"status": "pending", "overrides": ["seed=6"]},
    ]
    sweep = fake.write_sweep(tmp_path / "sweep", records)
    (sweep / "run01" / "result.json").write_text('{"status": "fini')
    (sweep / "run02" / "result.json").unlink()
    (sweep / "run03" / "result.json").write_text("[1]")
    (sweep / "run04" / "result.json").unlink()
    frame = collect(sweep)
    assert list(frame["status"]) == [
        "finished",
        "unreadable",
        "missing",
        "unreadable",
        "diverged",
        "running",
        "pending",
    ]
    assert "run01" in frame["error"][1]
    assert "no result.json" in frame["error"][2]
    assert "expected an object with the key 'status'" in frame["error"][3]
    assert frame["error"][4] == "diverged at step 7"
    # what their overrides and the rest of the sweep tell
    assert list(frame["config.seed"]) == [0, 1, 2, 3, 4, 5, 6]
    assert list(frame["choices.loss"]) == ["kd"] * 7
    assert frame["choices.data"][6] == "digits"
    assert frame["config.loss.temperature"][6] == 4.0


def test_keys_of_another_option_are_not_filled_in(tmp_path):
    records = [
        fake.result(0, 0.9, loss="none"),
        fake.result(0, 0.9, loss="kd"),
        {"status": "pending", "overrides": ["loss=none"]},
    ]
    frame = collect(fake.write_sweep(tmp_path / "sweep", records))
    assert frame["choices.loss"][2] == "none"
    assert frame["config.loss.temperature"][2] is None


def test_later_lines_supersede_and_cut_lines_are_ignored(tmp_path):
    sweep = fake.write_sweep(tmp_path / "sweep", [fake.result(0, 0.9), fake.result(1, 0.9)])
    jobs = sweep / "jobs.jsonl"
    lines = [{"job": 1, "dir": "b", "status": "failed", "error": "x", "started": 1, "ended": 3}]
    lines += [{"job": 1, "status": "running", "error": None, "started": 9}]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    jobs.write_text(jobs.read_text() + text + '{"job": 0, "status": "fai')
    found = read_jobs(sweep)
    assert [job["status"] for job in found] == ["finished", "running"]
    assert found[1]["dir"] == "b" and found[1]["started"] == 9 and "ended" not in found[1] and found[1]["error"] is None
    # a resumed sweep writes behind the cut line
    jobs.write_text(jobs.read_text() + '{"job": 2, "status": "pending"}\nrubbish\n')
    assert [job["status"] for job in read_jobs(sweep)] == ["finished", "running", "pending", "unreadable"]
    assert read_jobs(sweep)[3]["error"] == "jobs.jsonl line 6 is not a JSON job record"


def test_result_decides_over_jobs_file(tmp_path):
    sweep = fake.write_sweep(tmp_path / "sweep", [fake.result(0, 0.9)])
    (sweep / "jobs.jsonl").write_text(
        '{"job": 0, "dir": "run00", "overrides": [], "status": "running", "error": null}\n'
    )
    assert list(collect(sweep)["status"]) == ["finished"]


def test_several_folders_and_runs_given_twice(tmp_path):
    first = fake.write_sweep(tmp_path / "a", [fake.result(0, 0.9)])
    second = fake.write_sweep(tmp_path / "b", [fake.result(1, 0.9), fake.result(2, 0.9)])
    single = fake.write_run(tmp_path / "single", fake.result(3, 0.9))
    frame = collect([first, second, single, first, second / "run00", tmp_path / "a" / ".." / "a"])
    assert list(frame["config.seed"]) == [0, 1, 2, 3]
    assert list(frame["sweep"]) == [str(first), str(second), str(second), None]


def test_wrong_paths(tmp_path):
    fake.write_sweep(tmp_path / "sweep_losses", [fake.result(0, 0.9)])
    with pytest.raises(UsageError, match=r"sweep_loses: does not exist; did you mean 'sweep_losses'\?"):
        collect(tmp_path / "sweep_loses")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="neither a run folder"):
        collect(tmp_path / "empty")
    with pytest.raises(UsageError, match=r"it contains 1: give those \(sweep_losses\)"):
        collect(tmp_path)
    with pytest.raises(UsageError, match="is a file; give the run or sweep folder"):
        collect(tmp_path / "sweep_losses" / "jobs.jsonl")


def test_a_run_without_a_result_yet(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"epoch": 1, "metrics": {"validation": {"accuracy": 0.5}}}\n{"ep')
    assert list(collect(tmp_path / "run")["status"]) == ["missing"]
    assert read_curves(tmp_path / "run") == [{"epoch": 1, "validation.accuracy": 0.5}]


def test_flatten_and_overrides():
    assert flatten({"a": {"b": 1, "c": {}}, "d": [1, 2]}) == {"a.b": 1, "a.c": "{}", "d": "[1, 2]"}
    texts = [
        "loss=kd",
        "+loss.temperature=2.5",
        "seed=3",
        "a=true",
        "b=null",
        "w=[64,32]",
        "~x",
        "hydra.job.num=1",
        "loss@aux=kd",
        "name='a b'",
        "eq=a=b",
    ]
    assert parse_overrides(texts) == {
        "loss": "kd",
        "loss.temperature": 2.5,
        "seed": 3,
        "a": True,
        "b": None,
        "w": "[64, 32]",
        "name": "a b",
        "eq": "a=b",
    }


def test_report_starts_without_heavy_imports():
    heavy = ("jax", "hydra", "pandas", "scipy", "matplotlib")
    code = f"import sys, jdistill.report; print([m for m in {heavy} if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )
    code = (
        "import sys; from jdistill.report import table, figure, status, collect; "
        "import pandas, scipy.special; print('jax' in sys.modules)"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
        == "False"
    )
