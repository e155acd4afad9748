"""The contracts everything else is written against."""

from collections.abc import Callable
from typing import Any, NamedTuple

from jax import Array

Batch = dict[str, Array]
"""`inputs` [B, ...] float32 (preprocessed), `label` [B] int32, `index` [B] int32 (row in the training set)."""

PyTree = Any


class Outputs(NamedTuple):
    """What a network gives for a batch.

    Attributes:
      logits: [B, K] float: K classes or K candidate items; K = 1 for a yes/no label (the logit of "yes").
      features: name -> [B, ...]: every named activation. Under jit those that nothing reads cost nothing.
        Networks of stages name them `stage1`, `stage2`, ... (after the activation) and `stage1_pre`, ... (before it);
        images are [B, H, W, C]. `embedding` [B, D] is what the last linear layer reads. Networks whose stages end
        without an activation say in their docstring what they hand on.
    """

    logits: Array
    features: dict[str, Array]


class Model(NamedTuple):
    """A network as a pair of pure functions.

    Attributes:
      init: `(key, inputs) -> (params, state)`; `inputs` may be abstract in all but shape and dtype.
      apply: `(params, state, inputs, *, key=None, train=False) -> (Outputs, state)`. `state` holds running
        statistics; it is returned unchanged when `train` is False. `key` feeds dropout.
    """

    init: Callable[..., tuple[PyTree, PyTree]]
    apply: Callable[..., tuple[Outputs, PyTree]]
