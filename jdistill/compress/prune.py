"""Magnitude pruning."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jdistill.compress.base import Compressor, is_weight, map_weights
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

    def steps(self) -> tuple[Compressor, ...]:
        return (self,)

    def init(self, params: PyTree) -> PyTree:
        """Masks: 1.0 where a weight stays, 0.0 where it goes, ones for leaves that are never pruned."""
        ones = jax.tree.map(jnp.ones_like, params)
        if self.scope == "layer":
            return map_weights(lambda mask, leaf: _keep(jnp.abs(leaf).ravel(), self.sparsity).reshape(leaf.shape), ones, params)
        weights = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params) if is_weight(path, leaf)]
        keep = _keep(jnp.concatenate([jnp.abs(w).ravel() for w in weights]), self.sparsity)
        pieces = iter(jnp.split(keep, np.cumsum([w.size for w in weights])[:-1]))
        return map_weights(lambda mask: next(pieces).reshape(mask.shape), ones)

    def apply(self, params: PyTree, state: PyTree) -> PyTree:
        return jax.tree.map(lambda leaf, mask: leaf * mask, params, state)


def _keep(scores: Array, sparsity: float | Array) -> Array:
    """1.0 for all but the `round(sparsity * n)` smallest `scores` [n]; the earlier of equal ones goes first."""
    rank = jnp.argsort(jnp.argsort(scores, stable=True), stable=True)
    return (rank >= jnp.round(sparsity * scores.size)).astype(scores.dtype)
