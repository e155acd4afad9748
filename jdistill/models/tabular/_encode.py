"""What networks on tables share: columns as table rows, their vectors, hidden layers, and a last layer that adds terms.

Each column is a row of one table times a value: a category its own row times 1, a number the column's row times itself.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.typing import Initializer
from jax import Array

from jdistill.errors import UsageError
from jdistill.models.layers import linear, torch_uniform

vectors_normal: Initializer = nn.initializers.normal(0.1)
"""Normal of standard deviation 0.1: products of two vectors of a few dimensions then start well below 1."""


def table_rows(fields: Sequence[int]) -> int:
    """How many rows the table of these columns has: one for a number, n for a column of n categories."""
    return sum(max(n, 1) for n in fields)


def columns(inputs: Array, fields: tuple[int, ...]) -> tuple[int, ...]:
    """`fields` for each column of `inputs` [B, D]: `()` stands for D numbers.

    Raises:
      UsageError: inputs that are no table, another number of columns, or categories that the inputs' dtype cannot hold.
    """
    if inputs.ndim != 2:
        raise UsageError(f"networks on tables read inputs [B, D], got inputs of shape {tuple(inputs.shape)}; use mlp")
    fields = tuple(fields) or (0,) * inputs.shape[1]
    if len(fields) != inputs.shape[1]:
        raise UsageError(f"the schema describes {len(fields)} columns, the inputs have {inputs.shape[1]}")
    largest = 2 ** (jnp.finfo(inputs.dtype).nmant + 1)
    if max(fields, default=0) - 1 > largest:
        raise UsageError(
            f"a column has {max(fields)} categories, {inputs.dtype} holds whole numbers up to {largest} exactly;"
            " use parallel.precision=float32"
        )
    return fields


def entries(inputs: Array, fields: tuple[int, ...]) -> tuple[Array, Array]:
    """`(rows, values)` [B, D] int32 and float of inputs [B, D]: which row of the table each column takes, times what.

    A category outside 0 .. n - 1 is taken as the nearest of them.
    """
    sizes = np.array([max(n, 1) for n in columns(inputs, fields)])
    numbers = np.array(columns(inputs, fields)) == 0
    ids = jnp.clip(jnp.where(numbers, 0, inputs).astype(jnp.int32), 0, sizes - 1)
    return ids + (np.cumsum(sizes) - sizes), jnp.where(numbers, inputs, 1)


def vectors(inputs: Array, fields: tuple[int, ...], dim: int, *, name: str, init: Initializer = vectors_normal) -> Array:
    """[B, D, dim]: for each column its vector, a category's own or a number's times the number (Guo et al. 2017, 2.1)."""
    rows, values = entries(inputs, fields)
    table = nn.Embed(table_rows(columns(inputs, fields)), dim, embedding_init=init, name=name)
    return table(rows) * values[..., None]


def concatenated(inputs: Array, fields: tuple[int, ...], dim: int) -> Array:
    """[B, categorical columns * dim + numbers]: vectors of the categories, then the numbers as they are."""
    fields = columns(inputs, fields)
    chosen = np.array([i for i, n in enumerate(fields) if n], int)
    numbers = np.array([i for i, n in enumerate(fields) if not n], int)
    if not len(chosen):
        return inputs
    embedded = vectors(inputs[:, chosen], tuple(fields[i] for i in chosen), dim, name="vectors")
    return jnp.concatenate([embedded.reshape(len(inputs), -1), inputs[:, numbers]], axis=-1)


def adding_layer(hidden: Array, terms: Sequence[tuple[Array, np.ndarray]], outputs: int, features: dict[str, Array]) -> Array:
    """Logits [B, outputs] by one linear layer `fc` on `hidden` [B, W] and `terms` together: the feature `embedding`.

    A term is an array [B, T] and its first weights [T, outputs]: of ones and an identity, the logits start as a linear
    layer on `hidden` plus the terms. These weights are trained, so that `fc` alone makes the logits of an embedding.
    """
    starts = [start for _, start in terms]

    def init(key, shape, dtype=jnp.float32):
        return jnp.concatenate([torch_uniform(key, (hidden.shape[1], outputs), dtype), *starts], dtype=dtype)

    features["embedding"] = joined = jnp.concatenate([hidden, *(term for term, _ in terms)], axis=-1)
    return linear(joined, outputs, name="fc", kernel_init=init if terms else torch_uniform)
