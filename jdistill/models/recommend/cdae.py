"""Collaborative denoising autoencoder (Wu et al. 2016)."""

from flax import linen as nn
from jax import Array

from jdistill.data.base import Schema
from jdistill.models.base import model, positive_integer
from jdistill.models.mlp import ACTIVATIONS
from jdistill.models.recommend._scores import Request, embed, pooled, require_interactions, score
from jdistill.pytrees import require_fraction, require_one_of, require_positive
from jdistill.types import Factors

_ACTIVATIONS = {**ACTIVATIONS, "identity": lambda x: x}


@model("cdae", teacher={"dim": 200}, student={"dim": 20})
class CDAE(nn.Module):
    """Collaborative denoising autoencoder (Wu et al. 2016): a user's own vector and the items met make a hidden layer.

    hidden = activation(V_u + pooled embeddings of the history + b); the score of an item is its inner product with the
    hidden layer, and a bias. In training each item of the history is left out with probability `dropout` and the others
    are divided by 1 - `dropout`. The history is the last L items of the request. Parameters: `user` [users, D], the
    input embeddings `met` [items, D], `hidden_bias` [D], the output embeddings `item` [items, D], `bias` [items];
    embeddings start as N(0, `init_std`), biases as 0.

    Features: `user` [B, D], the hidden layer, also as `embedding`, `user_pre` [B, D] before its activation; `item`
    [B, K, D], [C, D] or [items, D].

    Attributes:
      schema: of the data: how many users and items, how long the histories.
      dim: D.
      activation: one of sigmoid, tanh, relu, gelu, identity.
      pooling: `sum`, as published, or `mean` over the history.
      dropout: probability in [0, 1) that an item of the history is left out in training.
      init_std: standard deviation of the embeddings as initialised.

    Raises:
      UsageError: a `dim` that is not a positive integer, an unknown `activation` or `pooling`, a `dropout` outside [0, 1),
        an `init_std` that is not positive, data without users and items or without histories.
    """

    schema: Schema
    dim: int = 20
    activation: str = "sigmoid"
    pooling: str = "sum"
    dropout: float = 0.2
    init_std: float = 0.01

    def __post_init__(self) -> None:
        require_interactions(self.schema, history=True)
        positive_integer(dim=self.dim)
        require_one_of(_ACTIVATIONS, activation=self.activation)
        require_one_of(("sum", "mean"), pooling=self.pooling)
        require_fraction(dropout=self.dropout)
        require_positive(init_std=self.init_std)
        super().__post_init__()

    @property
    def factors(self) -> Factors:
        return Factors("bias")

    @nn.compact
    def __call__(self, inputs: Request, train: bool = False) -> tuple[Array, dict[str, Array]]:
        normal, zeros = nn.initializers.normal(self.init_std), nn.initializers.zeros
        shape = (self.schema.items, self.dim)
        users, own = self.param("user", normal, (self.schema.users, self.dim)), inputs["user"]
        vectors, known = embed(self.param("met", normal, shape), inputs["history"])
        kept = nn.Dropout(self.dropout)(known.astype(vectors.dtype), deterministic=not train)
        met = pooled(kept[..., None] * vectors, known if self.pooling == "mean" else None, own.shape[0])
        before = users[own] + met + self.param("hidden_bias", zeros, (self.dim,))
        user = _ACTIVATIONS[self.activation](before)
        bias = self.param("bias", zeros, shape[:1])
        logits, item = score(user, self.param("item", normal, shape), inputs.get("items"), bias)
        return logits, {"user": user, "embedding": user, "user_pre": before, "item": item}
