"""Losses on graphs whose vertices are the examples of a batch."""

import itertools

import jax
import jax.numpy as jnp
from jax import Array

from jdistill.errors import UsageError
from jdistill.losses import _layers
from jdistill.losses.base import Loss, loss
from jdistill.losses.logits import require_same_width
from jdistill.pytrees import pytree, require_nonnegative, static
from jdistill.types import Batch, Outputs, PyTree

_Pairs = dict[str, tuple[Array, Array]]


@loss("irg")
@pytree
class InstanceRelationshipGraph(Loss):
    """Instance relationship graph: examples, distances between them, and how far layers move them are the teacher's.

    Vertices: mean over the logits of (z_s - z_t)^2. Edges of a layer: E [B, B] = ||f_i - f_j||^2 of the flattened
    features, divided by the largest; mean over layers and over j of (E_s - E_t)^2. Transformation of consecutive
    layers f, f': L [B] = ||f_i - f'_i||^2 divided by the largest; mean over consecutive layers of (L_s - L_t)^2. Edge
    transformation: M = mean over B^2 of (E - E')^2, the same for every example; mean over consecutive layers of
    (M_s - M_t)^2. Value [B] = the four, each times its weight, in float32 or wider; its mean is the published number.
    Before f - f', the map of more positions, and the feature of more channels, is averaged to the fewer (adaptively,
    as neighbours); a vector [B, D] is a map of one position.

    Liu et al. 2019, "Knowledge Distillation via Instance Relationship Graph" (CVPR). With the default weights and
    layers it equals AberHu `IRG` on ResNets (all its edges, vertices and transformation). The authors' Caffe layers
    (yufanLIU/IRG) average maps over all positions first, hold the largest distance constant in the gradient, take half
    the sum over B of squares for the mean, with weight 0.005, and transform within a stage. The edge transformation, of
    which neither has code, is that of another public port (`IRGLoss`); its default weight is 0.

    Features that differ by rounding only have distances of 0, with derivative 0.

    Attributes:
      vertex_weight, edge_weight, transformation_weight, edge_transformation_weight: numbers >= 0.
      layers: features both networks have, at least two, in the order of depth; None takes their last two common stages,
        else their last two common hidden layers, or the only one and `embedding`. Edges are also of `embedding`, where
        both networks have it.

    Raises:
      UsageError: a bad option; in `init`, a layer that does not exist, no layers in common, or networks of different
        numbers of logits.
    """

    per_example = False

    vertex_weight: float = 0.1
    edge_weight: float = 5.0
    transformation_weight: float = 5.0
    edge_transformation_weight: float = 0.0
    layers: tuple[str, ...] | None = static(default=None)

    def __post_init__(self) -> None:
        require_nonnegative(
            vertex_weight=self.vertex_weight,
            edge_weight=self.edge_weight,
            transformation_weight=self.transformation_weight,
            edge_transformation_weight=self.edge_transformation_weight,
        )
        _layers.require_names(self.layers, least=2)

    def init(self, key: Array, student: Outputs, teacher: Outputs | None) -> PyTree:
        """`{}`, after checking that the layers exist and that the networks have as many logits."""
        del key
        teacher = _layers.require_teacher(teacher)
        require_same_width(student.logits.shape[-1], teacher.logits.shape[-1])
        self._pairs(student, teacher)
        return {}

    def __call__(self, params: PyTree, student: Outputs, teacher: Outputs | None, batch: Batch) -> Array:
        del params, batch
        teacher = _layers.require_teacher(teacher)
        pairs = self._pairs(student, teacher)
        z_s, z_t = _layers.at_least_float32(student.logits), _layers.at_least_float32(teacher.logits)
        vertex = ((z_s - z_t) ** 2).mean(axis=1)
        edges = {name: (_edges(f_s), _edges(f_t)) for name, (f_s, f_t) in _with_embedding(pairs, student, teacher).items()}
        edge = _mean([((e_s - e_t) ** 2).mean(axis=1) for e_s, e_t in edges.values()])
        chain = list(itertools.pairwise(pairs))
        moves = [[_moves(pairs[a][side], pairs[b][side]) for side in (0, 1)] for a, b in chain]
        transformation = _mean([(l_s - l_t) ** 2 for l_s, l_t in moves])
        changes = [[((edges[a][side] - edges[b][side]) ** 2).mean() for side in (0, 1)] for a, b in chain]
        edge_transformation = _mean([(m_s - m_t) ** 2 for m_s, m_t in changes])
        return (
            self.vertex_weight * vertex
            + self.edge_weight * edge
            + self.transformation_weight * transformation
            + self.edge_transformation_weight * edge_transformation
        )

    def _pairs(self, student: Outputs, teacher: Outputs) -> _Pairs:
        """The features of `layers`, of both networks."""
        names = self.layers or _default_layers(student, teacher)
        if not names:
            raise UsageError(
                "layers must be at least two features of both networks, which share no stage and no hidden layer; name "
                f"the layers (student: {_layers.listing(student)}; teacher: {_layers.listing(teacher)})"
            )
        return {
            name: (_layers.feature(student, name, "layers", "student"), _layers.feature(teacher, name, "layers", "teacher"))
            for name in names
        }


def _default_layers(student: Outputs, teacher: Outputs) -> tuple[str, ...]:
    for kind in ("stage", "hidden"):
        names = [name for name in _layers.numbered(student, kind) if name in teacher.features]
        if names:
            return (names[-1], "embedding") if len(names) == 1 else tuple(names[-2:])
    return ()


def _with_embedding(pairs: _Pairs, student: Outputs, teacher: Outputs) -> _Pairs:
    features = student.features, teacher.features
    if any("embedding" not in of for of in features):
        return pairs
    return pairs | {"embedding": (features[0]["embedding"], features[1]["embedding"])}


def _mean(values: list[Array]) -> Array:
    return sum(values[1:], start=values[0]) / len(values)


def _edges(f: Array) -> Array:
    """[B, ...] -> squared distances [B, B] over the largest."""
    f = _layers.rows(f)
    # Distances do not change with the origin or, once divided, with the scale. Both are chosen for the least rounding.
    x = _scaled(f - f.mean(axis=0), f)
    square = (x**2).sum(axis=1)
    distance = jnp.maximum(square[:, None] + square[None] - 2 * _layers.gram(x, x), 0)
    return _over_largest(distance * (1 - jnp.eye(len(x), dtype=x.dtype)))


def _moves(first: Array, second: Array) -> Array:
    """Two features [B, ...] of one network -> squared distances [B] between them over the largest."""
    first, second = (
        f if f.ndim == 4 else f.reshape(f.shape[0], 1, 1, -1) for f in map(_layers.at_least_float32, (first, second))
    )
    first, second = _layers.to_smaller(first, second)
    channels = min(first.shape[3], second.shape[3])
    a, b = (_layers.rows(_average_channels(f, channels)) for f in (first, second))
    return _over_largest((_scaled(a - b, a, b) ** 2).sum(axis=1))


def _average_channels(maps: Array, channels: int) -> Array:
    """[B, H, W, C] -> [B, H, W, channels], each the mean of neighbours."""
    columns = maps.reshape(-1, maps.shape[3], 1, 1)
    return _layers.adaptive_average_pool(columns, channels, 1).reshape(*maps.shape[:3], channels)


def _scaled(difference: Array, *of: Array) -> Array:
    """`difference` over its largest size, taken as a constant; 0 where that is no more than the rounding of `of`."""
    largest = jax.lax.stop_gradient(jnp.abs(difference).max())
    rounding = 4 * jnp.finfo(difference.dtype).eps * jax.lax.stop_gradient(jnp.stack([jnp.abs(f).max() for f in of]).max())
    there = largest > jnp.maximum(rounding, 1e-12)
    return jnp.where(there, difference, 0) / jnp.where(there, largest, 1)


def _over_largest(distance: Array) -> Array:
    largest = distance.max()
    return distance / jnp.where(largest > 0, largest, 1)
