"""Row-wise integers for embedding tables."""

import re

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jdistill.compress.base import Compressor, Quantized, chosen, map_named
from jdistill.compress.embeddings import no_table, tables
from jdistill.pytrees import pytree, require_nonnegative, static
from jdistill.registry import register
from jdistill.types import PyTree

ROWS = re.compile(r"(^|/)(user|item|met|table|embedding)(/(u|v|buckets|quotient|remainder))*$")
"""Embedding tables, and what other steps store in their place as rows."""


class RowIntegers(Compressor):
    """Each row of a table as integers with a scale and an offset of its own; in training by the straight-through estimator.

    Rounding has the gradient 1 (Bengio et al. 2013, https://arxiv.org/abs/1308.3432). Zeros do not stay zeros, so that a pruned
    table is better stored by `int8`.
    """

    option: str
    only: str

    def integers(self, rows: Array) -> tuple[Array, Array, Array]:
        """Values [n, D], scale [n, 1] and offset [n, 1] of `rows` [n, D], all as floats."""
        raise NotImplementedError

    scales: type = np.float32

    def init(self, key: Array, params: PyTree) -> PyTree:
        del key
        if not tables(params, self.only, ROWS):
            raise no_table(self.option, params, self.only)
        return {}

    def constrain(self, params: PyTree, state: PyTree) -> PyTree:
        del state
        own = tables(params, self.only, ROWS)

        def rounded(name: str, leaf: Array) -> Array:
            if name not in own:
                return leaf
            values, scale, offset = self.integers(leaf)
            return leaf - jax.lax.stop_gradient(leaf) + jax.lax.stop_gradient(values * scale + offset)  # exactly the latter

        return map_named(rounded, params)

    def finalize(self, name: str, value: np.ndarray | Quantized, state: PyTree) -> np.ndarray | Quantized:
        del state
        named = chosen(name, self.only) and (self.only or ROWS.search(name))
        if isinstance(value, Quantized) or not named or value.ndim != 2:
            return value
        values, scale, offset = map(np.asarray, self.integers(jnp.asarray(value)))
        return Quantized(values.astype(np.uint8), scale.astype(self.scales), offset.astype(self.scales))


@register("compression", "row_int8")
@pytree
class RowInt8(RowIntegers):
    """Row-wise int8 tables as FBGEMM's and torch's: w = q scale + offset, q in [0, 255], scale = (max - min) / 255.

    The offset is the row's minimum, both are float32: D + 8 bytes a row (`torch.ops.quantized.embedding_bag_byte_prepack`).

    Attributes:
      only: patterns of names; empty for all embedding tables.
      recover_epochs: epochs of further training with rounded rows (straight-through).
    """

    option = "row_int8"

    only: str = static(default="")
    recover_epochs: int = static(default=0)

    def __post_init__(self) -> None:
        require_nonnegative(recover_epochs=self.recover_epochs)

    def integers(self, rows: Array) -> tuple[Array, Array, Array]:
        offset = jnp.min(rows, axis=1, keepdims=True)
        extent = jnp.max(rows, axis=1, keepdims=True) - offset
        return jnp.clip(jnp.round((rows - offset) * (255 / (extent + 1e-8))), 0, 255), extent / 255, offset


@register("compression", "row_int4")
@pytree
class RowInt4(RowIntegers):
    """Row-wise int4 tables as FBGEMM's and torch's: w = q scale + offset, q in [0, 15], scale = (max - offset) / 15.

    Scale and offset, the row's minimum, are float16, and rows are rounded with these: D / 2 + 4 bytes a row
    (`torch.ops.quantized.embedding_bag_4bit_prepack`; Guan et al. 2019, https://arxiv.org/abs/1911.02079).

    Attributes:
      only: patterns of names; empty for all embedding tables.
      recover_epochs: epochs of further training with rounded rows (straight-through).
    """

    option = "row_int4"
    scales = np.float16

    only: str = static(default="")
    recover_epochs: int = static(default=0)

    def __post_init__(self) -> None:
        require_nonnegative(recover_epochs=self.recover_epochs)

    def integers(self, rows: Array) -> tuple[Array, Array, Array]:
        offset = half(jnp.min(rows, axis=1, keepdims=True))
        scale = half((jnp.max(rows, axis=1, keepdims=True) - offset) / 15)
        scale = jnp.where(scale > 0, scale, 1)
        return jnp.clip(jnp.round((rows - offset) * (1 / scale)), 0, 15), scale, offset


def half(x: Array) -> Array:
    """`x` rounded to float16, as float32. Two conversions would do, did XLA not take them for nothing."""
    smallest = 2.0**-14  # below it float16 has steps of 2^-24
    return jnp.where(jnp.abs(x) < smallest, jnp.round(x * 2.0**24) * 2.0**-24, jax.lax.reduce_precision(x, 5, 10))
