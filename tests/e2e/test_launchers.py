"""`hydra/launcher=processes|slurm|ray`: the numbers of the launcher in one process, whoever dies on the way."""

import csv
import io
import os
import signal
import time
from pathlib import Path

import pytest

from jdistill.report.collect import read_jobs
from jdistill.sweep.executors.processes import Processes
from jdistill.sweep.units import Job, Unit
from tests.e2e.helpers import TINY, call, finish, result, saved_step, sole_error, start, succeed, teachers, until

GRID = ("loss=kd,dkd", "seed=0,1")
HERE = ("-m", *TINY, *GRID)
LOOP = "hydra.launcher.strategy=loop"
SAME = ("artifact.safetensors", "metrics.jsonl")
LONG = (
    "-m", *TINY, "loss=none", "optim.epochs=150", "seed=0,1,2", "checkpoint.every_steps=20", LOOP,
    "hydra/launcher=processes", "hydra.launcher.workers=2",
)  # fmt: skip


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The sweep carried out in one process."""
    where = tmp_path_factory.mktemp("reference")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(where)
        patch.setenv("JDISTILL_CACHE", str(where / "cache"))
        succeed(*HERE, LOOP, "hydra.sweep.dir=sweep")
    return where / "sweep"


def status(sweep: Path) -> dict[int, str]:
    return {job["job"]: job["status"] for job in read_jobs(sweep)}


def folders(sweep: Path) -> dict[int, Path]:
    return {job["job"]: sweep / job["dir"] for job in read_jobs(sweep)}


def same(found: Path, wanted: Path) -> None:
    """All jobs finished with the same numbers and bytes."""
    assert status(found) == dict.fromkeys(status(wanted), "finished")
    for number, folder in folders(wanted).items():
        other = folders(found)[number]
        for key in ("metrics", "fingerprint", "size", "epoch", "steps"):
            assert result(other)[key] == result(folder)[key], key
        for name in SAME:
            assert (other / name).read_bytes() == (folder / name).read_bytes(), name


def without_times(sweep: Path) -> list[dict[str, str]]:
    table = csv.DictReader(io.StringIO((sweep / "table.csv").read_text()))
    return [{key: value for key, value in row.items() if not key.startswith("time_s")} for row in table]


def workers_of(pid: int) -> list[int]:
    """The worker processes of a command that runs."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            mine = b"jdistill.sweep.worker" in (path / "cmdline").read_bytes()
        except (OSError, IndexError):
            continue
        if parent == pid and mine:
            found.append(int(path.name))
    return found


def running(sweep: Path, number: int, step: int) -> bool:
    return (sweep / "jobs.jsonl").exists() and number in folders(sweep) and saved_step(folders(sweep)[number]) >= step


def test_processes_give_the_same_numbers(reference, tmp_path):
    succeed(*HERE, LOOP, "hydra/launcher=processes", "hydra.launcher.workers=2", "hydra.sweep.dir=sweep")
    same(Path("sweep"), reference)
    assert len(teachers(tmp_path / "cache")) == 1
    assert without_times(Path("sweep")) == without_times(reference)
    assert {path.name for path in Path("sweep/workers").iterdir()} == {"0.log", "1.log"}


@pytest.mark.slow
def test_populations_are_trained_in_processes(tmp_path):
    vmap = (*HERE, "hydra.launcher.strategy=vmap")
    succeed(*vmap, "hydra.sweep.dir=one")
    succeed(*vmap, "hydra/launcher=processes", "hydra.launcher.workers=2", "hydra.sweep.dir=several")
    same(Path("several"), Path("one"))
    for number, folder in folders(Path("several")).items():
        assert result(folder)["strategy"] == result(folders(Path("one"))[number])["strategy"]


@pytest.mark.slow
def test_sixteen_processes_train_one_teacher_once(reference, tmp_path):
    config = result(folders(reference)[0])["config"] | {"cache": str(tmp_path / "cache")}
    jobs = [Job(n, (), config | {"seed": n}, {}, tmp_path / "jobs" / str(n)) for n in range(16)]
    found = []
    Processes(tmp_path / "workers", workers=16, gpus=0, carry="tests.sweep.stand_in:count_teachers").run(
        [Unit((job,), "loop", "a test") for job in jobs], lambda unit, outcomes: found.extend(outcomes),
        stop=lambda: False, progress=lambda *_: None,
    )  # fmt: skip
    assert (tmp_path / "cache" / "trained").read_text() == "a teacher\n" and len(teachers(tmp_path / "cache")) == 1
    assert len({outcome["teacher"]["hash"] for outcome in found}) == 1 and len(found) == 16


@pytest.mark.slow
def test_submitit_gives_the_same_numbers(reference):
    pytest.importorskip("submitit")
    submitit = ("hydra/launcher=slurm", "hydra.launcher.cluster=local", "hydra.launcher.workers=2")
    succeed(*HERE, LOOP, *submitit, "hydra.sweep.dir=sweep")
    same(Path("sweep"), reference)


@pytest.mark.slow
def test_ray_gives_the_same_numbers(reference):
    pytest.importorskip("ray")
    succeed(*HERE, LOOP, "hydra/launcher=ray", "hydra.sweep.dir=sweep")
    same(Path("sweep"), reference)


@pytest.mark.slow
def test_a_killed_worker_costs_its_job_only(tmp_path):
    sweep = tmp_path / "sweep"
    command = (*LONG, "hydra.sweep.dir=sweep")
    process = start(*command, cwd=tmp_path)
    assert until(process, lambda: running(sweep, 0, 40) and running(sweep, 1, 40))
    os.kill(workers_of(process.pid)[0], signal.SIGKILL)
    done = finish(process)
    assert done.code == 1 and "Traceback" not in done.err
    found = status(sweep)
    assert sorted(found.values()) == ["failed", "finished", "finished"], done.err
    (died,) = [number for number, how in found.items() if how == "failed"]
    assert "the worker process died (signal 9" in read_jobs(sweep)[died]["error"]
    saved = saved_step(folders(sweep)[died])
    assert saved >= 40
    succeed(*command)
    succeed(*LONG, "hydra.sweep.dir=whole")
    same(sweep, tmp_path / "whole")
    assert without_times(sweep) == without_times(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize(
    "how", [signal.SIGTERM, *(pytest.param(number, marks=pytest.mark.slow) for number in (signal.SIGINT, signal.SIGKILL))]
)
def test_a_stopped_sweep_leaves_no_workers_and_goes_on(tmp_path, how):
    sweep = tmp_path / "sweep"
    process = start(*LONG, "optim.epochs=2000", "hydra.sweep.dir=sweep", cwd=tmp_path)
    assert until(process, lambda: running(sweep, 0, 20) and running(sweep, 1, 20))
    workers = workers_of(process.pid)
    before = [saved_step(folder) for folder in folders(sweep).values()]
    process.send_signal(how)
    done = finish(process)
    assert done.code == (-how if how == signal.SIGKILL else 128 + how) and len(workers) == 2
    if how != signal.SIGKILL:
        assert "Traceback" not in done.err and status(sweep) == dict.fromkeys(range(3), "pending")
    for pid in workers:
        wait_gone(pid)
    after = [saved_step(folder) for folder in folders(sweep).values()]
    assert all(new >= old for new, old in zip(after, before, strict=True)) and after[0] >= 20


def wait_gone(pid: int) -> None:
    deadline = time.monotonic() + 60
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < deadline, f"worker {pid} is still there"
        time.sleep(0.05)


def test_wrong_keys_are_one_line():
    sole_error(call(*HERE, "hydra/launcher=processes", "hydra.launcher.gpus=all"), "gpus must be 'auto' or a count", 2)
    sole_error(call(*HERE, "hydra/launcher=slurm", "hydra.launcher.cluster=pbs"), "cluster must be slurm or local", 2)
    assert not Path("sweeps").exists()
