"""Pruning by what is trained beside the weights: scores of movement, and thresholds.

Both store their own numbers at the top of the parameters, under a name of their own, by leaf name with dots for slashes
(`fc1.kernel`); the weights keep their names. Once the next step takes over, or the student is written, they are gone, and
what is left of them is a mask.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jdistill.compress.base import Compressor, chosen_weights, map_named
from jdistill.compress.prune import OPEN, SCOPES, is_open, kept, masked_by, nonzero, require_left
from jdistill.errors import UsageError
from jdistill.pytrees import pytree, require_fraction, require_nonnegative, require_one_of, static
from jdistill.registry import register
from jdistill.schedules import Schedule
from jdistill.types import PyTree


class _Beside(Compressor):
    """A step that trains numbers of its own beside the weights, under the key `beside` of the parameters."""

    beside = ""
    only: str = ""
    needs_training = True

    def init(self, key: Array, params: PyTree) -> PyTree:
        """`OPEN` for each weight that is pruned."""
        del key
        if not isinstance(params, dict) or self.beside in params:
            found = "another entry of that name" if isinstance(params, dict) else f"a {type(params).__name__}"
            raise UsageError(f"parameters must be a dict, in which {self.beside!r} is free for what is trained; got {found}")
        return dict.fromkeys(chosen_weights(params, self.only), OPEN)

    def encode(self, params: PyTree, state: PyTree) -> PyTree:
        if not is_open(state):
            return params
        return {**params, self.beside: {_key(n): self._begin(w) for n, w in chosen_weights(params, self.only).items()}}

    def constrain(self, params: PyTree, state: PyTree) -> PyTree:
        if not is_open(state):
            return masked_by(params, state)
        own, network = params[self.beside], self.decode(params, state)
        found = {name: own[_key(name)] for name in state}
        return {**self._act(network, found), self.beside: own}

    def decode(self, params: PyTree, state: PyTree) -> PyTree:
        if not is_open(state):
            return params
        return {name: tree for name, tree in params.items() if name != self.beside}

    def settle(self, params: PyTree, state: PyTree) -> tuple[PyTree, PyTree]:
        if not is_open(state):
            return params, state
        params = self.decode(params, state)
        return params, nonzero(params, state)

    def _begin(self, weight: Array) -> Array:
        """What is trained beside a weight, at first."""
        raise NotImplementedError

    def _act(self, network: PyTree, own: dict[str, Array]) -> PyTree:
        """The network's parameters under what is trained, by name of the weight."""
        raise NotImplementedError


def _key(name: str) -> str:
    return name.replace("/", ".")  # no component of it is a weight's name: later steps leave it alone


@pytree
class MovementPrune(_Beside):
    """Top-k masks of trained scores; see `movement_prune`.

    Attributes:
      sparsity: fraction of weights set to zero, in [0, 1); `round(sparsity * n)` are, ties by position.
      scope: `layer` or `global`.
      only: patterns of leaf names.
      recover_epochs: epochs of training in which the scores are trained.
    """

    sparsity: Any = 0.5
    scope: str = static(default="layer")
    only: str = static(default="")
    recover_epochs: int = static(default=5)

    beside = "movement"

    def __post_init__(self) -> None:
        require_fraction(sparsity=self.sparsity)
        require_one_of(SCOPES, scope=self.scope)
        require_nonnegative(recover_epochs=self.recover_epochs)

    def check(self, params: PyTree, state: PyTree) -> None:
        require_left(params, state, f"sparsity={float(self.sparsity):g}, scope={self.scope}")

    def _begin(self, weight: Array) -> Array:
        return jnp.zeros_like(weight)

    def _act(self, network: PyTree, own: dict[str, Array]) -> PyTree:
        masks = kept(own, self.sparsity, self.scope)
        return masked_by(network, {name: mask + (own[name] - lax.stop_gradient(own[name])) for name, mask in masks.items()})


@register("compression", "movement_prune", schedules=True)
def movement_prune(sparsity: float = 0.5, scope: str = "layer", only: str = "", recover_epochs: int = 5) -> MovementPrune:
    """Movement pruning: the weights stay that training moves away from zero; Sanh, Wolf and Rush 2020.

    Each weight W has a score S, at first 0; W times the mask of the highest scores acts, and the gradient passes straight
    through the mask: dL/dS = dL/dW' W with W' = mask(S) W. https://arxiv.org/abs/2005.07683, section 4. The optimizer trains
    S as it does W, and any weight may come back while it does; the file holds the weights that are left, no scores.

    Attributes:
      sparsity: fraction of weights set to zero, in [0, 1), or a schedule over the training that follows; a number is the
        end of a cubic schedule from 0 over all of it: scores say nothing at first.
      scope: `layer` prunes each weight leaf to `sparsity`, `global` all of them together by one threshold.
      only: names of the leaves to prune, as patterns with commas between; empty for all weights.
      recover_epochs: epochs of training in which weights and scores are trained, by the same terms and optimizer.
    """
    require_fraction(sparsity=sparsity)
    ramp = sparsity if isinstance(sparsity, Schedule) else Schedule(kind="cubic", start=0.0, end=sparsity)
    return MovementPrune(sparsity=ramp, scope=scope, only=only, recover_epochs=recover_epochs)


@register("compression", "soft_threshold")
@pytree
class SoftThreshold(_Beside):
    """Soft threshold reparameterization (STR), whose sparsity is learnt: Kusupati et al. 2020.

    sign(W) relu(|W| - sigmoid(s)) acts in place of W, with one trained s for each weight leaf:
    https://arxiv.org/abs/2002.03231, section 3. An L2 penalty on s drives sparsity: it moves s towards 0, and so the threshold
    up towards 0.5. The paper has it from the optimizer's weight decay, which acts on s too; `decay` is a further one for s
    alone, since most students here are trained without.

    Attributes:
      s_init: s at first, below 0: -5 is a threshold of 0.0067.
      decay: `decay * s` is added to the gradient of s, at least 0.
      only: names of the leaves to prune, as patterns with commas between; empty for all weights.
      recover_epochs: epochs of training in which weights and thresholds are trained, by the same terms and optimizer.
    """

    s_init: float = -5.0
    decay: float = 0.01
    only: str = static(default="")
    recover_epochs: int = static(default=5)

    beside = "thresholds"

    def __post_init__(self) -> None:
        require_nonnegative(decay=self.decay, recover_epochs=self.recover_epochs)

    def check(self, params: PyTree, state: PyTree) -> None:
        require_left(params, state, f"s_init={float(self.s_init):g}, decay={float(self.decay):g}")

    def _begin(self, weight: Array) -> Array:
        return jnp.array(self.s_init, weight.dtype)  # a copy for each: the step is given all of them to write over

    def _act(self, network: PyTree, own: dict[str, Array]) -> PyTree:
        thresholds = {name: jax.nn.sigmoid(_decayed(s, jnp.asarray(self.decay, s.dtype))) for name, s in own.items()}

        def soft(name: str, w: Array) -> Array:
            return jnp.sign(w) * jax.nn.relu(jnp.abs(w) - thresholds[name]) if name in thresholds else w

        return map_named(soft, network)


@jax.custom_vjp
def _decayed(s: Array, decay: Array) -> Array:
    """`s` itself, to whose gradient `decay * s` is added."""
    del decay
    return s


def _forth(s: Array, decay: Array) -> tuple[Array, tuple[Array, Array]]:
    return s, (s, decay)


def _back(kept: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    s, decay = kept
    return gradient + decay * s, jnp.zeros_like(decay)


_decayed.defvjp(_forth, _back)
