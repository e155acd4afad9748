"""Regression metrics against scikit-learn."""

import numpy as np
import pytest
from sklearn import metrics as sklearn

from jdistill.errors import UsageError
from jdistill.metrics import regression_metrics


def test_scikit_learn_agrees():
    rng = np.random.default_rng(0)
    labels = rng.normal(3, 2, 200).astype(np.float32)
    predictions = (labels + rng.normal(size=200)).astype(np.float32)
    wide = predictions.astype(np.float64), labels.astype(np.float64)
    expected = {
        "rmse": sklearn.root_mean_squared_error(*wide[::-1]),
        "mae": sklearn.mean_absolute_error(*wide[::-1]),
        "r2": sklearn.r2_score(*wide[::-1]),
    }
    assert regression_metrics(predictions, labels) == pytest.approx(expected, rel=1e-12)


def test_perfect_and_mean_predictions():
    labels = np.array([1.0, 2.0, 6.0])
    assert regression_metrics(labels, labels) == {"rmse": 0, "mae": 0, "r2": 1}
    assert regression_metrics(np.full(3, 3.0), labels)["r2"] == 0


def test_equal_labels_have_no_r2():
    found = regression_metrics(np.array([1.0, 2.0]), np.array([0.1, 0.1], np.float32))
    assert np.isnan(found["r2"]) and found["mae"] == pytest.approx(1.4)


def test_sums_are_in_float64():
    labels = np.full(100_000, 0.1, np.float16)
    assert regression_metrics(labels * 0, labels)["mae"] == pytest.approx(float(labels[0]), rel=1e-12)


def test_lengths_differ():
    with pytest.raises(UsageError, match=r"predictions \(3, 1\) and labels \(3,\)"):
        regression_metrics(np.zeros((3, 1)), np.zeros(3))
