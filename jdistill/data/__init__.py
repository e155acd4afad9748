"""Data sets as options of the config group `data`, each a function that gives a `Dataset`."""

from jdistill.data.augment import Augment
from jdistill.data.base import Dataset, Preprocess, Split
from jdistill.data.embedded import breast_cancer, digits
from jdistill.data.published import cifar10, cifar100, fashion_mnist, mnist
from jdistill.data.synthetic import synthetic

__all__ = [
    "Augment",
    "Dataset",
    "Preprocess",
    "Split",
    "breast_cancer",
    "cifar10",
    "cifar100",
    "digits",
    "fashion_mnist",
    "mnist",
    "synthetic",
]
