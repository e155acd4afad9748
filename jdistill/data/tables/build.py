"""From a table of named columns to a `Dataset`: labels, splits, columns fitted on training rows."""

import dataclasses
import sys

import numpy as np
import pandas as pd

from jdistill.data.base import Dataset, Schema, Split
from jdistill.data.splits import TEST_FRACTION, TEST_SEED, stratified_order
from jdistill.data.tables.columns import Encoder, Features, fit_columns, require_columns
from jdistill.data.tables.transforms import as_numbers, moments, refuse, sorted_codes
from jdistill.errors import UsageError
from jdistill.pytrees import require_fraction, require_nonnegative, require_one_of, require_positive

KINDS = ("binary", "classes", "regression", "count")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Splitting:
    """Which rows train, validate and test.

    Attributes:
      validation: fraction of the rows outside the test split that becomes the validation split, in [0, 1).
      split_seed: of the draw of the validation rows and of `limit`.
      limit: at most so many training rows, stratified.
      split: `random`, stratified by class; `time`, the last 20 % are the test split, the last of those before them the
        validation split (rows of equal time stay in file order).
      folds, fold: of the random split, the test rows are part `fold` of `folds`. The parts do not depend on
        `split_seed`; part 0 of 5 is the test split of every data set that is published as one.
    """

    validation: float = 0.1
    split_seed: int = 0
    limit: int | None = None
    split: str = "random"
    folds: int = 5
    fold: int = 0

    def __post_init__(self) -> None:
        require_fraction(validation=self.validation)
        require_nonnegative(split_seed=self.split_seed)
        require_positive(limit=self.limit)
        require_one_of(("random", "time"), split=self.split)
        if self.folds < 2:
            raise UsageError(f"folds must be at least 2, got {self.folds}")
        if not 0 <= self.fold < self.folds:
            raise UsageError(f"fold must be at least 0 and below folds ({self.folds}), got {self.fold}")
        if self.split == "time" and (self.folds, self.fold) != (5, 0):
            raise UsageError("split=time takes no folds: it tests on the last 20 %; leave folds and fold out")

    def __call__(self, strata: np.ndarray, times: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows of the training, validation and test split.

        Args:
          strata: [N] int, at least 0: the classes kept in proportion; zeros for numbers.
          times: [N] float64, for `split=time`.

        Returns:
          Three arrays of int, sorted.

        Raises:
          UsageError: no row is left to train or to test on.
        """
        rest, test = self._by_time(times) if times is not None else self._by_fold(strata)
        cut = round(self.validation * len(rest))
        if not len(test) or cut >= len(rest):
            raise UsageError(
                f"validation {self.validation} of {len(strata)} rows leaves {len(rest) - cut} to train and {len(test)} to test "
                "on, expected at least one each"
            )
        if times is not None:
            train, validation = rest[: -cut or None], rest[len(rest) - cut :]
            train = train[stratified_order(strata[train], self.split_seed)]
        else:
            order = np.sort(rest)[stratified_order(strata[np.sort(rest)], self.split_seed)]
            train, validation = order[cut:], order[:cut]
        return np.sort(train[: self.limit]), np.sort(validation), np.sort(test)

    def _by_time(self, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        order, cut = np.argsort(times, kind="stable"), round(TEST_FRACTION * len(times))
        return order[: len(order) - cut], order[len(order) - cut :]

    def _by_fold(self, strata: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        order = stratified_order(strata, TEST_SEED)
        start, end = (round(i * len(order) / self.folds) for i in (self.fold, self.fold + 1))
        return np.concatenate([order[:start], order[end:]]), order[start:end]


def build_table(
    name: str,
    frame: pd.DataFrame,
    features: Features,
    splitting: Splitting,
    *,
    label: str,
    kind: str,
    checksums: dict[str, str],
    group: str | None = None,
    time: str | None = None,
    duplicates: bool = True,
) -> Dataset:
    """A table with one row per example as a `Dataset`.

    Rows without a label are left out, and counted on stderr. Everything fitted (`transforms`) sees training rows only.

    Args:
      name: of the data set.
      frame: the table; its rows are numbered in the order they have, which `index` keeps.
      features: which columns are read, and how.
      splitting: which rows are for what.
      label: the column to be predicted.
      kind: `binary`, labels 0 and 1 (or true and false); `classes`, any values, which become 0, 1, ... in their order;
        `regression`, numbers; `count`, numbers of at least 0.
      checksums: of the files read.
      group: a column whose values group the examples, for metrics per group; a missing value is a value of its own.
      time: the column that `split=time` sorts by: numbers, or dates.
      duplicates: false: of rows equal in all columns only the first stays.

    Returns:
      `inputs` [N, D] float32; `label` [N] int32 of classes, or float32 of numbers (then `classes` is 1); `index` [N]
      int32; and where there is a group `group` [N] int32, 0 .. groups - 1.

    Raises:
      UsageError: a column that is not there, a value that cannot be (by column and row), training rows of one class.
    """
    require_one_of(KINDS, kind=kind)
    used = {"label": (label,), "group": (group,) if group else (), "time": (time,) if time else ()}
    require_columns(frame.columns, name, **used, numbers=features.numbers, categories=features.categories)
    if label in features.names:
        raise UsageError(f"label '{label}' is also named in numbers or categories; leave it out there")
    if splitting.split == "time" and time is None:
        raise UsageError("time must name the column that split=time sorts by")
    frame = _clean(name, frame.set_axis(pd.RangeIndex(len(frame)), axis=0), label, duplicates)
    answers, classes = labels(frame[label], kind)
    columns = {column: _checked(frame[column], column in features.log1p) for column in features.numbers}
    columns |= {column: frame[column] for column in features.categories}
    extra = {"label": answers, "index": frame.index.to_numpy(np.int32)}
    if group is not None:
        extra["group"] = pd.factorize(frame[group], use_na_sentinel=False)[0].astype(np.int32)
    strata = answers if classes > 1 else np.zeros(len(answers), np.int32)
    parts = splitting(strata, as_times(frame[time]) if splitting.split == "time" and time else None)
    if classes > 1 and len(found := np.unique(answers[parts[0]])) < 2:
        raise UsageError(f"label '{label}' is class {found[0]} in all {len(parts[0])} training rows, expected two or more")
    fitted = fit_columns(lambda column: columns[column].iloc[parts[0]], features)
    train, validation, test = (_split(fitted, columns, extra, rows) for rows in parts)
    return _dataset(name, (train, validation, test), classes, fitted, features.privileged, checksums)


def _dataset(
    name: str, splits: tuple[Split, Split, Split], classes: int, fitted: dict[str, Encoder], privileged: tuple[str, ...],
    checksums: dict[str, str],
) -> Dataset:  # fmt: skip
    """The data set of encoded splits; mean and std are those of the training rows, 0 and 1 of what is not scaled."""
    scaled = np.array([s for encoder in fitted.values() for s in encoder.scaled])
    owner = [column for column, encoder in fitted.items() for _ in encoder.fields]
    means, stds = np.zeros(len(scaled)), np.ones(len(scaled))
    for column in np.flatnonzero(scaled):
        (means[column],), (stds[column],) = moments(splits[0]["inputs"][:, column : column + 1])
    return Dataset(
        name, *splits, classes, tuple(means.tolist()), tuple(stds.tolist()), 1.0, None, checksums,
        schema=Schema(fields=tuple(n for encoder in fitted.values() for n in encoder.fields)),
        privileged=tuple(i for i, column in enumerate(owner) if column in privileged),
    )  # fmt: skip


def _split(fitted: dict[str, Encoder], columns: dict[str, pd.Series], extra: Split, rows: np.ndarray) -> Split:
    """One split; column after column, so that nothing wide is held twice."""
    inputs = np.empty((len(rows), sum(len(encoder.fields) for encoder in fitted.values())), np.float32)
    place = 0
    for column, encoder in fitted.items():
        width = len(encoder.fields)
        inputs[:, place : place + width] = encoder(columns[column].iloc[rows])
        place += width
    return {"inputs": inputs, **{key: array[rows] for key, array in extra.items()}}


def _clean(name: str, frame: pd.DataFrame, label: str, duplicates: bool) -> pd.DataFrame:
    """Without rows that have no label and, on request, without repeated rows."""
    if frame.empty:
        raise UsageError(f"{name} has no rows")
    if missing := int(frame[label].isna().sum()):
        print(f"jdistill: data={name}: {missing} of {len(frame)} rows have no {label} and are left out", file=sys.stderr)
        frame = frame[frame[label].notna()]
    if frame.empty:
        raise UsageError(f"label '{label}' is empty in every row")
    return frame if duplicates else frame.drop_duplicates()


def _checked(rows: pd.Series, log: bool) -> pd.Series:
    numbers = as_numbers(rows)
    if log and (negative := (numbers < 0).to_numpy()).any():
        refuse(rows, negative, "at least 0", " for log1p; leave the column out of log1p")
    return numbers


def labels(rows: pd.Series, kind: str) -> tuple[np.ndarray, int]:
    """Labels [N] without missing ones, and the number of classes (1 of numbers): see `build_table`.

    Raises:
      UsageError: naming column and row, for a value that `kind` does not allow; or values all of one class.
    """
    if kind == "classes":
        codes, names = sorted_codes(rows)
        known = names.to_numpy()
        numbers = pd.to_numeric(names.to_series(), errors="coerce")
        if numbers.notna().all():  # "10" comes after "2"
            known, places = np.unique(numbers.to_numpy(), return_inverse=True)
            codes = places[codes]
        if len(known) < 2:
            raise UsageError(f"label '{rows.name}' is {known[0]} in all {len(rows)} rows, expected two or more classes")
        return codes.astype(np.int32), len(known)
    if kind == "binary":
        codes, found = sorted_codes(rows)
        words = pd.Series([str(value).lower() for value in found]).replace({"true": "1", "false": "0"})
        values = pd.to_numeric(words, errors="coerce")
        if (wrong := ~values.isin([0, 1]).to_numpy()).any():
            refuse(rows, wrong[codes], "0 or 1", "; set kind=classes or kind=regression for other labels")
        if values.nunique() < 2:
            raise UsageError(f"label '{rows.name}' is {int(values[0])} in all {len(rows)} rows, expected both 0 and 1")
        return values.to_numpy(np.int32)[codes], 2
    values = as_numbers(rows)
    if kind == "count" and (negative := (values < 0).to_numpy()).any():
        refuse(rows, negative, "a count of at least 0", "; set kind=regression for numbers below 0")
    return values.to_numpy(), 1


def as_times(rows: pd.Series) -> np.ndarray:
    """Times [N] float64: numbers as they are, dates as seconds since 1970.

    Raises:
      UsageError: naming column and row, for a time that is missing or cannot be read.
    """
    numbers = pd.to_numeric(rows, errors="coerce")
    if numbers.notna().equals(rows.notna()):
        times = numbers.to_numpy(np.float64, na_value=np.nan)
    else:
        dates = pd.to_datetime(rows, errors="coerce", utc=True, format="ISO8601")
        times = ((dates - pd.Timestamp(0, tz="UTC")) / pd.Timedelta(seconds=1)).to_numpy(np.float64)
    if (wrong := ~np.isfinite(times)).any():
        refuse(rows, wrong, "a number or a date such as 2024-05-31 12:00")
    return times
