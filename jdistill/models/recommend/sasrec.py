"""Self-attentive sequential recommendation (Kang and McAuley 2018)."""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from jdistill.data.base import Schema
from jdistill.errors import UsageError
from jdistill.models.base import model, positive_integer, positive_integers
from jdistill.models.recommend._scores import Request, asking, embed, require_interactions, score
from jdistill.pytrees import require_fraction
from jdistill.types import Factors

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
      hidden: units of the feed-forward network of each block; None for D.
      kept_heads: of each block the heads that it has, counted from 0 to `heads` - 1; the other ones' D / heads units of
        the attention's output are 0. None for all.

    Raises:
      UsageError: a `dim`, `layers` or `heads` that is not a positive integer, `heads` that do not divide `dim`, a
        `dropout` outside [0, 1), `hidden` or `kept_heads` that do not fit the blocks, data without users and items or
        without histories.
    """

    schema: Schema
    dim: int = 64
    layers: int = 2
    heads: int = 1
    dropout: float = 0.2
    hidden: tuple[int, ...] | None = None
    kept_heads: tuple[tuple[int, ...], ...] | None = None

    def __post_init__(self) -> None:
        require_interactions(self.schema, history=True)
        positive_integer(dim=self.dim, layers=self.layers, heads=self.heads)
        if self.dim % self.heads:
            raise UsageError(f"heads must divide dim={self.dim}, got {self.heads}")
        require_fraction(dropout=self.dropout)
        if self.hidden is not None:
            positive_integers(self.layers, hidden=self.hidden)
            self.hidden = tuple(self.hidden)
        if self.kept_heads is not None:
            _require_heads(self.layers, self.heads, self.kept_heads)
            self.kept_heads = tuple(map(tuple, self.kept_heads))
        super().__post_init__()

    @property
    def factors(self) -> Factors:
        return Factors()

    @property
    def removable(self) -> dict[str, tuple[Any, ...]]:
        heads = self.kept_heads or (tuple(range(self.heads)),) * self.layers
        return {"hidden": self.hidden or (self.dim,) * self.layers, "kept_heads": heads}

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
            hidden, heads = (self.removable[name][i - 1] for name in ("hidden", "kept_heads"))
            x = Block(self.heads, self.dropout, hidden, heads, name=f"block{i}")(x, mask, train) * known[..., None]
            features[f"layer{i}"] = asking(x, rows)
        user = layer_norm("norm")(asking(x, rows))
        logits, item = score(user, table, inputs.get("items"))
        return logits, {**features, "user": user, "embedding": user, "item": item}


class Block(nn.Module):
    """Attention of the normalised input to the input, then a feed-forward network, as `SASRec` describes: [S, L, D]."""

    heads: int
    dropout: float
    hidden: int
    kept_heads: tuple[int, ...]

    @nn.compact
    def __call__(self, x: Array, mask: Array, train: bool) -> Array:
        normalised = layer_norm("norm1")(x)
        here, size = self.kept_heads, x.shape[-1] // self.heads
        query, key, value = (
            nn.Dense(len(here) * size, kernel_init=_glorot, name=name)(given).reshape(*x.shape[:-1], len(here), size)
            for name, given in (("query", normalised), ("key", x), ("value", x))
        )
        random = self.make_rng("dropout") if train and self.dropout else None
        mixed = nn.dot_product_attention(
            query, key, value, mask=mask, dropout_rng=random, dropout_rate=self.dropout, broadcast_dropout=False,
            deterministic=not train,
        )  # fmt: skip
        if here != tuple(range(self.heads)):
            nothing = jnp.zeros_like(mixed[..., 0, :])
            placed = [mixed[..., here.index(i), :] if i in here else nothing for i in range(self.heads)]
            mixed = jnp.stack(placed, axis=-2)
        normalised = layer_norm("norm2")(normalised + mixed.reshape(x.shape))
        width = x.shape[-1]
        x = nn.relu(nn.Dense(self.hidden, kernel_init=_glorot, name="fc1")(normalised))
        x = nn.Dropout(self.dropout)(x, deterministic=not train)
        x = nn.Dense(width, kernel_init=_glorot, name="fc2")(x)
        return normalised + nn.Dropout(self.dropout)(x, deterministic=not train)


def _require_heads(layers: int, heads: int, kept: Any) -> None:
    """Raises `UsageError` unless `kept` lists, for each block, at least one head."""
    blocks = isinstance(kept, list | tuple) and len(kept) == layers and all(b and isinstance(b, list | tuple) for b in kept)
    if not blocks or not all(i in range(heads) for block in kept for i in block):
        found = f"of {layers} blocks those of its heads 0 to {heads - 1} that it has, such as {[[0]] * layers}"
        raise UsageError(f"kept_heads must list for each {found}, got {kept!r}")


def layer_norm(name: str) -> nn.LayerNorm:
    return nn.LayerNorm(epsilon=1e-8, use_fast_variance=False, name=name)
