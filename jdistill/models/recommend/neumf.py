"""Neural matrix factorisation (He et al. 2017)."""

import itertools
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from jdistill.data.base import Schema
from jdistill.models.base import model, positive_integer
from jdistill.models.recommend._scores import Request, products, require_interactions
from jdistill.pytrees import require_positive
from jdistill.types import USERS_AND_ITEMS, Rows

Layers = list[tuple[Array, Array]]


@model("neumf", teacher={"dim": 200}, student={"dim": 20})
class NeuMF(nn.Module):
    """Neural matrix factorisation (He et al. 2017): a product of embeddings and a multilayer perceptron, fused linearly.

    A user and an item have two embeddings of D numbers each, held side by side in `user` [users, 2 D] and `item` [items,
    2 D]: the first halves are multiplied element by element (GMF), the second are concatenated and go through `layers`
    hidden layers of D, D / 2, D / 4, ... ReLU units; one linear layer makes the score of both. As in the authors' code
    embeddings start as N(0, `init_std`), hidden layers Glorot uniform, the last LeCun uniform, biases as 0.

    The whole catalogue is scored `chunk` items at a time; a list of items that the request names is scored at once.

    Features: `user` [B, 2 D], also as `embedding`; `item` [B, K, 2 D], [C, 2 D] or [items, 2 D]; `hidden1`, `hidden2`,
    ... [B, K, width] or [B, C, width] after the ReLU, where the request names items.

    Attributes:
      schema: of the data: how many users and items.
      dim: D.
      layers: the number of hidden layers.
      init_std: standard deviation of the embeddings as initialised.
      chunk: how many items of the whole catalogue are scored at a time.

    Raises:
      UsageError: a `dim`, `layers` or `chunk` that is not a positive integer, an `init_std` that is not positive, data
        without users and items.
    """

    schema: Schema
    dim: int = 20
    layers: int = 3
    init_std: float = 0.01
    chunk: int = 512

    embedding_tables: ClassVar[Rows] = USERS_AND_ITEMS

    def __post_init__(self) -> None:
        require_interactions(self.schema)
        positive_integer(dim=self.dim, layers=self.layers, chunk=self.chunk)
        require_positive(init_std=self.init_std)
        super().__post_init__()

    @nn.compact
    def __call__(self, inputs: Request, train: bool = False) -> tuple[Array, dict[str, Array]]:
        del train
        normal = nn.initializers.normal(self.init_std)
        users = self.param("user", normal, (self.schema.users, 2 * self.dim))
        table = self.param("item", normal, (self.schema.items, 2 * self.dim))
        hidden, last = self._layers()
        user, items = users[inputs["user"]], inputs.get("items")
        features = {"user": user, "embedding": user}
        if items is None:
            return _catalogue(user, table, hidden, last, self.chunk), {**features, "item": table}
        logits, activations = _scores(user, table[items], hidden, last)
        return logits, {**features, "item": table[items], **{f"hidden{i}": x for i, x in enumerate(activations, 1)}}

    def _layers(self) -> tuple[Layers, tuple[Array, Array]]:
        """Kernels and biases of the hidden layers, and of the last one."""
        zeros, widths = nn.initializers.zeros, [max(1, self.dim // 2**i) for i in range(self.layers)]
        hidden = [
            (self.param(f"fc{i}", nn.initializers.glorot_uniform(), shape), self.param(f"fc{i}_bias", zeros, shape[1:]))
            for i, shape in enumerate(itertools.pairwise([2 * self.dim, *widths]), 1)
        ]
        kernel = self.param("prediction", nn.initializers.lecun_uniform(), (self.dim + widths[-1], 1))
        return hidden, (kernel[:, 0], self.param("prediction_bias", zeros, (1,)))


def _scores(user: Array, item: Array, hidden: Layers, last: tuple[Array, Array]) -> tuple[Array, list[Array]]:
    """Logits and hidden activations of users [B, 2 D] with items [B, K, 2 D] or [C, 2 D]."""
    (factor, user), (item_factor, item) = jnp.split(user, 2, axis=-1), jnp.split(item, 2, axis=-1)
    (kernel, bias), dim = hidden[0], user.shape[-1]
    # the first layer of the concatenation, without making it: each half by its own rows of the kernel
    x = nn.relu((user @ kernel[:dim])[:, None] + item @ kernel[dim:] + bias)
    activations = [x]
    for kernel, bias in hidden[1:]:
        activations.append(x := nn.relu(x @ kernel + bias))
    weight, offset = last
    return products(factor * weight[:dim], item_factor) + x @ weight[dim:] + offset, activations


def _catalogue(user: Array, table: Array, hidden: Layers, last: tuple[Array, Array], chunk: int) -> Array:
    """Logits [B, items]; of the hidden layers never more than those of `chunk` items exist."""
    items = table.shape[0]
    ids = jnp.arange(-(-items // chunk) * chunk) % items  # the last chunk is filled up with items scored before
    logits = jax.lax.map(lambda some: _scores(user, table[some], hidden, last)[0], ids.reshape(-1, chunk))
    return jnp.moveaxis(logits, 0, 1).reshape(user.shape[0], -1)[:, :items]
