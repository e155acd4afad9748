"""Flax networks as `Model`s: the only file that knows Flax's two faces.

A module's call returns `(logits, features)`; a Linen module takes `(inputs, train)`, an NNX module `(inputs, rngs=None)`.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

from jdistill.errors import UsageError
from jdistill.types import Model, Outputs, Tables, Widths


def from_linen(module: nn.Module) -> Model:
    """The `Model` of a Linen module whose call is `(inputs, train: bool) -> (logits, features)`.

    `inputs` are an array [B, ...] or a pytree of arrays, such as a request to a recommender (see `Batch`).
    Equal modules give the same functions, so that programs compiled for one run serve the next. A recommender may name
    its `embedding_tables`, the `Rows` of `Tables`; its field `schema` then says how many rows they have. One whose scores
    are inner products has `factors`.

    A network whose units can be removed has a property `removable`: field -> its present value, a number of units or a
    tuple of such, with what None stands for filled in; an entry that is a tuple itself lists which units there are. Its
    `streams` are tuples of names (see `Widths`), each the entries that residual connections force to be equal.
    """
    return _from_linen(module)


@functools.lru_cache(maxsize=256)
def _from_linen(module: nn.Module) -> Model:
    @functools.partial(jax.jit, static_argnums=(1, 2))  # one program instead of hundreds of tiny ones
    def variables(key, structure, shapes):
        return module.init(key, jax.tree.unflatten(structure, [jnp.zeros(*shape) for shape in shapes]), train=False)

    def init(key, inputs):
        leaves, structure = jax.tree.flatten(inputs)
        single = jax.tree_util.treedef_is_leaf(structure)  # the parts of a request need not have equally many rows
        shapes = tuple(((1, *leaf.shape[1:]) if single else leaf.shape, leaf.dtype) for leaf in leaves)
        out = dict(variables(key, structure, shapes))
        return out.pop("params", {}), out

    def apply(params, state, inputs, *, key=None, train=False):
        call = functools.partial(module.apply, {"params": params, **state}, inputs, train=train)
        if not train:
            return Outputs(*call()), state
        out, new_state = call(rngs=None if key is None else {"dropout": key}, mutable=list(state))
        return Outputs(*out), dict(new_state)

    def sized(users, items):
        return from_linen(module.clone(schema=dataclasses.replace(module.schema, users=users, items=items)))

    ids = tuple(getattr(module, "embedding_tables", ()))
    tables = Tables(ids, sized) if ids else None
    return Model(init, apply, _head, tables, _widths(module), getattr(module, "factors", None))


def _widths(module: nn.Module) -> Widths | None:
    """The removable widths that a module declares."""
    fields: dict[str, Any] = getattr(module, "removable", {})
    together = {names[0]: names for names in getattr(module, "streams", ())}
    follow = {name for names in together.values() for name in names[1:]}
    units: dict[str, Any] = {}
    for field, value in fields.items():
        units |= {f"{field}.{i}": entry for i, entry in enumerate(value)} if isinstance(value, tuple) else {field: value}
    if not units:
        return None

    def changed(kept: dict[str, Sequence[int]]) -> dict[str, Any]:
        entries = {name: list(entry) if isinstance(entry, tuple) else entry for name, entry in units.items()}
        for name, chosen in kept.items():
            for same in together.get(name, (name,)):
                old = units[same]
                listed = isinstance(old, tuple)
                entries[same] = [old[i % len(old)] for i in chosen] if listed else len(chosen)
        return {
            field: [entries[f"{field}.{i}"] for i in range(len(value))] if isinstance(value, tuple) else entries[field]
            for field, value in fields.items()
        }

    def resized(sizes: dict[str, int]) -> Model:
        fields = changed({name: range(size) for name, size in sizes.items()})
        return from_linen(module.clone(**{field: _hashable(value) for field, value in fields.items()}))

    own = {name: entry for name, entry in units.items() if name not in follow}
    return Widths(
        sizes=tuple((name, len(entry) if isinstance(entry, tuple) else entry) for name, entry in own.items()),
        streams=frozenset(together),
        indexed=frozenset(name for name, entry in own.items() if isinstance(entry, tuple)),
        changed=changed,
        resized=resized,
    )


def _hashable(value: Any) -> Any:
    """Lists as tuples."""
    return tuple(map(_hashable, value)) if isinstance(value, list) else value


def _head(params, embedding):
    """The linear layer `fc`, which ends every network here."""
    if "fc" not in params or set(params["fc"]) != {"kernel", "bias"}:
        raise UsageError("this network has no last linear layer named 'fc', which this loss or scheme needs")
    return embedding @ params["fc"]["kernel"] + params["fc"]["bias"]


@functools.lru_cache(maxsize=256)
def from_nnx(build: Callable[..., nnx.Module]) -> Model:
    """The `Model` of an NNX network; `build(rngs=nnx.Rngs(...))` makes the module.

    Dropout and BatchNorm follow `train`; dropout must take its randomness from the `rngs` given to the call
    (`self.dropout(x, rngs=rngs)`), since implicit NNX randomness would repeat the same mask at every step.
    """
    modes: dict[bool, dict[str, Any]] = {
        True: {"deterministic": False, "use_running_average": False},
        False: {"deterministic": True, "use_running_average": True},
    }
    blank = nnx.eval_shape(lambda: build(rngs=nnx.Rngs(0)))
    graphs = {
        train: nnx.split(nnx.view(blank, raise_if_not_found=False, **mode), nnx.Param, ...)[0] for train, mode in modes.items()
    }

    @jax.jit
    def states(key):
        _, params, rest = nnx.split(build(rngs=nnx.Rngs(key)), nnx.Param, ...)  # type: ignore[misc]
        return nnx.to_pure_dict(params), nnx.to_pure_dict(rest)

    def init(key, inputs):
        del inputs
        return states(key)

    def apply(params, state, inputs, *, key=None, train=False):
        module = nnx.merge(graphs[train], params, state)
        out = module(inputs, rngs=nnx.Rngs(dropout=key) if train and key is not None else None)
        rest = nnx.to_pure_dict(nnx.state(module, nnx.Not(nnx.Param)))
        return Outputs(*out), rest if train else state

    return Model(init, apply)


def as_model(network: Any) -> Model:
    """A `Model` from a `Model`, a Linen module or an NNX builder; raises `UsageError` for anything else."""
    if isinstance(network, Model):
        return network
    if isinstance(network, nn.Module):
        return from_linen(network)
    if callable(network):
        return from_nnx(network)
    raise UsageError(f"a model must be a Linen module, an NNX builder or a Model, got {type(network).__name__}")
