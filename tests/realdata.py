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
    source, root = PUBLISHED[name], os.environ.get("JDISTILL_DATA")
    if not root:
        pytest.skip(f"needs {name}, and JDISTILL_DATA is not set")
    folder = next((Path(root) / f for f in source.folders if (Path(root) / f).is_dir()), None)
    if folder is None:
        pytest.skip(f"needs {name}, and JDISTILL_DATA has no {source.folders[0]}")
    if missing := [f for f in source.sha256 if not (folder / f).is_file()]:
        pytest.skip(f"needs {name}, and JDISTILL_DATA lacks {folder.name}/{missing[0]}")
    return Path(root)
