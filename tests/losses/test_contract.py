"""What every registered loss must do, asked of the whole registry."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import jdistill.losses
from jdistill.errors import UsageError
from jdistill.losses import Attention, Hint
from jdistill.losses._layers import middle_layers
from jdistill.pytrees import as_leaves
from jdistill.registry import build, options
from jdistill.types import Outputs

OWN = {name: option for name, option in options("loss").items() if option.target.__module__.startswith("jdistill.")}


class Expected(NamedTuple):
    """What is true of a loss.

    weight: the config's default; zero_at_teacher: value where the student's outputs are the teacher's;
    needs_teacher, per_example: the class attributes; least_classes: fewer are refused;
    other: another setting of it, for the tests here.
    """

    weight: float = 1.0
    zero_at_teacher: bool = True
    needs_teacher: bool = True
    per_example: bool = True
    least_classes: int = 1
    other: dict = {}  # noqa: RUF012


EXPECTED = {
    "bce_soft": Expected(zero_at_teacher=False, other={"temperature": 2.0, "reduction": "sum"}),
    "dist": Expected(per_example=False, other={"beta": 2.0, "gamma": 0.5}),
    "dkd": Expected(other={"alpha": 2.0, "beta": 0.5, "temperature": 1.0}),
    "js": Expected(other={"temperature": 4.0}),
    "logit_std_kd": Expected(least_classes=3, other={"temperature": 1.0, "ddof": 0}),
    "mlkd": Expected(per_example=False, other={"temperatures": [3.0]}),
    "nkd": Expected(zero_at_teacher=False, other={"gamma": 3.5, "temperature": 3.0}),
    "reverse_kl": Expected(other={"temperature": 4.0}),
    "skew_kl": Expected(other={"alpha": 0.0, "temperature": 4.0}),
    "total_variation": Expected(),
    "attention": Expected(weight=1000.0, other={"distance": "l2"}),
    "cross_entropy": Expected(zero_at_teacher=False, needs_teacher=False, other={"label_smoothing": 0.1}),
    "hint": Expected(
        zero_at_teacher=False, per_example=False, other={"student_layer": "embedding", "teacher_layer": "embedding"}
    ),
    "kd": Expected(other={"temperature": 1.5}),
    "logit_mse": Expected(other={"reduction": "half_sum"}),
    "none": Expected(needs_teacher=False),
    "cc": Expected(per_example=False, other={"form": "repdistiller", "embedding_size": 0}),
    "fsp": Expected(weight=50.0, other={"layers": ["stage3", "stage1"]}),
    "nst": Expected(weight=50.0, other={"layers": ["stage2"]}),
    "pkt": Expected(weight=30000.0, per_example=False),
    "rkd": Expected(per_example=False, other={"l2_norm": True}),
    "sp": Expected(weight=3000.0, per_example=False, other={"student_layer": "stage1", "teacher_layer": "stage1"}),
    "vid": Expected(zero_at_teacher=False, other={"layers": ["stage2"]}),
}
CASES = [(name, {}) for name in EXPECTED] + [(name, e.other) for name, e in EXPECTED.items() if e.other]
IDS = [f"{name}-{'-'.join(config) or 'default'}" for name, config in CASES]
every_case = pytest.mark.parametrize(("name", "config"), CASES, ids=IDS)
with_numbers = pytest.mark.parametrize("name", [n for n, o in OWN.items() if jax.tree.leaves(o.target())])


def make(name: str, **config):
    return build("loss", {"name": name, **config})


def draw(seed: int, classes: int = 3, scale: float = 1.0, dtype=None) -> Outputs:
    random = np.random.RandomState(seed)

    def array(*shape):
        return jnp.asarray(scale * random.randn(*shape), dtype)

    features = {f"stage{i}": array(4, 6 // i, 6 // i, 2 + i) for i in (1, 2, 3)}
    return Outputs(array(4, classes), {**features, "embedding": array(4, 5)})


BATCH = {"label": np.array([0, 1, 1, 0], np.int32), "index": np.arange(4, dtype=np.int32)}


@jax.jit
def call(loss, params, student, teacher):
    return loss(params, student, teacher, BATCH)


def start(loss, student, teacher):
    return loss.init(jax.random.key(0), *jax.eval_shape(lambda: (student, teacher)))


def test_every_registered_loss_is_listed_here_and_exported():
    assert set(OWN) == set(EXPECTED)
    assert {option.target.__name__ for option in OWN.values()} <= set(jdistill.losses.__all__)


@pytest.mark.parametrize("name", EXPECTED)
def test_declarations(name):
    option, expected = OWN[name], EXPECTED[name]
    assert (option.target.needs_teacher, option.target.per_example) == (expected.needs_teacher, expected.per_example)
    assert option.fields["weight"] == (float, expected.weight)
    assert dataclasses.is_dataclass(option.target) and option.summary


@every_case
def test_values_of_shape_batch_and_zero_at_the_teacher(name, config):
    loss, student, teacher = make(name, **config), draw(0), draw(1)
    params = start(loss, student, teacher)
    values = call(loss, params, student, teacher if loss.needs_teacher else None)
    assert values.shape == (4,) and values.dtype == jnp.float32
    zero = name == "none"
    assert np.all(values == 0) if zero else np.all(values > 1e-4)
    at_teacher = call(loss, params, teacher, teacher)
    assert np.allclose(at_teacher, 0, atol=1e-6) == EXPECTED[name].zero_at_teacher


def test_hint_without_a_regressor_is_zero_at_the_teacher():
    loss, out = Hint(regressor="none"), draw(0)
    assert start(loss, out, out) == {}
    assert np.all(loss({}, out, out, BATCH) == 0)


@every_case
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("classes", [1, 3])
def test_finite_at_extreme_outputs(name, config, dtype, classes):
    """At +-1e4, at a student of zeros, and at student = teacher, where norms have no derivative of their own."""
    loss, large = make(name, **config), draw(0, classes, dtype=dtype)
    large = jax.tree.map(lambda x: jnp.where(x > 0, 1e4, -1e4).astype(x.dtype), large)
    if classes < EXPECTED[name].least_classes:
        with pytest.raises(UsageError, match="at least"):
            start(loss, large, large)
        return
    params = start(loss, large, large)

    @jax.jit
    def value_and_grads(params, student, teacher):
        def mean(params, student):
            values = loss(params, student, teacher, BATCH)
            return values.mean(), values

        return jax.value_and_grad(mean, argnums=(0, 1), has_aux=True)(params, student)

    opposite, zeros = jax.tree.map(jnp.negative, large), jax.tree.map(jnp.zeros_like, large)
    for student, teacher in ((large, opposite), (opposite, large), (zeros, large), (large, zeros), (large, large)):
        (_, values), grads = value_and_grads(params, student, teacher)
        assert values.dtype == jnp.float32 and np.all(np.isfinite(values))
        for leaf, of in zip(jax.tree.leaves(grads[1]), jax.tree.leaves(student), strict=True):
            assert leaf.dtype == of.dtype
        assert all(np.all(np.isfinite(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(grads))


@every_case
def test_gradients_by_finite_differences(name, config):
    with jax.enable_x64(True):
        loss, student, teacher = make(name, **config), draw(0), draw(1)
        params = start(loss, student, teacher)

        @jax.jit
        def total(params, student):
            return loss(params, student, teacher, BATCH).sum()

        assert total(params, student).dtype == jnp.float64
        check_grads(total, (params, student), order=1, modes=["rev"], atol=1e-6, rtol=1e-6, eps=1e-5)


@every_case
def test_jit_is_eager(name, config):
    with jax.enable_x64(True):
        loss, student, teacher = make(name, **config), draw(0), draw(1)
        params = start(loss, student, teacher)
        eager = loss(params, student, teacher, BATCH)
        np.testing.assert_allclose(call(loss, params, student, teacher), eager, rtol=1e-12)


@with_numbers
def test_vmap_over_numbers_is_the_loop_and_no_number_retraces(name):
    with jax.enable_x64(True):
        student, teacher, traces = draw(0), draw(1), []
        first = as_leaves(make(name))
        members = [jax.tree.map(lambda leaf, i=i: leaf + np.float32(0.3 * i), first) for i in range(3)]
        params = start(first, student, teacher)

        @jax.jit
        def value(loss):
            traces.append(loss)
            return loss(params, student, teacher, BATCH)

        loop = np.stack([value(loss) for loss in members])
        assert len(traces) == 1
        assert np.abs(np.diff(loop, axis=0)).max() > 1e-6, "the numbers make no difference"
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)
        together = jax.jit(jax.vmap(lambda loss: loss(params, student, teacher, BATCH)))(stacked)
        np.testing.assert_allclose(together, loop, rtol=1e-6)


@every_case
def test_per_example_is_as_declared(name, config):
    loss, student, teacher = make(name, **config), draw(0), draw(1)
    params = start(loss, student, teacher)
    others = jax.tree.map(lambda x: x.at[1:].multiply(1.5), student)
    values, changed = call(loss, params, student, teacher), call(loss, params, others, teacher)
    if loss.per_example:
        np.testing.assert_allclose(changed[0], values[0], rtol=1e-6)
        unmoved = name in ("none", "attention", "nst", "logit_std_kd")  # they do not see scale
        assert np.allclose(changed[1:], values[1:], rtol=1e-4) == unmoved
    elif not config:
        others = jax.tree.map(lambda x: x.at[1:].set(1.5 * x[:0:-1]), student)  # in another order: some see no scale
        assert abs(call(loss, params, others, teacher)[0] - values[0]) > 1e-6


@pytest.mark.parametrize("name", [n for n, e in EXPECTED.items() if e.needs_teacher])
def test_no_teacher_is_a_clear_error(name):
    with pytest.raises(UsageError, match="needs a teacher"):
        make(name).init(jax.random.key(0), draw(0), None)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"name": "kd", "temperature": 0.0}, "loss.temperature must be positive, got 0.0"),
        ({"name": "kd", "temprature": 2.0}, "did you mean 'temperature'"),
        ({"name": "cross_entropy", "label_smoothing": 1.0}, "loss.label_smoothing must be at least 0 and below 1"),
        ({"name": "logit_mse", "reduction": "sum"}, "loss.reduction must be one of mean, half_sum, got 'sum'"),
        ({"name": "hint", "regressor": "conv"}, "loss.regressor must be one of auto, none, got 'conv'"),
        ({"name": "attention", "power": -1}, "loss.power must be positive, got -1"),
        ({"name": "attention", "distance": "l1"}, "loss.distance must be one of mse, l2, got 'l1'"),
        ({"name": "attention", "layers": "stage1"}, "loss.layers must be a list of names"),
        ({"name": "attention", "layers": []}, "loss.layers must be a list of names"),
    ],
)
def test_bad_options(config, message):
    with pytest.raises(UsageError) as error:
        build("loss", config)
    assert message in str(error.value) and "\n" not in str(error.value)


def flat(*sizes: int) -> Outputs:
    features = {f"hidden{i}": jnp.zeros((4, size)) for i, size in enumerate(sizes, 1)}
    return Outputs(jnp.zeros((4, 3)), {**features, "embedding": jnp.zeros((4, sizes[-1]))})


MAPS, TALL = draw(0), Outputs(jnp.zeros((4, 3)), {"stage1": jnp.zeros((4, 7, 7, 2))})


@pytest.mark.parametrize(
    ("loss", "student", "teacher", "message"),
    [
        (
            Hint(student_layer="stagee2"), MAPS, MAPS,
            "student_layer 'stagee2' does not exist in the student; did you mean 'stage2'? (it has: embedding [B, 5], ",
        ),
        (Hint(teacher_layer="stage4"), MAPS, MAPS, "teacher_layer 'stage4' does not exist in the teacher"),
        (
            Hint(student_layer="embedding"), MAPS, MAPS,
            "student_layer of shape [B, 5] cannot be matched to teacher_layer of shape [B, 3, 3, 4]",
        ),
        (Hint(student_layer="stage2", teacher_layer="stage1"), MAPS, TALL, "of shape [B, 3, 3, 4] cannot be matched"),
        (Hint(regressor="none"), flat(8), flat(9), "with regressor=none; set regressor=auto"),
        (Attention(layers=("stage9",)), MAPS, MAPS, "layers 'stage9' does not exist in the student"),
        (
            Attention(layers=("embedding",)), MAPS, MAPS,
            "layers must be maps [B, H, W, C] of both networks, got 'embedding'",
        ),
        (
            Attention(), flat(8, 6), MAPS,
            "student: embedding [B, 6], hidden1 [B, 8], hidden2 [B, 6]; teacher: embedding [B, 5], stage1",
        ),
        (make("kd"), draw(0, 3), draw(0, 10), "got 3 and 10"),
        (make("logit_mse"), draw(0, 2), draw(0, 1), "got 2 and 1"),
    ],
)  # fmt: skip
def test_layers_and_shapes_that_do_not_fit(loss, student, teacher, message):
    with pytest.raises(UsageError) as error:
        start(loss, student, teacher)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        (MAPS, MAPS, ("stage2", "stage2")),
        (MAPS, TALL, ("stage2", "stage1")),
        (flat(8), flat(8, 7, 6), ("hidden1", "hidden2")),
        (flat(8, 7), flat(*range(1, 12)), ("hidden1", "hidden6")),
        (flat(8), MAPS, ("embedding", "embedding")),
    ],
    ids=["stages", "fewer stages", "hidden", "hidden10 after hidden9", "mixed"],
)
def test_default_layers_of_hint(student, teacher, expected):
    assert middle_layers(student, teacher) == expected


def test_default_layer_beside_a_given_one_is_the_networks_own_and_needs_no_other_feature():
    """A cached teacher holds only the features that were read; what was chosen must not change with that."""
    student, teacher = draw(0), draw(1)
    for loss in (Hint(), Hint(student_layer="stage2")):
        params = start(loss, student, teacher)
        reduced = teacher._replace(features={"stage2": teacher.features["stage2"]})
        np.testing.assert_array_equal(call(loss, params, student, reduced), call(loss, params, student, teacher))
    loss = Hint(teacher_layer="embedding")
    wide = student._replace(features={"hidden1": student.logits, "embedding": student.features["embedding"]})
    params = start(loss, wide, teacher)
    reduced = teacher._replace(features={"embedding": teacher.features["embedding"]})
    assert params["kernel"].shape == (3, 5)
    np.testing.assert_array_equal(call(loss, params, wide, reduced), call(loss, params, wide, teacher))


def test_attention_takes_the_common_stages():
    student, teacher = draw(0), draw(1)
    fewer = teacher._replace(features={k: v for k, v in teacher.features.items() if k != "stage3"})
    noise = {"stage1_pre": teacher.features["stage1"], "stem": teacher.features["stage1"]}
    fewer = fewer._replace(features=fewer.features | noise)
    expected = Attention(layers=("stage1", "stage2"))({}, student, teacher, BATCH)
    student = student._replace(features=student.features | noise)
    np.testing.assert_array_equal(Attention()({}, student, fewer, BATCH), expected)
