"""DeepFM: a factorisation machine and a multilayer perceptron on the same vectors."""

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array

from jdistill.data.base import Schema
from jdistill.models.base import model, positive_integer
from jdistill.models.mlp import hidden_layers, require_layers
from jdistill.models.tabular._encode import adding_layer, vectors


def interactions(v: Array) -> Array:
    """The sum over pairs of columns i < j of v_i * v_j: [B, dim] from vectors [B, D, dim].

    By half of the square of the sum less the sum of squares (Rendle 2010, lemma 3.1); summed over `dim` it is the
    second-order part of a factorisation machine.
    """
    return 0.5 * (jnp.square(v.sum(1)) - jnp.square(v).sum(1))


@model("deepfm", teacher={"widths": (256, 128), "dim": 16}, student={"widths": (32,)})
class DeepFM(nn.Module):
    """DeepFM (Guo et al. 2017): first order, pairwise interactions, and an MLP on the columns' vectors, added up.

    Reads tables [B, D] float32: standardised numbers, categories as 0 .. n - 1. Every column has a vector; a number's is
    multiplied by the number. The last layer `fc` reads hidden units, first order [B, outputs] and interactions [B, dim].
    Its weights on the last two start as in the paper's sum (one), and are trained: a sum with all weights equal would add
    the same to each of several logits.

    Features: `hidden1`, ... as `mlp`; `interactions` [B, dim]; `embedding`, all that `fc` reads.

    Attributes:
      outputs: number of logits.
      schema: what the columns are.
      dim: size of a column's vector.
      widths: units of each hidden layer.
      activation: one of relu, tanh, sigmoid, gelu.
      dropout: probability in [0, 1) that a hidden unit is dropped in training.

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

    def __post_init__(self) -> None:
        positive_integer(outputs=self.outputs, dim=self.dim)
        require_layers(self.widths, self.activation, self.dropout)
        self.widths = tuple(self.widths)
        super().__post_init__()

    @nn.compact
    def __call__(self, inputs: Array, train: bool = False) -> tuple[Array, dict[str, Array]]:
        features: dict[str, Array] = {}
        fields, outputs = self.schema.fields, self.outputs
        v = vectors(inputs, fields, self.dim, name="vectors")
        first = vectors(inputs, fields, outputs, name="first", init=nn.initializers.zeros).sum(1)
        features["interactions"] = pairs = interactions(v)
        deep = hidden_layers(v.reshape(len(v), -1), self.widths, self.activation, self.dropout, train, features)
        terms = [(first, np.eye(outputs)), (pairs, np.ones((self.dim, outputs)))]
        return adding_layer(deep, terms, outputs, features), features
