"""The loss on singular vectors against RepDistiller's own numbers, NumPy's decomposition, and where derivatives fail."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jdistill.errors import UsageError
from jdistill.losses.spectra import SingularVectors
from jdistill.registry import build
from jdistill.types import Outputs
from tests.reference import spectra as reference

STUDENT, TEACHER = reference.golden_maps()


def network(maps, dtype=None) -> Outputs:
    return Outputs(jnp.zeros((len(maps[0]), 3)), {f"stage{i}": jnp.asarray(f, dtype) for i, f in enumerate(maps, 1)})


@jax.jit
def call(loss, student, teacher):
    return loss({}, student, teacher, {})


@jax.jit
def value_and_gradient(loss, student, teacher):
    return jax.value_and_grad(lambda student: loss({}, student, teacher, {}).mean())(student)


def draw(seed: int, *shapes: tuple[int, ...]) -> list[np.ndarray]:
    random = np.random.RandomState(seed)
    return [np.abs(random.randn(*shape)) for shape in shapes]


# RepDistiller `KDSVD(k)` in float64 (torch 2.13) on `golden_maps`: the sum of its values, and of each layer's |gradient|.
# For k = 2 its `v_t` was first given the sign that makes the largest entry positive; for k = 1 that changed nothing.
GOLDENS = {
    1: (0.010832083993706379, [0.04229622667092202, 0.09129229468700627, 0.054674048452951964]),
    2: (0.021524334417754712, [0.06914076670036295, 0.1158487787223954, 0.08499266284717737]),
}


@pytest.mark.parametrize(
    ("k", "x64", "tolerance"), [pytest.param(1, True, 1e-10, marks=pytest.mark.slow), (2, True, 1e-10), (2, False, 1e-4)]
)
def test_repdistillers_value_and_gradient(k, x64, tolerance):
    with jax.enable_x64(x64):
        student, teacher = network(STUDENT), network(TEACHER)
        value, gradient = value_and_gradient(SingularVectors(vectors=k), student, teacher)
        assert value.dtype == (jnp.float64 if x64 else jnp.float32)
        np.testing.assert_allclose(value, GOLDENS[k][0], rtol=tolerance)
        sizes = [jnp.abs(f).sum() for f in gradient.features.values()]
        np.testing.assert_allclose(sizes, GOLDENS[k][1], rtol=tolerance)


@pytest.mark.parametrize(
    ("shapes_s", "shapes_t", "options"),
    [
        ([(3, 4, 5, 2), (3, 2, 2, 6)], [(3, 6, 3, 2), (3, 3, 3, 6)], {}),
        ([(3, 4, 4, 5), (3, 3, 3, 5)], [(3, 4, 4, 5), (3, 3, 3, 5)], {"extra_vectors": 0, "bandwidth": 2.0}),
        ([(3, 4, 4, 5), (3, 3, 3, 6)], [(3, 4, 4, 5), (3, 3, 3, 6)], {"extra_vectors": 1, "vectors": 3}),
        ([(3, 1, 1, 4), (3, 2, 2, 3)], [(3, 2, 2, 4), (3, 2, 1, 3)], {"vectors": 1}),
    ],
    ids=["few positions", "leading only", "three", "one position"],
)
def test_values_are_numpys(shapes_s, shapes_t, options):
    student, teacher = draw(1, *shapes_s), draw(2, *shapes_t)
    names = {"vectors": "k", "extra_vectors": "extra", "bandwidth": "bandwidth"}
    expected = reference.singular_vectors(student, teacher, **{names[key]: value for key, value in options.items()})
    with jax.enable_x64(True):
        values = call(SingularVectors(**options), network(student), network(teacher))
    assert expected.min() > 1e-6
    np.testing.assert_allclose(values, expected, rtol=1e-10)


def test_more_vectors_than_a_map_has():
    student, teacher = draw(3, (2, 4, 4, 3), (2, 3, 3, 3)), draw(4, (2, 4, 4, 3), (2, 3, 3, 3))
    with jax.enable_x64(True):
        few, many = (call(SingularVectors(vectors=k), network(student), network(teacher)) for k in (3, 9))
    np.testing.assert_array_equal(few, many)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shapes", "loss"),
    [
        ([(2, 3, 3, 4), (2, 2, 2, 6)], SingularVectors()),
        ([(2, 4, 4, 3), (2, 3, 3, 5)], SingularVectors(vectors=2, extra_vectors=1)),
    ],
    ids=["wide", "tall"],
)
def test_gradient_by_finite_differences(shapes, loss):
    with jax.enable_x64(True):
        student, teacher = network(draw(5, *shapes)), network(draw(6, *shapes))
        total = jax.jit(lambda student: loss({}, student, teacher, {}).sum())
        check_grads(total, (student,), order=1, modes=["rev"], atol=1e-6, rtol=1e-6, eps=1e-5)


def test_neither_sign_nor_scale_nor_the_order_of_positions_matters():
    loss = SingularVectors(vectors=2, layers=("stage1", "stage2"))
    with jax.enable_x64(True):
        student, teacher, expected = (network(STUDENT), network(TEACHER), call(loss, network(STUDENT), network(TEACHER)))
        for scales in ((-1, 1e-3, 1), (1e3, -1, 1)):
            turned = [network([a * f[:, ::-1] for a, f in zip(scales, of, strict=True)]) for of in (STUDENT, TEACHER)]
            np.testing.assert_allclose(call(loss, turned[0], teacher), expected, rtol=1e-9)
            np.testing.assert_allclose(call(loss, student, turned[1]), expected, rtol=1e-9)


RANDOM = np.random.RandomState(7)
ORTHOGONAL = np.linalg.qr(RANDOM.randn(9, 9))[0].reshape(1, 3, 3, 9)
GENERIC = [RANDOM.randn(4, 3, 3, 9), RANDOM.randn(4, 2, 2, 5)]
DEGENERATE = {
    "zeros": [np.zeros((4, 3, 3, 9)), np.zeros((4, 2, 2, 5))],
    "one zero": [np.zeros((4, 3, 3, 9)), GENERIC[1]],
    "equal singular values": [np.repeat(ORTHOGONAL, 4, axis=0), GENERIC[1]],
    "nearly equal": [np.repeat(ORTHOGONAL, 4, axis=0) + 1e-6 * GENERIC[0], GENERIC[1]],
    "rank one": [np.ones((4, 3, 3, 9)), np.ones((4, 2, 2, 5))],
    "dead channels": [GENERIC[0] * (np.arange(9) < 2), GENERIC[1] * (np.arange(5) > 3)],
    "tiny": [1e-18 * f for f in GENERIC],
    "large": [1e4 * np.sign(f) for f in GENERIC],
}


@pytest.mark.parametrize("case", DEGENERATE)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_degenerate_maps_have_finite_and_modest_gradients(case, dtype):
    student, generic = network(DEGENERATE[case], dtype), network(GENERIC, dtype)
    for s, t in ((student, generic), (student, student), (generic, student)):
        value, gradient = value_and_gradient(SingularVectors(vectors=2), s, t)
        assert value.dtype == jnp.float32 and np.isfinite(value) and value >= 0
        for leaf in gradient.features.values():
            assert leaf.dtype == dtype
            assert np.all(np.isfinite(leaf.astype(jnp.float32))) and np.abs(leaf).max() < 1e3


def test_a_map_of_zeros_has_no_gradient_and_a_zero_vector():
    student, teacher = network(DEGENERATE["one zero"]), network(GENERIC)
    gradient = value_and_gradient(SingularVectors(vectors=2), student, teacher)[1]
    assert np.all(gradient.features["stage1"] == 0) and np.any(gradient.features["stage2"] != 0)
    both = call(SingularVectors(), student, student)
    np.testing.assert_array_equal(both, 0)


def test_floor_of_the_derivative_is_far_from_ordinary_maps():
    """A nearly double leading singular value: exact derivatives grow without bound, these stop growing."""
    u, v = ORTHOGONAL[0].reshape(9, 9), np.linalg.qr(RANDOM.randn(9, 9))[0]
    sizes = []
    with jax.enable_x64(True):
        for gap in (1e-1, 1e-6, 1e-9):
            x = np.repeat(((u * (np.arange(9) < 2) * (1 + gap * (np.arange(9) == 0))) @ v).reshape(1, 3, 3, 9), 4, axis=0)
            gradient = value_and_gradient(SingularVectors(), network([x, GENERIC[1]]), network(GENERIC))[1]
            sizes.append(float(jnp.abs(gradient.features["stage1"]).max()))
    assert sizes[0] > 0 and sizes[1] < 1e3 and sizes[2] < 2 * sizes[1] + 1


def test_default_layers_are_the_common_stages():
    student, teacher = network(STUDENT), network(TEACHER)
    fewer = teacher._replace(features={k: v for k, v in teacher.features.items() if k != "stage3"})
    expected = call(SingularVectors(layers=("stage1", "stage2")), student, teacher)
    np.testing.assert_array_equal(call(SingularVectors(), student, fewer), expected)


@pytest.mark.parametrize(
    ("loss", "student", "message"),
    [
        (SingularVectors(), network(STUDENT[:1]), "layers must be at least two maps of both networks, which share only stage1"),
        (SingularVectors(), network([STUDENT[1], *STUDENT[1:]]), "'stage1' has 6 in the student and 4 in the teacher"),
        (SingularVectors(layers=("stage1", "stage5")), network(STUDENT), "layers 'stage5' does not exist in the student"),
        (SingularVectors(), None, "this loss needs a teacher"),
    ],
)
def test_layers_that_do_not_fit(loss, student, message):
    teacher = None if student is None else network(TEACHER)
    with pytest.raises(UsageError) as error:
        loss.init(jax.random.key(0), student or network(STUDENT), teacher)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"bandwidth": 0.0}, "loss.bandwidth must be positive, got 0.0"),
        ({"vectors": 0}, "loss.vectors must be positive, got 0"),
        ({"extra_vectors": -1}, "loss.extra_vectors must be at least 0, got -1"),
        ({"layers": ["stage1"]}, "loss.layers must be at least two names, got stage1"),
        ({"layers": ["stage1", "stage1"]}, "loss.layers must name each layer once"),
    ],
)
def test_bad_options(config, message):
    with pytest.raises(UsageError) as error:
        build("loss", {"name": "kdsvd", **config})
    assert message in str(error.value) and "\n" not in str(error.value)
