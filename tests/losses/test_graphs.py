"""The instance relationship graph against public implementations' own numbers, and against its formulas in loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jdistill.errors import UsageError
from jdistill.losses.graphs import InstanceRelationshipGraph
from jdistill.registry import build
from jdistill.types import Outputs
from tests.reference import graphs as reference

STUDENT, TEACHER = reference.golden_networks()
PARTS = ("vertex_weight", "edge_weight", "transformation_weight", "edge_transformation_weight")


def only(part: str, **options) -> InstanceRelationshipGraph:
    """The loss with one part alone, of weight 1."""
    return InstanceRelationshipGraph(**{name: float(name == part) for name in PARTS}, **options)


def network(arrays: dict[str, np.ndarray], dtype=None) -> Outputs:
    features = {name: jnp.asarray(array, dtype) for name, array in arrays.items()}
    return Outputs(features.pop("logits"), features)


@jax.jit
def call(loss, student, teacher):
    return loss({}, student, teacher, {})


@jax.jit
def value_and_gradient(loss, student, teacher):
    return jax.value_and_grad(lambda student: loss({}, student, teacher, {}).mean())(student)


# name: (loss, value in float64 (torch 2.13) on `golden_networks`, the implementation that gave it)
GOLDENS = {
    "all": (InstanceRelationshipGraph(), 2.17930921354465, "AberHu IRG(0.1, 5, 5) of rb2, rb3, feat, out"),
    "vertex": (only("vertex_weight"), 18.234960374529816, "AberHu IRG(1, 0, 0)"),
    "edge": (only("edge_weight"), 0.028051218387501926, "AberHu IRG(0, 1, 0)"),
    "transformation": (only("transformation_weight"), 0.04311141683083178, "AberHu IRG(0, 0, 1)"),
    "edge_transformation": (only("edge_transformation_weight"), 2.7256591568179172e-05, "IRGLoss.transform_loss's edges"),
}  # fmt: skip


@pytest.mark.parametrize("name", GOLDENS)
@pytest.mark.parametrize(("x64", "tolerance"), [(True, 1e-10), (False, 1e-4)], ids=["float64", "float32"])
def test_published_value(name, x64, tolerance):
    loss, expected, _origin = GOLDENS[name]
    with jax.enable_x64(x64):
        values = call(loss, network(STUDENT), network(TEACHER))
        assert values.shape == (6,) and values.dtype == (jnp.float64 if x64 else jnp.float32)
        np.testing.assert_allclose(values.mean(), expected, rtol=tolerance)


def test_gradient_is_aberhus():
    """Sums of |gradient| by torch's autograd, which differentiates the largest distance too."""
    expected = {"stage2": 4.317453367773504, "stage3": 4.474263161906473, "embedding": 0.3231055001218546}
    with jax.enable_x64(True):
        _, gradient = value_and_gradient(InstanceRelationshipGraph(), network(STUDENT), network(TEACHER))
        for name, size in expected.items():
            np.testing.assert_allclose(jnp.abs(gradient.features[name]).sum(), size, rtol=1e-10)
        np.testing.assert_allclose(jnp.abs(gradient.logits).sum(), 0.7258653119611307, rtol=1e-10)


def draw(seed: int, **shapes: tuple[int, ...]) -> dict[str, np.ndarray]:
    random = np.random.RandomState(seed)
    return {name: random.randn(5, *shape) for name, shape in {"logits": (3,), **shapes}.items()}


MLPS = draw(0, hidden1=(7,), hidden2=(4,), hidden3=(6,), embedding=(6,)), draw(1, hidden2=(9,), hidden3=(5,), embedding=(5,))
NETS = (
    draw(2, stage1=(5, 3, 2), stage2=(3, 4, 5), stage3=(2, 2, 3), embedding=(3,)),
    draw(3, stage1=(4, 4, 3), stage2=(4, 4, 3), stage3=(1, 1, 8), embedding=(8,)),
)
CASES = {
    "mlp": (MLPS, None, ("hidden2", "hidden3"), True),
    "maps": (NETS, None, ("stage2", "stage3"), True),
    "three": (NETS, ("stage1", "stage2", "stage3"), ("stage1", "stage2", "stage3"), True),
    "to the embedding": (NETS, ("stage2", "embedding"), ("stage2", "embedding"), False),
    "one stage": (
        tuple({k: n[k] for k in ("stage1", "embedding", "logits")} for n in NETS), None, ("stage1", "embedding"), False
    ),
    "no embedding": (tuple({k: n[k] for k in n if k != "embedding"} for n in NETS), None, ("stage2", "stage3"), False),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_parts_are_the_formulas(case):
    (student, teacher), layers, names, with_embedding = CASES[case]
    chain = [[of[name] for name in names] for of in (student, teacher)]
    layered = [[*c, of["embedding"]] if with_embedding else c for c, of in zip(chain, (student, teacher), strict=True)]
    parts = (
        reference.vertex(student["logits"], teacher["logits"]),
        reference.edge(*layered),
        reference.transformation(*chain),
        reference.edge_transformation(*chain),
    )
    with jax.enable_x64(True):
        for name, expected in zip(PARTS, parts, strict=True):
            values = call(only(name, layers=layers), network(student), network(teacher))
            np.testing.assert_allclose(values, np.broadcast_to(expected, 5), rtol=1e-10, err_msg=name)
        together = InstanceRelationshipGraph(**dict(zip(PARTS, (1.0, 2.0, 3.0, 4.0), strict=True)), layers=layers)
        expected = sum(weight * part for weight, part in zip((1, 2, 3, 4), parts, strict=True))
        np.testing.assert_allclose(call(together, network(student), network(teacher)), expected, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("networks", [MLPS, NETS], ids=["mlp", "maps"])
def test_gradient_by_finite_differences(networks):
    loss = InstanceRelationshipGraph(edge_transformation_weight=7.0)
    with jax.enable_x64(True):
        student, teacher = map(network, networks)
        total = jax.jit(lambda student: call(loss, student, teacher).sum())
        check_grads(total, (student,), order=1, modes=["rev"], atol=1e-6, rtol=1e-6, eps=1e-5)


def test_graphs_see_neither_origin_nor_scale():
    """A common offset of 1000 leaves float32 too few digits for distances from sums of squares, were it not taken off."""
    student, teacher = NETS
    moved = {name: array if name == "logits" else 1000 + 3 * array for name, array in student.items()}
    expected = call(only("edge_weight"), network(student), network(teacher))
    np.testing.assert_allclose(call(only("edge_weight"), network(moved), network(teacher)), expected, rtol=1e-3)
    grown = {name: 3e3 * array for name, array in student.items()}
    for part in PARTS[1:]:
        expected = call(only(part), network(student), network(teacher))
        np.testing.assert_allclose(call(only(part), network(grown), network(teacher)), expected, rtol=1e-4)


def test_the_teacher_itself_and_one_example():
    loss = InstanceRelationshipGraph(edge_transformation_weight=1.0)
    np.testing.assert_allclose(call(loss, network(TEACHER), network(TEACHER)), 0, atol=1e-12)
    first = [{name: array[:1] for name, array in of.items()} for of in (STUDENT, TEACHER)]
    (value, gradient), expected = (
        value_and_gradient(loss, *map(network, first)),
        reference.vertex(*(f["logits"] for f in first)),
    )
    np.testing.assert_allclose(value, 0.1 * expected[0], rtol=1e-5)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradient))


RANDOM = np.random.RandomState(9)
ROWS = RANDOM.randn(4, 5)
DEGENERATE = {
    "zeros": np.zeros((4, 5)),
    "equal": np.tile(RANDOM.randn(5), (4, 1)),
    "equal but for rounding": np.tile(RANDOM.randn(5), (4, 1)) * (1 + 1e-7 * RANDOM.randn(4, 5)),
    "twins": ROWS[[0, 0, 1, 1]],
    "tiny": 1e-18 * ROWS,
    "large": 1e4 * np.sign(ROWS),
    "very large": 1e15 * ROWS,
}


@pytest.mark.parametrize("case", DEGENERATE)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_degenerate_features_have_finite_and_modest_gradients(case, dtype):
    """`hidden2` and `embedding` are one array, as an MLP's are, so nothing moves between them."""
    loss = InstanceRelationshipGraph(edge_transformation_weight=1.0, layers=("hidden1", "hidden2", "embedding"))
    logits = RANDOM.randn(4, 3)
    bad, good = (
        network({"hidden1": 0.5 * f, "hidden2": f, "embedding": f, "logits": logits}, dtype) for f in (DEGENERATE[case], ROWS)
    )
    for student, teacher in ((bad, good), (good, bad), (bad, bad)):
        value, gradient = value_and_gradient(loss, student, teacher)
        assert value.dtype == jnp.float32 and np.isfinite(value) and value >= 0
        for leaf in jax.tree.leaves(gradient):
            assert leaf.dtype == dtype
            assert np.all(np.isfinite(leaf.astype(jnp.float32))) and np.abs(leaf).max() < 1e3


def test_default_layers_do_not_change_with_what_a_cached_teacher_holds():
    student, teacher = map(network, NETS)
    read = ("stage2", "stage3", "embedding")
    reduced = teacher._replace(features={name: teacher.features[name] for name in read})
    loss = InstanceRelationshipGraph()
    np.testing.assert_array_equal(call(loss, student, reduced), call(loss, student, teacher))


@pytest.mark.parametrize(
    ("loss", "student", "message"),
    [
        (InstanceRelationshipGraph(layers=("stage2", "stage9")), STUDENT, "layers 'stage9' does not exist in the student"),
        (InstanceRelationshipGraph(), MLPS[0] | {"logits": STUDENT["logits"]}, "layers must be at least two features of both"),
        (InstanceRelationshipGraph(), STUDENT | {"logits": ROWS}, "as many logits as each other, got 5 and 10"),
        (InstanceRelationshipGraph(), None, "this loss needs a teacher"),
    ],
)
def test_networks_that_do_not_fit(loss, student, message):
    teacher = None if student is None else network(TEACHER)
    with pytest.raises(UsageError) as error:
        loss.init(jax.random.key(0), network(student or STUDENT), teacher)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        *(({part: -1.0}, f"loss.{part} must be at least 0, got -1.0") for part in PARTS),
        ({"layers": ["stage1"]}, "loss.layers must be at least two names, got stage1"),
        ({"layers": "stage1"}, "loss.layers must be a list of names"),
    ],
)
def test_bad_options(config, message):
    with pytest.raises(UsageError) as error:
        build("loss", {"name": "irg", **config})
    assert message in str(error.value) and "\n" not in str(error.value)
