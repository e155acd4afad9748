"""Losses on several maps against the published implementations' own numbers, and against the formulas in plain loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdistill.errors import UsageError
from jdistill.losses import FlowOfSolution, NeuronSelectivity, VariationalInformation
from jdistill.registry import build
from jdistill.types import Outputs
from tests.reference import maps as reference
from tests.reference.inputs import channels_last, golden_inputs

IN = golden_inputs()
FS, FT, FT8 = (channels_last(f) for f in (IN.fs, IN.ft, IN.ft8))
MORE_S, MORE_T = reference.golden_lists()

PRECISIONS = pytest.mark.parametrize(("x64", "tolerance"), [(True, 1e-10), (False, 2e-5)], ids=["float64", "float32"])


def network(*stages: np.ndarray, **others: np.ndarray) -> Outputs:
    features = {f"stage{i}": jnp.asarray(f) for i, f in enumerate(stages, 1)}
    features |= {name: jnp.asarray(f) for name, f in others.items()}
    return Outputs(jnp.zeros((len(stages[0]), 3)), {**features, "embedding": jnp.zeros((len(stages[0]), 5))})


def values_of(loss, student: Outputs, teacher: Outputs):
    params = loss.init(jax.random.key(0), student, teacher)
    values = jax.jit(loss)(params, student, teacher, {})
    assert values.shape == (len(student.logits),)
    return values


# name: (loss, student's stages, teacher's, value, the implementation that gave it in float64)
GOLDENS = {
    "nst": (NeuronSelectivity(), [FS], [FT], 0.2775409923214631, "RepDistiller NSTLoss; mdistiller, AberHu agree"),
    "fsp": (FlowOfSolution(), [FS, *MORE_S], [FT, *MORE_T], 0.08557319999834925, "RepDistiller FSP; AberHu before its / 3"),
}


@PRECISIONS
@pytest.mark.parametrize("name", GOLDENS)
def test_published_value(name, x64, tolerance):
    loss, student, teacher, expected, _origin = GOLDENS[name]
    with jax.enable_x64(x64):
        values = values_of(loss, network(*student), network(*teacher))
        assert values.dtype == (jnp.float64 if x64 else jnp.float32)
        np.testing.assert_allclose(values.mean(), expected, rtol=tolerance)


def test_vid_starts_at_the_published_variance_and_as_torch_does():
    student, teacher = (
        Outputs(None, {f"stage{i}": jax.ShapeDtypeStruct((2, 8 // i, 8 // i, width), jnp.bfloat16) for i in (1, 2)})
        for width in (100, 60)
    )
    params = VariationalInformation().init(jax.random.key(0), student, teacher)
    assert set(params) == {"stage1", "stage2"}
    for layer in params.values():
        np.testing.assert_allclose(jax.nn.softplus(layer["variance"]) + 1e-5, np.full(60, 5.0), rtol=1e-6)
        for name, width in (("kernel1", 100), ("kernel2", 60), ("kernel3", 60)):
            kernel, bound = np.asarray(layer[name]), width**-0.5
            assert kernel.shape == (width, 60) and kernel.dtype == np.float32
            np.testing.assert_allclose([kernel.min(), kernel.max()], [-bound, bound], rtol=0.05)
    other = VariationalInformation(initial_variance=0.3).init(jax.random.key(0), student, teacher)
    np.testing.assert_allclose(jax.nn.softplus(other["stage1"]["variance"]), np.full(60, 0.3), rtol=1e-4)


RANDOM = np.random.RandomState(1)
WIDE = [RANDOM.randn(5, 6, 8, 3), RANDOM.randn(5, 3, 2, 4)]  # not square, not positive
TALL = [RANDOM.randn(5, 5, 4, 6), RANDOM.randn(5, 7, 6, 2)]


@pytest.mark.parametrize("layers", [None, ("stage2",)])
def test_nst_of_each_example_is_the_sum_over_layers(layers):
    with jax.enable_x64(True):
        values = values_of(NeuronSelectivity(layers=layers), network(*WIDE), network(*TALL))
    pairs = list(zip(WIDE, TALL, strict=True))[1 if layers else 0 :]
    np.testing.assert_allclose(values, sum(reference.nst(s, t) for s, t in pairs), rtol=1e-10)


def test_vid_of_each_example_is_the_sum_over_layers():
    random, loss = np.random.RandomState(2), VariationalInformation(epsilon=0.01)
    with jax.enable_x64(True):
        student, teacher = network(*WIDE), network(*TALL)
        params = loss.init(jax.random.key(0), student, teacher)
        params = jax.tree.map(lambda p: p + 0.5 * random.randn(*p.shape), params)
        values = jax.jit(loss)(params, student, teacher, {})
    expected = sum(reference.vid(s, t, params[f"stage{i}"], 0.01) for i, (s, t) in enumerate(zip(WIDE, TALL, strict=True), 1))
    np.testing.assert_allclose(values, expected, rtol=1e-10)


def test_vid_trains_its_mean_and_its_variance():
    loss, student, teacher = VariationalInformation(), network(*WIDE), network(*TALL)
    params = loss.init(jax.random.key(0), student, teacher)
    grads = jax.grad(lambda p: loss(p, student, teacher, {}).mean())(params)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads))


def test_fsp_of_each_example_is_the_sum_over_pairs_from_the_stem():
    random = np.random.RandomState(3)
    shapes = {"stem": (9, 7, 2), "stage1": (4, 8, 3), "stage2": (5, 4, 4)}
    s, t = ({name: random.randn(5, *shape) for name, shape in shapes.items()} for _ in range(2))
    t["stem"] = random.randn(5, 3, 3, 2)  # only channels need to be equal
    with jax.enable_x64(True):
        student = network(s["stage1"], s["stage2"], RANDOM.randn(5, 2, 2, 2), stem=s["stem"])
        teacher = network(t["stage1"], t["stage2"], stem=t["stem"])
        values = values_of(FlowOfSolution(), student, teacher)
        chosen = values_of(FlowOfSolution(layers=("stage2", "stem")), student, teacher)
        del student.features["stem"]
        without = values_of(FlowOfSolution(), student, teacher)
    lists = [[f[name] for name in shapes] for f in (s, t)]
    np.testing.assert_allclose(values, reference.fsp(*lists), rtol=1e-10)
    np.testing.assert_allclose(without, reference.fsp(*(maps[1:] for maps in lists)), rtol=1e-10)
    np.testing.assert_allclose(chosen, reference.fsp(*([maps[2], maps[0]] for maps in lists)), rtol=1e-10)


@pytest.mark.parametrize("loss", [NeuronSelectivity(), FlowOfSolution(), VariationalInformation()], ids=["nst", "fsp", "vid"])
def test_dead_channels_and_empty_maps_have_finite_and_modest_gradients(loss):
    random = np.random.RandomState(4)
    alive = [random.randn(3, 4, 4, 5).astype(np.float32) for _ in range(2)]
    dead = [f * [1, 0, 1, 1, 0] for f in alive]
    for student in (dead, [0 * f for f in alive]):
        for stages in (alive, dead, [0 * f for f in alive]):
            teacher = network(*stages)
            params = loss.init(jax.random.key(0), network(*student), teacher)
            value, grads = jax.value_and_grad(
                lambda p, maps, teacher=teacher: loss(p, network(*maps), teacher, {}).mean(), argnums=(0, 1)
            )(params, [jnp.asarray(f, jnp.float32) for f in student])
            assert np.isfinite(value)
            assert all(np.all(np.isfinite(leaf)) and np.abs(leaf).max() < 100 for leaf in jax.tree.leaves(grads))


EVERY = pytest.mark.parametrize("loss", [NeuronSelectivity, FlowOfSolution, VariationalInformation])


@EVERY
@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (("stage1", "stagee2"), "layers 'stagee2' does not exist in the student; did you mean 'stage2'?"),
        (("stage1", "stage3"), "layers 'stage3' does not exist in the teacher"),
        (("stage1", "embedding"), "layers must be maps [B, H, W, C] of both networks, got 'embedding'"),
    ],
)
def test_layers_that_do_not_fit(loss, layers, message):
    with pytest.raises(UsageError) as error:
        loss(layers=layers).init(jax.random.key(0), network(*TALL, TALL[0]), network(*TALL))
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


@EVERY
def test_networks_without_a_stage_in_common(loss):
    flat = Outputs(jnp.zeros((5, 3)), {"embedding": jnp.zeros((5, 5))})
    with pytest.raises(UsageError, match=r"^layers must be maps .* and the networks have no stage in common"):
        loss().init(jax.random.key(0), flat, network(*TALL))


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        (TALL[:1], TALL, "layers must be at least two maps of both networks, which share only stage1 (student: "),
        (WIDE, TALL, "layers must have equal channels in both networks, 'stage1' has 3 in the student and 6 in the teacher"),
    ],
)
def test_networks_that_fsp_cannot_compare(student, teacher, message):
    with pytest.raises(UsageError) as error:
        FlowOfSolution().init(jax.random.key(0), network(*student), network(*teacher))
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"name": "nst", "layers": []}, "loss.layers must be a list of names"),
        ({"name": "vid", "layers": "stage1"}, "loss.layers must be a list of names"),
        ({"name": "fsp", "layers": ["stage1"]}, "loss.layers must be at least two names, got stage1"),
        ({"name": "fsp", "layers": ["stage1", "stage1"]}, "loss.layers must name each layer once, got stage1, stage1"),
        ({"name": "vid", "epsilon": 0.0}, "loss.epsilon must be positive, got 0.0"),
        ({"name": "vid", "initial_variance": 0.0}, "loss.initial_variance must be positive, got 0.0"),
        ({"name": "vid", "epsilon": 1.0, "initial_variance": 1.0}, "loss.initial_variance must be above epsilon=1.0, got 1.0"),
    ],
)
def test_bad_options(config, message):
    with pytest.raises(UsageError) as error:
        build("loss", config)
    assert message in str(error.value) and "\n" not in str(error.value)
