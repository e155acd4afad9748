"""Losses on lists of candidates or documents: plain NumPy forms, a published value, filled places, hard logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jdistill.options  # noqa: F401 (registers every loss)
from jdistill.errors import UsageError
from jdistill.losses.listwise import plackett_luce
from jdistill.registry import build
from jdistill.types import Context, Network, Outputs
from tests.reference import listwise as reference

F = reference.FILLED
KEY = jax.random.key(5)
random = np.random.RandomState(0)
ZS, ZT = random.randn(6, 5) * 2, random.randn(6, 5) * 2
GRADES = random.randint(0, 3, (6, 5))
# Of some lists: two places filled at the end, one in the middle, only one document, none, no two of one grade apart.
ZS[1, 3:] = ZT[1, 3:] = F
ZS[2, 1] = ZT[2, 1] = F
ZS[3, 1:] = ZT[3, 1:] = F
ZS[4] = ZT[4] = F
GRADES[5] = 1
GRADES = np.where(ZS == F, -1, GRADES)
POSITIVE = np.where(ZS == F, -1, np.eye(5)[np.zeros(6, int)])
BATCH = {"label": np.zeros(6, np.int32), "grades": GRADES.astype(np.int32)}
REQUESTS = {"label": np.zeros(6, np.int32)}


def noise(samples: int) -> np.ndarray:
    with jax.enable_x64(True):
        return np.asarray(jax.random.gumbel(KEY, (samples, 6, 5), np.float64))


# name: (the loss, the batch, the NumPy form of each list's value)
FORMS = {
    "bpr": ({}, BATCH, lambda: reference.bpr(ZS)),
    "sampled_softmax": ({}, BATCH, lambda: reference.sampled_softmax(ZS)),
    "pointwise_bce": ({}, BATCH, lambda: reference.pointwise_bce(ZS)),
    "pointwise_bce mean": ({"reduction": "mean"}, BATCH, lambda: reference.pointwise_bce(ZS, mean=True)),
    "list_softmax": ({}, BATCH, lambda: reference.listwise_softmax(ZS, GRADES)),
    "list_softmax positive": ({}, REQUESTS, lambda: reference.listwise_softmax(ZS, POSITIVE)),
    "list_mle teacher": ({}, BATCH, lambda: reference.list_mle(ZS, ZT)),
    "list_mle top": ({"top": 2}, BATCH, lambda: reference.list_mle(ZS, ZT, 2)),
    "list_mle grades": ({"order": "grades"}, BATCH, lambda: reference.list_mle(ZS, GRADES)),
    "pairwise_logistic teacher": ({}, BATCH, lambda: reference.pairwise_logistic(ZS, ZT)),
    "pairwise_logistic grades": ({"order": "grades"}, BATCH, lambda: reference.pairwise_logistic(ZS, GRADES)),
    "pairwise_logistic mean": (
        {"order": "grades", "reduction": "mean"}, BATCH, lambda: reference.pairwise_logistic(ZS, GRADES, mean=True),
    ),
    "pairwise_logistic positive": ({"order": "grades"}, REQUESTS, lambda: reference.bpr(ZS)),
    "margin_mse": ({}, BATCH, lambda: reference.margin_mse(ZS, ZT, GRADES)),
    "margin_mse positive": ({}, REQUESTS, lambda: reference.margin_mse(ZS, ZT, POSITIVE)),
    "margin_mse all": ({"pairs": "all"}, BATCH, lambda: reference.margin_mse(ZS, ZT, GRADES, every=True)),
    "listwise_kd": ({"temperature": 2.0}, BATCH, lambda: reference.listwise_softmax(ZS, ZT, 2.0)),
    "listwise_kd t2": ({"temperature": 3.0, "t2": True}, BATCH, lambda: 9 * reference.listwise_softmax(ZS, ZT, 3.0)),
    "rank_distil": ({}, BATCH, lambda: reference.rank_distil(ZS, ZT, noise(8), None, 1.0)),
    "rank_distil top": (
        {"samples": 3, "top": 2, "temperature": 2.0}, BATCH, lambda: reference.rank_distil(ZS, ZT, noise(3), 2, 2.0),
    ),
}  # fmt: skip
every_form = pytest.mark.parametrize("name", FORMS)


def made(name: str, **options):
    return build("loss", {"name": name.split()[0], **(FORMS[name][0] if name in FORMS else {}), **options})


def evaluate(loss, zs, zt, batch):
    student, teacher = Outputs(jnp.asarray(zs), {}), Outputs(jnp.asarray(zt), {})
    network = Network(lambda inputs: student, lambda embedding: embedding)
    given = teacher if loss.needs_teacher else None
    return loss.evaluate({}, {}, Context(student, given, batch, KEY, network, known=None))[0]


@every_form
def test_value_of_each_list(name):
    loss, (_, batch, form) = made(name), FORMS[name]
    with jax.enable_x64(True):
        values, jitted = (np.asarray(run(loss, ZS, ZT, batch)) for run in (evaluate, jax.jit(evaluate)))
    assert values.shape == (6,)
    np.testing.assert_allclose(values, form(), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(jitted, values, rtol=1e-10, atol=1e-12)
    assert np.ptp(values[:3]) > 1e-3 and values[4] == 0


@every_form
def test_filled_places_change_nothing_and_get_no_gradient(name):
    loss, (_, batch, _) = made(name), FORMS[name]

    def widened(z, value):
        return z if name.startswith("rank_distil") else np.concatenate([z, np.full((6, 2), value)], axis=1)  # noise is by place

    grades = {"grades": widened(GRADES, -1).astype(np.int32)} if "grades" in batch else {}
    zs, zt, batch = widened(ZS, F), widened(ZT, F), {**batch, **grades}

    @jax.jit
    def program(z):
        return jax.grad(lambda z: (evaluate(loss, z, zt, batch).sum(), evaluate(loss, z, zt, batch)), has_aux=True)(z)

    with jax.enable_x64(True):
        gradient, values = map(np.asarray, program(jnp.asarray(zs)))
    np.testing.assert_allclose(values, FORMS[name][2](), rtol=1e-10, atol=1e-12)
    assert np.all(np.isfinite(gradient)) and np.all(gradient[zs == F] == 0) and np.abs(gradient[0]).max() > 1e-4


@every_form
def test_finite_at_extreme_logits(name):
    """In bfloat16; the conformance kit asks for float32 too, and for right gradients."""
    loss, (_, batch, _) = made(name), FORMS[name]
    large = jnp.asarray(np.where(np.random.RandomState(1).rand(6, 5) > 0.5, 1e4, -1e4), jnp.bfloat16)
    batch = {**batch, "grades": np.abs(GRADES)} if "grades" in batch else batch

    @jax.jit
    def gradients(z_s, z_t):
        return jax.value_and_grad(lambda z: evaluate(loss, z, z_t, batch).sum())(z_s)

    for z_s, z_t in ((large, -large), (-large, large), (0 * large, large), (large, 0 * large), (large, large)):
        value, gradient = gradients(z_s, z_t)
        assert value.dtype == jnp.float32 and gradient.dtype == jnp.bfloat16
        assert np.isfinite(value) and np.all(np.isfinite(gradient.astype(jnp.float32)))


def test_published_values_of_rank_distil():
    """TensorFlow Ranking's tests of CoupledRankDistilLoss: scores ln(1, 3, 2) and ln(1, 2, 3), and the orders it draws."""
    z = jnp.log(jnp.array([[2.0, 1, 3], [3, 1, 2]]))
    there = jnp.ones_like(z, bool)
    everything = np.log([6, 4, 1]).sum() - np.log([2, 1, 1]).sum(), np.log([6, 3, 1]).sum() - np.log([3, 1, 1]).sum()
    np.testing.assert_allclose(plackett_luce(z, there), everything, rtol=1e-6)
    np.testing.assert_allclose(plackett_luce(z, there, 2).mean(), 2.138333, rtol=1e-6)


def test_orders_are_drawn_as_the_teacher_would():
    """The mean over many orders is the expectation over all of them."""
    zs, zt = np.array([[0.3, -1.0, 0.8]]), np.array([[1.0, 0.0, -0.5]])
    expected, total = 0.0, 0.0
    for order in [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)]:
        p = np.exp(-reference.plackett_luce(list(zt[0, list(order)])))
        expected, total = expected + p * reference.plackett_luce(list(zs[0, list(order)])), total + p
    np.testing.assert_allclose(total, 1)
    found = evaluate(made("rank_distil", samples=20_000), zs, zt, {})
    np.testing.assert_allclose(found, [expected], rtol=0.01)


def test_a_teacher_far_apart_has_one_order():
    far = 1000.0 * np.argsort(np.argsort(ZT, axis=1), axis=1) * (ZT != F) + np.where(ZT == F, F, 0)
    values = evaluate(made("rank_distil"), ZS, far, BATCH)
    np.testing.assert_allclose(values, evaluate(made("list_mle"), ZS, far, BATCH), rtol=1e-5, atol=1e-6)


def test_margins_not_levels():
    """Another level of the student's scores changes nothing, the teacher's margins give 0."""
    for pairs in ("graded", "all"):
        loss = made("margin_mse", pairs=pairs)
        there = ZS != F
        assert np.abs(evaluate(loss, np.where(there, ZT + 3, F), ZT, BATCH)).max() < 1e-9
        assert evaluate(loss, np.where(there, 2 * ZT, F), ZT, BATCH)[0] > 0.1


def test_listwise_kd_has_the_gradient_of_kd():
    def slope(name, **options):
        loss = made(name, **options)
        return jax.grad(lambda z: evaluate(loss, z, ZT[:1], {}).sum())(jnp.asarray(ZS[:1]))

    with jax.enable_x64(True):
        np.testing.assert_allclose(slope("listwise_kd", temperature=3.0, t2=True), slope("kd", temperature=3.0), rtol=1e-9)


def test_mse():
    loss, z = made("mse"), np.array([[1.5], [-2.0], [0.0]])
    y = np.array([1.0, 1.0, -4.0], np.float32)
    np.testing.assert_allclose(evaluate(loss, z, z, {"label": y}), [0.25, 9, 16])
    wide = np.array([[1.0, 2.0], [0.0, 0.0]])
    np.testing.assert_allclose(evaluate(loss, wide, wide, {"label": np.array([1.0, 2.0])}), [0.5, 4])
    np.testing.assert_allclose(evaluate(loss, wide, wide, {"label": np.array([[1.0, 0.0], [3.0, 4.0]])}), [2, 12.5])


def test_one_negative_each_of_three_ways():
    z = np.array([[2.0, 0.5]])
    assert evaluate(made("bpr"), z, z, REQUESTS) == pytest.approx(np.log1p(np.exp(-1.5)), rel=1e-5)
    assert evaluate(made("sampled_softmax"), z, z, REQUESTS) == pytest.approx(np.log1p(np.exp(-1.5)), rel=1e-5)
    both = np.log1p(np.exp(-2.0)) + np.log1p(np.exp(0.5))
    assert evaluate(made("pointwise_bce"), z, z, REQUESTS) == pytest.approx(both, rel=1e-5)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"name": "list_mle", "order": "grade"}, "loss.order must be one of teacher, grades, got 'grade'; did you mean"),
        ({"name": "list_mle", "top": 0}, "loss.top must be positive, got 0"),
        ({"name": "margin_mse", "pairs": "some"}, "loss.pairs must be one of graded, all, got 'some'"),
        ({"name": "listwise_kd", "temperature": 0}, "loss.temperature must be positive"),
        ({"name": "rank_distil", "samples": 0}, "loss.samples must be positive"),
        ({"name": "pointwise_bce", "reduction": "none"}, "loss.reduction must be one of sum, mean"),
    ],
)
def test_bad_options(config, message):
    with pytest.raises(UsageError) as error:
        build("loss", config)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_what_does_not_fit():
    one, three, four = (Outputs(jnp.zeros((2, k)), {}) for k in (1, 3, 4))
    for name in ("bpr", "list_mle", "margin_mse"):
        with pytest.raises(UsageError, match="compares the logits of a list, got one logit"):
            made(name).init(KEY, one, one)
    for name in ("list_mle", "pairwise_logistic", "margin_mse", "listwise_kd", "rank_distil"):
        with pytest.raises(UsageError, match="needs a teacher"):
            made(name).init(KEY, three, None)
    assert made("list_mle", order="grades").init(KEY, three, None) == {}
    with pytest.raises(UsageError, match="got 3 and 4"):
        made("list_mle").init(KEY, three, four)
