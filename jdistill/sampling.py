"""Drawing items for users on device: uniformly among those a user has not met, or from a teacher's ranking of them."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jdistill.pytrees import pytree, static


@pytree
class Lists:
    """A list of numbers for each user, rising, one after the other.

    Attributes:
      start: [U + 1] int32; the list of user u is `values[start[u]:start[u + 1]]`.
      values: [N] int32.
      halvings: after how many halvings nothing is left of the longest list.
    """

    start: Any
    values: Any
    halvings: int = static()


class Ranking(NamedTuple):
    """A teacher's best items of each user among those that the user has not met in training.

    Attributes:
      items: [U, M] int32, the best first.
      scores: [U, M] float32, the teacher's logits of them.
      excluded: for each user the items met in training and the items ranked, together.
      users: [I, M'] int32, of each item the users that score it highest among those who have not met it, the best first;
        None where no loss reads them.
    """

    items: Any
    scores: Any
    excluded: Lists
    users: Any = None


class Known(NamedTuple):
    """What is known of users and items when a batch is drawn.

    Attributes:
      items: the number of items.
      met: for each user the items met in training.
      popularity: [items] int32, training interactions of each item.
      ranking: of the teacher of the term that draws, or None.
      lookup: what the loss made of the others before training (`Loss.lookup`); None where it was not made, or is nothing.
    """

    items: Any
    met: Lists
    popularity: Any
    ranking: Ranking | None = None
    lookup: Any = None


def as_lists(user: np.ndarray, value: np.ndarray, users: int) -> Lists:
    """`Lists` (host arrays) of pairs [N] in any order; repeated pairs count once. `users` is the number of lists."""
    width = int(value.max(initial=0)) + 1
    pairs = np.sort(user.astype(np.int64) * width + value)  # np.unique hashes: several times slower on millions
    pairs = pairs[np.append(True, pairs[1:] != pairs[:-1])[: len(pairs)]]
    start = np.searchsorted(pairs // width, np.arange(users + 1)).astype(np.int32)
    longest = int(np.diff(start).max(initial=0))
    return Lists(start=start, values=(pairs % width).astype(np.int32), halvings=longest.bit_length())


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

    # Unrolled, the chain of look-ups is fused into one another and takes minutes to compile.
    low, _ = jax.lax.fori_loop(0, lists.halvings, halve, (begin, end))
    return (n + low - begin).astype(jnp.int32)


def absent(key: Array, lists: Lists, items: int, user: Array, size: int) -> Array:
    """Items [B, size] int32 drawn uniformly, with replacement, among those not in the list of `user` [B].

    A user whose list holds every item gets the last one.
    """
    count = items - (lists.start[user + 1] - lists.start[user])
    user, count = (jnp.broadcast_to(a[:, None], (a.shape[0], size)) for a in (user, jnp.maximum(count, 1)))
    n = jax.random.randint(key, count.shape, 0, count)
    return jnp.minimum(nth_absent(lists, user, n), items - 1)


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


def contains(lists: Lists, user: Array, value: Array) -> Array:
    """Whether the list of each user holds a number: [...] bool from `user`, `value` of that shape; by bisection."""
    begin, end = lists.start[user], lists.start[user + 1]
    values = lists.values if lists.values.shape[0] else jnp.zeros((1,), jnp.int32)
    last = values.shape[0] - 1

    def halve(_, bounds):
        low, high = bounds
        middle = (low + high) // 2
        below = values[jnp.minimum(middle, last)] < value
        open_ = low < high
        return jnp.where(open_ & below, middle + 1, low), jnp.where(open_ & ~below, middle, high)

    # Unrolled, the chain of look-ups is fused into one another and takes minutes to compile.
    low, _ = jax.lax.fori_loop(0, lists.halvings, halve, (begin, end))
    return (low < end) & (values[jnp.minimum(low, last)] == value)


def uninterested(key: Array, known: Known, item: Array, size: int) -> Array:
    """Users [N, size] int32 drawn uniformly among those who neither met `item` [N] nor stand in its ranking of users.

    Twice as many are drawn from all users, with replacement, and the first `size` that qualify are taken. Where fewer than
    half of the draws qualify, some that do not are among them: rare unless the ranking holds near half of the users.
    """
    assert known.ranking is not None and known.ranking.users is not None
    users = known.met.start.shape[0] - 1
    drawn = jax.random.randint(key, (item.shape[0], 2 * size), 0, users, jnp.int32)
    ranked = (drawn[:, :, None] == known.ranking.users[item][:, None, :]).any(axis=-1)
    unfit = ranked | contains(known.met, drawn, jnp.broadcast_to(item[:, None], drawn.shape))
    return jnp.take_along_axis(drawn, jnp.argsort(unfit, axis=1, stable=True)[:, :size], axis=1)


def without_replacement(key: Array, log_weights: Array, size: int) -> Array:
    """Positions [..., size] int32 drawn without replacement, p ~ exp(log_weights [..., M]): the largest with Gumbel noise."""
    noise = jax.random.gumbel(key, log_weights.shape, log_weights.dtype)
    return jax.lax.top_k(log_weights + noise, size)[1].astype(jnp.int32)


def popularity_groups(popularity: Array, groups: int) -> Array:
    """Of each item the number [items] int32 of its group, 0 the most popular; groups of equal total popularity (UnKD, WSDM'23).

    Items ordered by falling popularity (ties by number) lie one after the other on a line, each as long as it is popular;
    the line is cut into `groups` equal parts, and an item belongs to the part in which it begins. So a total differs from
    equal by less than one item at each end, and an item more popular than a whole part leaves groups empty. Items that
    nobody met are in the last group.
    """
    order = jnp.argsort(-popularity, stable=True)
    ordered = popularity[order]
    before, total = jnp.cumsum(ordered) - ordered, ordered.sum()
    part = jnp.arange(1, groups, dtype=ordered.dtype)
    cuts = part * (total // groups) - (-part * (total % groups) // groups)  # p / groups of the total, rounded up: no overflow
    found = jnp.searchsorted(cuts, before, side="right", method="compare_all")
    return jnp.zeros(popularity.shape, jnp.int32).at[order].set(found.astype(jnp.int32))


def ranked_pairs(key: Array, count: Array, pairs: int, temperature: float | Array) -> tuple[Array, Array]:
    """Two different ranks, the better and the worse [B, pairs] int32, each p ~ exp(-rank / T) on 0 .. count - 1, `count` [B].

    Both are drawn independently, by the inverse of the distribution function, up to eight times until they differ: equal
    ones are left with a probability of 0.4 % where `count` is 2, and below 1e-10 where `count` and T are 20 or more.
    """
    u = jax.random.uniform(key, (8, 2, count.shape[0], pairs))
    count = jnp.maximum(count, 1)[:, None]
    rank = jnp.floor(-temperature * jnp.log1p(u * jnp.expm1(-count / temperature))).astype(jnp.int32)
    rank = jnp.clip(rank, 0, count - 1)
    first = jnp.argmax(rank[:, 0] != rank[:, 1], axis=0)
    rank = jnp.take_along_axis(rank, first[None, None], axis=0)[0]
    return rank.min(axis=0), rank.max(axis=0)
