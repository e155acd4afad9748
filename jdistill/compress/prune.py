"""Magnitude pruning of single weights: at once, along a schedule, and N of M."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jdistill.compress.base import Compressor, chosen_weights, map_named, weights
from jdistill.errors import RunError, UsageError
from jdistill.pytrees import pytree, require_fraction, require_nonnegative, require_one_of, static
from jdistill.registry import register
from jdistill.schedules import Schedule
from jdistill.types import PyTree

SCOPES = ("layer", "global")
SIGN = np.uint32(1 << 31)
OPEN = ()
"""What a state holds about a weight whose mask is not final yet."""


@pytree
class MagnitudePrune(Compressor):
    """A mask of the weights of largest magnitude; see `prune`.

    Attributes:
      sparsity: fraction of weights set to zero, in [0, 1); `round(sparsity * n)` are, ties by position.
      scope: `layer` or `global`.
      only: patterns of leaf names.
      recover_epochs: epochs of further training.
      gradual: whether the mask is taken anew from the stored magnitudes at each step, as `sparsity` rises.
    """

    sparsity: float = 0.5
    scope: str = static(default="layer")
    only: str = static(default="")
    recover_epochs: int = static(default=5)
    gradual: bool = static(default=False)

    def __post_init__(self) -> None:
        require_fraction(sparsity=self.sparsity)
        require_one_of(SCOPES, scope=self.scope)
        require_nonnegative(recover_epochs=self.recover_epochs)

    @property
    def needs_training(self) -> bool:  # type: ignore[override]
        return self.gradual

    def init(self, key: Array, params: PyTree) -> PyTree:
        """Masks by name of the weight: 1.0 where it stays, 0.0 where it goes; `OPEN` for each while a gradual step trains."""
        del key
        found = chosen_weights(params, self.only)
        return dict.fromkeys(found, OPEN) if self.gradual else self._masks(found)

    def constrain(self, params: PyTree, state: PyTree) -> PyTree:
        if not is_open(state):
            return masked_by(params, state)
        return masked_by(params, self._masks({name: leaf for name, leaf in weights(params).items() if name in state}))

    def project(self, params: PyTree, state: PyTree) -> PyTree:
        return self.constrain(params, state) if is_open(state) else params

    def settle(self, params: PyTree, state: PyTree) -> tuple[PyTree, PyTree]:
        return params, nonzero(params, state) if is_open(state) else state

    def check(self, params: PyTree, state: PyTree) -> None:
        require_left(params, state, f"sparsity={float(self.sparsity):g}, scope={self.scope}")

    def _masks(self, found: dict[str, Array]) -> dict[str, Array]:
        return kept({name: jnp.abs(leaf) for name, leaf in found.items()}, self.sparsity, self.scope)


@register("compression", "prune", schedules=True)
def prune(sparsity: float = 0.5, scope: str = "layer", only: str = "", recover_epochs: int = 5) -> MagnitudePrune:
    """Magnitude pruning of single weights, then recovery under the mask (Han et al. 2015).

    Sparsity may be a schedule over the training that follows, `{name: cubic, end: 0.9}`, with the keys `start`, `epochs`
    and `delay`: gradual pruning as of Zhu and Gupta 2017, https://arxiv.org/abs/1710.01878, equation 1. Its mask is taken
    anew from the magnitudes at each step; what is pruned is set to zero in what is trained, and stays so.

    Attributes:
      sparsity: fraction of weights set to zero, in [0, 1), or a schedule; `round(sparsity * n)` are, ties by position.
      scope: `layer` prunes each weight leaf to `sparsity`, `global` all of them together by one threshold.
      only: names of the leaves to prune, as patterns with commas between: `fc1/*,conv*/kernel`; empty for all weights.
      recover_epochs: epochs of further training with the mask held, by the same terms and optimizer.
    """
    gradual = isinstance(sparsity, Schedule)
    return MagnitudePrune(sparsity=sparsity, scope=scope, only=only, recover_epochs=recover_epochs, gradual=gradual)


@register("compression", "nm_prune")
@pytree
class NMPrune(Compressor):
    """N:M sparsity, by default 2:4: of every M consecutive inputs of an output, the N weights of largest magnitude stay.

    Inputs are the second-last axis of a kernel: [in, out] of linear layers, [kh, kw, in, out] of convolutions. Zhou et al.
    2021, https://arxiv.org/abs/2102.04010, section 3. Embedding tables stay dense unless `only` names them, and so do layers
    whose inputs are no multiple of M, such as a first convolution of 3 colours; named by `only`, those are an error.

    Attributes:
      n: weights that stay in each group, at least 1 and below `m`.
      m: weights in each group.
      only: names of the leaves to prune, as patterns with commas between; empty for all kernels.
      recover_epochs: epochs of further training with the mask held, by the same terms and optimizer.
    """

    n: int = static(default=2)
    m: int = static(default=4)
    only: str = static(default="")
    recover_epochs: int = static(default=5)

    def __post_init__(self) -> None:
        require_nonnegative(recover_epochs=self.recover_epochs)
        if not 1 <= self.n < self.m:
            raise UsageError(f"n must be at least 1 and below m={self.m}, got {self.n!r}")

    def init(self, key: Array, params: PyTree) -> PyTree:
        """Masks by name of the kernel: 1.0 where a weight stays, 0.0 where it goes."""
        del key
        found = chosen_weights(params, self.only)
        if not self.only:
            found = {name: leaf for name, leaf in found.items() if "kernel" in name.split("/")}
        fits = {name: leaf for name, leaf in found.items() if leaf.shape[-2] % self.m == 0}
        uneven = next((name for name in found if name not in fits), None)
        if uneven is not None and (self.only or not fits):
            raise UsageError(
                f"nm_prune: {uneven} has {found[uneven].shape[-2]} inputs, which groups of m={self.m} do not divide; choose"
                " another m, or leave it out with only"
            )
        if not fits:
            raise UsageError("nm_prune: this network has no kernel; name its tables with only, such as only=item*")
        return {name: self._mask(leaf) for name, leaf in fits.items()}

    def constrain(self, params: PyTree, state: PyTree) -> PyTree:
        return masked_by(params, state)

    def check(self, params: PyTree, state: PyTree) -> None:
        require_left(params, state, f"{self.n}:{self.m}")

    def _mask(self, w: Array) -> Array:
        groups = jnp.abs(w).reshape(*w.shape[:-2], w.shape[-2] // self.m, self.m, w.shape[-1])
        rank = jnp.argsort(jnp.argsort(groups, axis=-2, stable=True), axis=-2, stable=True)
        return (rank >= self.m - self.n).astype(w.dtype).reshape(w.shape)


def is_open(state: PyTree) -> bool:
    """Whether the masks of a step are not final yet."""
    return any(isinstance(mask, tuple) for mask in state.values())


def nonzero(params: PyTree, state: PyTree) -> dict[str, Array]:
    """The final masks of the weights in `state`: 1.0 where constrained `params` are not zero."""
    return {name: (leaf != 0).astype(leaf.dtype) for name, leaf in weights(params).items() if name in state}


def masked_by(params: PyTree, masks: dict[str, Array]) -> PyTree:
    """`params` times the masks of those leaves that have one."""
    return map_named(lambda name, leaf: leaf * masks[name] if name in masks else leaf, params)


def require_left(params: PyTree, names: Any, how: str) -> None:
    """Raises `RunError` for the first weight leaf among `names` of which nothing is left."""
    for name, leaf in weights(params).items():
        if name in names and not np.any(np.asarray(leaf)):
            raise RunError(
                f"nothing is left of {name}: all its {leaf.size} weights are zero after pruning ({how}); prune less, or name"
                " the other layers with only"
            )


def kept(scores: dict[str, Array], sparsity: float | Array, scope: str = "layer") -> dict[str, Array]:
    """Masks, in the scores' type and shapes: 1.0 for all but the `round(sparsity * n)` smallest scores of each leaf, or of all.

    The earlier of equal scores goes first. No gradient passes.
    """
    scores = {name: lax.stop_gradient(score) for name, score in scores.items()}
    if scope == "layer":
        flat = {name: _keep(score.ravel(), sparsity) for name, score in scores.items()}
    else:
        together = _keep(jnp.concatenate([score.ravel() for score in scores.values()]), sparsity)
        pieces = jnp.split(together, np.cumsum([score.size for score in scores.values()])[:-1])
        flat = dict(zip(scores, pieces, strict=True))
    return {name: flat[name].reshape(score.shape).astype(score.dtype) for name, score in scores.items()}


def _keep(scores: Array, sparsity: float | Array) -> Array:
    """False for the `round(sparsity * n)` smallest `scores` [n], the earlier of equal ones first.

    The threshold is found bit by bit, in 32 passes, since this runs in each step of a ramp: sorting takes ten times as long.
    """
    count = jnp.round(sparsity * scores.size).astype(jnp.int32)
    bits = lax.bitcast_convert_type(scores.astype(jnp.float32), jnp.uint32)
    bits = jnp.where(bits == SIGN, 0, bits)  # -0.0
    keys = jnp.where(bits >= SIGN, ~bits, bits | SIGN)  # unsigned integers in the order of the floats

    def refine(i: Array, threshold: Array) -> Array:
        higher = threshold | (SIGN >> i.astype(jnp.uint32))
        return jnp.where(jnp.sum(keys < higher, dtype=jnp.int32) < count, higher, threshold)

    threshold = lax.fori_loop(0, 32, refine, jnp.uint32(0))  # the key of the last one to go
    equal = keys == threshold
    spare = count - jnp.sum(keys < threshold, dtype=jnp.int32)
    return (keys > threshold) | (equal & (jnp.cumsum(equal.astype(jnp.int32)) > spare))
