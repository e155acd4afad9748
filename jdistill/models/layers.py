"""The layers the published networks are made of, with PyTorch's arithmetic: padding, initialisation, BatchNorm.

Functions here create Linen submodules, so call them inside a compact method. Images are [B, H, W, C].
"""

import math

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Initializer
from jax import Array

from jdistill.applying import batch_axis
from jdistill.errors import UsageError

he_normal: Initializer = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
"""Normal of variance 2 / (k k out): `kaiming_normal_(mode="fan_out")` (He et al. 2015, eq. 14)."""

torch_uniform: Initializer = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
"""Uniform in +-1/sqrt(fan_in): PyTorch's default for the weights of linear and convolution layers."""


def conv(
    x: Array,
    features: int,
    kernel: int,
    *,
    name: str,
    stride: int = 1,
    groups: int = 1,
    bias: bool = False,
    kernel_init: Initializer = he_normal,
) -> Array:
    """A square convolution padded by kernel // 2 on each side: [B, H, W, C] -> [B, ceil(H/stride), ..., features].

    Padding is explicit since "SAME" pads a strided 3x3 convolution on one side only, unlike PyTorch's padding=1.
    """
    pad = kernel // 2
    return nn.Conv(
        features,
        (kernel, kernel),
        (stride, stride),
        padding=[(pad, pad), (pad, pad)],
        feature_group_count=groups,
        use_bias=bias,
        kernel_init=kernel_init,
        name=name,
    )(x)


def linear(
    x: Array,
    features: int,
    *,
    name: str,
    kernel_init: Initializer = torch_uniform,
    bias_init: Initializer | None = None,
) -> Array:
    """A linear layer [B, D] -> [B, features], initialised as PyTorch does: weight and bias uniform in +-1/sqrt(D)."""
    bound = 1 / math.sqrt(max(x.shape[-1], 1))

    def uniform(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return nn.Dense(features, kernel_init=kernel_init, bias_init=bias_init or uniform, name=name)(x)


class BatchNorm(nn.Module):
    """Batch normalisation over all axes but the last, with PyTorch's running statistics (Ioffe and Szegedy 2015).

    Training normalises by the biased variance of the batch (divided by n) but stores the unbiased one
    (divided by n - 1) with weight 0.1, as `torch.nn.BatchNorm2d` does; `flax.linen.BatchNorm` stores the biased one.
    Statistics are computed and kept in float32 at least, of the whole batch where the step spreads it over a mapped axis.
    """

    epsilon: float = 1e-5
    momentum: float = 0.1

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        features, given = x.shape[-1], x.dtype
        x = x.astype(jnp.promote_types(given, jnp.float32))
        scale = self.param("scale", nn.initializers.ones, (features,))
        bias = self.param("bias", nn.initializers.zeros, (features,))
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, (features,), jnp.float32)
        running_var = self.variable("batch_stats", "var", jnp.ones, (features,), jnp.float32)
        mean, var = running_mean.value, running_var.value
        if train:
            mean, var, n = _statistics(x)
            self._update(running_mean, mean)
            self._update(running_var, var * (n / max(n - 1, 1)))
        shape = (1,) * (x.ndim - 1) + (features,)
        gain = scale * jax.lax.rsqrt(var + self.epsilon)
        out = (x - mean.reshape(shape)) * gain.reshape(shape) + bias.reshape(shape)
        return out if x.dtype == given else out.astype(given)

    def _update(self, running: nn.Variable, value: Array) -> None:
        old = running.value
        running.value = ((1 - self.momentum) * old + self.momentum * value).astype(old.dtype)


def _statistics(x: Array) -> tuple[Array, Array, int]:
    """Mean and biased variance [C] over all axes but the last, and the number of values behind each."""
    axes, n, axis = tuple(range(x.ndim - 1)), x.size // x.shape[-1], batch_axis()
    if axis is None:
        return jnp.mean(x, axes), jnp.var(x, axes), n
    mean = jax.lax.pmean(jnp.mean(x, axes), axis)
    return mean, jax.lax.pmean(jnp.mean(jnp.square(x - mean), axes), axis), n * jax.lax.axis_size(axis)


def norm(x: Array, train: bool, *, name: str) -> Array:
    return BatchNorm(name=name)(x, train)


def shuffle(x: Array, groups: int) -> Array:
    """Channel shuffle (ShuffleNet, figure 1): channel i of group g moves to place i * groups + g."""
    *leading, channels = x.shape
    return x.reshape(*leading, groups, channels // groups).swapaxes(-1, -2).reshape(x.shape)


def global_mean(x: Array) -> Array:
    """[B, H, W, C] -> [B, C]."""
    return jnp.mean(x, (1, 2))


def max_pool(x: Array) -> Array:
    """2x2 maximum with stride 2; an odd last row or column is dropped, as in PyTorch."""
    return nn.max_pool(x, (2, 2), (2, 2))


def require_images(module: nn.Module, x: Array) -> None:
    """Raises `UsageError` unless `x` is [B, H, W, C]."""
    if x.ndim != 4:
        found = tuple(x.shape)
        raise UsageError(f"{type(module).__name__} reads images [B, H, W, C], got inputs of shape {found}; use mlp")
