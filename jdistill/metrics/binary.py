"""Yes/no labels: metrics of `logits` [N], the logit of yes, against `label` [N] of 0 and 1."""

import numpy as np

from jdistill.errors import UsageError

BINS = 15


def auc(logits: np.ndarray, label: np.ndarray) -> float:
    """Area under the ROC curve: P(a yes scores above a no), ties count half; NaN where there is only one class."""
    return grouped_auc(logits, label, np.zeros(len(label), np.int32))


def grouped_auc(logits: np.ndarray, label: np.ndarray, group: np.ndarray) -> float:
    """GAUC: the mean of the AUC of each group (a user), weighted by its number of examples (DIN, KDD'18).

    Groups with one class are left out; NaN where that leaves none, or a logit is NaN. `group` [N] int. O(N log N).
    """
    logits = np.asarray(logits)
    if not len(logits) or np.isnan(logits).any():
        return float("nan")
    order = np.lexsort((logits, group))
    score, yes = logits[order], np.asarray(label)[order] > 0
    of = np.asarray(group)[order]
    first_of_group = np.concatenate([[True], of[1:] != of[:-1]])
    starts = np.flatnonzero(first_of_group | np.concatenate([[True], score[1:] != score[:-1]]))
    positives, size = (np.add.reduceat(v.astype(np.float64), starts) for v in (yes, np.ones(len(yes))))
    negatives = size - positives  # of each run of equal scores within a group, rising
    groups = np.flatnonzero(first_of_group[starts])
    all_positives, all_negatives = (np.add.reduceat(v, groups) for v in (positives, negatives))
    below = np.cumsum(negatives) - negatives
    below -= np.repeat(below[groups], np.diff(np.append(groups, len(starts))))
    wins = np.add.reduceat(positives * (below + negatives / 2), groups)
    pairs = all_positives * all_negatives
    both = pairs > 0
    if not both.any():
        return float("nan")
    weight = (all_positives + all_negatives)[both]
    return float((wins[both] / pairs[both] * weight).sum() / weight.sum())


def pr_auc(logits: np.ndarray, label: np.ndarray) -> float:
    """Average precision: the sum over thresholds of precision times the gain in recall; NaN where there is no yes."""
    if np.isnan(logits).any() or not np.any(label):
        return float("nan")
    values, which = np.unique(-np.asarray(logits), return_inverse=True)
    positives = np.bincount(which, weights=label, minlength=len(values))
    precision = np.cumsum(positives) / np.cumsum(np.bincount(which, minlength=len(values)))
    return float((precision * positives).sum() / positives.sum())


def log_loss(logits: np.ndarray, label: np.ndarray) -> float:
    """Mean of -log p(label) in nats, from the logits: exact where the probability rounds to 0 or 1."""
    z = np.asarray(logits, np.float64)
    return float(_softplus(np.where(np.asarray(label) > 0, -z, z)).mean())


def brier(logits: np.ndarray, label: np.ndarray) -> float:
    """Mean squared difference of the probability of yes and the label, in [0, 1]."""
    return float(((_probability(logits) - label) ** 2).mean())


def calibration_error(logits: np.ndarray, label: np.ndarray, bins: int = BINS) -> float:
    """ECE of the probability of yes: over equal bins of it, the mean of |fraction of yes - mean probability|, weighted
    by the examples in a bin (Naeini et al. 2015); NaN where a logit is."""
    p = _probability(logits)
    if np.isnan(p).any():
        return float("nan")
    gap = np.bincount(np.minimum((p * bins).astype(int), bins - 1), weights=label - p)
    return float(np.abs(gap).sum() / len(p))


def accuracy(logits: np.ndarray, label: np.ndarray) -> float:
    """The fraction of labels that are predicted: yes where the logit is above 0."""
    return float(((np.asarray(logits) > 0) == (np.asarray(label) > 0)).mean())


def binary_metrics(logits: np.ndarray, label: np.ndarray, group: np.ndarray | None = None) -> dict[str, float]:
    """`accuracy`, `auc`, `pr_auc`, `log_loss`, `brier`, `calibration_error`, and `grouped_auc` where `group` [N] is given.

    Raises `UsageError` for labels other than 0 and 1, and for arrays that are not of one length.
    """
    if np.shape(logits) != np.shape(label) or np.ndim(label) != 1:
        raise UsageError(f"logits {np.shape(logits)} and labels {np.shape(label)} need to be of one length, one axis each")
    if len(wrong := np.setdiff1d(label, (0, 1))):
        raise UsageError(f"yes/no labels are 0 and 1, found {wrong[0]}")
    metrics = (accuracy, auc, pr_auc, log_loss, brier, calibration_error)
    out = {metric.__name__: metric(logits, label) for metric in metrics}
    return out if group is None else out | {"grouped_auc": grouped_auc(logits, label, group)}


def _probability(logits: np.ndarray) -> np.ndarray:
    return np.exp(-_softplus(-np.asarray(logits, np.float64)))


def _softplus(z: np.ndarray) -> np.ndarray:
    return np.maximum(z, 0) + np.log1p(np.exp(-np.abs(z)))
