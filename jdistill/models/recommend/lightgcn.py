"""LightGCN (He et al. 2020): embeddings propagated over the graph of users and items."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array
from jax.custom_batching import sequential_vmap
from jax.experimental import sparse
from scipy.sparse import csr_array

from jdistill.data.base import Schema, Side
from jdistill.errors import UsageError
from jdistill.models.base import model, positive_integer
from jdistill.models.recommend._scores import Request, holding, require_interactions, score
from jdistill.pytrees import require_positive
from jdistill.types import Factors, Model


@model("lightgcn", teacher={"dim": 200}, student={"dim": 20})
def lightgcn(schema: Schema, side: Side, dim: int = 20, layers: int = 3, init_std: float = 0.1) -> Model:
    """LightGCN (He et al. 2020): means of embeddings propagated over the graph of the training pairs; inner products.

    A layer is E' = A E with A_ui = 1 / sqrt(degree_u degree_i) for a training pair (u, i), without weights or
    activations (equation 3); a user and an item are the mean of their embeddings after 0, 1, ..., `layers` layers
    (equation 4 with equal weights). The only parameters are the embeddings of layer 0, `user` [users, D] and `item`
    [items, D]; they start as N(0, `init_std`), 0.1 as in the authors' PyTorch code. The graph is in the state, `graph`.

    Features: `user` [B, D], also as `embedding`, and `item` [B, K, D], [C, D] or [items, D], of the propagated embeddings.

    Args:
      schema: of the data: how many users and items.
      side: of the data: the training pairs.
      dim: D.
      layers: the number of propagation layers.
      init_std: standard deviation of the embeddings as initialised.

    Raises:
      UsageError: a `dim` or `layers` that is not a positive integer, an `init_std` that is not positive, data without
        users and items or without pairs.
    """
    require_interactions(schema)
    if side is None or not len(side.edges):
        raise UsageError("propagates over the training pairs of users and items; this data has none")
    return _on_graph(LightGCN(schema, len(side.edges), dim, layers, init_std), side)


@functools.lru_cache(maxsize=64)
def _on_graph(module: "LightGCN", side: Side) -> Model:
    return holding(module, "graph", adjacency(side.edges, module.schema.users, module.schema.items))


def adjacency(edges: np.ndarray, users: int, items: int) -> dict[str, np.ndarray]:
    """The pairs [N, 2] (user, item), each once, as rows of users and as rows of items (compressed sparse rows), int32.

    `item` [N] and `user_start` [users + 1]: user u has the items `item[user_start[u]:user_start[u + 1]]`; `user` [N] and
    `item_start` [items + 1] likewise.
    """
    by_user = csr_array((np.ones(len(edges), np.int8), (edges[:, 0], edges[:, 1])), shape=(users, items))
    by_item = by_user.T.tocsr()
    arrays = {"item": by_user.indices, "user_start": by_user.indptr, "user": by_item.indices, "item_start": by_item.indptr}
    return {name: array.astype(np.int32) for name, array in arrays.items()}


class LightGCN(nn.Module):
    """The network of `lightgcn`, for a graph of `edges` pairs."""

    schema: Schema
    edges: int
    dim: int = 20
    layers: int = 3
    init_std: float = 0.1

    def __post_init__(self) -> None:
        positive_integer(dim=self.dim, layers=self.layers)
        require_positive(init_std=self.init_std)
        super().__post_init__()

    @property
    def factors(self) -> Factors:
        return Factors()

    @nn.compact
    def __call__(self, inputs: Request, train: bool = False) -> tuple[Array, dict[str, Array]]:
        del train
        users, items = self.schema.users, self.schema.items
        shapes = {"item": self.edges, "user_start": users + 1, "user": self.edges, "item_start": items + 1}
        graph = {name: self.variable("graph", name, jnp.zeros, size, jnp.int32).value for name, size in shapes.items()}
        normal = nn.initializers.normal(self.init_std)
        embeddings = self.param("user", normal, (users, self.dim)), self.param("item", normal, (items, self.dim))
        user_table, item_table = propagate(graph, *embeddings, self.layers)
        user = user_table[inputs["user"]]
        logits, item = score(user, item_table, inputs.get("items"))
        return logits, {"user": user, "embedding": user, "item": item}


def propagate(graph: dict[str, Array], user: Array, item: Array, layers: int) -> tuple[Array, Array]:
    """The means of the embeddings [users, D] and [items, D] after 0 to `layers` layers; `graph` as `adjacency` gives it."""
    by_user, by_item = (graph["item"], graph["user_start"]), (graph["user"], graph["item_start"])
    user_scale, item_scale = _inverse_root_degrees(graph["user_start"]), _inverse_root_degrees(graph["item_start"])
    users, items = user, item
    for _ in range(layers):
        user, item = (
            user_scale * _neighbour_sums(by_user, by_item, item_scale * item),
            item_scale * _neighbour_sums(by_item, by_user, user_scale * user),
        )
        users, items = users + user, items + item
    return users / (layers + 1), items / (layers + 1)


def _inverse_root_degrees(start: Array) -> Array:
    """[rows, 1] float32; 0 for a row without neighbours."""
    degree = jnp.diff(start)[:, None]
    return jnp.where(degree > 0, jax.lax.rsqrt(jnp.maximum(degree, 1).astype(jnp.float32)), 0)


@sequential_vmap  # the sparse product of a batch of graphs would leave the fast kernel
def _row_sums(rows: tuple[Array, Array], x: Array) -> Array:
    index, start = rows
    ones = jnp.ones(index.shape, x.dtype)
    return sparse.BCSR((ones, index, start), shape=(start.shape[0] - 1, x.shape[0])) @ x


@jax.custom_vjp
def _neighbour_sums(rows: tuple[Array, Array], columns: tuple[Array, Array], x: Array) -> Array:
    """For each row the sum of its neighbours' vectors; `columns` is the transposed graph, which the gradient takes."""
    del columns
    return _row_sums(rows, x)


def _sums_forward(rows, columns, x):
    return _row_sums(rows, x), (rows, columns)


def _sums_backward(graph, gradient):
    rows, columns = graph
    return None, None, _neighbour_sums(columns, rows, gradient)


_neighbour_sums.defvjp(_sums_forward, _sums_backward)
