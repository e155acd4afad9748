"""What the steps share that store chosen weights, each by itself, in another form."""

from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import Array

from jdistill.compress.base import Compressor, leaf_name, map_named
from jdistill.errors import UsageError
from jdistill.types import PyTree

FLOAT = 32  # bits of a weight as it is


class WeightForm(Compressor):
    """A step that stores each of some weights as a smaller tree of arrays.

    A weight that would not take fewer bits so stays as it is. What earlier constraints (masks, roundings) held about a weight
    that is stored otherwise is dropped, save where the subclass says what becomes of it.
    """

    option: ClassVar[str]
    """Name of the option, for messages."""

    advice: ClassVar[str]
    """What to change where nothing becomes smaller."""

    def candidates(self, params: PyTree) -> dict[str, Array]:
        """The weights that the options choose, by name; raises `UsageError` where there are none."""
        raise NotImplementedError

    def bits(self, name: str, shape: tuple[int, ...]) -> int:
        """What a weight of this shape takes in the file, without headers."""
        raise NotImplementedError

    def begin(self, key: Array, weight: Array) -> Array:
        """The state about a weight; by default one zero: that it is stored so (checkpoints hold no empty arrays)."""
        del key, weight
        return jnp.zeros(1, jnp.uint8)

    def shorter(self, weight: Array, state: Array) -> PyTree:
        """A weight as it is stored."""
        raise NotImplementedError

    def full(self, stored: PyTree, state: Array) -> Array:
        """The weight again, from what `shorter` gave; differentiable with respect to it."""
        raise NotImplementedError

    def worthwhile(self, found: dict[str, Array]) -> dict[str, Array]:
        """Those weights that become smaller.

        Raises:
          UsageError: none does.
        """
        sizes = {name: (FLOAT * weight.size, self.bits(name, weight.shape)) for name, weight in found.items()}
        smaller = {name: weight for name, weight in found.items() if sizes[name][1] < sizes[name][0]}
        if not smaller:
            largest = max(found, key=lambda name: found[name].size)
            now, then = (bits / 8 for bits in sizes[largest])
            raise UsageError(
                f"compression={self.option} makes no chosen weight smaller: the largest, {largest} "
                f"{list(found[largest].shape)}, has {now:.0f} bytes and would take {then:.0f}; {self.advice}"
            )
        return smaller

    def init(self, key: Array, params: PyTree) -> PyTree:
        found = self.worthwhile(self.candidates(params))
        return {name: self.begin(jax.random.fold_in(key, i), weight) for i, (name, weight) in enumerate(found.items())}

    def encode(self, params: PyTree, state: PyTree) -> PyTree:
        return map_named(lambda name, leaf: self.shorter(leaf, state[name]) if name in state else leaf, params)

    def decode(self, params: PyTree, state: PyTree) -> PyTree:
        return jax.tree_util.tree_map_with_path(
            lambda path, node: self.full(node, state[leaf_name(path)]) if leaf_name(path) in state else node,
            params,
            is_leaf=lambda path, node: leaf_name(path) in state,
            is_leaf_takes_path=True,
        )

    def hold(self, name: str, value: PyTree, state: PyTree) -> PyTree | None:
        return None if name in state else value


def nearest(centroids: Array, points: Array) -> Array:
    """The nearest of `centroids` [k, w] to each of `points` [n, w]: [n] int32; the first of equally near ones."""
    half = jnp.sum(centroids**2, axis=1) / 2

    def one(point: Array) -> Array:
        return jnp.argmin(half - jnp.dot(centroids, point, precision="highest")).astype(jnp.int32)

    return jax.lax.map(one, points, batch_size=min(len(points), 1 << 14))  # distances of all at once can be gigabytes


def means(values: Array, codes: Array, clusters: int) -> tuple[Array, Array]:
    """The mean [clusters, ...] of the `values` [n, ...] of each code, 0 where there are none; and their numbers [clusters]."""
    count = jnp.zeros(clusters, values.dtype).at[codes].add(1)
    total = jnp.zeros((clusters, *values.shape[1:]), values.dtype).at[codes].add(values)
    return total / jnp.maximum(count, 1).reshape(-1, *[1] * (values.ndim - 1)), count


def kmeans(key: Array, points: Array, clusters: int, iterations: int = 25) -> Array:
    """Lloyd's algorithm from rows drawn at random without repetition: codes [n] int32 of `points` [n, w], n >= `clusters`.

    The number of iterations is fixed; a cluster that loses all its points stays where it is.
    """
    first = points[jax.random.permutation(key, len(points))[:clusters]]

    def step(_: Array, centroids: Array) -> Array:
        mean, count = means(points, nearest(centroids, points), clusters)
        return jnp.where(count[:, None] > 0, mean, centroids)

    return nearest(jax.lax.fori_loop(0, iterations, step, first), points)
