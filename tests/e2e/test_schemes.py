"""Every scheme by the real command, and what is wrong about a request for one, in a line."""

from pathlib import Path

import numpy as np
import pytest

import jdistill.options  # noqa: F401 (registers every option)
from jdistill.compress.artifact import read_artifact
from jdistill.registry import options
from tests.e2e.helpers import call, files, jobs, result, rows, run, sole_error, succeed, teachers
from tests.marks import slow_but

SMALL = (
    "data=synthetic", "data.examples=160", "data.classes=4", "student.widths=[8]", "teacher.widths=[10]",
    "optim.epochs=2", "optim.batch_size=16", "teacher.optim.epochs=1", "teacher.optim.batch_size=16", "evaluate.latency=false",
)  # fmt: skip
KD, TASK = "kd", "cross_entropy"

# The scheme's arguments; the stages with their terms; the teachers trained before.
SCHEMES = {
    "offline": ((), {"distil": {TASK, KD}}, 1),
    "two_stage": (("scheme.init_epochs=1", "loss=hint"), {"hint": {"hint"}, "distil": {TASK, KD}}, 1),
    "fine_tune": (("scheme.body=low_rank", "scheme.epochs=1"), {"distil": {KD}, "fine_tune": {TASK}}, 1),
    "multi_teacher": (
        ("scheme.gate=confidence", "scheme.teachers=[{seed: 0},{seed: 1, widths: [6]}]"),
        {"distil": {TASK, KD, "kd_from_teacher2"}}, 2,
    ),
    "assistant": (
        ("scheme.assistants=[{widths: [9]}]",),
        {"assistant1": {f"{TASK}_assistant1", "kd_assistant1"}, "student": {TASK, "kd_from_assistant1"}}, 1,
    ),
    "online": (
        ("scheme.peers=[{widths: [7]}]",),
        {"mutual": {TASK, f"{TASK}_peer1", "kd_from_peer1", "kd_peer1_from_student"}}, 0,
    ),
    "joint": (
        ("scheme.feedback=0.5",), {"joint": {TASK, f"{TASK}_teacher", KD, "kd_teacher_from_student"}}, 0,
    ),
    "self": (
        ("scheme.generations=1", "teacher=none", "~teacher.widths"),
        {"generation0": {f"{TASK}_generation0"}, "student": {TASK, "kd_from_generation0"}}, 0,
    ),
    "semi": (("scheme.labelled=0.25",), {"semi": {TASK, KD}}, 1),
    "continual": (("scheme.old=[0,3]",), {"old": {f"{TASK}_old"}, "new": {TASK, "kd_from_old"}}, 0),
}  # fmt: skip


def small(*arguments: str) -> list[str]:
    """`SMALL` and more; `~key` leaves out what SMALL says of it."""
    gone = {argument[1:] for argument in arguments if argument.startswith("~")}
    kept = [argument for argument in SMALL if argument.partition("=")[0] not in gone]
    return [*kept, *(argument for argument in arguments if not argument.startswith("~"))]


def test_every_scheme_is_tried_here():
    assert set(SCHEMES) == set(options("scheme"))


QUICK = ("two_stage", "multi_teacher", "online")
"""Further stages, several teachers, and none."""


@pytest.mark.parametrize("name", slow_but(QUICK, tuple(SCHEMES)))
def test_a_run(name, tmp_path):
    arguments, stages, before = SCHEMES[name]
    found = run(tmp_path / "run", *small(f"scheme={name}", *arguments))
    lines = rows(tmp_path / "run")
    seen = {row["stage"]: set(row["train"]) - {"loss", "accuracy"} for row in lines}
    assert list(seen) == list(stages) and seen == stages
    assert [row["epoch"] for row in lines] == list(range(1, len(lines) + 1))
    assert found["status"] == "finished" and found["epoch"] == len(lines) and found["steps"] == lines[-1]["step"]
    assert all(np.isfinite(value) for row in lines for value in row["train"].values())
    assert len(teachers(tmp_path / "cache")) == before and (found["teacher"] is not None) == (before > 0)
    assert ("teachers" in found) == (before > 1)
    params, _, about = read_artifact(tmp_path / "run" / "artifact.safetensors")
    assert set(params) == {"fc1", "fc"} and params["fc1"]["kernel"].shape == (10, 8)  # the student alone
    assert about["student"]["widths"] == [8] and not any("checkpoint" in path for path in files(tmp_path / "run"))
    groups = {"accuracy_old", "accuracy_new", "accuracy_within_old", "accuracy_within_new"}
    assert groups & set(found["metrics"]["test"]) == (groups if name == "continual" else set())


@pytest.mark.parametrize("form", slow_but(["average"], ("heads", "average")))
def test_the_other_forms_of_self(form, tmp_path):
    run(tmp_path / "run", *small("scheme=self", f"scheme.form={form}", "~student.widths", "student.widths=[8,6]"))
    (stage,) = {row["stage"] for row in rows(tmp_path / "run")}
    names = set(rows(tmp_path / "run")[0]["train"]) - {"loss", "accuracy", TASK}
    assert stage == form
    assert names == {"heads": {f"{TASK}_head_hidden1", "kd_head_hidden1_from_student"}, "average": {"kd_from_average"}}[form]


@pytest.mark.parametrize("body", slow_but(["all"], ("frozen", "all")))
def test_the_other_bodies_of_fine_tune_after_a_schedule(body, tmp_path):
    rising = "loss.weight={name: linear, start: 0, end: 2}"
    found = run(tmp_path / "run", *small("scheme=fine_tune", "scheme.epochs=1", f"scheme.body={body}", rising))
    assert found["config"]["loss"]["weight"] == {"name": "linear", "start": 0, "end": 2}
    first, second, last = rows(tmp_path / "run")
    assert first["train"]["loss"] / first["train"][KD] < 1.2 < second["train"]["loss"] / second["train"][KD] < 2.1
    assert last["stage"] == "fine_tune" and last["train"]["loss"] == pytest.approx(last["train"][TASK])


def test_several_teachers_answer_together(tmp_path):
    arguments = small("scheme=multi_teacher", "loss=kd", "evaluate.predictions=true")
    found = run(tmp_path / "run", *arguments)
    assert len(found["teachers"]) == 2 and found["teachers"][0] == found["teacher"]
    assert len({record["hash"] for record in found["teachers"]}) == 2
    with np.load(tmp_path / "run" / "predictions.npz") as file:
        z, label = file["teacher_logits"], file["label"]
        agreement = (file["logits"].argmax(1) == z.argmax(1)).mean()
    np.testing.assert_allclose(np.exp(z).sum(1), 1, rtol=1e-5)  # logarithms of mean probabilities
    assert found["metrics"]["test"]["teacher_agreement"] == pytest.approx(agreement) and len(label) == 32
    again = run(tmp_path / "one", *small("scheme=offline", "loss=kd"))
    assert again["teacher"]["hash"] == found["teachers"][0]["hash"] and len(teachers(tmp_path / "cache")) == 2


def test_a_transfer_set_without_some_classes(tmp_path):
    found = run(tmp_path / "run", *small("scheme=offline", "task.weight=0", "transfer.omit=[3]"))
    whole = run(tmp_path / "whole", *small("scheme=offline", "task.weight=0"))
    assert found["steps"] < whole["steps"] and found["teacher"]["hash"] == whole["teacher"]["hash"]
    assert set(rows(tmp_path / "run")[0]["train"]) == {"loss", "accuracy", KD}


def test_numbers_of_a_scheme_are_one_group_of_a_sweep(tmp_path):
    grid = small("scheme=joint", "loss=kd", "scheme.feedback=0.5,1.0")
    assert "2 jobs in 1 group" in succeed("plan", *grid).out
    succeed("-m", *grid, f"hydra.sweep.dir={tmp_path / 'sweep'}")
    assert [job["status"] for job in jobs(tmp_path / "sweep")] == ["finished"] * 2
    found = [result(tmp_path / "sweep" / job["dir"])["size"]["sha256"] for job in jobs(tmp_path / "sweep")]
    assert len(set(found)) == 2


WRONG = [
    (
        ["scheme=multi_teacher", "scheme.teachers=[{seed: 0},{widht: 3}]"],
        r"network teacher2 of scheme=multi_teacher: unknown key 'teacher\.widht'; did you mean 'widths'\?",
    ),
    (
        ["scheme=multi_teacher", "scheme.teachers=[{},{name: mpl}]"],
        r"network teacher2 of scheme=multi_teacher: teacher=mpl: no such option|unknown teacher 'mpl'; did you mean 'mlp'\?",
    ),
    (["scheme=multi_teacher", "scheme.teachers=[{seed: 1}]"], r"scheme\.teachers must be at least two; use scheme=offline"),
    (["scheme=multi_teacher", "scheme.weights=[1]"], r"scheme\.weights must be one a teacher, got 1 for 2 teachers"),
    (["scheme=continual", "scheme.old=[4]"], r"scheme\.old must be some but not all of the 4 classes 0 to 3, got \[4\]"),
    (["scheme=continual", "scheme.old=[0,1,2,3]"], r"scheme\.old must be some but not all of the 4 classes"),
    (
        ["scheme=self", "scheme.form=heads"],
        r"scheme\.form=heads needs a student of at least two stages or hidden layers, such as student\.widths=\[64,64\]",
    ),
    (["teacher=none", "~teacher.widths"], r"loss=kd needs a teacher, got teacher=none; choose one, or loss=none"),
    (
        ["scheme=joint", "teacher=logits", "~teacher.widths"],
        r"scheme=joint trains a teacher, got teacher=logits; choose a network",
    ),
    (["scheme=joint", "scheme.feedback=-1"], r"scheme\.feedback must be at least 0, got -1"),
    (["scheme=online", "scheme.peers=[]"], r"scheme\.peers must be a list of changes such as"),
    (["scheme=online", "scheme.peers=[{widths: [0]}]"], r"network peer1 of scheme=online: .*widths must be positive integers"),
    (["scheme=assistant", "scheme.assistants=[{}, {depth: 3}]"], r"network assistant2 of scheme=assistant: unknown key"),
    (["scheme=semi", "scheme.labelled=2"], r"scheme\.labelled must be at most 1, got 2"),
    (["scheme=fine_tune", "scheme.body=half"], r"scheme\.body must be one of frozen, low_rank, all, got 'half'"),
    (["scheme=two_stage", "loss=none"], r"scheme=two_stage needs a distillation loss"),
    (["scheme=residual"], r"scheme=residual: no such option"),
    (["transfer.keep=[7]"], r"transfer\.keep=.* leave no training example"),
    (["transfer.kep=[1]"], r"unknown key 'transfer\.kep'; did you mean 'keep'\?"),
    (["loss.weight={name: linaer}"], r"loss\.weight: unknown schedule 'linaer'; did you mean 'linear'\?"),
]


@pytest.mark.parametrize(("arguments", "pattern"), WRONG, ids=[" ".join(arguments) for arguments, _ in WRONG])
def test_wrong_requests(arguments, pattern):
    before = files(Path())
    sole_error(call(*small("loss=kd", *arguments)), pattern, 2)
    assert files(Path()) == before
