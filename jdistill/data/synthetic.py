"""Gaussian clusters: a problem whose best possible accuracy is known."""

import numpy as np

from jdistill.data.base import Dataset
from jdistill.data.files import check_root
from jdistill.data.splits import Selection, hold_out_test
from jdistill.errors import UsageError
from jdistill.pytrees import require_nonnegative, require_positive
from jdistill.registry import register


@register("data", "synthetic")
def synthetic(
    root: str | None = None,
    validation: float = 0.1,
    split_seed: int = 0,
    examples: int = 1000,
    features: int = 10,
    classes: int = 2,
    separation: float = 2.0,
    seed: int = 0,
    limit: int | None = None,
    classes_kept: tuple[int, ...] | None = None,
) -> Dataset:
    """One Gaussian cluster of unit covariance per class; every two means are equally far apart.

    The best possible accuracy for two classes is Phi(separation / 2), Phi being the normal distribution function:
    84.1 % at the default. 20 % of the examples are the test split.

    Args:
      root: not used; must be a directory where given.
      validation: fraction of the other examples that becomes the validation split, stratified.
      split_seed: seed of that draw and of `limit`.
      examples: in all, in equal numbers per class.
      features: at least classes - 1, the dimensions that equally distant means need.
      classes: at least 2.
      separation: distance of two class means in within-class standard deviations; 0: labels independent of inputs.
      seed: of the data.
      limit: train on at most so many examples, stratified.
      classes_kept: keep these labels only, renamed 0, 1, ... in the order given.

    Returns:
      A `Dataset` of float32 [N, features], not scaled.

    Raises:
      UsageError: a wrong value.
    """
    check_root(root)
    require_nonnegative(separation=separation, seed=seed)
    require_positive(features=features)
    if classes < 2 or features < classes - 1:
        raise UsageError(f"classes must be between 2 and features + 1 = {features + 1}, got {classes}")
    if examples < 5 * classes:
        raise UsageError(f"examples must be at least 5 per class = {5 * classes}, got {examples}")
    selection = Selection(
        published=classes, validation=validation, split_seed=split_seed, limit=limit, classes_kept=classes_kept
    )
    rng = np.random.default_rng(seed)
    label = rng.permutation(np.arange(examples) % classes).astype(np.int32)
    directions, _ = np.linalg.qr(rng.standard_normal((features, classes - 1)))
    means = separation * _simplex(classes) @ directions.T
    inputs = (means[label] + rng.standard_normal((examples, features))).astype(np.float32)
    whole, held = hold_out_test(inputs, label)
    train, val, test = selection(whole, held)
    return Dataset("synthetic", train, val, test, selection.classes, (0.0,), (1.0,), 1.0, None, {"synthetic": "generated"})


def _simplex(corners: int) -> np.ndarray:
    """Corners [k, k - 1] of the regular simplex with edges of length 1, centred at 0."""
    centred = (np.eye(corners) - 1 / corners) / np.sqrt(2)
    left, values, _ = np.linalg.svd(centred)
    return (left * values)[:, : corners - 1]
