"""Embeddings and numbers, flattened and concatenated, into a multilayer perceptron; a wide linear part beside it."""

import numpy as np
from flax import linen as nn
from jax import Array

from jdistill.data.base import Schema
from jdistill.models.base import model, positive_integer
from jdistill.models.mlp import hidden_layers, require_layers
from jdistill.models.tabular._encode import adding_layer, concatenated, vectors


@model("wide_mlp", teacher={"widths": (256, 128)}, student={"widths": (32,)})
class WideMLP(nn.Module):
    """Each categorical column as a vector, concatenated with the numbers, into an MLP.

    Reads tables [B, D] float32: standardised numbers, categories as 0 .. n - 1. With `wide`, a linear model on one-hot
    categories and numbers is added (Cheng et al. 2016, Wide & Deep, without crossed columns).

    Features: `hidden1`, ... as `mlp`; `embedding`, what the last layer reads: the last hidden layer (the concatenation
    where there is none), and with `wide` the linear part's [B, outputs] beside it.

    Attributes:
      outputs: number of logits.
      schema: what the columns are.
      dim: size of a category's vector.
      widths: units of each hidden layer.
      activation: one of relu, tanh, sigmoid, gelu.
      dropout: probability in [0, 1) that a hidden unit is dropped in training.
      wide: whether the linear part is added.

    Raises:
      UsageError: a size that is not a positive integer, an unknown activation, a dropout outside [0, 1); when called,
        inputs that do not fit the schema.
    """

    outputs: int
    schema: Schema
    dim: int = 8
    widths: tuple[int, ...] = (256, 128)
    activation: str = "relu"
    dropout: float = 0.0
    wide: bool = False

    def __post_init__(self) -> None:
        positive_integer(outputs=self.outputs, dim=self.dim)
        require_layers(self.widths, self.activation, self.dropout)
        self.widths = tuple(self.widths)
        super().__post_init__()

    @property
    def removable(self) -> dict[str, tuple[int, ...]]:
        return {"widths": self.widths}

    @nn.compact
    def __call__(self, inputs: Array, train: bool = False) -> tuple[Array, dict[str, Array]]:
        features: dict[str, Array] = {}
        x = concatenated(inputs, self.schema.fields, self.dim)
        x = hidden_layers(x, self.widths, self.activation, self.dropout, train, features)
        terms = []
        if self.wide:
            linear_part = vectors(inputs, self.schema.fields, self.outputs, name="wide", init=nn.initializers.zeros)
            terms = [(linear_part.sum(1), np.eye(self.outputs))]
        return adding_layer(x, terms, self.outputs, features), features
