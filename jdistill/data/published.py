"""MNIST, Fashion-MNIST, CIFAR-10 and CIFAR-100 from the publishers' binary files (never pickles)."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np

from jdistill.data.augment import Augment
from jdistill.data.base import Dataset
from jdistill.data.files import File, data_root, read, read_cifar, read_idx
from jdistill.data.source import Source, locate
from jdistill.data.splits import Selection, as_split
from jdistill.registry import register


@dataclasses.dataclass(frozen=True, kw_only=True)
class Published(Source):
    """What is known about a published set of images.

    Attributes:
      train, test: file names in order.
      rows: numbers of training and test examples.
      classes: the number of classes.
      reader: (files, rows) -> images uint8 [rows, H, W, C], labels [rows].
      mean, std: per channel, of pixels in [0, 1], over the training images.
    """

    train: tuple[str, ...]
    test: tuple[str, ...]
    rows: tuple[int, int]
    classes: int
    reader: Callable[[list[File], int], tuple[np.ndarray, np.ndarray]]
    mean: tuple[float, ...]
    std: tuple[float, ...]


def load(source: Published, folder: Path, *, verify: bool) -> tuple[list[tuple[np.ndarray, np.ndarray]], dict[str, str]]:
    """Training and test (images, labels), and the checksums, of the files in a folder that has them all.

    Raises:
      UsageError: a file differs from the publisher's (by SHA-256 where `verify`, else by layout, shape and labels).
    """
    checksums: dict[str, str] = {}
    parts = []
    for names, rows in zip((source.train, source.test), source.rows, strict=True):
        files = []
        for name in names:
            file, checksums[name] = read(folder / name, source.sha256[name] if verify else None)
            files.append(file)
        parts.append(source.reader(files, rows))
    return parts, checksums


def _loader(source: Published) -> Callable[..., Dataset]:
    """Registers `data=<name>`."""

    def dataset(
        root: str | None = None,
        validation: float = 0.1,
        split_seed: int = 0,
        augment: tuple[str, ...] = (),
        crop_padding: int = 4,
        cutout_size: int = 16,
        limit: int | None = None,
        classes_kept: tuple[int, ...] | None = None,
        download: bool = True,
        verify: bool = True,
    ) -> Dataset:
        selection = Selection(
            published=source.classes, validation=validation, split_seed=split_seed, limit=limit,
            classes_kept=classes_kept,
        )  # fmt: skip
        augmentation = image_augment(augment, crop_padding, cutout_size, source.mean, 255)
        folder = locate(source, data_root(root), allow_download=download)
        parts, checksums = load(source, folder, verify=verify)
        train, val, test = selection(*(as_split(*part) for part in parts))
        return Dataset(
            source.name, train, val, test, selection.classes, source.mean, source.std, 255.0, augmentation, checksums
        )

    height = 32 if source.archive else 28
    dataset.__name__ = dataset.__qualname__ = source.name
    dataset.__doc__ = f"""{source.rows[0]:,} training and {source.rows[1]:,} test images, {source.classes} classes.

    Args:
      root: the folder that holds {source.folders[0]}; None: $JDISTILL_DATA, else the cache folder.
      validation: fraction of the training images that becomes the validation split, stratified.
      split_seed: seed of that draw and of `limit`.
      augment: operations on training images, in order: crop, flip, cutout.
      crop_padding: pixels of zeros around an image before it is cropped.
      cutout_size: side of the square cut out.
      limit: train on at most so many images, stratified.
      classes_kept: keep these labels only, renamed 0, 1, ... in the order given.
      download: fetch missing files from {source.addresses[0]}.
      verify: compare every file's SHA-256 with the publisher's; false: layout, shapes and labels only.

    Returns:
      A `Dataset` of uint8 images [N, {height}, {height}, {len(source.mean)}].

    Raises:
      UsageError: a wrong value, or a file that is missing, truncated or altered.
    """
    return register("data", source.name)(dataset)


def image_augment(
    ops: tuple[str, ...], crop_padding: int, cutout_size: int, mean: tuple[float, ...], scale: float
) -> Augment | None:
    """The `Augment` of a loader's keys (cutout writes the mean pixel), or None without operations."""
    augment = Augment(ops, crop_padding, cutout_size, tuple(value * scale for value in mean))
    return augment if augment.ops else None


_IDX_TRAIN = ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz")
_IDX_TEST = ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz")

MNIST = Published(
    name="mnist",
    folders=("mnist", "MNIST/raw"),
    addresses=("https://yann.lecun.com/exdb/mnist", "https://ossci-datasets.s3.amazonaws.com/mnist"),
    sha256={
        "train-images-idx3-ubyte.gz": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
        "train-labels-idx1-ubyte.gz": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
        "t10k-images-idx3-ubyte.gz": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
        "t10k-labels-idx1-ubyte.gz": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
    },
    train=_IDX_TRAIN,
    test=_IDX_TEST,
    rows=(60000, 10000),
    classes=10,
    reader=functools.partial(read_idx, classes=10),
    mean=(0.1307,),
    std=(0.3081,),
)

FASHION_MNIST = Published(
    name="fashion_mnist",
    folders=("fashion-mnist", "FashionMNIST/raw"),
    addresses=(
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",
        "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion",
    ),
    sha256={
        "train-images-idx3-ubyte.gz": "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
        "train-labels-idx1-ubyte.gz": "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
        "t10k-images-idx3-ubyte.gz": "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
        "t10k-labels-idx1-ubyte.gz": "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
    },
    train=_IDX_TRAIN,
    test=_IDX_TEST,
    rows=(60000, 10000),
    classes=10,
    reader=functools.partial(read_idx, classes=10),
    mean=(0.2860,),
    std=(0.3530,),
)

CIFAR10 = Published(
    name="cifar10",
    folders=("cifar-10-batches-bin",),
    addresses=("https://www.cs.toronto.edu/~kriz",),
    sha256={
        "data_batch_1.bin": "cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5",
        "data_batch_2.bin": "a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed",
        "data_batch_3.bin": "bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67",
        "data_batch_4.bin": "014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48",
        "data_batch_5.bin": "755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add",
        "test_batch.bin": "8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b",
    },
    train=tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
    test=("test_batch.bin",),
    rows=(50000, 10000),
    classes=10,
    reader=functools.partial(read_cifar, limits=(10,)),
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2470, 0.2435, 0.2616),
    archive="cifar-10-binary.tar.gz",
    archive_md5="c32a1d4ab5d03f1284b67883e8d87530",
)

CIFAR100 = Published(
    name="cifar100",
    folders=("cifar-100-binary",),
    addresses=("https://www.cs.toronto.edu/~kriz",),
    sha256={
        "train.bin": "f31298fc616915fa142368359df1c4ca2ae984d6915ca468b998a5ec6aeebf29",
        "test.bin": "d8b1e6b7b3bee4020055f0699b111f60b1af1e262aeb93a0b659061746f8224a",
    },
    train=("train.bin",),
    test=("test.bin",),
    rows=(50000, 10000),
    classes=100,
    reader=functools.partial(read_cifar, limits=(20, 100)),  # coarse label, fine label
    mean=(0.5071, 0.4867, 0.4408),  # as RepDistiller, so that published numbers compare
    std=(0.2675, 0.2565, 0.2761),
    archive="cifar-100-binary.tar.gz",
    archive_md5="03b5dce01913d631647c71ecec9e9cb8",
)

mnist = _loader(MNIST)
fashion_mnist = _loader(FASHION_MNIST)
cifar10 = _loader(CIFAR10)
cifar100 = _loader(CIFAR100)
