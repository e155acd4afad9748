"""Which rows of a log are trained on, validate and test.

A user of fewer than three rows stays whole in training, except under `temporal`. Ties in time are broken by the order
of the file.
"""

from typing import NamedTuple

import numpy as np

from jdistill.data.interactions.log import Interactions, grouped, in_time
from jdistill.errors import UsageError

FEWEST = 3
"""Rows that a user must have for any of them to be held out: one each for training, validation and test."""


class Rows(NamedTuple):
    """Row numbers of a log, each rising.

    Attributes:
      train, validation, test: disjoint.
      known: rows that nothing is trained on but that requests bring along as history (of cold-start users), or None.
    """

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    known: np.ndarray | None = None


def leave_one_out(log: Interactions, seed: int | None) -> Rows:
    """One test and one validation row of each user: random ones, or with seed None the last and the one before it."""
    from_last, count = _from_last(log, seed)
    enough = count[log.user] >= FEWEST
    return _rows(np.where(enough & (from_last < 2), 2 - from_last, 0))


def ratio(log: Interactions, validation: float, test: float, seed: int | None) -> Rows:
    """Of each user's n rows ceil(test n) for test, ceil(validation n) for validation, at least one for training.

    Args:
      log: a log.
      validation, test: fractions, together below 1.
      seed: of the random draw; None: the last rows are the test split and those before them the validation split.
    """
    _require_room(validation, test)
    from_last, count = _from_last(log, seed)
    held = np.where(count >= FEWEST, count - 1, 0)  # at most
    tests = np.minimum(np.ceil(test * count), held)
    both = np.minimum(tests + np.ceil(validation * count), held)
    tests, both = tests[log.user], both[log.user]
    return _rows(np.where(from_last < tests, 2, np.where(from_last < both, 1, 0)))


def ratio_by_users(log: Interactions, validation_users: float, test: float, seed: int) -> Rows:
    """As `ratio` without validation; then what `validation_users` of the users hold out validates, of the others tests.

    The validation users are int(validation_users * users) random ones, as in the code of UnKD (Chen et al. 2023).
    """
    rows = ratio(log, 0.0, test, seed)
    chosen = np.random.default_rng([seed, 1]).permutation(log.users)[: int(validation_users * log.users)]
    validates = np.isin(log.user[rows.test], chosen)
    return Rows(rows.train, rows.test[validates], rows.test[~validates])


def temporal(log: Interactions, validation: float, test: float) -> Rows:
    """Two cuts in time, the same for all users: the last `test` of the rows, and `validation` of them before.

    A row is held out when its time is later than the quantile 1 - test (or 1 - test - validation) of all times, so rows
    of one moment stay together. A user may have no training row.

    Raises:
      UsageError: the log has no times.
    """
    _require_room(validation, test)
    if log.time is None:
        raise UsageError("split=temporal needs times and these data have none; choose split=leave_one_out or ratio")
    first, second = np.quantile(log.time, [1 - test - validation, 1 - test], method="lower")
    return _rows((log.time > first).astype(int) + (log.time > second))


def cold_users(log: Interactions, rows: Rows, fraction: float, seed: int) -> Rows:
    """Holds out users whole: int(fraction * users) of those that have test rows.

    Their training and validation rows become `known`: history at request time. The test split keeps their rows only.
    """
    having = np.unique(log.user[rows.test])
    count = int(fraction * log.users)
    if not 0 < count <= len(having):
        raise UsageError(f"cold_users {fraction} is {count} users; it must be between 1 and the {len(having)} with test rows")
    cold = np.zeros(log.users, bool)
    cold[np.random.default_rng([seed, 2]).permutation(having)[:count]] = True
    train, validation, test = (cold[log.user[part]] for part in rows[:3])
    known = np.sort(np.concatenate([rows.train[train], rows.validation[validation]]))
    return Rows(rows.train[~train], rows.validation[~validation], rows.test[test], known)


def cold_items(log: Interactions, rows: Rows, fraction: float, seed: int) -> Rows:
    """Holds out int(fraction * items) random items: training, validation and history lose them, test keeps them only."""
    count = int(fraction * log.items)
    cold = np.zeros(log.items, bool)
    cold[np.random.default_rng([seed, 3]).permutation(log.items)[:count]] = True
    test = rows.test[cold[log.item[rows.test]]]
    if not len(test):
        raise UsageError(f"cold_items {fraction} is {count} items, of which none has a test row; raise it")
    known = None if rows.known is None else rows.known[~cold[log.item[rows.known]]]
    train, validation = (part[~cold[log.item[part]]] for part in rows[:2])
    return Rows(train, validation, test, known)


def _from_last(log: Interactions, seed: int | None) -> tuple[np.ndarray, np.ndarray]:
    """For each row how many rows its user has after it (in time, or in a random order), and the rows of each user."""
    rows = in_time(log) if seed is None else np.random.default_rng(seed).permutation(len(log))
    order = grouped(rows, log.user, log.users)
    count = np.bincount(log.user, minlength=log.users)
    from_last = np.empty(len(log), np.int64)
    from_last[order] = np.cumsum(count)[log.user[order]] - 1 - np.arange(len(log))
    return from_last, count


def _rows(part: np.ndarray) -> Rows:
    """The rows of part 0 (training), 1 (validation) and 2 (test)."""
    return Rows(*(np.flatnonzero(part == p) for p in range(3)))


def _require_room(validation: float, test: float) -> None:
    if validation + test >= 1:
        raise UsageError(f"validation + test must be below 1, got {validation} + {test}")
