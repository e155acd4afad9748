"""BPR's factorisation, NeuMF and CDAE against NumPy forms with loops."""

import jax
import numpy as np
import pytest

from tests.models.recommend.shop import HISTORY, ITEMS, LENGTH, PAIRS, SHARED, USER, network, request, run, started


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def test_bpr():
    model = network("bpr", dim=6, bias=True)
    params, state = started(model, scale=1.0)
    got = run(model, params, state, request(PAIRS))
    for row, user in enumerate(USER):
        for column, item in enumerate(PAIRS[row]):
            expected = np.dot(params["user"][user], params["item"][item]) + params["bias"][item]
            np.testing.assert_allclose(got.logits[row, column], expected, atol=1e-5)


def test_embeddings_start_as_stated():
    params, _ = started(network("bpr", dim=2000, bias=True))
    for name in ("user", "item"):
        assert abs(np.std(params[name]) - 0.01) < 2e-4 and abs(np.mean(params[name])) < 2e-4
    np.testing.assert_array_equal(params["bias"], np.zeros(ITEMS))
    assert abs(np.std(started(network("lightgcn", dim=2000))[0]["user"]) - 0.1) < 2e-3


@pytest.fixture(scope="module")
def neumf():
    model = network("neumf", dim=6, layers=3)
    return model, *started(model, scale=0.7)


def neumf_score(p, user, item):
    (mf_user, user), (mf_item, item) = np.split(p["user"][user], 2), np.split(p["item"][item], 2)
    x, hidden = np.concatenate([user, item]), []
    for i in (1, 2, 3):
        hidden.append(x := np.maximum(x @ p[f"fc{i}"] + p[f"fc{i}_bias"], 0))
    return (np.concatenate([mf_user * mf_item, x]) @ p["prediction"] + p["prediction_bias"])[0], hidden


def test_neumf(neumf):
    model, params, state = neumf
    p, got = jax.tree.map(np.asarray, params), run(model, params, state, request(PAIRS))
    for row, user in enumerate(USER):
        for column, item in enumerate(PAIRS[row]):
            score, hidden = neumf_score(p, user, item)
            np.testing.assert_allclose(got.logits[row, column], score, atol=1e-5)
            for i, activation in enumerate(hidden, 1):
                np.testing.assert_allclose(got.features[f"hidden{i}"][row, column], activation, atol=1e-5)
    assert p["fc2"].shape == (6, 3) and p["fc3"].shape == (3, 1)


@pytest.mark.parametrize("chunk", [1, 4, 13, 512])
def test_neumf_in_chunks(neumf, chunk):
    _, params, state = neumf
    got = run(network("neumf", dim=6, layers=3, chunk=chunk), params, state, request())
    p = jax.tree.map(np.asarray, params)
    expected = [[neumf_score(p, user, item)[0] for item in range(ITEMS)] for user in USER]
    np.testing.assert_allclose(got.logits, expected, atol=2e-5)


def test_neumf_bounds_its_memory():
    """The whole catalogue needs the logits and one chunk's hidden layers, not those of all items."""
    from jdistill.data.base import Schema

    model = network("neumf", schema=Schema(users=50, items=20_000), dim=64, chunk=256)
    params, state = jax.eval_shape(lambda: started(model))
    inputs = {"user": jax.ShapeDtypeStruct((64,), np.int32)}
    apply = jax.jit(lambda *arrays: model.apply(*arrays)[0].logits)
    memory = apply.lower(params, state, inputs).compile().memory_analysis()
    hidden, logits = 64 * 20_000 * 64 * 4, 64 * 20_000 * 4
    assert memory.temp_size_in_bytes < 3 * logits + 3 * hidden * 256 / 20_000 < hidden / 4


@pytest.mark.parametrize("fields", [{"pooling": "sum"}, {"pooling": "mean"}, {"pooling": "sum", "activation": "identity"}])
@pytest.mark.parametrize("every", [False, True])
def test_cdae(fields, every):
    model = network("cdae", dim=6, **fields)
    params, state = started(model, scale=0.7)
    p = jax.tree.map(np.asarray, params)
    user = np.repeat(USER, LENGTH) if every else USER
    got = run(model, params, state, request(SHARED, user=user))
    for row, own in enumerate(user):
        history = HISTORY[row // LENGTH, : row % LENGTH + 1] if every else HISTORY[row]
        met = [p["met"][item] for item in history if item < ITEMS] or [np.zeros(6)]
        total = np.sum(met, 0) / (len(met) if fields["pooling"] == "mean" else 1)
        before = p["user"][own] + total + p["hidden_bias"]
        hidden = before if fields.get("activation") else sigmoid(before)
        np.testing.assert_allclose(got.features["user"][row], hidden, atol=1e-5)
        np.testing.assert_allclose(got.logits[row], p["item"][SHARED] @ hidden + p["bias"][SHARED], atol=2e-5)


def test_cdae_drops_items_of_the_history():
    """With the user's own vector 0 and one item each, the hidden layer is 0 or twice the item, at p = 1/2."""
    model = network("cdae", dim=6, dropout=0.5, activation="identity")
    params, state = started(model, scale=1.0)
    params = {**params, "user": 0 * params["user"], "hidden_bias": 0 * params["hidden_bias"]}
    history = np.full((400, LENGTH), ITEMS, np.int32)
    history[:, -1] = 4
    inputs = request(SHARED, user=np.zeros(400, np.int32), history=history)
    hidden = np.asarray(run(model, params, state, inputs, train=True, key=jax.random.key(0)).features["user"])
    dropped = np.all(hidden == 0, 1)
    assert 150 < dropped.sum() < 250
    np.testing.assert_allclose(hidden[~dropped], np.tile(2 * params["met"][4], ((~dropped).sum(), 1)), atol=1e-6)
