"""SASRec and GRU4Rec against NumPy forms of one history, position by position."""

import jax
import numpy as np
import pytest

from tests.models.recommend.shop import HISTORY, ITEMS, LENGTH, SHARED, USER, network, request, run, started

D = 6
EVERY = np.repeat(USER, LENGTH)


def norm(p, x):
    return p["scale"] * (x - x.mean()) / np.sqrt(x.var() + 1e-8) + p["bias"]


def dense(p, x):
    return x @ p["kernel"] + p["bias"]


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def attention_states(p, history, layers, heads):
    """The state [L, D] after each item, those before the last norm of each layer, and the final ones."""
    known = [t for t in range(LENGTH) if history[t] < ITEMS]
    x = {t: p["item"][history[t]] * np.sqrt(D) + p["position"][t] for t in known}
    between = []
    for i in range(1, layers + 1):
        block, after = p[f"block{i}"], {}
        for t in known:
            normalised = norm(block["norm1"], x[t])
            seen = [u for u in known if u <= t]
            query = np.split(dense(block["query"], normalised), heads)
            keys = [np.split(dense(block["key"], x[u]), heads) for u in seen]
            values = [np.split(dense(block["value"], x[u]), heads) for u in seen]
            mixed = []
            for h in range(heads):
                weights = softmax(np.array([query[h] @ key[h] for key in keys]) / np.sqrt(D / heads))
                mixed.append(sum(w * value[h] for w, value in zip(weights, values, strict=True)))
            normalised = norm(block["norm2"], normalised + np.concatenate(mixed))
            after[t] = normalised + dense(block["fc2"], np.maximum(dense(block["fc1"], normalised), 0))
        x = after
        between.append(x)
    return between, {t: norm(p["norm"], x[t]) for t in known}


@pytest.fixture(scope="module")
def sasrec():
    model = network("sasrec", dim=D, layers=2, heads=2)
    return model, *started(model, scale=0.6)


def test_sasrec(sasrec):
    model, params, state = sasrec
    p = jax.tree.map(np.asarray, params)
    got = run(model, params, state, request(SHARED, user=EVERY))
    for s, history in enumerate(HISTORY):
        between, final = attention_states(p, history, 2, 2)
        for t in final:
            row = s * LENGTH + t
            np.testing.assert_allclose(got.features["user"][row], final[t], atol=5e-5)
            np.testing.assert_allclose(got.logits[row], p["item"][SHARED] @ final[t], atol=1e-4)
            for i in (1, 2):
                np.testing.assert_allclose(got.features[f"layer{i}"][row], between[i - 1][t], atol=5e-5)


def gru_states(p, history):
    state, states, cell = np.zeros(D), {}, p["layer1"]["gru"]
    for t, item in enumerate(history):
        if item < ITEMS:
            x = p["item"][item]
            r = 1 / (1 + np.exp(-(dense(cell["ir"], x) + state @ cell["hr"]["kernel"])))
            z = 1 / (1 + np.exp(-(dense(cell["iz"], x) + state @ cell["hz"]["kernel"])))
            n = np.tanh(dense(cell["in"], x) + r * dense(cell["hn"], state))
            state = (1 - z) * n + z * state
        states[t] = state
    return states


def test_gru4rec():
    model = network("gru4rec", dim=D)
    params, state = started(model, scale=0.6)
    p = jax.tree.map(np.asarray, params)
    got = run(model, params, state, request(SHARED, user=EVERY))
    for s, history in enumerate(HISTORY):
        for t, expected in gru_states(p, history).items():
            row = s * LENGTH + t
            np.testing.assert_allclose(got.features["user"][row], expected, atol=1e-5)
            np.testing.assert_allclose(got.logits[row], p["item"][SHARED] @ expected + p["bias"][SHARED], atol=2e-5)


@pytest.mark.parametrize("name", ["sasrec", "gru4rec"])
def test_later_items_change_no_earlier_position(name):
    model = network(name, dim=D, layers=2)
    params, state = started(model, scale=0.6)
    changed = HISTORY.copy()
    changed[:, 3] = [1, 2, 3, 4]
    before, after = (
        np.asarray(run(model, params, state, request(user=EVERY, history=h)).logits).reshape(4, LENGTH, -1)
        for h in (HISTORY, changed)
    )
    np.testing.assert_array_equal(before[:, :3], after[:, :3])
    assert np.all(np.abs(before[1:, 3:] - after[1:, 3:]).max(-1) > 1e-5)  # the last of the first history is filling


def test_gru4rec_state_stays_where_nothing_was_met():
    """Filling between items, which no loader makes, leaves the state as it was."""
    model = network("gru4rec", dim=D)
    params, state = started(model, scale=0.6)
    together, apart = np.array([[13, 13, 13, 2, 5]], np.int32), np.array([[13, 2, 13, 5, 13]], np.int32)
    one, two = (run(model, params, state, request(SHARED, user=USER[:1], history=h)).logits for h in (together, apart))
    np.testing.assert_allclose(one, two, atol=1e-6)


def test_user_without_history_has_finite_gradients():
    for name in ("sasrec", "gru4rec"):
        model = network(name, dim=D)
        params, state = started(model, scale=0.6)

        def objective(params, model=model, state=state):
            inputs = request(user=USER[:1], history=HISTORY[:1])
            return model.apply(params, state, inputs)[0].logits.sum()

        assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(jax.jit(jax.grad(objective))(params)))
