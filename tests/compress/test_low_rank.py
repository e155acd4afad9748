"""Factors against NumPy's singular value decomposition; sequences with other steps, and the file."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdistill.compress import IntegerWeights, MagnitudePrune, Stored, apply_all, enter, finished
from jdistill.compress.artifact import read_artifact, write_artifact
from jdistill.compress.low_rank import LowRank
from jdistill.errors import UsageError
from jdistill.registry import build

RANDOM = np.random.default_rng(0)
PARAMS = {
    "fc1": {"kernel": RANDOM.normal(size=(24, 16)).astype(np.float32), "bias": np.ones(16, np.float32)},
    "conv": {"kernel": RANDOM.normal(size=(3, 3, 4, 12)).astype(np.float32)},
    "item": RANDOM.normal(size=(30, 8)).astype(np.float32),
    "fc2": {"kernel": RANDOM.normal(size=(4, 3)).astype(np.float32)},
}
KEY = jax.random.key(0)


def best(weight, rank):
    """The best approximation of rank `rank` to a weight [..., in, out]."""
    u, s, v = np.linalg.svd(weight.reshape(-1, weight.shape[-1]).astype(float), full_matrices=False)
    return (u[:, :rank] @ np.diag(s[:rank]) @ v[:rank]).reshape(weight.shape)


def encoded(own, params=PARAMS):
    state = jax.jit(own.init)(KEY, params)
    return jax.jit(own.encode)(params, state), state


def test_factors_are_the_best_approximation():
    own = LowRank(rank=3)
    stored, state = encoded(own)
    assert set(state) == {"fc1/kernel", "conv/kernel", "item"}  # three numbers a row and column do not save in 4 x 3
    assert stored["conv"]["kernel"]["u"].shape == (3, 3, 4, 3) and stored["conv"]["kernel"]["v"].shape == (3, 12)
    assert stored["item"]["u"].shape == (30, 3) and np.all(stored["fc1"]["bias"] == 1)
    full = own.decode(stored, state)
    for found, weight in ((full[m]["kernel"], PARAMS[m]["kernel"]) for m in ("fc1", "conv")):
        np.testing.assert_allclose(found, best(weight, 3), atol=1e-5)
    np.testing.assert_allclose(full["item"], best(PARAMS["item"], 3), atol=1e-5)
    np.testing.assert_array_equal(full["fc2"]["kernel"], PARAMS["fc2"]["kernel"])
    u, v = (np.linalg.norm(np.asarray(stored["item"][part]), axis=axis) for part, axis in (("u", 0), ("v", 1)))
    np.testing.assert_allclose(u, v, rtol=1e-5)


@pytest.mark.parametrize(("share", "ranks"), [(0.25, (4, 3, 2)), (0.5, (8, 6, 4)), (0.01, (1, 1, 1))])
def test_share_is_of_the_smaller_side(share, ranks):
    stored, _ = encoded(LowRank(share=share))
    found = tuple(node["v"].shape[0] for node in (stored["fc1"]["kernel"], stored["conv"]["kernel"], stored["item"]))
    assert found == ranks


def test_only_names_weights():
    _, state = encoded(LowRank(rank=2, only="fc*, item"))
    assert set(state) == {"fc1/kernel", "item"}  # rank 2 of 4 x 3 would be 14 numbers for 12


def test_gradients_are_those_of_the_product():
    own, goal = LowRank(rank=3, only="item"), RANDOM.normal(size=(30, 8)).astype(np.float32)
    stored, state = encoded(own)
    found = jax.grad(lambda p: jnp.sum(own.decode(p, state)["item"] * goal))(stored)["item"]
    np.testing.assert_allclose(found["u"], goal @ np.asarray(stored["item"]["v"]).T, atol=1e-5)
    np.testing.assert_allclose(found["v"], np.asarray(stored["item"]["u"]).T @ goal, atol=1e-5)


def test_jit_and_vmap_change_nothing():
    own = LowRank(rank=3)
    stack = jax.tree.map(lambda leaf: np.stack([leaf, 2 * leaf + 1]), PARAMS)
    state = jax.vmap(own.init, in_axes=(None, 0))(KEY, stack)
    there_and_back = jax.jit(jax.vmap(lambda p, s: own.decode(own.encode(p, s), s)))(stack, state)
    for i in range(2):
        one = jax.tree.map(lambda leaf, i=i: leaf[i], stack)
        stored, state = encoded(own, one)
        alone = own.decode(stored, state)
        jax.tree.map(lambda a, b, i=i: np.testing.assert_allclose(a[i], b, atol=2e-5), there_and_back, alone)


ORDERS = {
    "alone": (LowRank(rank=3),),
    "prune before": (MagnitudePrune(sparsity=0.5), LowRank(rank=3)),
    "prune and int8 after": (LowRank(rank=3), MagnitudePrune(sparsity=0.5), IntegerWeights()),
    "twice": (LowRank(rank=6), LowRank(rank=2)),
}


@pytest.mark.parametrize("steps", ORDERS.values(), ids=ORDERS)
def test_the_file_reads_back_as_what_was_evaluated(steps, tmp_path):
    stored = Stored(jax.tree.map(jnp.asarray, PARAMS))
    for i in range(len(steps)):
        stored = enter(steps[: i + 1], stored, KEY)
    wanted = apply_all(steps, stored.params, stored.states)
    assert jax.tree.map(jnp.shape, wanted) == jax.tree.map(np.shape, PARAMS)
    size = write_artifact(tmp_path / "a", steps, finished(steps, stored, KEY), {}, {})
    found = read_artifact(tmp_path / "a")[0]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, jax.tree.map(np.asarray, wanted))
    assert size < write_artifact(tmp_path / "full", (), Stored(PARAMS), {}, {})


def test_later_steps_act_on_the_factors():
    steps = (LowRank(rank=3), MagnitudePrune(sparsity=0.5))
    stored = enter(steps, enter(steps[:1], Stored(jax.tree.map(jnp.asarray, PARAMS)), KEY), KEY)
    constrained = steps[1].constrain(stored.params, stored.states[1])
    assert np.count_nonzero(constrained["item"]["u"]) == 45 and np.count_nonzero(constrained["item"]["v"]) == 12


def test_a_mask_of_a_factored_weight_is_dropped():
    steps = (MagnitudePrune(sparsity=0.5), LowRank(rank=3))
    stored = enter(steps, enter(steps[:1], Stored(jax.tree.map(jnp.asarray, PARAMS)), KEY), KEY)
    assert "fc2/kernel" in str(stored.states[0]) and "item" not in str(stored.states[0])
    mask = np.asarray(PARAMS["item"] * MagnitudePrune(sparsity=0.5).init(KEY, {"item": PARAMS["item"]})["item"])
    np.testing.assert_allclose(apply_all(steps, stored.params, stored.states)["item"], best(mask, 3), atol=1e-5)


def test_wrong_options_are_one_line():
    for key, value in (("rank", -1), ("share", 0.0), ("share", 1.0), ("recover_epochs", -1)):
        with pytest.raises(UsageError, match=rf"^compression\.{key} must be"):
            build("compression", {"name": "low_rank", key: value})
    with pytest.raises(UsageError, match=r"smaller: the largest, conv/kernel \[3, 3, 4, 12\], has 1728 bytes and would"):
        LowRank(rank=100).init(KEY, PARAMS)
    with pytest.raises(UsageError, match=r"only='itm' names no weight of this network \(known: .*did you mean 'item'"):
        LowRank(only="itm").init(KEY, PARAMS)
