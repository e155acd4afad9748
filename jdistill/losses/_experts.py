"""A mixture of small networks (experts), each row's drawn by a selection network: what DE and HTD rebuild the teacher with.

Nearly all of their time goes here. As the temperature falls a row's weights come to lie on one or two experts; from there on
the rows are sorted by expert and each expert sees its own, which is M / FEW times less work and the same result to rounding.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from jdistill.losses import _layers
from jdistill.types import PyTree

EPSILON = 1e-10
FEW = (2, 4)  # experts of a row that the sorted forms keep
BLOCK = 128  # rows of one expert that are multiplied at once


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
    few = [count for count in FEW if 2 * count < z.shape[-1]]
    if not few:
        return all_experts(experts, f_s, z)
    # What a count leaves out, and its share of a gradient through z, has to be below rounding in every row.
    heaviest = jax.lax.top_k(z, few[-1] + 1)[0].max(axis=0)
    too_few = [heaviest[count] > jnp.finfo(z.dtype).eps * jnp.minimum(temperature, 1) for count in few]
    forms = [jax.checkpoint(partial(few_experts, count=count)) for count in few]
    return jax.lax.switch(sum(too_few), [*forms, all_experts], experts, f_s, z)


def all_experts(experts: PyTree, f_s: Array, z: Array) -> Array:
    """The mixture with every expert applied to every row; one after the other, which is quicker than all at once."""

    @jax.checkpoint
    def add(made: Array, one: tuple[PyTree, Array]) -> tuple[Array, None]:
        expert, weight = one
        hidden = jax.nn.relu(f_s @ expert["in_kernel"] + expert["in_bias"])
        return made + (weight[:, None] * hidden) @ expert["out_kernel"], None

    return jax.lax.scan(add, z @ experts["out_bias"], (experts, z.T))[0]


def few_experts(experts: PyTree, f_s: Array, z: Array, count: int) -> Array:
    """The mixture of each row's `count` heaviest experts, rows sorted by expert."""
    weight, chosen = jax.lax.top_k(z, count)
    pair, block = _sorted_by_expert(chosen.reshape(-1), z.shape[-1])
    row, pad = pair // count, pair == chosen.size
    x = jnp.where(pad[:, None], 0, f_s.at[row].get(mode="clip")).reshape(len(block), BLOCK, -1)
    w = jnp.where(pad, 0, weight.reshape(-1).at[pair].get(mode="clip")).reshape(len(block), BLOCK, 1)
    hidden = jax.nn.relu(jnp.einsum("pbd,pdh->pbh", x, experts["in_kernel"][block]) + experts["in_bias"][block][:, None])
    made = jnp.einsum("pbh,phd->pbd", w * hidden, experts["out_kernel"][block]).reshape(len(pair), -1)
    return (z @ experts["out_bias"]).at[row].add(made, mode="drop")


def _sorted_by_expert(chosen: Array, experts: int) -> tuple[Array, Array]:
    """Pairs [P] in blocks of one expert each, `len(chosen)` where a block is not full, and the expert of each block."""
    size = len(chosen)
    blocks = -(-size // BLOCK) + experts
    count = jnp.zeros(experts, jnp.int32).at[chosen].add(1)
    used = -(-count // BLOCK)
    order = jnp.argsort(chosen)
    first = jnp.cumsum(count) - count
    place = (jnp.cumsum(used) - used)[chosen[order]] * BLOCK + jnp.arange(size) - first[chosen[order]]
    pairs = jnp.full(blocks * BLOCK, size, order.dtype).at[place].set(order)
    block = jnp.searchsorted(jnp.cumsum(used), jnp.arange(blocks), side="right")
    return pairs, jnp.minimum(block, experts - 1)
