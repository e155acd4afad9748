"""Yes/no metrics against scikit-learn and plain loops, with ties, extreme logits and one class."""

import numpy as np
import pytest
from sklearn import metrics as sklearn

from jdistill.errors import UsageError
from jdistill.metrics import binary, binary_metrics
from tests.metrics import reference


def examples(seed, levels, n=400):
    rng = np.random.default_rng(seed)
    label = (rng.random(n) < 0.3).astype(np.int32)
    logits = (np.round((label + rng.normal(size=n)) * levels) / levels - 0.5).astype(np.float32)
    return logits, label, rng.integers(0, 60, n)


@pytest.mark.parametrize("levels", [1, 10**6], ids=["ties", "no ties"])
def test_scikit_learn_agrees(levels):
    logits, label, group = examples(0, levels)
    p = 1 / (1 + np.exp(-logits.astype(np.float64)))
    found = binary_metrics(logits, label, group)
    assert list(found) == ["accuracy", "auc", "pr_auc", "log_loss", "brier", "calibration_error", "grouped_auc"]
    expected = {
        "auc": sklearn.roc_auc_score(label, logits),
        "pr_auc": sklearn.average_precision_score(label, logits),
        "log_loss": sklearn.log_loss(label, p),
        "brier": sklearn.brier_score_loss(label, p),
        "accuracy": sklearn.accuracy_score(label, p > 0.5),
        "calibration_error": reference.calibration_error(p, label),
    }
    assert found == pytest.approx(expected | {"grouped_auc": found["grouped_auc"]}, rel=1e-12)


@pytest.mark.parametrize("levels", [1, 10**6], ids=["ties", "no ties"])
def test_grouped_auc_as_in_loops(levels):
    logits, label, group = examples(1, levels)
    total, weight, left_out = 0.0, 0, 0
    for g in set(group.tolist()):
        value = reference.auc(logits[group == g], label[group == g])
        left_out += value is None
        if value is not None:
            total, weight = total + value * (group == g).sum(), weight + (group == g).sum()
    assert left_out
    np.testing.assert_allclose(binary.grouped_auc(logits, label, group), total / weight, rtol=1e-12)
    assert binary.grouped_auc(logits, label, group - 1000) == pytest.approx(total / weight)
    assert binary.grouped_auc(logits, label, np.full(len(label), 7)) == pytest.approx(binary.auc(logits, label))


def test_log_loss_of_extreme_logits():
    logits, label = np.array([800.0, 800.0, -800.0, 50.0], np.float32), np.array([0, 1, 0, 1])
    assert binary.log_loss(logits, label) == pytest.approx((800 + np.exp(-50)) / 4, rel=1e-15)
    assert binary.log_loss(np.array([50.0]), np.array([1])) == pytest.approx(np.exp(-50))
    assert binary.brier(logits, label) == pytest.approx(0.25)


def test_certain_probabilities_fall_into_the_last_bin():
    assert binary.calibration_error(np.array([800.0, 800.0, -800.0]), np.array([1, 1, 0])) == 0
    assert binary.calibration_error(np.array([800.0, -800.0]), np.array([0, 1])) == 1


@pytest.mark.parametrize("label", [0, 1])
def test_one_class_only(label):
    found = binary_metrics(np.arange(4.0), np.full(4, label), np.arange(4))
    assert np.isnan(found["auc"]) and np.isnan(found["grouped_auc"]) and np.isfinite(found["log_loss"])
    np.testing.assert_equal(found["pr_auc"], 1.0 if label else np.nan)


def test_perfect_and_reversed_and_constant():
    label = np.array([0, 0, 1, 1, 1])
    assert binary.auc(label - 0.5, label) == binary.pr_auc(label - 0.5, label) == 1
    assert binary.auc(0.5 - label, label) == 0
    assert binary.auc(np.zeros(5), label) == 0.5 and binary.pr_auc(np.zeros(5), label) == pytest.approx(0.6)


def test_order_of_examples_does_not_matter():
    logits, label, group = examples(2, 1)
    order = np.random.default_rng(3).permutation(len(label))
    found = binary_metrics(logits, label, group)
    assert binary_metrics(logits[order], label[order], group[order]) == pytest.approx(found)
    assert all(0 <= value <= 1 for name, value in found.items() if name != "log_loss")


def test_nan_logits_give_nan():
    found = binary_metrics(np.array([0.0, np.nan, 1.0]), np.array([0, 1, 1]), np.zeros(3, int))
    assert np.isnan([value for name, value in found.items() if name != "accuracy"]).all()


def test_bad_input_is_one_clear_line():
    with pytest.raises(UsageError, match="labels are 0 and 1, found 2"):
        binary_metrics(np.zeros(3), np.array([0, 1, 2]))
    with pytest.raises(UsageError, match=r"logits \(3, 1\) and labels \(3,\)"):
        binary_metrics(np.zeros((3, 1)), np.zeros(3, int))
