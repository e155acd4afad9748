import json

import fake_runs as fake
import pytest

from jdistill.errors import UsageError
from jdistill.report.status import duration, status, status_text


def test_counts_and_failures(tmp_path):
    records = [
        fake.result(0, 0.9),
        fake.result(1, 0.9),
        fake.failure(2, "out of memory\nTraceback"),
        fake.failure(3, "loss is nan", status="diverged"),
        {"status": "running", "overrides": ["seed=4"]},
        {"status": "pending", "overrides": ["seed=5"]},
        fake.result(6, 0.9),
    ]
    sweep = fake.write_sweep(tmp_path / "sweep", records)
    (sweep / "run06" / "result.json").unlink()
    state = status(sweep)
    assert state["jobs"] == 7
    assert state["counts"] == {
        "finished": 2,
        "failed": 1,
        "diverged": 1,
        "running": 1,
        "pending": 1,
        "missing": 1,
        "unreadable": 0,
    }
    assert state["seconds_left"] is None
    assert [f["error"] for f in state["failures"][:2]] == ["out of memory", "loss is nan"]
    text = status_text(state)
    assert text.splitlines()[0].endswith("7 jobs: 2 finished, 1 failed, 1 diverged, 1 running, 1 pending, 1 missing")
    assert "  job 2 failed: loss=kd seed=2: out of memory" in text
    assert "... and 2 more" in status_text(state, failures=1)


def test_time_left(tmp_path):
    """Two jobs at a time for 10 s, a pause overnight, one job of 20 s: busy 30 s for 3 jobs, 2 remain."""
    lines = [
        {"job": 0, "status": "finished", "started": 0, "ended": 10},
        {"job": 1, "status": "failed", "error": "x", "started": 0, "ended": 10},
        {"job": 2, "status": "finished", "started": 50000, "ended": 50020},
        {"job": 3, "status": "running", "started": 50020},
        {"job": 4, "status": "pending"},
    ]
    (tmp_path / "jobs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    state = status(tmp_path)
    assert state["seconds_left"] == pytest.approx(20)
    assert "about 20 s left" in status_text(state)


def test_nothing_left(tmp_path):
    assert status(fake.write_sweep(tmp_path / "sweep", [fake.result(0, 0.9)]))["seconds_left"] == 0


def test_not_a_sweep(tmp_path):
    fake.write_sweep(tmp_path / "sweep1", [fake.result(0, 0.9)])
    with pytest.raises(UsageError, match=r"not a sweep folder: it has no jobs.jsonl; did you mean 'sweep1'\?"):
        status(tmp_path / "sweep2")


def test_duration():
    assert [duration(s) for s in (45, 720, 12000, 3 * 86400 + 7200)] == ["45 s", "12 min", "3 h 20 min", "3 d 2 h"]
