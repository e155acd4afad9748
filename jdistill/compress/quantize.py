"""Quantization of weights: integers and scales, rounded after training or while training goes on."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jdistill.compress.base import WEIGHT, Compressor, Quantized, Training, chosen, chosen_weights, map_named, weights
from jdistill.errors import UsageError
from jdistill.pytrees import pytree, require_nonnegative, require_one_of, static
from jdistill.registry import register
from jdistill.types import PyTree

TINY = 1e-30  # a channel of smaller weights becomes zeros: its scale would be no normal float32
EXACT = 1e-6
"""Relative difference within which a weight counts as a multiple of a scale: rounding of `scale * q` and of the scale."""


def straight_through(w: Array, value: Array) -> Array:
    """`value` with the gradient of `w`, the straight-through estimator (Bengio et al. 2013, arXiv:1308.3432).

    As `w + stop_gradient(value - w)`, whose sum however rounds `value`.
    """
    return jax.lax.stop_gradient(value) + (w - jax.lax.stop_gradient(w))


def grouped(w: Any, granularity: str, group_size: int = 0) -> Any:
    """`w` [..., outputs] as [groups, members, outputs or 1]: those along the middle axis share a scale.

    A last group of fewer than `group_size` weights is filled up with zeros.
    """
    if granularity == "tensor":
        return w.reshape(1, -1, 1)
    if granularity == "channel":
        return w.reshape(1, -1, w.shape[-1])
    flat = w.reshape(-1, w.shape[-1])
    size = min(group_size, flat.shape[0])
    xp: Any = jnp if isinstance(w, Array) else np
    return xp.pad(flat, ((0, -flat.shape[0] % size), (0, 0))).reshape(-1, size, flat.shape[-1])


def ungrouped(groups: Any, shape: tuple[int, ...]) -> Any:
    """What `grouped` was given, of that `shape`."""
    size = int(np.prod(shape))
    return groups.reshape(-1)[:size].reshape(shape)  # what was filled up lies at the end


def symmetric(groups: Array, levels: Any) -> tuple[Array, Array]:
    """Integers [groups, members, outputs] in [-levels, levels] and scales [groups, 1, outputs] = max|w| / levels."""
    largest = jnp.max(jnp.abs(groups), axis=1, keepdims=True)
    scale = jnp.where(largest > TINY, largest, 1.0) / levels  # an all-zero channel keeps its zeros
    return jnp.clip(jnp.round(groups / scale), -levels, levels), scale


def integers_of(groups: np.ndarray, levels: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Integers and scales of `groups` that were rounded before, or None where some were not.

    The largest integer of a group need not be `levels`: a later step may have removed the largest weight.
    """
    columns = np.moveaxis(groups, 1, 0).reshape(groups.shape[1], -1).astype(np.float32)
    largest = np.abs(columns).max(axis=0, initial=0)
    scale = (np.where(largest > TINY, largest, 1) / np.float32(levels)).astype(np.float32)
    left = np.flatnonzero(~_multiples(columns, scale))
    for top in range(levels - 1, 0, -1):
        guess = (largest[left] / np.float32(top)).astype(np.float32)
        good = _multiples(columns[:64, left], guess)  # few can be ruled out by no more than these
        good[good] = _multiples(columns[:, left[good]], guess[good])
        scale[left[good]] = guess[good]
        left = left[~good]
    if left.size:
        return None
    wide = scale.reshape(groups.shape[0], 1, groups.shape[2])
    return np.rint(groups / wide).astype(np.int8), wide


def _multiples(columns: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Of each column [n, m], whether it holds multiples of its scale [m] alone."""
    wide = scale.astype(np.float64)
    return (np.abs(np.rint(columns / wide) * wide - columns) <= EXACT * np.abs(columns)).all(axis=0)


@pytree
class Rounding(Compressor):
    """What all steps that round weights to multiples of a scale share.

    Attributes:
      granularity: `channel`, one scale for each output channel (last axis); `tensor`, one for the whole leaf (also called
        global); `group`, one for each `group_size` inputs of a channel (also called local).
      group_size: inputs that share a scale, of all axes but the last taken as one; the last group may have fewer.
      only: patterns of the leaves to quantize, such as `fc1/*,item`; empty for all weights.
      recover_epochs: epochs of further training with rounded weights (quantization-aware training); 0 rounds after training.
    """

    granularity: str = static(default="channel")
    group_size: int = static(default=32)
    only: str = static(default="")
    recover_epochs: int = static(default=0)

    def __post_init__(self) -> None:
        require_one_of(("channel", "tensor", "group"), granularity=self.granularity)
        if not isinstance(self.group_size, int) or isinstance(self.group_size, bool) or self.group_size < 2:
            raise UsageError(f"group_size must be an integer of at least 2, got {self.group_size!r}")
        require_nonnegative(recover_epochs=self.recover_epochs)

    def levels(self, name: str, state: PyTree) -> Any:
        """The largest integer of the leaf `name`, which may be traced; None for a leaf that is not rounded."""
        raise NotImplementedError

    def constrain(self, params: PyTree, state: PyTree) -> PyTree:
        own = weights(params, self.only)

        def rounded(name: str, w: Array) -> Array:
            levels = self.levels(name, state) if name in own else None
            if levels is None:
                return w
            q, scale = symmetric(grouped(w, self.granularity, self.group_size), levels)
            return straight_through(w, ungrouped(q * scale, w.shape))

        return map_named(rounded, params)

    def finalize(self, name: str, value: np.ndarray | Quantized, state: PyTree) -> np.ndarray | Quantized:
        """The integers of a rounded leaf; one that a later step has moved off the grid is left to that step."""
        if isinstance(value, Quantized) or not (WEIGHT.search(name) and value.ndim >= 2 and chosen(name, self.only)):
            return value
        levels = self.levels(name, state)
        found = levels and integers_of(grouped(value, self.granularity, self.group_size), int(levels))
        if found is None:
            return value
        values, scale = ungrouped(found[0], value.shape), found[1]
        if self.granularity == "group":
            return Quantized(values, scale[:, 0], group=min(self.group_size, value.size // value.shape[-1]))
        return Quantized(values, scale.reshape(*[1] * (value.ndim - 1), -1))


@register("compression", "int8")
@register("compression", "int4", bits=4)
@register("compression", "qat", recover_epochs=5)
@pytree
class IntegerWeights(Rounding):
    """Symmetric integer weights: `w = scale * q`, `scale = max|w| / (2^(bits-1) - 1)`, q in [-127, 127] for 8 bits.

    Biases and BatchNorm parameters stay float32. While it is trained with, gradients go straight through the rounding
    (Jacob et al. 2018, arXiv:1712.05877, section 3).

    Attributes:
      bits: of each integer, 2 to 8.
      granularity: `channel`, one scale for each output channel (last axis); `tensor`, one for the whole leaf (also called
        global); `group`, one for each `group_size` inputs of a channel (also called local).
      group_size: inputs that share a scale, of all axes but the last taken as one; the last group may have fewer.
      only: patterns of the leaves to quantize, such as `fc1/*,item`; empty for all weights.
      activations: `none`; `dynamic` and `static`: the inputs of these layers are rounded to 8 bits too, which is the step
        `activations` behind this one.
      recover_epochs: epochs of further training with rounded weights (quantization-aware training); 0 rounds after training.
    """

    bits: int = static(default=8)
    activations: str = static(default="none")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.bits, int) or isinstance(self.bits, bool) or not 2 <= self.bits <= 8:
            raise UsageError(f"bits must be an integer from 2 to 8, got {self.bits!r}; for 1 bit use compression=binary")
        require_one_of(("none", "dynamic", "static"), activations=self.activations)

    def steps(self) -> tuple[Compressor | Training, ...]:
        if self.activations == "none":
            return (self,)
        from jdistill.compress.activations import Activations

        second = Activations(kind=self.activations, only=self.only, recover_epochs=self.recover_epochs)
        return dataclasses.replace(self, activations="none", recover_epochs=0), second

    def init(self, key: Array, params: PyTree) -> PyTree:
        """No state: scales follow the weights."""
        del key
        chosen_weights(params, self.only)
        return {}

    def levels(self, name: str, state: PyTree) -> int:
        del name, state
        return 2 ** (self.bits - 1) - 1
