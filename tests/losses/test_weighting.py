"""WSLD and CTKD: NumPy forms, what is weighted, where the reversed gradient goes, and hard cases."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from jax.test_util import check_grads

from jdistill.errors import UsageError
from jdistill.losses.logits import KD
from jdistill.losses.weighting import CurriculumTemperature, WeightedSoftLabels, reverse_gradient
from jdistill.pytrees import as_leaves
from jdistill.registry import build, options
from jdistill.types import Outputs
from tests.reference import losses
from tests.reference import weighting as reference
from tests.reference.inputs import golden_inputs

IN = golden_inputs()
PRECISIONS = pytest.mark.parametrize(("x64", "tolerance"), [(True, 1e-10), (False, 1e-5)], ids=["float64", "float32"])
INSTANCE = CurriculumTemperature(form="instance", hidden_size=5)
every_loss = pytest.mark.parametrize("loss", [WeightedSoftLabels(), CurriculumTemperature(), INSTANCE], ids=["wsld", "g", "i"])


def outputs(zs=IN.zs, zt=IN.zt, y=IN.y) -> tuple[Outputs, Outputs, dict]:
    return Outputs(jnp.asarray(zs), {}), Outputs(jnp.asarray(zt), {}), {"label": jnp.asarray(y, jnp.int32)}


def start(loss, student, teacher):
    """Parameters away from their start, where the instance form's last layer is 0."""
    params = loss.init(jax.random.key(0), *jax.eval_shape(lambda: (student, teacher)))
    random = np.random.RandomState(1)
    return jax.tree.map(lambda leaf: jnp.asarray(leaf + 0.3 * random.randn(*leaf.shape), leaf.dtype), params)


@PRECISIONS
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_wsld_of_each_example(x64, tolerance, temperature):
    loss = WeightedSoftLabels(temperature=temperature)
    with jax.enable_x64(x64):
        values = jax.jit(loss)({}, *outputs())
        assert values.shape == (8,) and values.dtype == (jnp.float64 if x64 else jnp.float32)
    np.testing.assert_allclose(values, reference.wsld(IN.zs, IN.zt, IN.y, temperature), rtol=tolerance)


@PRECISIONS
@pytest.mark.parametrize("form", ["global", "instance"])
def test_ctkd_of_each_example(x64, tolerance, form):
    loss = CurriculumTemperature(lowest=0.5, span=4.0, form=form, hidden_size=5)
    with jax.enable_x64(x64):
        student, teacher, batch = outputs()
        params = start(loss, student, teacher)
        values = jax.jit(loss)(params, student, teacher, batch)
        eager = loss(params, student, teacher, batch)
    arrays = jax.tree.map(np.asarray, params)
    theta = reference.thetas(IN.zs, IN.zt, arrays) if form == "instance" else arrays["theta"]
    assert np.ptp(theta) > 0.5 or form == "global"
    np.testing.assert_allclose(values, reference.ctkd(IN.zs, IN.zt, theta, 0.5, 4.0), rtol=10 * tolerance)
    np.testing.assert_allclose(values, eager, rtol=tolerance)


@every_loss
def test_one_logit_is_two_classes(loss):
    zs, zt, y = IN.zs[:, :1], IN.zt[:, :1], IN.y % 2
    with jax.enable_x64(True):
        student, teacher, batch = outputs(zs, zt, y)
        params = start(loss, student, teacher)
        values = loss(params, student, teacher, batch)
        two = loss(params, *outputs(losses.two_classes(zs), losses.two_classes(zt), y))
    np.testing.assert_allclose(values, two, rtol=1e-12)


@pytest.mark.parametrize("form", ["global", "instance"])
def test_ctkd_starts_as_kd_at_one_temperature(form):
    with jax.enable_x64(True):
        loss = CurriculumTemperature(form=form)
        student, teacher, batch = outputs()
        params = loss.init(jax.random.key(3), student, teacher)
        temperature = 1 + 20 / (1 + np.exp(-1))
        expected = losses.kd(IN.zs, IN.zt, temperature)
        np.testing.assert_allclose(loss(params, student, teacher, batch), expected, rtol=1e-10)


def test_wsld_weighs_by_the_label():
    """Next to nothing where the student is sure and right; everything where only the teacher is; without gradient."""
    zs, zt = np.array([[9.0, 0, 0], [0, 0, 9.0], [9.0, 0, 0]]), np.array([[1.0, 0, 0], [1e3, 0, 0], [1e3, 0, 0]])
    with jax.enable_x64(True):
        values = WeightedSoftLabels(temperature=1.0)({}, *outputs(zs, zt, [0, 0, 0]))
    soft = [-losses.softmax(t) @ np.log(losses.softmax(s)) for s, t in zip(zs, zt, strict=True)]
    share = np.asarray(values) / soft
    assert share[0] < 1e-3
    np.testing.assert_allclose(share[1:], 1, rtol=1e-9)
    sure = WeightedSoftLabels()({}, *outputs([[1e3, 0, 0]], [[1e3, 0, 0]], [0]))
    np.testing.assert_array_equal(sure, [0])

    with jax.enable_x64(True):
        student, teacher, batch = outputs()

        def kd(z):
            return KD(temperature=2.0)({}, Outputs(z, {}), teacher, batch)

        made = jax.jacobian(lambda z: WeightedSoftLabels()({}, Outputs(z, {}), teacher, batch))(student.logits)
        ce_s, ce_t = losses.cross_entropy(IN.zs, IN.y), losses.cross_entropy(IN.zt, IN.y)
        weight = 1 - np.exp(-ce_s / (ce_t + 1e-7))
        np.testing.assert_allclose(made, weight[:, None, None] * jax.jacobian(kd)(student.logits), rtol=1e-9, atol=1e-14)


def test_reverse_gradient():
    for strength in (0.0, 0.5, 2.0):
        value, slope = jax.value_and_grad(lambda x, s=strength: reverse_gradient(x, s) ** 2)(3.0)
        assert value == 9 and slope == -6 * strength
        assert jax.jvp(lambda x, s=strength: reverse_gradient(x, s), (3.0,), (1.0,)) == (3.0, -strength)
    assert jax.grad(lambda s: reverse_gradient(3.0, s))(1.0) == 0


@pytest.mark.parametrize(("form", "reversal"), [("global", 1.0), ("global", 0.0), ("instance", 0.25)])
def test_only_the_temperature_is_trained_backwards(form, reversal):
    """Parameters: -reversal times the true derivative. Student: the gradient at a fixed temperature, as it is."""
    loss = CurriculumTemperature(reversal=reversal, form=form, hidden_size=2, span=6.0)
    with jax.enable_x64(True):
        student, teacher, batch = outputs()
        params = start(loss, student, teacher)
        flat, unflatten = ravel_pytree(params)

        @jax.jit
        def total(flat, z):
            return loss(unflatten(flat), Outputs(z, {}), teacher, batch).sum()

        of_params, of_student = jax.grad(total, argnums=(0, 1))(flat, student.logits)
        steps = 1e-5 * np.eye(flat.size)
        true = np.array([total(flat + step, student.logits) - total(flat - step, student.logits) for step in steps]) / 2e-5
        assert np.abs(true).max() > 0.1
        np.testing.assert_allclose(of_params, -reversal * true, rtol=1e-5, atol=1e-6)

        arrays = jax.tree.map(np.asarray, params)
        theta = reference.thetas(IN.zs, IN.zt, arrays) if form == "instance" else arrays["theta"]
        temperatures = jnp.broadcast_to(1 + 6 / (1 + np.exp(-theta)), 8)

        def kd(z):
            rows = jax.vmap(lambda s, t, own: KD(temperature=own)({}, Outputs(s[None], {}), Outputs(t[None], {}), {}))
            return rows(z, teacher.logits, temperatures).sum()

        np.testing.assert_allclose(of_student, jax.grad(kd)(student.logits), rtol=1e-9, atol=1e-12)


def test_a_step_of_descent_raises_the_loss_of_the_temperature_and_lowers_that_of_the_student():
    with jax.enable_x64(True):
        student, teacher, batch = outputs()
        loss = CurriculumTemperature()
        params = loss.init(jax.random.key(0), student, teacher)

        def total(params, z):
            return loss(params, Outputs(z, {}), teacher, batch).mean()

        before, (of_params, of_student) = jax.value_and_grad(total, argnums=(0, 1))(params, student.logits)
        moved = jax.tree.map(lambda leaf, g: leaf - 1e-2 * g, params, of_params)
        assert total(moved, student.logits) > before > total(params, student.logits - 1e-2 * of_student)


def test_student_gradients_of_ctkd_by_finite_differences():
    with jax.enable_x64(True):
        student, teacher, batch = outputs()
        loss = CurriculumTemperature()
        params = start(loss, student, teacher)
        check_grads(lambda z: loss(params, Outputs(z, {}), teacher, batch), (student.logits,), order=1, modes=["rev", "fwd"])


@every_loss
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("classes", [1, 10])
def test_finite_at_extreme_logits(loss, dtype, classes):
    large = jnp.asarray(np.where(IN.zs[:, :classes] > 0, 1e4, -1e4), dtype)
    batch = {"label": jnp.asarray(IN.y % max(classes, 2))}
    params = start(loss, *outputs(large, large)[:2])

    @jax.jit
    def gradients(params, z_s, z_t):
        def total(params, z_s):
            values = loss(params, Outputs(z_s, {}), Outputs(z_t, {}), batch)
            return values.sum(), values

        return jax.grad(total, argnums=(0, 1), has_aux=True)(params, z_s)

    for z_s, z_t in ((large, -large), (-large, large), (0 * large, large), (large, 0 * large), (large, large)):
        found, values = gradients(params, z_s, z_t)
        assert values.dtype == jnp.float32 and found[1].dtype == dtype and np.all(np.isfinite(values))
        assert all(np.all(np.isfinite(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(found))


@every_loss
def test_numbers_batch_without_another_trace(loss):
    student, teacher, batch = outputs()
    params, traces = start(loss, student, teacher), []

    @jax.jit
    def value(loss):
        traces.append(loss)
        return loss(params, student, teacher, batch)

    members = [jax.tree.map(lambda leaf, i=i: leaf + np.float32(i), as_leaves(loss)) for i in range(3)]
    loop = np.stack([value(member) for member in members])
    assert len(traces) == 1 and np.abs(np.diff(loop, axis=0)).min(axis=1).max() > 1e-3
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)
    together = jax.jit(jax.vmap(lambda member: member(params, student, teacher, batch)))(stacked)
    np.testing.assert_allclose(together, loop, rtol=1e-5)


def test_wsld_of_a_label_outside_the_classes_is_not_silent():
    values = WeightedSoftLabels()({}, *outputs(np.eye(2, 3), np.eye(2, 3), [1, 3]))
    assert np.isfinite(values[0]) and np.isnan(values[1])


def test_declarations_and_zero_at_the_teacher():
    for name, zero, weight in (("wsld", False, 2.5), ("ctkd", True, 0.9)):
        option = options("loss")[name]
        assert option.target.zero_at_teacher == zero and option.fields["weight"][1] == weight
        assert option.target.needs_teacher and option.target.per_example and option.summary
    student, teacher, batch = outputs(IN.zs, IN.zs)
    assert np.all(WeightedSoftLabels()({}, student, teacher, batch) > 1e-4)
    for loss in (CurriculumTemperature(), INSTANCE):
        np.testing.assert_array_equal(loss(start(loss, student, teacher), student, teacher, batch), np.zeros(8))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"name": "wsld", "temperature": 0.0}, "loss.temperature must be positive, got 0.0"),
        ({"name": "ctkd", "lowest": 0.0}, "loss.lowest must be positive, got 0.0"),
        ({"name": "ctkd", "span": -1.0}, "loss.span must be at least 0, got -1.0"),
        ({"name": "ctkd", "reversal": -1.0}, "loss.reversal must be at least 0, got -1.0"),
        ({"name": "ctkd", "form": "globl"}, "loss.form must be one of global, instance, got 'globl'"),
        ({"name": "ctkd", "hidden_size": 0}, "loss.hidden_size must be at least 1, got 0"),
    ],
)
def test_bad_options(config, message):
    with pytest.raises(UsageError) as error:
        build("loss", config)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["wsld", "ctkd"])
def test_different_numbers_of_classes_are_refused(name):
    with pytest.raises(UsageError, match="got 10 and 7"):
        build("loss", {"name": name}).init(jax.random.key(0), *outputs(IN.zs, IN.zt[:, :7])[:2])
