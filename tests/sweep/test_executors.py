"""Units in other processes: what comes back, what a death costs, how all of it stops. The units here do no training."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from jdistill.errors import RunError, UsageError
from jdistill.standing import Diverged, Interrupted, Pruned
from jdistill.sweep.executors.mailbox import Mailbox, Reader
from jdistill.sweep.executors.processes import Processes, shares_of_machine, visible_gpus
from jdistill.sweep.executors.ray import Ray
from jdistill.sweep.executors.slurm import Slurm
from jdistill.sweep.units import Job, Unit
from jdistill.sweep.worker import lost, pack, settings_of, unpack
from tests.sweep.stand_in import finish, wait_for

CARRY = "tests.sweep.stand_in:carry"
ROOT = Path(__file__).resolve().parents[2]


# -- how the tests call them


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def units_of(tmp_path, *groups):
    """A unit a group of actions; the jobs are counted through."""
    units, number = [], 0
    for actions in groups:
        jobs = []
        for do in actions.split():
            jobs.append(Job(number, (f"do={do}",), {"do": do, "number": number}, {}, tmp_path / "jobs" / str(number)))
            number += 1
        units.append(Unit(tuple(jobs), "loop", "a test"))
    return units


def carry(executor, units, *, stop=lambda: False, progress=lambda *_: None, judge=None, fail_fast=False):
    """The outcomes, by job number."""
    outcomes, thread = {}, threading.get_ident()

    def done(unit, found):
        assert threading.get_ident() == thread and len(found) == len(unit.jobs)
        outcomes.update({job.number: outcome for job, outcome in zip(unit.jobs, found, strict=True)})

    executor.run(units, done, stop=stop, progress=progress, judge=judge, fail_fast=fail_fast)
    assert sorted(outcomes) == [job.number for unit in units for job in unit.jobs]
    return outcomes


def processes(tmp_path, workers=2, **more):
    return Processes(tmp_path / "workers", workers=workers, gpus=0, carry=CARRY, **more)


def local(tmp_path, workers=2):
    return Slurm(tmp_path / "submitit", cluster="local", workers=workers, gpus_per_node=0, carry=CARRY)


def children(tmp_path):
    return sorted({int(pid) for path in (tmp_path / "jobs").glob("*/attempts") for pid in path.read_text().split()})


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


# -- processes


def test_units_are_served_by_workers_that_stay(tmp_path):
    told = []
    units = units_of(tmp_path, "finish finish", "finish", "finish", "finish finish", "finish")
    found = carry(processes(tmp_path), units, progress=lambda unit, *rest: told.append((unit.jobs[0].number, rest)))
    assert [found[n]["job"] for n in range(7)] == list(range(7))
    pids = {outcome["pid"] for outcome in found.values()}
    assert 1 <= len(pids) <= 2 and os.getpid() not in pids and not any(map(alive, pids))
    assert (0, ("student", 1, 2, 3.0)) in told


def test_a_worker_that_dies_takes_only_its_unit_with_it(tmp_path):
    found = carry(processes(tmp_path), units_of(tmp_path, "finish die finish", "finish", "finish", "finish"))
    assert found[0]["status"] == "finished" and found[0]["job"] == 0  # it was on disk
    for number in (1, 2):
        assert type(found[number]) is RunError and "the worker process died (signal 9" in str(found[number])
    assert [found[n]["job"] for n in (3, 4, 5)] == [3, 4, 5]


def test_a_worker_killed_from_outside(tmp_path):
    threading.Thread(target=_kill_job, args=(tmp_path, 0), daemon=True).start()
    found = carry(processes(tmp_path), units_of(tmp_path, "until_stop", "finish", "finish"))
    assert "died (signal 9" in str(found[0]) and found[1]["job"] == 1 and found[2]["job"] == 2


def _kill_job(tmp_path, number):
    path = tmp_path / "jobs" / str(number) / "attempts"
    wait_for(lambda: path.exists() and path.read_text().endswith("\n"))
    os.kill(int(path.read_text()), signal.SIGKILL)


def test_errors_come_back_as_what_they_are(tmp_path):
    found = carry(processes(tmp_path), units_of(tmp_path, "diverge finish", "raise finish"))
    assert type(found[0]) is Diverged and str(found[0]) == "diverged: the loss is nan" and found[1]["job"] == 1
    assert type(found[2]) is RunError and "KeyError: 'loss'" in str(found[2]) and type(found[3]) is RunError
    assert "Traceback" in "".join(path.read_text() for path in (tmp_path / "workers").glob("*.log"))


def test_a_wish_to_stop_reaches_all(tmp_path):
    begun = [tmp_path / "jobs" / str(n) / "attempts" for n in (0, 1)]
    units = units_of(tmp_path, "until_stop", "until_stop", "finish", "finish")
    found = carry(processes(tmp_path), units, stop=lambda: all(path.exists() for path in begun))
    assert {type(found[n]) for n in range(4)} == {Interrupted}
    assert "checkpoint was written" in str(found[0]) and "before it began" in str(found[3])
    assert not any(map(alive, children(tmp_path)))


def test_a_terminated_worker_writes_checkpoints_and_serves_on(tmp_path):
    units = units_of(tmp_path, "until_stop", "finish", "finish")
    path = tmp_path / "jobs" / "0" / "attempts"

    def terminate():
        wait_for(lambda: path.exists() and path.read_text().endswith("\n"))
        os.kill(int(path.read_text()), signal.SIGTERM)

    threading.Thread(target=terminate, daemon=True).start()
    found = carry(processes(tmp_path, workers=1), units)
    assert type(found[0]) is Interrupted and found[1]["job"] == 1 and found[2]["job"] == 2


def test_fail_fast_stops_the_others(tmp_path):
    found = carry(processes(tmp_path), units_of(tmp_path, "until_stop", "diverge", "finish", "finish"), fail_fast=True)
    assert [type(found[n]) for n in range(4)] == [Interrupted, Diverged, Interrupted, Interrupted]


def test_the_search_is_asked_in_the_parent(tmp_path):
    asked = []

    def judge(job, epoch, metrics):
        asked.append((job, epoch, metrics["accuracy"], os.getpid()))
        return "hopeless" if epoch == 3 else None

    found = carry(processes(tmp_path), units_of(tmp_path, "judged", "finish", "judged"), judge=judge)
    assert sorted(asked) == [(job, epoch, 0.5, os.getpid()) for job in (0, 2) for epoch in (1, 2, 3)]
    assert [(type(found[n]), str(found[n])) for n in (0, 2)] == [(Pruned, "hopeless in epoch 3")] * 2


ORPHANS = """
import sys
from pathlib import Path
from tests.sweep.test_executors import carry, processes, units_of
carry(processes(Path(sys.argv[1])), units_of(Path(sys.argv[1]), "until_stop", "until_stop", "finish"))
"""


def test_workers_end_with_their_parent(tmp_path):
    parent = subprocess.Popen([sys.executable, "-c", ORPHANS, str(tmp_path)], cwd=ROOT)
    try:
        wait_for(lambda: len(children(tmp_path)) == 2)
        assert all(map(alive, children(tmp_path)))
    finally:
        parent.kill()
        parent.wait()
    wait_for(lambda: not any(map(alive, children(tmp_path))))
    assert not (tmp_path / "jobs" / "2").exists()


@pytest.mark.parametrize(
    ("workers", "gpus", "units", "wanted"),
    [
        (3, ["0", "1"], 9, [{"CUDA_VISIBLE_DEVICES": g} for g in ("0", "1", "0")]),
        (0, ["2", "GPU-5"], 9, [{"CUDA_VISIBLE_DEVICES": g} for g in ("2", "GPU-5")]),
        (0, ["0", "1"], 1, [{"CUDA_VISIBLE_DEVICES": "0"}]),
        (5, [], 3, [{}] * 3),
    ],
)
def test_shares_of_the_machine(workers, gpus, units, wanted, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    shares = shares_of_machine(workers, gpus, units)
    assert [{k: v for k, v in share.items() if k != "PJRT_NPROC"} for share in shares] == wanted
    assert sum(int(share["PJRT_NPROC"]) for share in shares) <= 8
    assert len(shares_of_machine(0, [], 99)) == 8


def test_gpus_are_those_that_cuda_may_see(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name == "jax_cuda12_plugin" or None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    assert visible_gpus("auto") == ["3", "5"] and visible_gpus(1) == ["3"] and visible_gpus(0) == []
    with pytest.raises(UsageError, match="gpus=3, but 2"):
        visible_gpus(3)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert visible_gpus("auto") == []


def test_a_worker_sees_its_gpu_only(tmp_path, monkeypatch):
    monkeypatch.setattr("jdistill.sweep.executors.processes.visible_gpus", lambda wanted: ["4", "7"])
    found = carry(processes(tmp_path, workers=0), units_of(tmp_path, "until_stop", "finish", "diverge"), fail_fast=True)
    assert found[1]["CUDA_VISIBLE_DEVICES"] == "7" and os.environ.get("CUDA_VISIBLE_DEVICES") is None


def test_wrong_keys_are_refused(tmp_path):
    for make, what in (
        (lambda: Processes(tmp_path, gpus="all"), "gpus must be 'auto' or a count.*'all'"),
        (lambda: Slurm(tmp_path, cluster="pbs"), "cluster must be slurm or local, got 'pbs'"),
        (lambda: Slurm(tmp_path, timeout_min=0), "timeout_min must be 1 or more"),
    ):
        with pytest.raises(UsageError, match=what):
            make()


def test_missing_packages_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"launcher=ray needs the package 'ray': pip install 'jdistill\[ray\]'"):
        Ray(tmp_path)
    with pytest.raises(UsageError, match=r"pip install 'jdistill\[slurm\]'"):
        Slurm(tmp_path)


def test_slurm_without_a_cluster_is_one_line(tmp_path, monkeypatch):
    pytest.importorskip("submitit")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UsageError, match="cluster=local"):
        carry(Slurm(tmp_path), units_of(tmp_path, "finish"))


# -- submitit's local executor


@pytest.fixture
def submitit():
    return pytest.importorskip("submitit")


def test_local_jobs_are_bounded_and_come_back(tmp_path, submitit):
    found = carry(local(tmp_path, workers=1), units_of(tmp_path, "finish diverge", "die", "finish"))
    assert found[0]["job"] == 0 and type(found[1]) is Diverged and found[3]["job"] == 3
    assert "died" in str(found[2]) and type(found[2]) is RunError
    assert found[0]["CUDA_VISIBLE_DEVICES"] == "" and len(children(tmp_path)) == 3


def test_a_preempted_job_goes_on(tmp_path, submitit):
    path = tmp_path / "jobs" / "0" / "attempts"

    def preempt():
        wait_for(lambda: path.exists() and path.read_text().endswith("\n"))
        os.kill(int(path.read_text()), signal.SIGUSR2)

    threading.Thread(target=preempt, daemon=True).start()
    found = carry(local(tmp_path), units_of(tmp_path, "second_time"))
    assert found[0]["job"] == 0 and len(path.read_text().split()) == 2


def test_local_jobs_stop_and_are_judged(tmp_path, submitit):
    path = tmp_path / "jobs" / "1" / "attempts"
    stop = lambda: path.exists() and time.monotonic() > asked.get("at", 1e18) + 1.5  # noqa: E731
    asked = {}

    def judge(job, epoch, metrics):
        asked["at"] = asked.get("at", time.monotonic())
        return "hopeless" if epoch >= 2 else None

    found = carry(local(tmp_path), units_of(tmp_path, "judged", "until_stop", "finish"), stop=stop, judge=judge)
    assert type(found[0]) is Pruned and str(found[0]).startswith("hopeless")
    assert type(found[1]) is Interrupted and "checkpoint" in str(found[1])


# -- Ray on this machine


@pytest.mark.slow
def test_ray_tasks_come_back_retry_and_stop(tmp_path):
    pytest.importorskip("ray")
    ray = Ray(tmp_path / "ray", num_cpus=1, retries=1, carry=CARRY)
    before = signal.getsignal(signal.SIGTERM)
    found = carry(ray, units_of(tmp_path, "finish diverge", "die_once", "die", "raise"))
    assert signal.getsignal(signal.SIGTERM) is before
    assert found[0]["job"] == 0 and found[0]["PJRT_NPROC"] == "1" and type(found[1]) is Diverged
    assert found[2]["job"] == 2 and len((tmp_path / "jobs" / "2" / "attempts").read_text().split()) == 2
    assert "the Ray task died" in str(found[3]) and "KeyError" in str(found[4])
    path = tmp_path / "again" / "jobs" / "0" / "attempts"
    units = units_of(tmp_path / "again", "until_stop", *["until_stop"] * 3)
    found = carry(ray, units, stop=path.exists)
    assert {type(outcome) for outcome in found.values()} == {Interrupted}


# -- messages


def test_outcomes_survive_the_way():
    for outcome in ({"a": 1.5}, Diverged("d"), Interrupted("i"), Pruned("p"), UsageError("u"), RunError("r")):
        back = unpack(pack(outcome))
        assert type(back) is type(outcome) and (back == outcome or str(back) == str(outcome))
    assert str(unpack(pack(ZeroDivisionError("x")))) == "ZeroDivisionError: x"


def test_what_a_lost_unit_had_finished_counts(tmp_path):
    (unit,) = units_of(tmp_path, "finish finish finish")
    for job in unit.jobs[:2]:
        job.folder.mkdir(parents=True)
        finish(job)
    (unit.jobs[1].folder / "result.json").write_text('{"status": "finished", "fingerprint": "of another config"}')
    found = lost(unit, "it died")
    assert found[0]["job"] == 0
    assert [str(o) for o in found[1:]] == ["it died; the same command goes on from its last checkpoint"] * 2


def test_settings_name_plug_ins_and_an_absolute_cache(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    job = Job(0, (), {"plugins": ["a.py"], "cache": "here"}, {}, tmp_path)
    settings = settings_of((Unit((job,), "loop", ""),), fail_fast=True)
    assert (settings.plugins, settings.cache, settings.fail_fast) == (("a.py",), str(tmp_path / "here"), True)
    assert settings.folder == str(tmp_path)


def test_a_mailbox_forgets_an_earlier_time(tmp_path):
    unit, told = units_of(tmp_path, "finish")[0], []
    old = Mailbox(tmp_path / "box")
    Reader(tmp_path / "box").ask_to_stop()
    old.began()
    assert old.stop()
    reader = Reader(tmp_path / "box")
    box = Mailbox(tmp_path / "box")
    assert not reader.has_begun and not box.stop()
    box.began()
    box.progress("teacher", 1, 9, 2.0)
    box.progress("teacher", 2, 9, 2.0)  # too soon after
    assert reader.has_begun
    for _ in range(2):
        reader.poll(unit, lambda *said: told.append(said), None)
    assert told == [(unit, "teacher", 1, 9, 2.0)]
    assert box.judge(7, 1, {"accuracy": 0.1}) is None
    reader.poll(unit, lambda *_: None, lambda job, epoch, metrics: f"{job} {epoch} {metrics}")
    assert box.judge(7, 2, {"accuracy": 0.1}) == "7 1 {'accuracy': 0.1}" and box.judge(8, 2, {}) is None
