"""Quantization of activations: the inputs of linear and convolution layers, in 8 bits."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array

from jdistill.applying import batch_axis
from jdistill.compress.base import Compressor, chosen
from jdistill.compress.quantize import TINY
from jdistill.errors import RunError, UsageError
from jdistill.pytrees import pytree, require_nonnegative, require_one_of, require_positive, static
from jdistill.registry import register
from jdistill.types import Model, Outputs, PyTree

BESIDE = "#activations"
"""The entry of effective parameters that holds their `Rule`."""

LAYERS = (nn.Dense, nn.DenseGeneral, nn.Conv)
LOW, HIGH = -128, 127


def affine(low: Array, high: Array) -> dict[str, Array]:
    """Scale and zero point, [] float32, by which [low, high] and 0 become integers from -128 to 127."""
    low, high = jnp.minimum(low, 0).astype(jnp.float32), jnp.maximum(high, 0).astype(jnp.float32)
    width = high - low
    scale = jnp.where(width > TINY, width, 1.0) / (HIGH - LOW)
    return {"scale": scale, "zero": jnp.clip(jnp.round(LOW - low / scale), LOW, HIGH)}


def integers(x: Array, scale: Array, zero: Array) -> Array:
    """`x` as integers in float32, before they are clipped to [-128, 127]."""
    return jnp.round(x.astype(jnp.float32) / scale.astype(jnp.float32)) + zero.astype(jnp.float32)


def rounded(x: Array, scale: Array, zero: Array) -> Array:
    """`x` rounded to what the integers stand for; its gradient is 1 within their range and 0 outside, as in PyTorch."""
    found = integers(x, scale, zero)
    value = ((jnp.clip(found, LOW, HIGH) - zero) * scale).astype(x.dtype)
    within = jax.lax.stop_gradient((found >= LOW) & (found <= HIGH))
    return jax.lax.stop_gradient(value) + jnp.where(within, x - jax.lax.stop_gradient(x), 0)


@pytree
class Rule:
    """How the layers of a network round their inputs.

    Attributes:
      only: patterns of their kernels' names; empty for all.
      ranges: `affine` by the layer's path; None for ranges of the batch at hand.
    """

    only: str = static(default="")
    ranges: dict[str, dict[str, Array]] | None = None

    def __call__(self, name: str, x: Array) -> Array:
        """The inputs `x` of the layer `name`, rounded if it is meant."""
        if not jnp.issubdtype(x.dtype, jnp.floating) or not chosen(f"{name}/kernel", self.only):
            return x
        if self.ranges is None:
            return rounded(x, **affine(*extremes(x)))
        return rounded(x, **self.ranges[name]) if name in self.ranges else x


def extremes(x: Array) -> tuple[Array, Array]:
    """The smallest and the largest of `x`, without gradient, on all devices of a mapped axis that shares the batch."""
    x, axis = jax.lax.stop_gradient(x), batch_axis()
    low, high = jnp.min(x), jnp.max(x)
    return (low, high) if axis is None else (jax.lax.pmin(low, axis), jax.lax.pmax(high, axis))


def apart(params: PyTree) -> tuple[PyTree, Rule | None]:
    """The network's own parameters, and the rule that lies beside them."""
    if not isinstance(params, dict) or BESIDE not in params:
        return params, None
    return {name: own for name, own in params.items() if name != BESIDE}, params[BESIDE]


def reading(function: Callable[[str, nn.Module, Array], Array]) -> Any:
    """A context in which `function(path, layer, inputs)` gives the inputs of every linear and convolution layer."""

    def intercept(call: Any, arguments: tuple[Any, ...], named: dict[str, Any], context: Any) -> Any:
        module = context.module
        if context.method_name != "__call__" or not isinstance(module, LAYERS) or not arguments:
            return call(*arguments, **named)
        return call(function("/".join(module.path), module, arguments[0]), *arguments[1:], **named)

    return nn.intercept_methods(intercept)


@functools.lru_cache(maxsize=256)
def rounding(model: Model, only: str = "") -> Model:
    """`model`, which takes a `Rule` beside its parameters and rounds its layers' inputs by it.

    Raises (when it is traced):
      UsageError: it has none of the layers that `only` names.
    """

    def apply(params: PyTree, state: PyTree, inputs: PyTree, **mode: Any) -> tuple[Outputs, PyTree]:
        own, rule = apart(params)
        seen: list[str] = []

        def read(name: str, _: nn.Module, x: Array) -> Array:
            seen.extend([name] if chosen(f"{name}/kernel", only) else [])
            return x if rule is None else rule(name, x)

        with reading(read):
            found = model.apply(own, state, inputs, **mode)
        if not seen:
            which = f" that only={only} names" if only else ""
            raise UsageError(
                f"activations are rounded at Flax Linen's Dense and Conv layers{which}, and this network has none; "
                "use activations=none"
            )
        return found

    def head(params: PyTree, embedding: Array) -> Array:
        own, rule = apart(params)
        assert model.head is not None
        return model.head(own, embedding if rule is None else rule("fc", embedding))  # a known last layer is called so

    return model._replace(apply=apply, head=head if model.head is not None else None)


@functools.lru_cache(maxsize=64)
def _ranges(model: Model, only: str) -> Callable[..., dict[str, tuple[Array, Array]]]:
    """Compiled `(params, state, inputs) -> {layer: (smallest, largest input)}` in evaluation mode."""

    def ranges(params, state, inputs):
        found: dict[str, tuple[Array, Array]] = {}

        def read(name, _, x):
            if jnp.issubdtype(x.dtype, jnp.floating) and chosen(f"{name}/kernel", only):
                low, high = extremes(x)
                before = found.get(name, (low, high))  # a layer may be called more than once
                found[name] = jnp.minimum(before[0], low), jnp.maximum(before[1], high)
            return x

        with reading(read):
            model.apply(params, state, inputs, train=False)
        return found

    return jax.jit(ranges)


def _require_ranges(found: dict[str, tuple[Array, Array]], examples: int) -> None:
    """Raises `RunError` for a layer whose inputs tell no range."""
    for name, pair in found.items():
        if isinstance(pair[0], jax.core.Tracer):
            return
        low, high = (float(value) + 0.0 for value in pair)  # no -0
        if not np.isfinite([low, high]).all():
            raise RunError(f"activations=static: inputs of layer {name} are not finite ({low:g} to {high:g}); the run diverged")
        if low == high:
            raise RunError(
                f"activations=static: all inputs of layer {name} are {low:g} in {examples} calibration rows, which gives no "
                "range; use activations=dynamic, or leave the layer out by only"
            )


@register("compression", "activations")
@pytree
class Activations(Compressor):
    """8-bit inputs of linear and convolution layers: `x = scale * (q - zero)`, q in [-128, 127], one scale a layer.

    Asymmetric, so that rectified inputs use all values, and 0 is exact, as padding needs (Jacob et al. 2018,
    arXiv:1712.05877, section 2.1). In training, gradients go straight through the rounding. Networks of Flax Linen only.

    Attributes:
      kind: `dynamic`, by the smallest and largest input of the batch at hand, so that outputs depend on it; `static`, by those
        of `calibration` training inputs, taken whenever a step of compression begins.
      calibration: training inputs, evenly spaced, that static ranges are taken from; dynamic ones take none.
      only: patterns of the kernels whose layers are meant, such as `fc1/*`; empty for all layers.
      recover_epochs: epochs of further training with rounded activations.
    """

    kind: str = static(default="dynamic")
    calibration: int = static(default=256)
    only: str = static(default="")
    recover_epochs: int = static(default=0)

    def __post_init__(self) -> None:
        require_one_of(("dynamic", "static"), kind=self.kind)
        require_nonnegative(recover_epochs=self.recover_epochs)
        if self.kind == "static":
            require_positive(calibration=self.calibration)
        else:
            object.__setattr__(self, "calibration", 0)  # frozen: no data are to be asked for

    def adapt(self, model: Model) -> Model:
        """The network, whose layers round their inputs where there is a rule beside its parameters."""
        return rounding(model, self.only)

    def calibrate(self, model: Model, variables: tuple[PyTree, PyTree], inputs: PyTree, state: PyTree) -> PyTree:
        """Scale and zero point, [] float32, of each layer's inputs, by `<layer>/input`.

        Raises:
          RunError: a layer's inputs never change, or are not finite.
          UsageError: a layer is within a loop.
        """
        del state
        params, running = variables
        try:
            found = _ranges(model, self.only)(apart(params)[0], running, inputs)
        except jax.errors.UnexpectedTracerError as error:
            raise UsageError(
                "activations=static: this network calls layers within a loop, as recurrent ones do, whose ranges cannot be "
                "taken; use activations=dynamic, or leave them out by only"
            ) from error
        _require_ranges(found, len(jax.tree.leaves(inputs)[0]))
        return {f"{name}/input": affine(*pair) for name, pair in found.items()}

    def decode(self, params: PyTree, state: PyTree) -> PyTree:
        """`params` with the rule beside them, save where a later step has given one, or no range is known yet."""
        if BESIDE in params or (self.kind == "static" and not state):
            return params
        ranges = {name.removesuffix("/input"): pair for name, pair in state.items()} if self.kind == "static" else None
        return {**params, BESIDE: Rule(only=self.only, ranges=ranges)}

    def finalize(self, name: str, value: Any, state: PyTree) -> Any:
        if self.kind == "static" and not state:
            raise RunError("activations=static: no range was taken from data, so that the network cannot be written")
        return value
