"""What goes wrong on a disk or beside a sweep: one clear line for the job concerned, and all else goes on."""

import errno
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from filelock import FileLock

from jdistill.checkpoint import Checkpoints
from jdistill.records import MetricsFile
from jdistill.sweep import execute
from tests.e2e.helpers import TINY, call, finish, jobs, result, rows, sole_error, start, succeed, teachers
from tests.marks import slow_but

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "faults.py"
OLD = ("data.limit=256", "student.widths=[16]", "optim.epochs=3", "optim.batch_size=32", "loss=none", "evaluate.latency=false")
SWEEP = (
    "-m", *OLD, "report=best_val", "checkpoint.every_steps=5", "optim=sgd", "seed=0,1,2", "student.dropout=0.1",
    "hydra.sweep.dir=sweep", "hydra.launcher.workers=1",
)  # fmt: skip
VMAP = "hydra.launcher.strategy=vmap"
TOGETHER, ALONE = (*SWEEP, VMAP), (*SWEEP, "hydra.launcher.strategy=loop")
WAYS = {"population": TOGETHER, "one by one": ALONE}
FILES = ("metrics.jsonl", "artifact.safetensors")
SWEPT = Path("sweep")


@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    """Figures take longer than these sweeps."""
    monkeypatch.setattr("jdistill.commands.write_report", lambda folder: f"table of {folder}")


def stop_after(patch: pytest.MonkeyPatch, saves: int, *command: str) -> None:
    """Ends the command as a kill would, right after a checkpoint."""
    save, left = Checkpoints.save, [saves]

    def saving(self, *arguments):
        save(self, *arguments)
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt

    with patch.context() as own:
        own.setattr(Checkpoints, "save", saving)
        assert call(*command).code == 130


def folders(sweep: Path = SWEPT) -> list[Path]:
    return [sweep / job["dir"] for job in jobs(sweep)]


def contents(sweep: Path = SWEPT) -> list[bytes]:
    return [(folder / name).read_bytes() for folder in folders(sweep) for name in FILES]


def statuses() -> list[str]:
    return [job["status"] for job in jobs(SWEPT)]


def stamps() -> dict[str, tuple[int, int]]:
    """Inode and time of all results and records."""
    found = [path for path in SWEPT.glob("*/*") if path.name in (*FILES, "result.json")]
    return {str(path): (path.stat().st_ino, path.stat().st_mtime_ns) for path in found}


def ended(folder: Path) -> bool:
    return (folder / "result.json").is_file() and result(folder)["status"] == "finished"


def saves(patch: pytest.MonkeyPatch, *command: str) -> dict[str, list[int]]:
    """Lets the command succeed: the steps of its checkpoints, by the name of the job or of the population."""
    save, found = Checkpoints.save, {}

    def saving(self, stage, step, *rest):
        found.setdefault(self.folder.parent.name, []).append(step)
        save(self, stage, step, *rest)

    with patch.context() as own:
        own.setattr(Checkpoints, "save", saving)
        succeed(*command)
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The undisturbed sweeps, as population and job by job: what their files hold."""
    where, found = tmp_path_factory.mktemp("whole"), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(where)
        for command in (TOGETHER, ALONE):
            shutil.rmtree(SWEPT, ignore_errors=True)
            succeed(*command)
            found[command] = contents()
    return {**found, "folder": where / SWEPT}


# -- checkpoints


PARTED = {"population": (*SWEEP, "hydra.launcher.max_members=2", VMAP), "one by one": ALONE}


@pytest.mark.parametrize("command", slow_but(["population"], PARTED))
def test_a_damaged_checkpoint_is_named_and_the_rest_goes_on(command, whole, monkeypatch):
    stop_after(monkeypatch, 2, *command)
    (saved,) = SWEPT.glob("**/checkpoints/0-10*")
    for path in saved.rglob("*"):
        if path.is_file():
            path.write_bytes(b"x")
    done = call(*command)
    failing = ["failed"] * (2 if "vmap" in command[-1] else 1)
    assert done.code == 1 and "Traceback" not in done.err + done.out
    said = [line for line in done.err.splitlines() if re.search(f"checkpoint .*{saved} cannot be read .*; delete that", line)]
    assert len(said) == len(failing) and statuses() == failing + ["finished"] * (3 - len(failing)) and saved.is_dir()
    before = {name: mark for name, mark in stamps().items() if ended(Path(name).parent)}
    shutil.rmtree(saved)
    succeed(*command)
    assert statuses() == ["finished"] * 3 and len(before) == 3 * (3 - len(failing)) and before.items() <= stamps().items()


@pytest.mark.parametrize("text", ['{"reason": "r", "fingerprints": 1, "jobs": 2}', pytest.param(None, marks=pytest.mark.slow)])
def test_a_damaged_record_of_a_population(text, whole, monkeypatch):
    stop_after(monkeypatch, 2, *TOGETHER)
    (record,) = SWEPT.glob("populations/*/unit.json")
    content = json.loads(record.read_text())
    del content["reason"], content["jobs"][0]
    record.write_text(json.dumps(content) if text is None else text)
    assert saves(monkeypatch, *TOGETHER) == {record.parent.name: [15, 20, 24]}  # the same jobs are the same population
    assert contents() == whole[TOGETHER]
    record.parent.mkdir()
    record.write_text(json.dumps(content) if text is None else text)
    done = succeed(*TOGETHER, "seed=0,1,2,3")
    assert f"{record.absolute()} cannot be used" in done.err.replace(str(record), str(record.absolute()))


@pytest.mark.slow
def test_a_population_whose_records_are_gone(whole, monkeypatch):
    stop_after(monkeypatch, 3, *TOGETHER)
    (lost, *_) = SWEPT.glob("*/metrics.jsonl")
    assert rows(lost.parent)
    lost.unlink()
    done = call(*TOGETHER)
    (checkpoints,) = SWEPT.glob("populations/*/checkpoints")
    assert done.code == 1 and statuses() == ["failed"] * 3
    assert f"metrics.jsonl is shorter than its checkpoint says; delete {checkpoints} to begin anew" in done.err
    shutil.rmtree(checkpoints)
    succeed(*TOGETHER)
    assert contents() == whole[TOGETHER]


def test_a_job_with_a_checkpoint_of_its_own_joins_no_population(whole, monkeypatch):
    stop_after(monkeypatch, 2, *ALONE)
    steps = saves(monkeypatch, *TOGETHER)
    assert steps.pop(folders()[0].name) == [15, 20] and list(steps.values()) == [[5, 10, 15, 20, 24]]
    reasons = {tuple(unit["jobs"]): unit["reason"] for unit in json.loads((SWEPT / "units.json").read_text())}
    assert reasons[(0,)] == "goes on from its own checkpoint" and len(reasons[(1, 2)]) > 0
    assert contents()[:2] == whole[ALONE][:2]


@pytest.mark.slow
def test_a_population_that_is_given_up_leaves_no_checkpoint(whole, monkeypatch):
    """Else a later session would go on from it, with records that another training wrote."""
    stop_after(monkeypatch, 2, *TOGETHER)
    real = execute.run_jobs

    def failing(jobs, **given):
        if len(jobs) > 1:
            raise ValueError("cannot be stacked")
        return real(jobs, **given)

    with monkeypatch.context() as patch:
        patch.setattr(execute, "run_jobs", failing)
        stop_after(patch, 2, *TOGETHER)
    assert not list(SWEPT.glob("populations/*/checkpoints")) and list(SWEPT.glob("*/checkpoints/0-10"))
    succeed(*ALONE)
    assert contents() == whole[ALONE]


# -- full disks, folders that cannot be written


def failing_in(name: str, error: OSError):
    """`MetricsFile.append` that cannot write to the job folder `name`, from its second row on."""
    append = MetricsFile.append

    def appending(self, row):
        if self.path.parent.name == name and row["epoch"] > 1:
            raise error
        return append(self, row)

    return appending


@pytest.mark.parametrize("command", slow_but(["population"], WAYS))
def test_a_full_disk(command, whole, monkeypatch):
    stop_after(monkeypatch, 1, *command)
    full = folders()[1]
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(full / "metrics.jsonl"))
    with monkeypatch.context() as patch:
        patch.setattr(MetricsFile, "append", failing_in(full.name, error))
        done = call(*command)
    assert done.code == 1 and "Traceback" not in done.err
    assert f"{full / 'metrics.jsonl'}: No space left on device" in done.err
    assert statuses() == (["failed"] * 3 if command == TOGETHER else ["finished", "failed", "finished"])
    assert list(SWEPT.glob("**/checkpoints/0-*"))  # what was reached is kept
    steps = saves(monkeypatch, *command)
    assert min(min(some) for some in steps.values()) > 5
    assert statuses() == ["finished"] * 3 and contents() == whole[command]


def test_a_journal_that_cannot_be_written_ends_no_sweep(whole, monkeypatch):
    real = Path.open

    def opening(self, mode="r", *arguments, **given):
        if self.name == "jobs.jsonl" and "a" in mode:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))
        return real(self, mode, *arguments, **given)

    monkeypatch.setattr(Path, "open", opening)
    done = succeed(*TOGETHER)
    assert "jobs.jsonl cannot be written (No space left on device)" in done.err and contents() == whole[TOGETHER]
    assert "3 finished" in succeed("status", "sweep").out


@pytest.mark.parametrize("command", slow_but(["one by one"], WAYS))
def test_a_job_folder_that_cannot_be_written(command, whole):
    """A file stands in its place, which stops even an administrator."""
    plan = succeed("plan", *command[1:]).out
    name = next(line.split()[1] for line in plan.splitlines() if line.split()[0] == "1")
    SWEPT.mkdir(exist_ok=True)
    (SWEPT / name).write_text("")
    done = call(*command)
    assert done.code == 1 and "Traceback" not in done.err
    assert statuses() == ["finished", "failed", "finished"]
    assert [str(job["error"]).startswith(f"{(SWEPT / name).absolute()}") for job in jobs(SWEPT)] == [False, True, False]
    (SWEPT / name).unlink()
    succeed(*command)
    assert statuses() == ["finished"] * 3


@pytest.mark.slow
@pytest.mark.parametrize("size", [2_200_000, 4_000_000])
@pytest.mark.parametrize("command", [TOGETHER, ALONE], ids=["population", "one by one"])
def test_a_disk_that_is_really_full(command, size, tmp_path):
    """A file system of 3 MB, seen by nothing else, of which little is free, or nothing."""
    (tmp_path / "small").mkdir()
    script = (
        f"mount -t tmpfs -o size=3m none small && cd small && head -c {size} /dev/zero > rest; {sys.executable} -m "
        f"jdistill {' '.join(command)} 'student.widths=[64]'; echo code $?; rm rest; {sys.executable} -m jdistill status sweep"
    )
    done = subprocess.run(["unshare", "--mount", "sh", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    if "code" not in done.stdout or "mount:" in done.stderr:
        pytest.skip("no file system can be mounted here")
    assert "code 1" in done.stdout and "Traceback" not in done.stderr + done.stdout
    assert "No space left on device" in done.stderr and "do not fit into memory" not in done.stderr


# -- results, journals, clocks


@pytest.fixture
def copied(whole, tmp_path):
    """The finished sweep job by job, to be damaged."""
    shutil.copytree(whole["folder"], tmp_path / SWEPT)


@pytest.mark.parametrize(
    "damage",
    [
        b'{"status": "finished", "fing', b"\xff\xfe\x00",
        *(pytest.param(content, marks=pytest.mark.slow) for content in (b"", b"[]", b"NaN")),
    ],
)  # fmt: skip
def test_a_damaged_result_is_done_again(damage, copied, whole):
    (broken := folders()[1] / "result.json").write_bytes(damage)
    before = {name: mark for name, mark in stamps().items() if broken.parent.name not in name}
    assert "unreadable" in succeed("status", "sweep").out
    done = succeed(*ALONE)
    assert f"{broken.absolute()} is damaged; the run is done again" in done.err and len(before) == 6
    assert before.items() <= stamps().items() and contents() == whole[ALONE] and statuses() == ["finished"] * 3


def test_a_damaged_journal(copied):
    journal = SWEPT / "jobs.jsonl"
    lines = journal.read_text().splitlines()
    journal.write_text("\n".join([lines[0], "\0\0\0", "[]", *lines[1:], '{"job": 1, "sta']))
    assert "2 unreadable" in succeed("status", "sweep").out and "jobs.jsonl line 2" in succeed("status", "sweep").out
    before = stamps()
    succeed(*ALONE)
    assert stamps() == before and statuses() == ["finished"] * 3


def test_a_clock_that_goes_backwards(whole, monkeypatch):
    stop_after(monkeypatch, 2, *TOGETHER)
    for path in [Path(), *Path().rglob("*")]:
        os.utime(path, (4e9, 4e9))
    backwards = itertools.count(2e9, -1e6)
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: next(backwards))
        succeed(*TOGETHER)
        assert "3 finished" in succeed("status", "sweep").out
        before = stamps()
        succeed(*TOGETHER)
    assert stamps() == before and contents() == whole[TOGETHER]


def test_what_marks_a_run_as_the_same_is_never_written_twice(monkeypatch):
    """A kill in the middle of writing would make the next session begin anew."""
    stop_after(monkeypatch, 2, *ALONE)
    mark = folders()[0] / ".fingerprint"
    before = mark.stat()
    succeed(*ALONE)
    assert (mark.stat().st_ino, mark.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


# -- several at a time


COUNTED = """
import sys
from jdistill.cli import main
from jdistill.teachers import store
train = store._train
store._train = lambda *given: (print("this process trains the teacher", flush=True), train(*given))
main(sys.argv[1:])
"""


def one_new_teacher(processes: int, cwd: Path) -> None:
    command = [sys.executable, "-c", COUNTED, *TINY, "loss=kd", "cache=cache", "optim.epochs=1"]
    running = [
        subprocess.Popen([*command, f"seed={i}", f"hydra.run.dir=run{i}"], cwd=cwd, stdout=subprocess.PIPE, text=True)
        for i in range(processes)
    ]
    outputs = [process.communicate(timeout=600)[0] for process in running]
    assert [process.returncode for process in running] == [0] * processes
    assert sum("this process trains the teacher" in out for out in outputs) == 1
    (folder,) = teachers(cwd / "cache")
    assert len(rows(folder)) == 2 and not list(folder.parent.glob("*.partial"))  # its epochs, once
    assert len({json.dumps(result(cwd / f"run{i}")["teacher"], sort_keys=True) for i in range(processes)}) == 1


@pytest.mark.slow
def test_sixteen_processes_started_at_once_train_a_teacher_once(tmp_path):
    one_new_teacher(16, tmp_path)


def test_a_teacher_killed_before_it_had_its_name_is_not_trained_again(tmp_path):
    succeed(*TINY, "loss=kd", "cache=cache", "hydra.run.dir=first")
    (folder,) = teachers(tmp_path / "cache")
    mark = (folder / "metrics.jsonl").stat()
    folder.rename(folder.with_name(f"{folder.name}.partial"))
    succeed(*TINY, "loss=kd", "cache=cache", "hydra.run.dir=second")
    assert (folder / "metrics.jsonl").stat().st_mtime_ns == mark.st_mtime_ns and teachers(tmp_path / "cache") == [folder]


def test_a_sweep_in_the_folder_of_one_that_runs():
    SWEPT.mkdir()
    with FileLock(SWEPT / ".lock"):
        sole_error(call(*ALONE), "sweep is in use by another jdistill; wait until that ends, or choose another", 2)
    assert [path.name for path in SWEPT.iterdir() if path.name != ".lock"] == []


@pytest.mark.slow
def test_two_equal_sweeps_at_once(tmp_path):
    """One of them works, the other is refused."""
    longer = [*SWEEP, "optim.epochs=40"]
    both = [start(*longer, cwd=tmp_path) for _ in range(2)]
    done = [finish(process) for process in both]
    assert sorted(one.code for one in done) == [0, 2]
    (refused,) = [one for one in done if one.code == 2]
    sole_error(refused, "sweep is in use by another jdistill; wait until that ends, or choose another hydra.sweep.dir", 2)
    assert statuses() == ["finished"] * 3


def test_sweeps_get_folders_by_what_they_ask_for():
    told = [
        succeed("plan", *words).out.splitlines()[0] for words in ((*OLD, "seed=0,1"), (*OLD, "seed=0,2"), ("seed=0,1", *OLD))
    ]
    assert told[0] == told[2] and told[0].split("sweep folder ")[1] != told[1].split("sweep folder ")[1]


def test_a_folder_that_holds_another_sweep_is_refused(copied):
    before = stamps()
    sole_error(call(*ALONE, "seed=3,4"), "sweep holds another sweep: 3 of its 3 jobs are not in this one", 2)
    assert stamps() == before and not [job for job in jobs(SWEPT) if job["job"] > 2]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_hundred_kills(tmp_path):
    command = [sys.executable, str(SCRIPT), "--folder", str(tmp_path / "faults"), "--kills", "100"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].startswith("100 kills")
