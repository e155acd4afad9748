"""Recurrent recommendation from the items met before, after GRU4Rec (Hidasi et al. 2016)."""

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from jdistill.data.base import Schema
from jdistill.models.base import model, positive_integer
from jdistill.models.recommend._scores import Request, asking, embed, require_interactions, score
from jdistill.pytrees import require_fraction, require_positive
from jdistill.types import Factors


@model("gru4rec", teacher={"dim": 128}, student={"dim": 16})
class GRU4Rec(nn.Module):
    """Gated recurrent units over the items met before, after GRU4Rec (Hidasi et al. 2016).

    Unlike the paper, whose inputs are one-hot, items enter by the embeddings that also score them. The state starts as
    0 and stays as it is where the history is filled up; the score of an item is its inner product with the last layer's
    state, and a bias. Parameters: `item` [items, D], `bias` [items] and the layers'; embeddings start as N(0,
    `init_std`), the units' input weights LeCun normal, their recurrent ones orthogonal, biases as 0.

    Where each position asks (B = S L) the states after all positions are the users', else the last ones.

    Features: `layer1`, `layer2`, ... [B, D], the states; `user` [B, D], the last of them, also as `embedding`; `item`
    [B, K, D], [C, D] or [items, D].

    Attributes:
      schema: of the data: how many items, how long the histories.
      dim: D, of embeddings and states.
      layers: the number of recurrent layers.
      dropout: probability in [0, 1), of what each recurrent layer reads.
      init_std: standard deviation of the embeddings as initialised.

    Raises:
      UsageError: a `dim` or `layers` that is not a positive integer, a `dropout` outside [0, 1), an `init_std` that is not
        positive, data without users and items or without histories.
    """

    schema: Schema
    dim: int = 64
    layers: int = 1
    dropout: float = 0.2
    init_std: float = 0.05

    def __post_init__(self) -> None:
        require_interactions(self.schema, history=True)
        positive_integer(dim=self.dim, layers=self.layers)
        require_fraction(dropout=self.dropout)
        require_positive(init_std=self.init_std)
        super().__post_init__()

    @property
    def factors(self) -> Factors:
        return Factors("bias")

    @nn.compact
    def __call__(self, inputs: Request, train: bool = False) -> tuple[Array, dict[str, Array]]:
        table = self.param("item", nn.initializers.normal(self.init_std), (self.schema.items, self.dim))
        bias = self.param("bias", nn.initializers.zeros, (self.schema.items,))
        rows = inputs["user"].shape[0]
        x, known = embed(table, inputs["history"])
        features: dict[str, Array] = {}
        for i in range(1, self.layers + 1):
            x = nn.Dropout(self.dropout)(x, deterministic=not train)
            x = recurrent(self.dim, name=f"layer{i}")(jnp.zeros((x.shape[0], self.dim), x.dtype), (x, known))[1]
            features[f"layer{i}"] = asking(x, rows)
        user = features[f"layer{self.layers}"]
        logits, item = score(user, table, inputs.get("items"), bias)
        return logits, {**features, "user": user, "embedding": user, "item": item}


class Step(nn.Module):
    """One position: the next state [S, D], which is the one before where `known` [S] is False."""

    dim: int

    @nn.compact
    def __call__(self, state: Array, given: tuple[Array, Array]) -> tuple[Array, Array]:
        x, known = given
        state = jnp.where(known[:, None], nn.GRUCell(self.dim, name="gru")(state, x)[0], state)
        return state, state


recurrent = nn.scan(Step, variable_broadcast="params", split_rngs={"params": False}, in_axes=1, out_axes=1)
"""`Step` over the positions: state [S, D] and (x [S, L, D], known [S, L]) -> last state and all states [S, L, D]."""
