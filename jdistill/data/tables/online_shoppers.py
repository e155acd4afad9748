"""Conversion: which sessions of a web shop end in a purchase."""

import io

import pandas as pd

from jdistill.data.base import Dataset
from jdistill.data.source import Source, fetch
from jdistill.data.tables.build import Splitting, build_table
from jdistill.data.tables.columns import Features
from jdistill.registry import register

FILE = "online_shoppers_intention.csv"
ONLINE_SHOPPERS = Source(
    name="online_shoppers",
    folders=("online-shoppers",),
    addresses=("https://archive.ics.uci.edu/ml/machine-learning-databases/00468",),
    sha256={FILE: "44b29f6ac84d6491bcf8d78e3cd544c10df910fe518293454174876f25956c4f"},
)
NUMBERS = (
    "Administrative", "Administrative_Duration", "Informational", "Informational_Duration", "ProductRelated",
    "ProductRelated_Duration", "BounceRates", "ExitRates", "PageValues", "SpecialDay",
)  # fmt: skip
CATEGORIES = ("Month", "OperatingSystems", "Browser", "Region", "TrafficType", "VisitorType", "Weekend")


@register("data", "online_shoppers")
def online_shoppers(
    root: str | None = None,
    privileged: tuple[str, ...] = (),
    encoding: str = "one_hot",
    log1p: tuple[str, ...] = (),
    clip: float = 0.0,
    validation: float = 0.1,
    split_seed: int = 0,
    folds: int = 5,
    fold: int = 0,
    limit: int | None = None,
    download: bool = True,
    verify: bool = True,
) -> Dataset:
    """12,330 sessions of a web shop, 1,908 of which end in a purchase (Revenue, class 1); 10 numbers, 7 categories.

    Source: Online Shoppers Purchasing Intention (Sakar et al. 2018, UCI 468). PageValues, BounceRates and ExitRates are
    known only after the fact: features a teacher may have and a student not. The test split is a stratified 20 %.

    Args:
      root: the folder that holds online-shoppers; None: $JDISTILL_DATA, else the cache folder.
      privileged: columns that only a teacher may read, such as PageValues,BounceRates,ExitRates.
      encoding: of categories: one_hot, or index (one column of 0 .. n - 1, for networks with embeddings).
      log1p: numbers taken log(1 + x) of, such as the durations and PageValues, which are skewed.
      clip: share of the training values of a number clipped at each end, in [0, 0.5).
      validation: fraction of the rows outside the test split that becomes the validation split, stratified.
      split_seed: seed of that draw and of `limit`.
      folds: the test rows are one of so many parts.
      fold: which part, from 0.
      limit: train on at most so many sessions, stratified.
      download: fetch the file from UCI where it is missing.
      verify: compare its SHA-256 with the publisher's.

    Returns:
      A `Dataset` of float32 [N, D], binary labels.

    Raises:
      UsageError: a wrong value, or a file that is missing, truncated or altered.
    """
    features = Features(
        numbers=NUMBERS, categories=CATEGORIES, privileged=privileged, encoding=encoding, log1p=log1p, clip=clip
    )  # fmt: skip
    splitting = Splitting(validation=validation, split_seed=split_seed, limit=limit, folds=folds, fold=fold)
    files, checksums = fetch(ONLINE_SHOPPERS, root, download=download, verify=verify)
    frame = pd.read_csv(io.BytesIO(files[FILE].data))
    return build_table("online_shoppers", frame, features, splitting, label="Revenue", kind="binary", checksums=checksums)
