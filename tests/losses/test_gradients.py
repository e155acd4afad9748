"""Losses on derivatives with respect to the inputs, against plain loops, finite differences and their own promises."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdistill.errors import UsageError
from jdistill.losses.gradients import GradientAttention, InputGradient, JacobianMatching
from jdistill.models import MLP
from jdistill.modules import from_linen
from jdistill.pytrees import as_leaves
from jdistill.registry import build, options
from jdistill.types import Context, Network, Outputs
from tests.marks import slow_but
from tests.reference import gradients as reference

FLAT, IMAGE = (7,), (3, 2, 2)
LABEL, INDEX = np.array([0, 2, 1, 1, 0], np.int32), np.array([3, 14, 15, 92, 65], np.int32)
KEY = jax.random.key(5)


def draw(seed: int, shape: tuple[int, ...], classes: int = 3, hidden: int = 0, scale: float = 1.0) -> reference.Parameters:
    """An affine network, or one with a hidden layer."""
    random, size = np.random.RandomState(seed), int(np.prod(shape))
    first = {"w1": random.randn(size, hidden) / size**0.5, "b1": random.randn(hidden)} if hidden else {}
    return first | {"w2": scale * random.randn(hidden or size, classes), "b2": random.randn(classes)}


def inputs_of(shape: tuple[int, ...], dtype=np.float64) -> np.ndarray:
    return np.random.RandomState(9).randn(len(LABEL), *shape).astype(dtype)


def network(net: dict) -> Network:
    net = jax.tree.map(jnp.asarray, net)

    def outputs(x):
        rows = x.reshape(x.shape[0], -1).astype(net["w2"].dtype)
        if "w1" in net:
            rows = jnp.tanh(rows @ net["w1"] + net["b1"])
        return Outputs(rows @ net["w2"] + net["b2"], {})

    return Network(outputs, lambda embedding: embedding)


def evaluate(loss, student: Network, teacher: Network, inputs, key=KEY, label=LABEL, index=INDEX):
    batch = {"inputs": jnp.asarray(inputs), "label": jnp.asarray(label), "index": jnp.asarray(index)}
    outs = student.outputs(batch["inputs"]), teacher.outputs(batch["inputs"])
    values, state = loss.evaluate({}, {"kept": 1}, Context(*outs, batch, key, student, teacher))
    assert state == {"kept": 1} and values.shape == (len(label),)
    return values


@jax.jit
def values_of(loss, s, t, inputs, key=KEY, label=LABEL, index=INDEX):
    return evaluate(loss, network(s), network(t), inputs, key, label, index)


NETWORKS = pytest.mark.parametrize(("shape", "classes", "widths"), [(FLAT, 3, (4, 6)), (IMAGE, 3, (0, 5)), (IMAGE, 1, (4, 0))])


def pair(shape, classes, widths):
    """Two networks, an input and labels for them."""
    s, t = (draw(seed, shape, classes, hidden) for seed, hidden in enumerate(widths))
    return s, t, inputs_of(shape), np.minimum(LABEL, max(classes, 2) - 1)


@NETWORKS
def test_the_reference_jacobian_is_the_limit_of_differences(shape, classes, widths):
    _, t, x, _ = pair(shape, classes, widths)
    step = 1e-5
    for d in range(x[0].size):
        shift = np.zeros(x[0].size)
        shift[d] = step
        shift = shift.reshape(shape)
        differences = (reference.logits(t, x + shift) - reference.logits(t, x - shift)) / (2 * step)
        np.testing.assert_allclose(reference.jacobians(t, x)[:, :, d], differences, atol=1e-8)


@NETWORKS
@pytest.mark.parametrize("reduction", ["half_sum", "half_norm", "mean"])
def test_input_gradient_of_each_example(shape, classes, widths, reduction):
    s, t, x, label = pair(shape, classes, widths)
    with jax.enable_x64(True):
        values = values_of(InputGradient(reduction=reduction), s, t, x, label=label)
        assert values.dtype == jnp.float64
    np.testing.assert_allclose(values, reference.input_gradient(s, t, x, label, reduction), rtol=1e-10)


def test_input_gradient_of_affine_networks_in_closed_form():
    """d CE / d x = W (p - y): two networks of equal weights differ by W (p_s - p_t)."""
    s, t, x, _ = pair(FLAT, 3, (0, 0))
    t["w2"] = s["w2"]
    with jax.enable_x64(True):
        values = values_of(InputGradient(), s, t, x)
        p_s, p_t = (np.asarray(jax.nn.softmax(reference.logits(net, x))) for net in (s, t))
    np.testing.assert_allclose(values, (((p_s - p_t) @ s["w2"].T) ** 2).sum(1) / 2, rtol=1e-10)


def directions(form: str, classes: int, z_t: np.ndarray, label: np.ndarray, projections: int) -> list[list[np.ndarray]]:
    eye = np.eye(classes)
    if form == "random":  # called within enable_x64
        draws = [jax.random.normal(jax.random.fold_in(KEY, i), (projections, classes)) for i in INDEX]
        return [[v / np.linalg.norm(v) for v in np.asarray(d)] for d in draws]
    if form == "full":
        return [list(eye)] * len(z_t)
    chosen = np.zeros(len(z_t), int) if classes == 1 else z_t.argmax(1) if form == "top" else label
    return [[eye[c]] for c in chosen]


@pytest.mark.parametrize(("shape", "classes", "widths"), [(FLAT, 3, (4, 6)), (IMAGE, 1, (4, 0))])
@pytest.mark.parametrize(
    "config",
    [
        {},
        pytest.param({"normalisation": "none", "reduction": "mean"}, marks=pytest.mark.slow),
        {"form": "label", "reduction": "mean"},
        pytest.param({"form": "random", "projections": 4}, marks=pytest.mark.slow),
        {"form": "random", "projections": 2, "normalisation": "unit", "reduction": "mean"},
        {"form": "full"},
        pytest.param({"form": "full", "normalisation": "unit"}, marks=pytest.mark.slow),
    ],
)
def test_jacobian_of_each_example(shape, classes, widths, config):
    s, t, x, label = pair(shape, classes, widths)
    loss = JacobianMatching(**config)
    with jax.enable_x64(True):
        values = values_of(loss, s, t, x, label=label)
        vs = directions(loss.form, classes, reference.logits(t, x), label, loss.projections)
    unit = config.get("normalisation", "unit" if loss.form in ("top", "label") else "none") == "unit"
    expected = reference.jacobian_matching(s, t, x, vs, unit, loss.reduction)
    np.testing.assert_allclose(values, expected / (loss.projections if loss.form == "random" else 1), rtol=1e-10)


@pytest.mark.slow
def test_random_projections_are_fresh_for_each_key_and_row_and_estimate_the_whole_jacobian():
    s, t, x, _ = pair(FLAT, 3, (4, 6))
    one, many = (JacobianMatching(form="random", projections=n) for n in (1, 4000))
    full = values_of(JacobianMatching(form="full"), s, t, x)
    np.testing.assert_allclose(values_of(many, s, t, x), full / 3, rtol=0.05)
    values, other = values_of(one, s, t, x), values_of(one, s, t, x, key=jax.random.key(6))
    assert np.all(np.abs(values - other) > 1e-4)
    order = np.array([4, 2, 0, 3, 1])
    moved = values_of(one, s, t, x[order], label=LABEL[order], index=INDEX[order])
    np.testing.assert_allclose(moved, values[order], rtol=1e-5)
    assert np.abs(values_of(one, s, t, x[[0] * 5]) - values[0]).max() > 1e-3  # equal rows, each with its own vector


def test_a_unit_jacobian_sees_direction_only():
    s, t, x, _ = pair(FLAT, 3, (0, 0))
    t["b2"] = np.array([100.0, 0, 0])  # the greatest logit of every example
    for scale, expected in ((7.0, 0), (-3.0, 4)):
        s["w2"][:, 0] = scale * t["w2"][:, 0]
        np.testing.assert_allclose(values_of(JacobianMatching(), s, t, x), np.full(5, expected), atol=1e-5)


def test_a_label_outside_the_classes_counts_nothing():
    s, t, x, _ = pair(FLAT, 3, (0, 0))
    values = values_of(JacobianMatching(form="label"), s, t, x, label=np.array([0, 3, -1, 2, 1], np.int32))
    assert np.array_equal(values > 0, [True, False, False, True, True]) and np.all(values[1:3] == 0)


@NETWORKS
@pytest.mark.parametrize(("power", "distance"), [(2.0, "mse"), (0.7, "mse"), (1.0, "l2")])
def test_gradient_attention_of_each_example(shape, classes, widths, power, distance):
    s, t, x, label = pair(shape, classes, widths)
    with jax.enable_x64(True):
        values = values_of(GradientAttention(power=power, distance=distance), s, t, x, label=label)
    expected = reference.gradient_attention(s, t, x, label, power, distance)
    np.testing.assert_allclose(values, expected, rtol=1e-9, atol=1e-14)


def test_gradient_attention_of_confident_networks_is_that_of_unsure_ones():
    """Of two classes the map is that of |w_1 - w_0| whatever the confidence, here 1 - p near 1e-8 and near 1e-13."""
    s, t, x, _ = pair(FLAT, 2, (0, 0))
    unsure = values_of(GradientAttention(), s, t, x, label=np.zeros(5, np.int32))
    for margin in (18, 30):
        sure = [net | {"b2": net["b2"] + [margin, 0]} for net in (s, t)]
        np.testing.assert_allclose(values_of(GradientAttention(), *sure, x, label=np.zeros(5, np.int32)), unsure, rtol=1e-3)


CASES = [
    InputGradient(),
    InputGradient(reduction="half_norm"),
    JacobianMatching(),
    JacobianMatching(form="label", reduction="mean"),
    JacobianMatching(form="random", projections=2),
    JacobianMatching(form="full"),
    GradientAttention(),
    GradientAttention(distance="l2"),
]
QUICK = ("InputGradient-half_sum", "JacobianMatching-top-auto-sum-1", "GradientAttention-2.0-mse")
"""One of each class."""
NAMED = {"-".join([type(c).__name__, *map(str, vars(c).values())]): c for c in CASES}
EVERY = pytest.mark.parametrize("loss", slow_but(QUICK, NAMED))


@EVERY
def test_the_students_gradient_is_the_limit_of_differences_and_the_teacher_has_none(loss):
    with jax.enable_x64(True):
        s, t, x, _ = pair(IMAGE, 3, (4, 5))
        mean = lambda s, t: evaluate(loss, network(s), network(t), x).mean()  # noqa: E731
        value_and_grads = jax.jit(jax.value_and_grad(mean, argnums=(0, 1)))
        _, (of_student, of_teacher) = value_and_grads(s, t)
        assert all(not np.any(leaf) for leaf in jax.tree.leaves(of_teacher))
        random, step = np.random.RandomState(3), 1e-5
        for name in ("w1", "b1", "w2"):
            shift = random.randn(*s[name].shape)
            up, down = (value_and_grads(s | {name: s[name] + sign * step * shift}, t)[0] for sign in (1, -1))
            slope = (of_student[name] * shift).sum()
            assert abs(slope) > 1e-7
            np.testing.assert_allclose(slope, (up - down) / (2 * step), rtol=1e-5, atol=1e-9)


@EVERY
@pytest.mark.parametrize(("dtype", "classes"), [(jnp.float32, 1), (jnp.bfloat16, 3)])
def test_finite_at_extreme_and_at_dead_networks(loss, dtype, classes):
    base = {k: jnp.asarray(v, dtype) for k, v in draw(0, FLAT, classes, 4).items()}
    large = base | {"w2": jnp.where(base["w2"] > 0, 1e4, -1e4).astype(dtype)}
    dead = jax.tree.map(jnp.zeros_like, base)
    still = base | {"w2": 0 * base["w2"]}
    x, label = inputs_of(FLAT, np.float32), np.minimum(LABEL, max(classes, 2) - 1)

    @jax.jit
    def value_and_grads(s, t):
        return jax.value_and_grad(lambda s: evaluate(loss, network(s), network(t), x, label=label).mean())(s)

    for student, teacher in ((large, base), (base, large), (large, large), (dead, large), (large, dead), (dead, dead),
                             (still, base), (base, base)):  # fmt: skip
        value, grads = value_and_grads(student, teacher)
        assert value.dtype == jnp.float32 and np.isfinite(value)
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(grads))
        if student is teacher:
            np.testing.assert_allclose(value, 0, atol=1e-3 if dtype == jnp.float32 else 0.1)


@pytest.mark.parametrize("loss", slow_but(["JacobianMatching-top-auto-sum-1"], {name: NAMED[name] for name in QUICK}))
def test_a_relu_network_learns_and_jit_is_eager(loss):
    student, teacher = (from_linen(MLP(outputs=3, widths=widths)) for widths in ((8,), (6, 6)))
    x = jnp.asarray(inputs_of(IMAGE, np.float32))
    (p_s, state_s), (p_t, state_t) = student.init(jax.random.key(1), x), teacher.init(jax.random.key(2), x)

    def bound(model, params, state):
        return Network(lambda x: model.apply(params, state, x, key=KEY, train=True)[0], lambda e: model.head(params, e))

    def values(params, x):
        return evaluate(loss, bound(student, params, state_s), bound(teacher, p_t, state_t), x)

    @jax.jit
    def step(params, x):
        def mean(params):
            out = values(params, x)
            return out.mean(), out

        return jax.value_and_grad(mean, has_aux=True)(params)

    (before, jitted), slope = step(p_s, x)
    assert jitted.dtype == jnp.float32 and np.all(jitted > 1e-7)
    np.testing.assert_allclose(jitted, values(p_s, x), rtol=1e-4)
    others = x.at[1:].multiply(1.5)
    np.testing.assert_allclose(step(p_s, others)[0][1][0], jitted[0], rtol=1e-4)  # per example
    size = sum((leaf**2).sum() for leaf in jax.tree.leaves(slope))
    assert size > 0
    down = jax.tree.map(lambda p, g: p - 1e-3 / size**0.5 * g, p_s, slope)
    assert step(down, x)[0][0] < before
    same = bound(teacher, p_t, state_t)
    np.testing.assert_allclose(evaluate(loss, same, same, x), 0, atol=1e-6)


def test_an_input_that_acts_on_other_examples_is_charged_for_them():
    """A network that subtracts the batch's mean, as BatchNorm does: the derivative of the sum loses its own mean."""
    s, t, x, _ = pair(FLAT, 3, (0, 0))
    centred = [Network(lambda x, net=net: network(net).outputs(x - x.mean(axis=0)), lambda e: e) for net in (s, t)]
    g_s, g_t = (reference.loss_gradients(net, x - x.mean(axis=0), LABEL) for net in (s, t))
    difference = (g_s - g_s.mean(axis=0)) - (g_t - g_t.mean(axis=0))
    np.testing.assert_allclose(evaluate(InputGradient(), *centred, x), (difference**2).sum(1) / 2, rtol=1e-4)


def test_one_program_and_one_vmap_for_all_powers():
    s, t, x, _ = pair(IMAGE, 3, (0, 5))
    losses = [as_leaves(GradientAttention(power=power)) for power in (1.0, 2.0, 3.5)]
    traced = values_of._cache_size()
    single = [values_of(loss, s, t, x) for loss in losses]
    assert values_of._cache_size() <= traced + 1
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *losses)
    np.testing.assert_allclose(jax.vmap(lambda loss: values_of(loss, s, t, x))(stacked), single, rtol=1e-5)


@pytest.mark.parametrize(("name", "weight"), [("input_gradient", 1.0), ("jacobian", 1.0), ("gradient_attention", 1000.0)])
def test_declarations(name, weight):
    option = options("loss")[name]
    assert option.fields["weight"][1] == weight and option.summary
    declared = ("calls_networks", "needs_teacher", "per_example", "zero_at_teacher", "reads_initial")
    assert [getattr(option.target, d) for d in declared] == [True, True, True, True, False]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"name": "input_gradient", "reduction": "sum"}, "loss.reduction must be one of half_sum, half_norm, mean, got 'sum'"),
        ({"name": "jacobian", "form": "tops"}, "loss.form must be one of top, label, random, full, got 'tops'"),
        ({"name": "jacobian", "normalisation": "l2"}, "loss.normalisation must be one of auto, unit, none, got 'l2'"),
        ({"name": "jacobian", "reduction": "half_sum"}, "loss.reduction must be one of sum, mean, got 'half_sum'"),
        ({"name": "jacobian", "form": "random", "projections": 0}, "loss.projections must be positive, got 0"),
        ({"name": "gradient_attention", "power": 0.0}, "loss.power must be positive, got 0.0"),
        ({"name": "gradient_attention", "distance": "mae"}, "loss.distance must be one of mse, l2, got 'mae'"),
    ],
)
def test_bad_options(config, message):
    with pytest.raises(UsageError) as error:
        build("loss", config)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("loss", [InputGradient(), JacobianMatching(), GradientAttention()])
def test_what_these_losses_cannot_work_with(loss):
    net = network(draw(0, FLAT))
    x = jnp.asarray(inputs_of(FLAT, np.float32))
    out, batch = net.outputs(x), {"inputs": x, "label": LABEL, "index": INDEX}
    with pytest.raises(UsageError, match=r"^this loss needs a teacher"):
        loss.init(KEY, out, None)
    with pytest.raises(UsageError, match=r"^this loss needs a teacher"):
        loss.evaluate({}, {}, Context(out, None, batch, KEY, net, net))
    with pytest.raises(UsageError, match=r"^teacher must be a network for this loss.* got a table of outputs"):
        loss.evaluate({}, {}, Context(out, out, batch, KEY, net))
    with pytest.raises(UsageError, match=r"^inputs must be floats for a loss on derivatives, got int32"):
        loss.evaluate({}, {}, Context(out, out, batch | {"inputs": x.astype(int)}, KEY, net, net))


def test_jacobians_of_other_numbers_of_logits():
    outs = [Outputs(jax.ShapeDtypeStruct((2, classes), jnp.float32), {}) for classes in (3, 4)]
    assert InputGradient().init(KEY, *outs) == GradientAttention().init(KEY, *outs) == {}
    with pytest.raises(UsageError, match="student and teacher must have as many logits as each other, got 3 and 4"):
        JacobianMatching().init(KEY, *outs)
