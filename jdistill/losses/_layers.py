"""Finding layers by name among a network's features, and bringing two maps to one size."""

import re

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jdistill.errors import UsageError, did_you_mean
from jdistill.types import Outputs


def at_least_float32(x: Array) -> Array:
    """`x` in float32, or in float64 where it is: low-precision outputs lose a loss's small differences."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def require_teacher(teacher: Outputs | None) -> Outputs:
    """`teacher`; raises `UsageError` where there is none."""
    if teacher is None:
        raise UsageError("this loss needs a teacher and there is none; set teacher=..., or use loss=none")
    return teacher


def feature(outputs: Outputs, name: str, field: str, network: str) -> Array:
    """The activation `name` [B, ...] of a network.

    Args:
      outputs: what the network gives, concrete or abstract.
      name: the layer's name.
      field: the config key that asked for it, which begins the error message.
      network: "student" or "teacher", for the message.

    Raises:
      UsageError: there is no such layer.
    """
    if name not in outputs.features:
        guess = did_you_mean(name, outputs.features)
        raise UsageError(f"{field} '{name}' does not exist in the {network}{guess} (it has: {listing(outputs)})")
    return outputs.features[name]


def numbered(outputs: Outputs, kind: str) -> list[str]:
    """The layers `kind1`, `kind2`, ... a network has, in the order of their numbers (no `kind1_pre`)."""
    found = [name for name in outputs.features if re.fullmatch(rf"{kind}\d+", name)]
    return sorted(found, key=lambda name: int(name.removeprefix(kind)))


def middle_layer(outputs: Outputs, kinds: tuple[str, ...] = ("stage", "hidden")) -> str:
    """Of a network's n layers of the first of `kinds` it has, the name of number ceil(n / 2); else `embedding`."""
    for kind in kinds:
        if names := numbered(outputs, kind):
            return names[(len(names) - 1) // 2]
    return "embedding"


def middle_layers(student: Outputs, teacher: Outputs) -> tuple[str, str]:
    """The `middle_layer` of two networks, of a kind that both have."""
    kinds = tuple(kind for kind in ("stage", "hidden") if numbered(student, kind) and numbered(teacher, kind))
    return middle_layer(student, kinds), middle_layer(teacher, kinds)


def listing(outputs: Outputs) -> str:
    """The features of a network with their shapes, for an error message: "embedding [B, 64], hidden1 [B, 128]"."""
    named = [f"{name} {shape(array)}" for name, array in outputs.features.items()]
    return ", ".join(named) or "no features"


def shape(array: Array) -> str:
    """A shape for an error message: "[B, 8, 8, 16]"."""
    return f"[{', '.join(['B', *map(str, array.shape[1:])])}]"


def adaptive_average_pool(maps: Array, height: int, width: int) -> Array:
    """Maps [B, H, W, C] averaged to [B, height, width, C] as torch's `adaptive_avg_pool2d` does.

    Cell i of n covers rows floor(i H / n) to ceil((i + 1) H / n), so cells overlap where n does not divide H.
    """
    if maps.shape[1:3] == (height, width):
        return maps
    rows = jnp.asarray(_pooling_matrix(maps.shape[1], height), maps.dtype)
    columns = jnp.asarray(_pooling_matrix(maps.shape[2], width), maps.dtype)
    return jnp.einsum("ih,jw,bhwc->bijc", rows, columns, maps, precision=jax.lax.Precision.HIGHEST)


def _pooling_matrix(size: int, cells: int) -> np.ndarray:
    matrix = np.zeros((cells, size))
    for i in range(cells):
        start, stop = i * size // cells, -(-(i + 1) * size // cells)
        matrix[i, start:stop] = 1 / (stop - start)
    return matrix
