"""Learning to rank: a network that scores each document of a list."""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from jdistill.errors import UsageError
from jdistill.models.base import model, positive_integer
from jdistill.models.layers import linear, torch_uniform
from jdistill.models.mlp import hidden_layers, require_layers
from jdistill.pytrees import require_one_of

CONTEXTS = ("none", "mean", "attention")
FILLED = -1e9
"""The logit of a place without a document. In a softmax over the list its probability is exactly 0, so that losses which
take one need no mask; it is finite, so that 0 times it is 0 where -inf would give NaN."""


@model("ltr_mlp", teacher={"widths": (256, 128, 64)}, student={"widths": (32,)})
class LtrMLP(nn.Module):
    """Scores each document of a list by a multilayer perceptron on its features, and on its list's where asked.

    Reads lists [B, K, D + 1] float32, whose last column is 1 for a document and 0 for a filled place; what else a filled
    place holds changes nothing. Logits [B, K]; filled places get -1e9. Another order of the documents gives the same
    scores in that order.

    Features: `hidden1`, ... [B, K, width] as `mlp`, 0 at filled places; `embedding` [B, D], the mean over the documents of
    what the last layer reads. That layer alone makes the score of one document, so of an `embedding` it makes the list's
    mean score, [B, 1].

    Attributes:
      outputs: not used (there is one logit for each place).
      widths: units of each hidden layer; an empty list makes a linear ranker.
      activation: one of relu, tanh, sigmoid, gelu.
      dropout: probability in [0, 1) that a hidden unit is dropped in training.
      context: what a document's features are concatenated with: none; mean, that of its list's features; attention, one
        layer of self-attention over the list's documents (as Pang et al. 2020, SetRank, without position).
      dim: size of the attention's output.
      heads: of the attention; divides `dim`.
      kept_heads: how many heads there are, each of size dim / heads; None for all `heads`.

    Raises:
      UsageError: a size that is not a positive integer, an unknown activation or context, a dropout outside [0, 1), heads
        that do not divide `dim`; when called, inputs that are no lists.
    """

    outputs: int
    widths: tuple[int, ...] = (256, 128)
    activation: str = "relu"
    dropout: float = 0.0
    context: str = "none"
    dim: int = 64
    heads: int = 4
    kept_heads: int | None = None

    def __post_init__(self) -> None:
        positive_integer(outputs=self.outputs, dim=self.dim, heads=self.heads)
        require_layers(self.widths, self.activation, self.dropout)
        require_one_of(CONTEXTS, context=self.context)
        if self.dim % self.heads:
            raise UsageError(f"heads must divide dim={self.dim}, got {self.heads}")
        if self.kept_heads is not None:
            positive_integer(kept_heads=self.kept_heads)
        self.widths = tuple(self.widths)
        super().__post_init__()

    @property
    def removable(self) -> dict[str, Any]:
        found: dict[str, Any] = {"widths": self.widths}
        return found | {"kept_heads": self.kept_heads or self.heads} if self.context == "attention" else found

    @nn.compact
    def __call__(self, inputs: Array, train: bool = False) -> tuple[Array, dict[str, Array]]:
        if inputs.ndim != 3 or inputs.shape[-1] < 2:
            found = tuple(inputs.shape)
            raise UsageError(f"networks that rank read lists [B, K, features + 1], got inputs of shape {found}")
        document = inputs[..., -1:] > 0.5
        features: dict[str, Array] = {}
        x = self._with_context(jnp.where(document, inputs[..., :-1], 0), document)
        x = hidden_layers(x, self.widths, self.activation, self.dropout, train, features)
        features = {name: jnp.where(document, value, 0) for name, value in features.items()}
        features["embedding"] = mean_of(x, document)
        scores = linear(x, 1, name="fc")[..., 0]
        return jnp.where(document[..., 0], scores, FILLED), features

    def _with_context(self, x: Array, document: Array) -> Array:
        """`x` [B, K, D], concatenated with what the list says; 0 at filled places is read, never written, there."""
        if self.context == "none":
            return x
        if self.context == "mean":
            return jnp.concatenate([x, jnp.broadcast_to(mean_of(x, document)[:, None], x.shape)], axis=-1)
        heads = self.kept_heads or self.heads
        attention = nn.MultiHeadDotProductAttention(
            heads, qkv_features=self.dim // self.heads * heads, out_features=self.dim, kernel_init=torch_uniform,
            name="attention",
        )  # fmt: skip
        seen = nn.make_attention_mask(document[..., 0], document[..., 0])
        return jnp.concatenate([x, attention(x, mask=seen)], axis=-1)


def mean_of(x: Array, document: Array) -> Array:
    """The mean over the documents of a list: [B, D] from `x` [B, K, D] and `document` [B, K, 1] bool; 0 without any."""
    return jnp.where(document, x, 0).sum(1) / jnp.maximum(document.sum(1), 1)


@model("ltr_linear")
def ltr_linear(outputs: int) -> LtrMLP:
    """Scores each document of a list by a linear function of its features.

    Args:
      outputs: not used.
    """
    return LtrMLP(outputs=outputs, widths=())
