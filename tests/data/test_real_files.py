"""The publishers' own files, found through JDISTILL_DATA; skipped where they are not."""

import functools

import numpy as np
import pytest

from jdistill.data import cifar10, cifar100, fashion_mnist, mnist
from jdistill.data.published import CIFAR10, CIFAR100, FASHION_MNIST, MNIST
from tests.realdata import require

FACTS = {
    # name: (loader, source, shape, first training labels, first test labels)
    "mnist": (mnist, MNIST, (28, 28, 1), [5, 0, 4, 1, 9, 2, 1, 3, 1, 4], [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]),
    "fashion_mnist": (
        fashion_mnist, FASHION_MNIST, (28, 28, 1), [9, 0, 0, 3, 0, 2, 7, 2, 5, 5], [9, 2, 1, 1, 6, 1, 4, 6, 5, 7],
    ),
    "cifar10": (cifar10, CIFAR10, (32, 32, 3), [6, 9, 9, 4, 1, 1, 2, 7, 8, 3], [3, 8, 8, 0, 6, 6, 1, 6, 3, 1]),
    "cifar100": (
        cifar100, CIFAR100, (32, 32, 3),
        [19, 29, 0, 11, 1, 86, 90, 28, 23, 31], [49, 33, 72, 51, 71, 92, 15, 14, 23, 0],
    ),
}  # fmt: skip
NAMES = {
    "cifar10": ("cifar-10-batches-bin/batches.meta.txt", ["frog", "truck", "truck", "deer"]),
    "cifar100": ("cifar-100-binary/fine_label_names.txt", ["cattle", "dinosaur", "apple", "boy"]),
}


@functools.cache
def whole(name):
    require(name)
    return FACTS[name][0](validation=0.0, download=False)


@pytest.mark.parametrize("name", FACTS)
def test_shapes_first_labels_and_balance(name):
    dataset = whole(name)
    _, source, shape, first, first_test = FACTS[name]
    assert dataset.train["inputs"].shape == (source.rows[0], *shape) and dataset.train["inputs"].dtype == np.uint8
    assert dataset.test["inputs"].shape == (source.rows[1], *shape)
    assert dataset.train["label"][:10].tolist() == first and dataset.test["label"][:10].tolist() == first_test
    np.testing.assert_array_equal(dataset.train["index"], np.arange(source.rows[0]))
    if name != "mnist":  # MNIST's classes are not equally large
        assert (np.bincount(dataset.train["label"]) == source.rows[0] // source.classes).all()
        assert (np.bincount(dataset.test["label"]) == source.rows[1] // source.classes).all()
    assert dataset.checksums == source.sha256


@pytest.mark.parametrize("name", FACTS)
def test_published_normalisation_is_that_of_the_pixels(name):
    dataset = whole(name)
    counts = [np.bincount(dataset.train["inputs"][..., c].reshape(-1), minlength=256) for c in range(len(dataset.mean))]
    values, share = np.arange(256) / 255, np.array(counts) / counts[0].sum()
    mean = share @ values
    std = np.sqrt(share @ values**2 - mean**2)
    tolerance = 3e-4 if name == "cifar100" else 6e-5  # RepDistiller's constants are not rounded from the pixels
    np.testing.assert_allclose(dataset.mean, mean, atol=tolerance)
    np.testing.assert_allclose(dataset.std, std, atol=tolerance)


@pytest.mark.parametrize("name", NAMES)
def test_first_images_have_the_published_class_names(name):
    file, first = NAMES[name]
    names = (require(name) / file).read_text().split()
    assert [names[label] for label in whole(name).train["label"][:4]] == first


def test_cifar_channels_and_axes_are_not_mixed_up():
    """CIFAR-10's ships and planes lie under a sky: bluer and brighter above than below; frogs do not."""
    dataset = whole("cifar10")
    ships = dataset.train["inputs"][dataset.train["label"] == 8][:2000].astype(np.float32)
    red, _, blue = ships.mean(axis=(0, 1, 2))
    assert blue > red + 5
    assert ships[:, :8].mean() > ships[:, -8:].mean() + 20
    left, right = ships[:, :, :8].mean(), ships[:, :, -8:].mean()
    assert abs(left - right) < 5


def test_splits_of_mnist_two_classes_and_limit():
    require("mnist")
    dataset = mnist(classes_kept=(3, 8), limit=500, download=False)
    reference = whole("mnist")
    assert dataset.classes == 2 and dataset.train["inputs"].shape == (500, 28, 28, 1)
    assert abs(dataset.train["label"].mean() - 5851 / (5851 + 6131)) < 0.002 + 1 / 500
    rows = dataset.train["index"]
    np.testing.assert_array_equal(dataset.train["inputs"], reference.train["inputs"][rows])
    np.testing.assert_array_equal(np.array([3, 8])[dataset.train["label"]], reference.train["label"][rows])
    assert len(dataset.test["label"]) == 1010 + 974


def test_mnist_validation_split_is_stratified():
    require("mnist")
    dataset = mnist(download=False)
    assert len(dataset.validation["label"]) == 6000 and len(dataset.train["label"]) == 54000
    assert not set(dataset.validation["index"]) & set(dataset.train["index"])
    share = np.bincount(dataset.validation["label"]) / np.bincount(whole("mnist").train["label"])
    assert np.abs(share - 0.1).max() < 1e-3
