"""The two adaptors, over one Linen and one NNX network with BatchNorm and Dropout."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from jdistill.errors import UsageError
from jdistill.models import MLP
from jdistill.models.layers import BatchNorm
from jdistill.modules import as_model, from_linen, from_nnx

INPUTS = np.random.default_rng(0).normal(size=(16, 6)).astype(np.float32)


class LinenNet(nn.Module):
    outputs: int
    ours: bool = False

    @nn.compact
    def __call__(self, inputs, train=False):
        features = {"hidden": nn.Dense(8, name="hidden")(inputs)}
        if self.ours:
            x = BatchNorm(name="norm")(features["hidden"], train)
        else:
            x = nn.BatchNorm(use_running_average=not train, momentum=0.9, name="norm")(features["hidden"])
        x = nn.Dropout(0.5)(nn.relu(x), deterministic=not train)
        return nn.Dense(self.outputs, name="last")(x), features


class NnxNet(nnx.Module):
    def __init__(self, outputs, rngs):
        self.hidden = nnx.Linear(6, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, momentum=0.9, rngs=rngs)
        self.dropout = nnx.Dropout(0.5)
        self.last = nnx.Linear(8, outputs, rngs=rngs)

    def __call__(self, inputs, rngs=None):
        features = {"hidden": self.hidden(inputs)}
        x = self.dropout(nnx.relu(self.norm(features["hidden"])), rngs=rngs)
        return self.last(x), features


def build_nnx(rngs):
    return NnxNet(3, rngs)


# name -> (network, where its running statistics are, ddof of the variance stored)
NETWORKS = {
    "linen": (LinenNet(3), lambda state: state["batch_stats"]["norm"], 0),
    "linen with jdistill's BatchNorm": (LinenNet(3, ours=True), lambda state: state["batch_stats"]["norm"], 1),
    "nnx": (build_nnx, lambda state: state["norm"], 0),
}


@pytest.fixture(params=NETWORKS)
def case(request):
    network, running, _ = NETWORKS[request.param]
    model = as_model(network)
    return model, *model.init(jax.random.key(0), INPUTS), running


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_init(case):
    model, params, state, running = case
    shapes = sorted(leaf.shape for leaf in jax.tree.leaves(params))
    assert shapes == [(3,), (6, 8), (8,), (8,), (8,), (8, 3)]
    np.testing.assert_array_equal(running(state)["mean"], np.zeros(8))
    np.testing.assert_array_equal(running(state)["var"], np.ones(8))
    abstract = jax.ShapeDtypeStruct(INPUTS.shape, INPUTS.dtype)
    assert_equal(model.init(jax.random.key(0), abstract), (params, state))
    other = model.init(jax.random.key(1), INPUTS)[0]
    assert any(np.any(a != b) for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(other), strict=True))


def test_eval_leaves_state_and_ignores_the_key(case):
    model, params, state, _ = case
    outputs, after = model.apply(params, state, INPUTS)
    assert outputs.logits.shape == (16, 3)
    assert {key: value.shape for key, value in outputs.features.items()} == {"hidden": (16, 8)}
    assert_equal(after, state)
    assert_equal(model.apply(params, state, INPUTS, key=jax.random.key(5))[0], outputs)
    one_by_one = [model.apply(params, state, INPUTS[i : i + 1])[0].logits[0] for i in range(3)]
    np.testing.assert_allclose(one_by_one, outputs.logits[:3], atol=1e-6)


@pytest.mark.parametrize("name", NETWORKS)
def test_training_moves_running_statistics(name):
    network, running, ddof = NETWORKS[name]
    model = as_model(network)
    params, state = model.init(jax.random.key(0), INPUTS)
    outputs, after = model.apply(params, state, INPUTS, key=jax.random.key(1), train=True)
    hidden = np.asarray(outputs.features["hidden"])
    np.testing.assert_allclose(running(after)["mean"], 0.1 * hidden.mean(0), atol=1e-6)
    np.testing.assert_allclose(running(after)["var"], 0.9 + 0.1 * hidden.var(0, ddof=ddof), atol=1e-5)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert [leaf.dtype for leaf in jax.tree.leaves(after)] == [leaf.dtype for leaf in jax.tree.leaves(state)]
    np.testing.assert_array_equal(running(state)["mean"], np.zeros(8))  # the state given is not touched
    assert np.abs(model.apply(params, after, INPUTS)[0].logits - model.apply(params, state, INPUTS)[0].logits).max() > 0


def test_dropout_follows_the_key(case):
    model, params, state, _ = case

    def train(seed):
        return model.apply(params, state, INPUTS, key=jax.random.key(seed), train=True)[0].logits

    np.testing.assert_array_equal(train(1), train(1))
    assert np.any(train(1) != train(2))


@pytest.mark.parametrize("train", [False, True])
def test_jit_equals_eager(case, train):
    model, params, state, _ = case
    key, traces = jax.random.key(1), []

    @jax.jit
    def apply(params, state, key):
        traces.append(1)
        return model.apply(params, state, INPUTS, key=key, train=train)

    got = apply(params, state, key)
    expected = model.apply(params, state, INPUTS, key=key, train=train)
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), got, expected)
    apply(params, got[1], key)
    assert len(traces) == 1  # the state that comes back is no other program


def test_gradients_reach_every_parameter(case):
    model, params, state, _ = case

    def objective(params):
        outputs, _ = model.apply(params, state, INPUTS, key=jax.random.key(1), train=True)
        return jnp.mean(jnp.square(outputs.logits - 1))

    grads = jax.grad(objective)(params)
    assert jax.tree.structure(grads) == jax.tree.structure(params)
    zero = [leaf.shape for leaf in jax.tree.leaves(grads) if np.all(np.abs(leaf) < 1e-6)]
    assert zero == [(8,)]  # the bias before BatchNorm, and no other


def test_equal_modules_share_their_functions():
    assert from_linen(MLP(3, (4,))) is from_linen(MLP(3, (4,)))
    assert from_linen(MLP(3, (4,))) is not from_linen(MLP(3, (5,)))
    assert from_nnx(build_nnx) is from_nnx(build_nnx)


def test_as_model():
    model = from_linen(MLP(3))
    assert as_model(model) is model
    with pytest.raises(UsageError, match="a model must be a Linen module, an NNX builder or a Model, got int"):
        as_model(3)
