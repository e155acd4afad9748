"""A population's trees: one leading axis of members on every leaf."""

from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

T = TypeVar("T")


def stack(trees: Sequence[T]) -> T:
    """Trees of one structure as one tree with a leading axis of members; PRNG keys too.

    By way of the host: stacking hundreds of small arrays on the device would compile a program with as many arguments.
    """
    return jax.tree.map(lambda *leaves: _stack(leaves), *trees)


def _stack(leaves: Sequence[Any]) -> Any:
    if jnp.issubdtype(getattr(leaves[0], "dtype", np.dtype(float)), jax.dtypes.prng_key):
        return jax.random.wrap_key_data(_stack([jax.random.key_data(leaf) for leaf in leaves]))
    return jnp.asarray(np.stack([np.asarray(leaf) for leaf in leaves]))


def member(tree: T, index: int) -> T:
    """One member's tree."""
    return jax.tree.map(lambda leaf: leaf[index], tree)


def members(tree: T, indices: Sequence[int] | np.ndarray) -> T:
    """Some members' trees, still stacked."""
    rows = jnp.asarray(np.asarray(indices, np.int32))
    return jax.tree.map(lambda leaf: leaf[rows], tree)


def widened(tree: T, count: int) -> T:
    """The shapes of `count` members stacked, from those of one."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((count, *leaf.shape), leaf.dtype), tree)


@jax.jit
def where(mask: Any, new: T, old: T) -> T:
    """`new` for the members of `mask` [N] bool, `old` for the others."""
    return jax.tree.map(lambda a, b: jnp.where(mask.reshape((-1,) + (1,) * (a.ndim - 1)), a, b), new, old)
