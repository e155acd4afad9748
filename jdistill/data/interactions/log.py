"""A log of who met what: `Interactions`, and the cleaning steps that papers name."""

import dataclasses
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse

from jdistill.errors import UsageError
from jdistill.pytrees import require_one_of

DUPLICATES = ("last", "sum", "error")
"""What becomes of several rows of one user and item."""


@dataclasses.dataclass(frozen=True, eq=False)
class Interactions:
    """A log in memory, one row an interaction, in the order of the file.

    Attributes:
      user: [E] int32, 0 .. users - 1.
      item: [E] int32, 0 .. items - 1.
      value: [E] float32: the rating or count, or 1.
      time: [E] float64, a number that grows with time (seconds, or the position in a sequence), or None.
      user_names, item_names: the publisher's ids; entry n is that of number n.
      user_features, item_features: [users, F], [items, F] float32, or None.
    """

    user: np.ndarray
    item: np.ndarray
    value: np.ndarray
    time: np.ndarray | None
    user_names: np.ndarray
    item_names: np.ndarray
    user_features: np.ndarray | None = None
    item_features: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.user)

    @property
    def users(self) -> int:
        return len(self.user_names)

    @property
    def items(self) -> int:
        return len(self.item_names)

    @property
    def pairs(self) -> np.ndarray:
        """[E] int64: one number for each user and item."""
        return self.user.astype(np.int64) * self.items + self.item

    def take(self, rows: np.ndarray) -> "Interactions":
        """The given rows; users and items keep their numbers, also those that have no row left."""
        time = None if self.time is None else self.time[rows]
        return dataclasses.replace(self, user=self.user[rows], item=self.item[rows], value=self.value[rows], time=time)


def numbered(user: Any, item: Any, value: np.ndarray | None = None, time: np.ndarray | None = None) -> Interactions:
    """A log of the publisher's ids [E], of any type, numbered in the order of their first appearance."""
    (user_codes, user_names), (item_codes, item_names) = (pd.factorize(np.asarray(ids)) for ids in (user, item))
    return Interactions(
        user_codes.astype(np.int32),
        item_codes.astype(np.int32),
        np.ones(len(user_codes), np.float32) if value is None else np.asarray(value, np.float32),
        None if time is None else np.asarray(time, np.float64),
        user_names,
        item_names,
    )


def renumbered(log: Interactions) -> Interactions:
    """Without the users and items that have no row; the others keep their order."""
    user_kept = np.bincount(log.user, minlength=log.users) > 0
    item_kept = np.bincount(log.item, minlength=log.items) > 0
    return dataclasses.replace(
        log,
        user=(np.cumsum(user_kept) - 1)[log.user].astype(np.int32),
        item=(np.cumsum(item_kept) - 1)[log.item].astype(np.int32),
        user_names=log.user_names[user_kept],
        item_names=log.item_names[item_kept],
        user_features=None if log.user_features is None else log.user_features[user_kept],
        item_features=None if log.item_features is None else log.item_features[item_kept],
    )


def implicit(log: Interactions, threshold: float) -> Interactions:
    """The rows whose value is at least `threshold`, each of value 1."""
    kept = log.take(log.value >= threshold)
    return renumbered(dataclasses.replace(kept, value=np.ones(len(kept), np.float32)))


def active(log: Interactions, least: int) -> Interactions:
    """Without the users of fewer than `least` rows."""
    return renumbered(log.take(np.bincount(log.user, minlength=log.users)[log.user] >= least))


def core(log: Interactions, k: int) -> Interactions:
    """The k-core: users and items of fewer than `k` rows are left out, again and again until none is."""
    while True:
        enough = np.bincount(log.user, minlength=log.users)[log.user] >= k
        enough &= np.bincount(log.item, minlength=log.items)[log.item] >= k
        if enough.all():
            return renumbered(log)
        log = log.take(enough)


def without_duplicates(log: Interactions, duplicates: str = "last") -> Interactions:
    """One row for each user and item, where its last row (by time, ties by file order) was.

    Args:
      log: a log.
      duplicates: "last" keeps the last row; "sum" keeps it with the sum of all values; "error" allows no duplicates.

    Raises:
      UsageError: another word, or duplicates where they are an error (rows are counted from 1).
    """
    require_one_of(DUPLICATES, duplicates=duplicates)
    order = grouped(grouped(in_time(log), log.item, log.items), log.user, log.users)
    ordered = log.pairs[order]
    same = ordered[1:] == ordered[:-1]
    if not same.any():
        return log
    if duplicates == "error":
        first = np.flatnonzero(same)[0]
        a, b = sorted(int(row) + 1 for row in order[first : first + 2])
        names = log.user_names[log.user[order[first]]], log.item_names[log.item[order[first]]]
        raise UsageError(
            f"rows {a} and {b} are both of user {names[0]} and item {names[1]} ({int(same.sum())} such repetitions); "
            "remove them or set duplicates=last or sum"
        )
    kept = np.sort(order[np.append(~same, True)])
    if duplicates == "sum":
        total = np.empty(len(log), np.float32)
        run = np.cumsum(np.append(0, ~same))
        total[order] = np.bincount(run, log.value[order])[run]
        log = dataclasses.replace(log, value=total)
    return log.take(kept)


def in_time(log: Interactions) -> np.ndarray:
    """[E] int: the rows in the order of time; ties, and logs without times, in the order of the file."""
    return np.arange(len(log)) if log.time is None else np.argsort(log.time, kind="stable")


def grouped(rows: np.ndarray, group: np.ndarray, groups: int) -> np.ndarray:
    """`rows` [N] by their number in `group` [E], which is below `groups`; within a group they keep their order.

    A counting sort (that of a sparse matrix by its rows): linear in N, where a sort of the log is not.
    """
    places = np.arange(len(rows))
    return sparse.coo_array((rows, (group[rows], places)), shape=(groups, max(len(rows), 1))).tocsr().data
