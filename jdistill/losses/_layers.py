"""Finding layers by name among a network's features, and bringing two maps to one size."""

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jdistill.errors import UsageError, did_you_mean
from jdistill.losses.base import Loss, require_teacher
from jdistill.types import Batch, Outputs, PyTree

BATCH_NORM_EPSILON = 1e-5


def at_least_float32(x: Array) -> Array:
    """`x` in float32, or in float64 where it is: low-precision outputs lose a loss's small differences."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


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


def last_layer(outputs: Outputs) -> str:
    """The name of a network's last stage, or `embedding` where it has none."""
    return (numbered(outputs, "stage") or ["embedding"])[-1]


def pair_of_rows(student: Outputs, teacher: Outputs, names: tuple[str, str]) -> tuple[Array, Array]:
    """The features `names` of the two networks, one flat row an example: [B, D_s] and [B, D_t], float32 or wider.

    Raises:
      UsageError: there is no such layer; the message begins with `student_layer` or `teacher_layer`.
    """
    f_s = feature(student, names[0], "student_layer", "student")
    f_t = feature(teacher, names[1], "teacher_layer", "teacher")
    return rows(f_s), rows(f_t)


def rows(x: Array) -> Array:
    """[B, ...] -> [B, D] in float32 or wider."""
    return at_least_float32(x).reshape(x.shape[0], -1)


def pairs_of_maps(student: Outputs, teacher: Outputs, names: tuple[str, ...] | None) -> dict[str, tuple[Array, Array]]:
    """Maps of both networks by name; None takes their common stages.

    Raises:
      UsageError: a layer that does not exist or is no map, or no stage in common; the message begins with `layers`.
    """
    if names is None:
        names = tuple(name for name in numbered(student, "stage") if name in teacher.features)
    pairs = {name: (feature(student, name, "layers", "student"), feature(teacher, name, "layers", "teacher")) for name in names}
    flat = [name for name, pair in pairs.items() if any(f.ndim != 4 for f in pair)]
    if flat or not pairs:
        found = f"got '{flat[0]}'" if flat else "and the networks have no stage in common"
        raise UsageError(
            f"layers must be maps [B, H, W, C] of both networks, {found}; use convolutional networks, or loss=hint "
            f"(student: {listing(student)}; teacher: {listing(teacher)})"
        )
    return pairs


class PairedMaps(Loss):
    """Base of the losses that add up a distance between two networks' maps of equal names: a subclass writes `of_pair`.

    Subclasses have a static field `layers`: names, or None for the common stages.
    """

    layers: tuple[str, ...] | None

    def init(self, key: Array, student: Outputs, teacher: Outputs | None) -> PyTree:
        """`{}`, after checking that the layers exist and are maps."""
        del key
        pairs_of_maps(student, require_teacher(teacher), self.layers)
        return {}

    def __call__(self, params: PyTree, student: Outputs, teacher: Outputs | None, batch: Batch) -> Array:
        del params, batch
        pairs = pairs_of_maps(student, require_teacher(teacher), self.layers)
        values = [self.of_pair(f_s, f_t) for f_s, f_t in pairs.values()]
        return sum(values[1:], start=values[0])

    def of_pair(self, f_s: Array, f_t: Array) -> Array:
        """Values [B] of a student's and a teacher's map [B, H, W, C]."""
        raise NotImplementedError


def require_names(layers: tuple[str, ...] | None, least: int = 1) -> None:
    """Raises `UsageError` where `layers` is neither None nor a list of different names, `least` (1 or 2) of them."""
    if layers is None:
        return
    if isinstance(layers, str) or not layers:
        raise UsageError(f"layers must be a list of names such as [stage1,stage2], got {layers!r}")
    if len(set(layers)) < len(layers):
        raise UsageError(f"layers must name each layer once, got {', '.join(layers)}")
    if len(layers) < least:
        raise UsageError(f"layers must be at least two names, got {', '.join(layers)}")


def require_chain(student: Outputs, teacher: Outputs, pairs: dict[str, tuple[Array, Array]]) -> None:
    """Raises `UsageError` where `pairs_of_maps` are fewer than two, or of other channels in the student than in the teacher."""
    if len(pairs) < 2:
        raise UsageError(
            f"layers must be at least two maps of both networks, which share only {', '.join(pairs)} "
            f"(student: {listing(student)}; teacher: {listing(teacher)})"
        )
    for name, (f_s, f_t) in pairs.items():
        if f_s.shape[3] != f_t.shape[3]:
            raise UsageError(
                f"layers must have equal channels in both networks, '{name}' has {f_s.shape[3]} in the student and "
                f"{f_t.shape[3]} in the teacher; choose networks of one width, or loss=nst"
            )


def to_smaller(a: Array, b: Array) -> tuple[Array, Array]:
    """Two maps [B, H, W, C], each averaged to the smaller height and the smaller width of the two."""
    height, width = min(a.shape[1], b.shape[1]), min(a.shape[2], b.shape[2])
    return adaptive_average_pool(a, height, width), adaptive_average_pool(b, height, width)


def unit(x: Array, axis: int = -1, least: float | Array = 1e-24) -> Array:
    """`x` divided by its L2 norm along `axis`; 0, with derivative 0, where the norm's square is at most `least`."""
    square = (x**2).sum(axis=axis, keepdims=True)
    there = square > least
    return jnp.where(there, x, 0) * jax.lax.rsqrt(jnp.where(there, square, 1))


def safe_sqrt(x: Array) -> Array:
    """sqrt with the derivative 0 at 0."""
    return jnp.where(x > 0, jnp.sqrt(jnp.where(x > 0, x, 1)), 0)


def gram(x: Array, y: Array) -> Array:
    """Inner products [..., M, N] of the rows of x [..., M, D] and y [..., N, D], without a GPU's shortened mantissas."""
    return jnp.einsum("...md,...nd->...mn", x, y, precision=jax.lax.Precision.HIGHEST)


def uniform(key: Array, shape: tuple[int, ...], fan_in: int, dtype: jnp.dtype) -> Array:
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)), torch's default for the parameters of linear and convolutional layers."""
    bound = 1 / math.sqrt(fan_in)
    return jax.random.uniform(key, shape, dtype, -bound, bound)


def init_linear(key: Array, x: Array, width: int) -> PyTree:
    """`kernel` [D, width] and `bias` [width] of a linear layer on x [..., D], drawn as torch draws them; see `linear`."""
    kernel_key, bias_key = jax.random.split(key)
    size, dtype = x.shape[-1], jnp.promote_types(x.dtype, jnp.float32)
    return {"kernel": uniform(kernel_key, (size, width), size, dtype), "bias": uniform(bias_key, (width,), size, dtype)}


def linear(params: PyTree, x: Array) -> Array:
    """[..., D] -> [..., width]."""
    return x.astype(params["kernel"].dtype) @ params["kernel"] + params["bias"]


def convolve(x: Array, kernel: Array, strides: tuple[int, int], padding: Any, lhs_dilation: Any = None) -> Array:
    """A convolution of maps [B, H, W, C] with a kernel [h, w, C, D]."""
    dimensions = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, strides, padding, lhs_dilation, dimension_numbers=dimensions)


def batch_norm(x: Array, scale: Array, offset: Array) -> Array:
    """BatchNorm of x [B, ..., C] by the statistics of the batch at hand (the biased variance, as torch takes)."""
    axes = tuple(range(x.ndim - 1))
    deviation = x - x.mean(axis=axes)
    variance = (deviation**2).mean(axis=axes)
    return deviation * jax.lax.rsqrt(variance + BATCH_NORM_EPSILON) * scale + offset
