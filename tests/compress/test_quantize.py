"""int8 weights against integer arithmetic in NumPy."""

import jax
import numpy as np
import pytest

from jdistill.compress import Int8Weights, Quantized
from jdistill.errors import UsageError
from jdistill.registry import build

RANDOM = np.random.default_rng(0)
KERNELS = {
    "dense": RANDOM.normal(size=(13, 5)).astype(np.float32),
    "conv": (10.0 ** RANDOM.integers(-6, 3, size=(3, 3, 2, 6)) * RANDOM.normal(size=(3, 3, 2, 6))).astype(np.float32),
    "zeros": np.zeros((4, 3), np.float32),
    "one zero channel": np.array([[0, 1], [0, -3]], np.float32),
    "halves": np.array([[127, 0.5, 1.5, 2.5, -0.5, -126.5]], np.float32).T,
}
every_kernel = pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
both = pytest.mark.parametrize("granularity", ["channel", "tensor"])


def quantize(w, granularity):
    """Scales in float64, channel by channel, and the integers they give."""
    channels = np.moveaxis(w, -1, 0) if granularity == "channel" else w[None]
    largest = np.array([np.abs(c.astype(float)).max() or 1.0 for c in channels])
    scale = (largest / 127).reshape(*[1] * (w.ndim - 1), -1)
    return np.rint(w / scale), scale


@both
@every_kernel
def test_integers_and_scales(kernel, granularity):
    own, (q, scale) = Int8Weights(granularity=granularity), quantize(kernel, granularity)
    stored = own.finalize("params/fc/kernel", kernel)
    assert stored.values.dtype == np.int8 and stored.scale.dtype == np.float32 and stored.scale.shape == scale.shape
    np.testing.assert_allclose(stored.scale, scale, rtol=2e-7)  # XLA may multiply by the reciprocal of 127
    away_from_ties = np.abs(np.abs(kernel / scale) % 1 - 0.5) > 1e-4
    np.testing.assert_array_equal(stored.values[away_from_ties], q[away_from_ties])
    assert away_from_ties.any() and np.abs(stored.values - q).max() <= 1 and stored.values.min() >= -127
    effective = own.apply({"kernel": kernel, "bias": kernel[0, ..., 0]}, {})
    np.testing.assert_array_equal(effective["kernel"], stored.values.astype(np.float32) * stored.scale)
    np.testing.assert_array_equal(effective["bias"], kernel[0, ..., 0])
    assert np.all(np.abs(effective["kernel"] - kernel) <= scale / 2 * (1 + 1e-5))


@both
@every_kernel
def test_quantizing_twice_changes_no_integer(kernel, granularity):
    own = Int8Weights(granularity=granularity)
    once = own.finalize("kernel", kernel)
    effective = np.asarray(own.apply({"kernel": kernel}, {})["kernel"])
    again = own.finalize("kernel", effective)
    np.testing.assert_array_equal(again.values, once.values)
    axes = tuple(range(kernel.ndim - 1)) if granularity == "channel" else None
    used = np.abs(effective).max(axis=axes, keepdims=True) > 0
    np.testing.assert_allclose(again.scale[used], once.scale[used], rtol=3e-7)


def test_weights_too_small_for_a_scale_become_zeros():
    kernel = np.array([[1e-37, 1], [0, 2], [1e-40, -4]], np.float32)
    effective = np.asarray(Int8Weights().apply({"kernel": kernel}, {})["kernel"])
    np.testing.assert_array_equal(effective[:, 0], 0)
    np.testing.assert_allclose(effective[:, 1], kernel[:, 1], atol=4 / 254)


def test_halves_round_to_even():
    kernel = KERNELS["halves"]
    np.testing.assert_array_equal(Int8Weights().finalize("kernel", kernel).values[:, 0], [127, 0, 2, 2, 0, -126])


def test_only_weights_are_quantized():
    own, matrix, vector = Int8Weights(), KERNELS["dense"], KERNELS["dense"][0]
    assert own.finalize("params/fc/bias", vector) is vector
    assert own.finalize("params/norm/scale", matrix) is matrix
    assert own.finalize("params/norm/kernel", vector) is vector
    assert isinstance(own.finalize("params/items/embedding", matrix), Quantized)
    quantized = own.finalize("params/fc/kernel", matrix)
    assert own.finalize("params/fc/kernel", quantized) is quantized


def test_it_compiles_and_takes_no_state():
    own = Int8Weights()
    assert own.recover_epochs == 0 and own.init({"kernel": KERNELS["dense"]}) == {}
    compiled = jax.jit(own.apply)({"kernel": KERNELS["dense"]}, {})["kernel"]
    np.testing.assert_allclose(compiled, own.apply({"kernel": KERNELS["dense"]}, {})["kernel"], rtol=1e-6)


def test_options():
    assert build("compression", {"name": "int8"}).steps() == (Int8Weights(granularity="channel"),)
    with pytest.raises(UsageError, match=r"^compression\.granularity must be one of channel, tensor, got 'chanel'; did you"):
        build("compression", {"name": "int8", "granularity": "chanel"})
