"""Small real data sets that come with scikit-learn; its files are read without importing it (2 s saved)."""

import gzip
import importlib.util
import io
from pathlib import Path

import numpy as np

from jdistill.data.base import Dataset
from jdistill.data.files import check_root, read
from jdistill.data.published import image_augment
from jdistill.data.splits import Selection, hold_out_test
from jdistill.errors import UsageError
from jdistill.registry import register

DIGITS_MEAN, DIGITS_STD = 0.30491, 0.37587
"""Of pixels / 16, over the 1,438 images that are not in the test split."""


@register("data", "digits")
def digits(
    root: str | None = None,
    validation: float = 0.1,
    split_seed: int = 0,
    augment: tuple[str, ...] = (),
    crop_padding: int = 1,
    cutout_size: int = 4,
    limit: int | None = None,
    classes_kept: tuple[int, ...] | None = None,
) -> Dataset:
    """1,797 handwritten digits of 8 x 8 pixels, 10 classes, inside scikit-learn: nothing to download.

    Source: the test part of Optical Recognition of Handwritten Digits (Alpaydin and Kaynak 1998, UCI). The test split
    is a stratified 20 % (359 images), the same for every `split_seed`.

    Args:
      root: not used; must be a directory where given.
      validation: fraction of the other images that becomes the validation split, stratified.
      split_seed: seed of that draw and of `limit`.
      augment: operations on training images, in order: crop, flip, cutout.
      crop_padding: pixels of zeros around an image before it is cropped.
      cutout_size: side of the square cut out.
      limit: train on at most so many images, stratified.
      classes_kept: keep these labels only, renamed 0, 1, ... in the order given.

    Returns:
      A `Dataset` of uint8 images [N, 8, 8, 1] with values 0 to 16.

    Raises:
      UsageError: a wrong value, or scikit-learn is not installed.
    """
    check_root(root)
    selection = Selection(published=10, validation=validation, split_seed=split_seed, limit=limit, classes_kept=classes_kept)
    augmentation = image_augment(augment, crop_padding, cutout_size, (DIGITS_MEAN,), 16)
    table, checksums = _table("digits.csv.gz", (1797, 65))
    images = table[:, :64].astype(np.uint8).reshape(-1, 8, 8, 1)
    whole, held = hold_out_test(images, table[:, 64].astype(np.int32))
    train, val, test = selection(whole, held)
    return Dataset("digits", train, val, test, selection.classes, (DIGITS_MEAN,), (DIGITS_STD,), 16.0, augmentation, checksums)


@register("data", "breast_cancer")
def breast_cancer(
    root: str | None = None,
    validation: float = 0.1,
    split_seed: int = 0,
    features: int | None = None,
    limit: int | None = None,
    classes_kept: tuple[int, ...] | None = None,
) -> Dataset:
    """569 tumours, 30 measured features, malignant (0) or benign (1), inside scikit-learn.

    Source: Breast Cancer Wisconsin (Diagnostic), Street et al. 1993, UCI. The test split is a stratified 20 % (114
    tumours), the same for every `split_seed`; mean and std are those of the other 455.

    Args:
      root: not used; must be a directory where given.
      validation: fraction of the other examples that becomes the validation split, stratified.
      split_seed: seed of that draw and of `limit`.
      features: keep the first so many features; 10 are the cell nuclei's means (then come standard errors and worst).
      limit: train on at most so many examples, stratified.
      classes_kept: keep these labels only, renamed 0, 1, ... in the order given.

    Returns:
      A `Dataset` of float32 [N, features].

    Raises:
      UsageError: a wrong value, or scikit-learn is not installed.
    """
    check_root(root)
    selection = Selection(published=2, validation=validation, split_seed=split_seed, limit=limit, classes_kept=classes_kept)
    if features is not None and not 1 <= features <= 30:
        raise UsageError(f"features must be between 1 and 30, got {features}")
    table, checksums = _table("breast_cancer.csv", (569, 31), header=1)
    whole, held = hold_out_test(table[:, : features or 30].astype(np.float32), table[:, 30].astype(np.int32))
    mean, std = whole["inputs"].mean(axis=0, dtype=np.float64), whole["inputs"].std(axis=0, dtype=np.float64)
    train, val, test = selection(whole, held)
    return Dataset(
        "breast_cancer",
        train,
        val,
        test,
        selection.classes,
        tuple(mean.tolist()),
        tuple(std.tolist()),
        1.0,
        None,
        checksums,
    )


def _table(name: str, shape: tuple[int, int], header: int = 0) -> tuple[np.ndarray, dict[str, str]]:
    package = importlib.util.find_spec("sklearn")  # finds, does not import
    if package is None or package.origin is None:
        raise UsageError(f"{name} comes with scikit-learn, which is not installed; run pip install scikit-learn")
    file, checksum = read(Path(package.origin).parent / "datasets" / "data" / name, None)
    text = gzip.decompress(file.data) if name.endswith(".gz") else file.data
    table = np.loadtxt(io.BytesIO(text), delimiter=",", skiprows=header)
    if table.shape != shape:
        raise UsageError(f"{file.path} has shape {list(table.shape)}, expected {list(shape)}; reinstall scikit-learn")
    return table, {name: checksum}
