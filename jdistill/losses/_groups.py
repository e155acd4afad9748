"""Cosines within groups of users or items, which most pairs are not in: what HTD compares."""

import jax
import jax.numpy as jnp
from jax import Array, lax

from jdistill.losses import _layers

BLOCK = 128  # rows that meet as many others at once


@jax.custom_vjp
def within_groups(s: Array, t: Array, group: Array) -> Array:
    """Sum of (s_i . s_j - t_i . t_j)^2 over ordered pairs of rows of one group with t_i . t_j > 0; a gradient reaches s alone.

    Rows of `s` [N, D_s] and `t` [N, D_t] have length 1, or 0 where they do not count; `group` [N] is of integers. A CPU does
    the work of the pairs that are in one group, in the memory of a few tables; others form matrices [N, N], as one large
    product should cost less there than a loop over small ones (not measured).
    """
    return _forward(s, t, group)[0]


def _forward(s: Array, t: Array, group: Array) -> tuple[Array, Array]:
    return lax.platform_dependent(s, t, group, cpu=by_blocks, default=all_pairs)


within_groups.defvjp(_forward, lambda gradient, g: (g * gradient, None, None))


def all_pairs(s: Array, t: Array, group: Array) -> tuple[Array, Array]:
    """`within_groups` and its derivative [N, D_s] by s, by matrices [N, N]."""
    apart = _apart(s, t, group, s, t, group)
    return (apart**2).sum(), 4 * _layers.gram(apart, s.T)


def by_blocks(s: Array, t: Array, group: Array) -> tuple[Array, Array]:
    """`all_pairs` of rows sorted by group, where a block of rows meets those blocks alone that hold its groups."""
    rows, order = len(s), jnp.argsort(group)
    count = -(-rows // BLOCK)
    filled = count * BLOCK - rows  # with rows of 0, in the last group
    s_b, t_b, group_b = (
        jnp.pad(x[order], [(0, filled), *[(0, 0)] * (x.ndim - 1)], mode).reshape(count, BLOCK, *x.shape[1:])
        for x, mode in ((s, "constant"), (t, "constant"), (group, "edge"))
    )
    first = jnp.searchsorted(group_b[:, -1], group_b[:, 0], side="left")
    beyond = jnp.searchsorted(group_b[:, 0], group_b[:, -1], side="right")

    def meet_all(total: Array, own: tuple[Array, ...]) -> tuple[Array, Array]:
        own_s, own_t, own_group, start, end = own

        def meet(other: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            total, gradient = carry
            apart = _apart(own_s, own_t, own_group, s_b[other], t_b[other], group_b[other])
            return total + (apart**2).sum(), gradient + _layers.gram(apart, s_b[other].T)

        return lax.fori_loop(start, end, meet, (total, jnp.zeros_like(own_s)))

    total, gradient = lax.scan(meet_all, jnp.zeros((), s.dtype), (s_b, t_b, group_b, first, beyond))
    return total, jnp.zeros_like(s).at[order].set(4 * gradient.reshape(-1, s.shape[1])[:rows])


def _apart(s: Array, t: Array, group: Array, others_s: Array, others_t: Array, others_group: Array) -> Array:
    """s_i . s_j - t_i . t_j of rows and others [N, M], 0 of pairs that do not count."""
    cosines = _layers.gram(t, others_t)
    near = (group[:, None] == others_group) & (cosines > 0)
    return jnp.where(near, _layers.gram(s, others_s) - cosines, 0)
