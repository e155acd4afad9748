"""Multilayer perceptron, for tables and small images."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from jdistill.models.base import model, positive_integer, positive_integers
from jdistill.models.layers import linear
from jdistill.pytrees import require_fraction, require_one_of

ACTIVATIONS = {"relu": nn.relu, "tanh": jnp.tanh, "sigmoid": jax.nn.sigmoid, "gelu": jax.nn.gelu}


def require_layers(widths: Any, activation: str, dropout: float) -> None:
    """Raises `UsageError` for a width that is not a positive integer, an unknown activation, a dropout outside [0, 1)."""
    positive_integers(widths=widths)
    require_one_of(ACTIVATIONS, activation=activation)
    require_fraction(dropout=dropout)


def hidden_layers(
    x: Array, widths: Sequence[int], activation: str, dropout: float, train: bool, features: dict[str, Array]
) -> Array:
    """Linear, activation, dropout for each width, inside a compact module.

    Writes `hidden1_pre`, `hidden1`, ... into `features`; the layers are `fc1`, ...
    """
    for i, width in enumerate(widths, 1):
        features[f"hidden{i}_pre"] = x = linear(x, width, name=f"fc{i}")
        features[f"hidden{i}"] = x = ACTIVATIONS[activation](x)
        x = nn.Dropout(dropout)(x, deterministic=not train)
    return x


@model("mlp", teacher={"widths": (256, 128)}, student={"widths": (32,)})
class MLP(nn.Module):
    """Fully connected network: linear, activation, dropout for each width, then a linear layer.

    Inputs of any shape [B, ...] are flattened. Weights and biases start as PyTorch's `nn.Linear`.

    Features: `hidden1`, `hidden2`, ... [B, width] after the activation (before dropout), `hidden1_pre`, ... before
    it, and `embedding` [B, D], what the last layer reads: the last hidden layer, or the inputs where there is none.

    Attributes:
      outputs: number of logits.
      widths: units of each hidden layer; an empty list makes a linear classifier.
      activation: one of relu, tanh, sigmoid, gelu.
      dropout: probability in [0, 1) that a hidden unit is dropped in training.

    Raises:
      UsageError: a width that is not a positive integer, an unknown activation, a dropout outside [0, 1).
    """

    outputs: int
    widths: tuple[int, ...] = (256, 128)
    activation: str = "relu"
    dropout: float = 0.0

    def __post_init__(self) -> None:
        positive_integer(outputs=self.outputs)
        require_layers(self.widths, self.activation, self.dropout)
        self.widths = tuple(self.widths)
        super().__post_init__()

    @property
    def removable(self) -> dict[str, tuple[int, ...]]:
        return {"widths": self.widths}

    @nn.compact
    def __call__(self, inputs: Array, train: bool = False) -> tuple[Array, dict[str, Array]]:
        features: dict[str, Array] = {}
        x = inputs.reshape(inputs.shape[0], -1)
        x = hidden_layers(x, self.widths, self.activation, self.dropout, train, features)
        features["embedding"] = x
        return linear(x, self.outputs, name="fc"), features
