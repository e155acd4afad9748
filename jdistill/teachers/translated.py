"""A teacher of another catalogue: requests in the student's numbers of users and items, answered in the teacher's."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jdistill.data import Dataset
from jdistill.errors import UsageError
from jdistill.types import Model, Outputs, PyTree


def maps_between(own: Dataset, other: Dataset) -> dict[str, np.ndarray] | None:
    """Numbers of `own`'s users and items in `other`, by their names; None where both count alike.

    `user` [users] and `item` [items + 1] int32, -1 where `other` lacks it; the last entry of `item`, what a history is
    filled up with, is that of `other`.

    Raises:
      UsageError: the catalogues have neither a user nor an item in common.
    """
    return _maps_between(own, other)


@functools.lru_cache(maxsize=16)
def _maps_between(own: Dataset, other: Dataset) -> dict[str, np.ndarray] | None:
    assert own.side is not None and other.side is not None
    users = _numbers(own.side.user_names, other.side.user_names, own.schema.users, other.schema.users)
    items = _numbers(own.side.item_names, other.side.item_names, own.schema.items, other.schema.items)
    if own.schema == other.schema and all((found == np.arange(len(found))).all() for found in (users, items)):
        return None
    if (users < 0).all() and (items < 0).all():
        raise UsageError(
            f"teacher.data: {other.name} has neither a user nor an item of {own.name}, so its teacher has nothing to say of "
            "them; share an encoder instead (transfer.inherit=true with loss=none)"
        )
    return {"user": users, "item": np.append(items, np.int32(other.schema.items))}


def _numbers(own: np.ndarray | None, other: np.ndarray | None, count: int, others: int) -> np.ndarray:
    """The place in `other` of each name in `own`, -1 where it is not there; the same numbers where there are no names."""
    if own is None or other is None:
        numbers = np.arange(count, dtype=np.int32)
        return np.where(numbers < others, numbers, np.int32(-1))
    place = {name: i for i, name in enumerate(other.tolist())}
    return np.array([place.get(name, -1) for name in own.tolist()], np.int32)


@functools.lru_cache(maxsize=64)
def translated(model: Model, users: int, items: int) -> Model:
    """`model` for requests in the numbers of a catalogue of `users` and `items`; its state is `{"own": ..., "maps": ...}`.

    A candidate that the network does not know gets the lowest score of the row's known ones. A row of whose user and
    history it knows nothing gets zeros for scores and vectors, which says that it has no preference; so does a row of an
    unknown user, whatever the history, where the network has embeddings of users (a parameter `user`).
    """

    def init(key: Any, inputs: Any) -> tuple[PyTree, PyTree]:
        params, state = model.init(key, inputs)
        return params, {"own": state, "maps": {"user": jnp.zeros(users, jnp.int32), "item": jnp.zeros(items + 1, jnp.int32)}}

    def apply(params: PyTree, state: PyTree, inputs: Any, **mode: Any) -> tuple[Outputs, PyTree]:
        maps = state["maps"]
        request, known_row, known_item = _request(maps, inputs, "user" in params)
        outputs, own = model.apply(params, state["own"], request, **mode)
        logits = outputs.logits
        lowest = jnp.min(jnp.where(known_item, logits, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(known_item, logits, jnp.where(jnp.isfinite(lowest), lowest, 0))
        features = {
            name: jnp.where(known_row.reshape(-1, *(1,) * (value.ndim - 1)), value, 0)
            if value.shape[:1] == known_row.shape else value
            for name, value in outputs.features.items()
        }  # fmt: skip
        return Outputs(jnp.where(known_row[:, None], logits, 0), features), {**state, "own": own}

    return Model(init, apply)


def with_maps(variables: tuple[PyTree, PyTree], maps: dict[str, np.ndarray]) -> tuple[PyTree, PyTree]:
    """A network's `(params, state)` as those of the `translated` one."""
    params, state = variables
    return params, {"own": state, "maps": jax.tree.map(jnp.asarray, maps)}


def _request(maps: dict[str, Any], inputs: Any, of_users: bool) -> tuple[Any, Any, Any]:
    """The request in the teacher's numbers, which rows [B] and which candidates it knows something of."""
    users = maps["user"][inputs["user"]]
    items = maps["item"][inputs["items"]] if "items" in inputs else maps["item"][:-1]
    request = {"user": jnp.maximum(users, 0), "items": jnp.maximum(items, 0)}
    known = users >= 0
    if "history" in inputs:
        filled = maps["item"][-1]
        history = maps["item"][inputs["history"]]
        request["history"] = jnp.where(history < 0, filled, history)
        if not of_users:
            some = (request["history"] != filled).any(-1)
            known |= jnp.repeat(some, known.shape[0] // some.shape[0])
    return request, known, items >= 0
