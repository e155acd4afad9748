"""Quantization of weights after training."""

import jax.numpy as jnp
import numpy as np
from jax import Array

from jdistill.compress.base import WEIGHT, Compressor, Quantized, map_named, weights
from jdistill.pytrees import pytree, require_one_of, static
from jdistill.registry import register
from jdistill.types import PyTree

TINY = 1e-30  # a channel of smaller weights becomes zeros: its scale would be no normal float32


@register("compression", "int8")
@pytree
class Int8Weights(Compressor):
    """Symmetric int8 weights, rounded after training: `w = scale * q`, `scale = max|w| / 127`, q in [-127, 127].

    Biases and BatchNorm parameters stay float32.

    Attributes:
      granularity: `channel`, one scale for each output channel (last axis); `tensor`, one for the whole leaf.
    """

    granularity: str = static(default="channel")

    def __post_init__(self) -> None:
        require_one_of(("channel", "tensor"), granularity=self.granularity)

    def constrain(self, params: PyTree, state: PyTree) -> PyTree:
        del state
        own = weights(params)
        return map_named(lambda name, w: jnp.multiply(*self._quantize(w)) if name in own else w, params)

    def finalize(self, name: str, value: np.ndarray | Quantized, state: PyTree) -> np.ndarray | Quantized:
        del state
        if isinstance(value, Quantized) or not (WEIGHT.search(name) and value.ndim >= 2):
            return value
        q, scale = self._quantize(jnp.asarray(value))
        return Quantized(np.asarray(q, np.int8), np.asarray(scale, np.float32))

    def _quantize(self, w: Array) -> tuple[Array, Array]:
        axes = tuple(range(w.ndim - 1)) if self.granularity == "channel" else None
        largest = jnp.max(jnp.abs(w), axis=axes, keepdims=True)
        scale = jnp.where(largest > TINY, largest, 1.0) / 127  # an all-zero channel keeps its zeros
        return jnp.clip(jnp.round(w / scale), -127, 127), scale
