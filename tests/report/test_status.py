import io
import json
import os
import re
import subprocess
import sys

import fake_runs as fake
import pytest

from jdistill import commands
from jdistill.errors import UsageError
from jdistill.report import collect, make_table, render
from jdistill.report.status import duration, status, status_text, watch

NOW = 1_700_000_000.0


def journal(sweep, *lines):
    """Appends lines to a sweep's journal, as a launcher does."""
    sweep.mkdir(exist_ok=True)
    with (sweep / "jobs.jsonl").open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def population(sweep):
    """A group of 2 that is done, a group of 3 that is training, a job that waits."""
    lines = [{"job": n, "dir": f"run{n}", "overrides": [f"seed={n}"], "status": "pending", "error": None} for n in range(6)]
    journal(sweep, *lines)
    journal(sweep, *({"job": n, "status": "running", "started": NOW - 300} for n in range(2)))
    journal(sweep, *({"job": n, "status": "finished", "ended": NOW - 180} for n in range(2)))
    journal(sweep, *({"job": n, "status": "running", "started": NOW - 180} for n in range(2, 5)))
    for n in range(2):
        fake.write_run(sweep / f"run{n}", fake.result(n, 0.9))
    for n in range(2, 5):
        folder = sweep / f"run{n}"
        folder.mkdir()
        (folder / "metrics.jsonl").write_text(
            "".join(json.dumps({"epoch": e}) + "\n" for e in range(1, 6)) + '{"epoch": 6, "tr'
        )
        os.utime(folder / "metrics.jsonl", (NOW - 90, NOW - 90))
    units = [{"jobs": [0, 1], "strategy": "vmap", "reason": "dense", "epochs": 10}]
    units += [{"jobs": [2, 3, 4], "strategy": "vmap", "reason": "dense", "epochs": 10}]
    (sweep / "units.json").write_text(json.dumps([*units, {"jobs": [5], "strategy": "loop", "reason": "alone"}]))
    return sweep


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
        "pruned": 0,
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


def test_groups_epochs_rate_and_time_left(tmp_path):
    """2 jobs done in 120 s; half of 3 in 180 s: 300 s busy for 3.5 jobs, 2.5 remain."""
    state = status(population(tmp_path / "sweep"), now=NOW)
    assert [unit["done"] for unit in state["units"]] == [True, False, False]
    (running,) = state["running"]
    assert (running["epoch"], running["epochs"], running["seconds"], running["silent"]) == (5, 10, 180, 90)
    assert state["jobs_per_minute"] == pytest.approx(1.0)
    assert state["seconds_left"] == pytest.approx(2.5 * 300 / 3.5)
    assert status_text(state).splitlines()[1:] == [
        "1 of 3 groups done: 2 vmap (5 jobs), 1 loop (1 job)",
        "1 jobs/min, about 4 min left",
        "  vmap, jobs 2-4: epoch 5 of 10, for 3 min, nothing written for 2 min",
    ]


def test_running_jobs_without_groups(tmp_path):
    sweep = population(tmp_path / "sweep")
    (sweep / "units.json").unlink()
    state = status(sweep, now=NOW)
    assert [unit["jobs"] for unit in state["running"]] == [[2], [3], [4]]
    assert state["seconds_left"] == pytest.approx(4 * 60)
    text = status_text(state)
    assert "loop, job 2: epoch 5, for 3 min" in text
    assert text.splitlines()[-1] == f"no units.json in {sweep}: which jobs are trained together is not known"


@pytest.mark.parametrize(
    ("damaged", "line"),
    [
        ('[{"jobs": [0', r"units.json cannot be read \(.*\): groups are not shown"),
        ("[1, 2]", r"units.json: expected a list of .*: groups are not shown"),
        ('{"jobs": "all"}', r"units.json: expected a list of"),
        ('[{"jobs": []}]', r"units.json: expected a list of"),
        ('[{"jobs": [77], "strategy": 3, "epochs": "x"}]', "1 of 1 group done"),
    ],
)
def test_damaged_groups(tmp_path, damaged, line):
    sweep = population(tmp_path / "sweep")
    (sweep / "units.json").write_text(damaged)
    assert re.search(line, status_text(status(sweep, now=NOW)))


def test_damaged_journal_and_metrics(tmp_path):
    sweep = population(tmp_path / "sweep")
    journal(sweep, {"job": 2, "started": "noon"}, {"job": 3, "overrides": 7, "started": None}, {"job": 0, "ended": [1]})
    with (sweep / "jobs.jsonl").open("ab") as file:
        file.write(b"\x00\xff rubbish\n")
    (sweep / "run2" / "metrics.jsonl").write_bytes(b"\xff\x00\n[1]\n")
    (sweep / "run3" / "metrics.jsonl").write_text('{"epoch": "many"}\n')
    (sweep / "run4" / "metrics.jsonl").unlink()
    (sweep / "run1" / "result.json").write_text("{")
    state = status(sweep, now=NOW)
    assert state["running"][0]["epoch"] == 0 and state["running"][0]["silent"] is None
    text = status_text(state)
    assert "vmap, jobs 2-4: no epoch yet" in text and "jobs.jsonl line 17 is not a JSON job record" in text
    assert "job 1 unreadable" in text


def test_a_clock_that_was_set_back(tmp_path):
    """Jobs that end before they start, or start in the future, give no negative times and no rate."""
    journal(
        tmp_path,
        {"job": 0, "status": "finished", "started": NOW, "ended": NOW - 3600},
        {"job": 1, "status": "running", "started": NOW + 3600},
        {"job": 2, "status": "pending"},
    )
    state = status(tmp_path, now=NOW)
    assert state["seconds_left"] is None and state["jobs_per_minute"] is None
    assert state["running"][0]["seconds"] == 0
    assert not re.search(r"-\d", status_text(state).replace(str(tmp_path), ""))


def test_pruned_is_done_and_no_failure(tmp_path):
    """A search's stopped trials are counted and shown, but are in no mean and no failure."""
    records = [
        *(fake.result(seed, 0.9, loss="none") for seed in range(2)),
        fake.result(0, 0.8),
        fake.result(1, 0.1, status="pruned", error="below the median in epoch 3"),
        fake.failure(2, "out of memory"),
        fake.failure(0, "below the median in epoch 2", loss="dkd", status="pruned"),
        fake.failure(1, "below the median in epoch 2", loss="dkd", status="pruned"),
    ]
    sweep = fake.write_sweep(tmp_path / "sweep", records)
    state = status(sweep)
    assert (state["counts"]["pruned"], state["counts"]["failed"], state["seconds_left"]) == (3, 1, 0)
    assert [failure["status"] for failure in state["failures"]] == ["failed"]
    table = make_table(collect(sweep))
    rows = {row["choices.loss"]: row for row in table.rows}
    assert rows["kd"]["test.accuracy.mean"] == pytest.approx(0.8)
    assert [(rows[k]["n"], rows[k]["failed"], rows[k]["pruned"]) for k in ("none", "kd", "dkd")] == [
        (2, 0, 0), (1, 1, 1), (0, 0, 2),
    ]  # fmt: skip
    assert rows["kd"]["reason"].endswith(": out of memory")
    text = render(table, format="text")
    assert "pruned (2): below the median in epoch 2" in text
    assert "jobs: 7 in all, 3 finished, 3 pruned, 1 failed; most frequent error: out of memory." in text
    assert "pruned" not in render(make_table(collect(fake.small_sweep(tmp_path / "other"))), format="text")


def test_watch_goes_on_until_all_is_done(tmp_path, monkeypatch):
    sweep, out, naps = population(tmp_path / "sweep"), io.StringIO(), []

    def nap(seconds):
        naps.append(seconds)
        for n in range(2, 6) if len(naps) == 3 else ():
            fake.write_run(sweep / f"run{n}", fake.result(n, 0.9))

    monkeypatch.setattr("time.sleep", nap)
    monkeypatch.setattr("time.time", lambda: NOW)
    watch(sweep, 7.0, out)
    assert naps == [7.0] * 3
    heads = [line for line in out.getvalue().splitlines() if ": 6 jobs: " in line]
    assert [head.split(": ")[-1] for head in heads] == ["2 finished, 3 running, 1 pending", "6 finished"]  # only changes


def test_watch_draws_on_a_terminal(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    out = Terminal()
    watch(fake.write_sweep(tmp_path / "sweep", [fake.result(0, 0.9)]), 1.0, out)
    assert "1 job: 1 finished" in out.getvalue()


def test_the_command(tmp_path, capsys):
    sweep = fake.write_sweep(tmp_path / "sweep", [fake.result(0, 0.9), fake.failure(1, "out of memory")])
    run = [sys.executable, "-m", "jdistill", "status", str(sweep), "--watch", "1"]
    done = subprocess.run(run, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        f"{sweep}: 2 jobs: 1 finished, 1 failed", "  job 1 failed: loss=kd seed=1: out of memory",
    ]  # fmt: skip
    assert commands.status([str(sweep)]) == 0 and capsys.readouterr().out == done.stdout
    for bad in ("0", "-3", "soon", "nan"):
        with pytest.raises(UsageError, match=f"expected a number of seconds above 0, up to 86400, got '{bad}'"):
            commands.status([str(sweep), f"--watch={bad}"])
