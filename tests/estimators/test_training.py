"""What a student that is no network is fitted to: labels and soft labels, of which rows and columns, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import expit, softmax
from threadpoolctl import threadpool_limits

from jdistill.blueprint import read
from jdistill.errors import UsageError
from jdistill.estimators.training import fit_estimator
from jdistill.fitting import Member
from jdistill.method import Method
from jdistill.networks import columns_kept
from jdistill.records import MetricsFile
from jdistill.teachers.store import Teacher
from jdistill.teachers.targets import Live, Lookup
from jdistill.train import Keys
from jdistill.types import Model, Outputs
from tests import tiny


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    with threadpool_limits(1):
        yield


SHOP = (("data.users", 60), ("data.items", 50), ("data.queries", 20))


def blueprint(*overrides, student="tree", data="breast_cancer", loss="kd", teacher="mlp", **choices):
    return read(tiny.config(*overrides, student=student, data=data, loss=loss, teacher=teacher, **choices))


def given(logits):
    """A teacher by its logits of the training rows."""
    return {"teacher": Teacher(Lookup(), Outputs(jnp.asarray(logits, jnp.float32), {}), None, None, {})}


def fitted(own, teachers, folder, seed=0):
    member = Member(Method(stages=()), Keys.of(seed), MetricsFile(folder / "metrics.jsonl"), None)
    return fit_estimator(own, member, teachers, seed)


def assert_fitted_to(found, own, targets, *, rows=slice(None), columns=slice(None), seed=0):
    """The very arrays that the estimator gives for these targets."""
    inputs = np.asarray(jax.jit(own.dataset.preprocess)(own.dataset.train["inputs"]))[..., columns]
    expected = own.estimator.fit(inputs[rows], np.asarray(targets)[rows], seed)
    assert jax.tree.structure(found.variables[0]) == jax.tree.structure(expected)
    rtol = 1e-3 if own.config["student"]["name"] == "linear_svm" else 0  # its solver magnifies the last bit of a target
    for a, b in zip(jax.tree.leaves(found.variables[0]), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, np.asarray(jnp.asarray(b)), rtol=rtol, atol=rtol)


def logits_for(own, classes, seed=0, scale=3.0):
    return (scale * np.random.default_rng(seed).normal(size=(len(own.dataset.train["label"]), classes))).astype(np.float32)


def one_hot(own, classes=2):
    return np.eye(classes)[own.dataset.train["label"]]


@pytest.mark.parametrize("student", ["tree", "gbt", "linear_svm"])
@pytest.mark.parametrize(
    ("label", "soft"),
    [pytest.param(1.0, 1.0, marks=pytest.mark.slow), pytest.param(0.0, 2.0, marks=pytest.mark.slow), (0.3, 0.9)],
)
def test_the_mean_of_labels_and_soft_labels(student, label, soft, tmp_path):
    own = blueprint(("task.weight", label), ("loss.weight", soft), ("loss.temperature", 3.0), student=student)
    logits = logits_for(own, 2)
    targets = (label * one_hot(own) + soft * softmax(logits.astype(float) / 3.0, axis=1)) / (label + soft)
    assert_fitted_to(fitted(own, given(logits), tmp_path), own, targets)


@pytest.mark.parametrize("loss", ["none", "kd"])
def test_without_a_loss_labels_alone(loss, tmp_path):
    own = blueprint(loss=loss)
    found = fitted(own, {}, tmp_path)
    assert_fitted_to(found, own, one_hot(own))
    (row,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert '"stage": "fit"' in row and found.epoch == 1 and found.train_metrics["accuracy"] > 0.95


@pytest.mark.parametrize("task", ["classification", "click"])
def test_labels_are_smoothed_as_in_cross_entropy(task, tmp_path):
    own = blueprint(("task.label_smoothing", 0.2), loss="none", task=task)
    assert_fitted_to(fitted(own, {}, tmp_path), own, 0.8 * one_hot(own) + 0.1)


def test_one_logit_of_a_teacher_is_two_classes(tmp_path):
    own = blueprint(("loss.temperature", 2.0), task="click", student="gbt")
    logits = logits_for(own, 1)
    p = expit(logits[:, 0].astype(float) / 2.0)
    assert_fitted_to(fitted(own, given(logits), tmp_path), own, (one_hot(own) + np.stack([1 - p, p], axis=1)) / 2)


def test_ten_classes(tmp_path):
    own = blueprint(("data.limit", 300), data="digits")
    logits = logits_for(own, 10)
    targets = (one_hot(own, 10) + softmax(logits.astype(float) / own.loss.temperature, axis=1)) / 2
    assert_fitted_to(fitted(own, given(logits), tmp_path), own, targets)


@pytest.mark.parametrize("student", ["tree", "gbt"])
def test_numbers_are_mixed_with_what_a_teacher_predicts(student, tmp_path):
    own = blueprint(
        *SHOP, ("data.view", "ratings"), ("loss.weight", 3.0), data="synthetic_shop", task="regression", student=student,
        loss="logit_mse",
    )  # fmt: skip
    predictions = logits_for(own, 1)
    targets = (own.dataset.train["label"].astype(float) + 3.0 * predictions[:, 0].astype(float)) / 4
    assert_fitted_to(fitted(own, given(predictions), tmp_path), own, targets)


def _linear(params, state, inputs, *, key=None, train=False):
    del key, train
    return Outputs(inputs @ params, {}), state


def test_a_teacher_that_is_at_hand_is_asked(tmp_path):
    own = blueprint(("loss.temperature", 1.0))
    weights = np.random.default_rng(1).normal(size=(30, 2)).astype(np.float32)
    teacher = Teacher(Live(Model(lambda key, inputs: (weights, {}), _linear)), None, (jnp.asarray(weights), {}), None, {})
    inputs = np.asarray(jax.jit(own.dataset.preprocess)(own.dataset.train["inputs"]))
    found = fitted(own, {"teacher": teacher}, tmp_path)
    expected = fitted(own, given(inputs @ weights), tmp_path)
    np.testing.assert_array_equal(found.variables[0]["feature"], expected.variables[0]["feature"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), found.variables[0], expected.variables[0])


@pytest.mark.parametrize(("key", "kept"), [("keep", (0, 3, 7)), ("omit", (0, 1, 2, 3, 4, 5, 6))])
def test_the_rows_that_are_kept(key, kept, tmp_path):
    value = list(kept) if key == "keep" else [c for c in range(10) if c not in kept]
    transfer = {"keep": None, "omit": [], "inherit": False, **{key: value}}
    own = blueprint(("data.limit", 300), ("transfer", transfer), data="digits")
    logits, rows = logits_for(own, 10), np.isin(own.dataset.train["label"], kept)
    assert 0 < rows.sum() < len(rows)
    targets = (one_hot(own, 10) + softmax(logits.astype(float) / own.loss.temperature, axis=1)) / 2
    assert_fitted_to(fitted(own, given(logits), tmp_path), own, targets, rows=rows)


def test_columns_that_only_a_teacher_may_read_are_left_out(tmp_path):
    privileged = [("data.view", "conversions"), ("data.privileged", ["dwell_time"])]
    own = blueprint(*SHOP, *privileged, data="synthetic_shop", task="click", student="gbt")
    assert len(own.dataset.privileged) == 1
    logits = logits_for(own, 1)
    p = expit(logits[:, 0].astype(float) / own.loss.temperature)
    targets = (one_hot(own) + np.stack([1 - p, p], axis=1)) / 2
    found = fitted(own, given(logits), tmp_path)
    assert_fitted_to(found, own, targets, columns=columns_kept(own.dataset))
    assert set(columns_kept(own.dataset)) == set(range(own.dataset.input_shape[0])) - set(own.dataset.privileged)


def test_a_seed_is_the_estimators(tmp_path):
    own = blueprint(loss="none", student="tree")
    assert_fitted_to(fitted(own, {}, tmp_path, seed=5), own, one_hot(own), seed=5)


SCHEDULE = {"name": "linear", "start": 1.0, "end": 2.0}
REFUSED = {
    "a loss on features": ({"loss": "hint"}, (), r"^student=tree is fitted to labels and soft labels.*got loss=hint"),
    "two stages": ({"scheme": "two_stage"}, (), r"^student=tree is fitted once, got scheme=two_stage; set scheme=offline"),
    "online": ({"scheme": "online"}, (), r"^student=tree is fitted once, got scheme=online"),
    "several teachers": ({"scheme": "multi_teacher"}, (), r"^student=tree is fitted once, got scheme=multi_teacher"),
    "recovery": (
        {"compression": "prune"}, (("compression.recover_epochs", 1),), r"^student=tree is fitted once; leave recover_epochs"
    ),
    "a scheduled weight": ({}, (("loss.weight", SCHEDULE),), r"^loss.weight is a schedule, but student=tree is fitted once"),
    "a scheduled temperature": ({}, (("loss.temperature", SCHEDULE),), r"^loss.temperature is a schedule, but student=tree"),
    "a scheduled label weight": ({}, (("task.weight", SCHEDULE),), r"^task.weight is a schedule"),
    "scheduled smoothing": (
        {}, (("task.label_smoothing", {**SCHEDULE, "start": 0.0, "end": 0.1}),), r"^task.label_smoothing is a schedule"
    ),
    "requests": ({"data": "synthetic_shop", "task": "recommend", "teacher": "bpr"}, (), r"^student=tree cannot score items"),
}  # fmt: skip


@pytest.mark.parametrize(("choices", "overrides", "pattern"), REFUSED.values(), ids=REFUSED)
def test_what_only_networks_can_do(choices, overrides, pattern):
    with pytest.raises(UsageError, match=pattern):
        blueprint(*overrides, **choices)


def test_a_support_vector_machine_predicts_no_numbers(tmp_path):
    shop = (*SHOP, ("data.view", "ratings"))
    own = blueprint(*shop, data="synthetic_shop", task="regression", student="linear_svm", loss="logit_mse")
    with pytest.raises(
        UsageError, match=r"^student=linear_svm tells classes apart, this task predicts values; use tree or gbt"
    ):
        fitted(own, given(logits_for(own, 1)), tmp_path)
