"""Stratified splits. One permutation does everything: any prefix of it holds every class in proportion."""

import dataclasses

import numpy as np

from jdistill.data.base import Split
from jdistill.errors import UsageError
from jdistill.pytrees import require_fraction, require_nonnegative, require_positive

TEST_FRACTION = 0.2
TEST_SEED = 0
"""Sets published without a test set lose this part, by this seed, whatever `split_seed` says."""


def as_split(inputs: np.ndarray, label: np.ndarray) -> Split:
    """A `Split` of all rows in file order."""
    return {"inputs": inputs, "label": label.astype(np.int32), "index": np.arange(len(label), dtype=np.int32)}


def take(split: Split, rows: np.ndarray) -> Split:
    """The given rows of every array."""
    return {name: array[rows] for name, array in split.items()}


def stratified_order(label: np.ndarray, seed: int) -> np.ndarray:
    """A random permutation of the rows in which the classes take turns.

    Args:
      label: [N] int, at least 0.
      seed: of the permutation.

    Returns:
      [N] int: the first n entries hold each class in its proportion of the whole, up to rounding.
    """
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(len(label))
    rows = shuffled[np.argsort(label[shuffled], kind="stable")]  # class by class, random within each
    counts = np.bincount(label)
    own = label[rows]
    rank = np.arange(len(label)) - (np.cumsum(counts) - counts)[own]
    return rows[np.lexsort((rng.random(len(label)), (rank + 0.5) / counts[own]))]  # ties between classes at random


def hold_out_test(inputs: np.ndarray, label: np.ndarray) -> tuple[Split, Split]:
    """Training and test split of a set published as one: `TEST_FRACTION`, stratified, always the same rows."""
    whole = as_split(inputs, label)
    order = stratified_order(whole["label"], TEST_SEED)
    cut = round(TEST_FRACTION * len(label))
    return take(whole, np.sort(order[cut:])), take(whole, np.sort(order[:cut]))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Selection:
    """The keys every data set has; they are checked here, before any file is read.

    Attributes:
      published: the number of published classes.
      validation: the fraction of the training rows that becomes the validation split, in [0, 1).
      split_seed: of the draw of the validation rows and of `limit`.
      limit: at most so many training rows, stratified; the validation split does not depend on it.
      classes_kept: keep these labels only, renamed 0, 1, ... in the order given.

    Raises:
      UsageError: a value that cannot be.
    """

    published: int
    validation: float
    split_seed: int
    limit: int | None
    classes_kept: tuple[int, ...] | None

    def __post_init__(self) -> None:
        require_fraction(validation=self.validation)
        require_nonnegative(split_seed=self.split_seed)
        require_positive(limit=self.limit)
        kept, known = self.classes_kept, range(self.published)
        if kept is not None and (len(kept) < 2 or len(set(kept)) < len(kept) or not set(kept) <= set(known)):
            raise UsageError(f"classes_kept must be two or more different labels between 0 and {known[-1]}, got {list(kept)}")

    @property
    def classes(self) -> int:
        """The number of classes left."""
        return self.published if self.classes_kept is None else len(self.classes_kept)

    def __call__(self, train: Split, test: Split) -> tuple[Split, Split, Split]:
        """Training, validation and test split out of all published rows.

        Raises:
          UsageError: no row is left to train on.
        """
        if self.classes_kept is not None:
            train, test = _keep(train, self.classes_kept), _keep(test, self.classes_kept)
        order = stratified_order(train["label"], self.split_seed)
        cut = round(self.validation * len(order))
        end = None if self.limit is None else cut + self.limit
        if cut >= len(order):
            raise UsageError(f"validation {self.validation} leaves none of {len(order)} examples to train on; lower it")
        return take(train, np.sort(order[cut:end])), take(train, np.sort(order[:cut])), test


def _keep(split: Split, kept: tuple[int, ...]) -> Split:
    matches = split["label"][:, None] == np.array(kept)
    rows = take(split, np.flatnonzero(matches.any(axis=1)))
    return {**rows, "label": matches.argmax(axis=1)[matches.any(axis=1)].astype(np.int32)}
