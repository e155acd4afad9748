"""Configs to run folders: teacher, training, artifact, `result.json`. One run, or a population trained in one program."""

import contextlib
import dataclasses
import json
import shutil
import sys
import time
import traceback
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jdistill import blueprint as blueprints
from jdistill import distributed, plugins, stacking
from jdistill.blueprint import Blueprint
from jdistill.checkpoint import Checkpoints, first_line, write_atomically, write_json
from jdistill.config import shared
from jdistill.environment import CompileClock, environment, peak_memory
from jdistill.errors import RunError, UsageError, from_system
from jdistill.evaluation import Deployed, answers, deploy, latencies
from jdistill.fit import fit
from jdistill.fitting import Fitted, Member
from jdistill.machine import MACHINE
from jdistill.networks import inherited
from jdistill.records import Discard, MetricsFile
from jdistill.schemes import Offline
from jdistill.standing import FINAL, Interrupted, status_of
from jdistill.sweep.units import Job, Judge, Outcome
from jdistill.teachers.store import Teacher, prepare, weights
from jdistill.teachers.targets import Live, Target
from jdistill.train import Keys, TrainState
from jdistill.training import Progress, Stop, choose_strategy, initial_state, never, silent, training
from jdistill.types import PyTree


def run(
    config: dict[str, Any],
    folder: Path,
    *,
    choices: dict[str, str] | None = None,
    overrides: Sequence[str] = (),
    stop: Stop = never,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Carries a run out in `folder`, or returns the result that is already there.

    A run that was stopped goes on from its last checkpoint, bit for bit. A run that fails writes a `result.json`
    that says why, and raises.

    Raises:
      UsageError: the config is wrong (nothing has been trained).
      RunError: the run failed.
      Interrupted: `stop()` said so.
    """
    distributed.start(config["parallel"].get("distributed"))
    with distributed.run_folder(folder) as own:
        if not distributed.is_main():
            config = config | {"tracker": {"name": "jsonl"}}
        job = Job(0, tuple(overrides), config, choices or {}, own)
        (outcome,) = run_jobs((job,), stop=stop, progress=progress)
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def run_jobs(
    jobs: Sequence[Job],
    *,
    population: dict[str, Any] | None = None,
    folder: Path | None = None,
    stop: Stop = never,
    progress: Progress = silent,
    judge: Judge | None = None,
) -> list[Outcome]:
    """Carries out one job, or a population in one program, whose checkpoints are kept in `folder`.

    `population` is what the results say of it. Jobs that are finished keep their results, and are trained along where
    the others go on from a checkpoint: a population's arithmetic depends on its size.

    Raises:
      UsageError: a config is wrong.
      Exception: whatever went wrong in a population of several before its members were measured; nothing is recorded.
    """
    places = [_Place(job) for job in jobs]
    with contextlib.ExitStack() as locks:
        for place in sorted(places, key=lambda place: place.job.folder):
            place.lock(locks)
        outcomes = [place.known() for place in places]
        working = [place for place, outcome in zip(places, outcomes, strict=True) if outcome is None]
        if not working:
            return [outcome for outcome in outcomes if outcome is not None]
        for place in working:
            place.begin()
        try:
            made = _Training(places, population, folder, stop, progress, judge).carry_out()
        except Interrupted as error:
            made = [error] * len(places)
        except Exception as error:
            if len(places) > 1:
                raise
            made = [error]
        for i, (place, outcome) in enumerate(zip(places, made, strict=True)):
            if place.working:
                outcomes[i] = place.end(outcome)
        if folder is not None and not any(isinstance(outcome, Interrupted) for outcome in outcomes):
            shutil.rmtree(folder, ignore_errors=True)
        return [outcome for outcome in outcomes if outcome is not None]


class _Place:
    """A job's run folder, while this process works on it."""

    def __init__(self, job: Job):
        self.job, self.blueprint = job, job.blueprint
        self.identity = job.identity
        self.working = False
        self.listeners: tuple[Any, ...] = ()

    def lock(self, locks: contextlib.ExitStack) -> None:
        from filelock import FileLock

        self.job.folder.mkdir(parents=True, exist_ok=True)
        locks.enter_context(FileLock(self.job.folder / ".lock"))

    def known(self) -> Outcome | None:
        """What is already there: a result, or how an earlier session saw the run diverge or be pruned."""
        return None if self.job.config["force"] else ended(self.job.folder, self.identity)

    def begin(self) -> None:
        """Leaves only what continues this very run, and opens its records."""
        self.working = True
        _clean(self.job.folder, self.identity, self.job.config["force"])
        listener = self.blueprint.tracker.start(self.job.folder, self.identity, self.job.config)
        self.listeners = (listener,) if listener else ()

    def metrics(self) -> MetricsFile:
        return MetricsFile(self.job.folder / "metrics.jsonl", self.listeners) if self.working else Discard()

    def end(self, outcome: Outcome) -> Outcome:
        """Writes the result of a run that is over; returns what is to be told of it."""
        if isinstance(outcome, Interrupted):
            return outcome
        folder = self.job.folder
        about = {
            "fingerprint": self.identity,
            "choices": self.job.choices,
            "config": self.job.config,
            "overrides": list(self.job.overrides),
            "plugins": plugins.versions(),
        }
        if isinstance(outcome, Exception):
            status = status_of(outcome)
            if not isinstance(outcome, RunError | UsageError):
                outcome = _unexpected(outcome, folder)
            result: dict[str, Any] = {"status": status, "error": first_line(outcome), **about, "environment": environment()}
        else:
            outcome = result = {"status": "finished", "error": None, **about, **outcome}
        try:
            write_json(folder / "result.json", result)
        except OSError as error:  # a full disk, a folder that may no longer be written
            return RunError(f"{from_system(error, folder)}; the result could not be written")
        self.blueprint.tracker.finish(result)
        if result["status"] != "failed":  # tried again, such a run goes on from where it was
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        return outcome


def _unexpected(error: Exception, folder: Path) -> RunError:
    """A traceback in the run folder, and one line that points at it."""
    if isinstance(error, OSError):
        return from_system(error, folder)
    text = "".join(traceback.format_exception(error))
    with contextlib.suppress(OSError):
        (folder / "error.log").write_text(text)
    return RunError(f"{type(error).__name__}: {first_line(error)[:300]} (the traceback is in {folder / 'error.log'})")


def ended(folder: Path, identity: str) -> Outcome | None:
    """What became of the run of config `identity` in `folder`, where that is final: finished, diverged, pruned.

    A damaged or foreign `result.json` counts as none; a failed run is tried again.
    """
    result = _result(folder)
    status, same = result.get("status"), result.get("fingerprint") == identity
    if same and status == "finished":
        return result
    return FINAL[status](str(result.get("error"))) if same and status in FINAL else None


def _clean(folder: Path, identity: str, force: bool) -> None:
    """Leaves only what continues this very run: another config's remains, and a result to be repeated, go.

    A forced run that was stopped has no result yet, so it continues too.
    """
    mark = folder / ".fingerprint"
    repeat = force and (folder / "result.json").is_file()
    if repeat or not mark.is_file() or mark.read_text() != identity:
        if not force and _result(folder).get("status") == "finished":
            raise UsageError(f"{folder} holds a finished run of another config; choose another folder, or force=true")
        for name in ("checkpoints", "metrics.jsonl", "artifact.safetensors"):
            path = folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    if (folder / "result.json").is_file() and not _result(folder):
        print(f"jdistill: {folder / 'result.json'} is damaged; the run is done again", file=sys.stderr)
    (folder / "result.json").unlink(missing_ok=True)
    if not mark.is_file() or mark.read_text() != identity:  # a kill must never leave a continued run an empty mark
        write_atomically(mark, lambda temporary: temporary.write_text(identity))


def _result(folder: Path) -> dict[str, Any]:
    """What `result.json` says, nothing where there is none or it is damaged."""
    try:
        result = json.loads((folder / "result.json").read_text())
    except (OSError, ValueError):
        return {}
    return result if isinstance(result, dict) else {}


class _Training:
    """Teacher, training and measurement of one job or of a population."""

    def __init__(
        self, places: Sequence[_Place], population: dict[str, Any] | None, folder: Path | None, stop: Stop,
        progress: Progress, judge: Judge | None,
    ):  # fmt: skip
        self.places, self.population, self.folder = places, population, folder
        self.stop, self.progress, self.judge = stop, progress, judge
        self.stacked = folder is not None
        self.inherited: PyTree = None
        self.blueprints = [place.blueprint for place in places]
        self.blueprint = self.blueprints[0]
        if len(places) > 1:  # what differs between members must not be read from here
            common = shared([b.config for b in self.blueprints])
            self.blueprint = dataclasses.replace(self.blueprint, config=common)

    def carry_out(self) -> list[Outcome]:
        """The result of each member, without what says which run it is, or the exception that ended it."""
        CompileClock.start()
        started, compiling = _clock(), CompileClock.spent()
        teachers = _teachers(self.blueprint, self.stop, self.progress)
        records = [teacher.record for teacher in teachers.values()]
        if self.blueprint.config["transfer"]["inherit"]:
            self.inherited, record = weights(self.blueprint, stop=self.stop, progress=self.progress)
            records = records or [record]
        setup = self._setup(teachers)
        name, reason = choose_strategy(self.blueprint, setup.members[0].initial)
        prepared, compiled = _clock(), CompileClock.spent()
        fitted = self._fit_estimator(setup, teachers) if self.blueprint.estimator else fit(setup)
        trained, compiled_train = _clock(), CompileClock.spent()
        share = 1 / len(self.places)
        times = {
            "teacher": (prepared - started - (compiled - compiling)) * share,
            "compile": (compiled_train - compiling) * share,
            "train": (trained - prepared - (compiled_train - compiled)) * share,
        }
        about = {
            "report": self.blueprint.config["report"],
            "primary": self.blueprint.task.primary,
            "peak_memory_bytes": peak_memory(),
            "strategy": {
                "name": name, "reason": reason, "resident": setup.resident,
                **({"population": self.population} if self.population else {}),
            },
            "devices": self.blueprint.parallel.describe(),
            "teacher": records[0] if records else None,
            **({"teachers": records} if len(records) > 1 else {}),
            "data": _describe(self.blueprint),
            "environment": environment(),
        }  # fmt: skip
        return [
            outcome if isinstance(outcome, Exception) else {**outcome, **about}
            for outcome in self._measured(fitted, answers(self.blueprint.task, teachers), times)
        ]

    def _fit_estimator(self, setup: Any, teachers: dict[str, Teacher]) -> list[Any]:
        """A student that is no network, of a single run: `sweep.plan` stacks none."""
        from jdistill.estimators.training import fit_estimator

        return [fit_estimator(self.blueprint, setup.members[0], teachers, self.blueprint.config["seed"])]

    def _setup(self, teachers: dict[str, Teacher]) -> Any:
        blueprint, seeds = self.blueprint, [b.config["seed"] for b in self.blueprints]
        plain = blueprint.parts({})
        begin = partial(_begun, blueprint, self.inherited, next(iter(teachers.values()), None))
        initials = [begin(initial_state(blueprint, plain, seed)) for seed in seeds]
        targets: dict[str, Target] = {name: teacher.target for name, teacher in teachers.items()}
        frozen: dict[str, PyTree] = {name: teacher.arrays for name, teacher in teachers.items()}
        if blueprint.loss.reads_initial:
            targets["initial"] = Live(blueprint.student)
            copies = [jax.tree.map(jnp.copy, (s.params["student"], s.model_state["student"])) for s in initials]
            copies += copies[-1:] * (-len(copies) % blueprint.parallel.devices)
            frozen["initial"] = stacking.stack(copies) if self.stacked else copies[0]
        members = [
            Member(b.method(), Keys.of(seed), place.metrics(), state)
            for b, seed, place, state in zip(self.blueprints, seeds, self.places, initials, strict=True)
        ]
        numbers = [place.job.number for place in self.places]
        while self.stacked and len(members) % blueprint.parallel.devices:  # the devices divide the members
            members.append(members[-1]._replace(metrics=Discard()))
        judge, folder = self.judge, self.folder or self.places[0].job.folder
        return training(
            blueprint, tuple(members), blueprint.parts(targets), frozen, Checkpoints(folder / "checkpoints"),
            stacked=self.stacked, selecting=True, stop=self.stop, progress=self.progress,
            begin=begin, judge=None if judge is None else partial(_judged, judge, numbers),
            rankings={name: teacher.ranking for name, teacher in teachers.items() if teacher.ranking is not None},
        )  # fmt: skip

    def _measured(self, fitted: Sequence[Any], reference: Any, times: dict[str, float]) -> list[Outcome]:
        """What was measured of each member; a member that cannot be measured does not take the others along."""
        outcomes: list[Outcome] = []
        deployed: dict[int, Deployed] = {}
        spent: dict[int, float] = {}
        for i, (place, result) in enumerate(zip(self.places, fitted, strict=False)):
            started = _clock()
            outcomes.append(result if isinstance(result, Exception) else {})
            if not place.working or isinstance(result, Exception):
                continue
            try:
                deployed[i] = deploy(place.blueprint, result, reference, place.job.folder)
            except Exception as error:
                outcomes[i] = error
            spent[i] = _clock() - started
        started = _clock()
        timed = latencies(self.blueprint, list(deployed.values()))
        timing = (_clock() - started) / max(1, len(deployed))
        for (i, one), latency in zip(deployed.items(), timed, strict=True):
            own = times | {"evaluate": spent[i] + timing}
            outcomes[i] = _record(one, fitted[i], latency, own)
        return outcomes


def _clock() -> float:
    """Seconds, without those that this thread waited for other threads of the process."""
    return time.perf_counter() - MACHINE.waited()


def _judged(judge: Judge, numbers: Sequence[int], member: int, epoch: int, found: dict[str, float]) -> str | None:
    """What `judge` says of a member; nothing of one that is there for the number of devices only."""
    return judge(numbers[member], epoch, found) if member < len(numbers) else None


def _record(deployed: Deployed, fitted: Fitted, latency: dict[str, Any], times: dict[str, float]) -> dict[str, Any]:
    return {
        **deployed.measured,
        "latency_ms": latency,
        "epoch": fitted.epoch,
        "steps": fitted.steps,
        "examples_per_second": fitted.examples / fitted.seconds if fitted.seconds else None,
        "time_s": {"total": sum(times.values()), **times},
    }


def _teachers(blueprint: Blueprint, stop: Stop, progress: Progress) -> dict[str, Teacher]:
    """The frozen teachers, each loaded, or trained now."""
    if not blueprint.teachers:
        return {}
    features, live = blueprints.features_wanted(blueprint), blueprint.loss.calls_networks
    return {
        name: prepare(
            dataclasses.replace(blueprint, config=frozen.config, scheme=Offline()),
            features.get(name, frozenset()), live=live, depth=blueprint.depth(), stop=stop, progress=progress,
        )
        for name, frozen in blueprint.teachers.items()
    }  # fmt: skip


def _begun(blueprint: Blueprint, inherited: PyTree, teacher: Teacher | None, initial: TrainState) -> TrainState:
    """The initial state, with what the student takes over: parameters of the same name and shape, its network's own part."""
    initial = initial if inherited is None else _inheriting(initial, inherited)
    return initial if teacher is None else _adopting(blueprint, initial, teacher)


def _adopting(blueprint: Blueprint, initial: TrainState, teacher: Teacher) -> TrainState:
    """The initial state, with what the student's network takes over from the teacher."""
    state = blueprint.loss.adopt(initial.model_state["student"], teacher.variables)
    return dataclasses.replace(initial, model_state={**initial.model_state, "student": state})


def _inheriting(initial: TrainState, params: PyTree) -> TrainState:
    """The initial state, with those of the teacher's parameters that fit the student."""
    return dataclasses.replace(initial, params={**initial.params, "student": inherited(initial.params["student"], params)[0]})


def _describe(blueprint: Blueprint) -> dict[str, Any]:
    dataset = blueprint.dataset
    sizes = {name: len(getattr(dataset, name)["label"]) for name in ("train", "validation", "test")}
    return {"name": dataset.name, "classes": dataset.classes, **sizes, "checksums": dataset.checksums}
