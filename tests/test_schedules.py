"""Schedules: their values, their place in configs, and that their numbers are arguments of the compiled program."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdistill import blueprint, schedules
from jdistill.compress import MagnitudePrune
from jdistill.errors import UsageError
from jdistill.fit import fit_one as fit
from jdistill.losses import KD
from jdistill.method import Method, Stage
from jdistill.optim import Clock
from jdistill.pytrees import as_leaves, structure_key
from jdistill.registry import build, options
from jdistill.schedules import Schedule
from jdistill.tasks.classification import hits
from tests import tiny

STEPS, EPOCHS = 5, 8


def clock(step: float, epochs: float = EPOCHS) -> Clock:
    return Clock(jnp.int32(step), jnp.float32(STEPS), jnp.float32(epochs))


def form(kind, step, *, start, end, epochs, delay, total=EPOCHS):
    """The schedule in plain Python."""
    length = total - delay if epochs is None else epochs
    passed = step / STEPS - delay
    if passed <= 0:
        t = 0.0
    elif length <= 0:
        t = 1.0
    else:
        t = min(passed / length, 1.0)
    return {
        "constant": start,
        "linear": start + (end - start) * t,
        "cubic": end + (start - end) * (1 - t) ** 3,
        "cosine": end + (start - end) * (1 + math.cos(math.pi * t)) / 2,
        "exponential": start * (end / start) ** t,
    }[kind]


@pytest.mark.parametrize("kind", schedules.KINDS)
@pytest.mark.parametrize(
    "shape",
    [
        {"start": 0.5, "end": 3.0, "epochs": 4.0, "delay": 0.0},
        {"start": 3.0, "end": 0.25, "epochs": 2.5, "delay": 1.5},
        {"start": 1.0, "end": 2.0, "epochs": None, "delay": 0.0},
        {"start": 1.0, "end": 2.0, "epochs": None, "delay": 3.0},
        {"start": 2.0, "end": 1.0, "epochs": 0.0, "delay": 2.0},
        {"start": 2.0, "end": 1.0, "epochs": None, "delay": 9.0},
    ],
)
def test_values(kind, shape):
    with jax.enable_x64(True):
        schedule = Schedule(kind=kind, **shape)
        for step in (0, 1, 4, 7, 10, 11, 20, 29, 39, 40, 1000):
            expected = form(kind, step, **shape)
            np.testing.assert_allclose(schedule(clock(step)), expected, rtol=1e-6, err_msg=f"step {step}")
            np.testing.assert_allclose(jax.jit(schedule)(clock(step)), expected, rtol=1e-6)


def test_the_whole_stage_is_the_default_length_and_the_ends_are_exact():
    for kind in ("linear", "cosine"):
        schedule = Schedule(kind=kind, start=0.25, end=4.0)
        assert schedule(clock(0)) == 0.25 and schedule(clock(STEPS * EPOCHS)) == 4.0 == schedule(clock(10**6))
        assert 0.25 < schedule(clock(STEPS * EPOCHS - 1)) < 4.0 == schedule(clock(20, epochs=4))


@pytest.mark.parametrize(
    ("config", "kind", "first", "last"),
    [
        ({"name": "constant"}, "constant", 1.0, 1.0),
        ({"name": "constant", "start": 3}, "constant", 3.0, 3.0),
        ({"name": "linear"}, "linear", 0.0, 1.0),
        ({"name": "cosine", "start": 2, "end": 0.5}, "cosine", 2.0, 0.5),
        ({"name": "exponential"}, "exponential", 1.0, 1e-3),
        ({"name": "warmup", "end": 7, "epochs": 2}, "linear", 0.0, 7.0),
        ({"name": "annealing"}, "exponential", 1.0, 1e-10),
    ],
)
def test_options(config, kind, first, last):
    loss = build("loss", {"name": "dkd", "alpha": config})
    assert loss.alpha.kind == kind
    np.testing.assert_allclose(loss.alpha(clock(0)), first, rtol=1e-6)
    np.testing.assert_allclose(loss.alpha(clock(1000)), last, rtol=1e-5)


def test_at_the_end_a_schedule_is_the_number_it_comes_to():
    tree = {"a": Schedule(kind="cubic", start=0.0, end=0.9), "b": Schedule(kind="constant", start=3.0), "c": 5.0}
    assert schedules.at_end(tree) == {"a": 0.9, "b": 3.0, "c": 5.0}
    late = schedules.at(tree, clock(10**6))
    assert {name: pytest.approx(float(value)) for name, value in late.items()} == schedules.at_end(tree)


def test_every_option_has_a_line_of_its_own():
    found = {name: option.summary for name, option in options("schedule").items()}
    assert set(found) == {"constant", "linear", "cubic", "cosine", "exponential", "warmup", "annealing"}
    assert len(set(found.values())) == 7 and all(found.values())


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"name": "linear", "start": 4, "end": -1}, "loss.temperature must be positive, got -1"),
        ({"name": "warmup"}, "loss.temperature must be positive, got 0"),
        ({"name": "linear", "delay": -1}, "loss.temperature: schedule.delay must be at least 0, got -1"),
        ({"name": "linear", "epochs": -2.0}, "loss.temperature: schedule.epochs must be at least 0, got -2.0"),
        (
            {"name": "exponential", "end": 0.0},
            "loss.temperature: schedule.end must be positive for an exponential schedule, got",
        ),
        ({"name": "linaer"}, "loss.temperature: unknown schedule 'linaer'; did you mean 'linear'?"),
        ({"name": "linear", "stop": 3}, "loss.temperature: unknown key 'schedule.stop'"),
        ({"start": 1}, "loss.temperature must be a number, or a schedule such as"),
        ("hot", "loss.temperature must be a number, or a schedule such as {name: linear, start: 0, end: 1}, got 'hot'"),
        (True, "loss.temperature must be a number, or a schedule"),
        (None, "loss.temperature must be a number, or a schedule"),
    ],
)
def test_bad_schedules(value, message):
    with pytest.raises(UsageError) as error:
        build("loss", {"name": "kd", "temperature": value})
    assert str(error.value).startswith(message) and "\n" not in str(error.value), str(error.value)


def test_an_unknown_kind_is_refused():
    with pytest.raises(UsageError, match=r"^kind must be one of constant, linear, cubic, cosine, exponential, got 'sine'"):
        Schedule(kind="sine")


def test_static_fields_and_integers_take_no_schedule():
    warmup = {"name": "warmup"}
    assert "weight" in options("loss")["kd"].numbers and "temperature" in options("loss")["kd"].numbers
    assert "student_layer" not in options("loss")["hint"].numbers
    read = blueprint.read(tiny.config(("loss.weight", warmup), ("task.weight", {"name": "cosine", "start": 1, "end": 0.5})))
    task, distil = read.method().stages[0].terms
    assert isinstance(distil.weight, Schedule) and isinstance(task.weight, Schedule)
    for key, message in (("loss.weight", "loss.weight must be at least 0, got -1"), ("task.weight", "task.weight must be at")):
        with pytest.raises(UsageError, match=rf"^{message}"):
            blueprint.read(tiny.config((key, {"name": "linear", "start": 1, "end": -1})))


def test_schedules_of_one_kind_share_a_program_whatever_their_numbers():
    def key(**changes):
        return structure_key(as_leaves(tiny.method(distil=tiny.kd(weight=Schedule(kind="linear", **changes)))))

    assert key() == key(start=0.5, end=9.0, delay=2.0) != key(epochs=3.0) == key(epochs=1.0)
    assert (
        key()
        != structure_key(as_leaves(tiny.method()))
        != structure_key(as_leaves(tiny.method(distil=tiny.kd(weight=Schedule(kind="cosine")))))
    )


def test_a_tree_has_its_schedules_replaced_wherever_they_are():
    tree = {"a": (Schedule(kind="linear"), 3.0), "b": KD(temperature=Schedule(kind="linear", start=1.0, end=5.0))}
    found = schedules.at(tree, clock(STEPS * EPOCHS // 2))
    assert found["a"] == (0.5, 3.0) and found["b"] == KD(temperature=3.0)
    assert schedules.at(tree, schedules.START)["b"].temperature == 1.0


def test_a_swept_schedule_is_the_loop_over_its_numbers():
    members = [as_leaves(Schedule(kind="exponential", start=s, end=e)) for s, e in ((1.0, 0.1), (3.0, 9.0), (0.5, 0.5))]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)
    now = clock(13)
    together = jax.jit(jax.vmap(lambda schedule: schedule(now)))(stacked)
    np.testing.assert_allclose(together, [member(now) for member in members], rtol=1e-6)


# -- in training


def train(folder, distil, parts=None, **changes):
    own = changes.pop("own", None) or tiny.method(distil=distil, epochs=4)
    made = tiny.setup(folder, own, parts=parts or tiny.parts(), checkpoints=None, evaluate=None, **changes)
    fitted = fit(made)
    return fitted, [json.loads(line)["train"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_scheduled_weight_changes_the_objective_and_not_the_terms_metric(tmp_path):
    _, rows = train(tmp_path, tiny.kd(weight=Schedule(kind="linear", start=0.0, end=4.0, epochs=2.0, delay=1.0)))
    weights = [(row["loss"] - row["cross_entropy"]) / row["kd"] for row in rows]  # means over an epoch of 5 steps
    assert abs(weights[0]) < 1e-5
    np.testing.assert_allclose(weights[1:], [0.8, 2.8, 4.0], rtol=0.2)  # of steps 5 to 9: 0, 0.4 ... 1.6
    np.testing.assert_allclose(weights[3], 4.0, rtol=1e-5)


def test_a_weight_of_zero_for_now_trains_as_without_the_term(tmp_path):
    later = Schedule(kind="linear", start=0.0, end=1.0, delay=100.0)
    scheduled, _ = train(tmp_path / "a", tiny.kd(weight=later))
    plain, _ = train(
        tmp_path / "b", None, own=Method(stages=(Stage(name="s", terms=(tiny.TASK,), optim=tiny.optimizer(epochs=4)),))
    )
    tiny.assert_close(scheduled.state.params["student"], plain.state.params["student"], rtol=1e-4, atol=1e-6)


def test_a_scheduled_temperature_is_the_number_of_that_step(tmp_path):
    """A constant schedule trains as its number does; another value in a later epoch changes that epoch first."""
    number, rows = train(tmp_path / "number", tiny.kd(temperature=3.0))
    constant, same = train(tmp_path / "constant", tiny.kd(temperature=Schedule(kind="constant", start=3.0)))
    np.testing.assert_allclose([row["kd"] for row in same], [row["kd"] for row in rows], rtol=1e-5)
    tiny.assert_close(constant.state.params["student"], number.state.params["student"], rtol=1e-4, atol=1e-6)
    late = Schedule(kind="linear", start=3.0, end=0.3, epochs=0.0, delay=2.0)
    _, other = train(tmp_path / "late", tiny.kd(temperature=late))
    np.testing.assert_allclose([row["kd"] for row in other[:2]], [row["kd"] for row in rows[:2]], rtol=1e-5)
    assert abs(other[2]["kd"] / rows[2]["kd"] - 1) > 0.01 and other[2]["cross_entropy"] != rows[2]["cross_entropy"]


def test_the_clock_begins_anew_with_each_stage(tmp_path):
    warm = tiny.kd(weight=Schedule(kind="linear", start=0.0, end=2.0, epochs=0.0, delay=1.0))
    own = tiny.method(distil=warm, compressor=MagnitudePrune(recover_epochs=2), epochs=2)
    _, rows = train(tmp_path, None, own=own)
    weights = [(row["loss"] - row["cross_entropy"]) / row["kd"] for row in rows]
    np.testing.assert_allclose(weights[1::2], [1.6, 1.6], rtol=0.2)  # four steps of five
    assert all(weight < 0.1 for weight in weights[::2])


def test_numbers_of_schedules_never_recompile(tmp_path):
    traces, results = [], []

    def observe(outputs, batch):
        traces.append(outputs.logits.shape)
        return hits(outputs, batch)

    parts = tiny.parts(observe=observe)
    for i, changes in enumerate(({}, {"end": 5.0}, {"start": 0.5}, {"delay": 2.0})):
        schedule = Schedule(kind="cosine", **{"start": 0.1, "end": 1.0, **changes})
        fitted, _ = train(tmp_path / f"{i}", tiny.kd(weight=schedule), parts=parts)
        results.append(np.asarray(fitted.state.params["student"]["fc"]["kernel"]).tobytes())
    assert len(traces) == 1 and len(set(results)) == 4
    train(tmp_path / "other", tiny.kd(weight=dataclasses.replace(schedule, kind="linear")), parts=parts)
    assert len(traces) == 2
