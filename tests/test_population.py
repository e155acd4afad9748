"""A population is its members' solo runs: results, selection, early ends, and however it is cut up."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from jdistill import stacking
from jdistill.checkpoint import Checkpoints
from jdistill.compress import MagnitudePrune
from jdistill.fit import fit
from jdistill.fitting import CheckpointPolicy, Member, sample_of
from jdistill.losses import LogitMSE, Residual
from jdistill.method import Term
from jdistill.records import MetricsFile
from jdistill.schemes import FineTune, TwoStage
from jdistill.stages import init_state
from jdistill.standing import Diverged, Interrupted, Pruned, Standing
from jdistill.teachers.targets import Live
from jdistill.train import Keys
from tests import tiny
from tests.marks import slow_but
from tests.tiny import StopAfter, assert_close, assert_same_bits

NUMBERS = ((0, 2.0, 0.02), (1, 4.0, 0.02), (2, 4.0, 0.05), (3, 1.0, 0.01))
"""(seed, temperature, learning rate) of each member."""


def members(folder, parts, data, numbers=NUMBERS, *, wide=True, **method):
    made = []
    for seed, temperature, lr in numbers:
        own, keys = tiny.method(distil=tiny.kd(temperature=temperature), lr=lr, **method), Keys.of(seed)
        initial = init_state(parts, keys.init, sample_of(data))
        initial = tiny.as_float64(initial) if wide else initial
        made.append(Member(own, keys, MetricsFile(folder / f"{seed}.jsonl"), initial))
    return tuple(made)


def population(folder, *, parts=None, data=None, numbers=NUMBERS, wide=True, method=None, frozen=None, **changes):
    """A population in `folder`; `wide` in float64."""
    folder.mkdir(exist_ok=True)
    parts = parts or tiny.parts(tiny.DROPPING, augment=tiny.AUGMENT)
    data = data or tiny.data(dtype=np.float64 if wide else np.float32)
    frozen = frozen or tiny.frozen()
    made = members(folder, parts, data, numbers, wide=wide, **(method or {}))
    frozen = tiny.as_float64(frozen) if wide else frozen
    base = tiny.setup(folder, parts=parts, data=data, frozen=frozen, stacked=True, **changes)
    return dataclasses.replace(base, members=made)


def alone(folder, **given):
    """The same members, each by itself."""
    found = []
    for number in given.pop("numbers", NUMBERS):
        own = folder / f"alone{number[0]}"
        setup = population(own, numbers=(number,), **given)
        found += fit(as_single(setup))
    return found


def as_single(setup):
    evaluate = setup.evaluate
    base = tiny.setup(setup.checkpoints.folder.parent, parts=setup.parts) if evaluate else None
    return dataclasses.replace(setup, stacked=False, evaluate=base.evaluate if base else None)


def lines(folder, seed):
    return [json.loads(line) for line in (folder / f"{seed}.jsonl").read_text().splitlines()]


CASES = {
    "dropout and augmentation": {},
    "all rows, by steps": {"method": {"drop_last": False, "epochs": 2}, "strategy": "loop"},
    "two stages": {"method": {"scheme": TwoStage(init_epochs=1), "epochs": 2}},
    "pruned, then recovered": {"method": {"compressor": MagnitudePrune(recover_epochs=1), "epochs": 2}},
    "low rank": {"method": {"scheme": FineTune(body="low_rank", epochs=1, rank=2), "epochs": 1}},
    "best epoch": {"method": {"epochs": 5}, "select": "accuracy"},
    "patience": {"method": {"epochs": 9}, "patience": 2},
    "patience and best epoch": {"method": {"epochs": 9}, "patience": 1, "select": "accuracy"},
    # SGD, as Adam divides the rounding of a gradient that is 0 (a bias before BatchNorm) by itself
    "convolutions and BatchNorm": {"parts": tiny.parts(tiny.CONVOLUTIONAL), "method": {"epochs": 2, "kind": "sgd"}},
}


QUICK = ("two stages", "convolutions and BatchNorm")
"""With dropout and augmentation, and with statistics."""


@pytest.mark.parametrize("case", slow_but(QUICK, CASES))
def test_members_are_their_solo_runs_in_float64(case, tmp_path):
    with jax.enable_x64(True):
        together = fit(population(tmp_path, **case))
        solo = alone(tmp_path, **case)
    for one, other, (seed, *_) in zip(together, solo, NUMBERS, strict=True):
        assert jax.tree.leaves(one.variables)[0].dtype == np.float64
        assert_close(one.variables, other.variables, rtol=1e-10, atol=1e-10)
        assert (one.epoch, one.steps) == (other.epoch, other.steps)
        mine, its = lines(tmp_path, seed), lines(tmp_path / f"alone{seed}", seed)
        assert [(r["stage"], r["epoch"], r["step"]) for r in mine] == [(r["stage"], r["epoch"], r["step"]) for r in its]
        for a, b in zip(mine, its, strict=True):  # sums of a population's losses are kept in float32
            assert a["train"] == pytest.approx(b["train"], rel=1e-5)
            assert a.get("validation") == pytest.approx(b.get("validation"))


def test_members_differ_and_some_stop_early(tmp_path):
    """Otherwise the tests above would prove little."""
    with jax.enable_x64(True):
        found = fit(population(tmp_path, **CASES["patience"]))
        best = fit(population(tmp_path / "best", **CASES["best epoch"]))
    assert len({f.steps for f in found}) > 1 and min(f.steps for f in found) < 45
    assert len({f.epoch for f in best}) > 1
    kernels = [np.asarray(f.variables[0]["fc"]["kernel"]) for f in found]
    assert all(np.abs(kernels[0] - other).max() > 1e-3 for other in kernels[1:])


def test_the_initial_student_of_each_member_is_its_own(tmp_path):
    """With a residual target each member learns from the student as *it* was initialised."""
    parts = tiny.parts()
    parts = parts._replace(targets=(*parts.targets, ("initial", Live(tiny.STUDENT))))
    term = Term(name="residual", teacher="teacher", loss=Residual(of=LogitMSE()))

    def made(folder, numbers):
        setup = population(folder, parts=parts, numbers=numbers)
        ms = [m._replace(method=tiny.method(distil=term, lr=lr)) for m, (_, _, lr) in zip(setup.members, numbers, strict=True)]
        own = [(m.initial.params["student"], m.initial.model_state["student"]) for m in ms]
        return dataclasses.replace(setup, members=tuple(ms)), [jax.tree.map(jax.numpy.copy, tree) for tree in own]

    with jax.enable_x64(True):
        setup, own = made(tmp_path, NUMBERS)
        together = fit(dataclasses.replace(setup, frozen={**setup.frozen, "initial": stacking.stack(own)}))
        for number, one in zip(NUMBERS, together, strict=True):
            setup, (initial,) = made(tmp_path / f"{number[0]}", (number,))
            (other,) = fit(as_single(dataclasses.replace(setup, frozen={**setup.frozen, "initial": initial})))
            assert_close(one.variables, other.variables, rtol=1e-10, atol=1e-10)


# -- members that end


DIVERGING = ((0, 2.0, 0.02), (1, 4.0, 1e30), (2, 4.0, 0.02), (3, 1.0, 1e30))


def test_a_diverged_member_does_not_touch_the_others(tmp_path):
    with jax.enable_x64(True):
        together = fit(population(tmp_path, numbers=DIVERGING, method={"kind": "sgd", "epochs": 4}))
        solo = alone(tmp_path, numbers=DIVERGING, method={"kind": "sgd", "epochs": 4})
    for i, (one, other) in enumerate(zip(together, solo, strict=True)):
        if i % 2:
            assert isinstance(one, Diverged) and str(one) == str(other)
            assert len(lines(tmp_path, i)) == len(lines(tmp_path / f"alone{i}", i)) < 4
        else:
            assert_close(one.variables, other.variables, rtol=1e-10, atol=1e-10)


def test_a_judge_stops_members_and_the_stack_shrinks(tmp_path, monkeypatch):
    widths = []
    compact = Standing.compact
    monkeypatch.setattr(Standing, "compact", lambda self, n: widths.append(len(self.slots)) or compact(self, n))

    def judge(member, epoch, found):
        assert set(found) >= {"accuracy", "cross_entropy"}
        return f"member {member} in epoch {epoch}" if member in (0, 2, 3) and epoch >= 2 else None

    with jax.enable_x64(True):
        found = fit(population(tmp_path, method={"epochs": 6}, judge=judge))
        (solo,) = alone(tmp_path, numbers=NUMBERS[1:2], method={"epochs": 6})
    assert [str(f) for f in found if isinstance(f, Pruned)] == [f"member {i} in epoch 2" for i in (0, 2, 3)]
    assert widths == [4, 4, 1, 1, 1, 1] and [len(lines(tmp_path, i)) for i in range(4)] == [2, 6, 2, 2]
    assert_close(found[1].variables, solo.variables, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("running", "multiple", "kept"),
    [
        ((1, 1, 1, 1), 1, None), ((1, 1, 1, 0), 1, None), ((0, 1, 0, 1), 1, [1, 3]), ((0, 0, 0, 1), 2, [0, 3]),
        ((0, 0, 0, 0), 1, None),
    ],
)
def test_rows_are_given_up_when_half_of_them_ended(running, multiple, kept):
    standing = Standing.beginning(4)
    standing.ended[:] = 1 - np.array(running)
    rows = standing.compact(multiple)
    assert (None if rows is None else rows.tolist()) == kept


# -- stopping and going on


RESUMED = {
    "plain": {"method": {"epochs": 3}},
    "stages": {"method": {"scheme": TwoStage(init_epochs=2), "epochs": 2, "compressor": MagnitudePrune(recover_epochs=1)}},
    "ending": {"method": {"epochs": 8}, "patience": 1, "select": "accuracy"},
    "diverging": {"numbers": DIVERGING, "method": {"kind": "sgd", "epochs": 4}},
}


@pytest.mark.parametrize("calls", [pytest.param(1, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize("case", slow_but(["ending"], RESUMED))
def test_a_population_cut_up_is_the_same_bit_for_bit(case, calls, tmp_path):
    whole = fit(population(tmp_path / "whole", wide=False, checkpoints=None, **case))
    sessions, found = 0, None
    while found is None:
        policy = CheckpointPolicy(every_steps=4, every_seconds=0)
        try:
            found = fit(population(tmp_path / "cut", wide=False, policy=policy, stop=StopAfter(calls), **case))
        except Interrupted:
            sessions += 1
        assert sessions < 60
    assert sessions >= 3
    for i, (one, other) in enumerate(zip(found, whole, strict=True)):
        assert type(one) is type(other) and (tmp_path / "cut" / f"{i}.jsonl").read_bytes() == (
            tmp_path / "whole" / f"{i}.jsonl"
        ).read_bytes()
        if isinstance(one, Exception):
            assert str(one) == str(other)
        else:
            assert_same_bits(one.variables, other.variables)
            assert (one.epoch, one.steps, one.train_metrics) == (other.epoch, other.steps, other.train_metrics)


@pytest.mark.slow
def test_the_last_checkpoint_holds_the_finished_population(tmp_path):
    """Killed while its members are measured, a population is not trained again."""
    done = fit(population(tmp_path, wide=False, last_checkpoint=True))
    assert Checkpoints(tmp_path / "checkpoints").latest()[:2] == (0, 4)
    steps = []
    again = fit(population(tmp_path, wide=False, progress=lambda *report: steps.append(report)))
    assert not steps
    for one, other in zip(done, again, strict=True):
        assert_same_bits(one.variables, other.variables)
