"""A user's own graded lists: CSV, Parquet or LibSVM."""

import gzip
import hashlib
import zlib
from pathlib import Path
from typing import IO, Any, cast

import numpy as np

from jdistill.data.base import Dataset
from jdistill.data.files import File, read
from jdistill.data.search.lambdarank import read_libsvm
from jdistill.data.search.lists import Queries, Rows
from jdistill.errors import UsageError, unknown
from jdistill.pytrees import require_one_of
from jdistill.registry import register

FORMATS = ("auto", "table", "libsvm")
LIBSVM = (".libsvm", ".svm", ".svmlight")


@register("data", "ranking")
def ranking(
    path: str = "",
    query: str = "query",
    grade: str = "grade",
    features: tuple[str, ...] = (),
    privileged: tuple[str, ...] = (),
    separator: str | None = None,
    format: str = "auto",
    validation: float = 0.1,
    split_seed: int = 0,
    limit: int | None = None,
    folds: int | None = None,
    fold: int = 0,
    list_size: int | None = None,
) -> Dataset:
    """Learning to rank on your own file: a row for each document of a query, with its grade and its features.

    The file is read in chunks; memory holds the features as float32, and the lists. Rows may be in any order. Queries are
    split, not rows: none is in two splits. A feature that is missing takes the mean of its column in training. A query of one
    document, or whose grades are all equal, is kept; it teaches nothing.

    Args:
      path: the file.
      query: column of the query's name or number (NA, null and the like are missing); in LibSVM the `qid:` entries, or group
        sizes in <path>.query.
      grade: column of the grade, a whole number from 0 on, higher is better; in LibSVM the first entry.
      features: columns of numbers; none named: all other columns. In LibSVM the numbers they have in the file.
      privileged: those of the features that only a teacher may read.
      separator: of a CSV file; none: a comma, or a tab where the name ends in .tsv.
      format: table (CSV, TSV, or Parquet, which needs pyarrow), libsvm, or auto: libsvm where the name ends in .libsvm,
        .svm or .svmlight (and .gz).
      validation: fraction of the queries outside the test split that becomes the validation split.
      split_seed: seed of that draw, of `limit` and of what `list_size` keeps.
      limit: train on at most so many queries.
      folds: parts that the queries are dealt into, the same for every `split_seed`; none: 20 % are the test split.
      fold: the part that is the test split.
      list_size: training lists keep at most so many documents, drawn at random; none: all.

    Returns:
      A `Dataset` of lists, `inputs` [Q, K, D + 1] float32; queries are numbered as they first occur.

    Raises:
      UsageError: a wrong value; a file that is missing, empty or unreadable; a column that is missing or not of numbers; a
        grade that is missing, negative or no whole number; a row without a query; an infinite feature.
    """
    queries = Queries(validation=validation, split_seed=split_seed, limit=limit, list_size=list_size, folds=folds, fold=fold)
    require_one_of(FORMATS, format=format)
    if not path:
        raise UsageError("path must name a CSV, Parquet or LibSVM file; set data.path")
    file = Path(path).expanduser()
    libsvm = file.name.removesuffix(".gz").endswith(LIBSVM) if format == "auto" else format == "libsvm"
    rows, names, checksums = _libsvm(file, features) if libsvm else _table(path, separator, query, grade, features)
    for name in privileged:
        if name not in names:
            raise UsageError(f"privileged: {unknown('feature', name, names)}")
    return queries("ranking", rows, checksums, privileged=tuple(sorted(names.index(name) for name in privileged)))


def _table(
    path: str, separator: str | None, query: str, grade: str, features: tuple[str, ...]
) -> tuple[Rows, list[str], dict[str, str]]:
    """All rows of a table, the names of its features, and its checksum."""
    from jdistill.data.tables.columns import require_columns  # these bring pandas, half a second
    from jdistill.data.tables.read import Table
    from jdistill.data.tables.transforms import refuse

    table = Table(path, separator)
    require_columns(table.names, table.path.name, query=(query,), grade=(grade,), features=features)
    names = list(features) or [name for name in table.names if name not in (query, grade)]
    if not names or {query, grade} & set(names) or len(set(names)) < len(names):
        raise UsageError(f"features must be different columns other than {query} and {grade}, got {names}")
    if words := [name for name in names if name not in table.numeric]:
        raise UsageError(
            f"features: column '{words[0]}' of {table.path.name} is not of numbers; name those that are in features"
        )
    frame = table.read((grade, *names), (query,), (), {})
    if (absent := frame[query].isna().to_numpy()).any():
        refuse(frame[query], absent, "the name or number of a query")
    codes = frame[query].cat.codes.to_numpy(np.int64)
    return Rows(codes, frame[names].to_numpy(np.float32), _grades(frame[grade])), names, table.checksums()


def _libsvm(file: Path, features: tuple[str, ...]) -> tuple[Rows, list[str], dict[str, str]]:
    """As `_table`; the names are the features' numbers."""
    import pandas as pd

    groups = file.with_name(f"{file.name}.query")
    beside: tuple[File, str] | None = read(groups, None) if groups.is_file() else None
    try:
        with _opened(file) as opened:
            queries, table, grades, names = read_libsvm(opened, file, beside[0] if beside else None)
        with file.open("rb") as opened:
            checksums = {file.name: hashlib.file_digest(opened, "sha256").hexdigest()}
    except (OSError, EOFError, zlib.error) as error:
        raise UsageError(f"{file} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    chosen = list(features) or names
    for name in chosen:
        if name not in names:
            raise UsageError(f"features: {unknown(f'feature of {file.name}', name, names)}")
    table = table[:, [names.index(name) for name in chosen]]
    if (wrong := np.isinf(table).any(axis=1)).any():
        raise UsageError(f"{file} has an infinite feature in row {int(np.argmax(wrong)) + 1}; correct or remove the row")
    checksums |= {groups.name: beside[1]} if beside else {}
    return Rows(pd.factorize(queries)[0], table, _grades(pd.Series(grades, name="grade"))), chosen, checksums


def _opened(file: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(file)) if file.suffix == ".gz" else file.open("rb")


def _grades(values: Any) -> np.ndarray:
    """Grades [N] int32 of a series of numbers."""
    from jdistill.data.tables.transforms import refuse

    if (wrong := (~((values >= 0) & (values == np.floor(values)) & (values < 2**24))).to_numpy()).any():
        refuse(values, wrong, "a grade: a whole number from 0 on")
    return values.to_numpy().astype(np.int32)
