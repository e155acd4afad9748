"""Runs that are killed and started again end as if nothing had happened, byte for byte."""

import csv
import io
import random
import signal
import time
from pathlib import Path

import pytest

from tests.e2e.helpers import finish, jobs, result, rows, run, saved_step, start, succeed, teachers, until

LONG = (
    "data.limit=256", "student.widths=[16]", "teacher.widths=[32]", "optim.batch_size=32", "optim.epochs=40",
    "teacher.optim.batch_size=32", "teacher.optim.epochs=20", "evaluate.latency=false",
)  # fmt: skip
ONE_BY_ONE = ("hydra.launcher.strategy=loop", "hydra.launcher.workers=1")
STEPS, TEACHER_STEPS = 40 * 8, 20 * 8
SAME = ("artifact.safetensors", "metrics.jsonl")


def partial(cache: Path) -> Path:
    """The folder of the one teacher that is being trained."""
    return next(iter((cache / "teachers").glob("*.partial")), cache / "none")


def kill_in(folder_of, step: int, delay: float, *arguments: str, cwd: Path) -> tuple[int, int] | None:
    """Starts the command and kills it `delay` after the checkpoint of `step`; (lowest, last) step saved, None if it ended."""
    process, seen = start(*arguments, cwd=cwd), []

    def reached() -> bool:
        if (now := saved_step(folder_of())) >= 0:
            seen.append(now)
        return now >= step

    if not until(process, reached):
        assert process.returncode == 0, finish(process)
        finish(process)
        return None
    time.sleep(delay)
    process.kill()
    assert finish(process).code == -signal.SIGKILL
    return min(seen), max(seen)


def killed_often(tmp_path: Path, kills: int, seed: int, *arguments: str, steps: int, in_teacher: int = 0) -> None:
    """Kills a run, `in_teacher` times while its teacher is trained, and lets it end; compares it with one never stopped."""
    whole, cache, folder = tmp_path / "whole", tmp_path / "cache", tmp_path / "killed"
    reference = run(whole, *LONG, *arguments, f"cache={tmp_path / 'other'}")
    drawn = random.Random(seed)
    command = (*LONG, *arguments, "checkpoint.every_steps=5", f"hydra.run.dir={folder}", f"cache={cache}")
    targets = [(lambda: partial(cache), step) for step in sorted(drawn.sample(range(5, TEACHER_STEPS * 3 // 4), in_teacher))]
    targets += [(lambda: folder, step) for step in sorted(drawn.sample(range(5, steps * 3 // 4), kills - in_teacher))]
    done, last = 0, -1
    for number, (where, step) in enumerate(targets):
        span = kill_in(where, max(step, last if number != in_teacher else -1), drawn.uniform(0, 0.06), *command, cwd=tmp_path)
        assert span is not None, f"the run ended before kill {number}"
        assert not (folder / "result.json").exists()
        if number < in_teacher:
            assert teachers(cache) == []
        low, high = span
        if number != in_teacher:  # it goes on from where it was, and does not begin anew
            assert low >= last
        last, done = high, done + 1
    assert done == kills and finish(start(*command, cwd=tmp_path)).code == 0
    found = result(folder)
    for name in SAME:
        assert (folder / name).read_bytes() == (whole / name).read_bytes(), name
    for key in ("metrics", "fingerprint", "size", "epoch", "steps"):
        assert found[key] == reference[key], key
    assert not (folder / "checkpoints").exists()
    if found["teacher"]:
        mine, other = Path(found["teacher"]["folder"]), Path(reference["teacher"]["folder"])
        assert (mine / "metrics.jsonl").read_bytes() == (other / "metrics.jsonl").read_bytes()
        assert found["teacher"]["hash"] == reference["teacher"]["hash"]
        assert found["teacher"]["metrics"] == reference["teacher"]["metrics"]
        assert teachers(cache) == [mine] and not list((cache / "teachers").glob("*.partial"))


@pytest.mark.slow
def test_killed_three_times(tmp_path):
    killed_often(tmp_path, 3, 0, "loss=kd", steps=STEPS, in_teacher=1)


@pytest.mark.slow
def test_killed_ten_times(tmp_path):
    killed_often(tmp_path, 10, 1, "loss=hint", "report=best_val", steps=STEPS, in_teacher=3)


@pytest.mark.slow
def test_killed_while_pruning(tmp_path):
    recovery = ("compression=prune", "compression.recover_epochs=40")
    killed_often(tmp_path, 10, 2, "loss=kd", *recovery, "optim.schedule=cosine", steps=2 * STEPS, in_teacher=1)


@pytest.mark.slow
def test_killed_with_augmentation_and_two_stages(tmp_path):
    stages = ("scheme=two_stage", "scheme.init_epochs=20", "data.augment=[crop,cutout]", "student.dropout=0.2")
    killed_often(tmp_path, 5, 3, "loss=hint", *stages, "optim.drop_last=false", steps=STEPS, in_teacher=1)


def test_terminated_run_writes_a_checkpoint_and_goes_on(tmp_path):
    folder = tmp_path / "stopped"
    command = (*LONG, "loss=none", "optim.epochs=400", "checkpoint.every_seconds=0", f"hydra.run.dir={folder}")
    process = start(*command, cwd=tmp_path)
    assert until(process, lambda: (folder / "metrics.jsonl").exists() and len((folder / "metrics.jsonl").read_bytes()) > 2000)
    process.send_signal(signal.SIGTERM)
    done = finish(process)
    assert done.code == 143 and "Traceback" not in done.err
    assert done.error_lines == ["jdistill: error: interrupted: a checkpoint was written; the same command continues the run"]
    stopped = saved_step(folder)
    assert 0 < stopped < 400 * 8 and not (folder / "result.json").exists()
    before, inode = (folder / "metrics.jsonl").read_bytes(), (folder / "metrics.jsonl").stat().st_ino
    succeed(*command)
    assert (folder / "metrics.jsonl").read_bytes().startswith(before)
    assert (folder / "metrics.jsonl").stat().st_ino == inode
    run(tmp_path / "whole", *LONG, "loss=none", "optim.epochs=400")
    for name in SAME:
        assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert result(folder)["steps"] == 400 * 8 and rows(folder)[-1]["epoch"] == 400


def without_times(sweep: Path) -> list[dict[str, str]]:
    table = csv.DictReader(io.StringIO((sweep / "table.csv").read_text()))
    return [{key: value for key, value in row.items() if not key.startswith("time_s")} for row in table]


def test_a_killed_sweep_goes_on_and_repeats_nothing(tmp_path):
    grid = ("-m", *LONG, *ONE_BY_ONE, "loss=none", "seed=0,1,2")
    succeed(*grid, "hydra.sweep.dir=whole")
    sweep = tmp_path / "killed"
    command = (*grid, "checkpoint.every_steps=5", f"hydra.sweep.dir={sweep}")
    names = [job["dir"] for job in jobs(tmp_path / "whole")]
    process = start(*command, cwd=tmp_path)
    assert until(process, lambda: saved_step(sweep / names[1]) >= 100)
    process.kill()
    finish(process)
    assert [job["status"] for job in jobs(sweep)] == ["finished", "running", "pending"]
    assert "1 finished, 1 running, 1 pending" in succeed("status", str(sweep)).out
    assert succeed("table", str(sweep)).out
    stamp = (sweep / names[0] / "result.json").stat().st_mtime_ns
    succeed(*command)
    assert (sweep / names[0] / "result.json").stat().st_mtime_ns == stamp
    assert [job["status"] for job in jobs(sweep)] == ["finished"] * 3
    assert without_times(sweep) == without_times(tmp_path / "whole") != []
    for name in names:
        assert (sweep / name / SAME[0]).read_bytes() == (tmp_path / "whole" / name / SAME[0]).read_bytes()
        assert (sweep / name / SAME[1]).read_bytes() == (tmp_path / "whole" / name / SAME[1]).read_bytes()


@pytest.mark.slow
def test_a_terminated_sweep_leaves_its_job_pending(tmp_path):
    sweep = tmp_path / "sweep"
    command = ("-m", *LONG, *ONE_BY_ONE, "loss=none", "seed=0,1", "optim.epochs=400", f"hydra.sweep.dir={sweep}")
    process = start(*command, cwd=tmp_path)

    def second_began() -> bool:
        if not (sweep / "jobs.jsonl").exists():
            return False
        metrics = sweep / jobs(sweep)[1]["dir"] / "metrics.jsonl"
        return metrics.exists() and metrics.stat().st_size > 500

    assert until(process, second_began)
    process.terminate()
    done = finish(process)
    assert done.code == 143 and len(done.error_lines) == 1 and "Traceback" not in done.err
    assert [job["status"] for job in jobs(sweep)] == ["finished", "pending"]
    assert saved_step(sweep / jobs(sweep)[1]["dir"]) > 0
