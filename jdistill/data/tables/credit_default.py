"""Risk: which card holders do not pay next month."""

import io

import pandas as pd

from jdistill.data.base import Dataset
from jdistill.data.interactions.files import fetch_local
from jdistill.data.source import Source
from jdistill.data.tables.build import Splitting, build_table
from jdistill.data.tables.columns import Features
from jdistill.registry import register

FILE = "default_of_credit_card_clients.csv"
CREDIT_DEFAULT = Source(
    name="credit_default",
    folders=("credit-default",),
    addresses=("https://archive.ics.uci.edu/dataset/350",),
    sha256={FILE: "92dd2c335488bb00dae20e9e3b53fca41a36c7d51829c028753459df33c03316"},
)
NUMBERS = (
    "LIMIT_BAL", "AGE", *(f"PAY_{i}" for i in range(1, 7)), *(f"BILL_AMT{i}" for i in range(1, 7)),
    *(f"PAY_AMT{i}" for i in range(1, 7)),
)  # fmt: skip
CATEGORIES = ("SEX", "EDUCATION", "MARRIAGE")


@register("data", "credit_default")
def credit_default(
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
    verify: bool = True,
) -> Dataset:
    """30,000 card holders, 6,636 of whom do not pay next month (dpnm, class 1); 20 numbers, 3 categories.

    Source: Default of Credit Card Clients (Yeh and Lien 2009, UCI 350), as a CSV file with the names LIMIT_BAL, SEX, ...,
    PAY_1 to PAY_6, ..., dpnm; the account number ID is left out. The test split is a stratified 20 %.

    Args:
      root: the folder that holds credit-default; None: $JDISTILL_DATA, else the cache folder.
      privileged: columns that only a teacher may read.
      encoding: of SEX, EDUCATION and MARRIAGE: one_hot, or index (one column of 0 .. n - 1, for embeddings).
      log1p: numbers taken log(1 + x) of, such as LIMIT_BAL and PAY_AMT1 to PAY_AMT6.
      clip: share of the training values of a number clipped at each end, in [0, 0.5).
      validation: fraction of the rows outside the test split that becomes the validation split, stratified.
      split_seed: seed of that draw and of `limit`.
      folds: the test rows are one of so many parts.
      fold: which part, from 0.
      limit: train on at most so many card holders, stratified.
      verify: compare its SHA-256.

    Returns:
      A `Dataset` of float32 [N, D], binary labels.

    Raises:
      UsageError: a wrong value, or a file that is missing, truncated or altered.
    """
    features = Features(
        numbers=NUMBERS, categories=CATEGORIES, privileged=privileged, encoding=encoding, log1p=log1p, clip=clip
    )  # fmt: skip
    splitting = Splitting(validation=validation, split_seed=split_seed, limit=limit, folds=folds, fold=fold)
    advice = f"{CREDIT_DEFAULT.addresses[0]} has the table as .xls, which exported under these names is that file"
    files, checksums = fetch_local(CREDIT_DEFAULT, root, verify=verify, advice=advice)
    frame = pd.read_csv(io.BytesIO(files[FILE].data))
    return build_table("credit_default", frame, features, splitting, label="dpnm", kind="binary", checksums=checksums)
