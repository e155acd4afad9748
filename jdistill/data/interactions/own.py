"""A user's own file of interactions: CSV, TSV or Parquet, read in pieces."""

import contextlib
import dataclasses
import gzip
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from jdistill.data.interactions.files import sha256
from jdistill.data.interactions.log import DUPLICATES, Interactions, implicit, without_duplicates
from jdistill.data.interactions.protocol import Loaded, interaction_data
from jdistill.errors import UsageError, did_you_mean
from jdistill.pytrees import require_one_of

SEPARATORS = (",", "\t", ";", "|", " ")
NO_VALUE = ("", "NA", "N/A", "NaN", "nan", "null", "NULL", "None")
_ROWS = 1 << 19
"""Rows held as text at a time."""
_FOLDED = 1 << 20
"""At least so many rows are added between two removals of duplicates."""


@interaction_data("interactions")
def interactions_file(
    path: str | None = None,
    user: str = "user",
    item: str = "item",
    value: str | None = None,
    time: str | None = None,
    separator: str = "auto",
    threshold: float | None = None,
    duplicates: str = "last",
    verify: bool = True,
) -> Loaded:
    """Interactions of your own: a CSV, TSV (also .gz) or Parquet file with a header and one row an interaction.

    Ids are compared as text, exactly as written: 7 and 07 are two users. Rows may be in any order; ties in time, and files
    without times, follow the order of the file. Errors, each one line that names the row (from 1, the header not counted):
    an id, value or time that is missing, a value that is no finite number or below 0, a time that is neither a number nor
    ISO 8601. Users of fewer than 3 interactions are trained on and not evaluated; one whose first interaction is held
    out (split=temporal) is evaluated with an empty history. Text is read in pieces, and repetitions are removed on the way:
    memory grows with the different pairs of user and item and with the different ids, not with the size of the file
    (duplicates=error removes nothing and holds every row until the end).

    Args:
      path: the file.
      user, item: names of the columns with the ids.
      value: name of the column with ratings or counts; None: 1 for each row.
      time: name of the column with times, all numbers or all ISO 8601 (2024-05-01T12:30:00Z; without a zone: UTC); None:
        none are known.
      separator: of the fields of a CSV file; auto: the one that its header has most of.
      threshold: keep users' items of at least this value, each with value 1 (implicit feedback); None: all.
      duplicates: of several rows of one user and item keep the last, add up the values (sum), or refuse them (error).
      verify: compute the file's SHA-256, for the record.
      {keys}
    Raises:
      UsageError: as above; a missing or empty file, a missing column, or no header.
    """
    require_one_of(DUPLICATES, duplicates=duplicates)
    if path is None:
        raise UsageError("path is not set; name your file, such as data.path=my.csv")
    file = Path(path).expanduser()
    if not file.is_file():
        raise UsageError(f"path '{path}' is {'a folder' if file.is_dir() else 'missing'}; name a CSV, TSV or Parquet file")
    columns = {"user": user, "item": item, "value": value, "time": time}
    reader = Reader(file, {kind: column for kind, column in columns.items() if column is not None}, duplicates)
    with contextlib.closing(pieces(file, list(reader.columns.values()), separator)) as parts:
        for piece in parts:
            reader.add(piece)
    log = reader.log()
    log = without_duplicates(log, duplicates) if duplicates == "error" else log
    log = log if threshold is None else implicit(log, threshold)
    if not len(log):
        raise UsageError(f"threshold {threshold} leaves none of the {reader.rows} rows of {file.name}; lower it")
    return Loaded(log, {file.name: sha256(file)} if verify else {})


class Reader:
    """Turns pieces of text into numbers, one after the other.

    Attributes:
      file: named in errors.
      columns: "user", "item", "value", "time" -> the name of the file's column, of those that there are.
      duplicates: as in `without_duplicates`: "last" and "sum" are applied on the way, whenever the rows have doubled; with
        "error" all rows are kept, as they came.
      rows: how many rows were added.
    """

    def __init__(self, file: Path, columns: dict[str, str], duplicates: str = "error") -> None:
        self.file, self.columns, self.duplicates, self.rows = file, columns, duplicates, 0
        self._numbers: dict[str, dict[str, int]] = {"user": {}, "item": {}}
        self._parts: dict[str, list[np.ndarray]] = {kind: [] for kind in {**columns, "value": ""}}
        self._kept = self._added = 0  # rows after the last removal of duplicates, and since
        self._numeric_time = True

    def add(self, piece: pd.DataFrame) -> None:
        """Adds the rows of a piece of text columns.

        Raises:
          UsageError: naming the first row that cannot be read.
        """
        for kind, column in self.columns.items():
            text = piece[column]
            self._refuse(text.isna().to_numpy(), text, kind, "is missing", "fill it in or remove the row")
            parse = {"user": self._ids, "item": self._ids, "value": self._values, "time": self._times}[kind]
            self._parts[kind].append(parse(kind, text))
        if "value" not in self.columns:
            self._parts["value"].append(np.ones(len(piece), np.float32))
        self.rows += len(piece)
        self._added += len(piece)
        if self.duplicates != "error" and self._added >= max(_FOLDED, self._kept):
            self._fold()

    def log(self) -> Interactions:
        """The log of all rows added, without duplicates unless they are an error.

        Raises:
          UsageError: no row was added.
        """
        if not self.rows:
            raise UsageError(f"{self.file} has a header and no rows; fill it or name another file")
        if self.duplicates != "error" and self._added:
            self._fold()
        log = self._joined()
        user_names, item_names = (np.array(list(self._numbers[kind]), dtype=object) for kind in ("user", "item"))
        value = log.value.astype(np.float32, copy=False)
        return dataclasses.replace(log, value=value, user_names=user_names, item_names=item_names)

    def _joined(self) -> Interactions:
        """The parts as one log, which leaves none; its ids have no names yet."""
        arrays: dict[str, np.ndarray] = {}
        for kind, parts in self._parts.items():
            arrays[kind] = np.concatenate(parts)
            parts.clear()  # now, not after the last: memory holds one column twice, not all
        unnamed = (np.broadcast_to("", len(self._numbers[kind])) for kind in ("user", "item"))
        return Interactions(arrays["user"], arrays["item"], arrays["value"], arrays.get("time"), *unnamed)

    def _fold(self) -> None:
        """Leaves one row for each user and item; sums are kept in float64, so that folding often does not round often."""
        log = self._joined()
        kept = without_duplicates(log, "last")
        if self.duplicates == "sum" and len(kept) < len(log):
            order = np.argsort(kept.pairs)
            place = order[np.searchsorted(kept.pairs, log.pairs, sorter=order)]
            kept = dataclasses.replace(kept, value=np.bincount(place, log.value, len(kept)))
        self._parts = {kind: [getattr(kept, kind)] for kind in self._parts}
        self._kept, self._added = len(kept), 0

    def _ids(self, kind: str, text: pd.Series) -> np.ndarray:
        codes, names = pd.factorize(text)
        numbers = self._numbers[kind]
        return np.array([numbers.setdefault(name, len(numbers)) for name in names], np.int32)[codes]

    def _values(self, kind: str, text: pd.Series) -> np.ndarray:
        numbers = pd.to_numeric(text, errors="coerce").to_numpy(np.float64)
        self._refuse(~np.isfinite(numbers), text, kind, "is no finite number", "correct it or remove the row")
        self._refuse(numbers < 0, text, kind, "is negative", "values are ratings or counts of at least 0")
        return numbers.astype(np.float32)

    def _times(self, kind: str, text: pd.Series) -> np.ndarray:
        if not self.rows and len(text):  # the first row decides for the file
            self._numeric_time = bool(pd.notna(pd.to_numeric(text.iloc[0], errors="coerce")))
        if self._numeric_time:
            seconds = pd.to_numeric(text, errors="coerce").to_numpy(np.float64)
            self._refuse(~np.isfinite(seconds), text, kind, "is no number", "write all times as numbers, or all as ISO 8601")
            return seconds
        moments = pd.to_datetime(text, format="ISO8601", utc=True, errors="coerce")
        advice = "write times as numbers or as 2024-05-01T12:30:00Z"
        self._refuse(moments.isna().to_numpy(), text, kind, "is no time in ISO 8601", advice)
        return ((moments - pd.Timestamp(0, tz="UTC")) / pd.Timedelta(seconds=1)).to_numpy(np.float64)

    def _refuse(self, wrong: np.ndarray, text: pd.Series, kind: str, problem: str, advice: str) -> None:
        if wrong.any():
            at = int(np.argmax(wrong))
            found = "" if pd.isna(text.iloc[at]) else f" '{text.iloc[at]}'"
            raise UsageError(
                f"{self.file} row {self.rows + at + 1}: {kind}{found} (column '{self.columns[kind]}') {problem}; {advice}"
            )


def pieces(file: Path, columns: list[str], separator: str) -> Generator[pd.DataFrame]:
    """The columns of a file as text, missing entries as NaN, in pieces of at most `_ROWS` rows.

    Raises:
      UsageError: the file is empty, has no header, lacks a column or cannot be read as its ending says.
    """
    return _parquet(file, columns) if file.suffix in (".parquet", ".pq") else _csv(file, columns, separator)


def _csv(file: Path, columns: list[str], separator: str) -> Generator[pd.DataFrame]:
    try:
        with (gzip.open if file.suffix == ".gz" else open)(file, "rt", encoding="utf-8-sig") as lines:
            first = lines.readline().rstrip("\r\n")
        if separator == "auto":
            separator = max(SEPARATORS, key=first.count)
        if not first:
            raise UsageError(f"{file} is empty, or its first line is; the first line must name the columns")
        options: dict[str, Any] = {"sep": separator, "encoding": "utf-8-sig", "skipinitialspace": True}
        _require_columns(file, list(pd.read_csv(file, nrows=0, **options).columns), columns, first)
        blank: dict[str, Any] = {"keep_default_na": False, "na_values": dict.fromkeys(columns, NO_VALUE)}
        # all columns: with `usecols` pandas lets rows pass that have more fields than the header
        with pd.read_csv(file, dtype=str, chunksize=_ROWS, **blank, **options) as reader:
            for piece in reader:
                if not isinstance(piece.index, pd.RangeIndex):
                    raise UsageError(f"{file}: rows have more fields than the header; quote fields that hold '{separator}'")
                yield piece[columns]
    except UsageError:
        raise
    except (ValueError, EOFError, OSError) as error:
        raise UsageError(f"{file} cannot be read as CSV: {str(error).strip().splitlines()[-1]}") from error


def _parquet(file: Path, columns: list[str]) -> Generator[pd.DataFrame]:
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise UsageError(f"{file} is Parquet, which needs pyarrow: pip install 'jdistill[parquet]'") from error
    try:
        with parquet.ParquetFile(file) as table:
            _require_columns(file, table.schema_arrow.names, columns, "")
            text = arrow.schema([(column, arrow.string()) for column in columns])
            for batch in table.iter_batches(batch_size=_ROWS, columns=columns):
                yield arrow.Table.from_batches([batch]).select(columns).cast(text).to_pandas()
    except arrow.ArrowException as error:
        raise UsageError(f"{file} cannot be read as Parquet: {str(error).strip().splitlines()[0]}") from error


def _require_columns(file: Path, found: list[str], columns: list[str], first: str) -> None:
    missing = [column for column in columns if column not in found]
    if not missing:
        return
    if any(_is_number(name) for name in found):
        raise UsageError(f"{file} has no header: its first line is '{first}'; write one, such as {','.join(columns)}")
    raise UsageError(
        f"{file} has no column '{missing[0]}'{did_you_mean(missing[0], found)} (columns: {', '.join(map(str, found))}); "
        "name the columns by user=, item=, value= and time="
    )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
