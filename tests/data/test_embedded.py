"""The sets that need no download: digits, breast_cancer and synthetic."""

import math
import subprocess
import sys

import numpy as np
import pytest
from sklearn.datasets import load_breast_cancer, load_digits

from jdistill.data import breast_cancer, digits, synthetic
from jdistill.errors import UsageError
from jdistill.registry import build


def joined(dataset, name):
    return np.concatenate([split[name] for split in (dataset.train, dataset.validation, dataset.test)])


def test_digits_are_those_of_scikit_learn():
    dataset, reference = digits(), load_digits()
    index = joined(dataset, "index")
    assert sorted(index) == list(range(1797)) and dataset.classes == 10
    assert dataset.train["inputs"].dtype == np.uint8 and dataset.train["inputs"].shape == (1294, 8, 8, 1)
    np.testing.assert_array_equal(joined(dataset, "inputs")[..., 0], reference.images[index])
    np.testing.assert_array_equal(joined(dataset, "label"), reference.target[index])


def test_digits_constants_are_those_of_the_images_outside_the_test_split():
    dataset = digits(validation=0.0)
    pixels = dataset.train["inputs"] / 16
    assert dataset.mean == (round(pixels.mean(), 5),) and dataset.std == (round(pixels.std(), 5),)
    out = np.asarray(dataset.preprocess(dataset.train["inputs"]))
    assert abs(out.mean()) < 1e-4 and abs(out.std() - 1) < 1e-4


def test_test_split_is_the_same_for_every_split_seed():
    first, other = digits(split_seed=0), digits(split_seed=1)
    np.testing.assert_array_equal(first.test["index"], other.test["index"])
    assert set(first.validation["index"]) != set(other.validation["index"])
    assert len(first.test["label"]) == 359 and np.ptp(np.bincount(first.test["label"])) <= 2


def test_datasets_prepared_alike_have_equal_functions():
    first, other = (digits(augment=("crop",), split_seed=seed) for seed in (0, 1))
    assert first.preprocess == other.preprocess and hash(first.preprocess) == hash(other.preprocess)
    assert first.augment == other.augment and hash(first.augment) == hash(other.augment)
    assert first.augment.crop_padding == 1 and digits().augment is None
    assert first.augment.fill == (16 * first.mean[0],)


def test_breast_cancer_is_that_of_scikit_learn_and_standardised():
    dataset, reference = breast_cancer(), load_breast_cancer()
    index = joined(dataset, "index")
    assert sorted(index) == list(range(569)) and dataset.classes == 2
    np.testing.assert_array_equal(joined(dataset, "inputs"), reference.data[index].astype(np.float32))
    np.testing.assert_array_equal(joined(dataset, "label"), reference.target[index])
    whole = breast_cancer(validation=0.0)
    out = np.asarray(whole.preprocess(whole.train["inputs"]))
    np.testing.assert_allclose(out.mean(axis=0), 0, atol=1e-4)
    np.testing.assert_allclose(out.std(axis=0), 1, atol=1e-4)


def test_breast_cancer_features_keeps_the_first():
    ten = breast_cancer(features=10)
    assert ten.train["inputs"].shape == (409, 10) and len(ten.mean) == len(ten.std) == 10
    np.testing.assert_array_equal(ten.train["inputs"], breast_cancer().train["inputs"][:, :10])
    with pytest.raises(UsageError, match="features must be between 1 and 30, got 31"):
        breast_cancer(features=31)


def clusters(dataset):
    inputs, label = joined(dataset, "inputs"), joined(dataset, "label")
    return inputs, label, np.stack([inputs[label == k].mean(axis=0) for k in range(dataset.classes)])


@pytest.mark.parametrize(("classes", "features", "separation"), [(2, 1, 2.0), (2, 100, 1.0), (5, 4, 3.0), (3, 10, 4.0)])
def test_synthetic_means_are_equally_far_apart_and_noise_is_1(classes, features, separation):
    dataset = synthetic(examples=20000, features=features, classes=classes, separation=separation)
    inputs, label, means = clusters(dataset)
    assert inputs.shape == (20000, features) and inputs.dtype == np.float32
    assert np.ptp(np.bincount(label)) <= 1
    # the squared distance of two sample means is off by twice the dimension over the examples of a class
    noise = 2 * features * classes / 20000
    for i in range(classes):
        for j in range(i):
            assert np.sum((means[i] - means[j]) ** 2) - noise == pytest.approx(separation**2, abs=0.1 * separation)
    np.testing.assert_allclose((inputs - means[label]).std(axis=0), 1, atol=0.03)


@pytest.mark.parametrize("separation", [1.0, 2.0, 4.0])
def test_synthetic_nearest_mean_reaches_the_accuracy_the_docstring_promises(separation):
    dataset = synthetic(examples=20000, separation=separation)
    inputs, label, means = clusters(dataset)
    nearest = np.argmin(((inputs[:, None] - means) ** 2).sum(axis=-1), axis=1)
    best = 0.5 * (1 + math.erf(separation / 2 / math.sqrt(2)))
    assert (nearest == label).mean() == pytest.approx(best, abs=0.01)


def test_synthetic_without_separation_teaches_nothing():
    dataset = synthetic(examples=20000, separation=0.0)
    whole = np.concatenate([dataset.train["inputs"], np.ones((len(dataset.train["label"]), 1))], axis=1)
    weights, *_ = np.linalg.lstsq(whole, 2.0 * dataset.train["label"] - 1, rcond=None)
    guess = dataset.test["inputs"] @ weights[:-1] + weights[-1] > 0
    assert abs((guess == dataset.test["label"]).mean() - 0.5) < 4 * 0.5 / math.sqrt(4000)


def test_synthetic_is_made_from_its_seed():
    first, again, other = (synthetic(seed=s) for s in (0, 0, 1))
    np.testing.assert_array_equal(first.train["inputs"], again.train["inputs"])
    assert not np.allclose(first.train["inputs"], other.train["inputs"])
    np.testing.assert_array_equal(np.asarray(first.preprocess(first.train["inputs"])), first.train["inputs"])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"classes": 1}, "classes must be between 2 and features"),
        ({"classes": 5, "features": 3}, "classes must be between 2 and features \\+ 1 = 4, got 5"),
        ({"examples": 9}, "examples must be at least 5 per class = 10, got 9"),
        ({"separation": -1.0}, "separation must be at least 0"),
        ({"features": 0}, "features must be positive"),
    ],
)
def test_synthetic_refuses_impossible_values(keys, message):
    with pytest.raises(UsageError, match=message):
        synthetic(**keys)


@pytest.mark.parametrize("name", ["digits", "breast_cancer", "synthetic"])
def test_a_given_root_must_be_a_directory_but_the_variable_is_not_read(name, tmp_path, monkeypatch):
    monkeypatch.setenv("JDISTILL_DATA", str(tmp_path / "nowhere"))
    assert build("data", {"name": name, "limit": 20, "root": str(tmp_path)}).train["label"].shape == (20,)
    with pytest.raises(UsageError, match=r"data\.root '.*none' is not a directory"):
        build("data", {"name": name, "root": str(tmp_path / "none")})


def test_options_are_built_from_lists_and_name_their_keys():
    dataset = build("data", {"name": "digits", "augment": ["crop", "flip"], "classes_kept": [3, 8]})
    assert dataset.augment.ops == ("crop", "flip") and dataset.classes == 2
    assert set(np.unique(joined(dataset, "label"))) == {0, 1}
    for config, message in (
        ({"augment": ["crops"]}, r"data\.augment must be one of .*did you mean 'crop'"),
        ({"classes_kept": [3]}, r"data\.classes_kept must be"),
        ({"limits": 3}, r"unknown key 'data\.limits'; did you mean 'limit'"),
    ):
        with pytest.raises(UsageError, match=message):
            build("data", {"name": "digits", **config})


def test_importing_and_loading_digits_imports_nothing_slow():
    code = (
        "import sys; from jdistill.data import digits; digits(); "
        "print([m for m in ('sklearn', 'pooch', 'matplotlib', 'rich') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
