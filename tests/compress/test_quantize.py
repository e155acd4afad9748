"""Integer weights against PyTorch's fake quantization and against loops in NumPy; what the file holds of them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jdistill.options  # noqa: F401 (registers every option)
from jdistill.compress import MagnitudePrune, Quantized, Stored, apply_all, finished
from jdistill.compress.activations import Activations
from jdistill.compress.artifact import read_artifact, write_artifact
from jdistill.compress.quantize import IntegerWeights
from jdistill.errors import UsageError
from jdistill.registry import build
from tests.reference import quantization as reference

RANDOM = np.random.default_rng(0)
KERNELS = {
    "dense": RANDOM.normal(size=(13, 5)).astype(np.float32),
    "conv": (10.0 ** RANDOM.integers(-6, 3, size=(3, 3, 2, 6)) * RANDOM.normal(size=(3, 3, 2, 6))).astype(np.float32),
    "zeros": np.zeros((4, 3), np.float32),
    "one zero channel": np.array([[0, 1], [0, -3]], np.float32),
    "halves": np.array([[127, 0.5, 1.5, 2.5, -0.5, -126.5]], np.float32).T,
}
PARAMS = {
    name: {"kernel": RANDOM.normal(size=shape).astype(np.float32), "bias": np.ones(shape[-1], np.float32) / 3}
    for name, shape in {"fc1": (11, 6), "conv": (3, 3, 4, 5), "fc2": (70, 3)}.items()
}
every_kernel = pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
all_three = pytest.mark.parametrize("granularity", ["channel", "tensor", "group"])
KEY = jax.random.key(0)


def rounded(kernel, **options):
    return np.asarray(IntegerWeights(**options).constrain({"kernel": kernel}, {})["kernel"])


def in_full(quantized):
    """Values of a `Quantized`, as the file's reader makes them."""
    scale = quantized.scale
    if quantized.group:
        rows = np.repeat(scale, quantized.group, axis=0)
        scale = rows[: quantized.values.size // scale.shape[-1]].reshape(quantized.values.shape)
    return quantized.values.astype(np.float32) * scale


@pytest.mark.parametrize(("bits", "granularity"), reference.TORCH_WEIGHTS)
def test_values_and_gradients_are_torchs(bits, granularity):
    own = IntegerWeights(bits=bits, granularity=granularity)

    def total(w):
        return own.constrain({"kernel": w}, {})["kernel"].sum()

    expected = np.array(reference.TORCH_WEIGHTS[bits, granularity], np.float32)
    for function in (total, jax.jit(total)):
        np.testing.assert_array_equal(jax.grad(function)(reference.WEIGHTS), 1)
    found = jax.jit(own.constrain)({"kernel": reference.WEIGHTS}, {})["kernel"]
    np.testing.assert_allclose(found, expected, rtol=0, atol=2.4e-7)
    assert not np.array_equal(found, reference.WEIGHTS)


def test_gradients_go_straight_through_whatever_follows():
    own, w = IntegerWeights(bits=4), KERNELS["dense"]
    weight = RANDOM.normal(size=w.shape).astype(np.float32)

    def loss(value):
        return jnp.sum(weight * jnp.square(value))

    through = jax.grad(lambda w: loss(own.constrain({"kernel": w}, {})["kernel"]))(w)
    np.testing.assert_allclose(through, jax.grad(loss)(rounded(w, bits=4)), rtol=1e-6)


@all_three
@every_kernel
def test_values_against_numpy(kernel, granularity):
    for bits in (8, 4):
        q, scale = reference.symmetric(kernel, bits, granularity, 4)
        found = rounded(kernel, bits=bits, granularity=granularity, group_size=4)
        away_from_ties = np.abs(np.abs(kernel / scale) % 1 - 0.5) > 1e-4
        np.testing.assert_allclose(found[away_from_ties], (q * scale)[away_from_ties], rtol=3e-7)
        assert away_from_ties.any() and np.all(np.abs(found - kernel) <= scale / 2 * (1 + 1e-5))


@all_three
@every_kernel
def test_what_is_stored_is_what_was_rounded(kernel, granularity):
    own = IntegerWeights(granularity=granularity, group_size=4)
    value = rounded(kernel, granularity=granularity, group_size=4)
    stored = own.finalize("fc/kernel", value, {})
    assert stored.values.dtype == np.int8 and stored.scale.dtype == np.float32 and np.abs(stored.values).max() <= 127
    np.testing.assert_allclose(in_full(stored), value, rtol=3e-7)
    q, scale = reference.symmetric(kernel, 8, granularity, 4)
    away_from_ties = np.abs(np.abs(kernel / scale) % 1 - 0.5) > 1e-4
    used = np.broadcast_to(np.abs(value).max(axis=None) > 0, value.shape)
    np.testing.assert_array_equal(stored.values[away_from_ties & used], q[away_from_ties & used])
    np.testing.assert_allclose(rounded(value, granularity=granularity, group_size=4), value, rtol=3e-7)  # twice is once


def test_scales_have_the_shapes_that_the_file_needs():
    kernel = KERNELS["conv"]
    shapes = {"channel": (1, 1, 1, 6), "tensor": (1, 1, 1, 1), "group": (5, 6)}  # 18 inputs in fours
    for granularity, shape in shapes.items():
        own = IntegerWeights(granularity=granularity, group_size=4)
        stored = own.finalize("kernel", rounded(kernel, granularity=granularity, group_size=4), {})
        assert stored.scale.shape == shape and stored.group == (4 if granularity == "group" else 0)


def test_weights_too_small_for_a_scale_become_zeros():
    kernel = np.array([[1e-37, 1], [0, 2], [1e-40, -4]], np.float32)
    effective = rounded(kernel)
    np.testing.assert_array_equal(effective[:, 0], 0)
    np.testing.assert_allclose(effective[:, 1], kernel[:, 1], atol=4 / 254)


def test_halves_round_to_even():
    np.testing.assert_array_equal(rounded(KERNELS["halves"])[:, 0], [127, 0, 2, 2, 0, -126])


def test_integers_are_found_again_when_a_later_step_removed_the_largest():
    """The scale is no longer max|w| / 127, and the zeros are the later step's."""
    value = rounded(KERNELS["dense"])
    q, _ = reference.symmetric(KERNELS["dense"], 8)
    keep = np.abs(q) < 90
    stored = IntegerWeights().finalize("kernel", value * keep, {})
    np.testing.assert_allclose(in_full(stored), value * keep, rtol=1e-6)
    assert not keep.all() and np.abs(stored.values).max() <= 127


def test_what_a_later_step_has_moved_is_left_to_it():
    finer = rounded(KERNELS["dense"]) * np.linspace(1, 1.01, 13, dtype=np.float32)[:, None]
    assert IntegerWeights().finalize("kernel", finer, {}) is finer
    # int4 in groups lies on no int8 grid of whole channels, so that int8 leaves it to int4
    value = rounded(PARAMS["fc2"]["kernel"], bits=4, granularity="group", group_size=16)
    first = IntegerWeights().finalize("kernel", value, {})
    second = IntegerWeights(bits=4, granularity="group", group_size=16).finalize("kernel", first, {})
    assert first is value and np.abs(second.values).max() == 7
    np.testing.assert_allclose(in_full(second), value, rtol=3e-7)


def test_only_weights_are_quantized():
    own, matrix, vector = IntegerWeights(), rounded(KERNELS["dense"]), KERNELS["dense"][0]
    assert own.finalize("fc/bias", vector, {}) is vector
    assert own.finalize("norm/scale", matrix, {}) is matrix
    assert own.finalize("norm/kernel", vector, {}) is vector
    assert isinstance(own.finalize("items/embedding", matrix, {}), Quantized)
    quantized = own.finalize("fc/kernel", matrix, {})
    assert own.finalize("fc/kernel", quantized, {}) is quantized
    effective = own.constrain(PARAMS, {})
    np.testing.assert_array_equal(effective["fc1"]["bias"], PARAMS["fc1"]["bias"])


def test_only_some_leaves():
    own = IntegerWeights(only="fc1/*, conv*")
    effective = own.constrain(PARAMS, own.init(KEY, PARAMS))
    changed = {name: bool(np.any(effective[name]["kernel"] != PARAMS[name]["kernel"])) for name in PARAMS}
    assert changed == {"fc1": True, "conv": True, "fc2": False}
    value = np.asarray(effective["fc1"]["kernel"])
    assert own.finalize("fc2/kernel", value, {}) is value and isinstance(own.finalize("fc1/kernel", value, {}), Quantized)
    with pytest.raises(UsageError, match=r"^only='fc9/\*' names no weight of this network \(known: conv/kernel, fc1/kernel"):
        jax.jit(IntegerWeights(only="fc9/*").init)(KEY, PARAMS)
    with pytest.raises(UsageError, match=r"^this network has no weights .*; use compression=none$"):
        IntegerWeights().init(KEY, {"fc": {"bias": np.zeros(3, np.float32)}})


@all_three
def test_jit_and_vmap_change_nothing(granularity):
    own = IntegerWeights(granularity=granularity, group_size=8, bits=4)
    members = [jax.tree.map(lambda leaf, i=i: leaf * np.float32(1 + i), PARAMS) for i in range(3)]
    each = [own.constrain(params, own.init(KEY, params)) for params in members]
    together = jax.jit(jax.vmap(lambda p: own.constrain(p, {})))(jax.tree.map(lambda *leaves: np.stack(leaves), *members))
    for i, params in enumerate(each):
        jax.tree.map(lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=3e-7), together, params)


ARTIFACTS = {
    "int8": ({"name": "int8"}, 1, 4 * (6 + 5 + 3)),
    "int8 tensor": ({"name": "int8", "granularity": "tensor"}, 1, 4 * 3),
    "int4": ({"name": "int4"}, 0.5, 4 * (6 + 5 + 3)),
    "int4 group": ({"name": "int4", "granularity": "group", "group_size": 16}, 0.5, 4 * (6 * 1 + 5 * 3 + 3 * 5)),
    "3 bits": ({"name": "int8", "bits": 3, "granularity": "group"}, 3 / 8, 4 * (6 * 1 + 5 * 2 + 3 * 3)),
}


@pytest.mark.parametrize(("node", "each", "scales"), ARTIFACTS.values(), ids=ARTIFACTS)
def test_the_file_holds_the_integers_in_their_bits(node, each, scales, tmp_path):
    from safetensors.numpy import load_file

    steps = build("compression", node).steps()
    stored = finished(steps, Stored(PARAMS), KEY)
    write_artifact(tmp_path / "a", steps, stored, {}, {})
    found = load_file(tmp_path / "a")
    kernels = sum(array.nbytes for name, array in found.items() if "kernel" in name and not name.endswith("#scale"))
    weights = sum(PARAMS[name]["kernel"].size for name in PARAMS)
    assert kernels <= weights * each + 3
    assert sum(array.nbytes for name, array in found.items() if name.endswith("#scale")) == scales
    wanted = apply_all(steps, stored.params, stored.states)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=5e-7), read_artifact(tmp_path / "a")[0], wanted)


@pytest.mark.parametrize("order", [("prune", "int4"), ("int4", "prune")])
def test_pruned_weights_stay_pruned(order, tmp_path):
    steps = tuple({"prune": MagnitudePrune(sparsity=0.6), "int4": IntegerWeights(bits=4)}[name] for name in order)
    stored = finished(steps, Stored(PARAMS), KEY)
    write_artifact(tmp_path / "a", steps, stored, {}, {})
    params = read_artifact(tmp_path / "a")[0]
    wanted = apply_all(steps, stored.params, stored.states)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=5e-7), params, wanted)
    assert all(np.mean(params[name]["kernel"] == 0) >= 0.59 for name in PARAMS)


def test_options():
    assert build("compression", {"name": "int8"}).steps() == (IntegerWeights(bits=8, granularity="channel", recover_epochs=0),)
    assert build("compression", {"name": "int4"}).steps() == (IntegerWeights(bits=4),)
    assert build("compression", {"name": "qat"}).steps() == (IntegerWeights(bits=8, recover_epochs=5),)
    first, second = build("compression", {"name": "qat", "activations": "static", "only": "fc1/*"}).steps()
    assert first == IntegerWeights(only="fc1/*", recover_epochs=0)  # the second trains, with both in force
    assert second == Activations(kind="static", only="fc1/*", recover_epochs=5)
    assert dataclasses.replace(first, bits=4).levels("kernel", {}) == 7


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("granularity", "chanel", "must be one of channel, tensor, group, got 'chanel'; did you mean 'channel'"),
        ("bits", 9, "must be an integer from 2 to 8, got 9"),
        ("bits", 1, "must be an integer from 2 to 8, got 1; for 1 bit use compression=binary"),
        ("group_size", 1, "must be an integer of at least 2, got 1"),
        ("activations", "statik", "must be one of none, dynamic, static, got 'statik'; did you mean 'static'"),
        ("recover_epochs", -1, "must be at least 0, got -1"),
    ],
)
def test_bad_values_are_one_line(key, value, message):
    with pytest.raises(UsageError, match=rf"^compression\.{key} {message}"):
        build("compression", {"name": "int8", key: value})
