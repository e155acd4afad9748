"""Losses against the published implementations' own numbers, and against the formulas in plain NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdistill.losses import KD, Attention, CrossEntropy, Hint, LogitMSE
from jdistill.losses._layers import adaptive_average_pool
from jdistill.losses.features import _init_regressor, _regress, conv_transpose
from jdistill.types import Outputs
from tests.reference import losses as reference
from tests.reference.inputs import channels_last, golden_inputs

IN = golden_inputs()
FS, FT, FT8 = (channels_last(f) for f in (IN.fs, IN.ft, IN.ft8))

PRECISIONS = pytest.mark.parametrize(("x64", "tolerance"), [(True, 1e-10), (False, 1e-5)], ids=["float64", "float32"])

# name: (loss, value, the implementation that gave it, run on golden_inputs() in float64)
GOLDENS = {
    "kd": (KD(temperature=4.0), 7.361841689437144, "RepDistiller DistillKL; mdistiller, mmrazor (batchmean) agree"),
    "logit_mse": (LogitMSE(), 18.820094429746245, "AberHu Logits"),
    "hint": (Hint(student_layer="f", teacher_layer="f", regressor="none"), 0.7063462760704926, "RepDistiller HintLoss"),
    "attention": (Attention(layers=("f",)), 0.05617255024072267, "RepDistiller Attention; mdistiller, mmrazor agree"),
    "attention_l2": (Attention(layers=("f",), distance="l2"), 0.9411103989744272, "torchdistill AT, mode 'paper'"),
    "attention_pooled": (Attention(layers=("f8",)), 0.03364681913498112, "RepDistiller Attention, 4x4 and 8x8"),
}


def outputs() -> tuple[Outputs, Outputs, dict]:
    """In the precision that is set: float64 under `enable_x64`, else float32."""
    student = Outputs(jnp.asarray(IN.zs), {"f": jnp.asarray(FS), "f8": jnp.asarray(FS)})
    teacher = Outputs(jnp.asarray(IN.zt), {"f": jnp.asarray(FT), "f8": jnp.asarray(FT8)})
    return student, teacher, {"label": jnp.asarray(IN.y, jnp.int32)}


@PRECISIONS
@pytest.mark.parametrize("name", GOLDENS)
def test_published_value(name, x64, tolerance):
    loss, expected, _origin = GOLDENS[name]
    with jax.enable_x64(x64):
        student, teacher, batch = outputs()
        params = loss.init(jax.random.key(0), student, teacher)
        values = jax.jit(loss)(params, student, teacher, batch)
        assert values.shape == (8,) and values.dtype == (jnp.float64 if x64 else jnp.float32)
        np.testing.assert_allclose(values.mean(), expected, rtol=tolerance)


@PRECISIONS
@pytest.mark.parametrize("temperature", [0.5, 1.0, 7.0])
def test_kd_of_each_example(temperature, x64, tolerance):
    with jax.enable_x64(x64):
        student, teacher, batch = outputs()
        values = KD(temperature=temperature)({}, student, teacher, batch)
        np.testing.assert_allclose(values, reference.kd(IN.zs, IN.zt, temperature), rtol=tolerance)


@PRECISIONS
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_of_each_example(smoothing, x64, tolerance):
    with jax.enable_x64(x64):
        student, _, batch = outputs()
        values = CrossEntropy(label_smoothing=smoothing)({}, student, None, batch)
        np.testing.assert_allclose(values, reference.cross_entropy(IN.zs, IN.y, smoothing), rtol=tolerance)


def test_one_logit_is_the_logit_of_yes():
    zs, zt, y = IN.zs[:, :1], IN.zt[:, :1], IN.y % 2
    with jax.enable_x64(True):
        student, teacher, batch = Outputs(jnp.asarray(zs), {}), Outputs(jnp.asarray(zt), {}), {"label": jnp.asarray(y)}
        np.testing.assert_allclose(
            KD(temperature=3.0)({}, student, teacher, batch), reference.bernoulli_kl(zs, zt, 3.0), rtol=1e-10
        )
        for smoothing in (0.0, 0.2):
            np.testing.assert_allclose(
                CrossEntropy(label_smoothing=smoothing)({}, student, None, batch),
                reference.cross_entropy(reference.two_classes(zs), y, smoothing),
                rtol=1e-10,
            )


def test_a_binary_student_learns_from_a_teacher_of_two_classes():
    student, teacher = Outputs(jnp.zeros((4, 1)), {}), Outputs(jnp.array([[0.0, 2.0]] * 4), {})
    same = Outputs(jnp.full((4, 1), 2.0), {})
    assert KD().init(jax.random.key(0), student, teacher) == {}
    np.testing.assert_array_equal(KD()({}, same, teacher, {}), np.zeros(4))
    assert KD()({}, student, teacher, {}).min() > 0


def test_half_sum_is_the_papers_reduction():
    with jax.enable_x64(True):
        student, teacher, batch = outputs()
        values = LogitMSE(reduction="half_sum")({}, student, teacher, batch)
        np.testing.assert_allclose(values, 10 / 2 * reference.logit_mse(IN.zs, IN.zt), rtol=1e-12)


def test_a_label_outside_the_classes_is_not_silent():
    values = CrossEntropy()({}, Outputs(jnp.zeros((2, 3)), {}), None, {"label": jnp.array([1, 3])})
    assert np.isfinite(values[0]) and np.isnan(values[1])


@PRECISIONS
@pytest.mark.parametrize("distance", ["mse", "l2"])
@pytest.mark.parametrize("power", [0.5, 1.0, 2.0, 3.5])
def test_attention_of_each_example_is_the_sum_over_layers(power, distance, x64, tolerance):
    signed = np.random.RandomState(1).randn(2, 8, 5, 7, 3)  # not square, not positive
    coarse = np.random.RandomState(2).randn(8, 3, 4, 6)
    with jax.enable_x64(x64):
        student = Outputs(jnp.zeros((8, 1)), {"stage1": jnp.asarray(signed[0]), "stage2": jnp.asarray(coarse)})
        teacher = Outputs(jnp.zeros((8, 1)), {"stage1": jnp.asarray(signed[1]), "stage2": jnp.asarray(signed[0])})
        values = jax.jit(Attention(power=power, distance=distance))({}, student, teacher, {})
    pairs = ((signed[0], signed[1]), (coarse, signed[0]))
    expected = sum(reference.attention(fs, ft, power, distance) for fs, ft in pairs)
    np.testing.assert_allclose(values, expected, rtol=10 * tolerance)


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (3, 5), (4, 4), (7, 10)])
def test_adaptive_pooling(size):
    maps = np.random.RandomState(0).randn(2, 7, 10, 3)
    with jax.enable_x64(True):
        pooled = adaptive_average_pool(jnp.asarray(maps), *size)
    np.testing.assert_allclose(pooled, reference.adaptive_average_pool(maps, *size), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("student", "teacher", "kernel"),
    [((8, 8), (4, 4), (3, 3)), ((4, 5), (8, 10), (4, 4)), ((7, 8), (5, 5), (3, 4)), ((4, 4), (4, 4), (1, 1))],
    ids=["half", "double", "shrink", "same"],
)
def test_regressor_of_maps(student, teacher, kernel):
    random = np.random.RandomState(0)
    fs, ft = random.randn(3, *student, 5), random.randn(3, *teacher, 6)
    with jax.enable_x64(True):
        params = _init_regressor(jax.random.key(0), jnp.asarray(fs), jnp.asarray(ft))
        params = params | {"scale": jnp.asarray(random.randn(6)), "offset": jnp.asarray(random.randn(6))}
        made = jax.jit(_regress)(params, jnp.asarray(fs), jnp.asarray(ft))
        out = [Outputs(jnp.zeros((3, 1)), {"stage1": jnp.asarray(f)}) for f in (fs, ft)]
        values = jax.jit(Hint())(params, *out, {})
    assert params["kernel"].shape == (*kernel, 5, 6)
    w = np.asarray(params["kernel"])
    if student[0] == 2 * teacher[0]:
        x = reference.convolve(fs, w, stride=2, padding=1)
    elif 2 * student[0] == teacher[0]:
        x = reference.convolve_transposed(fs, w)
    else:
        x = reference.convolve(fs, w, stride=1, padding=0)
    expected = reference.batch_norm_relu(x, np.asarray(params["scale"]), np.asarray(params["offset"]))
    np.testing.assert_allclose(made, expected, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(values, reference.hint(expected, ft), rtol=1e-10)


def test_transposed_convolution_is_the_adjoint_of_the_convolution():
    """torch defines ConvTranspose2d as the gradient of Conv2d: <conv(y), x> = <y, conv_transpose(x)>."""
    random = np.random.RandomState(3)
    x, y, w = random.randn(2, 3, 4, 5), random.randn(2, 6, 8, 7), random.randn(4, 4, 5, 7)
    with jax.enable_x64(True):
        made = np.asarray(conv_transpose(jnp.asarray(x), jnp.asarray(w)))
    there = reference.convolve(y, w.swapaxes(2, 3), stride=2, padding=1)
    np.testing.assert_allclose((made * y).sum(), (there * x).sum(), rtol=1e-10)
    assert made.shape == (2, 6, 8, 7)


@pytest.mark.parametrize("shape", [(8, 20), (8, 3, 20)], ids=["vector", "tokens"])
def test_regressor_of_vectors_is_linear(shape):
    random = np.random.RandomState(0)
    fs, ft = random.randn(*shape), random.randn(*shape[:-1], 12)
    with jax.enable_x64(True):
        params = _init_regressor(jax.random.key(0), jnp.asarray(fs), jnp.asarray(ft))
        made = _regress(params, jnp.asarray(fs), jnp.asarray(ft))
    expected = fs @ np.asarray(params["kernel"]) + np.asarray(params["bias"])
    np.testing.assert_allclose(made, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("student", "teacher", "fan_in"),
    [
        ((8, 8, 16), (4, 4, 32), 9 * 16),
        ((4, 4, 16), (8, 8, 32), 16 * 32),
        ((8, 8, 16), (8, 8, 32), 16),
        ((300,), (200,), 300),
    ],
    ids=["conv", "transposed", "1x1", "linear"],
)
def test_regressor_starts_as_torch_does(student, teacher, fan_in):
    abstract = [jax.ShapeDtypeStruct((2, *shape), jnp.bfloat16) for shape in (student, teacher)]
    params = _init_regressor(jax.random.key(0), *abstract)
    kernel = np.asarray(params["kernel"])
    bound = fan_in**-0.5
    assert kernel.dtype == np.float32 and np.abs(kernel).max() <= bound
    np.testing.assert_allclose([kernel.min(), kernel.max()], [-bound, bound], rtol=0.05)
    np.testing.assert_allclose(kernel.var(), bound**2 / 3, rtol=0.2)
