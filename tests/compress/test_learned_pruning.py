"""Trained scores and thresholds: values and gradients by hand, and that what is deployed holds neither."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdistill.compress import MagnitudePrune, apply_all
from jdistill.compress.artifact import read_artifact, write_artifact
from jdistill.compress.base import Stored, enter, finished, weights
from jdistill.compress.learned import MovementPrune, SoftThreshold
from jdistill.errors import RunError, UsageError
from jdistill.pytrees import as_leaves
from jdistill.registry import build
from jdistill.run import run
from jdistill.schedules import Schedule
from tests import tiny
from tests.reference import pruning as reference

KEY = jax.random.key(0)
RANDOM = np.random.default_rng(0)
PARAMS = {
    "fc1": {"kernel": RANDOM.normal(size=(8, 5)).astype(np.float32), "bias": np.full(5, 0.01, np.float32)},
    "items": {"embedding": RANDOM.normal(size=(6, 3)).astype(np.float32)},
}
NAMES = {"fc1.kernel": ("fc1", "kernel"), "items.embedding": ("items", "embedding")}
FACTORS = jax.tree.map(lambda leaf: RANDOM.normal(size=leaf.shape).astype(np.float32), PARAMS)
MOVEMENT, SOFT = MovementPrune(sparsity=0.4), SoftThreshold(s_init=-1.0, decay=0.3)
both = pytest.mark.parametrize("own", [MOVEMENT, SOFT], ids=["movement", "soft threshold"])


def begun(own, params=PARAMS):
    state = jax.jit(own.init)(KEY, params)
    return own.encode(params, state), state


def scored(own=MOVEMENT):
    """A stored tree with scores as training leaves them."""
    stored, state = begun(own)
    scores = {key: jnp.asarray(RANDOM.normal(size=leaf.shape), jnp.float32) for key, leaf in stored["movement"].items()}
    return {**stored, "movement": scores}, state


def gradients(own, stored, state):
    """Of sum(FACTORS * effective), so that dL/dW' is FACTORS."""

    def objective(stored):
        return sum(jax.tree.leaves(jax.tree.map(lambda c, w: (c * w).sum(), FACTORS, apply_all((own,), stored, (state,)))))

    return jax.jit(jax.grad(objective))(stored)


# -- movement


def test_the_highest_scores_stay():
    stored, state = scored()
    for scope in ("layer", "global"):
        acting = apply_all((MovementPrune(sparsity=0.4, scope=scope),), stored, (state,))
        assert set(acting) == set(PARAMS)
        scores = [np.asarray(stored["movement"][key]) for key in NAMES]
        masks = [reference.without_smallest(s, round(0.4 * s.size)) for s in scores]
        if scope == "global":
            together = reference.without_smallest(np.concatenate([s.ravel() for s in scores]), round(0.4 * (40 + 18)))
            masks = [together[:40].reshape(8, 5), together[40:].reshape(6, 3)]
        for (module, name), mask in zip(NAMES.values(), masks, strict=True):
            np.testing.assert_array_equal(acting[module][name], PARAMS[module][name] * mask)
        np.testing.assert_array_equal(acting["fc1"]["bias"], PARAMS["fc1"]["bias"])


def test_gradients_of_scores_pass_straight_through():
    stored, state = scored()
    grads = gradients(MOVEMENT, stored, state)
    for key, (module, name) in NAMES.items():
        scores, w, c = np.asarray(stored["movement"][key]), PARAMS[module][name], FACTORS[module][name]
        mask = reference.without_smallest(scores, round(0.4 * scores.size))
        np.testing.assert_allclose(grads["movement"][key], c * w, rtol=1e-6)  # also where the mask is 0
        np.testing.assert_allclose(grads[module][name], c * mask, rtol=1e-6)
    np.testing.assert_array_equal(grads["fc1"]["bias"], FACTORS["fc1"]["bias"])


def test_scores_begin_at_zero_and_a_number_is_a_ramp():
    (own,) = build("compression", {"name": "movement_prune", "sparsity": 0.8}).steps()
    assert own.sparsity == Schedule(kind="cubic", start=0.0, end=0.8) and own.needs_training
    stored, _ = begun(own)
    assert not any(np.any(leaf) for leaf in stored["movement"].values())
    linear = build("compression", {"name": "movement_prune", "sparsity": {"name": "linear", "end": 0.7, "delay": 1}})
    assert linear.sparsity == Schedule(kind="linear", start=0.0, end=0.7, delay=1)


# -- soft thresholds


@pytest.mark.parametrize("s", [-20.0, -1.0, 0.5])
def test_soft_thresholds_and_their_gradients(s):
    own = SoftThreshold(s_init=s, decay=0.3)
    stored, state = begun(own)
    acting, grads = apply_all((own,), stored, (state,)), gradients(own, stored, state)
    threshold = 1 / (1 + math.exp(-s))
    for key, (module, name) in NAMES.items():
        w, c = PARAMS[module][name].astype(float), FACTORS[module][name].astype(float)
        np.testing.assert_allclose(acting[module][name], reference.soft_threshold(w, s), rtol=1e-5, atol=1e-7)
        left = np.abs(w) > threshold
        np.testing.assert_allclose(grads[module][name], c * left, rtol=1e-6)
        slope = threshold * (1 - threshold)
        expected = -(c * np.sign(w) * left).sum() * slope + 0.3 * s
        np.testing.assert_allclose(grads["thresholds"][key], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(acting["fc1"]["bias"], PARAMS["fc1"]["bias"])


def test_thresholds_are_not_applied_again_once_the_next_step_takes_over():
    stored, state = begun(SOFT)
    acting = apply_all((SOFT,), stored, (state,))
    after = enter((SOFT, MagnitudePrune(sparsity=0.0)), Stored(stored, (state,)), KEY)
    assert "thresholds" not in after.params
    again = apply_all((SOFT, MagnitudePrune(sparsity=0.0)), after.params, after.states)
    jax.tree.map(np.testing.assert_array_equal, again, acting)


# -- both


@both
def test_what_is_left_is_a_mask(own):
    stored, state = begun(own) if own is SOFT else scored()
    acting = apply_all((own,), stored, (state,))
    done = finished((own,), Stored(stored, (state,)), KEY)
    assert set(done.params) == set(PARAMS)
    jax.tree.map(np.testing.assert_array_equal, done.params, acting)
    for name, mask in done.states[0].items():
        np.testing.assert_array_equal(mask, np.asarray(weights(acting)[name]) != 0)
    moved = jax.tree.map(lambda leaf: leaf + 1, done.params)
    for name, leaf in weights(apply_all((own,), moved, done.states)).items():
        assert np.array_equal(leaf, weights(moved)[name] * done.states[0][name]) and np.any(leaf == 0)


@both
def test_the_file_holds_no_more_than_after_a_mask(own, tmp_path):
    stored, state = begun(own) if own is SOFT else scored()
    done = finished((own,), Stored(stored, (state,)), KEY)
    size = write_artifact(tmp_path / "a", (own,), done, {}, {})
    assert size == write_artifact(tmp_path / "b", (MagnitudePrune(),), Stored(done.params, ({},)), {}, {})
    params, _, about = read_artifact(tmp_path / "a")
    jax.tree.map(np.testing.assert_array_equal, params, done.params)
    assert about["forms"] == []


@both
def test_a_population_is_a_loop_and_compiling_changes_nothing(own):
    many = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf[::-1]]), PARAMS)

    def whole(params):
        return apply_all((own,), *(lambda stored, state: (stored, (state,)))(*begun(own, params)))

    together = jax.jit(jax.vmap(whole))(many)
    for i in range(2):
        one = whole(jax.tree.map(lambda leaf, i=i: leaf[i], many))
        jax.tree.map(lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=1e-6, atol=1e-7), together, one)


@both
def test_other_steps_see_weights_alone(own):
    stored, _ = begun(own)
    assert set(weights(stored)) == {"fc1/kernel", "items/embedding"}


@both
def test_what_cannot_be_is_one_line(own):
    key = own.beside
    with pytest.raises(UsageError, match=rf"^parameters must be a dict, in which '{key}' is free .*; got another entry"):
        own.init(KEY, {**PARAMS, key: {}})
    with pytest.raises(UsageError, match=r"^parameters must be a dict, .*; got a list"):
        own.init(KEY, [PARAMS])
    with pytest.raises(UsageError, match=r"^only='fc7' names no weight"):
        type(own)(only="fc7").init(KEY, PARAMS)
    small = {"fc1": {"kernel": np.full((2, 1), 1e-3, np.float32)}}
    emptied = type(own)(sparsity=0.9) if own is MOVEMENT else own
    stored, state = begun(emptied, small)
    with pytest.raises(RunError, match=r"^nothing is left of fc1/kernel: all its 2 weights are zero after pruning \("):
        finished((emptied,), Stored(stored, (state,)), KEY)


def test_options():
    for key, value in (("sparsity", 1.0), ("scope", "all"), ("recover_epochs", -1)):
        with pytest.raises(UsageError, match=rf"^compression\.{key} must be"):
            build("compression", {"name": "movement_prune", key: value})
    with pytest.raises(UsageError, match=r"^compression\.decay must be at least 0"):
        build("compression", {"name": "soft_threshold", "decay": -1.0})
    assert as_leaves(SOFT).decay.dtype == jnp.float32


# -- the real thing


def trained(folder, *steps, optim="sgd", **changes):
    given = tiny.config(
        ("optim.epochs", 10), ("evaluate.latency", False), *changes.items(),
        data="digits", loss="none", compression="pipeline", optim=optim,
    )  # fmt: skip
    given["compression"]["steps"] = ["distill", *steps]
    result = run(given, folder, choices={})
    params, _, about = read_artifact(folder / "artifact.safetensors")
    kernels = np.concatenate([layer["kernel"].ravel() for layer in params.values()])
    assert about["forms"] == [] and set(params) == {"fc1", "fc"}
    return result["metrics"]["test"]["accuracy"], float((kernels == 0).mean())


def test_digits_with_learnt_thresholds(tmp_path):
    for decay, least, most in ((0.0, 0.0, 0.25), (0.05, 0.45, 0.95)):
        steps = {"name": "soft_threshold", "decay": decay}, {"name": "recover", "epochs": 15}
        accuracy, sparsity = trained(tmp_path / str(decay), *steps)
        assert least <= sparsity <= most and accuracy > 0.9, (decay, accuracy, sparsity)


def test_digits_by_movement_then_int8(tmp_path):
    steps = {"name": "movement_prune", "sparsity": 0.7}, {"name": "recover", "epochs": 10}, "int8"
    accuracy, sparsity = trained(tmp_path / "run", *steps)
    assert 0.699 < sparsity < 0.75 and accuracy > 0.85, (accuracy, sparsity)
