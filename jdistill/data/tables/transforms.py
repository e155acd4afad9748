"""Transforms of a column, fitted on training rows only: `fit(train, ...)` gives a pure function of any rows.

Standardising is not here: a data set says its `mean` and `std` (`moments`), and the program applies them.
"""

import dataclasses
from typing import Any

import numpy as np
import pandas as pd

from jdistill.errors import UsageError


@dataclasses.dataclass(frozen=True)
class Clip:
    """Values beyond `low` and `high` become these; missing ones (NaN) stay missing."""

    low: float
    high: float

    @classmethod
    def fit(cls, train: np.ndarray, share: float) -> "Clip":
        """The quantiles `share` and 1 - `share` of the training values [N] that are there; share in [0, 0.5)."""
        low, high = np.nanquantile(np.asarray(train, np.float64), [share, 1 - share])
        return cls(float(low), float(high))

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        return np.clip(rows, self.low, self.high)


@dataclasses.dataclass(frozen=True)
class Fill:
    """Missing values (NaN) become `value`."""

    value: float

    @classmethod
    def fit(cls, train: np.ndarray, how: str) -> "Fill":
        """The `mean` or `median` of the training values [N] that are there."""
        known = np.asarray(train, np.float64)
        return cls(float(np.nanmean(known) if how == "mean" else np.nanmedian(known)))

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        return np.where(np.isnan(rows), np.float32(self.value), rows)


@dataclasses.dataclass(frozen=True)
class Bins:
    """Numbers to 1 .. `count` - 1, the bin between training quantiles; missing ones (NaN) to 0.

    Attributes:
      edges: increasing; a number equal to an edge falls above it.
    """

    edges: tuple[float, ...]

    @classmethod
    def fit(cls, train: np.ndarray, bins: int) -> "Bins":
        """Edges that cut the training values [N] into `bins` equally filled parts; equal edges count once."""
        inner = np.nanquantile(np.asarray(train, np.float64), np.linspace(0, 1, bins + 1)[1:-1])
        return cls(tuple(np.unique(inner).tolist()))

    @property
    def count(self) -> int:
        return len(self.edges) + 2

    def __call__(self, rows: Any) -> np.ndarray:
        numbers = np.asarray(rows, np.float64)
        return np.where(np.isnan(numbers), 0, np.searchsorted(self.edges, numbers, side="right") + 1).astype(np.int32)


@dataclasses.dataclass(frozen=True, eq=False)
class Categories:
    """Categories to 1 .. `count` - 1 in the order of `known`; missing ones and those no training row has to 0."""

    known: pd.Index

    @classmethod
    def fit(cls, train: pd.Series) -> "Categories":
        """The sorted categories of the training rows."""
        return cls(sorted_codes(train)[1])

    @property
    def count(self) -> int:
        return len(self.known) + 1

    def __call__(self, rows: pd.Series) -> np.ndarray:
        codes, found = pd.factorize(rows)
        found = pd.Index(np.asarray(found, object))
        places = np.append(self.known.get_indexer(found) + 1, 0)  # the last is read by code -1: missing
        return places[codes].astype(np.int32)


def sorted_codes(rows: pd.Series) -> tuple[np.ndarray, pd.Index]:
    """Codes [N] into the sorted different values, -1 where a value is missing, and these values."""
    codes, found = pd.factorize(rows)
    places, known = pd.factorize(np.asarray(found, object), sort=True)
    return np.append(places, -1)[codes], pd.Index(known)


def hashed(rows: pd.Series, buckets: int) -> pd.Series:
    """Categories [N] to buckets "1" .. str(`buckets`) by a hash of their text, the same in every process; missing stays so.

    Feature hashing (Weinberger et al. 2009) without signs: categories that share a bucket are one.
    """
    codes, found = pd.factorize(rows)
    values = pd.util.hash_array(np.array([str(value) for value in found], object), categorize=False)
    places = [*(values % np.uint64(buckets) + np.uint64(1)).astype(str).tolist(), None]  # the last: see `Categories`
    return pd.Series(np.array(places, object)[codes], index=rows.index)


def moments(train: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and (population) standard deviation of each column of the training rows [N, D], 1 where a column is constant."""
    mean, std = [], []
    for column in np.asarray(train).T:
        constant = column.min() == column.max()
        mean.append(float(column[0] if constant else column.mean(dtype=np.float64)))
        std.append(1.0 if constant else float(column.std(dtype=np.float64)))
    return tuple(mean), tuple(std)


def as_numbers(rows: pd.Series) -> pd.Series:
    """A column as float32, NaN where a value is missing; true and false are 1 and 0.

    Raises:
      UsageError: naming column and row, for a word, or a number that is infinite or too large for float32.
    """
    if rows.dtype == np.float32:
        numbers = rows
    else:
        parsed = pd.to_numeric(rows, errors="coerce")
        if (words := (parsed.isna() & rows.notna()).to_numpy()).any():
            refuse(rows, words, "a number (categories and kind=classes take words)")
        with np.errstate(over="ignore"):
            numbers = pd.Series(parsed.to_numpy(np.float32, na_value=np.nan), rows.index, name=rows.name)
    if (infinite := np.isinf(numbers.to_numpy())).any():
        refuse(rows, infinite, "a finite float32", "; leave the row or the value out")
    return numbers


def refuse(rows: pd.Series, wrong: np.ndarray, expected: str, advice: str = "") -> None:
    """Raises the `UsageError` for the first row where `wrong` [N] bool; rows are counted from 1, without the header."""
    first = int(np.argmax(wrong))
    raise UsageError(
        f"column '{rows.name}' has {str(rows.iloc[first])!r} in row {int(rows.index[first]) + 1}, expected {expected}{advice}"
    )
