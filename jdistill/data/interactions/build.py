"""From a log and its split to the arrays of a `Dataset`: vectorised, without a loop over users."""

import numpy as np

from jdistill.data.base import Dataset, Schema, Side, Split
from jdistill.data.interactions.log import Interactions, grouped, in_time
from jdistill.data.interactions.splits import Rows
from jdistill.errors import UsageError
from jdistill.pytrees import require_nonnegative, require_one_of
from jdistill.sampling import Lists, as_lists

UNSEEN = ("keep", "drop", "error")
"""What becomes of held-out rows whose item has no training row."""


def build_interactions(
    name: str,
    log: Interactions,
    rows: Rows,
    *,
    history: int = 0,
    checksums: dict[str, str],
    by_time: bool = False,
    candidates: int = 0,
    unseen: str = "keep",
    seed: int = 0,
) -> Dataset:
    """The `Dataset` of a log.

    There is an evaluation row for each user that has relevant items in that split; relevant are the items held out,
    each once and in the order of time, without those that the user met before. Evaluation rows have as `index` the row of
    the log that holds the first relevant item. The label is as wide as the user with most relevant items needs.

    Args:
      name: the option's name.
      log: of which `index` gives the row numbers.
      rows: the split.
      history: L, how many items met before a request brings along.
      checksums: of the files read.
      by_time: whether held-out rows came after the training rows; test histories then hold the validation items too.
      candidates: C, the negatives that are ranked against the first relevant item: drawn without replacement among the
        items that the user has in no split, the same for validation and test; 0: all items are ranked.
      unseen: held-out items that training lacks are kept as relevant ("keep": a network cannot know them, they count as
        misses unless it ranks them by features), left out ("drop") or refused ("error").
      seed: of the candidates.

    Raises:
      UsageError: no row to train on, unseen items where they are an error, or more candidates than there are items that
        some user has not met.
    """
    require_nonnegative(history=history, candidates=candidates)
    require_one_of(UNSEEN, unseen=unseen)
    if not len(rows.train):
        raise UsageError("no interaction is left to train on; hold out less, or lower min_interactions")
    rows = _without_unseen(log, rows, unseen)
    order = grouped(in_time(log), log.user, log.users)
    known = rows.train if rows.known is None else np.concatenate([rows.train, rows.known])
    before = np.concatenate([known, rows.validation])
    edges = _distinct(log.pairs[rows.train])
    validation, test = (_new(log, part, edges) for part in rows[1:3])
    test = test[~np.isin(log.pairs[test], log.pairs[before[len(rows.train) :]])]
    splits = tuple(
        _requests(log, _ordered(order, part), last_items(log, _ordered(order, past), history))
        for part, past in ((validation, known), (test, before if by_time else known))
    )
    if candidates:
        negatives = _negatives(log, candidates, np.unique(log.user[np.concatenate(rows[1:3])]), seed)
        for split in splits:
            split["candidates"] = negatives[split["inputs"][:, 0]]
    user, item = np.divmod(edges, log.items)
    return Dataset(
        name, _train(log, rows.train), splits[0], splits[1], log.items, (0.0,), (1.0,), 1.0, None, checksums,
        schema=Schema(log.users, log.items, history),
        side=Side(
            np.stack([user, item], axis=1).astype(np.int32), log.user_features, log.item_features, log.user_names,
            log.item_names,
        ),
        tables={"sequence": last_items(log, _ordered(order, rows.train), history + 1)},
    )  # fmt: skip


def last_items(log: Interactions, rows: np.ndarray, length: int) -> np.ndarray:
    """[users, length] int32: the last items of each user in `rows`, the oldest first, filled on the left with `log.items`.

    `rows` are in the order of users and, of each, in the order of time.
    """
    end = np.cumsum(np.bincount(log.user[rows], minlength=log.users))
    start = np.concatenate([[0], end[:-1]])
    at = end[:, None] + np.arange(-length, 0)
    padded = np.append(log.item[rows], np.int32(log.items))
    return padded[np.where(at >= start[:, None], at, len(rows))].astype(np.int32)


def _train(log: Interactions, rows: np.ndarray) -> Split:
    inputs = np.stack([log.user[rows], log.item[rows]], axis=1)
    return {"inputs": inputs, "label": log.value[rows], "index": rows.astype(np.int32)}


def _without_unseen(log: Interactions, rows: Rows, unseen: str) -> Rows:
    seen = np.bincount(log.item[rows.train], minlength=log.items) > 0
    validation, test = (part[seen[log.item[part]]] for part in rows[1:3])
    dropped = len(rows.validation) + len(rows.test) - len(validation) - len(test)
    if unseen == "keep" or not dropped:
        return rows
    if unseen == "error":
        held = np.concatenate(rows[1:3])
        first = log.item_names[log.item[held[~seen[log.item[held]]][0]]]
        raise UsageError(
            f"{dropped} held-out interactions are of items without a training row, such as item {first}; set unseen=keep "
            "or drop, or keep popular items only"
        )
    return rows._replace(validation=validation, test=test)


def _distinct(numbers: np.ndarray) -> np.ndarray:
    """The different numbers, rising: `np.unique` by sorting, as its hash table is many times slower on a large log."""
    ordered = np.sort(numbers)
    return ordered[np.append(True, ordered[1:] != ordered[:-1])[: len(ordered)]]


def _ordered(order: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """`rows` in the order in which all rows come in `order` [E]."""
    chosen = np.zeros(len(order), bool)
    chosen[rows] = True
    return order[chosen[order]]


def _new(log: Interactions, rows: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Those of `rows` whose user and item are not among `edges`, rising numbers of pairs."""
    pairs = log.pairs[rows]
    return rows[edges[np.minimum(np.searchsorted(edges, pairs), len(edges) - 1)] != pairs]


def _requests(log: Interactions, rows: np.ndarray, past: np.ndarray) -> Split:
    """A request for each user of `rows` (ordered by user): with `past` [users, L], and as label the items of its rows."""
    rows = rows[np.sort(np.unique(log.pairs[rows], return_index=True)[1])]
    users, first, count = np.unique(log.user[rows], return_index=True, return_counts=True)
    label = np.full((len(users), int(count.max(initial=1))), -1, np.int32)
    label[np.repeat(np.arange(len(users)), count), np.arange(len(rows)) - np.repeat(first, count)] = log.item[rows]
    inputs = np.concatenate([users[:, None], past[users]], axis=1).astype(np.int32)
    return {"inputs": inputs, "label": label, "index": rows[first].astype(np.int32)}


def _negatives(log: Interactions, count: int, users: np.ndarray, seed: int) -> np.ndarray:
    """[all users, count] int32: different items that a user has in no row, for `users`; 0 for the others.

    Floyd's algorithm draws positions among the items not met, for all users at once.
    """
    met = as_lists(*np.divmod(log.pairs, log.items), log.users)
    room = (log.items - np.diff(met.start))[users]
    if count > room.min(initial=log.items):
        name = log.user_names[users[np.argmin(room)]]
        raise UsageError(f"candidates {count} is more than the {room.min()} items that user {name} has not met; lower it")
    rng = np.random.default_rng([seed, 4])
    positions = np.empty((len(users), count), np.int64)
    for n in range(count):
        last = room - count + n
        drawn = rng.integers(0, last + 1)
        taken = (positions[:, :n] == drawn[:, None]).any(axis=1)
        positions[:, n] = np.where(taken, last, drawn)
    negatives = np.zeros((log.users, count), np.int32)
    negatives[users] = _absent(met, users, positions, log.items)
    return negatives


def _absent(met: Lists, users: np.ndarray, n: np.ndarray, items: int) -> np.ndarray:
    """[users, C]: the n-th (from 0) number below `items` that is not in the list of each user.

    The j-th entry of a rising list has `value - j` absent numbers before it; one search finds how many entries have at
    most n, for all users, by a key that rises with the user first.
    """
    counts = np.diff(met.start)
    owner = np.repeat(np.arange(len(counts)), counts)
    before = met.values - (np.arange(len(owner)) - met.start[owner])
    key = owner.astype(np.int64) * (items + 1) + before
    found = np.searchsorted(key, users[:, None].astype(np.int64) * (items + 1) + n, side="right")
    return n + found - met.start[users][:, None]
