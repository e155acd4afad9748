"""Two-tower retrieval: a user's vector and an item's, each from ids and features."""

import functools

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array

from jdistill.data.base import Schema, Side
from jdistill.errors import UsageError
from jdistill.models.base import model, positive_integer, positive_integers
from jdistill.models.layers import linear
from jdistill.models.recommend._scores import Request, holding, pooled, products, require_interactions
from jdistill.pytrees import require_positive
from jdistill.types import USERS_AND_ITEMS, Factors, Model, Rows


@model("two_tower", teacher={"dim": 128, "widths": (256,)}, student={"dim": 16, "widths": (32,)})
def two_tower(
    schema: Schema,
    side: Side,
    dim: int = 64,
    widths: tuple[int, ...] = (64,),
    ids: bool = True,
    normalised: bool = False,
    temperature: float = 1.0,
    init_std: float = 0.1,
) -> Model:
    """Two towers (as Covington et al. 2016 and Yi et al. 2019): inner products of a user's vector and an item's.

    An item's vector is the embedding of its id plus a multilayer perceptron of its features. A user's is the embedding of
    its id, plus a linear map of the mean item vector of its history, plus a multilayer perceptron of its features. What
    the data lack is left out. Without item ids (`ids=false`) items are their features alone, and those never seen in
    training have scores as good as their features allow. Parameters: `user` [users, D], `item` [items, D], `history`,
    `user_tower` and `item_tower`; embeddings start as N(0, `init_std`), linear layers as PyTorch's `nn.Linear`. The
    features are in the state, `features`.

    Features: `user` [B, D], also as `embedding`, and `item` [B, K, D], [C, D] or [items, D], as they are multiplied
    (of length 1 with `normalised`).

    Args:
      schema: of the data: how many users and items, how long the histories (0: none is read).
      side: of the data: `user_features` and `item_features`.
      dim: D.
      widths: ReLU units of each hidden layer of the perceptrons.
      ids: whether items have embeddings of their ids.
      normalised: whether both vectors are divided by their length.
      temperature: > 0, divides the products.
      init_std: standard deviation of the embeddings as initialised.

    Raises:
      UsageError: a `dim` or width that is not a positive integer, a `temperature` or `init_std` that is not positive, data
        without users and items, `ids=false` with data without item features, features of another number of rows.
    """
    require_interactions(schema)
    sizes = {name: _size(side, name, rows) for name, rows in (("user", schema.users), ("item", schema.items))}
    if not ids and not sizes["item"]:
        raise UsageError("ids must be true where the data have no item features, got false")
    module = TwoTower(schema, sizes["user"], sizes["item"], dim, tuple(widths), ids, normalised, temperature, init_std)
    return _with_features(module, side)


def _size(side: Side | None, name: str, rows: int) -> int:
    """The number of features of users or items, 0 for none."""
    features = getattr(side, f"{name}_features", None)
    if features is None:
        return 0
    if features.ndim != 2 or len(features) != rows:
        raise UsageError(f"{name} features must be [{rows}, F], a row for each {name}, got shape {features.shape}")
    return features.shape[1]


@functools.lru_cache(maxsize=64)
def _with_features(module: "TwoTower", side: Side | None) -> Model:
    sizes = {"user": module.user_features, "item": module.item_features}
    return holding(
        module, "features", {name: getattr(side, f"{name}_features").astype(np.float32) for name, size in sizes.items() if size}
    )


class TwoTower(nn.Module):
    """The network of `two_tower`, for `user_features` and `item_features` numbers of each user and item."""

    schema: Schema
    user_features: int
    item_features: int
    dim: int
    widths: tuple[int, ...]
    ids: bool
    normalised: bool
    temperature: float
    init_std: float

    def __post_init__(self) -> None:
        positive_integer(dim=self.dim)
        positive_integers(widths=self.widths)
        require_positive(temperature=self.temperature, init_std=self.init_std)
        super().__post_init__()

    @property
    def embedding_tables(self) -> Rows:
        """What `optim.rows` updates by rows: nothing where histories and features read more than a request's ids."""
        return () if self.schema.history or self.user_features or self.item_features else USERS_AND_ITEMS

    @property
    def factors(self) -> Factors | None:
        return None if self.embedding_tables else Factors(temperature=self.temperature)

    def setup(self) -> None:
        normal = nn.initializers.normal(self.init_std)
        self.user = self.param("user", normal, (self.schema.users, self.dim))
        if self.ids:
            self.item = self.param("item", normal, (self.schema.items, self.dim))
        if self.user_features:
            shape = (self.schema.users, self.user_features)
            self.of_users = self.variable("features", "user", jnp.zeros, shape)
            self.user_tower = Tower(self.dim, self.widths)
        if self.item_features:
            shape = (self.schema.items, self.item_features)
            self.of_items = self.variable("features", "item", jnp.zeros, shape)
            self.item_tower = Tower(self.dim, self.widths)
        if self.schema.history:
            self.history = nn.Dense(self.dim, use_bias=False)

    def __call__(self, inputs: Request, train: bool = False) -> tuple[Array, dict[str, Array]]:
        del train
        items, history = inputs.get("items"), inputs["history"] if self.schema.history else None
        asked = sum(ids.size for ids in (items, history) if ids is not None)
        # the tower over the whole catalogue, once, is cheaper than over more items than it has
        every = self._items(None) if items is None or asked >= self.schema.items else None
        item = self._look(every, items)
        user = self._user(inputs["user"], every, history)
        if self.normalised:
            user, item = _unit(user), _unit(item)
        return products(user, item) / self.temperature, {"user": user, "embedding": user, "item": item}

    def _items(self, ids: Array | None) -> Array:
        """The vectors of items of any shape of ids, or of all."""

        def rows(table: Array) -> Array:
            return table if ids is None else table[ids]

        parts = [rows(self.item)] if self.ids else []
        if self.item_features:
            parts.append(self.item_tower(rows(self.of_items.value)))
        return functools.reduce(jnp.add, parts)

    def _look(self, every: Array | None, ids: Array | None) -> Array:
        if every is None:
            return self._items(ids)
        return every if ids is None else every[ids]

    def _user(self, own: Array, every: Array | None, history: Array | None) -> Array:
        user = self.user[own]
        if self.user_features:
            user = user + self.user_tower(self.of_users.value[own])
        if history is not None:
            known = history < self.schema.items
            vectors = self._look(every, jnp.where(known, history, 0)) * known[..., None]
            user = user + self.history(pooled(vectors, known, own.shape[0]))
        return user


class Tower(nn.Module):
    """Linear layers with ReLU between: features [..., F] -> [..., D]."""

    dim: int
    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for i, width in enumerate(self.widths, 1):
            x = nn.relu(linear(x, width, name=f"fc{i}"))
        return linear(x, self.dim, name="last")


def _unit(x: Array) -> Array:
    """Vectors of length 1, with finite gradients at 0."""
    return x / jnp.sqrt(jnp.maximum(jnp.sum(jnp.square(x), -1, keepdims=True), 1e-12))
