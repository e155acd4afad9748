"""Regression (ratings, prices): metrics of `predictions` [N] against `labels` [N], in the labels' unit."""

import numpy as np

from jdistill.errors import UsageError


def rmse(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Root of the mean squared error."""
    return float(np.sqrt((_errors(predictions, labels) ** 2).mean()))


def mae(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Mean absolute error."""
    return float(np.abs(_errors(predictions, labels)).mean())


def r2(predictions: np.ndarray, labels: np.ndarray) -> float:
    """1 - squared error / squared error of the labels' mean: at most 1; NaN where all labels are equal."""
    labels = np.asarray(labels, np.float64)
    total = ((labels - labels.mean()) ** 2).sum()
    return float(1 - (_errors(predictions, labels) ** 2).sum() / total) if np.ptp(labels) > 0 else float("nan")


def regression_metrics(predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """`rmse`, `mae` and `r2`. Raises `UsageError` for arrays that are not of one length."""
    if np.shape(predictions) != np.shape(labels) or np.ndim(labels) != 1:
        raise UsageError(
            f"predictions {np.shape(predictions)} and labels {np.shape(labels)} need to be of one length, one axis each"
        )
    return {metric.__name__: metric(predictions, labels) for metric in (rmse, mae, r2)}


def _errors(predictions: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return np.asarray(predictions, np.float64) - np.asarray(labels, np.float64)
