"""Weight sharing by k-means."""

from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jdistill.compress.base import chosen_weights
from jdistill.compress.forms import FLOAT, WeightForm, means
from jdistill.errors import UsageError
from jdistill.pytrees import pytree, require_nonnegative, static
from jdistill.registry import register
from jdistill.types import PyTree

ITERATIONS = 50


@register("compression", "weight_sharing")
@pytree
class WeightSharing(WeightForm):
    """All weights of a layer take one of k values, its codebook (Deep Compression, Han et al. 2016, section 3).

    The weights of each layer are clustered by k-means in one dimension: centroids start at equal distances from the smallest
    to the largest weight (the paper's linear initialisation), and 50 iterations of Lloyd's algorithm follow. Which weight has
    which value is fixed from there on; the codebook is trained, and the gradient of a value is the sum of its weights'.
    Zeros, such as of an earlier `prune`, stay zeros, beside the k values. The file holds ceil(log2 k) bits for each weight
    (and, where there are zeros, one that says which) and k floats for each layer. (https://arxiv.org/abs/1510.00149)

    Attributes:
      clusters: k, 2 to 256.
      only: patterns of weights' names, such as `fc1/*,item`; empty for all weights.
      recover_epochs: epochs of further training of the codebooks.
    """

    option: ClassVar[str] = "weight_sharing"
    advice: ClassVar[str] = "set fewer clusters, or name larger weights in only"

    clusters: int = static(default=16)
    only: str = static(default="")
    recover_epochs: int = static(default=5)

    def __post_init__(self) -> None:
        require_nonnegative(recover_epochs=self.recover_epochs)
        if not 2 <= self.clusters <= 256:
            raise UsageError(f"clusters must be from 2 to 256, got {self.clusters!r}")

    def candidates(self, params: PyTree) -> dict[str, Array]:
        return chosen_weights(params, self.only)

    def bits(self, name: str, shape: tuple[int, ...]) -> int:
        del name
        return int(np.prod(shape)) * (self.clusters - 1).bit_length() + FLOAT * self.clusters

    def begin(self, key: Array, weight: Array) -> Array:
        """Codes of the weight's shape: 0 for zeros, 1 to k for the values of the codebook."""
        del key
        kind = jnp.uint8 if self.clusters < 256 else jnp.uint16
        codes = clustered(weight.ravel(), self.clusters) + 1
        return jnp.where(weight == 0, 0, codes.reshape(weight.shape)).astype(kind)

    def shorter(self, weight: Array, state: Array) -> PyTree:
        mean, _ = means(weight.ravel(), state.ravel().astype(jnp.int32), self.clusters + 1)
        return {"codebook": mean[1:]}

    def full(self, stored: PyTree, state: Array) -> Array:
        book = jnp.concatenate([jnp.zeros_like(stored["codebook"][:1]), stored["codebook"]])
        return book[state.astype(jnp.int32)]


def clustered(values: Array, clusters: int) -> Array:
    """Which of `clusters` each of `values` [n] belongs to, in rising order of their means: [n] int32; zeros do not count."""
    there = values != 0
    low, high = (jnp.where(there.any(), edge, 0) for edge in (_least(values, there), -_least(-values, there)))

    def codes(centroids: Array) -> Array:
        return jnp.searchsorted((centroids[1:] + centroids[:-1]) / 2, values).astype(jnp.int32)

    def step(_: Array, centroids: Array) -> Array:
        # zeros go to one more cluster; sums of what is left over from the centroids round less than those of the values
        own = jnp.where(there, codes(centroids), clusters)
        padded = jnp.append(centroids, 0)
        return centroids + means(values - padded[own], own, clusters + 1)[0][:-1]

    return codes(jax.lax.fori_loop(0, ITERATIONS, step, jnp.linspace(low, high, clusters, dtype=values.dtype)))


def _least(values: Array, there: Array) -> Array:
    return jnp.min(jnp.where(there, values, jnp.inf))
