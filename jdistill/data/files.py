"""Data root, checksums, and readers of the idx and CIFAR binary layouts that never give a silently wrong array."""

import gzip
import hashlib
import os
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jdistill.errors import UsageError
from jdistill.paths import cache_folder

DATA_VARIABLE = "JDISTILL_DATA"
AGAIN = "delete it to have it downloaded again"


class File(NamedTuple):
    """A file read: where it lies and its bytes."""

    path: Path
    data: bytes


def check_root(root: str | None) -> None:
    """Raises `UsageError` where a data root is given that is not a directory."""
    if root is not None and not Path(root).expanduser().is_dir():
        raise UsageError(f"root '{root}' is not a directory; create it, correct it or leave it out")


def data_root(root: str | None) -> Path:
    """The folder that holds the data sets: `root`, else $JDISTILL_DATA, else `data` in the cache folder.

    The cache folder need not exist.

    Raises:
      UsageError: `root` or $JDISTILL_DATA is not a directory.
    """
    check_root(root)
    if root is not None:
        return Path(root).expanduser()
    if given := os.environ.get(DATA_VARIABLE):
        if not Path(given).expanduser().is_dir():
            raise UsageError(f"{DATA_VARIABLE}={given} is not a directory; create it, correct it or unset it")
        return Path(given).expanduser()
    return cache_folder() / "data"


def read(path: Path, sha256: str | None) -> tuple[File, str]:
    """The bytes of a file and their SHA-256.

    Raises:
      UsageError: the file cannot be read, or its SHA-256 is not `sha256` (None: any).
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    found = hashlib.sha256(data).hexdigest()
    if sha256 is not None and found != sha256:
        raise UsageError(
            f"{path} is truncated or altered ({len(data)} bytes, SHA-256 {found[:12]}..., the publisher's file has "
            f"{sha256[:12]}...); {AGAIN}, or set data.verify=false"
        )
    return File(path, data), found


def read_idx(files: list[File], rows: int, classes: int, shape: tuple[int, ...] = (28, 28)) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of a pair of gzipped idx files (the MNIST layout).

    Args:
      files: images, labels.
      rows: the number of examples there must be.
      classes: labels must be below.
      shape: of one image.

    Returns:
      uint8 [rows, *shape, 1] and uint8 [rows].

    Raises:
      UsageError: naming the file, for a broken gzip stream, another magic number, shape or length, or a
        label out of range.
    """
    images, labels = (_idx(file, expected) for file, expected in zip(files, ((rows, *shape), (rows,)), strict=True))
    _check_labels(files[1].path, labels, classes)
    return images[..., None], labels


def _idx(file: File, shape: tuple[int, ...]) -> np.ndarray:
    try:
        data = gzip.decompress(file.data)
    except (OSError, EOFError, zlib.error) as error:
        raise UsageError(f"{file.path} is not a whole gzip file ({error}); {AGAIN}") from error
    magic, header = 0x0800 + len(shape), 4 * (1 + len(shape))  # 0x08: unsigned bytes
    if len(data) < header or int.from_bytes(data[:4], "big") != magic:
        raise UsageError(f"{file.path} has idx magic 0x{data[:4].hex()}, expected 0x{magic:08x}; {AGAIN}")
    found = tuple(int(n) for n in np.frombuffer(data, ">u4", len(shape), offset=4))
    if found != shape or len(data) != header + int(np.prod(shape)):
        raise UsageError(
            f"{file.path} announces shape {list(found)} and holds {len(data) - header} values, expected shape "
            f"{list(shape)}; {AGAIN}"
        )
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)


def read_cifar(files: list[File], rows: int, limits: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of files in the CIFAR binary layout: label bytes, then 3 x 32 x 32 pixels, row after row.

    Args:
      files: batches in order, of equal length.
      rows: the number of examples there must be in all.
      limits: for each label byte of a row the number of its classes; the last is the label given back.

    Returns:
      uint8 [rows, 32, 32, 3] and uint8 [rows].

    Raises:
      UsageError: naming the file, for a wrong length or a label out of range.
    """
    width, each = len(limits) + 3 * 32 * 32, rows // len(files)
    images, labels = np.empty((rows, 32, 32, 3), np.uint8), np.empty(rows, np.uint8)
    for i, file in enumerate(files):
        if len(file.data) != each * width:
            raise UsageError(
                f"{file.path} has {len(file.data)} bytes, expected {each * width} ({each} rows of {width}); {AGAIN}"
            )
        table = np.frombuffer(file.data, np.uint8).reshape(each, width)
        for column, classes in enumerate(limits):
            _check_labels(file.path, table[:, column], classes)
        part = slice(i * each, (i + 1) * each)
        images[part] = table[:, len(limits) :].reshape(each, 3, 32, 32).transpose(0, 2, 3, 1)
        labels[part] = table[:, len(limits) - 1]
    return images, labels


def _check_labels(path: Path, labels: np.ndarray, classes: int) -> None:
    if labels.max() >= classes:
        row = int(np.argmax(labels >= classes))
        raise UsageError(f"{path} has label {labels[row]} in row {row}, expected 0 to {classes - 1}; {AGAIN}")
