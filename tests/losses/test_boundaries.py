"""AB and OFD against the published implementations' own numbers, and against the formulas in plain loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jdistill.errors import UsageError
from jdistill.losses.boundaries import ActivationBoundaries, OverhauledFeatures, negative_mean
from jdistill.pytrees import as_leaves
from jdistill.registry import build, options
from jdistill.types import Outputs
from tests.reference import boundaries as reference

PRECISIONS = pytest.mark.parametrize(("x64", "tolerance"), [(True, 1e-10), (False, 2e-5)], ids=["float64", "float32"])
LOSSES = pytest.mark.parametrize("loss", [ActivationBoundaries(), OverhauledFeatures()], ids=["ab", "ofd"])
(FSP,), (FTP,) = reference.golden_signed()

RANDOM = np.random.RandomState(1)
SHAPES = [(5, 6, 8, 3), (5, 3, 2, 4)]  # not square
S = [RANDOM.randn(*shape) for shape in SHAPES]
EQUAL = [RANDOM.randn(*shape) for shape in SHAPES]
OTHER = [RANDOM.randn(5, 5, 4, 6) - 1, RANDOM.randn(5, 7, 6, 2) + 1]  # other channels, larger or smaller


def network(*maps: np.ndarray, **others: np.ndarray) -> Outputs:
    features = {f"stage{i}_pre": jnp.asarray(f) for i, f in enumerate(maps, 1)}
    return Outputs(jnp.zeros((len(maps[0]), 3)), {**features, **{name: jnp.asarray(f) for name, f in others.items()}})


def values_of(loss, student: Outputs, teacher: Outputs, params=None):
    params = loss.init(jax.random.key(0), student, teacher) if params is None else params
    values = jax.jit(loss)(params, student, teacher, {})
    assert values.shape == (len(student.logits),)
    return values


def trained(loss, student: Outputs, teacher: Outputs):
    """Its connectors with other scales and offsets than at the start."""
    random, params = np.random.RandomState(2), loss.init(jax.random.key(0), student, teacher)
    return jax.tree.map(lambda p: p + 0.3 * random.randn(*p.shape), params)


def connected(maps: list[np.ndarray], params) -> list[np.ndarray]:
    layers = [{k: np.asarray(v) for k, v in params[f"stage{i}_pre"].items()} for i in range(1, len(maps) + 1)]
    return [reference.connect(f, **layer) for f, layer in zip(maps, layers, strict=True)]


# name: (reduction, number of layers, factor, value, the implementation that gave it in float64)
GOLDENS = {
    "one layer": ("weighted_sum", 1, 0.003, 0.5509386024040583, "RepDistiller ABLoss; mmrazor agrees"),
    "three layers": ("weighted_sum", 3, 0.003, 0.964142554207102, "RepDistiller ABLoss"),
    "sum": ("sum", 1, 1.0, 183.64620080135276, "torchdistill AltActTransferLoss, mean"),
    "mean": ("mean", 1, 1.0, 1.9129812583474246, "AberHu AB, margin 1"),
}


@PRECISIONS
@pytest.mark.parametrize("name", GOLDENS)
def test_published_value(name, x64, tolerance):
    reduction, layers, factor, expected, _origin = GOLDENS[name]
    with jax.enable_x64(x64):
        values = values_of(ActivationBoundaries(reduction=reduction), network(*[FSP] * layers), network(*[FTP] * layers))
        assert values.dtype == (jnp.float64 if x64 else jnp.float32)
        np.testing.assert_allclose(factor * values.mean(), expected, rtol=tolerance)


def test_default_weights_are_the_published_factors():
    assert options("loss")["ab"].fields["weight"][1] == 3 / 1000
    assert options("loss")["ofd"].fields["weight"][1] == 1 / 1000


@pytest.mark.parametrize("reduction", ["weighted_sum", "sum", "mean"])
def test_ab_of_each_example_is_the_sum_over_layers(reduction):
    loss = ActivationBoundaries(margin=0.7, reduction=reduction)
    with jax.enable_x64(True):
        student = network(*S)
        assert loss.init(jax.random.key(0), student, network(*EQUAL)) == {}
        values = values_of(loss, student, network(*EQUAL))
        teacher = network(*OTHER)
        params = trained(loss, student, teacher)
        through = values_of(loss, student, teacher, params)
    np.testing.assert_allclose(values, reference.ab(S, EQUAL, 0.7, reduction), rtol=1e-10)
    np.testing.assert_allclose(through, reference.ab(connected(S, params), OTHER, 0.7, reduction), rtol=1e-10)


@pytest.mark.parametrize("maps", [EQUAL, OTHER], ids=["equal", "other"])
def test_ofd_of_each_example_is_the_sum_over_layers(maps):
    loss = OverhauledFeatures()
    with jax.enable_x64(True):
        student, teacher = network(*S), network(*maps)
        params = trained(loss, student, teacher)
        values = values_of(loss, student, teacher, params)
    np.testing.assert_allclose(values, reference.ofd(connected(S, params), maps), rtol=1e-10)


def test_margin_is_the_published_formula_on_both_sides_of_its_threshold():
    shift = np.array([-20.0, -1.0, 0.0, 2.0, 3.0, 3.2, 20.0])  # P(x < 0) = 0.001 at 3.09
    draws = RANDOM.randn(4, 5, 6, 7)
    draws = (draws - draws.mean((0, 1, 2))) / draws.std((0, 1, 2)) + shift
    with jax.enable_x64(True):
        margins = np.asarray(negative_mean(jnp.asarray(draws)))
    np.testing.assert_allclose(margins, reference.margins(draws), rtol=1e-9)
    np.testing.assert_allclose(margins[[0, 5, 6]], [-20, -3, -3], rtol=1e-9)


def test_margin_is_near_the_mean_of_the_negative_part_of_normal_draws():
    draws = 2 * np.random.RandomState(3).randn(100, 20, 20, 1) + 1
    np.testing.assert_allclose(negative_mean(jnp.asarray(draws, jnp.float32)), [draws[draws < 0].mean()], rtol=0.02)


@pytest.mark.parametrize("scale", [1.0, 1e-20, 1e4])
def test_margin_of_constant_channels(scale):
    constants = np.array([-2.0, 0.0, 0.1], np.float32) * np.float32(scale)
    margins = negative_mean(jnp.broadcast_to(constants, (3, 4, 4, 3)))
    np.testing.assert_allclose(margins, np.minimum(constants, 0), rtol=1e-5, atol=1e-6 * scale)


def test_layers_by_default_are_the_common_stages_before_the_activation_in_order():
    rest = {"stage10_pre": S[1], "stage2": S[0], "hidden1_pre": S[0], "stage7_pre": S[0]}
    student = network(*S, **rest)
    del rest["stage7_pre"]
    teacher = network(*EQUAL, **{**rest, "stage10_pre": EQUAL[1], "stage2": EQUAL[0]})
    expected = ActivationBoundaries(layers=("stage1_pre", "stage2_pre", "stage10_pre"))
    values = values_of(ActivationBoundaries(), student, teacher)
    np.testing.assert_array_equal(values, values_of(expected, student, teacher))
    turned = ActivationBoundaries(layers=("stage10_pre", "stage2_pre", "stage1_pre"))
    assert abs(values_of(turned, student, teacher) - values).max() > 1e-3


def test_connector_starts_as_the_authors_draw_it():
    student = Outputs(None, {"stage1_pre": jax.ShapeDtypeStruct((2, 4, 4, 300), jnp.bfloat16)})
    teacher = Outputs(None, {"stage1_pre": jax.ShapeDtypeStruct((2, 4, 4, 200), jnp.bfloat16)})
    for loss in (ActivationBoundaries(), OverhauledFeatures()):
        params = loss.init(jax.random.key(0), student, teacher)["stage1_pre"]
        assert params["kernel"].shape == (300, 200) and params["kernel"].dtype == np.float32
        np.testing.assert_allclose(params["kernel"].std(), (2 / 200) ** 0.5, rtol=0.02)
        assert np.all(params["scale"] == 1) and np.all(params["offset"] == 0)


@LOSSES
def test_gradients_by_finite_differences(loss):
    with jax.enable_x64(True):
        student, teacher = network(*S), network(*OTHER)
        params = trained(loss, student, teacher)

        @jax.jit
        def total(params, maps):
            return loss(params, network(*maps), teacher, {}).sum()

        check_grads(total, (params, [jnp.asarray(f) for f in S]), order=1, modes=["rev"], atol=1e-5, rtol=1e-5, eps=1e-6)
        assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(jax.grad(total)(params, S)))
        towards = jax.jit(jax.grad(lambda maps: loss(params, student, network(*maps), {}).sum()))
        of_teacher = towards([jnp.asarray(f) for f in OTHER])
        assert all(np.all(np.asarray(g) == 0) for g in of_teacher)


@LOSSES
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("channels", [3, 5])
def test_finite_at_extreme_maps(loss, dtype, channels):
    random = np.random.RandomState(5)
    signs = [jnp.asarray(np.sign(random.randn(4, 4, 4, c)), dtype) for c in (3, channels)]
    dead = jnp.asarray(random.randn(4, 4, 4, 3) * [1, 0, 0], dtype)
    params = loss.init(jax.random.key(0), network(signs[0]), network(signs[1]))

    @jax.jit
    def evaluate(params, f_s, f_t):
        return jax.value_and_grad(lambda p, f: loss(p, network(f), network(f_t), {}).mean(), argnums=(0, 1))(params, f_s)

    students = (1e4 * signs[0], -1e4 * signs[0], 0 * signs[0], dead)
    teachers = (1e4 * signs[1], 0 * signs[1], *((dead, 1e4 * signs[0]) if channels == 3 else ()))
    for f_s in students:
        for f_t in teachers:
            value, grads = evaluate(params, f_s, f_t)
            assert value.dtype == jnp.float32 and np.isfinite(value)
            assert all(np.all(np.isfinite(np.asarray(g, np.float32))) for g in jax.tree.leaves(grads))


def test_ab_is_zero_only_beyond_the_margin_and_ofd_where_the_student_is_below_a_negative_target():
    far = network(3 * np.sign(FTP))
    assert np.all(np.asarray(ActivationBoundaries()({}, far, network(FTP), {})) == 0)
    assert np.all(np.asarray(ActivationBoundaries()({}, network(FTP), network(FTP), {})) > 0)
    params = {"stage1_pre": {"kernel": jnp.eye(6), "scale": jnp.zeros(6), "offset": jnp.full(6, -50.0)}}
    silent = network(-np.abs(FTP))
    assert np.all(np.asarray(OverhauledFeatures()(params, silent, silent, {})) == 0)


@pytest.mark.slow
def test_vmap_over_the_margin_is_the_loop_and_no_number_retraces():
    student, teacher, traces = network(*S), network(*OTHER), []
    members = [as_leaves(ActivationBoundaries(margin=m)) for m in (0.0, 0.5, 2.0)]
    params = members[0].init(jax.random.key(0), student, teacher)

    @jax.jit
    def value(loss):
        traces.append(loss)
        return loss(params, student, teacher, {})

    loop = np.stack([value(loss) for loss in members])
    assert len(traces) == 1 and np.abs(np.diff(loop, axis=0)).max() > 0.1
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)
    together = jax.vmap(lambda loss: loss(params, student, teacher, {}))(stacked)
    np.testing.assert_allclose(together, loop, rtol=1e-5)
    eager = [loss(params, student, teacher, {}) for loss in members]
    np.testing.assert_allclose(np.stack(eager), loop, rtol=1e-5)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"name": "ab", "margin": -1.0}, "loss.margin must be at least 0, got -1.0"),
        ({"name": "ab", "reduction": "summ"}, "loss.reduction must be one of weighted_sum, sum, mean, got 'summ'"),
        ({"name": "ab", "layers": "stage1_pre"}, "loss.layers must be a list of names"),
        ({"name": "ofd", "layers": ["stage1_pre", "stage1_pre"]}, "loss.layers must name each layer once"),
    ],
)
def test_bad_options(config, message):
    with pytest.raises(UsageError) as error:
        build("loss", config)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


@LOSSES
def test_layers_that_do_not_fit(loss):
    flat = Outputs(jnp.zeros((4, 3)), {"hidden1_pre": jnp.zeros((4, 5)), "embedding": jnp.zeros((4, 5))})
    for chosen, student, message in (
        (loss, flat, "layers must name maps before their activation, and the networks have no stage1_pre"),
        (type(loss)(layers=("stage3_pre",)), network(*S), "layers 'stage3_pre' does not exist in the student; did you mean"),
        (type(loss)(layers=("hidden1_pre",)), flat, "layers must be maps [B, H, W, C] of both networks, got 'hidden1_pre'"),
    ):
        with pytest.raises(UsageError) as error:
            chosen.init(jax.random.key(0), student, flat if chosen.layers == ("hidden1_pre",) else network(*S))
        assert str(error.value).startswith(message) and "\n" not in str(error.value)
    with pytest.raises(UsageError, match="needs a teacher"):
        loss.init(jax.random.key(0), network(*S), None)
