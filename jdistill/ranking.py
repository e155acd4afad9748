"""Ranking the whole catalogue for many users: scores, exclusions and the best items, chunk by chunk on device."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jdistill.data import Dataset
from jdistill.sampling import Lists, Ranking, as_lists
from jdistill.types import Model, PyTree

SCORES = 1 << 23
"""Scores held at a time (32 MB): a chunk of users times a chunk of items."""
CATALOGUE = 1 << 18
"""A larger catalogue is scored in chunks of so many items."""


class Ranked(NamedTuple):
    """The best items for each of M requests: `items` [M, N] int32, the best first, -1 where there are fewer; `scores`."""

    items: np.ndarray
    scores: np.ndarray


@functools.lru_cache(maxsize=8)
def met_in_training(dataset: Dataset) -> Lists:
    """For each user the items met in training (host arrays)."""
    pairs = dataset.train["inputs"]
    return as_lists(pairs[:, 0], pairs[:, 1], dataset.schema.users)


@functools.lru_cache(maxsize=8)
def popularity(dataset: Dataset) -> np.ndarray:
    """[items] int32: how many users have met each item in training."""
    return np.bincount(met_in_training(dataset).values, minlength=dataset.schema.items).astype(np.int32)


@functools.lru_cache(maxsize=8)
def excluded_from(dataset: Dataset, split: str) -> Lists:
    """For each row of a split the items that are not to be recommended.

    Those met in training and, for the test, in validation; of a user without training rows, those of the request's history.
    """
    requests = getattr(dataset, split)["inputs"]
    users = requests[:, 0]
    parts = [_lists_of_rows(met_in_training(dataset), users)]
    cold = np.diff(met_in_training(dataset).start)[users] == 0
    rows, column = np.nonzero(cold[:, None] & (requests[:, 1:] < dataset.schema.items))
    parts.append((rows, requests[rows, 1 + column]))
    if split == "test" and len(dataset.validation["label"]):
        rows, column = np.nonzero(dataset.validation["label"] >= 0)
        held = as_lists(dataset.validation["inputs"][rows, 0], dataset.validation["label"][rows, column], dataset.schema.users)
        parts.append(_lists_of_rows(held, users))
    pairs = [np.concatenate(arrays) for arrays in zip(*parts, strict=True)]
    return as_lists(pairs[0], pairs[1], len(users))


def _lists_of_rows(lists: Lists, users: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(row [E], value [E]) of the lists of `users` [M]."""
    lengths = lists.start[users + 1] - lists.start[users]
    rows = np.repeat(np.arange(len(users)), lengths)
    within = np.arange(len(rows)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return rows, lists.values[lists.start[users][rows] + within]


def rank_split(model: Model, dataset: Dataset, variables: tuple[PyTree, PyTree], split: str, size: int) -> Ranked:
    """The best `size` items for each row of a split, among its candidates where it has them."""
    rows = getattr(dataset, split)
    if "candidates" in rows:
        return _among(model, dataset, variables, rows, size)
    excluded = excluded_from(dataset, split)
    return rank(model, dataset, variables, rows["inputs"], excluded, size)


def rank(
    model: Model, dataset: Dataset, variables: tuple[PyTree, PyTree], raw: np.ndarray, excluded: Lists, size: int
) -> Ranked:
    """The best `size` items of the catalogue for requests [M, 1 + L] int32, without those `excluded` for each row."""
    items = dataset.schema.items
    size, width = min(size, items), min(items, CATALOGUE)
    rows = max(1, min(len(raw), 1024, SCORES // width))
    merge = _best(model, dataset.preprocess, size, width, items)
    room = _room(excluded, rows)
    found = []
    for start in range(0, len(raw), rows):
        chunk = raw[start : start + rows]
        padded = np.concatenate([chunk, np.repeat(chunk[:1], rows - len(chunk), axis=0)])
        row, item = _pairs(excluded, start, len(chunk), room)
        best = (np.full((rows, size), -np.inf, np.float32), np.full((rows, size), -1, np.int32))
        for first in range(0, items, width):
            best = merge(*variables, padded, row, item, *best, np.int32(first))
        found.append((best, len(chunk)))
    if not found:
        return Ranked(np.zeros((0, size), np.int32), np.zeros((0, size), np.float32))
    scores, best_items = (np.concatenate([np.asarray(best[i])[:n] for best, n in found]) for i in (0, 1))
    return Ranked(np.where(np.isfinite(scores), best_items, -1), scores)


@functools.lru_cache(maxsize=64)
def _best(model: Model, preprocess: Callable[[Any], Any], size: int, width: int, items: int) -> Callable[..., Any]:
    """Compiled merge of the best so far with the best of the items `first` to `first + width`."""

    def merge(params, state, raw, row, item, scores, best, first):
        request = preprocess(raw)
        if width < items:
            request = {**request, "items": jnp.minimum(first + jnp.arange(width), items - 1)}
        logits = model.apply(params, state, request, train=False)[0].logits.astype(jnp.float32)
        place = jnp.where(item >= first, item - first, width)  # a negative place would count from the end
        logits = logits.at[row, place].set(-jnp.inf, mode="drop")
        if width < items:
            logits = jnp.where(first + jnp.arange(width) < items, logits, -jnp.inf)
        top, where = jax.lax.top_k(logits, min(size, width))
        every = jnp.concatenate([scores, top], axis=1), jnp.concatenate([best, where + first], axis=1)
        top, where = jax.lax.top_k(every[0], size)
        return top, jnp.take_along_axis(every[1], where, axis=1)

    return jax.jit(merge)


def _room(lists: Lists, rows: int) -> int:
    """The room that the exclusions of any chunk of `rows` rows need, rounded up so that few shapes are compiled."""
    ends = np.append(lists.start[::rows], lists.start[-1])
    return 1 << int(np.ceil(np.log2(max(1, np.diff(ends).max(initial=1)))))


def _pairs(lists: Lists, start: int, count: int, room: int) -> tuple[np.ndarray, np.ndarray]:
    """Exclusions of `count` rows from `start` as (row in the chunk, item), filled with an item out of range."""
    starts = lists.start[start : start + count + 1]
    row, item = np.zeros(room, np.int32), np.full(room, np.iinfo(np.int32).max, np.int32)
    length = int(starts[-1] - starts[0])
    row[:length] = np.repeat(np.arange(count, dtype=np.int32), np.diff(starts))
    item[:length] = lists.values[starts[0] : starts[-1]]
    return row, item


def _among(model: Model, dataset: Dataset, variables: tuple[PyTree, PyTree], rows: Any, size: int) -> Ranked:
    """Ranking of the first relevant item among the row's candidates; it stands last, so that ties count against it."""
    candidates = np.concatenate([rows["candidates"], rows["label"][:, :1]], axis=1).astype(np.int32)
    call, chunk = _scores(model, dataset.preprocess), 512
    out = []
    for start in range(0, len(candidates), chunk):
        part = slice(start, start + chunk)
        raw, own = rows["inputs"][part], candidates[part]
        missing = chunk - len(own)
        raw, own = (np.concatenate([a, np.repeat(a[:1], missing, axis=0)]) for a in (raw, own))
        out.append(np.asarray(call(*variables, raw, own))[: chunk - missing])
    scores = np.concatenate(out) if out else np.zeros(candidates.shape, np.float32)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :size]
    return Ranked(np.take_along_axis(candidates, order, axis=1), np.take_along_axis(scores, order, axis=1))


@functools.lru_cache(maxsize=64)
def _scores(model: Model, preprocess: Callable[[Any], Any]) -> Callable[..., Any]:
    def scores(params, state, raw, items):
        return model.apply(params, state, {**preprocess(raw), "items": items}, train=False)[0].logits.astype(jnp.float32)

    return jax.jit(scores)


def teacher_ranking(model: Model, dataset: Dataset, variables: tuple[PyTree, PyTree], depth: int, users: int = 0) -> Ranking:
    """A teacher's ranking of what each user has not met in training: `depth` items of each user, `users` of each item.

    Where fewer items are left, the last of them is repeated (with a score of -inf); item 0 where none is left.
    """
    met, schema = met_in_training(dataset), dataset.schema
    raw = requests_of_all(dataset)
    found = rank(model, dataset, variables, raw, met, depth)
    row, column = np.nonzero(found.items >= 0)
    known = _lists_of_rows(met, np.arange(schema.users))
    excluded = as_lists(np.concatenate([known[0], row]), np.concatenate([known[1], found.items[row, column]]), schema.users)
    last = np.maximum((found.items >= 0).sum(axis=1, keepdims=True) - 1, 0)
    items = np.where(found.items >= 0, found.items, np.maximum(np.take_along_axis(found.items, last, axis=1), 0))
    best_users = _best_users(model, dataset, variables, raw, met, users) if users else None
    return jax.tree.map(jnp.asarray, Ranking(items, found.scores, excluded, best_users))


def requests_of_all(dataset: Dataset) -> np.ndarray:
    """Raw requests [users, 1 + L] int32 of every user, as they stand at the end of training."""
    users = np.arange(dataset.schema.users, dtype=np.int32)[:, None]
    return np.concatenate([users, dataset.tables["sequence"][:, 1:]], axis=1) if dataset.schema.history else users


def _best_users(
    model: Model, dataset: Dataset, variables: tuple[PyTree, PyTree], raw: np.ndarray, met: Lists, size: int
) -> np.ndarray:
    """The `size` users [items, size] int32 that score each item highest among those who have not met it."""
    schema, size = dataset.schema, min(size, dataset.schema.users)
    width = max(1, min(schema.items, SCORES // schema.users))
    call, out = _scores(model, dataset.preprocess), []
    row, item = _lists_of_rows(met, np.arange(schema.users))
    for first in range(0, schema.items, width):
        own = np.minimum(first + np.arange(width, dtype=np.int32), schema.items - 1)
        within = (item >= first) & (item < first + width)
        scores = np.array(call(*variables, raw, own))
        scores[row[within], item[within] - first] = -np.inf
        out.append(np.asarray(jax.lax.top_k(jnp.asarray(scores.T), size)[1]))
    return np.concatenate(out)[: schema.items].astype(np.int32)
