"""Binary and ternary weights against NumPy, their gradients, and the bits they take."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jdistill.options  # noqa: F401 (registers every option)
from jdistill.compress import MagnitudePrune, Stored, apply_all, finished
from jdistill.compress.artifact import read_artifact, write_artifact
from jdistill.compress.extreme import Binary, Ternary
from jdistill.errors import UsageError
from jdistill.registry import build
from tests.reference import quantization as reference

RANDOM = np.random.default_rng(1)
KERNELS = {
    "dense": RANDOM.normal(size=(12, 5)).astype(np.float32),
    "conv": RANDOM.normal(size=(3, 3, 2, 4)).astype(np.float32) * np.array([1e-4, 1, 30, 0], np.float32),
    "some zeros": (RANDOM.normal(size=(40, 3)) * (RANDOM.random((40, 3)) < 0.4)).astype(np.float32),
}
PARAMS = {"fc1": {"kernel": KERNELS["dense"], "bias": np.ones(5, np.float32)}, "conv": {"kernel": KERNELS["conv"][..., :3]}}
CASES = {"binary": (Binary, reference.binary), "ternary": (Ternary, reference.ternary)}
both = pytest.mark.parametrize(("kind", "numpy"), CASES.values(), ids=CASES)
every_kernel = pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
granularities = pytest.mark.parametrize("granularity", ["channel", "tensor"])
KEY = jax.random.key(0)


@both
@granularities
@every_kernel
def test_values(kind, numpy, granularity, kernel):
    own, wanted = kind(granularity=granularity), numpy(kernel, granularity)
    for function in (own.constrain, jax.jit(own.constrain)):
        found = np.asarray(function({"kernel": kernel}, {})["kernel"])
        np.testing.assert_allclose(found, wanted, rtol=1e-6)
        columns = found.reshape(-1, found.shape[-1]) if granularity == "channel" else found.reshape(-1, 1)
        assert all(len(np.unique(np.abs(column[column != 0]))) <= 1 for column in columns.T)


def test_vmap_is_a_loop():
    stacked = np.stack([KERNELS["dense"] * (1 + i) for i in range(3)])
    for own in (Binary(), Ternary()):
        together = jax.vmap(lambda w, own=own: own.constrain({"kernel": w}, {})["kernel"])(stacked)
        for one, w in zip(together, stacked, strict=True):
            np.testing.assert_allclose(one, own.constrain({"kernel": w}, {})["kernel"], rtol=1e-6)


def test_gradients_go_straight_through_and_stop_where_binary_weights_are_clipped():
    w = np.array([[0.5, -2.0], [-1.0, 0.3], [1.001, 0.0]], np.float32)
    up = np.arange(1.0, 7).reshape(3, 2).astype(np.float32)
    for own, passed in ((Binary(), np.abs(w) <= 1), (Ternary(), np.ones((3, 2)))):
        grad = jax.grad(lambda w, own=own: jnp.sum(up * own.constrain({"kernel": w}, {})["kernel"]))(w)
        np.testing.assert_array_equal(grad, up * passed)


BITS = {"binary": 1, "ternary": 2}


@pytest.mark.parametrize("name", BITS)
@granularities
def test_the_file(name, granularity, tmp_path):
    from safetensors.numpy import load_file

    steps = build("compression", {"name": name, "granularity": granularity}).steps()
    stored = finished(steps, Stored(PARAMS), KEY)
    write_artifact(tmp_path / "a", steps, stored, {}, {})
    wanted = apply_all(steps, stored.params, stored.states)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), read_artifact(tmp_path / "a")[0], wanted)
    found = load_file(tmp_path / "a")
    for leaf, size in (("params/fc1/kernel", 60), ("params/conv/kernel", 54)):
        assert found[leaf].dtype == np.uint8
        mask = found[f"{leaf}#mask"].nbytes if f"{leaf}#mask" in found else 0
        assert found[leaf].nbytes + mask <= (size * BITS[name] + 7) // 8 + 1


def test_a_channel_of_zeros_costs_no_second_bit_and_stays_zero():
    own, w = Binary(), KERNELS["conv"]
    value = np.asarray(own.constrain({"kernel": w}, {})["kernel"])
    stored = own.finalize("kernel", value, {})
    assert set(np.unique(stored.values)) == {0, 1}
    np.testing.assert_array_equal(stored.values.astype(np.float32) * stored.scale + stored.offset, value)
    assert np.all(value[..., 3] == 0) and np.all(value[..., :3] != 0)


@pytest.mark.parametrize("order", [("prune", "binary"), ("binary", "prune"), ("prune", "ternary")])
def test_pruned_weights_stay_pruned(order, tmp_path):
    made = {"prune": MagnitudePrune(sparsity=0.5), "binary": Binary(), "ternary": Ternary()}
    steps = tuple(made[name] for name in order)
    stored = finished(steps, Stored(PARAMS), KEY)
    write_artifact(tmp_path / "a", steps, stored, {}, {})
    params, wanted = read_artifact(tmp_path / "a")[0], apply_all(steps, stored.params, stored.states)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), params, wanted)
    assert np.mean(params["fc1"]["kernel"] == 0) >= 0.5 and np.any(params["fc1"]["kernel"])


def test_other_values_are_left_to_the_step_that_made_them():
    matrix, vector = KERNELS["dense"], KERNELS["dense"][0]
    for own in (Binary(), Ternary()):
        assert own.finalize("kernel", matrix, {}) is matrix and own.finalize("fc1/bias", vector, {}) is vector


def test_they_learn_what_rounding_afterwards_loses():
    """A linear map of signs is found through the straight-through gradient; rounding a trained one is far off."""
    x = RANDOM.normal(size=(200, 8)).astype(np.float32)
    target = x @ RANDOM.normal(size=(8, 4)).astype(np.float32)
    own = Binary()

    def loss(w, under):
        return jnp.mean(jnp.square(x @ (own.constrain({"kernel": w}, {})["kernel"] if under else w) - target))

    def trained(under):
        step = jax.jit(lambda w: w - 0.05 * jax.grad(loss)(w, under))
        w = 0.1 * RANDOM.normal(size=(8, 4)).astype(np.float32)
        for _ in range(150):
            w = step(w)
        return w

    start = float(loss(0.1 * np.ones((8, 4), np.float32), True))
    assert float(loss(trained(True), True)) < 0.95 * start


def test_options():
    assert build("compression", {"name": "binary"}).steps() == (Binary(granularity="channel", recover_epochs=5),)
    assert build("compression", {"name": "ternary"}).steps() == (Ternary(),)
    with pytest.raises(UsageError, match=r"^compression\.granularity must be one of channel, tensor, got 'group'"):
        build("compression", {"name": "binary", "granularity": "group"})
    with pytest.raises(UsageError, match=r"^compression\.recover_epochs must be at least 0, got -2"):
        build("compression", {"name": "ternary", "recover_epochs": -2})
    with pytest.raises(UsageError, match=r"^only='x' names no weight of this network \(known: conv/kernel, fc1/kernel\)"):
        Binary(only="x").init(KEY, PARAMS)
