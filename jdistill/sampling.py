"""Drawing items for users on device: uniformly among those a user has not met, or from a teacher's ranking of them."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


class Lists(NamedTuple):
    """A list of numbers for each user, rising, one after the other.

    Attributes:
      start: [U + 1] int32; the list of user u is `values[start[u]:start[u + 1]]`.
      values: [N] int32.
    """

    start: Any
    values: Any


class Ranking(NamedTuple):
    """A teacher's best items of each user among those that the user has not met in training.

    Attributes:
      items: [U, M] int32, the best first.
      scores: [U, M] float32, the teacher's logits of them.
      excluded: for each user the items met in training and the items ranked, together.
      users: [I, M'] int32, of each item the users that score it highest among those who have not met it, the best first;
        None where no loss reads them.
    """

    items: Array
    scores: Array
    excluded: Lists
    users: Array | None = None


class Known(NamedTuple):
    """What is known of users and items when a batch is drawn.

    Attributes:
      items: the number of items.
      met: for each user the items met in training.
      popularity: [items] int32, training interactions of each item.
      ranking: of the teacher of the term that draws, or None.
    """

    items: int
    met: Lists
    popularity: Array
    ranking: Ranking | None = None


def as_lists(user: np.ndarray, value: np.ndarray, users: int) -> Lists:
    """`Lists` (host arrays) of pairs [N] in any order; repeated pairs count once. `users` is the number of lists."""
    width = int(value.max(initial=0)) + 1
    pairs = np.unique(user.astype(np.int64) * width + value)
    start = np.searchsorted(pairs // width, np.arange(users + 1)).astype(np.int32)
    return Lists(start, (pairs % width).astype(np.int32))


def nth_absent(lists: Lists, user: Array, n: Array) -> Array:
    """The n-th number (from 0) that is not in the list of each user: [...] int32 from `user`, `n` of that shape.

    In a rising list the j-th entry has `value - j` absent numbers before it; a bisection finds the first entry that has
    more than n. So a uniform n < items - length gives a uniform absent item, without rejection.
    """
    begin, end = lists.start[user], lists.start[user + 1]
    values = lists.values if lists.values.shape[0] else jnp.zeros((1,), jnp.int32)

    def halve(_, bounds):
        low, high = bounds
        middle = (low + high) // 2
        enough = values[jnp.minimum(middle, values.shape[0] - 1)] - (middle - begin) > n
        open_ = low < high
        return jnp.where(open_ & ~enough, middle + 1, low), jnp.where(open_ & enough, middle, high)

    steps = max(1, int(np.ceil(np.log2(values.shape[0] + 1))))
    low, _ = jax.lax.fori_loop(0, steps, halve, (begin, end), unroll=True)
    return (n + low - begin).astype(jnp.int32)


def absent(key: Array, lists: Lists, items: int, user: Array, size: int) -> Array:
    """Items [B, size] int32 drawn uniformly, with replacement, among those not in the list of `user` [B].

    A user whose list holds every item gets item 0.
    """
    count = items - (lists.start[user + 1] - lists.start[user])
    user, count = (jnp.broadcast_to(a[:, None], (a.shape[0], size)) for a in (user, jnp.maximum(count, 1)))
    n = jnp.floor(jax.random.uniform(key, count.shape) * count).astype(jnp.int32)
    return jnp.minimum(nth_absent(lists, user, jnp.minimum(n, count - 1)), items - 1)


def unobserved(key: Array, known: Known, user: Array, size: int) -> Array:
    """Items [B, size] int32 drawn uniformly, with replacement, among those that `user` [B] has not met in training."""
    return absent(key, known.met, known.items, user, size)


def uninteresting(key: Array, known: Known, user: Array, size: int) -> Array:
    """As `unobserved`, among the items that the teacher's ranking does not hold either."""
    assert known.ranking is not None
    return absent(key, known.ranking.excluded, known.items, user, size)


def top_positions(key: Array, rows: int, depth: int, size: int, temperature: float | Array) -> Array:
    """Positions [rows, size] int32, rising, drawn without replacement from 0 .. depth - 1 with p ~ exp(-position / T).

    By the largest of log p + Gumbel noise; `temperature` T > 0.
    """
    noisy = jax.random.gumbel(key, (rows, depth)) - jnp.arange(depth) / temperature
    return jnp.sort(jax.lax.top_k(noisy, size)[1], axis=-1).astype(jnp.int32)


def interesting(key: Array, known: Known, user: Array, size: int, temperature: float | Array) -> Array:
    """Items [B, size] int32 that the teacher ranks high, drawn by `top_positions`, in the teacher's order, best first."""
    assert known.ranking is not None
    items = known.ranking.items
    positions = top_positions(key, user.shape[0], items.shape[1], size, temperature)
    return jnp.take_along_axis(items[user], positions, axis=1)


def first_occurrence(ids: Array) -> Array:
    """[N] bool: whether an entry of `ids` [N] int32 is the first of its value. The sum over them is that over unique ids."""
    order = jnp.argsort(ids, stable=True)
    ordered = ids[order]
    new = jnp.concatenate([jnp.ones((1,), bool), ordered[1:] != ordered[:-1]])
    return jnp.zeros(ids.shape, bool).at[order].set(new)
