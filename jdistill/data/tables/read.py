"""Tables of any size from CSV, TSV and Parquet files, read in pieces into typed columns."""

import contextlib
import hashlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from jdistill.data.tables.transforms import as_numbers, hashed
from jdistill.errors import UsageError, did_you_mean

CHUNK = 16_384
"""Rows read at a time: beside the columns asked for, only so many rows are in memory."""
SEPARATORS = {".csv": ",", ".tsv": "\t", ".tab": "\t", ".dat": "\t"}
PARQUET = (".parquet", ".pq")
UNNAMED = "Unnamed:"
"""How pandas begins the name of a column that has none."""
COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".zip")


class Table:
    """A file with one row per example and a name for every column.

    CSV and TSV files have a header line and are UTF-8; the ending says the separator (.csv a comma; .tsv, .tab, .dat a
    tab), unless `separator` does; a further .gz, .bz2, .xz, .zst or .zip is unpacked on the way. Missing values are
    empty cells, cells a row is too short for, and the words pandas takes for missing (NA, NaN, null, ...); a row with more
    cells than the header is an error.

    Attributes:
      path: of the file.
      names: of its columns.
      numeric: those of them that hold numbers in the first `CHUNK` rows.

    Raises:
      UsageError: the file is missing, empty, has no header line or a name twice, has an unknown ending, or is Parquet
        and pyarrow is not installed.
    """

    def __init__(self, path: str, separator: str | None = None) -> None:
        self.path = Path(path).expanduser()
        _check_file(self.path)
        suffixes = [s for s in self.path.suffixes if s not in COMPRESSED]
        self.parquet = bool(suffixes) and suffixes[-1] in PARQUET
        self.separator = separator or SEPARATORS.get(suffixes[-1] if suffixes else "")
        if not self.parquet and self.separator is None:
            raise UsageError(f"{self.path} is not .csv, .tsv or .parquet; set separator, or rename it")
        with _one_line(self.path):
            self.names = _parquet(self.path).schema_arrow.names if self.parquet else self._header()
            if twice := {name for name in self.names if self.names.count(name) > 1}:
                raise UsageError(f"{self.path} has two columns '{min(twice)}'; rename one")
            first = next(self.chunks(self.names, ()), None)
        if first is None or first.empty:
            raise UsageError(f"{self.path} has a header line but no rows")
        self.numeric = {name for name in self.names if pd.api.types.is_numeric_dtype(first[name])}

    def _header(self) -> list[str]:
        options: Any = {"header": None, "nrows": 1, "keep_default_na": False, "encoding": "utf-8-sig"}
        line = pd.read_csv(self.path, sep=self.separator, dtype="str", **options).iloc[0]
        return [str(cell) or f"{UNNAMED} {i}" for i, cell in enumerate(line)]

    @property
    def headless(self) -> bool:
        """Whether the first line looks like a row: it has a number in it."""
        return not self.parquet and bool(pd.to_numeric(pd.Series(self.names), errors="coerce").notna().any())

    def chunks(self, columns: list[str], words: tuple[str, ...]) -> Iterator[pd.DataFrame]:
        """The columns in pieces of at most `CHUNK` rows, numbered through; `words` are read as text."""
        if self.parquet:
            yield from _batches(self.path, columns, words)
            return
        kinds: Any = dict.fromkeys(words, "str")
        options: Any = {"index_col": False, "encoding": "utf-8-sig", "low_memory": False}  # usecols would hide rows too long
        with pd.read_csv(self.path, sep=self.separator, dtype=kinds, chunksize=CHUNK, **options) as reader:
            for chunk in reader:
                yield chunk[columns]

    def read(
        self, numbers: tuple[str, ...], words: tuple[str, ...], plain: tuple[str, ...], buckets: dict[str, int]
    ) -> pd.DataFrame:
        """Columns in memory: 4 bytes a value at most (8 of `plain`), and each different word once.

        Args:
          numbers: become float32.
          words: become categories of text.
          plain: keep the type they have in the file (text or numbers): dates.
          buckets: of words with very many values: name -> the number of buckets they are hashed into.

        Raises:
          UsageError: naming column and row of a value that cannot be; or the line, of a file that cannot be read.
        """
        text = {name: _Words() for name in words}
        rest: dict[str, list[pd.Series]] = {name: [] for name in (*numbers, *plain)}
        with _one_line(self.path):
            for chunk in self.chunks([*rest, *text], words):
                for name, vocabulary in text.items():
                    vocabulary.add(hashed(chunk[name], buckets[name]) if name in buckets else chunk[name])
                for name, parts in rest.items():
                    column = as_numbers(chunk[name]) if name in numbers else _uniform(chunk[name], parts)
                    parts.append(column.copy())  # a view would keep the whole piece
        columns = {name: pd.concat(rest.pop(name), ignore_index=True) for name in list(rest)}
        return pd.DataFrame({**columns, **{name: text.pop(name).column() for name in list(text)}}, copy=False)

    def checksums(self) -> dict[str, str]:
        """The name of the file and its SHA-256."""
        with _one_line(self.path), self.path.open("rb") as file:
            return {self.path.name: hashlib.file_digest(file, "sha256").hexdigest()}


class _Words:
    """A column of text as codes, and its vocabulary in the order of first sight."""

    def __init__(self) -> None:
        self.known: dict[str, int] = {}
        self.codes: list[np.ndarray] = []

    def add(self, rows: pd.Series) -> None:
        codes, found = pd.factorize(rows)
        places = [self.known.setdefault(str(word), len(self.known)) for word in found]
        self.codes.append(np.array([*places, -1], np.int32)[codes])  # the last is read by code -1: missing

    def column(self) -> pd.Series:
        codes = np.concatenate(self.codes)
        self.codes.clear()
        return pd.Series(pd.Categorical.from_codes(codes, pd.Index(list(self.known), dtype="str")))


def _uniform(rows: pd.Series, before: list[pd.Series]) -> pd.Series:
    """The rows as they are; raises where they are numbers and the rows before were text, or the other way round."""
    kinds = [pd.api.types.is_numeric_dtype(part) for part in (*before[:1], rows)]
    if kinds[0] != kinds[-1]:
        raise UsageError(f"column '{rows.name}' mixes numbers and text from row {int(rows.index[0]) + 1} on; write all one way")
    return rows


def _check_file(path: Path) -> None:
    try:
        if path.is_dir():
            raise UsageError(f"path '{path}' is a folder; name one file")
        if path.stat().st_size == 0:
            raise UsageError(f"{path} is empty")
    except FileNotFoundError as error:
        beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UsageError(f"path '{path}' does not exist{did_you_mean(path.name, beside)}") from error
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error


@contextlib.contextmanager
def _one_line(path: Path) -> Iterator[None]:
    """What pandas, pyarrow and the system say of a file they cannot read, in one line."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)
            yield
    except UsageError:
        raise
    except (OSError, ValueError, EOFError, NotImplementedError, pd.errors.ParserWarning) as error:
        raise UsageError(f"{path} cannot be read as a table: {' '.join(str(error).split())}") from error


def _parquet(path: Path) -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise UsageError(f"{path} needs pyarrow; run pip install 'jdistill[parquet]'") from error
    return pyarrow.parquet.ParquetFile(path)


def _batches(path: Path, columns: list[str], words: tuple[str, ...]) -> Iterator[pd.DataFrame]:
    """The pieces of a Parquet file; `words` are turned into text before pandas sees them: 1 with gaps stays "1"."""
    import pyarrow

    start = 0
    with _parquet(path) as file:
        for batch in file.iter_batches(batch_size=CHUNK, columns=columns):
            arrays = {}
            for name in columns:
                array = batch.column(name)
                array = array.dictionary_decode() if pyarrow.types.is_dictionary(array.type) else array
                arrays[name] = array.cast(pyarrow.string()) if name in words else array
            yield pyarrow.table(arrays).to_pandas().set_axis(pd.RangeIndex(start, start + batch.num_rows), axis=0)
            start += batch.num_rows
