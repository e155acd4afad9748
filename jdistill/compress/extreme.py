"""Weights of one bit and of three values, which are trained: rounding them afterwards ruins a network."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jdistill.compress.base import WEIGHT, Compressor, Quantized, chosen, chosen_weights, map_named, weights
from jdistill.compress.quantize import grouped, integers_of, straight_through, ungrouped
from jdistill.pytrees import pytree, require_nonnegative, require_one_of, static
from jdistill.registry import register
from jdistill.types import PyTree


@pytree
class Signed(Compressor):
    """What binary and ternary weights share: a scale for each group, times -1, 0 or 1.

    Attributes:
      granularity: `channel`, one scale for each output channel (last axis); `tensor`, one for the whole leaf.
      only: patterns of the leaves to quantize, such as `fc2/*,stage*`; empty for all weights.
      recover_epochs: epochs of further training with such weights.
    """

    granularity: str = static(default="channel")
    only: str = static(default="")
    recover_epochs: int = static(default=5)

    def __post_init__(self) -> None:
        require_one_of(("channel", "tensor"), granularity=self.granularity)
        require_nonnegative(recover_epochs=self.recover_epochs)

    def init(self, key: Array, params: PyTree) -> PyTree:
        """No state: scales follow the weights."""
        del key
        chosen_weights(params, self.only)
        return {}

    def signs(self, groups: Array) -> Array:
        """-1, 0 or 1 for each weight of `groups` [1, members, outputs]."""
        raise NotImplementedError

    def passed(self, w: Array) -> Array:
        """The weights whose gradient goes straight through; others get none."""
        return w

    def constrain(self, params: PyTree, state: PyTree) -> PyTree:
        del state
        own = weights(params, self.only)

        def rounded(name: str, w: Array) -> Array:
            if name not in own:
                return w
            groups = grouped(w, self.granularity)
            signs = self.signs(groups)
            used = jnp.abs(signs)
            total = jnp.sum(jnp.abs(groups) * used, axis=1, keepdims=True)
            scale = total / jnp.maximum(jnp.sum(used, axis=1, keepdims=True), 1)
            return straight_through(self.passed(w), ungrouped(signs * scale, w.shape))

        return map_named(rounded, params)

    def finalize(self, name: str, value: np.ndarray | Quantized, state: PyTree) -> np.ndarray | Quantized:
        """One bit for each weight where none is zero, save in channels of zeros alone; else -1, 0 and 1."""
        del state
        if isinstance(value, Quantized) or not (WEIGHT.search(name) and value.ndim >= 2 and chosen(name, self.only)):
            return value
        found = integers_of(grouped(value, self.granularity), 1)
        if found is None:
            return value
        q, scale = found
        scale = np.where(np.any(q, axis=1, keepdims=True), scale, 0).astype(np.float32)
        shape = (*[1] * (value.ndim - 1), -1)
        if not np.all((q != 0) | (scale == 0)):
            return Quantized(ungrouped(q, value.shape), scale.reshape(shape))
        return Quantized(ungrouped(q > 0, value.shape).astype(np.uint8), 2 * scale.reshape(shape), -scale.reshape(shape))


@register("compression", "binary")
@pytree
class Binary(Signed):
    """Weights of one bit: `w = mean|w| * sign(w)`, trained through the signs.

    BinaryConnect (Courbariaux et al. 2015, arXiv:1511.00363) with the scale of XNOR-Net (Rastegari et al. 2016,
    arXiv:1603.05279, section 3.1). Weights outside [-1, 1] get no gradient. Weights that are exactly zero, as pruned ones are,
    stay zero and do not count in the mean; a leaf that has such takes more than one bit a weight. Biases stay float32.

    Attributes:
      granularity: `channel`, one scale for each output channel (last axis); `tensor`, one for the whole leaf.
      only: patterns of the leaves to quantize, such as `fc2/*,stage*`; empty for all weights. XNOR-Net leaves the first and
        the last layer out.
      recover_epochs: epochs of further training with binary weights.
    """

    def signs(self, groups: Array) -> Array:
        return jnp.sign(groups)

    def passed(self, w: Array) -> Array:
        return jnp.where(jnp.abs(w) <= 1, w, jax.lax.stop_gradient(w))


@register("compression", "ternary")
@pytree
class Ternary(Signed):
    """Weights of three values: `scale * sign(w)` where |w| > 0.7 mean|w|, else 0; trained through the rounding.

    Ternary weight networks (Li et al. 2016, arXiv:1605.04711): the scale is the mean |w| of the weights that are not zero.
    Biases stay float32.

    Attributes:
      granularity: `channel`, one scale for each output channel (last axis); `tensor`, one for the whole leaf.
      only: patterns of the leaves to quantize, such as `fc2/*,stage*`; empty for all weights.
      recover_epochs: epochs of further training with ternary weights.
    """

    def signs(self, groups: Array) -> Array:
        size = jnp.abs(groups)
        return jnp.sign(groups) * (size > 0.7 * jnp.mean(size, axis=1, keepdims=True))
