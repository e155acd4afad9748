"""Networks without some of their units against the masked ones, loops, and torch.nn.utils.prune.ln_structured."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from safetensors import safe_open

from jdistill.compress import IntegerWeights, MagnitudePrune, Stored, apply_all, finished
from jdistill.compress.artifact import read_artifact, write_artifact
from jdistill.compress.base import Subject, enter
from jdistill.compress.low_rank import LowRank
from jdistill.compress.structured import StructuredPrune
from jdistill.data.base import Schema
from jdistill.errors import UsageError
from jdistill.models.layers import conv
from jdistill.models.lenet import LeNet
from jdistill.models.mlp import MLP
from jdistill.models.recommend.sasrec import SASRec
from jdistill.models.resnet import DeepResNet, ResNet
from jdistill.models.tabular.ltr import LtrMLP
from jdistill.models.tabular.wide_mlp import WideMLP
from jdistill.models.vgg import VGG
from jdistill.models.wrn import WideResNet
from jdistill.modules import from_linen
from jdistill.registry import build
from tests.e2e.helpers import TINY, call
from tests.marks import slow_but
from tests.reference import structured as reference
from tests.tiny import assert_same_bits

RANDOM = np.random.default_rng(0)
IMAGES = RANDOM.normal(size=(3, 8, 8, 2)).astype(np.float32)
TABLE = np.concatenate([RANDOM.integers(0, 4, (6, 2)), RANDOM.normal(size=(6, 3))], 1).astype(np.float32)
LISTS = np.concatenate([RANDOM.normal(size=(3, 5, 4)), np.ones((3, 5, 1))], -1).astype(np.float32)
REQUEST = {
    "user": np.array([0, 1, 2, 3], np.int32),
    "history": np.array([[13, 13, 13, 13, 13], [13, 13, 13, 13, 4], [13, 13, 2, 11, 2], [0, 12, 5, 6, 7]], np.int32),
}
SHOP = Schema(users=7, items=13, history=5)
CASES = {
    "mlp": (MLP(3, (7, 6), activation="sigmoid"), IMAGES, {}),
    "lenet": (LeNet(3, (4, 6), (8, 7)), IMAGES, {}),
    "resnet": (ResNet(3, 8, (4, 4, 6, 8)), IMAGES, {}),
    "resnet, streams": (ResNet(3, 8, (4, 4, 6, 8)), IMAGES, {"streams": True}),
    "resnet, other stem, streams": (ResNet(3, 8, (4, 8, 6, 10)), IMAGES, {"streams": True}),
    "bottleneck": (DeepResNet(3, (1, 1, 1, 1), inner=(8, 8, 9, 10, 8, 7, 6, 5)), IMAGES, {}),
    "vgg": (VGG(3, channels=(6, 7, 8, 9, 10)), IMAGES, {}),
    "wrn": (WideResNet(3, 10, 1), IMAGES, {}),
    "wide_mlp": (WideMLP(3, Schema(fields=(4, 5, 0, 0, 0)), widths=(7, 6), wide=True), TABLE, {}),
    "ltr_mlp": (LtrMLP(1, widths=(7, 6), context="attention", dim=8, heads=4), LISTS, {}),
    "sasrec": (SASRec(SHOP, dim=6, layers=2, heads=3), REQUEST, {}),
}


def variables(model, inputs, scale=None):
    """Parameters and running statistics, all of them random; of standard deviation 1/sqrt(inputs) without `scale`."""
    rng = np.random.default_rng(1)

    def drawn(leaf):
        fan = np.prod(leaf.shape[:-1]) if leaf.ndim > 1 else 1
        return jnp.asarray(rng.normal(size=leaf.shape, scale=scale or max(fan, 1) ** -0.5), jnp.float32)

    params, running = jax.eval_shape(lambda: model.init(jax.random.key(0), inputs))
    statistics = jax.tree.map(lambda leaf: jnp.asarray(rng.uniform(0.5, 2, leaf.shape), jnp.float32), running)
    return jax.tree.map(drawn, params), statistics


def subject(model, inputs, running):
    return Subject(model, jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), inputs), running, lambda n: None)


def cut(module, inputs, steps, scale=None):
    """The stored student under `steps`, its effective parameters, and those it had."""
    model = from_linen(module)
    params, running = variables(model, inputs, scale)
    stored = Stored(params)
    for i in range(len(steps)):
        stored = enter(steps[: i + 1], stored, jax.random.key(1), subject=subject(model, inputs, running))
    return model, stored, jax.jit(lambda s: apply_all(steps, s.params, s.states))(stored), (params, running)


def logits(model, params, running, inputs):
    return np.asarray(jax.jit(lambda *given: model.apply(*given)[0].logits)(params, running, inputs))


QUICK = ("mlp", "lenet", "resnet, streams", "wide_mlp", "sasrec")
"""Linear and convolutional layers, residual sums, categories, heads."""


@pytest.mark.parametrize("name", slow_but(QUICK, tuple(CASES)))
def test_the_smaller_network_computes_what_the_masked_one_does(name):
    module, inputs, options = CASES[name]
    step = StructuredPrune(sparsity=0.4, **options)
    model, stored, masked, (params, running) = cut(module, inputs, (step,))
    node, less = step.shrink({"name": name}, running, stored.states[0], model=model)
    changes = {key: value for key, value in node.items() if key != "name"}
    assert json.loads(json.dumps(changes)) == changes
    small = from_linen(module.clone(**changes))
    like = jax.eval_shape(lambda: small.init(jax.random.key(0), inputs))
    assert jax.tree.map(jnp.shape, (stored.params, less)) == jax.tree.map(jnp.shape, like)
    expected = logits(model, masked, running, inputs)
    np.testing.assert_allclose(logits(small, stored.params, less, inputs), expected, atol=1e-5 * max(1, abs(expected).max()))
    assert np.abs(expected - logits(model, params, running, inputs)).max() > 1e-3  # something was removed
    for before, after in zip(jax.tree.leaves(params), jax.tree.leaves(masked), strict=True):
        assert np.all((after == before) | (after == 0))
    assert sum(map(jnp.size, jax.tree.leaves(stored.params))) == sum(map(jnp.size, jax.tree.leaves(like[0])))


@pytest.mark.parametrize(("norm", "sparsity"), [(1, 0.0), (1, 0.5), (2, 0.5), (2, 0.3), (2, 0.8)])
def test_perceptron_against_loops(norm, sparsity):
    step = StructuredPrune(sparsity=sparsity, norm=norm)
    _, stored, masked, (params, running) = cut(MLP(3, (9, 5)), IMAGES, (step,))
    params = jax.tree.map(np.asarray, params)
    units = {fc: reference.kept([params[fc]["kernel"]], norm, sparsity) for fc in ("fc1", "fc2")}
    for i, chosen in enumerate(units.values()):
        assert stored.states[0][f"units/widths.{i}"]["kept"].tolist() == chosen
    expected = reference.perceptron(params, IMAGES, units)
    np.testing.assert_allclose(logits(from_linen(MLP(3, (9, 5))), masked, running, IMAGES), expected, atol=1e-5)
    few = MLP(3, tuple(map(len, units.values())))
    np.testing.assert_allclose(logits(from_linen(few), stored.params, running, IMAGES), expected, atol=1e-5)


def test_all_that_produces_a_stream_counts():
    step = StructuredPrune(sparsity=0.5, streams=True)
    _, stored, _, (params, _) = cut(ResNet(3, 14, (6, 6, 6, 8)), IMAGES, (step,))
    p = jax.tree.map(np.asarray, params)
    stem = [p["conv1"]["kernel"], p["layer1_0"]["conv2"]["kernel"], p["layer1_1"]["conv2"]["kernel"]]
    assert stored.states[0]["units/widths.0"]["kept"].tolist() == reference.kept(stem, 2, 0.5)
    last = [p["layer3_0"]["downsample_conv"]["kernel"], p["layer3_0"]["conv2"]["kernel"], p["layer3_1"]["conv2"]["kernel"]]
    assert stored.states[0]["units/widths.3"]["kept"].tolist() == reference.kept(last, 2, 0.5)
    assert stored.states[0]["units/inner.0"]["kept"].tolist() == reference.kept([p["layer1_0"]["conv1"]["kernel"]], 2, 0.5)


# (weight as PyTorch has it, n, amount) -> units that torch 2.13.0's `prune.ln_structured(m, "weight", amount, n, dim=0)`
# removes; the weight is np.random.RandomState(len(shape)).standard_normal(shape).
TORCH = {
    ((9, 6), 1, 0.25): [6, 8],
    ((9, 6), 1, 0.5): [2, 3, 6, 8],
    ((9, 6), 2, 0.7): [2, 3, 4, 6, 7, 8],
    ((8, 3, 3, 3), 1, 0.25): [3, 5],
    ((8, 3, 3, 3), 2, 0.5): [0, 2, 3, 5],
    ((8, 3, 3, 3), 1, 0.7): [0, 2, 3, 5, 6, 7],
    ((8, 3, 3, 3), 2, 0.7): [0, 2, 3, 4, 5, 7],
}


class OneLayer(nn.Module):
    """A convolution or a linear layer that can lose units, and the head."""

    units: int
    convolution: bool

    @property
    def removable(self):
        return {"units": self.units}

    @nn.compact
    def __call__(self, inputs, train=False):
        x = (
            conv(inputs, self.units, 3, name="layer").mean((1, 2))
            if self.convolution
            else nn.Dense(self.units, name="layer")(inputs)
        )
        return nn.Dense(2, name="fc")(x), {}


@pytest.mark.parametrize(("shape", "norm", "amount"), TORCH)
def test_the_units_are_torchs(shape, norm, amount):
    weight = np.random.RandomState(len(shape)).standard_normal(shape).astype(np.float32)
    model = from_linen(OneLayer(shape[0], len(shape) == 4))
    inputs = jnp.zeros((1, 4, 4, 3) if len(shape) == 4 else (1, 6))
    params, _ = model.init(jax.random.key(0), inputs)
    params["layer"]["kernel"] = weight.transpose(2, 3, 1, 0) if len(shape) == 4 else weight.T
    state = StructuredPrune(sparsity=amount, norm=norm).init(jax.random.key(0), params, model=model, inputs=inputs)
    assert sorted({*range(shape[0])} - {*state["units/units"]["kept"].tolist()}) == TORCH[shape, norm, amount]


def test_equal_units_go_in_order():
    model = from_linen(MLP(2, (5,)))
    params = jax.tree.map(jnp.ones_like, model.init(jax.random.key(0), jnp.zeros((1, 3)))[0])
    state = StructuredPrune(sparsity=0.5).init(jax.random.key(0), params, model=model, inputs=jnp.zeros((1, 3)))
    assert state["units/widths.0"]["kept"].tolist() == [2, 3, 4]  # round(2.5) is 2, as in torch


def test_gradients_are_those_of_what_is_left():
    step = StructuredPrune(sparsity=0.4)
    model, stored, masked, (_, running) = cut(*CASES["lenet"][:2], (step,))

    def loss(params):
        return jnp.sum(model.apply(params, running, IMAGES)[0].logits ** 2)

    own = jax.jit(jax.grad(lambda p: loss(apply_all((step,), p, stored.states))))(stored.params)
    full = jax.jit(jax.grad(loss))(masked)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * float(jnp.abs(b).max())),
        own, step.encode(full, stored.states[0]),
    )  # fmt: skip


def test_members_at_once_are_one_by_one():
    step, model = StructuredPrune(sparsity=0.4), from_linen(LeNet(3, (4, 6), (8, 7)))
    inputs = jax.ShapeDtypeStruct(IMAGES.shape, IMAGES.dtype)

    def all_of(params):
        state = step.init(jax.random.key(0), params, model=model, inputs=inputs)
        stored = step.encode(params, state)
        return state, stored, step.decode(stored, state)

    members = [model.init(jax.random.key(i), inputs)[0] for i in range(3)]
    stacked = jax.jit(jax.vmap(all_of))(jax.tree.map(lambda *leaves: jnp.stack(leaves), *members))
    for i, member in enumerate(members):
        assert_same_bits(jax.tree.map(lambda leaf, i=i: leaf[i], stacked), jax.jit(all_of)(member))


@pytest.mark.slow
def test_what_an_earlier_mask_left():
    steps = (MagnitudePrune(sparsity=0.6), StructuredPrune(sparsity=0.4))
    _, stored, masked, (params, _) = cut(MLP(3, (9, 5)), IMAGES, steps)
    before = np.asarray(params["fc2"]["kernel"] * MagnitudePrune(sparsity=0.6).init(jax.random.key(0), params)["fc2/kernel"])
    rows, columns = (stored.states[1][f"units/widths.{i}"]["kept"] for i in (0, 1))
    assert columns.tolist() == reference.kept([before], 2, 0.4)
    assert stored.states[0]["fc2/kernel"].shape == stored.params["fc2"]["kernel"].shape == (5, 3)
    np.testing.assert_array_equal(masked["fc2"]["kernel"][np.ix_(rows, columns)], before[np.ix_(rows, columns)])
    moved = jax.tree.map(lambda leaf: leaf + 1, stored.params)  # as training moves what is pruned
    after = np.asarray(apply_all(steps, moved, stored.states)["fc2"]["kernel"])[np.ix_(rows, columns)]
    np.testing.assert_array_equal(after != 0, before[np.ix_(rows, columns)] != 0)


SEQUENCES = {
    "structured": (StructuredPrune(),),
    "structured, int8": (StructuredPrune(), IntegerWeights()),
    "int8, structured": (IntegerWeights(), StructuredPrune()),
    "prune, structured, int8": (MagnitudePrune(), StructuredPrune(), IntegerWeights()),
    "structured, low_rank": (StructuredPrune(), LowRank(share=0.3, only="fc1/*")),
}


@pytest.mark.parametrize("name", SEQUENCES)
def test_the_file_holds_the_smaller_network_alone(name, tmp_path):
    steps, module = SEQUENCES[name], MLP(3, (40, 30))
    model = from_linen(module)
    params, running = variables(model, IMAGES)
    given = subject(model, IMAGES, running)
    stored = finished(steps, Stored(params), jax.random.key(0), given)
    masked = apply_all(steps, stored.params, stored.states)
    about = {"student": {"name": "mlp", "widths": [40, 30]}}
    size = write_artifact(tmp_path / "a", steps, stored, running, about, model=model)
    saved, state, found = read_artifact(tmp_path / "a")
    assert found["student"] == {"name": "mlp", "widths": [20, 15]} and state == running == {}
    got = logits(from_linen(MLP(3, (20, 15))), saved, state, IMAGES)
    np.testing.assert_allclose(got, logits(model, masked, running, IMAGES), atol=1e-5)
    whole = finished((), Stored(params), jax.random.key(0))
    assert size < 0.55 * write_artifact(tmp_path / "b", (), whole, running, about)
    with safe_open(tmp_path / "a", "numpy") as file:
        assert not any(key.startswith("form") and "units" in key for key in file.keys())  # noqa: SIM118


def refused(module, inputs, before=(), **options):
    def begin(step):
        step.adapt(from_linen(module))
        cut(module, inputs, (*before, step))

    with pytest.raises(UsageError) as caught:
        begin(StructuredPrune(**options))
    return str(caught.value)


def test_what_cannot_be_removed_is_one_line():
    start = "compression=structured"
    assert refused(MLP(3, (4, 60)), IMAGES, sparsity=0.9) == (
        f"{start}: sparsity=0.9 leaves none of the 4 units of widths.0; choose a smaller one"
    )
    assert refused(MLP(3, ()), IMAGES).startswith(
        f"{start} needs a student with removable widths: lenet, ltr_mlp, mlp, resnet110"
    )
    assert refused(MLP(3, (4,)), IMAGES, streams=True).startswith(f"{start}: streams=true, but the student has no residual")
    assert refused(MLP(3, (8, 8)), IMAGES, (LowRank(only="fc1/*"),)) == (
        f"{start}: a step before it stores fc1/kernel in another form; put structured first"
    )
    # A stem of 2 channels before a stage of 2 needs no projection, which this network has.
    found = refused(ResNet(3, 8, (3, 4, 6, 8)), IMAGES, sparsity=0.4, streams=True)
    assert found.startswith(f"{start}: a network with inner.0=") and found.endswith("choose another sparsity")
    state = cut(MLP(3, (9,)), IMAGES, (StructuredPrune(),))[1].states[0]
    with pytest.raises(UsageError, match=r"holds \(7,\) numbers about fc1/kernel; put structured first"):
        StructuredPrune().hold("fc1/kernel", jnp.zeros(7), state)


def test_what_earlier_steps_may_hold():
    state = cut(MLP(3, (9, 5)), IMAGES, (StructuredPrune(),))[1].states[0]
    value = {"scale": jnp.ones((1, 5)), "range": jnp.ones(()), "open": ()}
    held = StructuredPrune().hold("fc2/kernel", value, state)
    assert jax.tree.map(jnp.shape, held) == {"scale": (1, 3), "range": (), "open": ()}
    assert StructuredPrune().hold("other", jnp.ones(7), state).shape == (7,)


def test_a_single_unit_stays():
    _, stored, _, _ = cut(SASRec(SHOP, dim=6, layers=1, heads=1), REQUEST, (StructuredPrune(sparsity=0.8),))
    assert stored.states[0]["units/kept_heads.0"]["kept"].tolist() == [0]
    assert stored.params["block1"]["fc1"]["kernel"].shape == (6, 1)


def test_options():
    made = build("compression", {"name": "structured"})
    assert made.steps() == (StructuredPrune(sparsity=0.5, norm=2, streams=False, recover_epochs=5),)
    for key, value in (("sparsity", 1.0), ("sparsity", -0.1), ("norm", 3), ("streams", "yes"), ("recover_epochs", -1)):
        with pytest.raises(UsageError, match=rf"^compression\.{key} must be"):
            build("compression", {"name": "structured", key: value})


@pytest.mark.slow
def test_the_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    steps = "compression.steps=[distill,{name: structured, sparsity: 0.5},{name: recover, epochs: 1},int8]"
    done = call("data=digits", "student=mlp", "compression=pipeline", steps, *TINY)
    assert done.code == 0, done.err
    (folder,) = (tmp_path / "runs").iterdir()
    found = json.loads((folder / "result.json").read_text())
    assert found["size"]["parameters"] == 64 * 8 + 8 + 8 * 10 + 10 and found["steps"] == 16 + 8
    assert read_artifact(folder / "artifact.safetensors")[2]["student"]["widths"] == [8]
    refused = call("data=digits", "student=mlp", "compression=structured", "compression.sparsity=0.99", *TINY)
    assert refused.code == 2 and len(refused.error_lines) == 1
    assert "leaves none of the 16 units of widths.0" in refused.error_lines[0]
