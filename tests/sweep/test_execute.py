"""One unit in this process: what went wrong with one job, or with a whole population, does not take the others along."""

import dataclasses
import json

import pytest

from jdistill import run
from jdistill.config import shared
from jdistill.errors import RunError
from jdistill.standing import Diverged, Interrupted, Pruned
from jdistill.sweep import execute
from jdistill.sweep.execute import failed, run_unit
from jdistill.sweep.plan import plan_units, unit_of
from jdistill.sweep.units import Settings, Unit
from tests.e2e.helpers import result, rows
from tests.sweep import made

FILES = ("artifact.safetensors", "metrics.jsonl")


def population(folder, *each, **choices):
    jobs = made.jobs(folder, *each, **choices)
    return unit_of(jobs, "as the test says", folder)


def seeds(count, *changes):
    return [(*changes, ("seed", seed)) for seed in range(count)]


def solo(folder, unit):
    """The same jobs one by one: (their jobs, outcomes)."""
    jobs = tuple(dataclasses.replace(job, folder=folder / job.folder.name) for job in unit.jobs)
    return jobs, run_unit(Unit(jobs, "loop", "each by itself"))


class Fake:
    """Stands for `run_jobs`: raises `error` for more than `fits` jobs, and keeps the widths it was asked for."""

    def __init__(self, fits, error):
        self.fits, self.error, self.widths, self.about = fits, error, [], []

    def __call__(self, jobs, *, population=None, folder=None, **given):
        self.widths.append(len(jobs))
        self.about.append(population)
        if len(jobs) > self.fits:
            raise self.error
        return [{"job": job.number} for job in jobs]


OUT_OF_MEMORY = RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 12345 bytes.")


@pytest.mark.parametrize("error", [OUT_OF_MEMORY, MemoryError()], ids=["device", "host"])
@pytest.mark.parametrize(
    ("count", "fits", "widths"),
    [(8, 8, [8]), (8, 3, [8, 4, 2, 2, 4, 2, 2]), (7, 4, [7, 4, 3]), (5, 2, [5, 3, 2, 1, 2]), (3, 1, [3, 2, 1, 1, 1])],
)
def test_a_population_that_does_not_fit_is_halved(count, fits, widths, error, tmp_path, monkeypatch):
    fake = Fake(fits, error)
    monkeypatch.setattr(execute, "run_jobs", fake)
    unit = population(tmp_path / "sweep", *seeds(count))
    outcomes = run_unit(unit)
    assert outcomes == [{"job": i} for i in range(count)] and fake.widths == widths
    for width, about in zip(fake.widths, fake.about, strict=True):
        assert about is None if width == 1 else about["members"] == width
    if count > fits:
        assert not unit.folder.exists() and "do not fit into memory" in next(a for a in fake.about[1:] if a)["reason"]


def test_another_error_of_a_population_trains_its_jobs_one_by_one(tmp_path, monkeypatch, capsys):
    fake = Fake(1, ValueError("no batching rule for this"))
    monkeypatch.setattr(execute, "run_jobs", fake)
    assert run_unit(population(tmp_path / "sweep", *seeds(4))) == [{"job": i} for i in range(4)]
    assert fake.widths == [4, 1, 1, 1, 1]
    assert capsys.readouterr().err == (
        "jdistill: 4 jobs are trained one by one, not as one population: ValueError: no batching rule for this\n"
    )


def test_a_population_too_large_is_trained_in_halves_and_says_so(tmp_path, monkeypatch):
    """With the real training; only the allocation is made up."""
    real = run.fit

    def fit(setup):
        if len(setup.members) > 2:
            raise OUT_OF_MEMORY
        return real(setup)

    monkeypatch.setattr(run, "fit", fit)
    unit = population(tmp_path / "sweep", *seeds(4))
    outcomes = run_unit(unit)
    for job, outcome in zip(unit.jobs, outcomes, strict=True):
        assert outcome["status"] == "finished" and outcome == result(job.folder) and outcome["config"] == job.config
        about = outcome["strategy"]["population"]
        assert (about["strategy"], about["members"]) == ("vmap", 2) and "4 members do not fit" in about["reason"]
    assert list((tmp_path / "sweep" / "populations").iterdir()) == []


def test_members_are_recorded_as_solo_runs_are(tmp_path):
    """Result files and accuracies; every number of a population differs here, so none is read where one is for all."""
    each = [
        (
            ("seed", i), ("loss.temperature", 1.0 + i), ("loss.weight", 0.5 + i), ("task.weight", 1.0 - 0.1 * i),
            ("optim.lr", 0.01 + 0.02 * i), ("optim.momentum", 0.9 - 0.1 * i), ("evaluate.predictions", i == 1),
            ("force", i == 2), ("data.root", None if i else "."),
        )
        for i in range(3)
    ]  # fmt: skip
    unit = population(tmp_path / "sweep", *each)
    outcomes = run_unit(unit)
    jobs, others = solo(tmp_path / "solo", unit)
    for job, one, alone, other in zip(unit.jobs, outcomes, jobs, others, strict=True):
        assert not isinstance(one, Exception), one
        assert one == result(job.folder) and set(one) == set(other)
        assert {p.name for p in job.folder.iterdir()} == {p.name for p in alone.folder.iterdir()}
        assert one["strategy"]["population"] == {"strategy": "vmap", "members": 3, "reason": "as the test says"}
        assert "population" not in other["strategy"]
        for key in ("fingerprint", "config", "choices", "overrides", "epoch", "steps", "report", "data"):
            assert one[key] == other[key], key
        assert one["metrics"]["test"] == pytest.approx(other["metrics"]["test"], rel=1e-4)
        assert one["metrics"]["train"] == pytest.approx(other["metrics"]["train"], rel=1e-4)
        assert one["metrics"]["test"]["accuracy"] == other["metrics"]["test"]["accuracy"]
        assert one["size"]["parameters"] == other["size"]["parameters"]
        assert [row["epoch"] for row in rows(job.folder)] == [row["epoch"] for row in rows(alone.folder)] == [1, 2]
    assert len({one["metrics"]["test"]["cross_entropy"] for one in outcomes}) == 3
    assert (unit.jobs[1].folder / "predictions.npz").is_file() and not (unit.jobs[0].folder / "predictions.npz").exists()
    assert sum(one["time_s"]["train"] for one in outcomes) == pytest.approx(3 * outcomes[0]["time_s"]["train"])


@pytest.mark.parametrize(("key", "values"), [("evaluate.latency", (True, False)), ("evaluate.repeats", (5, 6))])
def test_how_a_member_is_timed_does_not_break_its_population(key, values, tmp_path, capsys):
    base = (("evaluate.latency", True), ("evaluate.repeats", 5))
    jobs = made.jobs(tmp_path / "sweep", *((*base, (key, value), ("seed", i)) for i, value in enumerate(values)))
    units = plan_units(jobs, made.blueprints(jobs), tmp_path / "sweep", Settings(strategy="vmap"))
    found = {job.number: outcome for unit in units for job, outcome in zip(unit.jobs, run_unit(unit), strict=True)}
    assert "one by one" not in capsys.readouterr().err
    for i, value in enumerate(values):
        assert bool(found[i]["latency_ms"]) == (value is not False)


def test_a_member_that_diverges_is_recorded_and_the_others_finish(tmp_path):
    each = [(("seed", i), ("optim.kind", "sgd"), ("optim.lr", lr)) for i, lr in enumerate((0.01, 1e30, 0.02))]
    unit = population(tmp_path / "sweep", *each, loss="none")
    outcomes = run_unit(unit)
    assert isinstance(outcomes[1], Diverged) and [failed(outcome) for outcome in outcomes] == [False, True, False]
    found = result(unit.jobs[1].folder)
    assert found["status"] == "diverged" and found["error"] == str(outcomes[1]) and "metrics" not in found
    assert [result(unit.jobs[i].folder)["status"] for i in (0, 2)] == ["finished"] * 2
    stamps = [(job.folder / "result.json").stat().st_mtime_ns for job in unit.jobs]
    again = run_unit(unit)  # all of it is final
    assert stamps == [(job.folder / "result.json").stat().st_mtime_ns for job in unit.jobs]
    assert again[0] == outcomes[0] and str(again[1]) == str(outcomes[1]) and isinstance(again[1], Diverged)


def test_a_member_that_cannot_be_measured_is_a_failure_of_its_own(tmp_path, monkeypatch):
    unit, real = population(tmp_path / "sweep", *seeds(3)), run.deploy
    bad = unit.jobs[1].folder

    def deploy(blueprint, fitted, reference, folder):
        if folder == bad:
            raise ZeroDivisionError("no such measure")
        return real(blueprint, fitted, reference, folder)

    monkeypatch.setattr(run, "deploy", deploy)
    outcomes = run_unit(unit)
    assert [isinstance(outcome, Exception) for outcome in outcomes] == [False, True, False]
    assert isinstance(outcomes[1], RunError) and "ZeroDivisionError: no such measure" in str(outcomes[1])
    assert result(bad)["status"] == "failed" and "no such measure" in (bad / "error.log").read_text()
    monkeypatch.setattr(run, "deploy", real)
    (again,) = run_unit(Unit((unit.jobs[1],), "loop", "alone"))  # a failure is tried again
    assert again["status"] == "finished" == result(bad)["status"]


def test_fail_fast_begins_no_job_after_a_failure(tmp_path):
    each = [(("seed", i), ("optim.kind", "sgd"), ("optim.lr", lr)) for i, lr in enumerate((0.01, 1e30, 0.02))]
    jobs = made.jobs(tmp_path / "sweep", *each, loss="none")
    outcomes = run_unit(Unit(tuple(jobs), "loop", "asked for"), fail_fast=True)
    assert [type(outcome) for outcome in outcomes] == [dict, Diverged, Interrupted]
    assert "fail_fast" in str(outcomes[2]) and not jobs[2].folder.exists()
    assert not failed(outcomes[2])
    rest = run_unit(Unit(tuple(jobs), "loop", "asked for"))
    assert [type(outcome) for outcome in rest] == [dict, Diverged, dict] and rest[0] == outcomes[0]


def test_a_judge_sees_each_member_by_its_number_and_ends_it(tmp_path):
    asked = []

    def judge(number, epoch, found):
        asked.append((number, epoch))
        return "hopeless" if number == 1 and epoch == 1 else None

    unit = population(tmp_path / "sweep", *seeds(3))
    outcomes = run_unit(unit, judge=judge)
    assert isinstance(outcomes[1], Pruned) and "hopeless" in str(outcomes[1]) and not failed(outcomes[1])
    assert sorted(asked) == [(0, 1), (0, 2), (1, 1), (2, 1), (2, 2)]
    assert [result(job.folder)["status"] for job in unit.jobs] == ["finished", "pruned", "finished"]
    assert isinstance(run_unit(unit)[1], Pruned)


def test_a_refused_config_is_the_outcome_of_its_job(tmp_path):
    wrong = made.job(tmp_path, 0, ("optim.lr", -1))
    good = made.job(tmp_path, 1, ("seed", 1), loss="none")
    outcomes = run_unit(Unit((wrong, good), "loop", "asked for"))
    assert "optim.lr must be positive" in str(outcomes[0]) and outcomes[1]["status"] == "finished"


class StopAfter:
    """Says stop from its `calls`-th call on."""

    def __init__(self, calls):
        self.left = calls

    def __call__(self):
        self.left -= 1
        return self.left < 0


@pytest.mark.parametrize("strategy", ["vmap", pytest.param("loop", marks=pytest.mark.slow)])
def test_an_interrupted_unit_goes_on_bit_for_bit(strategy, tmp_path):
    slow = (("optim.epochs", 4), ("checkpoint.every_steps", 3), ("student.dropout", 0.2))
    whole = population(tmp_path / "whole", *seeds(3, *slow))
    if strategy == "loop":
        whole = Unit(whole.jobs, "loop", "asked for")
    expected = run_unit(whole)
    jobs = tuple(dataclasses.replace(job, folder=tmp_path / "cut" / job.folder.name) for job in whole.jobs)
    unit = unit_of(jobs, "r", tmp_path / "cut") if strategy == "vmap" else Unit(jobs, "loop", "asked for")
    cuts, outcomes = 0, [Interrupted("")]
    while any(isinstance(outcome, Interrupted) for outcome in outcomes):
        outcomes = run_unit(unit, stop=StopAfter(4))
        cuts += 1
        assert cuts < 30
    assert cuts > 2
    for mine, its, one, other in zip(jobs, whole.jobs, outcomes, expected, strict=True):
        for name in FILES:
            assert (mine.folder / name).read_bytes() == (its.folder / name).read_bytes(), name
        assert one["metrics"] == other["metrics"] and not (mine.folder / "checkpoints").exists()
    assert not unit.folder or not unit.folder.exists()


def test_finished_members_keep_their_results_where_their_population_is_trained_again(tmp_path):
    """As after a kill between two results: the arithmetic of a population depends on its size."""
    unit = population(tmp_path / "sweep", *seeds(3))
    first = run_unit(unit)
    kept = [unit.jobs[i].folder / "result.json" for i in (0, 2)]
    stamps, lost = [path.stat().st_mtime_ns for path in kept], unit.jobs[1].folder
    before = {name: (lost / name).read_bytes() for name in FILES}
    for name in ("result.json", *FILES):
        (lost / name).unlink()
    again = run_unit(unit)
    assert [path.stat().st_mtime_ns for path in kept] == stamps and [again[i] for i in (0, 2)] == [first[i] for i in (0, 2)]
    assert {name: (lost / name).read_bytes() for name in FILES} == before and again[1]["metrics"] == first[1]["metrics"]


# -- what the members' configs have in common


def test_a_swept_key_cannot_be_read_from_a_population():
    one = {"seed": 0, "loss": {"name": "kd", "weight": 1, "list": [1]}, "data": {"a": {"b": 1}}, "same": None}
    other = {"seed": 1, "loss": {"name": "kd", "weight": 2, "list": [1]}, "data": {"a": {"b": 2}}, "same": None}
    common = shared([one, other])
    assert common["same"] is None and common["loss"]["name"] == "kd" and common["loss"]["list"] == [1]
    for read in (
        lambda: common["seed"], lambda: common["loss"]["weight"], lambda: common["data"]["a"]["b"], lambda: common.get("seed"),
    ):  # fmt: skip
        for use in (str, int, float, bool, lambda v: f"{v}", lambda v: json.dumps(v)):
            with pytest.raises((RuntimeError, TypeError)) as caught:
                use(read())
            if caught.type is RuntimeError:
                assert "differs between the members" in str(caught.value)
    assert shared([one, one]) == one


@pytest.mark.parametrize(
    "use", [lambda v: v == 0, lambda v: v + 1, lambda v: v < 3, lambda v: {v: 1}, lambda v: [*v], lambda v: v["a"]]
)
def test_nothing_is_done_with_a_swept_key(use):
    with pytest.raises((RuntimeError, TypeError)):
        use(shared([{"seed": 0}, {"seed": 1}])["seed"])
