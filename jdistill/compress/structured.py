"""Structured pruning: neurons, channels and heads are removed from the network, which becomes a smaller one."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jdistill.compress.base import Compressor, is_weight, leaf_name, map_named
from jdistill.compress.widths import RUNNING, Axis, axes_of, shapes
from jdistill.errors import UsageError
from jdistill.pytrees import pytree, require_fraction, require_nonnegative, static
from jdistill.registry import options, register
from jdistill.types import Model, PyTree

HERE = "compression=structured"
UNITS = "units/"


class Cut(NamedTuple):
    """What stays along an axis.

    Attributes:
      keep: [kept] int32, positions of the full axis, ascending.
      place: [full] int32, where each position went; `kept`, which is outside, for those removed.
    """

    keep: Array
    place: Array


@register("compression", "structured")
@pytree
class StructuredPrune(Compressor):
    """Structured pruning: whole neurons, channels and heads are removed, then recovery (Li et al. 2017).

    Of every removable width the units go whose weights have the smallest norm (https://arxiv.org/abs/1608.08710, section
    3.1, with norm=1): all kernels that produce the unit, taken together, as `torch.nn.utils.prune.ln_structured(dim=0)`
    does for one. Kernels, biases, BatchNorm and what reads the unit are cut alike, and the artifact holds the smaller
    network alone. Training under this step computes with zeros in place of what is gone.

    Attributes:
      sparsity: share of the units of each width that is removed, in [0, 1): `round(sparsity * n)` of n, ties by position;
        a width of a single unit stays.
      norm: 1 or 2.
      streams: whether channels that residual connections add to are removed too, from all layers that share them.
      recover_epochs: epochs of further training of what is left, by the same terms and optimizer.
    """

    sparsity: float = static(default=0.5)
    norm: int = static(default=2)
    streams: bool = static(default=False)
    recover_epochs: int = static(default=5)

    reads_network = True

    def __post_init__(self) -> None:
        require_fraction(sparsity=self.sparsity)
        if self.norm not in (1, 2):
            raise UsageError(f"norm must be 1 or 2, got {self.norm!r}")
        if not isinstance(self.streams, bool):
            raise UsageError(f"streams must be true or false, got {self.streams!r}")
        require_nonnegative(recover_epochs=self.recover_epochs)

    def adapt(self, model: Model) -> Model:
        """The network as it is, which must have removable widths."""
        if model.widths is None:
            raise UsageError(f"{HERE} needs a student with removable widths: {', '.join(_with_widths())}")
        if self.streams and not model.widths.streams:
            raise UsageError(f"{HERE}: streams=true, but the student has no residual channels that can go; use streams=false")
        return model

    def init(self, key: Array, params: PyTree, *, model: Model | None = None, inputs: PyTree = None) -> PyTree:
        """What stays: by name of an array and number of its axis a `Cut`; by `units/` and the width's name its units.

        Raises:
          UsageError: a width would lose everything, a step before stores these weights otherwise, or the network that is
            left would not be one of its kind.
        """
        del key
        assert model is not None and model.widths is not None
        axes = {name: axes for name, axes in axes_of(model, inputs).items() if self.streams or name not in model.widths.streams}
        sizes = {name: size for name, size in model.widths.sizes if name in axes}
        self._require_left(model, inputs, sizes, axes)
        full, kernels = shapes(model, inputs), {}
        leaves = {leaf_name(path): (path, leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
        for name in sorted({axis.leaf for found in axes.values() for axis in found if not axis.leaf.startswith(RUNNING)}):
            path, leaf = leaves.get(name, ((), None))
            if leaf is None or leaf.shape != full[name]:
                raise UsageError(f"{HERE}: a step before it stores {name} in another form; put structured first")
            if is_weight(path, leaf):
                kernels[name] = leaf
        state: dict[str, Any] = {}
        for name, found in axes.items():
            order = jnp.argsort(self._scores(name, found, kernels), stable=True)
            units = jnp.sort(order[self._removed(sizes[name]) :]).astype(jnp.int32)
            state[UNITS + name] = {"kept": units}
            for axis in found:
                state.setdefault(axis.leaf, {})[str(axis.axis)] = _cut(axis, units)
        return state

    def encode(self, params: PyTree, state: PyTree) -> PyTree:
        return map_named(lambda name, leaf: _taken(leaf, state.get(name, {})), params)

    def decode(self, params: PyTree, state: PyTree) -> PyTree:
        def full(name: str, leaf: Array) -> Array:
            for axis, cut in state.get(name, {}).items():
                leaf = jnp.take(leaf, cut.place, axis=int(axis), mode="fill", fill_value=0)
            return leaf

        return map_named(full, params)

    def hold(self, name: str, value: PyTree, state: PyTree) -> PyTree:
        """An earlier mask, or whatever else has the leaf's shape or broadcasts against it, without what was removed."""
        cuts = state.get(name, {})

        def held(array: Array) -> Array:
            shape, own = jnp.shape(array), {}
            for number, cut in cuts.items():
                axis = int(number)
                if jnp.size(array) > 1 and (len(shape) <= axis or shape[axis] not in (1, len(cut.place))):
                    raise UsageError(f"{HERE}: a step before it holds {shape} numbers about {name}; put structured first")
                if jnp.size(array) > 1 and shape[axis] == len(cut.place):
                    own[number] = cut
            return _taken(array, own)

        return jax.tree.map(held, value)

    def shrink(
        self, node: dict[str, Any], running: PyTree, state: PyTree, *, model: Model | None = None
    ) -> tuple[dict[str, Any], PyTree]:
        assert model is not None and model.widths is not None
        kept = {name.removeprefix(UNITS): held["kept"] for name, held in state.items() if name.startswith(UNITS)}
        changes = model.widths.changed({name: np.asarray(units).tolist() for name, units in kept.items()})
        return {**node, **changes}, map_named(lambda name, leaf: _taken(leaf, state.get(RUNNING + name, {})), running)

    def _removed(self, units: int) -> int:
        """How many of so many units go; a single one stays."""
        return round(self.sparsity * units) if units > 1 else 0

    def _require_left(self, model: Model, inputs: PyTree, sizes: dict[str, int], axes: dict[str, tuple[Axis, ...]]) -> None:
        """Raises `UsageError` unless what is left is a network of the same kind, with a unit of each width."""
        assert model.widths is not None
        for name, size in sizes.items():
            if self._removed(size) == size:
                raise UsageError(
                    f"{HERE}: sparsity={self.sparsity} leaves none of the {size} units of {name}; choose a smaller one"
                )
        fewer = {name: size - self._removed(size) for name, size in sizes.items()}
        left = {name: list(shape) for name, shape in shapes(model, inputs).items()}
        for name, found in axes.items():
            for axis in found:
                left[axis.leaf][axis.axis] -= self._removed(sizes[name]) * len(axis.positions[0])
        if shapes(model.widths.resized(fewer), inputs) != {name: tuple(shape) for name, shape in left.items()}:
            sizes_left = ", ".join(f"{name}={size}" for name, size in fewer.items())
            raise UsageError(f"{HERE}: a network with {sizes_left} has other layers than this one; choose another sparsity")

    def _scores(self, name: str, axes: tuple[Axis, ...], kernels: dict[str, Array]) -> Array:
        """[units], sums of |w|^norm of the weights that produce each."""
        held = [axis for axis in axes if axis.leaf in kernels]
        last = [axis for axis in held if axis.axis == kernels[axis.leaf].ndim - 1]
        # Kernels [D, heads, size] produce heads; [heads, size, D] read them.
        producing = last or [axis for axis in held if axis.axis > 0]
        if not producing:
            raise UsageError(f"{HERE}: no weights produce the units of {name}")
        total: Any = 0.0
        for axis in producing:
            kernel = kernels[axis.leaf]
            others = tuple(i for i in range(kernel.ndim) if i != axis.axis)
            total += jnp.sum(jnp.abs(kernel) ** self.norm, others)[np.array(axis.positions)].sum(1)
        return total


def _with_widths() -> list[str]:
    """The options of group `student` that have removable widths."""
    return [name for name, option in options("student").items() if hasattr(option.target, "removable")]


def _cut(axis: Axis, units: Array) -> Cut:
    """What stays along `axis` with the `units` [kept]."""
    positions = np.array(axis.positions)
    rest = np.setdiff1d(np.arange(axis.size), positions).astype(np.int32)
    keep = jnp.sort(jnp.concatenate([jnp.asarray(positions, jnp.int32)[units].ravel(), jnp.asarray(rest)]))
    return Cut(keep, jnp.full(axis.size, len(keep), jnp.int32).at[keep].set(jnp.arange(len(keep), dtype=jnp.int32)))


def _taken(array: Array, cuts: dict[str, Cut]) -> Array:
    """`array` with what stays alone."""
    for axis, cut in cuts.items():
        array = jnp.take(array, cut.keep, axis=int(axis))
    return array
