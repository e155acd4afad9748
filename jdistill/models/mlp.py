"""Multilayer perceptron, for tables and small images."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from jdistill.models.base import model, positive_integer, positive_integers
from jdistill.models.layers import linear
from jdistill.pytrees import require_fraction, require_one_of

ACTIVATIONS = {"relu": nn.relu, "tanh": jnp.tanh, "sigmoid": jax.nn.sigmoid, "gelu": jax.nn.gelu}


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
        positive_integers(widths=self.widths)
        require_one_of(ACTIVATIONS, activation=self.activation)
        require_fraction(dropout=self.dropout)
        self.widths = tuple(self.widths)
        super().__post_init__()

    @nn.compact
    def __call__(self, inputs: Array, train: bool = False) -> tuple[Array, dict[str, Array]]:
        features: dict[str, Array] = {}
        x = inputs.reshape(inputs.shape[0], -1)
        for i, width in enumerate(self.widths, 1):
            features[f"hidden{i}_pre"] = x = linear(x, width, name=f"fc{i}")
            features[f"hidden{i}"] = x = ACTIVATIONS[self.activation](x)
            x = nn.Dropout(self.dropout)(x, deterministic=not train)
        features["embedding"] = x
        return linear(x, self.outputs, name="fc"), features
