"""Layers on integers: sums equal to those of Python's integers, networks equal to the fake-quantized ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import jdistill.options  # noqa: F401 (registers every option)
from jdistill.compress import Stored, apply_all, finished
from jdistill.compress.base import Subject
from jdistill.compress.integer import LONGEST, convolution, dot, integer_model
from jdistill.errors import UsageError
from jdistill.models import MLP
from jdistill.modules import from_linen
from jdistill.registry import build
from tests.marks import slow_but
from tests.reference import quantization as reference
from tests.tiny import CONVOLUTIONAL

RANDOM = np.random.default_rng(0)
KEY = jax.random.key(0)
NUMBERS = jax.lax.conv_dimension_numbers((1, 1, 1, 1), (1, 1, 1, 1), ("NHWC", "HWIO", "NHWC"))


def int8(*shape, low=-128):
    values = RANDOM.integers(low, 128, size=shape).astype(np.int8)
    values.flat[0], values.flat[-1] = low, 127
    return values


@pytest.mark.parametrize("zero", [-128, -3, 0, 127])
def test_sums_of_a_linear_layer_are_exact(zero):
    q, w = int8(5, 40), int8(40, 3, low=-127)
    found = jax.jit(lambda q, z, w: dot(q, z, w, (((1,), (0,)), ((), ()))))(q, np.float32(zero), w)
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, reference.dense(q, zero, w))


CONVOLUTIONS = {
    "same": (1, "SAME", 1, 1), "strided": (2, "SAME", 1, 1), "explicit": (2, [(1, 1), (1, 1)], 1, 1),
    "uneven": (1, [(0, 2), (1, 0)], 1, 1), "valid": (1, "VALID", 1, 1), "groups": (1, "SAME", 2, 1),
    "dilated": (1, "SAME", 1, 2),
}  # fmt: skip


@pytest.mark.parametrize("zero", [-128, 5])
@pytest.mark.parametrize(("stride", "padding", "groups", "dilation"), CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_sums_of_a_convolution_are_exact(stride, padding, groups, dilation, zero):
    q, w = int8(2, 6, 5, 4), int8(3, 3, 4 // groups, 6, low=-127)
    given = (stride, stride), padding, (1, 1), (dilation, dilation), NUMBERS, groups
    found = convolution(q, jnp.float32(zero), w, *given)
    window = 2 * dilation + 1
    pads = jax.lax.padtype_to_pads((6, 5), (window,) * 2, (stride,) * 2, padding) if isinstance(padding, str) else padding
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, reference.convolution(q, zero, w, stride, pads, groups, dilation))


def quantized(module, x, **options):
    """A fake-quantized network: its model, effective parameters, running statistics."""
    steps = build("compression", {"name": "int8", "activations": "static", **options}).steps()
    model = module if hasattr(module, "_fields") else from_linen(module)
    for step in steps:
        model = step.adapt(model)
    params, state = model.init(KEY, x)
    stored = finished(steps, Stored(params), KEY, Subject(model, x, state, lambda count: x))
    return model, apply_all(steps, stored.params, stored.states), state


class Mixed(nn.Module):
    """Strides, groups, circular padding, no bias, a layer without a batch axis of its own, and one that is no Dense or Conv."""

    @nn.compact
    def __call__(self, inputs, train=False):
        x = nn.relu(nn.Conv(4, (3, 3), (2, 2), padding=1, name="strided")(inputs))
        x = nn.relu(nn.Conv(6, (3, 3), feature_group_count=2, use_bias=False, padding="CIRCULAR", name="groups")(x))
        x = nn.Dense(5, name="pixels")(x).reshape(len(x), -1)
        x = nn.relu(nn.DenseGeneral(8, name="general")(x))
        return nn.Dense(3, name="fc")(x), {"embedding": x}


NETWORKS = {
    "mlp": (MLP(outputs=3, widths=(20, 15)), (30, 9), {"fc1", "fc2", "fc"}, set()),
    "convolutions": (CONVOLUTIONAL, (6, 7, 6, 2), {"conv1", "conv2", "fc1", "fc"}, set()),
    "mixed": (Mixed(), (5, 8, 7, 2), {"strided", "groups", "pixels", "fc"}, {"general"}),
}


SCALED = {f"{name}-{by}": (*own, by) for name, own in NETWORKS.items() for by in ("channel", "tensor")}


@pytest.mark.parametrize("case", slow_but(("mixed-channel",), SCALED))
def test_networks_are_the_fake_quantized_ones(case):
    module, shape, layers, others, granularity = case
    x = RANDOM.normal(size=shape).astype(np.float32)
    model, params, state = quantized(module, x, granularity=granularity)
    found = integer_model(model, (params, state), jax.eval_shape(lambda: x))
    assert set(found.layers) == layers and set(found.others) == others
    apply = jax.jit(found.model.apply)
    for inputs in (x, 2 * x):  # the second is clipped
        wanted = model.apply(params, state, inputs)[0].logits
        np.testing.assert_allclose(apply(found.params, state, inputs)[0].logits, wanted, atol=2e-5 * np.abs(wanted).max())
    text = apply.lower(found.params, state, x).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line or "stablehlo.convolution" in line]
    assert sum("xi8>" in line and "xi32>" in line for line in products) == len(layers)
    kernel = found.params[next(iter(layers))]["kernel"]
    assert kernel.dtype == np.int8 and np.abs(kernel).max() == 127


def test_what_stays_in_float32_says_why():
    x = RANDOM.normal(size=(8, 9)).astype(np.float32)
    model, params, state = quantized(MLP(outputs=3, widths=(20, 15)), x, only="fc1/*,fc2/*")
    params["fc1"] = {**params["fc1"], "kernel": params["fc1"]["kernel"] * np.linspace(1, 1.1, 9, dtype=np.float32)[:, None]}
    found = integer_model(model, (params, state), x)
    assert found.layers == ("fc2",)
    assert found.others == {
        "fc1": "its weights are not int8 with one scale for each channel", "fc": "its inputs are not rounded",
    }  # fmt: skip
    wanted = model.apply(params, state, x)[0].logits
    np.testing.assert_allclose(found.model.apply(found.params, state, x)[0].logits, wanted, atol=1e-5)


def test_sums_that_int32_does_not_hold_are_not_taken():
    assert LONGEST * 255 * 127 < 2**31 <= (LONGEST + 1) * 255 * 127
    x = np.concatenate([np.ones((1, LONGEST + 1)), -np.ones((1, LONGEST + 1))]).astype(np.float32)
    model, params, state = quantized(MLP(outputs=1, widths=()), x)
    with pytest.raises(UsageError, match=rf"^no layer can run on integers \(fc: int32 holds sums of {LONGEST} products"):
        integer_model(model, (params, state), x)


def test_ranges_must_be_static():
    x = RANDOM.normal(size=(8, 9)).astype(np.float32)
    model, params, state = quantized(MLP(outputs=3, widths=(4,)), x, activations="dynamic")
    with pytest.raises(UsageError, match=r"needs static activations, these are dynamic; use compression\.activations=static$"):
        integer_model(model, (params, state), x)
    with pytest.raises(UsageError, match="needs static activations, these are float32"):
        integer_model(model, (model.init(KEY, x)[0], state), x)
