"""The columns of a table: what they are, how they are prepared, and what networks read of them."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import pandas as pd

from jdistill.data.tables.transforms import Bins, Categories, Clip, Fill
from jdistill.errors import UsageError, did_you_mean
from jdistill.pytrees import require_one_of

EXACT = 2**24
"""Numbers up to here are exact in float32, in which codes of categories are stored."""
WIDEST = 10_000
"""More columns than these `one_hot` does not make."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Features:
    """Which columns are read, and how they are prepared. What is fitted is fitted on training rows.

    Numbers are clipped, then taken the logarithm of, then filled; the program standardises them by `Dataset.mean` and
    `Dataset.std`. Categories become 1, 2, ...; 0 is a category that is missing or that no training row has.

    Attributes:
      numbers, categories: names of columns, in the order of the inputs (numbers first).
      privileged: those of them that only a teacher may read.
      encoding: `index`, a category is one column of 0 .. n - 1 (for networks with embeddings); `one_hot`, it is one
        column of 0 and 1 for each value, all 0 for the unknown one (for every network).
      fill: what a missing number becomes, the `mean` or `median` of training.
      indicators: a number that some training rows miss is followed by a column that is 1 where it was missing.
      clip: share of the training values at each end that are clipped to the quantile, in [0, 0.5).
      log1p: numbers replaced by log(1 + x); they must be at least 0.
      binned: numbers made categories by training quantiles, `bins` of them.
    """

    numbers: tuple[str, ...]
    categories: tuple[str, ...] = ()
    privileged: tuple[str, ...] = ()
    encoding: str = "one_hot"
    fill: str = "mean"
    indicators: bool = False
    clip: float = 0.0
    log1p: tuple[str, ...] = ()
    binned: tuple[str, ...] = ()
    bins: int = 10

    def __post_init__(self) -> None:
        require_one_of(("index", "one_hot"), encoding=self.encoding)
        require_one_of(("mean", "median"), fill=self.fill)
        if not 0 <= self.clip < 0.5:
            raise UsageError(f"clip must be at least 0 and below 0.5, got {self.clip!r}")
        if self.bins < 2:
            raise UsageError(f"bins must be at least 2, got {self.bins}")
        if not self.names:
            raise UsageError("numbers and categories are both empty; name at least one column")
        if twice := {name for name in self.names if self.names.count(name) > 1}:
            raise UsageError(f"column '{min(twice)}' is named twice in numbers and categories; leave one out")
        require_columns(self.names, "numbers or categories", privileged=self.privileged)
        require_columns(self.numbers, "numbers", log1p=self.log1p, binned=self.binned)

    @property
    def names(self) -> tuple[str, ...]:
        return self.numbers + self.categories


def require_columns(known: Iterable[str], where: str, **named: Sequence[str]) -> None:
    """Raises `UsageError` for the first name that is not `known`; `where` says what the known ones are columns of."""
    known = [str(name) for name in known]
    listed = ", ".join(known[:40]) + (", ..." if len(known) > 40 else "")
    for key, names in named.items():
        for name in names:
            if name not in known:
                raise UsageError(f"{key} has '{name}', no column of {where}{did_you_mean(name, known)} (known: {listed})")


@dataclasses.dataclass(frozen=True)
class Number:
    """A number as [N, 1] float32, or [N, 2] with its indicator."""

    clip: Clip | None
    log: bool
    fill: Fill
    indicator: bool

    @classmethod
    def fit(cls, train: np.ndarray, features: Features, log: bool) -> "Number":
        clip = Clip.fit(train, features.clip) if features.clip else None
        raw = cls(clip, log, Fill(0.0), features.indicators and bool(np.isnan(train).any()))
        return dataclasses.replace(raw, fill=Fill.fit(raw.prepared(train), features.fill))

    @property
    def fields(self) -> tuple[int, ...]:
        return (0,) * (1 + self.indicator)

    @property
    def scaled(self) -> tuple[bool, ...]:
        """Which of its columns are standardised."""
        return (True, False)[: 1 + self.indicator]

    def prepared(self, rows: np.ndarray) -> np.ndarray:
        """Clipped and taken the logarithm of; missing values stay missing."""
        rows = self.clip(rows) if self.clip else rows
        return np.log1p(rows) if self.log else rows

    def __call__(self, rows: pd.Series) -> np.ndarray:
        raw = rows.to_numpy()
        columns = (self.fill(self.prepared(raw)), np.isnan(raw)) if self.indicator else (self.fill(self.prepared(raw)),)
        return np.stack(columns, axis=1).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Category:
    """A category as [N, 1] float32 of 0 .. n - 1, or in one-hot form as [N, n - 1] of 0 and 1."""

    coder: Categories | Bins
    one_hot: bool

    @property
    def fields(self) -> tuple[int, ...]:
        return (0,) * (self.coder.count - 1) if self.one_hot else (self.coder.count,)

    @property
    def scaled(self) -> tuple[bool, ...]:
        return (False,) * len(self.fields)

    def __call__(self, rows: pd.Series) -> np.ndarray:
        codes = self.coder(rows)
        if not self.one_hot:
            return codes[:, None].astype(np.float32)
        return (codes[:, None] == np.arange(1, self.coder.count)).astype(np.float32)


Encoder = Number | Category


def fit_columns(train: Callable[[str], pd.Series], features: Features) -> dict[str, Encoder]:
    """What every column becomes, by name.

    Args:
      train: name -> the training rows of that column; float32 of a number.
      features: which columns, and how.

    Raises:
      UsageError: a column has no value in training, or too many values.
    """
    fitted: dict[str, Encoder] = {}
    one_hot, log = features.encoding == "one_hot", set(features.log1p)
    for name in features.names:
        rows = train(name)
        if rows.isna().all():
            raise UsageError(f"column '{name}' is empty in all {len(rows)} training rows; leave it out")
        if name in features.categories:
            fitted[name] = Category(Categories.fit(rows), one_hot)
        elif name in features.binned:
            fitted[name] = Category(Bins.fit(rows.to_numpy(), features.bins), one_hot)
        else:
            fitted[name] = Number.fit(rows.to_numpy(), features, name in log)
        if max(fitted[name].fields, default=0) > EXACT:
            count = fitted[name].fields[0]
            raise UsageError(f"column '{name}' has {count:,} categories, at most {EXACT:,} fit; name it in hashed")
    width = sum(len(encoder.fields) for encoder in fitted.values())
    if one_hot and width > WIDEST:
        raise UsageError(f"encoding one_hot makes {width:,} columns, at most {WIDEST:,} are allowed; set encoding=index")
    return fitted
