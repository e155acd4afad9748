"""Learning to rank from LibSVM files, whose queries are `qid:` entries or group sizes in a file beside them."""

import io
from pathlib import Path
from typing import IO

import numpy as np

from jdistill.data.base import Dataset
from jdistill.data.files import File
from jdistill.data.search.lists import Queries, Rows
from jdistill.data.source import Source, fetch
from jdistill.errors import UsageError
from jdistill.registry import register

LAMBDARANK = Source(
    name="lambdarank",
    folders=("lambdarank",),
    addresses=("https://github.com/microsoft/LightGBM/raw/master/examples/lambdarank",),
    sha256={
        "rank.train": "a0c7201c89120879c14a5059e091f441cbf2a29b8aaef363885ccb1a530448df",
        "rank.train.query": "40cb5fef637229311cd30fab13cb7fb633b023e86a87ff04ec55db420143d6af",
        "rank.test": "3b1219ce117a0a36d2f76c02de7e7831c1d79af0d40f5195c03178bbe26c824b",
        "rank.test.query": "36dca82ba3bf99201bac3987b00a8fbf6fe5f563e9fa6d0da90e783710a32df4",
    },
)

_FEATURES = 300


@register("data", "lambdarank")
def lambdarank(
    root: str | None = None,
    validation: float = 0.1,
    split_seed: int = 0,
    limit: int | None = None,
    list_size: int | None = None,
    download: bool = True,
    verify: bool = True,
) -> Dataset:
    """Learning to rank: LightGBM's example, 201 training and 50 test queries, 3,773 documents, 300 features, grades 0 to 4.

    Source: github.com/microsoft/LightGBM, examples/lambdarank. The test split is the published one. Features that a document
    lacks are 0; 82 occur in no training document.

    Args:
      root: the folder that holds lambdarank; None: $JDISTILL_DATA, else the cache folder.
      validation: fraction of the training queries that becomes the validation split.
      split_seed: seed of that draw, of `limit` and of what `list_size` keeps.
      limit: train on at most so many queries.
      list_size: training lists keep at most so many documents, drawn at random; none: all (the longest has 27).
      download: fetch missing files.
      verify: compare every file's SHA-256 with the publisher's; false: layout only.

    Returns:
      A `Dataset` of lists, `inputs` [Q, 27, 301] float32.

    Raises:
      UsageError: a wrong value, or a file that is missing, truncated or altered.
    """
    queries = Queries(validation=validation, split_seed=split_seed, limit=limit, list_size=list_size)
    files, checksums = fetch(LAMBDARANK, root, download=download, verify=verify)
    train, test = (_rows(files[name], files[f"{name}.query"]) for name in ("rank.train", "rank.test"))
    return queries("lambdarank", train, checksums, test=test)


def read_libsvm(
    file: IO[bytes], path: Path, groups: File | None, columns: int | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[str]]:
    """The documents of a LibSVM file (read by scikit-learn, held sparse until it is read).

    Args:
      file: opened.
      path: its name in messages.
      groups: the numbers of lines of the queries, one after the other, a number a line; read where no line has `qid:`.
      columns: the number of features, numbered from 1; None: as many as occur, numbered from 1, or from 0 where 0 occurs.

    Returns:
      Queries [N] int (any numbers), features [N, D] float32 (0 where a line does not name one), grades [N] float64, and the
      numbers of the features as text.

    Raises:
      UsageError: a line that is not LibSVM, or queries that are not told of every line.
    """
    from sklearn.datasets import load_svmlight_file

    try:
        features, grades, queries = load_svmlight_file(
            file, n_features=columns and columns + 1, dtype=np.float32, zero_based=True, query_id=True
        )
    except (ValueError, OverflowError) as error:
        raise UsageError(f"{path} is no LibSVM file ({error}); its lines must be: grade qid:1 1:0.5 7:2") from error
    if not len(grades):
        raise UsageError(f"{path} is empty")
    if not len(queries) and groups is not None:
        queries = _group_numbers(groups, path, len(grades))
    if len(queries) != len(grades):
        missing = f"{len(queries)} of {len(grades)} lines have qid:"
        raise UsageError(f"{path} does not tell every line's query ({missing}); give all a qid:, or write {path.name}.query")
    first = int(columns is not None or features.indices.min(initial=1) > 0)
    table = features[:, first:].toarray()
    return queries, table, grades, [str(first + i) for i in range(table.shape[1])]


def _group_numbers(groups: File, path: Path, lines: int) -> np.ndarray:
    try:
        sizes = np.array(groups.data.split(), np.int64)
    except ValueError as error:
        raise UsageError(f"{groups.path} must hold a whole number a line ({error})") from error
    if sizes.min(initial=1) < 1 or sizes.sum() != lines:
        raise UsageError(
            f"{groups.path} must hold positive numbers whose sum is the {lines} lines of {path.name}; their sum is "
            f"{sizes.sum()}, the smallest is {sizes.min(initial=0)}"
        )
    return np.repeat(np.arange(len(sizes)), sizes)


def _rows(file: File, groups: File) -> Rows:
    queries, features, grades, _ = read_libsvm(io.BytesIO(file.data), file.path, groups, _FEATURES)
    return Rows(queries, features, grades.astype(np.int32))
