"""Rounded inputs of layers against PyTorch's fake quantization; ranges from data; what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import jdistill.options  # noqa: F401 (registers every option)
from jdistill.applying import computing
from jdistill.compress import MagnitudePrune, Stored, apply_all, enter, finished
from jdistill.compress.activations import BESIDE, Activations, affine, rounded
from jdistill.compress.artifact import count_nonzero, read_artifact, restore_structure, write_artifact
from jdistill.compress.base import Subject
from jdistill.errors import RunError, UsageError
from jdistill.models import MLP
from jdistill.modules import from_linen, from_nnx
from jdistill.registry import build
from tests.reference import quantization as reference

RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(12, 7)).astype(np.float32)
KEY = jax.random.key(0)
STATIC, DYNAMIC = Activations(kind="static", calibration=12), Activations()
MODEL = STATIC.adapt(from_linen(MLP(outputs=3, widths=(6, 5))))
PARAMS, STATE = MODEL.init(KEY, X)
SUBJECT = Subject(MODEL, X, STATE, lambda count: X[:count])


def fake(x, low, high):
    """NumPy's, in float64."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / 255
    zero = np.clip(np.rint(-128 - low / scale), -128, 127)
    return (np.clip(np.rint(x / scale) + zero, -128, 127) - zero) * scale


def forward(x, ranges=None):
    """The MLP in NumPy, with inputs rounded by `ranges` of each layer or by their own."""
    for name in ("fc1", "fc2", "fc"):
        low, high = (x.min(), x.max()) if ranges is None else ranges[name]
        x = fake(x, low, high) @ np.asarray(PARAMS[name]["kernel"], float) + np.asarray(PARAMS[name]["bias"], float)
        x = x if name == "fc" else np.maximum(x, 0)
    return x


@pytest.mark.parametrize("case", reference.TORCH_INPUTS.values(), ids=reference.TORCH_INPUTS)
def test_values_ranges_and_gradients_are_torchs(case):
    data, factor, scale, zero, values, gradient = case
    found = affine(data.min(), data.max())
    np.testing.assert_allclose([found["scale"], found["zero"]], [scale, zero], rtol=2e-7)
    inputs = np.float32(factor) * reference.INPUTS
    np.testing.assert_allclose(jax.jit(rounded)(inputs, **found), values, rtol=0, atol=2.4e-7)
    np.testing.assert_array_equal(jax.grad(lambda x: rounded(x, **found).sum())(inputs), gradient)


def test_dynamic_ranges_are_of_the_batch():
    params = DYNAMIC.decode(PARAMS, DYNAMIC.init(KEY, PARAMS))
    for x in (X, 10 * X[:5]):
        np.testing.assert_allclose(jax.jit(MODEL.apply)(params, STATE, x)[0].logits, forward(x), atol=1e-5)
    assert DYNAMIC.calibration == 0 and DYNAMIC.init(KEY, PARAMS) == {}


def test_static_ranges_are_of_the_calibration_data():
    stored = finished((STATIC,), Stored(PARAMS), KEY, SUBJECT)
    assert set(stored.states[0]) == {"fc1/input", "fc2/input", "fc/input"}
    features = MODEL.apply(PARAMS, STATE, X)[0].features
    given = {"fc1": X, "fc2": features["hidden1"], "fc": features["hidden2"]}
    ranges = {name: (float(x.min()), float(x.max())) for name, x in given.items()}
    effective = apply_all((STATIC,), stored.params, stored.states)
    for x in (X, 10 * X[:5]):  # the second is clipped
        np.testing.assert_allclose(jax.jit(MODEL.apply)(effective, STATE, x)[0].logits, forward(x, ranges), atol=1e-5)


def test_without_a_rule_nothing_is_rounded():
    plain = from_linen(MLP(outputs=3, widths=(6, 5)))
    np.testing.assert_array_equal(MODEL.apply(PARAMS, STATE, X)[0].logits, plain.apply(PARAMS, STATE, X)[0].logits)
    assert STATIC.adapt(plain) is MODEL and MODEL.apply(PARAMS, STATE, X, train=True)[1] == {}


def test_ranges_are_taken_again_when_a_later_step_begins():
    """Pruning in one go changes what the layers are given; training under a step leaves the ranges alone."""
    first = enter((STATIC,), Stored(PARAMS), KEY, subject=SUBJECT)
    second = enter((STATIC, MagnitudePrune(sparsity=0.9)), first, KEY, subject=SUBJECT)
    before, after = first.states[0]["fc/input"]["scale"], second.states[0]["fc/input"]["scale"]
    assert not np.isclose(before, after)
    alone = finished((MagnitudePrune(sparsity=0.9), STATIC), Stored(PARAMS), KEY, SUBJECT)
    np.testing.assert_allclose(after, alone.states[1]["fc/input"]["scale"], rtol=1e-6)


def test_layers_with_weights_rounded_too_and_only_some():
    steps = build("compression", {"name": "int8", "activations": "static", "only": "fc2/*"}).steps()
    model = steps[1].adapt(from_linen(MLP(outputs=3, widths=(6, 5))))
    stored = finished(steps, Stored(PARAMS), KEY, SUBJECT._replace(model=model))
    assert set(stored.states[1]) == {"fc2/input"}
    same = {name: bool(np.array_equal(stored.params[name]["kernel"], PARAMS[name]["kernel"])) for name in PARAMS}
    assert same == {"fc1": True, "fc2": False, "fc": True}


class Filter(nn.Module):
    """One convolution."""

    @nn.compact
    def __call__(self, inputs, train=False):
        return nn.Conv(3, (3, 3), name="conv")(inputs).mean((1, 2)), {}


def test_convolutions_and_the_known_last_layer():
    x = RANDOM.normal(size=(4, 6, 6, 2)).astype(np.float32)
    plain = from_linen(Filter())
    model, (params, state) = STATIC.adapt(plain), plain.init(KEY, x)
    found = DYNAMIC.decode(params, {}), STATIC.decode(params, STATIC.calibrate(model, (params, state), x, {}))
    wanted = plain.apply(params, state, fake(x, x.min(), x.max()).astype(np.float32))[0].logits
    for effective in found:
        np.testing.assert_allclose(model.apply(effective, state, x)[0].logits, wanted, atol=1e-6)
    given = X[:, :5]
    kernel, bias = (np.asarray(PARAMS["fc"][name]) for name in ("kernel", "bias"))
    known = MODEL.head(DYNAMIC.decode(PARAMS, {}), given)
    np.testing.assert_allclose(known, fake(given, given.min(), given.max()) @ kernel + bias, atol=1e-5)


@pytest.mark.parametrize("steps", [(STATIC,), (DYNAMIC,)], ids=["static", "dynamic"])
def test_the_file_holds_the_rule(steps, tmp_path):
    stored = finished(steps, Stored(PARAMS), KEY, SUBJECT)
    write_artifact(tmp_path / "a", steps, stored, {}, {})
    read = restore_structure(read_artifact(tmp_path / "a")[0], PARAMS)
    effective = apply_all(steps, stored.params, stored.states)
    assert jax.tree.structure(read) == jax.tree.structure(effective) and BESIDE in read
    np.testing.assert_array_equal(MODEL.apply(read, STATE, X)[0].logits, MODEL.apply(effective, STATE, X)[0].logits)
    assert count_nonzero(read) == count_nonzero(PARAMS)


def test_vmap_is_a_loop_and_gradients_reach_all_weights():
    members = [jax.tree.map(lambda leaf, i=i: leaf * np.float32(1 + i), PARAMS) for i in range(2)]
    states = [STATIC.calibrate(MODEL, (params, STATE), X, {}) for params in members]

    def loss(params, state):
        return jnp.mean(jnp.square(MODEL.apply(STATIC.decode(params, state), STATE, X, train=True)[0].logits))

    stacked = [jax.tree.map(lambda *leaves: jnp.stack(leaves), *both) for both in (members, states)]
    grads = jax.jit(jax.vmap(jax.grad(loss)))(*stacked)
    for i in range(2):
        alone = jax.grad(loss)(members[i], states[i])
        jax.tree.map(lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=2e-4, atol=1e-6), grads, alone)
        assert all(np.any(leaf) for leaf in jax.tree.leaves(alone))


def test_other_precisions_round_by_the_same_rule():
    effective = DYNAMIC.decode(PARAMS, {})
    low = computing(MODEL, "bfloat16").apply(effective, STATE, X)[0].logits
    np.testing.assert_allclose(low, forward(X), atol=0.05)


def test_shapes_are_enough_while_a_run_is_checked():
    shapes = jax.eval_shape(lambda: STATIC.calibrate(MODEL, (PARAMS, STATE), jnp.zeros((12, 7)), {}))
    assert shapes["fc/input"]["scale"].shape == ()


def test_data_that_tell_nothing_are_one_line():
    line = r"^activations=static: all inputs of layer fc1 are {} in 12 calibration rows, which gives no range; use activ"
    for x, found in ((0 * X, "0"), (np.full_like(X, 2.5), "2.5")):
        with pytest.raises(RunError, match=line.format(found)):
            STATIC.calibrate(MODEL, (PARAMS, STATE), x, {})
    dead = {**PARAMS, "fc1": {"kernel": PARAMS["fc1"]["kernel"], "bias": np.full(6, -100, np.float32)}}
    with pytest.raises(RunError, match="all inputs of layer fc2 are 0 in 12"):
        STATIC.calibrate(MODEL, (dead, STATE), X, {})
    with pytest.raises(RunError, match=r"inputs of layer fc are not finite \(nan to nan\); the run diverged$"):
        STATIC.calibrate(MODEL, (PARAMS, STATE), np.where(X > 1, np.inf, X), {})
    without = finished((STATIC,), Stored(PARAMS), KEY)
    with pytest.raises(RunError, match="no range was taken from data"):
        STATIC.finalize("fc/kernel", np.asarray(without.params["fc"]["kernel"]), without.states[0])


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.fc = nnx.Linear(7, 3, rngs=rngs)

    def __call__(self, inputs, rngs=None):
        return self.fc(inputs), {}


def build_nnx(rngs):
    return NnxNet(rngs)


class Looped(nn.Module):
    """A Dense layer that is called within a loop."""

    @nn.compact
    def __call__(self, inputs, train=False):
        loop = nn.scan(lambda layer, state, _: (layer(state), None), variable_broadcast="params", split_rngs={"params": False})
        x, _ = loop(nn.Dense(7, name="within"), inputs, jnp.arange(3))
        return nn.Dense(3, name="fc")(x), {"embedding": x}


def test_networks_that_cannot_be_rounded_are_one_line():
    nothing = STATIC.adapt(from_nnx(build_nnx))
    with pytest.raises(UsageError, match=r"^activations are rounded at Flax Linen's Dense and Conv layers, and this network"):
        nothing.apply(*nothing.init(KEY, X), X)
    none_named = Activations(only="fc9/*").adapt(from_linen(MLP(outputs=3, widths=(6, 5))))
    with pytest.raises(UsageError, match=r"layers that only=fc9/\* names, and this network has none; use activations=none$"):
        none_named.apply(PARAMS, STATE, X)


def test_layers_within_a_loop_take_dynamic_ranges_only():
    model = DYNAMIC.adapt(from_linen(Looped()))
    params, state = model.init(KEY, X)
    assert np.isfinite(model.apply(DYNAMIC.decode(params, {}), state, X)[0].logits).all()
    with pytest.raises(UsageError, match=r"^activations=static: this network calls layers within a loop"):
        STATIC.calibrate(model, (params, state), X, {})
    outside = Activations(kind="static", only="fc/*")
    assert set(outside.calibrate(model, (params, state), X, {})) == {"fc/input"}


def test_options():
    assert build("compression", {"name": "activations"}).steps() == (Activations(kind="dynamic", recover_epochs=0),)
    for key, value in (("kind", "statik"), ("recover_epochs", -1)):
        with pytest.raises(UsageError, match=rf"^compression\.{key} must be"):
            build("compression", {"name": "activations", key: value})
    with pytest.raises(UsageError, match=r"^compression\.calibration must be positive, got 0"):
        build("compression", {"name": "activations", "kind": "static", "calibration": 0})
