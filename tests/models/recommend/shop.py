"""A small shop that the tests of the recommenders share: its data, requests and networks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import jdistill.models  # noqa: F401 (registers the options)
from jdistill.data.base import Schema, Side
from jdistill.modules import as_model
from jdistill.registry import build, options

USERS, ITEMS, LENGTH = 7, 13, 5
NAMES = ["bpr", "cdae", "gru4rec", "lightgcn", "neumf", "sasrec", "two_tower"]
READ_HISTORY = ["cdae", "gru4rec", "sasrec", "two_tower"]
READ_SIDE = ["lightgcn", "two_tower"]

_rng = np.random.default_rng(0)
SCHEMA = Schema(users=USERS, items=ITEMS, history=LENGTH)
EDGES = np.unique(_rng.integers(0, (USERS - 1, ITEMS - 2), (30, 2)), axis=0).astype(np.int32)  # the last ones have none
SIDE = Side(
    EDGES,
    user_features=_rng.normal(size=(USERS, 3)).astype(np.float32),
    item_features=_rng.normal(size=(ITEMS, 4)).astype(np.float32),
)
HISTORY = np.array(
    [[13, 13, 13, 13, 13], [13, 13, 13, 13, 4], [13, 13, 2, 11, 2], [0, 12, 5, 6, 7]], np.int32
)  # none, one, some with one twice, full
USER = np.array([6, 0, 3, 3], np.int32)
PAIRS = np.array([[0, 12], [5, 5], [3, 1], [7, 2]], np.int32)
SHARED = np.array([12, 3, 3, 0, 8], np.int32)


def network(name, schema=SCHEMA, side=SIDE, group="student", **fields):
    given = {"side": side} if name in READ_SIDE else {}
    defaults = {key: default for key, (_, default) in options(group)[name].fields.items()}
    return as_model(build(group, {"name": name, **defaults, **fields}, schema=schema, **given))


def request(items=None, *, history=HISTORY, user=USER):
    parts = {"user": user, "history": history, "items": items}
    return {key: jnp.asarray(value) for key, value in parts.items() if value is not None}


def started(model, inputs=None, *, seed=0, scale=None):
    """Parameters and state; with `scale` normal parameters of that standard deviation, biases too."""
    inputs = request(PAIRS) if inputs is None else inputs
    if not scale:
        return model.init(jax.random.key(seed), inputs)
    params, state = jax.eval_shape(model.init, jax.random.key(seed), inputs)
    if state:
        state = model.init(jax.random.key(seed), inputs)[1]
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape, scale=scale), leaf.dtype), params), state


@functools.cache
def _program(apply, train):
    return jax.jit(lambda params, state, inputs, key: apply(params, state, inputs, key=key, train=train)[0])


def run(model, params, state, inputs, *, train=False, key=None):
    return _program(model.apply, train)(params, state, inputs, key)
