"""Losses on the singular vectors of maps."""

import functools
import itertools

import jax
import jax.numpy as jnp
from jax import Array

from jdistill.losses import _layers
from jdistill.losses.base import Loss, loss
from jdistill.pytrees import pytree, require_nonnegative, require_positive, static
from jdistill.types import Batch, Outputs, PyTree

LEAST_GAP = 1e-3
"""Least difference of two squared singular values, as a share of the sum of all, that a derivative divides by."""


@loss("kdsvd")
@pytree
class SingularVectors(Loss):
    """Distillation by singular value decomposition: how the main channel patterns of consecutive layers relate.

    Each map [B, H, W, C] is a matrix [H W, C] of one example; V [C, k] are its leading right singular vectors. The
    teacher's have the sign that makes their largest entry positive. The student's come from its first
    k + `extra_vectors`: to each of the teacher's goes the one of largest |cosine|, with the sign that makes the cosine
    positive. Both are multiplied by the teacher's singular values, scaled to unit L2 norm (1 for k = 1). Of consecutive
    layers V and V', R [C', C, k] = exp(-(V'_c'k - V_ck)^2 / bandwidth). Value [B] = sum over consecutive layers and over
    C' C k of (R_s - R_t)^2, in float32 or wider, whose mean is the published number: Lee et al. 2018,
    https://arxiv.org/abs/1807.06819, in RepDistiller's form. The two networks need the same channels in each layer,
    their maps may have other sizes.

    It equals RepDistiller `KDSVD` (k = 1, 3 extra, square maps) of maps after a ReLU, whose leading vectors have entries
    of one sign. Of other maps and vectors its values depend on signs that it leaves to torch's decomposition, so the
    published loss is defined only up to these. A map of zeros has no singular vectors: its V is 0, with derivative 0,
    where RepDistiller's student has arbitrary ones. The authors' code (SSKD_SVD) chooses from k + 1, turns the teacher's
    vectors to the student's and takes half the sum over the batch times sqrt(k), B sqrt(k) / 2 times as much.

    The derivative of singular vectors divides by differences of squared singular values. It is exact while these are
    at least 1/1000 of the squared norm of the map; below that it divides by 1/1000 of it, which bounds the gradient
    where singular values meet (RepDistiller's becomes infinite or NaN there). The choice among the student's vectors is
    a jump of the value. The decomposition is slow, on GPUs above all. RepDistiller publishes no weight; 1, the
    default, is unscaled.

    Attributes:
      bandwidth: divisor > 0 of the squared differences.
      layers: maps both networks have, at least two, in the order of depth; None takes their common stages.
      vectors: k; as many as the map has where it has fewer.
      extra_vectors: of the student, to choose from.

    Raises:
      UsageError: a bad option; in `init`, a layer that does not exist or is no map, fewer than two, or channels that
        differ.
    """

    bandwidth: float = 8.0
    layers: tuple[str, ...] | None = static(default=None)
    vectors: int = static(default=1)
    extra_vectors: int = static(default=3)

    def __post_init__(self) -> None:
        require_positive(bandwidth=self.bandwidth, vectors=self.vectors)
        require_nonnegative(extra_vectors=self.extra_vectors)
        _layers.require_names(self.layers, least=2)

    def init(self, key: Array, student: Outputs, teacher: Outputs | None) -> PyTree:
        """`{}`, after checking that the layers exist, are maps and have equal channels."""
        del key
        teacher = _layers.require_teacher(teacher)
        _layers.require_chain(student, teacher, _layers.pairs_of_maps(student, teacher, self.layers))
        return {}

    def __call__(self, params: PyTree, student: Outputs, teacher: Outputs | None, batch: Batch) -> Array:
        del params, batch
        pairs = _layers.pairs_of_maps(student, _layers.require_teacher(teacher), self.layers)
        vectors = [self._aligned(f_s, f_t) for f_s, f_t in pairs.values()]
        values = [
            ((self._kernel(first[0], second[0]) - self._kernel(first[1], second[1])) ** 2).sum(axis=(1, 2, 3))
            for first, second in itertools.pairwise(vectors)
        ]
        return sum(values[1:], start=values[0])

    def _aligned(self, f_s: Array, f_t: Array) -> tuple[Array, Array]:
        """Two maps [B, H, W, C] -> weighted vectors [B, C, k] of the student and the teacher."""
        x_s, x_t = _matrices(f_s), _matrices(f_t)
        v_t, candidates = _signed(_vectors(x_t, self.vectors)), _vectors(x_s, self.vectors + self.extra_vectors)
        strength = _layers.safe_sqrt((_product("bmc,bck->bmk", x_t, v_t) ** 2).sum(axis=1, keepdims=True))
        cosine = _product("bci,bck->bik", candidates, v_t)
        best = jnp.argmax(jnp.abs(cosine), axis=1, keepdims=True)
        sign = jnp.sign(jnp.take_along_axis(cosine, best, axis=1))
        v_s = jnp.take_along_axis(candidates, best, axis=2) * sign
        weight = _layers.unit(strength)
        return v_s * weight, v_t * weight

    def _kernel(self, v: Array, following: Array) -> Array:
        """[B, C, k] and [B, C', k] of consecutive layers -> [B, C', C, k]."""
        return jnp.exp(-((following[:, :, None] - v[:, None]) ** 2) / jnp.asarray(self.bandwidth, v.dtype))


def _matrices(maps: Array) -> Array:
    """[B, H, W, C] -> [B, H W, C] of unit norm (of zeros where the map is 0), in float32 or wider."""
    return _layers.unit(_layers.rows(maps)).reshape(maps.shape[0], -1, maps.shape[3])


def _vectors(x: Array, count: int) -> Array:
    """The leading right singular vectors [B, C, count] of x [B, M, C], zeros where x is zero."""
    v = _right_singular_vectors(x, min(count, *x.shape[1:]))
    return jnp.where((x != 0).any(axis=(1, 2), keepdims=True), v, 0)


def _signed(v: Array) -> Array:
    """Vectors [B, C, k], each with the sign that makes its largest entry positive."""
    largest = jnp.argmax(jnp.abs(v), axis=1, keepdims=True)
    return v * jnp.sign(jnp.take_along_axis(v, largest, axis=1))


def _product(equation: str, x: Array, y: Array) -> Array:
    """`einsum` without a GPU's shortened mantissas."""
    return jnp.einsum(equation, x, y, precision=jax.lax.Precision.HIGHEST)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _right_singular_vectors(x: Array, count: int) -> Array:
    """x [B, M, C] of unit norm -> [B, C, count]; signs are arbitrary."""
    return jnp.linalg.svd(x, full_matrices=False)[2][:, :count].mT


@_right_singular_vectors.defjvp
def _derivative(count: int, primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    """That of eigenvectors of A = x^T x: dv_j = sum over i of v_i (v_i . dA v_j) / (l_j - l_i), l the eigenvalues.

    Eigenvectors that `svd` leaves out (M < C) have l_i = 0: the part of dA v_j outside the others' span is theirs.
    """
    (x,), (dx,) = primals, tangents
    _, singular, transposed = jnp.linalg.svd(x, full_matrices=False)
    v = transposed.mT
    top, values = v[:, :, :count], singular**2
    turned = _product("bmc,bmk->bck", dx, _product("bmc,bck->bmk", x, top))
    turned += _product("bmc,bmk->bck", x, _product("bmc,bck->bmk", dx, top))
    inside = _product("bci,bck->bik", v, turned)
    gap = values[:, None, :count] - values[:, :, None]
    # i = j is left out by its place: where a compiler fuses square and difference its gap is a rounding error, not 0.
    inverse = jnp.sign(gap) / jnp.maximum(jnp.abs(gap), LEAST_GAP) * (1 - jnp.eye(gap.shape[1], gap.shape[2], dtype=gap.dtype))
    dv = _product("bci,bik->bck", v, inside * inverse)
    if v.shape[2] < v.shape[1]:
        outside = turned - _product("bci,bik->bck", v, inside)
        dv += outside / jnp.maximum(values[:, None, :count], LEAST_GAP)
    return top, dv
