"""Data sets as options of the config group `data`, each a function that gives a `Dataset`."""

from jdistill.data.augment import Augment
from jdistill.data.base import Dataset, Preprocess, Requests, Schema, Side, Split
from jdistill.data.embedded import breast_cancer, digits
from jdistill.data.interactions import amazon, citeulike, interactions_file, movielens, retailrocket
from jdistill.data.loading import load_dataset
from jdistill.data.published import cifar10, cifar100, fashion_mnist, mnist
from jdistill.data.search import icecat, icecat_price, lambdarank, ranking, wands
from jdistill.data.shop import synthetic_shop
from jdistill.data.synthetic import synthetic
from jdistill.data.tables import credit_default, ctr, movielens_ratings, online_shoppers, retailrocket_behaviour

__all__ = [
    "Augment",
    "Dataset",
    "Preprocess",
    "Requests",
    "Schema",
    "Side",
    "Split",
    "amazon",
    "breast_cancer",
    "cifar10",
    "cifar100",
    "citeulike",
    "credit_default",
    "ctr",
    "digits",
    "fashion_mnist",
    "icecat",
    "icecat_price",
    "interactions_file",
    "lambdarank",
    "load_dataset",
    "mnist",
    "movielens",
    "movielens_ratings",
    "online_shoppers",
    "ranking",
    "retailrocket",
    "retailrocket_behaviour",
    "synthetic",
    "synthetic_shop",
    "wands",
]
