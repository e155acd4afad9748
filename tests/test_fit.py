"""The loop: cutting an epoch into blocks, stopping and going on, changes nothing."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from jdistill.checkpoint import Checkpoints
from jdistill.compress import MagnitudePrune, apply_all
from jdistill.errors import RunError, UsageError
from jdistill.fit import fit_one as fit
from jdistill.fitting import CheckpointPolicy, steps_per_epoch
from jdistill.losses import LogitMSE, Residual
from jdistill.method import Stage, Term
from jdistill.registry import build
from jdistill.run import run
from jdistill.schemes import Continual, FineTune, Self, TwoStage
from jdistill.standing import Diverged, Interrupted
from jdistill.teachers.targets import Live
from jdistill.types import Context
from tests import tiny
from tests.marks import slow_but
from tests.tiny import StopAfter, assert_close, assert_same_bits, setup

BANK = Term(name="crd", teacher="teacher", loss=build("loss", {"name": "crd", "negatives": 8, "embedding_size": 4}))


def by_scheme(scheme, *, data=None, student=tiny.DROPPING, **changes):
    """A scenario in which `scheme` trains what it trains beside the student."""
    teacher = tiny.TEACHER if scheme.frozen() else None
    own = {"own": tiny.method(scheme=scheme, student=student, epochs=2, **changes)}
    return {**own, "parts": tiny.parts(student, teacher, tiny.AUGMENT, scheme=scheme), **({"data": data} if data else {})}


SCENARIOS = {
    "one stage": {"own": tiny.method()},
    "two stages": {"own": tiny.method(scheme=TwoStage(init_epochs=2), epochs=2)},
    "pruned": {"own": tiny.method(compressor=MagnitudePrune(recover_epochs=2), epochs=2)},
    "pruned twice best_val": {"own": tiny.method(compressor=MagnitudePrune(recover_epochs=3), epochs=2), "select": "accuracy"},
    "best_val": {"own": tiny.method(epochs=4, lr=0.1), "select": "accuracy"},
    "all rows": {"own": tiny.method(epochs=2, drop_last=False)},
    "streamed": {"own": tiny.method(epochs=2), "resident": False},
    "loop": {"own": tiny.method(epochs=2), "strategy": "loop"},
}
SCHEMES = {
    "three generations": by_scheme(Self(generations=2)),
    "average": by_scheme(Self(form="average", decay=0.9)),
    "low rank, then pruned": by_scheme(
        FineTune(body="low_rank", epochs=2, rank=2), compressor=MagnitudePrune(recover_epochs=1), student=tiny.CONVOLUTIONAL
    ),
    "two groups of classes": by_scheme(Continual(old=(0, 2), heads="all"), data=tiny.data(80)),
    "memory bank": {"own": tiny.method(distil=BANK, epochs=2)},
}
SCENARIOS |= SCHEMES


def every_scenario(values, of_schemes, quick):
    """Each scenario with each of `values`; those with schemes, which are larger, with one. All but `quick` are slow."""
    cases = [(key, value) for key in SCENARIOS for value in ((of_schemes,) if key in SCHEMES else values)]
    return pytest.mark.parametrize("case", slow_but(quick, {f"{key}-{value}": (SCENARIOS[key], value) for key, value in cases}))


_whole = {}


def whole(changes, folder):
    """What an uninterrupted run without checkpoints gives, and its metrics file."""
    key = next(name for name, own in SCENARIOS.items() if own is changes)
    if key not in _whole:
        _whole[key] = fit(setup(folder / "whole", **changes, checkpoints=None)), (folder / "whole/metrics.jsonl").read_bytes()
    return _whole[key]


def assert_same_run(found, folder, expected):
    fitted, lines = expected
    assert_same_bits(found.state, fitted.state)
    assert_same_bits(found.variables, fitted.variables)
    assert (found.epoch, found.train_metrics) == (fitted.epoch, fitted.train_metrics)
    assert (folder / "metrics.jsonl").read_bytes() == lines


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@every_scenario((1, 7), 3, ("two stages-7", "pruned-7", "all rows-1", "streamed-7", "loop-7", "memory bank-3"))
def test_blocks_of_any_length_are_one_run(case, tmp_path):
    changes, every_steps = case
    expected = whole(changes, tmp_path)
    kept = Kept(tmp_path / "checkpoints")
    found = fit(setup(tmp_path, **changes, every_steps=every_steps, checkpoints=kept))
    assert_same_run(found, tmp_path, expected)
    assert kept.steps == list(range(every_steps, int(found.state.step) + 1, every_steps))


class Kept(Checkpoints):
    """Notes when checkpoints would be written, and writes none."""

    def __init__(self, folder):
        super().__init__(folder)
        self.steps = []

    def save(self, stage, step, tree, rows=None):
        self.steps.append(step)


STOPPED = (
    "two stages-3", "pruned twice best_val-3", "all rows-1", "streamed-3", "loop-3", "average-1", "two groups of classes-1",
    "memory bank-1",
)  # fmt: skip


@every_scenario((1, 3), 1, STOPPED)
def test_stopping_and_going_on_is_one_run(case, tmp_path):
    """Stopped at every `calls`-th chance until it is through: in epochs, at their ends, at the ends of stages."""
    changes, calls = case
    expected, sessions, found = whole(changes, tmp_path), 0, None
    while found is None:
        try:
            found = fit(setup(tmp_path, **changes, every_steps=4 if calls > 1 else 7, stop=StopAfter(calls)))
        except Interrupted:
            sessions += 1
            assert (tmp_path / "metrics.jsonl").read_bytes() == expected[1][: (tmp_path / "metrics.jsonl").stat().st_size]
        assert sessions < 40
    assert sessions >= 1
    assert_same_run(found, tmp_path, expected)


def test_a_killed_session_forgets_what_came_after_its_checkpoint(tmp_path):
    changes = SCENARIOS["pruned twice best_val"]
    expected = whole(changes, tmp_path)
    with pytest.raises(Interrupted):
        fit(setup(tmp_path, **changes, every_steps=7, stop=StopAfter(3)))
    (name,) = [path.name for path in (tmp_path / "checkpoints").iterdir()]
    shutil.copytree(tmp_path / "checkpoints" / name, tmp_path / "copy")
    with pytest.raises(Interrupted):
        fit(setup(tmp_path, **changes, every_steps=7, stop=StopAfter(3)))
    shutil.rmtree(tmp_path / "checkpoints")
    shutil.copytree(tmp_path / "copy", tmp_path / "checkpoints" / name)  # as if the second session had been killed
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"half')
    assert_same_run(fit(setup(tmp_path, **changes, every_steps=7)), tmp_path, expected)


def test_going_on_after_the_last_step_gives_the_same_result(tmp_path):
    expected = whole(SCENARIOS["one stage"], tmp_path)
    for _ in range(2):
        found = fit(setup(tmp_path, **SCENARIOS["one stage"], policy=CheckpointPolicy(every_epochs=1)))
        assert_same_run(found, tmp_path, expected)


def test_a_foreign_checkpoint_is_refused(tmp_path):
    fit(setup(tmp_path, tiny.method(epochs=1), policy=CheckpointPolicy(every_epochs=1)))
    with pytest.raises(RunError, match=r"of other shapes|cannot be read"):
        fit(setup(tmp_path, tiny.method(epochs=1, kind="sgd"), policy=CheckpointPolicy(every_epochs=1)))


# -- forms of the loop


@pytest.mark.parametrize("drop_last", [pytest.param(True, marks=pytest.mark.slow), False])
def test_loop_block_and_stream_agree(drop_last, tmp_path):
    with jax.enable_x64(True):
        data, fitted = tiny.data(dtype=np.float64), {}
        for name, form in {"block": {}, "loop": {"strategy": "loop"}, "stream": {"resident": False}}.items():
            own = setup(tmp_path / name, tiny.method(drop_last=drop_last), data=data, **form)
            own = dataclasses.replace(own, frozen=tiny.as_float64(own.frozen))
            own = tiny.with_member(own, initial=tiny.as_float64(own.members[0].initial))
            fitted[name] = fit(own).state.params
        assert_close(fitted["loop"], fitted["block"], rtol=1e-10, atol=1e-12)
        assert_same_bits(fitted["stream"], fitted["loop"])
        assert jax.tree.leaves(fitted["loop"])[0].dtype == np.float64


def test_streamed_data_may_be_a_memory_map(tmp_path):
    data = tiny.data()
    np.save(tmp_path / "inputs.npy", data["inputs"])
    mapped = {"inputs": np.load(tmp_path / "inputs.npy", mmap_mode="r"), "label": data["label"]}
    expected = whole(SCENARIOS["streamed"], tmp_path)
    assert_same_run(fit(setup(tmp_path, **SCENARIOS["streamed"], data=mapped, checkpoints=None)), tmp_path, expected)


@pytest.mark.parametrize(("drop_last", "steps", "examples"), [(True, 5, 40), (False, 6, 44)])
def test_every_row_is_seen_as_often_as_it_should(drop_last, steps, examples, tmp_path):
    own = tiny.method(epochs=2, drop_last=drop_last)
    assert steps_per_epoch(own.stages[0], tiny.EXAMPLES) == steps
    seen = []
    fitted = fit(setup(tmp_path, own, progress=lambda *report: seen.append(report)))
    assert int(fitted.state.step) == 2 * steps and [row["step"] for row in rows(tmp_path)] == [steps, 2 * steps]
    assert seen[-1][:3] == ("distil", 2 * steps, 2 * steps)
    assert all(set(row["train"]) == {"loss", "accuracy", "cross_entropy", "kd"} for row in rows(tmp_path))
    assert fitted.train_metrics == rows(tmp_path)[-1]["train"]
    hits = fitted.train_metrics["accuracy"] * examples  # of exactly so many examples
    np.testing.assert_allclose(hits, round(hits), atol=1e-4)


def test_a_batch_larger_than_the_data(tmp_path):
    with pytest.raises(UsageError, match=r"^optim\.batch_size is 45, but there are 44 training examples"):
        steps_per_epoch(tiny.method(batch_size=45).stages[0], 44)
    assert int(fit(setup(tmp_path, tiny.method(batch_size=45, drop_last=False))).state.step) == 3


# -- stages, selection


def test_stages_follow_each_other(tmp_path):
    fit(setup(tmp_path, tiny.method(scheme=TwoStage(init_epochs=2), compressor=MagnitudePrune(recover_epochs=1), epochs=2)))
    found = [(row["stage"], row["epoch"], row["step"]) for row in rows(tmp_path)]
    assert found == [("hint", 1, 5), ("hint", 2, 10), ("distil", 3, 15), ("distil", 4, 20), ("recover1", 5, 25)]
    assert set(rows(tmp_path)[0]["train"]) == {"loss", "accuracy", "kd"}


def test_masked_weights_stay_zero_through_recovery(tmp_path):
    own = tiny.method(compressor=MagnitudePrune(sparsity=0.5, recover_epochs=3), weight_decay=0.01)
    fitted = fit(setup(tmp_path, own))
    (mask,) = fitted.states
    effective = apply_all((MagnitudePrune(sparsity=0.5),), fitted.variables[0], fitted.states)
    for layer in ("fc1", "fc"):
        kept, kernel = np.asarray(mask[f"{layer}/kernel"]), np.asarray(effective[layer]["kernel"])
        assert (kept == 0).sum() == kept.size // 2 and np.all(kernel[kept == 0] == 0) and np.all(kernel[kept == 1] != 0)
    before = fit(setup(tmp_path / "before", tiny.method(weight_decay=0.01))).variables[0]["fc"]["kernel"]
    magnitude = np.abs(np.asarray(before))
    np.testing.assert_array_equal(np.sort(magnitude[np.asarray(mask["fc/kernel"]) == 0]), np.sort(magnitude.ravel())[:9])
    assert np.any(effective["fc"]["kernel"] != before * mask["fc/kernel"])  # and the others went on


def test_best_val_reports_the_first_of_the_best_epochs(tmp_path):
    own, kept = setup(tmp_path, tiny.method(epochs=8, lr=0.1), select="accuracy"), {}

    def evaluate(params, state, inner=own.evaluate):
        row = inner(params, state)(0)
        kept[len(kept) + 1] = row["accuracy"], jax.tree.map(np.array, (params, state))
        return lambda _: row

    fitted = fit(dataclasses.replace(own, evaluate=evaluate))
    values = [value for value, _ in kept.values()]
    best = 1 + int(np.argmax(values))
    assert best < 8 and fitted.epoch == best and len(values) == 8
    assert_same_bits(fitted.variables, kept[best][1])
    assert [row["validation"]["accuracy"] for row in rows(tmp_path)] == values


def test_evaluation_happens_when_asked_and_at_the_end_of_a_stage(tmp_path):
    fit(setup(tmp_path, tiny.method(epochs=5), evaluate_every=2))
    assert [row["epoch"] for row in rows(tmp_path) if "validation" in row] == [2, 4, 5]
    fit(setup(tmp_path / "none", tiny.method(epochs=2), evaluate=None))
    assert not any("validation" in row for row in rows(tmp_path / "none"))


def test_a_loss_that_is_no_number_is_divergence(tmp_path):
    with pytest.raises(Diverged, match=r"^diverged: the training loss is not finite in epoch \d \(lower"):
        fit(setup(tmp_path, tiny.method(lr=1e30, kind="sgd")))


def test_the_initial_student_outlives_the_residual_target(tmp_path):
    """Its copy is frozen, while the state's own buffers are donated to the compiled step."""
    own = setup(tmp_path, parts=tiny.parts(), checkpoints=None)
    own_initial = own.members[0].initial
    initial = jax.tree.map(jax.numpy.copy, (own_initial.params["student"], own_initial.model_state["student"]))
    before = jax.tree.map(np.array, initial)
    mse = Term(name="residual", teacher="teacher", loss=Residual(of=LogitMSE()))
    parts = tiny.parts()
    parts = parts._replace(targets=(*parts.targets, ("initial", Live(tiny.STUDENT))))
    stage = Stage(name="s", terms=(mse,), optim=tiny.optimizer(epochs=40))
    method = dataclasses.replace(own.members[0].method, stages=(stage,))
    own = tiny.with_member(own, method=method)
    fitted = fit(dataclasses.replace(own, parts=parts, frozen={**own.frozen, "initial": initial}))
    assert own_initial.params["student"]["fc"]["kernel"].is_deleted()
    assert_same_bits(initial, before)
    losses = [row["train"]["residual"] for row in rows(tmp_path)]
    assert fitted.train_metrics["residual"] == losses[-1] < losses[0] / 2


def test_the_residual_target_is_teacher_minus_initial_student():
    teacher, start = tiny.frozen()["teacher"], tiny.STUDENT.init(jax.random.key(1), tiny.data()["inputs"])
    student, batch = tiny.STUDENT.init(jax.random.key(2), tiny.data()["inputs"]), tiny.batch()
    outputs = {
        name: model.apply(*variables, batch["inputs"])[0]
        for name, model, variables in (
            ("student", tiny.STUDENT, student), ("teacher", tiny.TEACHER, teacher), ("initial", tiny.STUDENT, start)
        )
    }  # fmt: skip
    context = Context(**outputs, batch=batch, key=jax.random.key(0), student_network=None)
    loss = Residual(of=LogitMSE())
    z, t, h = (np.asarray(outputs[name].logits) for name in ("student", "teacher", "initial"))
    np.testing.assert_allclose(loss.evaluate({}, {}, context)[0], ((z - (t - h)) ** 2).mean(1), rtol=1e-5)
    gradient = jax.grad(lambda initial: loss.evaluate({}, {}, context._replace(initial=initial))[0].sum())(outputs["initial"])
    assert not np.any(gradient.logits)
    assert loss.reads_initial and loss.needs_teacher and not loss.zero_at_teacher


def test_a_run_with_the_residual_target(tmp_path):
    small = (("data.examples", 100), ("optim.epochs", 2), ("teacher.optim.epochs", 1), ("evaluate.latency", False))
    given = tiny.config(*small, ("optim.batch_size", 8), loss="residual")
    result = run(given, tmp_path / "run", choices={})
    assert result["status"] == "finished" and result["steps"] == 18 and 0 <= result["metrics"]["test"]["accuracy"] <= 1


@pytest.mark.parametrize("field", ["every_steps", "every_epochs", "every_seconds"])
def test_policies_are_checked(field):
    with pytest.raises(UsageError, match=f"^{field} must be at least 0, got -1"):
        CheckpointPolicy(**{field: -1})
