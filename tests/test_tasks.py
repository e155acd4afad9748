"""Metrics against scikit-learn, SciPy and plain loops."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import expit, softmax
from scipy.stats import entropy
from sklearn.metrics import accuracy_score, log_loss

from jdistill.data import Dataset
from jdistill.errors import UsageError
from jdistill.losses import CrossEntropy
from jdistill.registry import build
from jdistill.tasks import Classification
from jdistill.tasks.classification import hits, metrics
from jdistill.types import Outputs

RANDOM = np.random.default_rng(0)
LOGITS, TEACHER = RANDOM.normal(size=(2, 200, 5)).astype(np.float32) * 3
LABEL = RANDOM.integers(0, 5, 200).astype(np.int32)
ONE, BINARY = LOGITS[:, :1], LABEL % 2


def of(classes):
    """Data of so many classes."""
    rows = {"inputs": np.zeros((2, 3), np.float32), "label": np.zeros(2, np.int32), "index": np.arange(2, dtype=np.int32)}
    return Dataset("rows", rows, rows, rows, classes, (0.0,), (1.0,), 1.0, None, {})


def calibration_error(p, label, bins=15):
    """Guo et al. 2017, equation 3, example by example."""
    boxes = [[] for _ in range(bins)]
    for row, y in zip(p, label, strict=True):
        boxes[min(int(row.max() * bins), bins - 1)].append((row.max(), row.argmax() == y))
    total = 0.0
    for box in filter(None, boxes):
        confidence, correct = np.mean([c for c, _ in box]), np.mean([h for _, h in box])
        total += len(box) / len(p) * abs(correct - confidence)
    return total


@pytest.mark.parametrize(
    ("logits", "label", "p"),
    [
        (LOGITS, LABEL, softmax(LOGITS.astype(float), axis=1)),
        (ONE, BINARY, np.concatenate([1 - expit(ONE.astype(float)), expit(ONE.astype(float))], axis=1)),
    ],
    ids=["softmax", "sigmoid"],
)
def test_metrics_of_labels(logits, label, p):
    found = metrics(logits, label)
    assert found.keys() == {"accuracy", "cross_entropy", "calibration_error"}
    assert all(type(value) is float for value in found.values())
    np.testing.assert_allclose(found["accuracy"], accuracy_score(label, p.argmax(1)), rtol=1e-12)
    np.testing.assert_allclose(found["cross_entropy"], log_loss(label, p, labels=range(p.shape[1])), rtol=1e-9)
    np.testing.assert_allclose(found["calibration_error"], calibration_error(p, label), rtol=1e-9)


@pytest.mark.parametrize(("student", "teacher", "label"), [(LOGITS, TEACHER, LABEL), (ONE, TEACHER[:, :1], BINARY)])
def test_metrics_of_a_teacher(student, teacher, label):
    def p(z):
        return softmax(np.concatenate([np.zeros_like(z), z], 1) if z.shape[1] == 1 else z, axis=1).astype(float)

    found = metrics(student, label, teacher)
    assert found["teacher_agreement"] == accuracy_score(p(teacher).argmax(1), p(student).argmax(1))
    np.testing.assert_allclose(found["teacher_kl"], entropy(p(teacher), p(student), axis=1).mean(), rtol=1e-5)
    of_itself = metrics(student, label, student)
    assert of_itself["teacher_agreement"] == 1 and of_itself["teacher_kl"] == 0


def test_confident_logits_stay_finite():
    logits = np.array([[1e4, 0, -1e4], [0, 1e5, 0]], np.float32)
    found = metrics(logits, np.array([0, 0]), -logits)
    assert found["accuracy"] == 0.5 and found["cross_entropy"] == 5e4 and np.isfinite(list(found.values())).all()
    assert found["calibration_error"] == 0.5  # confidence 1 falls into the last bin


def test_hits_are_the_training_accuracy():
    batch = {"label": jnp.asarray(LABEL)}
    np.testing.assert_array_equal(hits(Outputs(jnp.asarray(LOGITS), {}), batch)["accuracy"], LOGITS.argmax(1) == LABEL)
    one = hits(Outputs(jnp.asarray(ONE), {}), {"label": jnp.asarray(BINARY)})
    np.testing.assert_array_equal(one["accuracy"], (ONE[:, 0] > 0) == BINARY)
    assert tuple(one) == Classification.observed


def test_classification():
    assert Classification(label_smoothing=0.1).loss() == CrossEntropy(label_smoothing=0.1)
    assert Classification().width(of(7)) == 7 and build("task", {"name": "binary"}).width(of(2)) == 1
    with pytest.raises(UsageError, match=r"^task\.outputs=sigmoid needs data of 2 classes, this has 3; use softmax"):
        build("task", {"name": "binary"}).width(of(3))
    for key, value in (("weight", -1.0), ("label_smoothing", 1.0), ("outputs", "sigmod")):
        with pytest.raises(UsageError, match=rf"^task\.{key} must be"):
            build("task", {"name": "classification", key: value})
