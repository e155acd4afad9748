"""DCN-V2: cross layers, which multiply the inputs into what they have become, and a multilayer perceptron."""

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from jdistill.data.base import Schema
from jdistill.errors import UsageError
from jdistill.models.base import is_positive, model, positive_integer
from jdistill.models.layers import linear, torch_uniform
from jdistill.models.mlp import hidden_layers, require_layers
from jdistill.models.tabular._encode import concatenated
from jdistill.pytrees import require_one_of

STRUCTURES = ("parallel", "stacked")


def cross(x0: Array, x: Array, rank: int, *, name: str) -> Array:
    """One cross layer, x0 * (W x + b) + x, [B, D]; W = U V^T of `rank` where that is not 0 (Wang et al. 2021, eq. 1, 2)."""
    inner = nn.Dense(rank, use_bias=False, kernel_init=torch_uniform, name=f"{name}_v")(x) if rank else x
    return x0 * linear(inner, x0.shape[1], name=name) + x


@model("dcnv2", teacher={"widths": (256, 128)}, student={"widths": (32,), "layers": 1})
class DCNv2(nn.Module):
    """Deep & Cross Network V2 (Wang et al. 2021): cross layers beside an MLP (parallel) or below it (stacked).

    Reads tables [B, D] float32: standardised numbers, categories as 0 .. n - 1; x0 is the categories' vectors and the
    numbers, concatenated.

    Features: `cross1`, ... [B, D0], the cross layers; `hidden1`, ... as `mlp`; `embedding`, what the last layer reads:
    the last cross layer and the last hidden layer (parallel), or the last hidden layer (stacked).

    Attributes:
      outputs: number of logits.
      schema: what the columns are.
      dim: size of a category's vector.
      layers: cross layers.
      rank: of the cross layers' matrices; 0 for full matrices.
      structure: parallel or stacked.
      widths: units of each hidden layer.
      activation: one of relu, tanh, sigmoid, gelu.
      dropout: probability in [0, 1) that a hidden unit is dropped in training.

    Raises:
      UsageError: a size that is not a positive integer, an unknown structure or activation, a dropout outside [0, 1);
        when called, inputs that do not fit the schema.
    """

    outputs: int
    schema: Schema
    dim: int = 8
    layers: int = 3
    rank: int = 0
    structure: str = "parallel"
    widths: tuple[int, ...] = (256, 128)
    activation: str = "relu"
    dropout: float = 0.0

    def __post_init__(self) -> None:
        positive_integer(outputs=self.outputs, dim=self.dim, layers=self.layers)
        if self.rank != 0 and not is_positive(self.rank):
            raise UsageError(f"rank must be a positive integer, or 0 for full matrices, got {self.rank!r}")
        require_one_of(STRUCTURES, structure=self.structure)
        require_layers(self.widths, self.activation, self.dropout)
        self.widths = tuple(self.widths)
        super().__post_init__()

    @nn.compact
    def __call__(self, inputs: Array, train: bool = False) -> tuple[Array, dict[str, Array]]:
        features: dict[str, Array] = {}
        x0 = crossed = concatenated(inputs, self.schema.fields, self.dim)
        for i in range(1, self.layers + 1):
            features[f"cross{i}"] = crossed = cross(x0, crossed, self.rank, name=f"cross{i}")
        below = crossed if self.structure == "stacked" else x0
        x = hidden_layers(below, self.widths, self.activation, self.dropout, train, features)
        if self.structure == "parallel":
            x = jnp.concatenate([crossed, x], axis=-1)
        features["embedding"] = x
        return linear(x, self.outputs, name="fc"), features
