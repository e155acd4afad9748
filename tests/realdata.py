"""Whether the publishers' files are at hand; a test on them is skipped, with the reason, where one is missing."""

import os
from pathlib import Path

import pytest

from jdistill.data.published import CIFAR10, CIFAR100, FASHION_MNIST, MNIST
from jdistill.data.search.icecat import ICECAT
from jdistill.data.search.lambdarank import LAMBDARANK

PUBLISHED = {
    "mnist": MNIST, "fashion_mnist": FASHION_MNIST, "cifar10": CIFAR10, "cifar100": CIFAR100,
    "icecat": ICECAT, "lambdarank": LAMBDARANK,
}  # fmt: skip


def require(name: str) -> Path:
    """$JDISTILL_DATA, if it holds every file of data set `name`; skips the test otherwise."""
    source, root = PUBLISHED[name], Path(os.environ.get("JDISTILL_DATA") or "none")
    folder = next((f for f in source.folders if (root / f).is_dir()), source.folders[0])
    return require_files(*(f"{folder}/{file}" for file in source.sha256))


def require_files(*names: str) -> Path:
    """$JDISTILL_DATA, if it holds these files; skips the test otherwise."""
    root = os.environ.get("JDISTILL_DATA")
    if not root:
        pytest.skip(f"needs {names[0]}, and JDISTILL_DATA is not set")
    if missing := [name for name in names if not (Path(root) / name).is_file()]:
        pytest.skip(f"needs {missing[0]}, which JDISTILL_DATA lacks")
    return Path(root)
