"""A quantized network whose linear and convolution layers run on integers: int8 times int8, summed in int32.

With `x = s_x (q_x - z)` and `w = s_w q_w`, a layer's output is `s_x s_w (sum q_x q_w - z sum q_w) + bias` (Jacob et al. 2018,
arXiv:1712.05877, section 2.2). The bracket is exact in int32. Rescaling, biases and all that lies between these layers
(activation functions, BatchNorm, pooling) are float32.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array

from jdistill.compress.activations import BESIDE, HIGH, LOW, Rule, apart, integers, reading
from jdistill.compress.quantize import grouped, integers_of
from jdistill.errors import UsageError
from jdistill.types import Model, Outputs, PyTree

INTEGERS = "#integers"
"""The entry of parameters that holds the scales of the layers in integers, by path."""

LEVELS = 127
LONGEST = (2**31 - 1) // ((HIGH - LOW) * LEVELS)
"""The most products, each at most 255 * 127, that an int32 holds the sum of."""


class Integer(NamedTuple):
    """A network on integers.

    Attributes:
      model: the network; `apply` takes the `params` here. It has no known last layer.
      params: parameters; the kernels of layers in integers are int8.
      layers: paths of the layers in integers.
      others: paths of all other layers whose inputs might have been rounded, with the reason why they are in float32.
    """

    model: Model
    params: PyTree
    layers: tuple[str, ...]
    others: dict[str, str]


def dot(q: Array, zero: Array, w: Array, dimensions: Any) -> Array:
    """`sum (q - zero) w` in int32 for int8 `q` and `w` [inputs, outputs], contracted as `jax.lax.dot_general` does."""
    total = jax.lax.dot_general(q, w, dimensions, preferred_element_type=jnp.int32)
    return total - zero.astype(jnp.int32) * jnp.sum(w, axis=0, dtype=jnp.int32)


def convolution(
    q: Array, zero: Array, w: Array, strides: Any, padding: Any, lhs_dilation: Any, rhs_dilation: Any, numbers: Any, groups: int
) -> Array:
    """`dot` for images [B, H, W, C] and kernels [h, w, C / groups, outputs]; padding holds `zero`, which stands for 0."""
    sides = len(strides)
    if isinstance(padding, str):
        large = [(n - 1) * d + 1 for n, d in zip(q.shape[1:-1], lhs_dilation, strict=True)]
        window = [(n - 1) * d + 1 for n, d in zip(w.shape[:sides], rhs_dilation, strict=True)]
        padding = jax.lax.padtype_to_pads(large, window, strides, padding)
    spread = [(low, high, d - 1) for (low, high), d in zip(padding, lhs_dilation, strict=True)]
    q = jax.lax.pad(q, zero.astype(q.dtype), [(0, 0, 0), *spread, (0, 0, 0)])
    total = jax.lax.conv_general_dilated(
        q, w, strides, "VALID", rhs_dilation=rhs_dilation, dimension_numbers=numbers, feature_group_count=groups,
        preferred_element_type=jnp.int32,
    )  # fmt: skip
    return total - zero.astype(jnp.int32) * jnp.sum(w, axis=tuple(range(sides + 1)), dtype=jnp.int32)


def integer_model(model: Model, variables: tuple[PyTree, PyTree], inputs: PyTree) -> Integer:
    """The network with every layer in integers that can be.

    Args:
      model: the network as `Activations.adapt` made it.
      variables: its effective parameters with static ranges beside them, int8 weights among them, and running statistics.
      inputs: preprocessed inputs [B, ...], of which only shapes and dtypes are used.

    Raises:
      UsageError: ranges are not static, or no layer can run on integers.
    """
    params, running = variables
    own, rule = apart(params)
    if rule is None or rule.ranges is None:
        found = "float32" if rule is None else "dynamic"
        raise UsageError(f"integer arithmetic needs static activations, these are {found}; use compression.activations=static")
    layers: dict[str, Any] = {}
    others: dict[str, str] = {}

    def read(name: str, module: nn.Module, x: Array) -> Array:
        held = _held(own, name, module, rule)
        if isinstance(held, str):
            others[name] = held
        else:
            layers[name] = held
        return x

    def trace(state: PyTree, given: PyTree) -> None:
        with reading(read):
            model.apply(own, state, given, train=False)

    jax.eval_shape(trace, running, inputs)
    if not layers:
        raise UsageError(f"no layer can run on integers ({'; '.join(f'{name}: {why}' for name, why in others.items())})")
    for name, (kernel, _) in layers.items():
        own = _replaced(own, [*name.split("/"), "kernel"] if name else ["kernel"], jnp.asarray(kernel))
    rest = Rule(only=rule.only, ranges={name: pair for name, pair in rule.ranges.items() if name not in layers})
    made = {**own, BESIDE: rest, INTEGERS: jax.tree.map(jnp.asarray, {name: scales for name, (_, scales) in layers.items()})}
    return Integer(_on_integers(model), made, tuple(layers), others)


def _held(params: PyTree, name: str, module: nn.Module, rule: Rule) -> tuple[np.ndarray, dict[str, Any]] | str:
    """A layer's int8 kernel and its scales, or why it cannot run on integers."""
    if type(module) not in (nn.Dense, nn.Conv):
        return f"{type(module).__name__} layers are not among those that can"
    assert rule.ranges is not None
    if name not in rule.ranges:
        return "its inputs are not rounded"
    for part in name.split("/") if name else ():
        params = params[part]
    kernel = np.asarray(params["kernel"])
    if kernel.size // kernel.shape[-1] > LONGEST:
        return f"int32 holds sums of {LONGEST} products, and it has {kernel.size // kernel.shape[-1]}"
    found = integers_of(grouped(kernel, "channel"), LEVELS)
    if found is None:
        return "its weights are not int8 with one scale for each channel"
    return found[0].reshape(kernel.shape), {"weight": found[1][0, 0], **rule.ranges[name]}


def _replaced(tree: PyTree, path: list[str], value: Any) -> PyTree:
    first, *rest = path
    return {**tree, first: _replaced(tree[first], rest, value) if rest else value}


@functools.lru_cache(maxsize=64)
def _on_integers(model: Model) -> Model:
    """`model` for the parameters that `integer_model` makes."""

    def apply(params: PyTree, state: PyTree, inputs: PyTree, **mode: Any) -> tuple[Outputs, PyTree]:
        scales = params[INTEGERS]
        within: list[str] = []  # the layer that is being run, whose copy is not to be taken for one of the network's

        def intercept(call: Any, arguments: tuple[Any, ...], named: dict[str, Any], context: Any) -> Any:
            name = "/".join(context.module.path)
            if within or context.method_name != "__call__" or name not in scales:
                return call(*arguments, **named)
            within.append(name)
            try:
                return _run(context.module, arguments[0], scales[name])
            finally:
                within.clear()

        with nn.intercept_methods(intercept):
            return model.apply({name: own for name, own in params.items() if name != INTEGERS}, state, inputs, **mode)

    return model._replace(apply=apply, head=None)


def _run(module: Any, x: Array, scales: dict[str, Array]) -> Array:
    """A Dense or Conv layer on integers: the layer itself, with another product."""
    own = module.variables["params"]
    w, zero = own["kernel"], scales["zero"]

    def quantized(lhs: Array) -> Array:
        return jnp.clip(integers(lhs, scales["scale"], zero), LOW, HIGH).astype(jnp.int8)

    def dense(lhs: Array, rhs: Array, dimensions: Any, precision: Any = None, **_: Any) -> Array:
        del rhs, precision
        return dot(quantized(lhs), zero, w, dimensions) * (scales["scale"] * scales["weight"])

    def conv(
        lhs: Array, rhs: Array, strides: Any, padding: Any, *, lhs_dilation: Any, rhs_dilation: Any, dimension_numbers: Any,
        feature_group_count: int = 1, precision: Any = None,
    ) -> Array:  # fmt: skip
        del rhs, precision
        given = strides, padding, lhs_dilation, rhs_dilation, dimension_numbers, feature_group_count
        return convolution(quantized(lhs), zero, w, *given) * (scales["scale"] * scales["weight"])

    product = {"dot_general": dense} if isinstance(module, nn.Dense) else {"conv_general_dilated": conv}
    return module.clone(parent=None, **product).apply({"params": own}, x)
