"""Self-attentive sequential recommendation (Kang and McAuley 2018)."""

from flax import linen as nn
from jax import Array

from jdistill.data.base import Schema
from jdistill.errors import UsageError
from jdistill.models.base import model, positive_integer
from jdistill.models.recommend._scores import Request, asking, embed, require_interactions, score
from jdistill.pytrees import require_fraction

_glorot = nn.initializers.glorot_uniform()


@model("sasrec", teacher={"dim": 128, "heads": 2}, student={"dim": 16, "layers": 1})
class SASRec(nn.Module):
    """Self-attention over the items met before (Kang and McAuley 2018), scored by inner products with item embeddings.

    An item's embedding times sqrt(D), and its position's, counted from the end of the history, go through `layers`
    blocks. As in the authors' code a block normalises the queries alone, keys and values are read from the block's
    unnormalised input, and the residual is of what was normalised: x = Q + attention(Q, x), Q = norm(x); then
    x = Y + feedforward(Y), Y = norm(x). No output projection follows the heads; the feed-forward network is linear, ReLU,
    linear of D units; a last LayerNorm (epsilon 1e-8) ends the network. A position attends to itself and those before
    it. Where the history is filled up the embedding is zero, nothing attends to it and it stays zero. Parameters: `item`
    [items, D], `position` [L, D] and the blocks'; weights start Glorot uniform, biases as 0.

    Where each position asks (B = S L) the vectors of all positions are the users', else those of the last ones.

    Features: `layer1`, `layer2`, ... [B, D], what a block hands on; `user` [B, D], also as `embedding`; `item` [B, K, D],
    [C, D] or [items, D].

    Attributes:
      schema: of the data: how many items, how long the histories.
      dim: D.
      layers: the number of blocks.
      heads: of the attention; a divisor of `dim`.
      dropout: probability in [0, 1), of the embeddings, the attention's weights and both feed-forward layers.

    Raises:
      UsageError: a `dim`, `layers` or `heads` that is not a positive integer, `heads` that do not divide `dim`, a
        `dropout` outside [0, 1), data without users and items or without histories.
    """

    schema: Schema
    dim: int = 64
    layers: int = 2
    heads: int = 1
    dropout: float = 0.2

    def __post_init__(self) -> None:
        require_interactions(self.schema, history=True)
        positive_integer(dim=self.dim, layers=self.layers, heads=self.heads)
        if self.dim % self.heads:
            raise UsageError(f"heads must divide dim={self.dim}, got {self.heads}")
        require_fraction(dropout=self.dropout)
        super().__post_init__()

    @nn.compact
    def __call__(self, inputs: Request, train: bool = False) -> tuple[Array, dict[str, Array]]:
        table = self.param("item", _glorot, (self.schema.items, self.dim))
        positions = self.param("position", _glorot, (self.schema.history, self.dim))
        history, rows = inputs["history"], inputs["user"].shape[0]
        vectors, known = embed(table, history)
        x = vectors * self.dim**0.5 + positions[self.schema.history - history.shape[1] :]
        x = nn.Dropout(self.dropout)(x, deterministic=not train) * known[..., None]
        mask = nn.make_causal_mask(history, dtype=bool) & known[:, None, None]
        features: dict[str, Array] = {}
        for i in range(1, self.layers + 1):
            x = Block(self.heads, self.dropout, name=f"block{i}")(x, mask, train) * known[..., None]
            features[f"layer{i}"] = asking(x, rows)
        user = layer_norm("norm")(asking(x, rows))
        logits, item = score(user, table, inputs.get("items"))
        return logits, {**features, "user": user, "embedding": user, "item": item}


class Block(nn.Module):
    """Attention of the normalised input to the input, then a feed-forward network, as `SASRec` describes: [S, L, D]."""

    heads: int
    dropout: float

    @nn.compact
    def __call__(self, x: Array, mask: Array, train: bool) -> Array:
        normalised = layer_norm("norm1")(x)
        query, key, value = (
            nn.Dense(x.shape[-1], kernel_init=_glorot, name=name)(given).reshape(*x.shape[:-1], self.heads, -1)
            for name, given in (("query", normalised), ("key", x), ("value", x))
        )
        random = self.make_rng("dropout") if train and self.dropout else None
        mixed = nn.dot_product_attention(
            query, key, value, mask=mask, dropout_rng=random, dropout_rate=self.dropout, broadcast_dropout=False,
            deterministic=not train,
        )  # fmt: skip
        normalised = layer_norm("norm2")(normalised + mixed.reshape(x.shape))
        x = nn.relu(nn.Dense(x.shape[-1], kernel_init=_glorot, name="fc1")(normalised))
        x = nn.Dropout(self.dropout)(x, deterministic=not train)
        x = nn.Dense(x.shape[-1], kernel_init=_glorot, name="fc2")(x)
        return normalised + nn.Dropout(self.dropout)(x, deterministic=not train)


def layer_norm(name: str) -> nn.LayerNorm:
    return nn.LayerNorm(epsilon=1e-8, use_fast_variance=False, name=name)
