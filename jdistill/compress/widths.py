"""Which axes of which arrays belong to a width of a network, found by initialising it with more units, on shapes alone."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jdistill.compress.base import leaf_name
from jdistill.errors import UsageError
from jdistill.types import Model, PyTree


class Axis(NamedTuple):
    """An axis along which an array holds the units of a width.

    Attributes:
      leaf: the array's name, `fc1/kernel` of a parameter, `running/batch_stats/bn1/mean` of a running statistic.
      axis: which of its axes.
      size: numbers along the axis.
      positions: for each unit those of its numbers, [units][each]; what is concatenated behind the units belongs to none.
    """

    leaf: str
    axis: int
    size: int
    positions: tuple[tuple[int, ...], ...]


RUNNING = "running/"
"""Begins the names of running statistics, where they stand beside those of parameters."""


def shapes(model: Model, inputs: PyTree) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter and running statistic of a network by name; kept, since it takes a trace."""
    leaves, treedef = jax.tree.flatten(inputs)
    return _shapes(model, treedef, tuple((tuple(leaf.shape), jnp.dtype(leaf.dtype)) for leaf in leaves))


@functools.lru_cache(maxsize=256)
def _shapes(model: Model, treedef: Any, given: Any) -> dict[str, tuple[int, ...]]:
    inputs = jax.tree.unflatten(treedef, [jax.ShapeDtypeStruct(*shape) for shape in given])
    variables = jax.eval_shape(lambda x: model.init(jax.random.key(0), x), inputs)
    trees = zip(("", RUNNING), variables, strict=True)
    return {
        before + leaf_name(path): leaf.shape
        for before, tree in trees
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def axes_of(model: Model, inputs: PyTree) -> dict[str, tuple[Axis, ...]]:
    """All axes of every removable width of `model`, whose `init` takes `inputs` (shapes are enough).

    Initialised with one more unit of every width an axis grows by the numbers k that a unit has on it; with d_i more of
    width i by k d_i, which tells the width. An axis of two widths would grow by k d_i + k' d_j; a third growth, by d_i^2
    units, gives it away: only where all d on an axis are one is sum(k d)^2 = sum(k) sum(k d^2) (Cauchy and Schwarz).

    Raises:
      UsageError: an axis mixes two widths, or another width has other arrays, so that units cannot be cut out.
    """
    assert model.widths is not None
    sizes = dict(model.widths.sizes)
    own = shapes(model, inputs)
    grown = []
    for power in (0, 1, 2):
        more = {name: size + (i + 1) ** power for i, (name, size) in enumerate(sizes.items())}
        grown.append(shapes(model.widths.resized(more), inputs))
        if {leaf: len(shape) for leaf, shape in grown[-1].items()} != {leaf: len(shape) for leaf, shape in own.items()}:
            raise UsageError("compression=structured: the network has other layers where its widths are others")
    found: dict[str, list[Axis]] = {name: [] for name in sizes}
    for leaf, shape in own.items():
        for axis, size in enumerate(shape):
            each, growth, squared = (other[leaf][axis] - size for other in grown)
            if not each:
                continue
            if growth**2 != each * squared or growth % each:
                raise UsageError(f"compression=structured: axis {axis} of {leaf} holds units of several widths")
            name = list(sizes)[growth // each - 1]
            positions = _positions(sizes[name], each, name in model.widths.indexed)
            found[name].append(Axis(leaf, axis, size, positions))
    return {name: tuple(axes) for name, axes in found.items()}


def _positions(units: int, each: int, neighbours: bool) -> tuple[tuple[int, ...], ...]:
    """For each unit where its numbers lie: side by side, or `units` apart, as flattened images [H, W, C] have channels."""
    places = np.arange(units * each)
    rows = places.reshape(units, each) if neighbours else places.reshape(each, units).T
    return tuple(map(tuple, rows.tolist()))
