"""Row-wise training of embedding tables (`optim.rows`): a step reads and writes the rows that its batch names, no others.

The rows of each table, and of the optimizer's moments of it, are gathered; the ordinary gradient and update run on these
small tables, [n, D] with n at most the ids of the batch; the new rows are written back in place. No array of a table's
size is made in a step. With Adam this is lazy Adam (as torch's SparseAdam, with weight decay): a row's moments and its
weight decay wait until a batch names it, the bias corrections count all steps; where every batch names every row it is
the dense step. Memory of P parameters in tables, float32: 4 P bytes, and 8 P for Adam's two moments (4 P for SGD's one),
as without `optim.rows`; beside them the dense step holds up to 4 P bytes, the gradient, and the row-wise one some arrays
[n, D] only: 2.3 MB for a batch of 1,024 pairs with a negative each and D = 32, whatever the number of items.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import Array

from jdistill.errors import UsageError
from jdistill.method import Stage
from jdistill.passes import Parts
from jdistill.types import Model, PyTree, Rows

if TYPE_CHECKING:
    from jdistill.train import TrainState

Touched = dict[str, Array]
"""Name of the ids in a request -> the rows that a batch reads: [n] int32, rising, filled up with the number of rows."""


def require(parts: Parts, stage: Stage) -> None:
    """Raises `UsageError` where a stage with `optim.rows` reads or moves rows that its batch does not name."""
    model, change = parts.learners[0].model, "set optim.rows=false"
    if len(parts.learners) > 1 or stage.trains != ("student",):
        names = [learner.name for learner in parts.learners]
        raise UsageError(f"optim.rows trains the student alone, and this scheme trains {', '.join(names)}; {change}")
    if stage.tuning is not None or stage.compressors:
        what = "a tuned part of the student" if stage.tuning is not None else "a student under compression"
        raise UsageError(f"optim.rows trains whole tables as they are, and stage {stage.name} trains {what}; {change}")
    if model.tables is None:
        raise UsageError(
            "optim.rows needs a network whose tables are read by the request's users and items alone, such as student=bpr; "
            f"this one has none, or reads other rows too (histories, graphs, features); {change}"
        )
    for term in stage.terms:
        if term.loss.drawn:
            raise UsageError(f"optim.rows trains on the batch's users and items, and loss {term.name} draws others; {change}")


def gather(parts: Parts, stage: Stage, state: "TrainState", request: dict[str, Array]) -> "tuple[Parts, TrainState, Touched]":
    """Parts and state of a step on the rows that a prepared batch's `request` names; and these rows.

    Losses and frozen networks go on seeing the request's own ids; a loss that calls the student with ids that are not in
    the batch gets other rows than it asked for, unless it declares them (`drawn`), which is refused.

    Raises:
      UsageError: see `require`.
    """
    require(parts, stage)
    (learner,) = parts.learners
    touched: Touched = {}
    for path, name in _tables(learner.model):
        rows = functools.reduce(lambda tree, key: tree[key], path, state.params["student"]).shape[0]
        ids = request[name].reshape(-1)
        touched[name] = jnp.unique(ids, size=min(ids.size, rows), fill_value=rows)
    small = _on_rows(learner.model, touched["user"].size, touched["items"].size)

    def some(leaf: Array, rows: Array) -> Array:
        return leaf.at[rows].get(mode="clip")  # what fills up is no row: whatever it becomes is not written back

    params, opt_state = (_at(_places(learner.model, touched), some, tree) for tree in (state.params, state.opt_state))
    model_state = {**state.model_state, "student": {"own": state.model_state["student"], "rows": touched}}
    state = dataclasses.replace(state, params=params, opt_state=opt_state, model_state=model_state)
    return parts._replace(learners=(learner._replace(model=small),)), state, touched


def scatter(parts: Parts, state: "TrainState", new: "TrainState", touched: Touched) -> "TrainState":
    """`new`, the state after a step on gathered rows, with the tables of `state`, into which its rows are written."""

    def written(leaf: Array, rows: Array, values: Array) -> Array:
        return leaf.at[rows].set(values, mode="drop", indices_are_sorted=True)

    places = _places(parts.learners[0].model, touched)
    params = _at(places, written, state.params, new.params)
    opt_state = _at(places, written, state.opt_state, new.opt_state)
    model_state = {**new.model_state, "student": new.model_state["student"]["own"]}
    return dataclasses.replace(new, params=params, opt_state=opt_state, model_state=model_state)


def _tables(model: Model) -> Rows:
    return () if model.tables is None else model.tables.ids


def _places(model: Model, touched: Touched) -> dict[tuple[str, ...], Array]:
    """How the paths of the tables end, in the parameters and in the moments that mirror them, and the rows of each."""
    return {("student", *path): touched[name] for path, name in _tables(model)}


def _at(places: dict[tuple[str, ...], Array], change: Callable[..., Array], tree: PyTree, *others: PyTree) -> PyTree:
    """The last of the trees, with `change(leaf, rows, *leaves of others)` for the leaves at `places`."""

    def one(path: Any, leaf: Array, *more: Array) -> Array:
        names = tuple(getattr(key, "key", None) for key in path)
        rows = next((rows for place, rows in places.items() if names[-len(place) :] == place), None)
        return (leaf, *more)[-1] if rows is None else change(leaf, rows, *more)

    return jax.tree_util.tree_map_with_path(one, tree, *others)


@functools.lru_cache(maxsize=64)
def _on_rows(model: Model, users: int, items: int) -> Model:
    """`model` on tables of some rows, whose numbers its state holds: ids of a request become places among them."""
    assert model.tables is not None
    small = model.tables.sized(users, items)

    def apply(params: PyTree, state: PyTree, inputs: Any, **mode: Any) -> tuple[Any, PyTree]:
        rows = state["rows"]
        placed = {name: jnp.searchsorted(rows[name], ids) if name in rows else ids for name, ids in inputs.items()}
        outputs, own = small.apply(params, state["own"], placed, **mode)
        return outputs, {"own": own, "rows": rows}

    return model._replace(apply=apply)


__all__ = ["gather", "require", "scatter"]
