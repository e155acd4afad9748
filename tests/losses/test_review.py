"""Knowledge review against the published implementations' own numbers, and against its formulas in plain loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jdistill.errors import UsageError
from jdistill.losses.review import KnowledgeReview, _nearest, hierarchical_context
from jdistill.registry import build, options
from jdistill.types import Outputs
from tests.reference import review as reference
from tests.reference.inputs import channels_last, golden_inputs

IN = golden_inputs()
FS, FT, FT8 = (channels_last(f) for f in (IN.fs, IN.ft, IN.ft8))

RANDOM = np.random.RandomState(0)
S = {"stage1": (6, 8, 3), "stage2": (3, 4, 4), "embedding": (5,)}  # not square, and the teacher's of other sizes
T = {"stage1_pre": (9, 5, 2), "stage1": (9, 5, 2), "stage2": (2, 4, 6), "embedding": (7,)}


def network(shapes: dict[str, tuple], seed: int, batch: int = 3) -> dict[str, np.ndarray]:
    random = np.random.RandomState(seed)
    return {name: random.randn(batch, *shape) for name, shape in shapes.items()}


def outputs(features: dict[str, np.ndarray], dtype=None) -> Outputs:
    arrays = {name: jnp.asarray(f, dtype) for name, f in features.items()}
    return Outputs(jnp.zeros((len(next(iter(arrays.values()))), 3), dtype), arrays)


def start(loss, student: Outputs, teacher: Outputs):
    return loss.init(jax.random.key(0), *jax.eval_shape(lambda: (student, teacher)))


@jax.jit
def call(loss, params, student, teacher):
    return loss(params, student, teacher, {})


@pytest.mark.parametrize(("x64", "tolerance"), [(True, 1e-10), (False, 2e-5)], ids=["float64", "float32"])
@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        (FS, FT, 0.4664715669847128),  # mdistiller hcl_loss; torchdistill agrees
        (reference.golden_student_of_size_8(), FT8, 0.9648533515460932),  # mdistiller hcl_loss
    ],
    ids=["4x4", "8x8"],
)
def test_published_value_of_the_hierarchical_context(student, teacher, expected, x64, tolerance):
    with jax.enable_x64(x64):
        values = jax.jit(hierarchical_context)(jnp.asarray(student), jnp.asarray(teacher))
        assert values.dtype == (jnp.float64 if x64 else jnp.float32) and values.shape == (8,)
        np.testing.assert_allclose(values.mean(), expected, rtol=tolerance)


@pytest.mark.parametrize("shape", [(1, 1, 3), (2, 3, 3), (5, 4, 2), (7, 9, 2)])
def test_hierarchical_context_of_each_example(shape):
    s, t = RANDOM.randn(2, 4, *shape)
    with jax.enable_x64(True):
        np.testing.assert_allclose(
            hierarchical_context(jnp.asarray(s), jnp.asarray(t)), reference.hierarchical_context(s, t), rtol=1e-10
        )


@pytest.mark.parametrize("size", [(1, 1), (2, 5), (3, 4), (6, 8), (7, 3)])
def test_nearest_is_torchs(size):
    maps = RANDOM.randn(2, 3, 4, 2)
    with jax.enable_x64(True):
        np.testing.assert_array_equal(_nearest(jnp.asarray(maps), *size), reference.nearest(maps, *size))


def trained(params):
    """Parameters away from their initial ones and zeros."""
    random = np.random.RandomState(5)
    return jax.tree.map(lambda p: jnp.asarray(p + 0.3 * random.randn(*p.shape), p.dtype), params)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layers", "teachers"),
    [
        (None, ("stage1_pre", "stage2", "embedding")),
        (("stage1", "stage2"), ("stage1_pre", "stage2")),
        (("embedding", "stage1"), ("embedding", "stage1_pre")),
        (("stage2",), ("stage2",)),
    ],
)
def test_each_example_is_the_sum_over_layers(layers, teachers):
    loss, s, t = KnowledgeReview(layers=layers, max_channels=4), network(S, 1), network(T, 2)
    names = layers or ("stage1", "stage2", "embedding")
    with jax.enable_x64(True):
        student, teacher = outputs(s), outputs(t)
        params = trained(start(loss, student, teacher))
        values = call(loss, params, student, teacher)
        if layers == ("stage1", "stage2"):
            np.testing.assert_allclose(loss(params, student, teacher, {}), values, rtol=1e-12)
        numbers = jax.tree.map(np.asarray, params)
    expected = reference.review([s[n] for n in names], [t[n] for n in teachers], [numbers[n] for n in names])
    assert set(params) == set(names) and values.shape == (3,)
    np.testing.assert_allclose(values, expected, rtol=1e-10)


@pytest.mark.slow
def test_gradients_by_finite_differences():
    loss = KnowledgeReview(max_channels=3)
    with jax.enable_x64(True):
        student, teacher = outputs(network(S, 1)), outputs(network(T, 2))
        params = trained(start(loss, student, teacher))
        total = jax.jit(lambda params, features: call(loss, params, student._replace(features=features), teacher).sum())
        check_grads(total, (params, student.features), order=1, modes=["rev"], atol=1e-5, rtol=1e-5, eps=1e-5)
        grads = jax.grad(total, argnums=(0, 1))(params, student.features)
        assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads)), "something is not trained"


def test_starts_as_the_authors_code_does():
    wide = {"stage2": S["stage2"], "embedding": (700,)}
    shapes = jax.eval_shape(lambda: (outputs(network(wide, 0), jnp.bfloat16), outputs(network(T, 0))))
    params = KnowledgeReview().init(jax.random.key(0), *shapes)
    assert "attention" not in params["embedding"]
    for name, c_s, c_t in (("stage2", 4, 6), ("embedding", 700, 7)):
        for part, kernel in (("inner", (1, 1, c_s, 512)), ("outer", (3, 3, 512, c_t))):
            own, bound = params[name][part], (3 / np.prod(kernel[:3])) ** 0.5
            assert own["kernel"].shape == kernel and own["kernel"].dtype == jnp.float32
            np.testing.assert_allclose([own["kernel"].min(), own["kernel"].max()], [-bound, bound], rtol=0.05)
            assert np.all(own["scale"] == 1) and np.all(own["offset"] == 0)
    attention = params["stage2"]["attention"]
    assert attention["kernel"].shape == (1024, 2) and attention["bias"].shape == (2,)
    np.testing.assert_allclose(np.abs(attention["kernel"]).max(), 1024**-0.5, rtol=0.05)
    assert np.abs(attention["bias"]).max() <= 1024**-0.5
    narrow = jax.eval_shape(lambda: KnowledgeReview(layers=("stage2",)).init(jax.random.key(0), *shapes))
    assert narrow["stage2"]["inner"]["kernel"].shape == (1, 1, 4, 4), "M is at most the last layer's channels"


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_finite_at_extreme_and_dead_features(dtype):
    loss, shapes = KnowledgeReview(), {k: v for k, v in S.items() if k != "stage2"}
    large = {name: np.sign(f) * 1e4 for name, f in network(shapes, 3).items()}
    zeros = {name: 0 * f for name, f in large.items()}
    opposite = {name: -f for name, f in large.items()}
    params = start(loss, outputs(large, dtype), outputs(large, dtype))

    @jax.jit
    def value_and_grads(params, student, teacher):
        return jax.value_and_grad(lambda p, s: loss(p, s, teacher, {}).mean(), argnums=(0, 1))(params, student)

    for s, t in ((large, opposite), (zeros, large), (large, zeros), (large, large), (zeros, zeros)):
        value, grads = value_and_grads(params, outputs(s, dtype), outputs(t, dtype))
        assert value.dtype == jnp.float32 and np.isfinite(value)
        assert all(np.all(np.isfinite(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(grads))
        assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(grads[1]))


def test_declarations():
    """A value sees the batch through BatchNorm, and is not 0 at the teacher."""
    loss = KnowledgeReview(layers=("stage2",))
    assert not loss.per_example and not loss.zero_at_teacher and loss.needs_teacher and not loss.calls_networks
    assert options("loss")["review"].fields["weight"][1] == 5.0
    features = network(S, 1)
    student, teacher = outputs(features), outputs(network(S, 2))
    others = outputs({name: np.concatenate([f[:1], 2 - f[1:]]) for name, f in features.items()})
    params = start(loss, student, teacher)
    assert abs(call(loss, params, others, teacher)[0] - call(loss, params, student, teacher)[0]) > 1e-3
    assert np.all(call(loss, params, student, student) > 1e-2)


def test_a_teacher_of_the_features_that_were_read_alone_changes_nothing():
    loss, student, teacher = KnowledgeReview(), outputs(network(S, 1)), outputs(network(T, 2))
    params = start(loss, student, teacher)
    reduced = teacher._replace(features={n: f for n, f in teacher.features.items() if n != "stage1"})
    np.testing.assert_array_equal(call(loss, params, student, reduced), call(loss, params, student, teacher))


@pytest.mark.parametrize(
    ("layers", "student", "teacher", "message"),
    [
        (("stagee1",), S, T, "layers 'stagee1' does not exist in the student; did you mean 'stage1'?"),
        (("stage3",), S | {"stage3": (2, 2, 2)}, T, "layers 'stage3' does not exist in the teacher"),
        (None, S, {"stage1": (2, 2, 2)}, "layers 'embedding' does not exist in the teacher"),
        (("stage1",), S | {"stage1": (4, 3)}, T, "layers must be maps [B, H, W, C] or vectors [B, D], 'stage1' is [B, 4, 3]"),
        (None, {"embedding": (4,)}, T, "layers must be features of both networks, which have no stage in common"),
    ],
)
def test_layers_that_do_not_fit(layers, student, teacher, message):
    with pytest.raises(UsageError) as error:
        start(KnowledgeReview(layers=layers), outputs(network(student, 0)), outputs(network(teacher, 0)))
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"layers": []}, "loss.layers must be a list of names"),
        ({"layers": ["stage1", "stage1"]}, "loss.layers must name each layer once"),
        ({"max_channels": 0}, "loss.max_channels must be positive, got 0"),
    ],
)
def test_bad_options(config, message):
    with pytest.raises(UsageError) as error:
        build("loss", {"name": "review", **config})
    assert message in str(error.value) and "\n" not in str(error.value)


def test_no_teacher_is_a_clear_error():
    with pytest.raises(UsageError, match="needs a teacher"):
        KnowledgeReview().init(jax.random.key(0), outputs(network(S, 0)), None)
