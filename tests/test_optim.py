"""Optimizers against torch's update rules in NumPy; schedules against the published loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdistill.errors import UsageError
from jdistill.optim import Clock, Optimizer
from jdistill.pytrees import as_leaves
from jdistill.registry import build

STEPS = 7


def clock(step, steps_per_epoch=10.0, epochs=3.0):
    return Clock(jnp.asarray(step), jnp.asarray(steps_per_epoch), jnp.asarray(epochs))


def torch_sgd(param, grads, lr, momentum, weight_decay, nesterov):
    """torch.optim.SGD with dampening 0."""
    path, buffer = [], None
    for grad in grads:
        d = grad + weight_decay * param
        if momentum:
            buffer = d if buffer is None else momentum * buffer + d
            d = d + momentum * buffer if nesterov else buffer
        param = param - lr * d
        path.append(param)
    return path


def torch_adam(param, grads, lr, betas, eps, weight_decay, decoupled):
    """torch.optim.Adam, or AdamW where decoupled."""
    path, m, v = [], np.zeros_like(param), np.zeros_like(param)
    for t, grad in enumerate(grads, start=1):
        if decoupled:
            param = param * (1 - lr * weight_decay)
        else:
            grad = grad + weight_decay * param
        m = betas[0] * m + (1 - betas[0]) * grad
        v = betas[1] * v + (1 - betas[1]) * grad**2
        denominator = np.sqrt(v) / np.sqrt(1 - betas[1] ** t) + eps
        param = param - lr / (1 - betas[0] ** t) * m / denominator
        path.append(param)
    return path


def drawn():
    random = np.random.default_rng(0)
    return random.normal(size=(4, 3)), random.normal(size=(STEPS, 4, 3))


def trajectory(optim):
    """The parameters after each step, in float64."""
    param, grads = drawn()
    with jax.enable_x64(True):
        params, path = {"w": jnp.asarray(param)}, []
        state = optim.init(params)
        for i, grad in enumerate(grads):
            params, state = optim.update({"w": jnp.asarray(grad)}, state, params, clock(i))
            path.append(np.asarray(params["w"]))
    assert path[0].dtype == np.float64
    return path


@pytest.mark.parametrize("weight_decay", [0.0, 5e-2])
@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
def test_sgd_is_torchs(momentum, nesterov, weight_decay):
    optim = Optimizer(kind="sgd", lr=0.05, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay)
    expected = torch_sgd(*drawn(), 0.05, momentum, weight_decay, nesterov)
    np.testing.assert_allclose(trajectory(optim), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("weight_decay", [0.0, 5e-2])
@pytest.mark.parametrize("kind", ["adam", "adamw"])
def test_adam_is_torchs(kind, weight_decay):
    optim = Optimizer(kind=kind, lr=0.02, momentum=0.8, beta2=0.95, eps=1e-3, weight_decay=weight_decay)
    expected = torch_adam(*drawn(), 0.02, (0.8, 0.95), 1e-3, weight_decay, kind == "adamw")
    np.testing.assert_allclose(trajectory(optim), expected, rtol=1e-12, atol=1e-14)


def test_numbers_may_be_traced():
    def run(optim, param, grads):
        state = optim.init(param)
        for i in range(3):
            param, state = optim.update(grads[i], state, param, clock(i))
        return param

    param, grads = (jnp.asarray(a, jnp.float32) for a in drawn())
    for optim in (Optimizer(kind="sgd"), Optimizer(), Optimizer(kind="adamw", schedule="cosine", warmup_epochs=0.5)):
        np.testing.assert_allclose(jax.jit(run)(as_leaves(optim), param, grads), run(optim, param, grads), rtol=1e-5)


def test_the_options_are_the_recipes():
    assert build("optim", {"name": "adam"}) == Optimizer()
    assert build("optim", {"name": "sgd"}) == Optimizer(kind="sgd", lr=0.05, weight_decay=5e-4)
    assert build("optim", {"name": "adamw", "lr": 0.5}) == Optimizer(kind="adamw", lr=0.5, weight_decay=1e-2)


# -- schedules


def rep_distiller(epoch, milestones, rate):
    """`adjust_learning_rate` of RepDistiller: epochs count from 1."""
    return rate ** np.sum(epoch > np.asarray(milestones))


@pytest.mark.parametrize("steps_per_epoch", [1, 391, 781, 5004])
def test_steps_fall_where_rep_distillers_do(steps_per_epoch):
    optim = as_leaves(Optimizer(schedule="step", milestones=(150.0, 180.0, 210.0)))
    first = np.arange(240) * steps_per_epoch
    expected = [rep_distiller(epoch, (150, 180, 210), 0.1) for epoch in range(1, 241)]
    for steps in (first, first + steps_per_epoch // 2, first + steps_per_epoch - 1):
        found = optim.factor(Clock(jnp.asarray(steps, jnp.int32), jnp.float32(steps_per_epoch), jnp.float32(240)))
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_cosine_falls_from_one_to_zero():
    optim, steps = Optimizer(schedule="cosine"), np.arange(31)
    expected = (1 + np.cos(np.pi * steps / 30)) / 2
    np.testing.assert_allclose(optim.factor(clock(steps)), expected, atol=1e-6)
    np.testing.assert_allclose(optim.factor(clock(45)), 0, atol=1e-7)  # past the end it does not rise again


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_warm_up_rises_linearly_and_then_lets_go(schedule):
    steps = np.arange(30)
    plain = Optimizer(schedule=schedule).factor(clock(steps))
    warm = Optimizer(schedule=schedule, warmup_epochs=2.0).factor(clock(steps))
    np.testing.assert_allclose(warm, np.minimum(1, (steps + 1) / 20) * plain, rtol=1e-5)
    assert np.all(plain[1:] <= 1) and np.all(Optimizer().factor(clock(steps)) == 1)


def test_the_step_uses_the_scheduled_rate():
    optim = Optimizer(kind="sgd", momentum=0.0, lr=1.0, schedule="step", milestones=(1.0, 2.0))
    moved = [float(-optim.update(jnp.float32(1), optim.init(jnp.float32(0)), jnp.float32(0), clock(s))[0]) for s in (9, 10, 20)]
    np.testing.assert_allclose(moved, [1, 0.1, 0.01], rtol=1e-6)


BAD = {
    "lr": (0, -1.0, float("nan"), float("inf"), True), "epochs": (0, -3),
    "batch_size": (0, -1), "eps": (0,), "decay": (0, -0.1),
    "weight_decay": (-1e-4, float("nan")), "warmup_epochs": (-1,), "momentum": (1.0, -0.1, 1.5), "beta2": (1.0, -0.1),
    "schedule": ("stpe", "linear"), "kind": ("adma",), "milestones": ((-1.0,), (10.0, float("nan"))),
}  # fmt: skip


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in BAD.items() for value in values])
def test_bad_values_are_refused_by_name(field, value):
    with pytest.raises(UsageError, match=rf"^{field}\b.* must be .*, got ") as error:
        Optimizer(**{field: value})
    assert "\n" not in str(error.value)
    with pytest.raises(UsageError, match=rf"^optim\.{field}\b"):
        build("optim", {"name": "adam", field: value})


def test_a_near_miss_is_named():
    with pytest.raises(UsageError, match="did you mean 'step'"):
        Optimizer(schedule="stpe")
