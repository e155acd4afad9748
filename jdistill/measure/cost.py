"""The arithmetic and the memory of a forward pass.

Operations are counted in the traced program, so that they depend neither on the machine nor on the version of a compiler:
XLA's own cost analysis counts the body of a loop once, however often it is run (google/jax issue 18672).
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.extend.core import ClosedJaxpr, Jaxpr, jaxprs_in_params
from jax.interpreters.partial_eval import dce_jaxpr

from jdistill.machine import MACHINE
from jdistill.train import forward
from jdistill.types import Model, PyTree

MOVES = frozenset(
    [
        "bitcast_convert_type",
        "broadcast_in_dim",
        "concatenate",
        "convert_element_type",
        "copy",
        "copy_p",
        "device_put",
        "dynamic_slice",
        "dynamic_update_slice",
        "expand_dims",
        "gather",
        "iota",
        "optimization_barrier",
        "pad",
        "reduce_precision",
        "reshape",
        "rev",
        "scatter",
        "select_n",
        "sharding_constraint",
        "slice",
        "sort",
        "split",
        "squeeze",
        "stop_gradient",
        "top_k",
        "transpose",
    ]
)
"""Primitives that put numbers elsewhere and compute nothing; all others count one operation for each float they give."""


class Count(NamedTuple):
    """Operations of a program.

    Attributes:
      macs: multiplications with an addition, in matrix products and convolutions.
      others: additions, products, comparisons and functions (exp, tanh, ...) outside of these, one for each float.
    """

    macs: int = 0
    others: int = 0

    @property
    def flops(self) -> int:
        """Floating-point operations: two for each multiply-accumulate."""
        return 2 * self.macs + self.others

    def __add__(self, other: "Count") -> "Count":  # type: ignore[override]
        return Count(self.macs + other.macs, self.others + other.others)

    def __mul__(self, times: int) -> "Count":  # type: ignore[override]
        return Count(self.macs * times, self.others * times)


class Uncountable(Exception):
    """How often a loop runs is known only when it runs."""


def count(program: Callable[..., Any], *arguments: Any) -> Count:
    """Operations of `program(*arguments)`; arrays may be abstract. What no output depends on is not counted.

    A `lax.scan` counts as often as it runs. A convolution counts no products with its padding. A sparse matrix counts its
    stored values; a weight that a mask holds at zero is computed with, and counted.

    Raises:
      Uncountable: it has a `lax.while_loop` or a `lax.cond`.
    """
    closed = jax.make_jaxpr(program)(*arguments)
    return _of_jaxpr(dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))[0])


def operations(
    model: Model, preprocess: Callable[[Array], Array], variables: tuple[PyTree, PyTree], inputs: np.ndarray
) -> dict[str, int | None]:
    """`flops` and `macs` from one raw input (a row of `inputs` [N, ...]) to its logits; of a recommender, to all items.

    Both are None where nothing is multiplied and summed (decision trees), or where a loop's length is not known.
    """
    found = _operations(model, preprocess, *_shapes(variables, inputs, 1))
    return {"flops": found.flops or None, "macs": found.macs or None} if found.macs else {"flops": None, "macs": None}


def memory_bytes(
    model: Model, preprocess: Callable[[Array], Array], variables: tuple[PyTree, PyTree], inputs: np.ndarray, size: int
) -> int | None:
    """Bytes of a compiled forward pass on this machine's default device, `size` raw inputs at once; None where unknown.

    Parameters and inputs, outputs, and what the compiler sets aside in between (whose sum XLA's own peak leaves out on CPUs).
    """
    return _memory(model, preprocess, *_shapes(variables, inputs, size))


Shapes = tuple[tuple[tuple[int, ...], Any], ...]


def _shapes(variables: tuple[PyTree, PyTree], inputs: np.ndarray, size: int) -> tuple[Any, Shapes]:
    """`(params, state, raw inputs)` as a tree of shapes, in a form that can be kept."""
    batch = jax.ShapeDtypeStruct((size, *inputs.shape[1:]), inputs.dtype)
    leaves, treedef = jax.tree.flatten((*variables, batch))
    return treedef, tuple((tuple(leaf.shape), jnp.dtype(leaf.dtype)) for leaf in leaves)


def _arguments(treedef: Any, shapes: Shapes) -> Any:
    return jax.tree.unflatten(treedef, [jax.ShapeDtypeStruct(*shape) for shape in shapes])


@functools.lru_cache(maxsize=64)
def _operations(model: Model, preprocess: Callable[[Array], Array], treedef: Any, shapes: Shapes) -> Count:
    try:
        return count(forward(model, preprocess), *_arguments(treedef, shapes))
    except Uncountable:
        return Count()


@functools.lru_cache(maxsize=64)
def _memory(model: Model, preprocess: Callable[[Array], Array], treedef: Any, shapes: Shapes) -> int | None:
    program: Any = forward(model, preprocess)
    with MACHINE.compiling():
        found = program.lower(*_arguments(treedef, shapes)).compile().memory_analysis()
    parts = [getattr(found, f"{part}_size_in_bytes", None) for part in ("argument", "output", "temp")]
    return None if None in parts else sum(map(int, parts))  # type: ignore[arg-type]


def _of_jaxpr(jaxpr: Jaxpr) -> Count:
    return sum((_of_equation(equation) for equation in jaxpr.eqns), Count())


def _of_equation(equation: Any) -> Count:
    name, given = equation.primitive.name, equation.invars
    out = equation.outvars[0].aval if equation.outvars else None
    if name in _PRODUCTS:
        return Count(macs=_PRODUCTS[name](equation))
    if name in ("while", "cond"):
        raise Uncountable(name)
    if name.startswith("scatter"):
        return Count(others=_floats(given[2].aval) if name != "scatter" else 0)
    if name.startswith("reduce_window"):
        return Count(others=_floats(out) * math.prod(equation.params.get("window_dimensions", ())))
    if name.startswith("reduce_") and name != "reduce_precision":
        return Count(others=_floats(given[0].aval))
    inner = [j.jaxpr if isinstance(j, ClosedJaxpr) else j for j in jaxprs_in_params(equation.params)]
    if inner:
        return sum(map(_of_jaxpr, inner), Count()) * (equation.params["length"] if name == "scan" else 1)
    return Count() if name in MOVES else Count(others=sum(_floats(v.aval) for v in equation.outvars))


def _floats(aval: Any) -> int:
    """How many floating-point numbers an array has."""
    return int(aval.size) if jnp.issubdtype(aval.dtype, jnp.floating) else 0


def _dot(equation: Any) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    lhs = equation.invars[0].aval
    return int(equation.outvars[0].aval.size) * math.prod(lhs.shape[i] for i in contracted)


def _sparse_dot(equation: Any) -> int:
    out = equation.outvars[0].aval  # [rows, D], of stored values [nse] and a dense [columns, D]
    return int(equation.invars[0].aval.size * out.size // out.shape[0])


def _convolution(equation: Any) -> int:
    """Pairs of an output and a value of the input under the kernel, times the channels."""
    p, (lhs, rhs) = equation.params, (v.aval for v in equation.invars)
    numbers = p["dimension_numbers"]
    pairs = 1
    for i, (low, _) in enumerate(p["padding"]):
        width, window = lhs.shape[numbers.lhs_spec[2 + i]], rhs.shape[numbers.rhs_spec[2 + i]]
        count = equation.outvars[0].aval.shape[numbers.out_spec[2 + i]]
        at = np.arange(count)[:, None] * p["window_strides"][i] + np.arange(window) * p["rhs_dilation"][i] - low
        inside = (at >= 0) & (at <= (width - 1) * p["lhs_dilation"][i]) & (at % p["lhs_dilation"][i] == 0)
        pairs *= int(inside.sum())
    images, outputs, inputs = lhs.shape[numbers.lhs_spec[0]], rhs.shape[numbers.rhs_spec[0]], rhs.shape[numbers.rhs_spec[1]]
    return pairs * images * outputs * inputs // p["batch_group_count"]


_PRODUCTS: dict[str, Callable[[Any], int]] = {
    "dot_general": _dot,
    "conv_general_dilated": _convolution,
    "bcsr_dot_general": _sparse_dot,
}
