"""The two towers against a NumPy form; items without ids; what the data lack is left out."""

import jax
import numpy as np
import pytest

from jdistill.data.base import Schema, Side
from jdistill.errors import UsageError
from tests.models.recommend.shop import (
    EDGES,
    HISTORY,
    ITEMS,
    PAIRS,
    SCHEMA,
    SHARED,
    SIDE,
    USER,
    USERS,
    network,
    request,
    run,
    started,
)


def tower(p, x):
    x = np.maximum(x @ p["fc1"]["kernel"] + p["fc1"]["bias"], 0)
    return x @ p["last"]["kernel"] + p["last"]["bias"]


def towers(p, ids=True):
    """The vectors of the users of the request and of all items."""
    item = tower(p["item_tower"], SIDE.item_features) + (p["item"] if ids else 0)
    user = p["user"][USER] + tower(p["user_tower"], SIDE.user_features[USER])
    for row, history in enumerate(HISTORY):
        met = [item[i] for i in history if i < ITEMS]
        if met:
            user[row] += np.mean(met, 0) @ p["history"]["kernel"]
    return user, item


@pytest.mark.parametrize("ids", [True, False])
@pytest.mark.parametrize("normalised", [False, True])
def test_values(ids, normalised):
    model = network("two_tower", dim=6, widths=(5,), ids=ids, normalised=normalised, temperature=0.5)
    params, state = started(model, scale=0.6)
    assert ("item" in params) == ids
    user, item = towers(jax.tree.map(np.asarray, params), ids)
    if normalised:
        user, item = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (user, item))
    got = run(model, params, state, request(SHARED))
    np.testing.assert_allclose(got.features["user"], user, atol=1e-5)
    np.testing.assert_allclose(got.logits, user @ item[SHARED].T / 0.5, rtol=1e-4, atol=1e-4)


def test_few_items_of_a_large_catalogue():
    """Where fewer items are asked for than there are, the tower reads those alone: the same scores."""
    rng = np.random.default_rng(2)
    schema = Schema(users=USERS, items=100, history=SCHEMA.history)
    side = Side(EDGES, item_features=rng.normal(size=(100, 4)).astype(np.float32))
    model = network("two_tower", schema, side, dim=6)
    params, state = started(model, scale=0.6)
    few, every = (run(model, params, state, request(items)).logits for items in (PAIRS, None))
    np.testing.assert_allclose(few, np.take_along_axis(np.asarray(every), PAIRS, 1), atol=1e-5)


def test_items_are_their_features_without_ids():
    """Two items of equal features have equal scores, whatever training has seen."""
    features = SIDE.item_features.copy()
    features[ITEMS - 1] = features[2]
    model = network("two_tower", side=Side(EDGES, item_features=features), ids=False)
    params, state = started(model, scale=0.6)
    logits = run(model, params, state, request()).logits
    np.testing.assert_allclose(logits[:, ITEMS - 1], logits[:, 2], atol=1e-6)
    assert np.abs(logits[:, 3] - logits[:, 2]).max() > 1e-3


def test_normalised_scores_are_cosines_even_of_zero_vectors():
    model = network("two_tower", normalised=True, side=None)
    params, state = started(model)
    assert state == {}
    params = jax.tree.map(np.zeros_like, params)
    gradient = jax.jit(jax.grad(lambda p: model.apply(p, state, request())[0].logits.sum()))(params)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradient))
    other = started(model, scale=3.0)
    assert np.abs(run(model, *other, request()).logits).max() <= 1 + 1e-6


def test_features_are_state_and_not_trained():
    params, state = started(network("two_tower"))
    np.testing.assert_array_equal(state["features"]["item"], SIDE.item_features)
    np.testing.assert_array_equal(state["features"]["user"], SIDE.user_features)
    assert set(params) == {"user", "item", "history", "user_tower", "item_tower"}


def test_refuses_features_of_other_items():
    with pytest.raises(UsageError, match=rf"item features must be \[{ITEMS}, F\], a row for each item, got shape \(5, 4\)"):
        network("two_tower", side=Side(EDGES, item_features=np.zeros((5, 4), np.float32)))
