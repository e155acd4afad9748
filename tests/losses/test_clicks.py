"""Distillation for clicks and conversions needs no loss of its own: the published forms are those of other losses."""

import jax.numpy as jnp
import numpy as np
import pytest

import jdistill.options  # noqa: F401 (registers losses, schemes and schedules)
from jdistill import schedules
from jdistill.losses import CrossEntropy
from jdistill.method import Gate, Term
from jdistill.optim import Clock, Optimizer
from jdistill.registry import build
from jdistill.schemes.base import Setting
from jdistill.types import Outputs

ZS, ZT = np.array([[0.5], [-3.0], [2.0]]), np.array([[1.0], [-1.0], [-2.5]])


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


@pytest.mark.parametrize(
    ("config", "form"),
    [
        (
            {"name": "bce_soft", "temperature": 2.0},
            lambda s, t: -sigmoid(t / 2) * np.log(sigmoid(s / 2)) - (1 - sigmoid(t / 2)) * np.log(1 - sigmoid(s / 2)),
        ),
        ({"name": "logit_mse"}, lambda s, t: (s - t) ** 2),
    ],
)
def test_soft_labels_and_logits_of_clicks(config, form):
    """Zhu et al. 2020: the cross-entropy of sigmoids at a temperature, or the squared difference of logits."""
    values = build("loss", config)({}, Outputs(jnp.asarray(ZS), {}), Outputs(jnp.asarray(ZT), {}), {})
    np.testing.assert_allclose(values, form(ZS, ZT)[:, 0], rtol=1e-5)


def test_each_click_weighs_its_teachers():
    """scheme=multi_teacher scheme.gate=confidence, of one logit a teacher: the surer of the label weighs more."""
    known = {"teacher": Outputs(jnp.asarray(ZT), {}), "teacher2": Outputs(jnp.asarray(ZS), {})}
    gate, batch = Gate(among=("teacher", "teacher2")), {"label": jnp.array([1, 0, 1])}
    first, second = (np.asarray(gate(known, name, batch)) for name in known)
    np.testing.assert_allclose(first + second, 1, rtol=1e-6)
    assert first[0] > 0.5 and first[1] < 0.5 and first[2] < 0.1


def test_privileged_features_trained_together_with_a_teacher_that_starts_alone():
    """scheme=joint, with a schedule that is 0 for two epochs and then 0.5: the weight of the student's soft labels."""
    weight = build("schedule", {"name": "linear", "start": 0.0, "end": 0.5, "epochs": 0.0, "delay": 2.0})
    setting = Setting(
        task=Term(name="task", loss=CrossEntropy()),
        distil=Term(name="distil", teacher="teacher", loss=build("loss", {"name": "bce_soft"}), weight=weight),
        optim=Optimizer(), classes=2, student=Outputs(jnp.asarray(ZS), {}),
    )  # fmt: skip
    (stage,) = build("scheme", {"name": "joint"}).stages(setting)
    assert set(stage.trains) == {"student", "teacher"}
    assert [(term.learner, term.teacher) for term in stage.terms] == [
        ("teacher", None), ("student", None), ("student", "teacher"),
    ]  # fmt: skip
    at = [
        float(schedules.at(stage.terms[2].weight, Clock(jnp.int32(step), jnp.float32(10), jnp.float32(5))))
        for step in (0, 10, 20, 21, 49)
    ]
    np.testing.assert_allclose(at, [0, 0, 0, 0.5, 0.5])
