"""Clusters and codebooks against Lloyd's algorithm in NumPy; sequences with other steps, and the file."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdistill.compress import IntegerWeights, MagnitudePrune, Stored, apply_all, enter, finished
from jdistill.compress.artifact import read_artifact, read_stored, write_artifact
from jdistill.compress.low_rank import LowRank
from jdistill.compress.sharing import ITERATIONS, WeightSharing
from jdistill.errors import UsageError
from jdistill.registry import build
from tests.marks import slow_but
from tests.reference import embeddings as reference

RANDOM = np.random.default_rng(1)
PARAMS = {
    "fc1": {"kernel": RANDOM.normal(size=(20, 12)).astype(np.float32), "bias": np.ones(12, np.float32)},
    "conv": {"kernel": (0.01 * RANDOM.standard_t(3, size=(3, 3, 4, 6))).astype(np.float32)},
    "fc2": {"kernel": RANDOM.normal(size=(2, 3)).astype(np.float32)},
}
KEY = jax.random.key(0)


def encoded(own, params=PARAMS):
    state = jax.jit(own.init)(KEY, params)
    return jax.jit(own.encode)(params, state), state


@pytest.mark.parametrize("clusters", [2, 7, 16])
@pytest.mark.parametrize("layer", ["fc1", "conv"])
def test_codes_and_codebook_are_lloyds(layer, clusters):
    stored, state = encoded(WeightSharing(clusters=clusters))
    weight = PARAMS[layer]["kernel"]
    start = np.linspace(weight.min(), weight.max(), clusters)
    codes, book = reference.lloyd(weight.reshape(-1, 1), start[:, None], ITERATIONS)
    np.testing.assert_array_equal(state[f"{layer}/kernel"].ravel() - 1, codes)
    np.testing.assert_allclose(stored[layer]["kernel"]["codebook"], book[:, 0], rtol=1e-5, atol=1e-7)
    shared = WeightSharing(clusters=clusters).decode(stored, state)[layer]["kernel"]
    np.testing.assert_allclose(shared, book[codes, 0].reshape(weight.shape), rtol=1e-5, atol=1e-7)
    assert len(np.unique(shared)) <= clusters and np.all(stored["fc1"]["bias"] == 1)
    assert isinstance(stored["fc2"]["kernel"], dict) == (clusters == 2)  # 7 values for 6 weights save nothing


def test_as_many_clusters_as_values_lose_nothing():
    kernel = np.tile(np.array([[-3, 1, 4, 1.5]], np.float32), (9, 5))
    own = WeightSharing(clusters=15)  # equally distant starts, a half apart
    stored, state = encoded(own, {"kernel": kernel})
    np.testing.assert_allclose(own.decode(stored, state)["kernel"], kernel, rtol=1e-6)


def test_the_gradient_of_a_value_is_the_sum_of_its_weights():
    own, goal = WeightSharing(clusters=5), RANDOM.normal(size=(20, 12)).astype(np.float32)
    stored, state = encoded(own)
    found = jax.grad(lambda p: jnp.sum(own.decode(p, state)["fc1"]["kernel"] * goal))(stored)["fc1"]["kernel"]["codebook"]
    codes = np.asarray(state["fc1/kernel"])
    np.testing.assert_allclose(found, [goal[codes == c + 1].sum() for c in range(5)], rtol=1e-5, atol=1e-5)


def test_zeros_stay_zeros_and_take_no_cluster():
    kernel = PARAMS["fc1"]["kernel"] * (RANDOM.random((20, 12)) < 0.3)
    own = WeightSharing(clusters=4)
    stored, state = encoded(own, {"kernel": kernel})
    codes, book = reference.lloyd(kernel[kernel != 0][:, None], np.linspace(kernel.min(), kernel.max(), 4)[:, None], ITERATIONS)
    found = np.asarray(own.decode(stored, state)["kernel"])
    assert np.all(found[kernel == 0] == 0)
    np.testing.assert_allclose(found[kernel != 0], book[codes, 0], rtol=1e-5)
    grads = jax.grad(lambda p: jnp.sum(own.decode(p, state)["kernel"]))(stored)["kernel"]["codebook"]
    assert grads.sum() == np.count_nonzero(kernel)
    zeros = np.zeros((20, 12), np.float32)
    stored, state = encoded(own, {"kernel": zeros})
    np.testing.assert_array_equal(own.decode(stored, state)["kernel"], zeros)


@pytest.mark.parametrize("clusters", [3, 256])
def test_jit_and_vmap_change_nothing(clusters):
    own = WeightSharing(clusters=clusters)
    stack = {"kernel": RANDOM.normal(size=(2, 40, 30)).astype(np.float32)}
    state = jax.vmap(own.init, in_axes=(None, 0))(KEY, stack)
    both = jax.jit(jax.vmap(lambda p, s: own.decode(own.encode(p, s), s)))(stack, state)["kernel"]
    for i in range(2):
        one = {"kernel": stack["kernel"][i]}
        alone = own.init(KEY, one)
        np.testing.assert_array_equal(alone["kernel"], state["kernel"][i])
        assert alone["kernel"].max() == clusters
        np.testing.assert_allclose(own.decode(own.encode(one, alone), alone)["kernel"], both[i], rtol=1e-6)


ORDERS = {
    "alone": (WeightSharing(clusters=8),),
    "prune before": (MagnitudePrune(sparsity=0.7), WeightSharing(clusters=8)),
    "prune and int8 after": (WeightSharing(clusters=8, only="fc1/*"), MagnitudePrune(sparsity=0.5), IntegerWeights()),
    "of factors": (LowRank(rank=3), WeightSharing(clusters=4)),
}


@pytest.mark.parametrize("steps", slow_but(["prune and int8 after", "of factors"], ORDERS))
def test_the_file_reads_back_as_what_was_evaluated(steps, tmp_path):
    stored = Stored(jax.tree.map(jnp.asarray, PARAMS))
    for i in range(len(steps)):
        stored = enter(steps[: i + 1], stored, KEY)
    wanted = jax.tree.map(np.asarray, apply_all(steps, stored.params, stored.states))
    write_artifact(tmp_path / "a", steps, finished(steps, stored, KEY), {}, {})
    found = read_artifact(tmp_path / "a")[0]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, wanted)
    if isinstance(steps[0], MagnitudePrune):
        assert np.count_nonzero(found["fc1"]["kernel"]) == 72 and len(np.unique(found["fc1"]["kernel"])) <= 9


@pytest.mark.parametrize(("sparsity", "bits"), [(0.0, 4.0), (0.75, 2.0)])
def test_the_file_holds_the_bits_of_deep_compression(sparsity, bits, tmp_path):
    """4 bits for one of 16 values; of sparse weights one bit for each, and 4 for those that are left."""
    steps = (MagnitudePrune(sparsity=sparsity), WeightSharing(clusters=16))
    stored = finished(steps, Stored({"kernel": jnp.asarray(RANDOM.normal(size=(100, 80)), jnp.float32)}), KEY)
    size = write_artifact(tmp_path / "a", steps, stored, {}, {})
    assert abs(size - 8000 * bits / 8 - 4 * 16) < 900  # names, types, checksum
    (_, codes), (_, again) = stored.states, read_stored(tmp_path / "a")[0].states[-1:] * 2
    np.testing.assert_array_equal(codes["kernel"], again["kernel"])


def test_wrong_options_are_one_line():
    for key, value in (("clusters", 1), ("clusters", 257), ("recover_epochs", -1)):
        with pytest.raises(UsageError, match=rf"^compression\.{key} must be"):
            build("compression", {"name": "weight_sharing", key: value})
    with pytest.raises(UsageError, match=r"no chosen weight smaller: the largest, fc2/kernel \[2, 3\], has 24 bytes and would"):
        WeightSharing(only="fc2/*").init(KEY, PARAMS)
    with pytest.raises(UsageError, match=r"only='fc3/\*' names no weight"):
        WeightSharing(only="fc3/*").init(KEY, PARAMS)
