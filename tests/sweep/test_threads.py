"""Units in threads: they overlap, every one ends with outcomes, and a latency is measured alone."""

import threading
import time

import pytest

from jdistill import evaluation, fit, run
from jdistill.standing import Diverged, Interrupted, Pruned
from jdistill.sweep.executors import threads
from jdistill.sweep.executors.threads import Threads
from jdistill.sweep.units import Job, Unit
from jdistill.training import never
from tests.sweep import made


def units(tmp_path, *sizes):
    count = iter(range(1000))
    jobs = [[Job(n, (), {}, {}, tmp_path / str(n)) for n in (next(count) for _ in range(size))] for size in sizes]
    return [Unit(tuple(own), "loop", "as the test says") for own in jobs]


def carried_out(executor, given, **changes):
    """What `done` was told, in order, and the thread it was told in."""
    told = []
    rest = {"stop": never, "progress": lambda *_: None, "judge": None, "fail_fast": False, **changes}
    executor.run(given, lambda unit, outcomes: told.append((unit, outcomes, threading.current_thread())), **rest)
    return told


def numbers(outcomes):
    return [outcome if isinstance(outcome, dict) else type(outcome) for outcome in outcomes]


def by_number(unit, **given):
    return [{"job": job.number} for job in unit.jobs]


@pytest.mark.parametrize("workers", [1, 2, 3, 16])
def test_every_unit_ends_once_in_the_calling_thread(workers, tmp_path, monkeypatch):
    monkeypatch.setattr(threads, "run_unit", by_number)
    given = units(tmp_path, 1, 3, 1, 2, 5)
    told = carried_out(Threads(workers), given)
    assert sorted(unit.jobs[0].number for unit, _, _ in told) == [unit.jobs[0].number for unit in given]
    assert all(outcomes == [{"job": job.number} for job in unit.jobs] for unit, outcomes, _ in told)
    assert {thread for _, _, thread in told} == {threading.current_thread()}
    if workers == 1:
        assert [unit for unit, _, _ in told] == given


def test_no_units_is_no_work():
    assert carried_out(Threads(3), []) == []


@pytest.mark.parametrize("workers", [2, 3])
def test_as_many_units_as_workers_are_carried_out_at_a_time(workers, tmp_path, monkeypatch):
    """Each of a round waits for all others of it: with one thread less this would not end."""
    together, lock, now, most = threading.Barrier(workers, timeout=20), threading.Lock(), [0], [0]

    def carry(unit, **given):
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        together.wait()
        with lock:
            now[0] -= 1
        return by_number(unit)

    monkeypatch.setattr(threads, "run_unit", carry)
    told = carried_out(Threads(workers), units(tmp_path, *[1] * (3 * workers)))
    assert len(told) == 3 * workers and most == [workers]
    assert all(isinstance(outcomes[0], dict) for _, outcomes, _ in told)


@pytest.mark.parametrize("workers", [1, 2])
def test_an_exception_is_the_outcome_of_its_unit(workers, tmp_path, monkeypatch):
    error = KeyError("loss")

    def carry(unit, **given):
        if unit.jobs[0].number == 1:
            raise error
        return by_number(unit)

    monkeypatch.setattr(threads, "run_unit", carry)
    told = {unit.jobs[0].number: outcomes for unit, outcomes, _ in carried_out(Threads(workers), units(tmp_path, 1, 3, 1))}
    assert told[1] == [error] * 3 and told[0] == [{"job": 0}] and told[4] == [{"job": 4}]


@pytest.mark.parametrize("workers", [1, 2])
def test_what_did_not_begin_before_the_stop_is_interrupted(workers, tmp_path, monkeypatch):
    asked = threading.Event()
    barrier = threading.Barrier(workers, timeout=20)

    def carry(unit, *, stop, **given):
        barrier.wait()
        asked.set()
        assert stop()  # a running unit sees it too
        return [Interrupted("a checkpoint was written") for _ in unit.jobs]

    monkeypatch.setattr(threads, "run_unit", carry)
    told = carried_out(Threads(workers), units(tmp_path, 1, 1, 2, 1), stop=asked.is_set)
    assert len(told) == 4 and all(numbers(outcomes) == [Interrupted] * len(unit.jobs) for unit, outcomes, _ in told)
    texts = sorted(str(outcomes[0]) for _, outcomes, _ in told)
    assert sum(text == "a checkpoint was written" for text in texts) == workers
    assert sum("before it began" in text for text in texts) == 4 - workers


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(("kind", "ends"), [(Diverged, True), (ValueError, True), (Pruned, False)])
def test_fail_fast_stops_after_a_failure_and_not_after_a_pruned_job(kind, ends, workers, tmp_path, monkeypatch):
    def carry(unit, *, stop, fail_fast, **given):
        assert fail_fast
        if unit.jobs[0].number == 0:
            return [kind("first")]
        if workers > 1 and unit.jobs[0].number == 1:  # runs meanwhile: told to stop
            deadline = time.monotonic() + (10 if ends else 0.2)
            while not stop() and time.monotonic() < deadline:
                time.sleep(0.005)
            return [Interrupted("told")] if stop() else by_number(unit)
        return by_number(unit)

    monkeypatch.setattr(threads, "run_unit", carry)
    told = {unit.jobs[0].number: outcomes[0] for unit, outcomes, _ in carried_out(
        Threads(workers), units(tmp_path, 1, 1, 1, 1), fail_fast=True
    )}  # fmt: skip
    assert isinstance(told[0], kind)
    rest = [told[n] for n in (1, 2, 3)]
    assert all(isinstance(outcome, Interrupted) for outcome in rest) if ends else rest == [{"job": n} for n in (1, 2, 3)]


def test_failures_alone_do_not_stop_a_sweep(tmp_path, monkeypatch):
    monkeypatch.setattr(threads, "run_unit", lambda unit, **given: [Diverged("it did") for _ in unit.jobs])
    told = carried_out(Threads(2), units(tmp_path, 1, 2, 1))
    assert [numbers(outcomes) for _, outcomes, _ in told] and all(
        numbers(outcomes) == [Diverged] * len(unit.jobs) for unit, outcomes, _ in told
    )


def test_progress_and_judge_are_handed_on(tmp_path, monkeypatch):
    given, seen = {}, []

    def carry(unit, **more):
        given.update(more)
        more["progress"](unit, "student", 1, 2, 3.0)
        return by_number(unit)

    monkeypatch.setattr(threads, "run_unit", carry)
    judge = object()
    (unit,) = units(tmp_path, 2)
    carried_out(Threads(), [unit], judge=judge, progress=lambda *report: seen.append(report))
    assert given["judge"] is judge and seen == [(unit, "", 0, 1, 0.0), (unit, "student", 1, 2, 3.0)]


# -- with real training


def real_units(folder, *each):
    return [Unit((job,), "loop", "asked for") for job in made.jobs(folder, *each)]


def test_two_workers_give_what_one_gives(tmp_path):
    each = [(("seed", seed),) for seed in range(3)]
    one, two = (
        {
            unit.jobs[0].number: outcomes[0]
            for unit, outcomes, _ in carried_out(Threads(n), real_units(tmp_path / str(n), *each))
        }
        for n in (1, 2)
    )
    assert len(one) == 3
    for number, result in one.items():
        assert result["size"]["sha256"] == two[number]["size"]["sha256"] and result["metrics"] == two[number]["metrics"]


def test_a_latency_is_measured_while_no_other_thread_trains(tmp_path, monkeypatch):
    """A short and a long run: while the short one is measured, the long one, well under way, makes no step."""
    calls, seen = [0], []
    advance, timed, real = fit._Fit._advance, evaluation.latency, run.latencies

    def counted(self, *arguments):
        own = self.setup.members[0].metrics.path.parent == slow.jobs[0].folder
        calls[0] += own
        advance(self, *arguments)
        calls[0] += own

    def latencies(blueprint, *arguments):
        deadline = time.monotonic() + 60
        while blueprint.config["evaluate"]["latency"] and calls[0] < 20:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        return real(blueprint, *arguments)

    def latency(*arguments):
        before = calls[0]
        time.sleep(0.3)
        seen.append((before, calls[0]))
        return timed(*arguments)

    monkeypatch.setattr(fit._Fit, "_advance", counted)
    monkeypatch.setattr(run, "latencies", latencies)
    monkeypatch.setattr(evaluation, "latency", latency)
    (fast,) = real_units(tmp_path, (("evaluate.repeats", 2), ("evaluate.latency", True), ("optim.epochs", 1)))
    (slow,) = real_units(tmp_path, (("evaluate.latency", False), ("optim.epochs", 800), ("seed", 1)))
    told = carried_out(Threads(2), [fast, slow])
    assert all(isinstance(outcomes[0], dict) for _, outcomes, _ in told)
    ((before, after),) = seen
    assert before == after and before % 2 == 0  # none under way either
    assert calls[0] > after + 100  # it went on afterwards


def test_a_latency_is_measured_while_no_other_thread_compiles(tmp_path, monkeypatch):
    """The first step of a run, which is compiled, waits a second for the latency of another: that must not come."""
    measuring, compiling, caught = threading.Event(), threading.Event(), []
    advance, timed = fit._Fit._advance, evaluation.latency

    def watched(self, *arguments):
        if self.setup.members[0].metrics.path.parent == slow.jobs[0].folder and not compiling.is_set():
            compiling.set()
            caught.append(measuring.wait(1.0))
        advance(self, *arguments)

    def latency(*arguments):
        measuring.set()
        return timed(*arguments)

    (fast,) = real_units(tmp_path, (("evaluate.repeats", 2), ("evaluate.latency", True), ("optim.epochs", 1)))
    slow = real_units(tmp_path, (("seed", 1), ("optim.epochs", 3), ("student.widths", [7])))[0]
    real = evaluation.latencies

    def latencies(*arguments):
        if arguments[0].config["evaluate"]["latency"]:
            assert compiling.wait(30)
        return real(*arguments)

    monkeypatch.setattr(fit._Fit, "_advance", watched)
    monkeypatch.setattr(evaluation, "latency", latency)
    monkeypatch.setattr(run, "latencies", latencies)
    told = carried_out(Threads(2), [fast, slow])
    assert all(isinstance(outcomes[0], dict) for _, outcomes, _ in told)
    assert caught == [False] and measuring.is_set()
