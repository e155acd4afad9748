"""A mixture of small networks (experts), each row's drawn by a selection network: what DE and HTD rebuild the teacher with.

Nearly all of their time goes here. As the temperature falls a row's weights come to lie on few experts; from there on the
rows are sorted by expert and each expert sees its own, which is M / PAIRS times less work and the same result to rounding.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from jdistill.losses import _layers
from jdistill.types import PyTree

EPSILON = 1e-10
PAIRS = (1.25, 2, 4)  # experts of a row, in the mean over rows, that the sorted forms have room for
BLOCK = 64  # rows of one expert that are multiplied at once


def init_experts(key: Array, f_s: Array, f_t: Array, experts: int, hidden: int) -> PyTree:
    """`selection` (`kernel` [D_t, M], `bias` [M]) and M experts: `in_kernel` [M, D_s, H], `in_bias` [M, H], `out_kernel`
    [M, H, D_t], `out_bias` [M, D_t], drawn as torch draws linear layers.
    """
    d_s, d_t, dtype = f_s.shape[-1], f_t.shape[-1], jnp.promote_types(f_s.dtype, jnp.float32)
    keys = jax.random.split(key, 5)
    return {
        "selection": _layers.init_linear(keys[0], f_t, experts),
        "in_kernel": _layers.uniform(keys[1], (experts, d_s, hidden), d_s, dtype),
        "in_bias": _layers.uniform(keys[2], (experts, hidden), d_s, dtype),
        "out_kernel": _layers.uniform(keys[3], (experts, hidden, d_t), hidden, dtype),
        "out_bias": _layers.uniform(keys[4], (experts, d_t), hidden, dtype),
    }


def shares(params: PyTree, f_t: Array) -> Array:
    """alpha [..., M]: which experts the selection network sends entities [..., D_t] to."""
    return jax.nn.softmax(_layers.linear(params["selection"], f_t))


def draw(params: PyTree, key: Array, f_t: Array, temperature: float | Array) -> Array:
    """z [N, M] = softmax((log(alpha + 1e-10) + g) / tau), g of Gumbel noise."""
    alpha = shares(params, f_t)
    noisy = jnp.log(alpha + EPSILON) + jax.random.gumbel(key, alpha.shape, alpha.dtype)
    # Less the largest before dividing: at 1e-10 this is the choice of the largest, and stays finite.
    return jax.nn.softmax((noisy - jax.lax.stop_gradient(noisy.max(axis=-1, keepdims=True))) / temperature)


def mixture(params: PyTree, f_s: Array, z: Array, temperature: float | Array) -> Array:
    """sum_m z_m E_m(s) [N, D_t], of rows [N, D_s] and weights z [N, M]."""
    experts = {name: params[name] for name in ("in_kernel", "in_bias", "out_kernel", "out_bias")}
    rows, count = z.shape
    sizes = [math.ceil(share * rows) for share in PAIRS if 2 * share < count]
    if not sizes:
        return all_experts(experts, f_s, z)
    # What is left out of a row, and its share of a gradient through z, has to be below rounding.
    heavy = z > jnp.finfo(z.dtype).eps * jnp.minimum(temperature, 1)
    too_small = (jnp.asarray(sizes) < heavy.sum()).sum()
    forms = [jax.checkpoint(partial(heavy_experts, heavy=heavy, size=size)) for size in sizes]
    return jax.lax.switch(too_small, [*forms, all_experts], experts, f_s, z)


def all_experts(experts: PyTree, f_s: Array, z: Array) -> Array:
    """The mixture with every expert applied to every row; one after the other, which is quicker than all at once."""

    @jax.checkpoint
    def add(made: Array, one: tuple[PyTree, Array]) -> tuple[Array, None]:
        expert, weight = one
        hidden = jax.nn.relu(f_s @ expert["in_kernel"] + expert["in_bias"])
        return made + (weight[:, None] * hidden) @ expert["out_kernel"], None

    return jax.lax.scan(add, z @ experts["out_bias"], (experts, z.T))[0]


def heavy_experts(experts: PyTree, f_s: Array, z: Array, heavy: Array, size: int) -> Array:
    """The mixture of the pairs of a row and an expert that are `heavy` [N, M], at most `size` of them, sorted by expert."""
    rows = len(z)
    pair, block = _sorted_by_expert(heavy, size)
    row = jnp.where(pair < heavy.size, pair % rows, rows)  # one beyond the last where a block is not full
    x = f_s.at[row].get(mode="fill", fill_value=0).reshape(len(block), BLOCK, -1)
    w = z.T.reshape(-1).at[pair].get(mode="fill", fill_value=0).reshape(len(block), BLOCK, 1)
    hidden = jax.nn.relu(jnp.einsum("pbd,pdh->pbh", x, experts["in_kernel"][block]) + experts["in_bias"][block][:, None])
    made = jnp.einsum("pbh,phd->pbd", w * hidden, experts["out_kernel"][block]).reshape(len(pair), -1)
    return (z @ experts["out_bias"]).at[row].add(made, mode="drop")


def _sorted_by_expert(heavy: Array, size: int) -> tuple[Array, Array]:
    """Pairs expert * N + row [P] in blocks of one expert each, N * M where a block is not full, and each block's expert."""
    rows, count = heavy.shape
    pair = jnp.nonzero(heavy.T.reshape(-1), size=size, fill_value=heavy.size)[0]
    expert = jnp.minimum(pair // rows, count - 1)
    held = heavy.sum(axis=0)
    used = -(-held // BLOCK)
    blocks = -(-size // BLOCK) + count
    place = ((jnp.cumsum(used) - used) * BLOCK - (jnp.cumsum(held) - held))[expert] + jnp.arange(size)
    # Those that only fill `pair` up go behind the last expert's, where nothing is.
    pairs = jnp.full(blocks * BLOCK, heavy.size, pair.dtype).at[place].set(pair, mode="drop")
    block = jnp.searchsorted(jnp.cumsum(used), jnp.arange(blocks), side="right")
    return pairs, jnp.minimum(block, count - 1)
