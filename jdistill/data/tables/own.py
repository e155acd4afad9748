"""A user's own table: clicks, conversions, classes or numbers to be predicted from named columns."""

import pandas as pd

from jdistill.data.base import Dataset
from jdistill.data.files import check_root
from jdistill.data.tables.build import KINDS, Splitting, build_table
from jdistill.data.tables.columns import Features, require_columns
from jdistill.data.tables.read import UNNAMED, Table
from jdistill.errors import UsageError
from jdistill.pytrees import require_one_of, require_positive
from jdistill.registry import register


@register("data", "ctr")
def ctr(
    root: str | None = None,
    path: str = "",
    separator: str | None = None,
    label: str = "label",
    kind: str = "binary",
    numbers: tuple[str, ...] = (),
    categories: tuple[str, ...] = (),
    group: str | None = None,
    privileged: tuple[str, ...] = (),
    split: str = "random",
    time: str | None = None,
    folds: int = 5,
    fold: int = 0,
    validation: float = 0.1,
    split_seed: int = 0,
    limit: int | None = None,
    encoding: str = "index",
    fill: str = "mean",
    indicators: bool = False,
    clip: float = 0.0,
    log1p: tuple[str, ...] = (),
    binned: tuple[str, ...] = (),
    bins: int = 10,
    hashed: tuple[str, ...] = (),
    buckets: int = 100_000,
    duplicates: bool = True,
) -> Dataset:
    """Your own CSV, TSV or Parquet file with one row per example: clicks (CTR), conversions (CVR), risk, prices, ratings.

    The file is read in pieces: beside the columns named here, only 16,384 rows are in memory, so that a file larger than
    memory can be read. Every value takes 4 bytes as read (8 in the column of times) and 4 in each column of the inputs;
    drawing the splits takes some 80 bytes a row for a moment.

    What happens to odd values. Rows without a label are left out, and counted on stderr. Missing numbers are filled
    (`fill`), missing categories and those no training row has are category 0. Infinite numbers, words among numbers,
    labels that `kind` does not allow, missing times and training rows of one class are errors that name column and row
    (rows are counted from 1, without the header). A number that is constant in training is only centred.

    Args:
      root: not used; must be a directory where given.
      path: of the file.
      separator: between columns; None: a comma in .csv, a tab in .tsv, .tab and .dat.
      label: column to be predicted.
      kind: of label: binary (0 and 1, true and false), classes (any values), regression, count (numbers of at least 0).
      numbers, categories: columns to be read. Columns not named are left out; if both lists are empty all but label,
        group, time and columns without a name are read, as numbers where the first 16,384 rows hold numbers, else as
        categories.
      group: column whose values group the examples (users, queries) for grouped AUC.
      privileged: columns that only a teacher may read.
      split: random (stratified by class), or time: the last 20 % are the test split, the last before them validation.
      time: column that split=time sorts by: numbers, or dates in ISO 8601.
      folds: of a random split: the test rows are one of so many parts.
      fold: which part, from 0; 0 of 5 is a stratified 20 % as in other data sets.
      validation: fraction of the other rows that becomes the validation split.
      split_seed: seed of that draw and of `limit`.
      limit: train on at most so many rows, stratified.
      encoding: of categories: index (one column of 0 .. n - 1, for networks with embeddings), or one_hot.
      fill: of missing numbers: mean or median of training.
      indicators: a column of 0 and 1 after each number that some training rows miss.
      clip: share of the training values clipped at each end, in [0, 0.5).
      log1p: numbers taken log(1 + x) of.
      binned: numbers made categories by training quantiles.
      bins: how many quantiles.
      hashed: categories with very many values, hashed while reading.
      buckets: how many different values they keep.
      duplicates: false: of rows equal in all columns read only the first stays.

    Returns:
      A `Dataset` of float32 [N, D]; see `build_table`.

    Raises:
      UsageError: a wrong value, a column that is not in the file, or a file that cannot be read.
    """
    check_root(root)
    require_one_of(KINDS, kind=kind)
    require_positive(buckets=buckets)
    splitting = Splitting(
        validation=validation, split_seed=split_seed, limit=limit, split=split, folds=folds, fold=fold
    )  # fmt: skip
    if not path:
        raise UsageError("path must name a file, such as data.path=clicks.csv")
    table = Table(path, separator)
    ids = {"group": group, "time": time}
    _require(table, label=(label,), numbers=numbers, categories=categories, **{k: (v,) for k, v in ids.items() if v})
    if not numbers and not categories:
        left = [name for name in table.names if name not in (label, group, time) and not name.startswith(UNNAMED)]
        numbers = tuple(name for name in left if name in table.numeric)
        categories = tuple(name for name in left if name not in table.numeric)
    features = Features(
        numbers=numbers, categories=categories, privileged=privileged, encoding=encoding, fill=fill, indicators=indicators,
        clip=clip, log1p=log1p, binned=binned, bins=bins,
    )  # fmt: skip
    require_columns(categories, "categories", hashed=hashed)
    if group in hashed:
        raise UsageError(f"hashed must not name the group '{group}', whose values would be merged; leave it out there")
    frame = _columns(table, features, label, kind, group, time, dict.fromkeys(hashed, buckets))
    return build_table(
        "ctr", frame, features, splitting, label=label, kind=kind, checksums=table.checksums(), group=group, time=time,
        duplicates=duplicates,
    )  # fmt: skip


def _require(table: Table, **named: tuple[str, ...]) -> None:
    missing = [name for names in named.values() for name in names if name not in table.names]
    if missing and table.headless:
        raise UsageError(
            f"{table.path} seems to have no header line: its first line is {', '.join(table.names[:8])}, and '{missing[0]}' is "
            "no column; write the names of the columns above it"
        )
    require_columns(table.names, table.path.name, **named)


def _columns(
    table: Table, features: Features, label: str, kind: str, group: str | None, time: str | None, buckets: dict[str, int]
) -> pd.DataFrame:
    """What is read of the file, each column once: as text where it is a category, a group or a class."""
    numbers = [*features.numbers, *((label,) if kind in ("regression", "count") else ())]
    words = [*features.categories, *((group,) if group else ()), *((label,) if kind in ("binary", "classes") else ())]
    plain = [time] if time and time not in words else []
    both = set(numbers) & set(words)
    if both:
        raise UsageError(f"column '{min(both)}' cannot be a number and a category (or group, or class); name it in one place")
    numbers = [column for column in dict.fromkeys(numbers) if column not in plain]
    return table.read(tuple(numbers), tuple(dict.fromkeys(words)), tuple(plain), buckets)
