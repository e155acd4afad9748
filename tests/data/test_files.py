"""Broken files: each is one clear line that names the file, never a wrong array."""

import dataclasses
import functools
import gzip
import hashlib

import numpy as np
import pytest

from jdistill.data import mnist
from jdistill.data.files import data_root, read_cifar, read_idx
from jdistill.data.published import CIFAR10, MNIST, load, locate
from jdistill.errors import UsageError

RNG = np.random.default_rng(3)
IMAGES, LABELS = "train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"


def idx(array, magic=None, shape=None):
    shape = array.shape if shape is None else shape
    magic = 0x0800 + array.ndim if magic is None else magic
    header = magic.to_bytes(4, "big") + b"".join(n.to_bytes(4, "big") for n in shape)
    return header + array.astype(np.uint8).tobytes()


def write(folder, files, source):
    """Writes files and gives the source their checksums, as if they were what the publisher has."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return dataclasses.replace(source, sha256={n: hashlib.sha256(d).hexdigest() for n, d in files.items()})


@pytest.fixture
def small_mnist(tmp_path):
    """(source, folder, arrays) of a tiny set in MNIST's layout: 6 training and 4 test images."""
    arrays = [RNG.integers(0, 256, (6, 28, 28)), RNG.integers(0, 10, 6)]
    arrays += [RNG.integers(0, 256, (4, 28, 28)), RNG.integers(0, 10, 4)]
    files = {name: gzip.compress(idx(array)) for name, array in zip(MNIST.sha256, arrays, strict=True)}
    source = write(tmp_path / "mnist", files, dataclasses.replace(MNIST, rows=(6, 4)))
    return source, tmp_path / "mnist", arrays


@pytest.fixture
def small_cifar(tmp_path):
    """(source, folder, images NHWC, fine labels) in CIFAR-100's layout with two training batches."""
    images, labels = RNG.integers(0, 256, (9, 32, 32, 3), np.uint8), RNG.integers(0, 100, 9)
    rows = [bytes([labels[i] // 5, labels[i]]) + images[i].transpose(2, 0, 1).tobytes() for i in range(9)]
    files = {name: b"".join(rows[3 * i : 3 * i + 3]) for i, name in enumerate(("a.bin", "b.bin", "test.bin"))}
    source = dataclasses.replace(
        CIFAR10, rows=(6, 3), classes=100, train=("a.bin", "b.bin"), test=("test.bin",),
        reader=functools.partial(read_cifar, limits=(20, 100)),
    )  # fmt: skip
    return write(tmp_path / "cifar", files, source), tmp_path / "cifar", images, labels


@pytest.mark.parametrize("verify", [True, False])
def test_idx_files_give_their_arrays(small_mnist, verify):
    source, folder, arrays = small_mnist
    ((train, label), (test, test_label)), checksums = load(source, folder, verify=verify)
    assert train.shape == (6, 28, 28, 1) and train.dtype == np.uint8
    for found, expected in zip((train[..., 0], label, test[..., 0], test_label), arrays, strict=True):
        np.testing.assert_array_equal(found, expected)
    assert checksums == source.sha256


def test_cifar_files_give_their_arrays_and_the_fine_label(small_cifar):
    source, folder, images, labels = small_cifar
    ((train, label), (test, test_label)), checksums = load(source, folder, verify=True)
    np.testing.assert_array_equal(np.concatenate([train, test]), images)
    np.testing.assert_array_equal([*label, *test_label], labels)
    assert checksums == source.sha256


@pytest.mark.parametrize("change", [lambda d: d[:-1], lambda d: d[:40] + bytes([d[40] ^ 1]) + d[41:], lambda d: b""])
def test_a_file_that_is_not_the_publishers_is_refused(small_mnist, small_cifar, change):
    for source, folder, name in ((*small_mnist[:2], IMAGES), (*small_cifar[:2], "b.bin")):
        path = folder / name
        path.write_bytes(change(path.read_bytes()))
        with pytest.raises(UsageError, match=r"is truncated or altered .* delete it .* data\.verify=false") as error:
            load(source, folder, verify=True)
        assert str(path) in str(error.value) and "\n" not in str(error.value)


FULL = np.zeros((6, 28, 28), np.uint8)
BROKEN_IDX = {
    "gzip truncated": (IMAGES, gzip.compress(idx(FULL))[:-20], "is not a whole gzip file"),
    "not gzip": (IMAGES, idx(FULL), "is not a whole gzip file"),
    "empty": (IMAGES, b"", "0x, expected 0x00000803"),
    "damaged inside": (IMAGES, gzip.compress(idx(FULL))[:30] + b"\xff" * 30, "is not a whole gzip file"),
    "magic of labels": (IMAGES, gzip.compress(idx(FULL, 0x801)), "magic 0x00000801, expected 0x00000803"),
    "magic of floats": (IMAGES, gzip.compress(idx(FULL, 0xD03)), "magic 0x00000d03, expected 0x00000803"),
    "header alone": (IMAGES, gzip.compress(b"\x00\x00\x08\x03\x00"), "magic"),
    "fewer images": (IMAGES, gzip.compress(idx(FULL[:5])), r"shape \[5, 28, 28\].*expected shape \[6, 28, 28\]"),
    "wrong size": (IMAGES, gzip.compress(idx(FULL[:, :14])), r"shape \[6, 14, 28\]"),
    "data missing": (IMAGES, gzip.compress(idx(FULL[:5], shape=(6, 28, 28))), "holds 3920 values"),
    "data too long": (IMAGES, gzip.compress(idx(FULL) + b"x"), "holds 4705 values"),
    "labels missing": (LABELS, gzip.compress(idx(np.zeros(5))), r"shape \[5\]"),
    "label out of range": (
        LABELS,
        gzip.compress(idx(np.array([0, 1, 10, 2, 3, 4]))),
        "label 10 in row 2, expected 0 to 9",
    ),
}


@pytest.mark.parametrize("case", BROKEN_IDX)
def test_broken_idx_files_are_refused_without_checksums_too(small_mnist, case):
    name, data, message = BROKEN_IDX[case]
    source, folder, _ = small_mnist
    (folder / name).write_bytes(data)
    with pytest.raises(UsageError, match=message) as error:
        load(source, folder, verify=False)
    assert str(folder / name) in str(error.value) and "\n" not in str(error.value)


def test_broken_cifar_files_are_refused_without_checksums_too(small_cifar):
    source, folder, *_ = small_cifar
    path, whole = folder / "b.bin", (folder / "b.bin").read_bytes()
    for data, message in (
        (whole[:-1], r"has 9221 bytes, expected 9222 \(3 rows of 3074\)"),
        (whole[: 2 * 3074], "has 6148 bytes"),
        (whole + whole[:3074], "has 12296 bytes"),
        (whole[:3074] + b"\x14" + whole[3075:], "label 20 in row 1, expected 0 to 19"),
        (whole[:3075] + b"\x64" + whole[3076:], "label 100 in row 1, expected 0 to 99"),
    ):
        path.write_bytes(data)
        with pytest.raises(UsageError, match=message) as error:
            load(source, folder, verify=False)
        assert str(path) in str(error.value)


def test_readers_count_rows_over_all_files(small_cifar):
    assert read_cifar.__doc__ and read_idx.__doc__
    source, folder, *_ = small_cifar
    with pytest.raises(UsageError, match="expected 6148"):
        load(dataclasses.replace(source, rows=(4, 3)), folder, verify=False)


def test_root_comes_from_the_argument_then_the_variable_then_the_cache(tmp_path, monkeypatch):
    for name in ("given", "variable", "cache"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("JDISTILL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("JDISTILL_DATA", str(tmp_path / "variable"))
    assert data_root(str(tmp_path / "given")) == tmp_path / "given"
    assert data_root(None) == tmp_path / "variable"
    monkeypatch.delenv("JDISTILL_DATA")
    assert data_root(None) == tmp_path / "cache" / "data"
    monkeypatch.delenv("JDISTILL_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert data_root(None) == tmp_path / ".cache" / "jdistill" / "data"


def test_a_root_that_is_no_directory_is_refused(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for bad in (tmp_path / "none", tmp_path / "file"):
        with pytest.raises(UsageError, match=f"root '{bad}' is not a directory"):
            mnist(root=str(bad))
        monkeypatch.setenv("JDISTILL_DATA", str(bad))
        with pytest.raises(UsageError, match=f"JDISTILL_DATA={bad} is not a directory"):
            mnist()


@pytest.mark.parametrize("folder", ["mnist", "MNIST/raw"])
def test_both_usual_folders_are_found(tmp_path, folder):
    (tmp_path / folder).mkdir(parents=True)
    for name in MNIST.sha256:
        (tmp_path / folder / name).touch()
    assert locate(MNIST, tmp_path, allow_download=False) == tmp_path / folder


@pytest.mark.parametrize("source", [MNIST, CIFAR10], ids=["mnist", "cifar10"])
def test_missing_files_without_download_say_what_to_put_where(tmp_path, source):
    wanted = tmp_path / source.folders[0] / next(iter(source.sha256))
    with pytest.raises(UsageError) as error:
        locate(source, tmp_path, allow_download=False)
    message = str(error.value)
    assert f"{wanted} is missing" in message and source.addresses[0] in message and "\n" not in message
    assert (source.archive or wanted.name) in message and "JDISTILL_DATA" in message and "data.download=true" in message
    assert not list(tmp_path.iterdir())
