"""From rows of (query, features, grade) to padded lists, split by query."""

import dataclasses
from typing import NamedTuple

import numpy as np

from jdistill.data.base import Dataset, Split
from jdistill.data.splits import TEST_FRACTION, TEST_SEED
from jdistill.errors import UsageError
from jdistill.pytrees import require_fraction, require_nonnegative, require_positive


class Rows(NamedTuple):
    """Graded documents of queries, a row each, in any order.

    Attributes:
      query: [N] int, the query's number, from 0 on; each number up to the largest occurs.
      features: [N, D] float32; NaN where unknown.
      grade: [N] int, at least 0; higher is better.
    """

    query: np.ndarray
    features: np.ndarray
    grade: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class Queries:
    """The keys every set of lists has; they are checked here, before any file is read.

    Attributes:
      validation: the fraction of the queries outside the test split that becomes the validation split, in [0, 1).
      split_seed: of the draw of the validation queries, of `limit` and of the documents that `list_size` keeps.
      limit: at most so many training queries; the validation split does not depend on it.
      list_size: training lists that are longer keep so many of their documents, drawn once; None: all. Validation and
        test lists are never cut.
      folds: the queries are dealt into so many parts, the same for every `split_seed`; None: 20 % are the test split.
      fold: the part that is the test split.

    Raises:
      UsageError: a value that cannot be.
    """

    validation: float
    split_seed: int
    limit: int | None
    list_size: int | None
    folds: int | None = None
    fold: int = 0

    def __post_init__(self) -> None:
        require_fraction(validation=self.validation)
        require_nonnegative(split_seed=self.split_seed, fold=self.fold)
        require_positive(limit=self.limit, list_size=self.list_size)
        if self.folds is not None and self.folds < 2:
            raise UsageError(f"folds must be at least 2, got {self.folds}; leave it out for one split")
        if self.fold and self.folds is None:
            raise UsageError("fold is one of folds parts; set folds too")
        if self.folds is not None and self.fold >= self.folds:
            raise UsageError(f"fold must be below folds = {self.folds}, got {self.fold}")

    def __call__(
        self,
        name: str,
        rows: Rows,
        checksums: dict[str, str],
        *,
        test: Rows | None = None,
        privileged: tuple[int, ...] = (),
    ) -> Dataset:
        """The data set of all published rows.

        No query is in two splits. Mean and std are those of the training documents, and so is what takes the place of NaN
        (the column's mean; 0 where no training document has a value). Filled places are zeros in the raw inputs and minus
        mean over std after preprocessing: networks mask them by the last column, which preprocessing leaves at 1 for a
        document and 0 for a filled place.

        Args:
          name: of the data set.
          rows: all, or those of training where the publisher has a test file.
          checksums: of the files read.
          test: the publisher's test rows, numbered on their own; then there are no folds.
          privileged: columns that only a teacher may read.

        Returns:
          A `Dataset` of lists, `inputs` [Q, K, D + 1]. In validation and test K is the length of the longest list of all
          and the number of classes, in training at most `list_size`. `index` is the query's number in its file.

        Raises:
          UsageError: there are fewer queries than folds, or none is left to train on.
        """
        held, rest = self._held_out(_count(rows)) if test is None else (np.arange(_count(test)), np.arange(_count(rows)))
        train, validation = self._divide(rest)
        published = (rows,) if test is None else (rows, test)
        longest = int(max(np.bincount(part.query).max() for part in published))
        size = min(self.list_size or longest, longest)
        kept = self._cut(_of_queries(rows, train), size)
        fill, mean, std = _statistics(kept.features)
        return Dataset(
            name,
            _split(kept, train, fill, size),
            _split(_of_queries(rows, validation), validation, fill, longest),
            _split(_of_queries(published[-1], held), held, fill, longest),
            longest,
            (*mean, 0.0),
            (*std, 1.0),
            1.0,
            None,
            checksums,
            privileged=privileged,
        )

    def _held_out(self, queries: int) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of the test queries and of the others, rising."""
        needed = self.folds or 2
        if queries < needed:
            raise UsageError(f"folds needs at least as many queries, {needed}, and the data have {queries}")
        order = np.random.default_rng(TEST_SEED).permutation(queries)
        part = order[self.fold :: self.folds] if self.folds else order[: max(1, round(TEST_FRACTION * queries))]
        return np.sort(part), np.setdiff1d(order, part)

    def _divide(self, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Training and validation queries, rising."""
        order = np.random.default_rng(self.split_seed).permutation(queries)
        cut = round(self.validation * len(order))
        if cut >= len(order):
            raise UsageError(f"validation {self.validation} leaves none of {len(order)} queries to train on; lower it")
        end = None if self.limit is None else cut + self.limit
        return np.sort(order[cut:end]), np.sort(order[:cut])

    def _cut(self, rows: Rows, size: int) -> Rows:
        """At most `size` rows of each query, drawn at random, in their order."""
        order = np.lexsort((np.random.default_rng(self.split_seed).random(len(rows.query)), rows.query))
        kept = np.sort(order[_place(rows.query[order]) < size])
        return Rows(*(array[kept] for array in rows))


def pad(rows: Rows, size: int) -> Split:
    """Lists as `inputs` [Q, size, D + 1] float32, `grades` [Q, size] int32 and `label` [Q] int32.

    The documents of a query keep their order. The last column of `inputs` is 1 for a document and 0 for a filled place;
    all else of a filled place is 0 and its grade -1. `label` is the first place of the best grade.

    Args:
      rows: of at most `size` documents a query.
      size: the length of every list.
    """
    queries, width = _count(rows), rows.features.shape[1]
    order = np.argsort(rows.query, kind="stable")
    query, place = rows.query[order], _place(rows.query[order])
    inputs = np.zeros((queries, size, width + 1), np.float32)
    grades = np.full((queries, size), -1, np.int32)
    inputs[query, place, :width] = rows.features[order]
    inputs[query, place, width] = 1
    grades[query, place] = rows.grade[order]
    return {"inputs": inputs, "grades": grades, "label": grades.argmax(axis=1).astype(np.int32)}


def _count(rows: Rows) -> int:
    return int(rows.query.max(initial=-1)) + 1


def _place(query: np.ndarray) -> np.ndarray:
    """Of each row its number within its query; rows of a query lie together."""
    return np.arange(len(query)) - np.searchsorted(query, query)


def _of_queries(rows: Rows, queries: np.ndarray) -> Rows:
    """The rows of the given queries (rising), which are numbered anew from 0 on."""
    number = np.full(_count(rows), -1)
    number[queries] = np.arange(len(queries))
    kept = number[rows.query] >= 0
    return Rows(number[rows.query[kept]], rows.features[kept], rows.grade[kept])


def _split(rows: Rows, queries: np.ndarray, fill: np.ndarray, size: int) -> Split:
    """The lists of the rows of `queries`, padded, with `fill` in place of NaN."""
    return {**pad(rows._replace(features=_filled(rows.features, fill)), size), "index": queries.astype(np.int32)}


def _statistics(features: np.ndarray) -> tuple[np.ndarray, tuple[float, ...], tuple[float, ...]]:
    """Of each column the value for NaN, the mean and the std (1 for a constant column), once NaN are replaced."""
    known = ~np.isnan(features)
    total = np.where(known, features, 0).sum(axis=0, dtype=np.float64)
    mean = total / np.maximum(known.sum(axis=0), 1)
    fill = mean.astype(np.float32)
    whole = _filled(features, fill)
    std = np.where(np.ptp(whole, axis=0) > 0, whole.std(axis=0, dtype=np.float64), 1.0)
    return fill, tuple(whole.mean(axis=0, dtype=np.float64).tolist()), tuple(std.tolist())


def _filled(features: np.ndarray, fill: np.ndarray) -> np.ndarray:
    return np.where(np.isnan(features), fill, features) if np.isnan(features).any() else features
