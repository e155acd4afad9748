"""Teachers: trained once, given, precomputed, damaged."""

import contextlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from jdistill.data import digits
from tests.e2e.helpers import (
    TINY,
    call,
    files,
    finish,
    jobs,
    names,
    result,
    rows,
    run,
    saved_step,
    sole_error,
    start,
    succeed,
    teachers,
    until,
)
from tests.marks import slow_but

NEW = ("teacher.optim.epochs=150", "loss=kd")
SAME = ("artifact.safetensors", "metrics.jsonl")


def test_two_processes_train_a_new_teacher_once(tmp_path):
    cache = tmp_path / "cache"
    processes = [start(*TINY, *NEW, f"seed={seed}", f"hydra.run.dir=run{seed}", cwd=tmp_path) for seed in (0, 1)]
    file = None  # the first teacher's metrics, held open so that its inode is not given to another file

    def begun() -> bool:
        nonlocal file
        with contextlib.suppress(StopIteration, OSError):
            file = next((cache / "teachers").glob("*.partial/metrics.jsonl")).open("rb")
        return file is not None

    assert until(processes[0], begun) and file is not None
    assert [finish(process).code for process in processes] == [0, 0]
    (folder,) = teachers(cache)
    with file:
        assert os.fstat(file.fileno()).st_ino == (folder / "metrics.jsonl").stat().st_ino
    assert [row["epoch"] for row in rows(folder)] == list(range(1, 151))
    assert [row["stage"] for row in rows(folder)] == ["teacher"] * 150
    results = [result(tmp_path / f"run{seed}") for seed in (0, 1)]
    assert {found["teacher"]["hash"] for found in results} == {json.loads((folder / "manifest.json").read_text())["hash"]}
    assert results[0]["size"]["sha256"] != results[1]["size"]["sha256"]
    assert not list((cache / "teachers").glob("*.partial"))


@pytest.mark.slow
def test_a_teacher_killed_in_training_is_no_teacher_and_goes_on(tmp_path):
    cache = tmp_path / "cache"
    command = (*TINY, *NEW, "checkpoint.every_steps=20", "hydra.run.dir=run")

    def step() -> int:
        return max((saved_step(path) for path in (cache / "teachers").glob("*.partial")), default=-1)

    process = start(*command, cwd=tmp_path)
    assert until(process, lambda: step() >= 200)
    process.kill()
    finish(process)
    stopped = step()
    assert teachers(cache) == [] and stopped >= 200
    assert succeed("list", "teachers").out == ""
    process, seen = start(*command, cwd=tmp_path), []
    assert until(process, lambda: seen.append(step()) or teachers(cache))
    assert finish(process).code == 0
    assert min(s for s in seen if s >= 0) >= stopped  # it went on from its checkpoint
    (folder,) = teachers(cache)
    assert len(rows(folder)) == 150 and not (folder / "checkpoints").exists()
    reference = run(tmp_path / "whole", *TINY, *NEW, f"cache={tmp_path / 'other'}")
    assert result(tmp_path / "run")["metrics"] == reference["metrics"]
    assert (Path(reference["teacher"]["folder"]) / "metrics.jsonl").read_bytes() == (folder / "metrics.jsonl").read_bytes()


@pytest.mark.slow
def test_what_cannot_change_a_teacher_trains_no_other(tmp_path):
    changes = ("seed=0,1", "loss.temperature=1,4", "task.weight=0,1", "student.widths=[16],[8]")
    succeed("-m", *TINY, *changes, "hydra.sweep.dir=sweep")
    (folder,) = teachers(tmp_path / "cache")
    found = [result(Path("sweep", job["dir"]))["teacher"] for job in jobs(Path("sweep"))]
    assert len(found) == 16 and {teacher["hash"] for teacher in found} == {folder.name.removeprefix("mlp-")}


CHANGES = ("teacher.seed=1", "teacher.optim.lr=2e-3", "teacher.widths=[33]", "data.limit=255")


@pytest.mark.parametrize("change", slow_but(("teacher.optim.lr=2e-3", "data.limit=255"), CHANGES))
def test_what_changes_a_teacher_trains_another(tmp_path, change):
    run(tmp_path / "one", *TINY)
    run(tmp_path / "other", *TINY, change)
    assert len(teachers(tmp_path / "cache")) == 2
    assert result(tmp_path / "one")["teacher"]["hash"] != result(tmp_path / "other")["teacher"]["hash"]


def test_a_loss_without_teacher_trains_none(tmp_path):
    run(tmp_path / "run", *TINY, "loss=none")
    assert not (tmp_path / "cache" / "teachers").exists()


def test_a_given_teacher_is_the_one_that_was_trained(tmp_path):
    first = run(tmp_path / "trained", *TINY)
    moved = tmp_path / "kept"
    shutil.move(first["teacher"]["folder"], moved)
    second = run(tmp_path / "given", *TINY, f"teacher.checkpoint={moved}")
    assert teachers(tmp_path / "cache") == []
    assert second["metrics"] == first["metrics"] and second["teacher"]["hash"] == first["teacher"]["hash"]
    for name in SAME:
        assert (tmp_path / "given" / name).read_bytes() == (tmp_path / "trained" / name).read_bytes()


def test_a_finished_run_is_a_teacher(tmp_path):
    run(tmp_path / "big", *TINY, "loss=none", "student.widths=[24]", "evaluate.predictions=true")
    asked = tuple(item for item in TINY if not item.startswith("teacher.widths"))
    sole_error(call(*TINY, "teacher.checkpoint=big"), r"teacher.widths is \[\d+\], but .*big has \[24\]; leave", 2)
    second = run(tmp_path / "small", *asked, "teacher.checkpoint=big", "evaluate.predictions=true", "optim.epochs=20")
    assert not (tmp_path / "cache" / "teachers").exists()
    with np.load("big/predictions.npz") as big, np.load("small/predictions.npz") as small:
        np.testing.assert_allclose(small["teacher_logits"], big["logits"], atol=1e-6)
    assert second["teacher"]["parameters"] == 64 * 24 + 24 + 24 * 10 + 10
    assert second["teacher"]["hash"] == result(tmp_path / "big")["fingerprint"]


def test_a_given_teacher_that_does_not_fit_is_refused_at_once(tmp_path):
    folder = run(tmp_path / "run", *TINY)["teacher"]["folder"]
    before = files(tmp_path)
    others = tuple(item for item in TINY if not item.startswith("teacher.widths"))
    wrong = call(*others, "teacher=resnet8", f"teacher.checkpoint={folder}")
    sole_error(wrong, r"holds a mlp, but teacher=resnet8; use teacher=mlp", 2)
    for given in (folder, "run"):
        wrong = call(*others, "data=synthetic", f"teacher.checkpoint={given}")
        sole_error(wrong, r"takes inputs \[8, 8, 1\] and gives 10 logits; this data has \[10\] and 2", 2)
    sole_error(call(*TINY, "teacher.checkpoint=cache"), "is not a teacher's folder", 2)
    assert files(tmp_path) == before


def test_an_altered_teacher_is_found_out(tmp_path):
    folder = Path(run(tmp_path / "run", *TINY)["teacher"]["folder"])
    other = Path(run(tmp_path / "other", *TINY, "teacher.seed=1")["teacher"]["folder"])
    shutil.rmtree(folder / "checkpoint")
    shutil.copytree(other / "checkpoint", folder / "checkpoint")  # whole, but another teacher's
    line = sole_error(
        call(*TINY, f"teacher.checkpoint={folder}"), "differs from its manifest's checksum; delete that folder", 1
    )
    assert str(folder) in line


@pytest.mark.parametrize("place", [0.5, *(pytest.param(place, marks=pytest.mark.slow) for place in (0.3, 0.9))])
def test_a_teacher_with_a_flipped_byte_is_found_out(tmp_path, place):
    folder = Path(run(tmp_path / "run", *TINY)["teacher"]["folder"])
    largest = max((p for p in (folder / "checkpoint").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[int(len(content) * place)] ^= 0x10
    largest.write_bytes(content)
    sole_error(call(*TINY, f"teacher.checkpoint={folder}"), f"{folder}.*(checksum|cannot be read).*; delete that folder", 1)


def test_a_teacher_with_a_damaged_manifest_is_one_line(tmp_path):
    folder = Path(run(tmp_path / "run", *TINY)["teacher"]["folder"])
    (folder / "manifest.json").write_text("{")
    sole_error(call(*TINY, "seed=1"), "manifest.json is damaged .*; delete the folder", 1)
    sole_error(call(*TINY, f"teacher.checkpoint={folder}"), "manifest.json is damaged", 1)


def softmax_regression() -> tuple[np.ndarray, np.ndarray]:
    """(ids, logits) of all training rows by a few steps of plain gradient descent in NumPy."""
    data = digits()
    x = np.concatenate([data.train["inputs"], data.validation["inputs"]]).reshape(-1, 64) / 16.0
    y = np.concatenate([data.train["label"], data.validation["label"]])
    w = np.zeros((64, 10))
    for _ in range(300):
        p = np.exp(x @ w)
        p /= p.sum(1, keepdims=True)
        w -= 0.5 * x.T @ (p - np.eye(10)[y]) / len(x)
    assert ((x @ w).argmax(1) == y).mean() > 0.9
    return np.concatenate([data.train["index"], data.validation["index"]]), 4 * x @ w


def test_logits_of_another_framework_teach(tmp_path):
    ids, logits = softmax_regression()
    np.savez("given.npz", ids=ids, logits=logits)
    order = np.random.default_rng(0).permutation(len(ids))
    np.savez("shuffled.npz", ids=ids[order], logits=logits[order])
    wrong = np.roll(logits, 1, axis=0)
    np.savez("wrong.npz", ids=ids, logits=wrong)
    train = ("teacher=logits", "task.weight=0", "student.widths=[]", "optim.epochs=10", "evaluate.latency=false")
    found = {name: run(tmp_path / name, *train, f"teacher.path={name}.npz") for name in ("given", "shuffled", "wrong")}
    for name in SAME:
        assert (tmp_path / "given" / name).read_bytes() == (tmp_path / "shuffled" / name).read_bytes()
    assert found["given"]["metrics"] == found["shuffled"]["metrics"]
    assert found["given"]["teacher"]["hash"] == found["shuffled"]["teacher"]["hash"] != found["wrong"]["teacher"]["hash"]
    assert found["given"]["metrics"]["test"]["accuracy"] > 0.85 > 0.3 > found["wrong"]["metrics"]["test"]["accuracy"]
    taught = digits().train["index"]
    place = {int(i): row for row, i in enumerate(ids)}
    own = np.array([logits[place[int(i)]] for i in taught]).argmax(1)
    expected = (own == digits().train["label"]).mean()
    assert found["given"]["teacher"]["metrics"]["train"]["accuracy"] == pytest.approx(expected)
    assert names(succeed("list", "teachers").out) == []
