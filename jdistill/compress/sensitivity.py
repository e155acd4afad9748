"""Mixed precision: each layer has as many bits as it needs, found from the weights alone."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jdistill.compress.base import chosen_weights
from jdistill.compress.quantize import Rounding, grouped, symmetric
from jdistill.errors import UsageError
from jdistill.pytrees import pytree, require_positive, static
from jdistill.registry import register
from jdistill.types import PyTree

WIDTHS = (8, 4, 2)
"""The bits that a layer can have."""


@register("compression", "mixed_precision")
@pytree
class MixedPrecision(Rounding):
    """Symmetric integer weights of 8, 4 or 2 bits, chosen for each layer so that their mean is at most `mean_bits`.

    A layer's sensitivity is its quantization noise, |w - rounded w|^2 / |w|^2: how large an error its outputs get, in
    relation to them, by these bits (Lin et al. 2016, arXiv:1511.06393, section 3). All layers begin with 8 bits; one after
    the other, the layer whose step to the next fewer bits adds the least noise for each bit of the file that it saves takes
    that step, until the mean over all weights is small enough. No data and no labels are needed.

    Attributes:
      mean_bits: the largest mean of bits over weights, from 2 to 8.
      granularity: `channel`, one scale for each output channel (last axis); `tensor`, one for the whole leaf (also called
        global); `group`, one for each `group_size` inputs of a channel (also called local).
      group_size: inputs that share a scale, of all axes but the last taken as one; the last group may have fewer.
      only: patterns of the leaves to quantize, such as `fc1/*,item`; empty for all weights. Others do not count in the mean.
      recover_epochs: epochs of further training with rounded weights.
    """

    mean_bits: float = 4.0
    recover_epochs: int = static(default=5)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(mean_bits=self.mean_bits)
        if isinstance(self.mean_bits, int | float) and not min(WIDTHS) <= self.mean_bits <= max(WIDTHS):
            raise UsageError(f"mean_bits must be from {min(WIDTHS)} to {max(WIDTHS)}, got {self.mean_bits!r}")

    def init(self, key: Array, params: PyTree) -> PyTree:
        """Bits [] int32 by name of the weight."""
        del key
        own = chosen_weights(params, self.only)
        noise = jnp.stack([self._noise(w) for w in own.values()])
        bits = allocate(noise, jnp.array([float(w.size) for w in own.values()]), self.mean_bits)
        return dict(zip(own, bits, strict=True))

    def _noise(self, w: Array) -> Array:
        """The relative squared error [3] of a leaf under each of `WIDTHS`."""
        groups = grouped(w, self.granularity, self.group_size)
        total = jnp.maximum(jnp.sum(jnp.square(groups)), jnp.finfo(w.dtype).tiny)
        rounded = [jnp.multiply(*symmetric(groups, 2 ** (bits - 1) - 1)) for bits in WIDTHS]
        return jnp.stack([jnp.sum(jnp.square(groups - value)) / total for value in rounded])

    def levels(self, name: str, state: PyTree) -> Any:
        return 2 ** (state[name] - 1) - 1 if name in state else None


def allocate(noise: Array, sizes: Array, mean_bits: Array | float) -> Array:
    """Bits [layers] int32, by the least noise for each bit saved.

    Args:
      noise: [layers, 3] of each layer with 8, 4 and 2 bits.
      sizes: [layers] float32, weights of each layer.
      mean_bits: the bound on `sum(sizes * bits) / sum(sizes)`.
    """
    widths, rows = jnp.array(WIDTHS), jnp.arange(len(sizes))
    budget = mean_bits * jnp.sum(sizes) * (1 + 1e-6)  # sums of float32

    def step(_: Any, level: Array) -> Array:
        following = jnp.minimum(level + 1, len(WIDTHS) - 1)
        saved = (widths[level] - widths[following]) * sizes
        price = (noise[rows, following] - noise[rows, level]) / jnp.maximum(saved, 1)
        cheapest = jnp.argmin(jnp.where(saved > 0, price, jnp.inf))
        over = jnp.sum(widths[level] * sizes) > budget
        return level.at[cheapest].set(jnp.where(over, following[cheapest], level[cheapest]))

    level = jax.lax.fori_loop(0, (len(WIDTHS) - 1) * len(sizes), step, jnp.zeros(len(sizes), jnp.int32))
    return widths[level]
