"""Tables and lists by the command: students that are no networks beside one that is, numbers, clicks, documents."""

import csv
import io
from pathlib import Path

import numpy as np
import pytest

from tests.e2e.helpers import call, jobs, result, run, sole_error, succeed

SHOP = ("data=synthetic_shop", "data.users=60", "data.items=50", "data.queries=20")
SHORT = (
    "optim.epochs=2", "teacher.optim.epochs=2", "optim.batch_size=32", "teacher.optim.batch_size=32", "evaluate.latency=false",
    "hydra.launcher.workers=1",
)  # fmt: skip
ALONE = tuple(key for key in SHORT if "launcher" not in key)


pytestmark = pytest.mark.usefixtures("one_cache")


def table(folder):
    return list(csv.DictReader(io.StringIO(Path(folder, "table.csv").read_text())))


@pytest.mark.parametrize(
    ("data", "metric"),
    [
        (("data=breast_cancer",), "accuracy"),
        pytest.param((*SHOP, "data.view=clicks", "task=click"), "auc", marks=pytest.mark.slow),
    ],
    ids=["breast_cancer", "clicks"],
)
def test_trees_machines_and_a_network_in_one_table(data, metric):
    students = ("tree", "gbt", "linear_svm", "mlp")
    succeed("-m", *data, *SHORT, f"student={','.join(students)}", "loss=none,kd", "hydra.sweep.dir=sweep")
    found = [result(Path("sweep") / job["dir"]) for job in jobs(Path("sweep"))]
    assert [r["status"] for r in found] == ["finished"] * 8 and {r["primary"] for r in found} == {metric}
    lines = table("sweep")
    assert {(line["student"], line["loss"]) for line in lines} == {(s, loss) for s in students for loss in ("none", "kd")}
    for one in found:
        assert 0.5 < one["metrics"]["test"][metric] <= 1 and one["size"]["bytes"] > 0
        assert ("teacher_agreement" in one["metrics"]["test"]) == (one["choices"]["loss"] == "kd")
    assert len({r["teacher"]["hash"] for r in found if r["teacher"]}) == 1


@pytest.mark.parametrize(("student", "loss"), [("mlp", "logit_mse"), ("gbt", "logit_mse")])
def test_a_number(student, loss):
    found = run(Path("run"), *SHOP, *ALONE, "data.view=ratings", "task=regression", f"student={student}", f"loss={loss}")
    test = found["metrics"]["test"]
    assert found["primary"] == "r2" and {"rmse", "mae", "r2", "teacher_rmse"} <= set(test)
    assert test["rmse"] >= test["mae"] > 0


def test_clicks_by_embeddings():
    clicks = (*SHOP, *ALONE, "data.view=clicks", "task=click", "loss=none")
    found = run(Path("run"), *clicks, "data.encoding=index", "student=wide_mlp", "evaluate.predictions=true")
    with np.load("run/predictions.npz") as file:
        assert file["logits"].shape == (len(file["label"]), 1) and set(file["label"]) == {0, 1}
    assert {"auc", "log_loss"} <= set(found["metrics"]["test"])
    sole_error(call(*clicks, "data.encoding=index", "student=mlp"), r"student=mlp cannot read categories .*student=wide_mlp", 2)


def test_documents():
    found = run(
        Path("run"), *SHOP, *ALONE, "data.view=search", "task=ranking", "teacher=ltr_mlp", "student=ltr_mlp",
        "loss=margin_mse", "optim.batch_size=4", "teacher.optim.batch_size=4", "evaluate.predictions=true",
    )  # fmt: skip
    test = found["metrics"]["test"]
    assert found["primary"] == "ndcg_at_10" and 0 < test["ndcg_at_10"] <= 1 and -1 <= test["teacher_kendall"] <= 1


WRONG = {
    "a loss on features": (["student=tree", "loss=hint"], r"student=tree is fitted to labels and soft labels.*got loss=hint"),
    "two stages": (["student=gbt", "loss=kd", "scheme=two_stage"], r"student=gbt is fitted once, got scheme=two_stage"),
    "online": (["student=tree", "loss=kd", "scheme=online"], r"student=tree is fitted once, got scheme=online"),
    "recovery": (["student=tree", "loss=none", "compression=prune"], r"student=tree is fitted once; leave recover_epochs"),
    "a schedule": (
        ["student=tree", "loss=kd", "loss.temperature={name: linear, start: 1, end: 4}"],
        r"loss.temperature is a schedule, but student=tree is fitted once",
    ),
    "a tree that teaches": (["teacher=tree"], r"teacher=tree: no such option"),
    "no numbers": (["task=regression", "loss=none"], r"task=regression needs numbers as labels; .* has classes"),
    "inherited": (["student=tree", "loss=none", "transfer.inherit=true"], r"transfer.inherit=true, but no parameter"),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "pattern"), WRONG.values(), ids=WRONG)
def test_wrong_requests(arguments, pattern):
    sole_error(call("data=breast_cancer", *ALONE, *arguments), pattern, 2)


def test_a_machine_predicts_no_numbers():
    numbers = (*SHOP, *ALONE, "data.view=ratings", "task=regression", "loss=none")
    sole_error(call(*numbers, "student=linear_svm"), r"student=linear_svm tells classes apart", 2)
    sole_error(call(*numbers, "task=click"), r"task=click needs labels of yes or no .* has numbers: task=regression", 2)
