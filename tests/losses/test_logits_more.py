"""Divergences and decoupled losses: the published implementations' numbers, NumPy forms, and hard cases."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdistill.errors import UsageError
from jdistill.losses import (
    DIST,
    DKD,
    KD,
    MLKD,
    NKD,
    JensenShannon,
    LogitStd,
    ReverseKL,
    SkewKL,
    SoftBCE,
    TotalVariation,
)
from jdistill.losses.divergences import _log_mixture
from jdistill.registry import build
from jdistill.types import Context, Outputs
from tests.reference import logits_more as reference
from tests.reference import losses
from tests.reference.inputs import golden_inputs

IN = golden_inputs()
PRECISIONS = pytest.mark.parametrize(("x64", "tolerance"), [(True, 1e-10), (False, 1e-5)], ids=["float64", "float32"])


def mlkd(**parts) -> MLKD:
    return MLKD(**{"instance": 0.0, "batch_level": 0.0, "class_level": 0.0, **parts})


# name: (loss, value, the implementation that gave it, run on golden_inputs() in float64)
GOLDENS = {
    "dkd": (DKD(alpha=1.0, beta=8.0, temperature=4.0), 59.209664733968495, "mdistiller, cls_KD, mmrazor (batchmean)"),
    "nkd": (NKD(gamma=1.5, temperature=1.0), 7.485698085560858, "cls_KD NKDLoss"),
    "nkd_cifar": (NKD(gamma=3.5, temperature=3.0), 81.42054279496058, "cls_KD NKDLoss, its CIFAR-100 setting"),
    "dist": (DIST(beta=1.0, gamma=1.0, temperature=4.0), 29.25843347460839, "hunto DIST_KD, mmrazor"),
    "logit_std_kd": (LogitStd(of=KD(temperature=2.0)), 0.8339409233363251, "logit-standardization-KD, KD at T = 2"),
    "logit_std_kd_ddof0": (LogitStd(of=KD(temperature=2.0), ddof=0), 0.9242479920393798, "the same, std with ddof=0"),
    "logit_std_dkd": (
        LogitStd(of=DKD(alpha=9.0, beta=72.0, temperature=2.0)), 59.96210684789399, "logit-standardization-KD, DKD at T = 2"
    ),
    "mlkd_kd": (mlkd(temperatures=(4.0,), instance=1.0), 7.361841689437144, "MLKD kd_loss"),
    "mlkd_bc": (mlkd(temperatures=(4.0,), batch_level=1.0), 0.006891924489706673, "MLKD bc_loss"),
    "mlkd_cc": (mlkd(temperatures=(4.0,), class_level=1.0), 0.012168904223414462, "MLKD cc_loss"),
    # The authors' totals have their KD weight 0.9 and, as a factor, the half of examples and classes that is masked.
    "mlkd_bc_total": (mlkd(batch_level=0.45), 0.05180948023099875, "MLKD forward_train, loss_bc"),
    "mlkd_cc_total": (mlkd(class_level=0.45), 0.05799246452510075, "MLKD forward_train, loss_cc"),
}
# name: (loss, the NumPy form of each example's value)
FORMS = {
    "reverse_kl": (ReverseKL(temperature=2.0), lambda s, t, y: reference.reverse_kl(s, t, 2.0)),
    "js": (JensenShannon(temperature=3.0), lambda s, t, y: reference.js(s, t, 3.0)),
    "skew_kl": (SkewKL(alpha=0.3, temperature=2.0), lambda s, t, y: reference.skew_kl(s, t, 0.3, 2.0)),
    "skew_kl_default": (SkewKL(), lambda s, t, y: reference.skew_kl(s, t, 0.1, 1.0)),
    "skew_kl_of_alpha_0_is_kd": (SkewKL(alpha=0.0, temperature=4.0), lambda s, t, y: losses.kd(s, t, 4.0)),
    "total_variation": (TotalVariation(), lambda s, t, y: reference.total_variation(s, t)),
    "bce_soft": (SoftBCE(temperature=2.0), lambda s, t, y: reference.bce_soft(s, t, 2.0) / s.shape[1]),
    "bce_soft_sum": (SoftBCE(reduction="sum"), lambda s, t, y: reference.bce_soft(s, t, 1.0)),
    "dkd": (DKD(alpha=0.5, beta=2.0, temperature=1.5), lambda s, t, y: reference.dkd(s, t, y, 0.5, 2.0, 1.5)),
    "nkd": (NKD(gamma=0.7, temperature=2.0), lambda s, t, y: reference.nkd(s, t, y, 0.7, 2.0)),
    "dist": (DIST(beta=2.0, gamma=0.5, temperature=2.0), lambda s, t, y: reference.dist(s, t, 2.0, 0.5, 2.0)),
    "logit_std_kd": (
        LogitStd(of=KD(temperature=3.0), epsilon=0.2),
        lambda s, t, y: losses.kd(reference.standardise(s, 0.2), reference.standardise(t, 0.2), 3.0),
    ),
    "mlkd": (
        MLKD(temperatures=(1.0, 5.0), instance=0.5, batch_level=2.0, class_level=3.0),
        lambda s, t, y: sum(
            w * part
            for temperature in (1.0, 5.0)
            for w, part in zip((0.5, 2.0, 3.0), reference.mlkd_parts(s, t, temperature), strict=True)
        ),
    ),
}
ONE_LOGIT = [name for name in FORMS if not name.startswith(("bce", "logit_std", "dkd", "nkd", "dist"))]


def outputs(zs=IN.zs, zt=IN.zt, y=IN.y) -> tuple[Outputs, Outputs, dict]:
    return Outputs(jnp.asarray(zs), {}), Outputs(jnp.asarray(zt), {}), {"label": jnp.asarray(y, jnp.int32)}


def call(loss, student, teacher, batch):
    params = loss.init(jax.random.key(0), student, teacher)
    assert params == {}
    context = Context(student=student, teacher=teacher, batch=batch, key=jax.random.key(1), student_network=None)
    values, state = jax.jit(lambda context: loss.evaluate(params, {}, context))(context)
    assert state == {}
    return values


@PRECISIONS
@pytest.mark.parametrize("name", GOLDENS)
def test_published_value(name, x64, tolerance):
    loss, expected, _origin = GOLDENS[name]
    with jax.enable_x64(x64):
        values = call(loss, *outputs())
        assert values.shape == (8,) and values.dtype == (jnp.float64 if x64 else jnp.float32)
        np.testing.assert_allclose(values.mean(), expected, rtol=tolerance)


@PRECISIONS
@pytest.mark.parametrize("name", FORMS)
def test_value_of_each_example(name, x64, tolerance):
    loss, form = FORMS[name]
    with jax.enable_x64(x64):
        values = call(loss, *outputs())
    np.testing.assert_allclose(values, form(IN.zs, IN.zt, IN.y), rtol=5 * tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ONE_LOGIT)
def test_one_logit_is_two_classes(name):
    loss, form = FORMS[name]
    zs, zt, y = IN.zs[:, :1], IN.zt[:, :1], IN.y % 2
    with jax.enable_x64(True):
        values = call(loss, *outputs(zs, zt, y))
    np.testing.assert_allclose(values, form(losses.two_classes(zs), losses.two_classes(zt), y), rtol=1e-10)


def test_one_logit_of_the_losses_with_parts_that_vanish_there():
    zs, zt, y = IN.zs[:, :1], IN.zt[:, :1], IN.y % 2
    two_s, two_t = losses.two_classes(zs), losses.two_classes(zt)
    with jax.enable_x64(True):
        given = outputs(zs, zt, y)
        np.testing.assert_allclose(
            call(DKD(temperature=2.0), *given), losses.kd(two_s, two_t, 2.0), rtol=1e-10
        )  # one other class: its share is 1
        sure = [-t[label] * np.log(s[label]) for s, t, label in zip(*map(rows, (two_s, two_t)), y, strict=True)]
        np.testing.assert_allclose(call(NKD(), *given), sure, rtol=1e-10)
        np.testing.assert_allclose(call(DIST(), *given), reference.dist(two_s, two_t, 1.0, 1.0, 1.0), rtol=1e-10)
        np.testing.assert_allclose(call(SoftBCE(), *given), reference.bce_soft(zs, zt, 1.0), rtol=1e-10)
        with pytest.raises(UsageError, match="needs at least 3 classes, got 2; use loss=kd"):
            LogitStd(of=KD()).init(jax.random.key(0), *given[:2])


def rows(z: np.ndarray) -> list[np.ndarray]:
    return [losses.softmax(row) for row in z]


@pytest.mark.slow
def test_dkd_is_finite_for_a_student_that_is_sure_and_wrong():
    """In float32 the published form takes log(softmax(z)[label]) = log 0: infinite."""
    zs, zt = np.array([[400.0, -400.0, 0.0]], np.float32), np.array([[-5.0, 8.0, 0.0]], np.float32)
    p = np.exp(zs / 4 - zs.max() / 4)
    with np.errstate(divide="ignore"):
        assert np.isinf(np.log(p / p.sum())[0, 1])
    student, teacher, batch = outputs(zs, zt, [1])

    def mean(logits):
        return DKD()({}, Outputs(logits, {}), teacher, batch).mean()

    value, gradient = jax.value_and_grad(mean)(student.logits)
    with np.errstate(divide="ignore"):
        expected = reference.dkd(zs.astype(np.float64), zt.astype(np.float64), [1], 1.0, 8.0, 4.0)
    np.testing.assert_allclose(value, expected[0], rtol=1e-5)
    assert np.all(np.isfinite(gradient)) and gradient[0, 1] < 0 < gradient[0, 0]


@pytest.mark.parametrize("loss", [DKD(), NKD()])
def test_a_label_outside_the_classes_is_not_silent(loss):
    values = loss({}, *outputs(np.eye(2, 3), np.eye(2, 3), [1, 3]))
    assert np.isfinite(values[0]) and np.isnan(values[1])


@pytest.mark.parametrize("loss", [JensenShannon(temperature=4.0), ReverseKL(temperature=4.0), DKD(), SkewKL(), MLKD()])
def test_zero_where_the_student_is_the_teacher(loss):
    np.testing.assert_array_equal(call(loss, *outputs(IN.zs, IN.zs)), np.zeros(8))


def test_js_and_total_variation_are_symmetric_and_bounded():
    for loss, most in ((JensenShannon(), np.log(2)), (TotalVariation(), 1.0)):
        values = call(loss, *outputs())
        np.testing.assert_allclose(values, call(loss, *outputs(IN.zt, IN.zs)), rtol=1e-5)
        far = call(loss, *outputs(1e4 * IN.zs, -1e4 * IN.zs))
        assert np.all(values < most) and np.allclose(far, most)


@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.5, 0.9])
def test_log_mixture(alpha):
    d = np.array([-300.0, -30.0, -1.0, -0.9999, -1e-6, 0.0, 1e-9, 0.5, 1.0, 30.0, 300.0])
    with jax.enable_x64(True):
        made, slope = jax.vmap(jax.value_and_grad(_log_mixture), (0, None))(jnp.asarray(d), alpha)
    mixed = (1 - alpha) * np.exp(d)
    expected = np.where(np.abs(d) < 1e-3, (1 - alpha) * d + alpha * (1 - alpha) / 2 * d**2, np.log(alpha + mixed))
    np.testing.assert_allclose(made, expected, rtol=1e-12)
    np.testing.assert_allclose(slope, mixed / (alpha + mixed), rtol=1e-12)


@pytest.mark.slow
def test_dist_keeps_small_distances_in_float32_and_has_no_gradient_at_a_constant_student():
    zs = (IN.zs / 3).astype(np.float32)
    nearby = zs + np.float32(1e-3) * IN.zt.astype(np.float32)
    values = call(DIST(), *outputs(nearby, zs))
    expected = reference.dist(nearby.astype(np.float64), zs.astype(np.float64), 1.0, 1.0, 1.0)
    np.testing.assert_allclose(values, expected, rtol=1e-2)
    student, teacher, batch = outputs(np.zeros((8, 16), np.float32), np.tile(zs[:, :8], (1, 2)))
    gradient = jax.grad(lambda z: DIST()({}, Outputs(z, {}), teacher, batch).mean())(student.logits)
    np.testing.assert_array_equal(gradient, np.zeros((8, 16)))
    np.testing.assert_array_equal(DIST()({}, student, teacher, batch), np.full(8, 2.0))


def test_standardised_logits_do_not_see_shift_and_scale():
    with jax.enable_x64(True):
        values = call(LogitStd(of=KD(temperature=2.0)), *outputs())
        np.testing.assert_allclose(call(LogitStd(of=KD(temperature=2.0)), *outputs(7 * IN.zs - 3, IN.zt)), values, rtol=1e-6)
        seen = call(KD(temperature=2.0), *outputs(reference.standardise(IN.zs), reference.standardise(IN.zt)))
        np.testing.assert_allclose(seen, values, rtol=1e-10)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"name": "skew_kl", "alpha": 1.0}, "loss.alpha must be at least 0 and below 1, got 1.0"),
        ({"name": "js", "temperature": 0.0}, "loss.temperature must be positive"),
        ({"name": "bce_soft", "reduction": "men"}, "loss.reduction must be one of mean, sum, got 'men'"),
        ({"name": "dkd", "beta": -1.0}, "loss.beta must be at least 0, got -1.0"),
        ({"name": "nkd", "gamma": -1.0}, "loss.gamma must be at least 0"),
        ({"name": "dist", "temperature": -4.0}, "loss.temperature must be positive"),
        ({"name": "logit_std", "ddof": 2}, "loss.ddof must be 0 or 1, got 2"),
        ({"name": "mlkd", "temperatures": [2.0, 0.0]}, "loss.temperatures[1] must be positive, got 0.0"),
        ({"name": "mlkd", "temperatures": []}, "loss.temperatures must name at least one number"),
    ],
)
def test_bad_options(config, message):
    with pytest.raises(UsageError) as error:
        build("loss", config)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["reverse_kl", "js", "skew_kl", "total_variation", "bce_soft", "dkd", "nkd", "dist", "mlkd"])
def test_different_numbers_of_classes_are_refused(name):
    with pytest.raises(UsageError, match="got 10 and 7"):
        build("loss", {"name": name}).init(jax.random.key(0), *outputs(IN.zs, IN.zt[:, :7])[:2])
