"""A frozen recommender as tables: what it makes of each user and of each item, computed once."""

import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jdistill.models.recommend._scores import Request, score
from jdistill.types import Factors, Model, Outputs, PyTree

ROWS = 16_384
"""Positions of histories that a call computes, at most."""


def tabled(
    model: Model, variables: tuple[PyTree, PyTree], request: Request, read: Iterable[str], most: float
) -> tuple[Model, tuple[PyTree, PyTree]] | None:
    """A network in evaluation mode as a look-up in tables, with its `(params, state)`.

    It gives the logits and features of `model` for users whose histories are those of `request`, up to rounding, and runs
    no network for them. None for a network without `factors`, or with tables larger than `most` bytes.

    Args:
      model, variables: the recommender, its params and state.
      request: a row for each user, in their order, or one for each position of each user's history; no `items`.
      read: the features that are read. Others keep their names, empty: a loss's default layer must not change with what
        is kept.
      most: bytes.
    """
    if model.factors is None:
        return None
    kept = {"user", *read}

    def of_users(variables: Any, request: Any) -> dict[str, Array]:
        features = model.apply(*variables, {**request, "items": jnp.zeros(1, jnp.int32)}, train=False)[0].features
        return {
            name: value if name in kept else value.reshape(value.shape[0], -1)[:, :0]
            for name, value in features.items() if name not in ("item", "embedding")
        }  # fmt: skip

    def of_items(variables: Any, request: Any) -> Array:
        return model.apply(*variables, request, train=False)[0].features["item"]

    users, asked = len(request.get("history", request["user"])), request["user"]
    positions = len(asked) // users

    def some(start: int, stop: int) -> Any:
        rows = {name: rows[start:stop] for name, rows in request.items()}
        return {**rows, "user": asked[start * positions : stop * positions]}

    of_one, of_all = (jax.eval_shape(call, variables, some(0, 1)) for call in (of_users, of_items))
    if 4 * (users * sum(leaf.size for leaf in jax.tree.leaves(of_one)) + of_all.size) > most:
        return None
    compiled, chunk = jax.jit(of_users), max(1, ROWS // request.get("history", asked[:, None]).shape[1])
    chunks = [compiled(variables, some(start, start + chunk)) for start in range(0, users, chunk)]
    joined = jax.tree.map(lambda *parts: jnp.concatenate(parts), *chunks)
    tables: dict[str, Any] = {
        "user": jax.tree.map(lambda rows: rows.reshape(users, positions, *rows.shape[1:]), joined),
        "item": jax.jit(of_items)(variables, some(0, 1)),
    }
    if model.factors.bias is not None:
        tables["bias"] = variables[0][model.factors.bias]
    return _look_up(model.factors), (tables, {})


@functools.lru_cache(maxsize=16)
def _look_up(factors: Factors) -> Model:
    """The network whose parameters are the tables of `tabled`: `user` {feature: [users, positions, ...]}, `item`, `bias`."""

    def init(key: Any, inputs: Any) -> Any:
        raise NotImplementedError("tables are made of a trained network")

    def apply(params: PyTree, state: PyTree, inputs: Request, **mode: Any) -> tuple[Outputs, PyTree]:
        del mode
        asked, positions = inputs["user"], params["user"]["user"].shape[1]
        found = {name: rows[asked[::positions]] for name, rows in params["user"].items()}
        features = {name: rows.reshape(len(asked), *rows.shape[2:]) for name, rows in found.items()}
        user = features["user"]
        logits, item = score(user, params["item"], inputs.get("items"), params.get("bias"))
        return Outputs(logits / factors.temperature, {**features, "embedding": user, "item": item}), state

    return Model(init, apply)
