"""What the recommenders share: requests, histories, scores of candidates, and states that hold given arrays."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array

from jdistill.data.base import Schema
from jdistill.errors import UsageError
from jdistill.modules import from_linen
from jdistill.types import Model

Request = dict[str, Array]
"""`user` [B], `history` [S, L], `items` [B, K] | [C] | absent, int32: see `jdistill.types.Batch`."""


BLOCK = 1 << 18  # numbers of item vectors that a CPU looks up at once


def require_interactions(schema: Schema, *, history: bool = False) -> None:
    """Raises `UsageError` for data that are not of users and items, or, with `history`, whose requests bring none."""
    if not (schema.users and schema.items):
        raise UsageError("needs data of users and items, such as data=citeulike; this data has none")
    if history and not schema.history:
        raise UsageError("reads the items that a user met before, and data.history is 0; set data.history=50, say")


def products(user: Array, vectors: Array) -> Array:
    """Inner products of users [B, D] with candidates of their own [B, K, D], or with shared ones [C, D]: [B, K] or [B, C].

    Shared candidates cost one matrix product.
    """
    return jnp.einsum("bd,bkd->bk", user, vectors) if vectors.ndim == 3 else user @ vectors.T


def score(user: Array, table: Array, items: Array | None, bias: Array | None = None) -> tuple[Array, Array]:
    """Inner products of users and items: logits and the candidates' vectors.

    Args:
      user: [B, D].
      table: [n, D], the vectors of all items.
      items: [B, K] candidates of each row, [C] candidates of all rows, or None for the whole catalogue.
      bias: [n], added to the scores, or None.

    Returns:
      logits [B, K], [B, C] or [B, n], and vectors [B, K, D], [C, D] or [n, D].
    """
    vectors = table if items is None else table[items]
    logits = _own_candidates(user, table, items) if vectors.ndim == 3 else products(user, vectors)
    if bias is not None:
        logits = logits + (bias if items is None else bias[items])
    return logits, vectors


@jax.custom_jvp
def _own_candidates(user: Array, table: Array, items: Array) -> Array:
    """`products(user, table[items])` of each row's own candidates [B, K].

    Where nothing is differentiated a CPU looks up the vectors of some rows at a time: those of all rows, if large, are
    memory that the system hands out anew at each call, which costs several times what the products do.
    """
    width = table.shape[1]
    if items.size * width <= 8 * BLOCK:  # the caches hold them
        return _all_at_once(user, table, items)
    rows = max(1, BLOCK // (items.shape[1] * width))

    def by_rows(user: Array, table: Array, items: Array) -> Array:
        return jax.lax.map(lambda row: table[row[1]] @ row[0], (user, items), batch_size=rows)

    return jax.lax.platform_dependent(user, table, items, cpu=by_rows, default=_all_at_once)


def _all_at_once(user: Array, table: Array, items: Array) -> Array:
    return products(user, table[items])


@_own_candidates.defjvp
def _derivative(primals: tuple[Array, ...], tangents: tuple[Array, ...]) -> tuple[Array, Array]:
    user, table, items = primals
    return jax.jvp(lambda user, table: _all_at_once(user, table, items), (user, table), tangents[:2])


def embed(table: Array, history: Array) -> tuple[Array, Array]:
    """Vectors [S, L, D] of a history's items, zeros where it is filled up; and where it holds an item, [S, L] bool."""
    known = history < table.shape[0]
    return jnp.where(known[..., None], table[jnp.where(known, history, 0)], 0), known


def asking(states: Array, rows: int) -> Array:
    """Of the states after each position [S, L, D] those that ask: [rows, D].

    The last of each history where `rows` is S; every one, in the order s L + p, where it is S L.

    Raises:
      UsageError: `rows` is neither.
    """
    sequences, length = states.shape[:2]
    if rows == sequences:
        return states[:, -1]
    if rows == sequences * length:
        return states.reshape(rows, -1)
    raise UsageError(f"a request has {rows} users and histories of shape {(sequences, length)}: neither one a history nor all")


def pooled(vectors: Array, counted: Array | None, rows: int) -> Array:
    """The sum [rows, D] of what a history holds up to the position that asks; the mean where `counted` is given.

    Args:
      vectors: [S, L, D], zeros where the history is filled up.
      counted: [S, L] bool, the positions that a mean counts; the mean of none is 0. None for the sum.
      rows: S or S L, see `asking`.
    """
    if rows == vectors.shape[0]:  # not by cumulative sums, which cost memory and round more
        total = jnp.sum(vectors, 1)
        return total if counted is None else total / jnp.maximum(jnp.sum(counted, 1), 1)[:, None]
    total = jnp.cumsum(vectors, 1)
    if counted is not None:
        total = total / jnp.maximum(jnp.cumsum(counted, 1), 1)[..., None]
    return asking(total, rows)


def holding(module: nn.Module, collection: str, arrays: dict[str, np.ndarray]) -> Model:
    """The `Model` of a Linen module whose state `collection` starts as `arrays`, where the module alone puts zeros.

    The state travels with the parameters and is never trained; a program compiled for some arrays serves others of their
    shapes.
    """
    model = from_linen(module)
    if not arrays:
        return model

    def init(key, inputs):
        params, state = model.init(key, inputs)
        return params, {**state, collection: {name: jnp.array(array) for name, array in arrays.items()}}

    return model._replace(init=init)
