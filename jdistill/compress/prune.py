"""Magnitude pruning."""

import jax.numpy as jnp
import numpy as np
from jax import Array

from jdistill.compress.base import Compressor, map_named, weights
from jdistill.pytrees import pytree, require_fraction, require_nonnegative, require_one_of, static
from jdistill.registry import register
from jdistill.types import PyTree


@register("compression", "prune")
@pytree
class MagnitudePrune(Compressor):
    """One-shot magnitude pruning of single weights, then recovery under the mask (Han et al. 2015).

    Attributes:
      sparsity: fraction of weights set to zero, in [0, 1); `round(sparsity * n)` are, ties by position.
      scope: `layer` prunes each weight leaf to `sparsity`, `global` all of them together by one threshold.
      recover_epochs: epochs of further training with the mask held, by the same terms and optimizer.
    """

    sparsity: float = 0.5
    scope: str = static(default="layer")
    recover_epochs: int = static(default=5)

    def __post_init__(self) -> None:
        require_fraction(sparsity=self.sparsity)
        require_one_of(("layer", "global"), scope=self.scope)
        require_nonnegative(recover_epochs=self.recover_epochs)

    def init(self, key: Array, params: PyTree) -> PyTree:
        """Masks by name of the weight: 1.0 where it stays, 0.0 where it goes."""
        del key
        found = weights(params)
        scores = {name: jnp.abs(leaf).ravel() for name, leaf in found.items()}
        if self.scope == "layer":
            keep = {name: _keep(score, self.sparsity) for name, score in scores.items()}
        else:
            together = _keep(jnp.concatenate(list(scores.values())), self.sparsity)
            pieces = jnp.split(together, np.cumsum([score.size for score in scores.values()])[:-1])
            keep = dict(zip(scores, pieces, strict=True))
        return {name: keep[name].reshape(leaf.shape) for name, leaf in found.items()}

    def constrain(self, params: PyTree, state: PyTree) -> PyTree:
        return map_named(lambda name, leaf: leaf * state[name] if name in state else leaf, params)


def _keep(scores: Array, sparsity: float | Array) -> Array:
    """1.0 for all but the `round(sparsity * n)` smallest `scores` [n]; the earlier of equal ones goes first."""
    rank = jnp.argsort(jnp.argsort(scores, stable=True), stable=True)
    return (rank >= jnp.round(sparsity * scores.size)).astype(scores.dtype)
