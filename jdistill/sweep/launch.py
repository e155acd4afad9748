"""The launcher's and the sweeper's work: compose and check all jobs, group them, have them carried out, sum up."""

import contextlib
import json
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, setup_globals
from omegaconf import OmegaConf

from jdistill.checkpoint import first_line, write_json
from jdistill.errors import RunError, UsageError, from_system
from jdistill.progress import many
from jdistill.standing import Interrupted, status_of
from jdistill.sweep.book import JobBook, claim
from jdistill.sweep.compose import Composed, Composer
from jdistill.sweep.display import Display
from jdistill.sweep.jobs import describe
from jdistill.sweep.replay import Replay
from jdistill.sweep.units import Job, Outcome, Unit
from jdistill.sweep.zipped import zipped


class SweepFailed(RunError):
    """Some jobs of a sweep failed; all others have finished."""


def sweep(sweeper: Any, arguments: list[str]) -> Any:
    """Hydra's cartesian sweep: launches all jobs, prints the table, raises `SweepFailed` if any job failed."""
    context = sweeper.hydra_context
    parser = OverridesParser.create(config_loader=context.config_loader)
    overrides = parser.parse_overrides([*sweeper._parse_config(), *arguments])
    product = [job for batch in sweeper.split_arguments(overrides, None) for job in batch]
    points = OmegaConf.to_container(sweeper.zip) if OmegaConf.is_config(sweeper.zip) else sweeper.zip
    batches = sweeper.split_overrides_to_chunks(zipped(points, product), sweeper.max_batch_size)
    folder = Path(sweeper.config.hydra.sweep.dir)
    plan = sweeper.config.hydra.launcher.get("plan", False)
    returns, first = [], 0
    for batch in batches:
        returns.append(sweeper.launcher.launch(batch, initial_job_idx=first))
        first += len(batch)
    if not plan:
        with _reporting(folder):
            OmegaConf.save(sweeper.config, folder / "multirun.yaml")
        if (folder / "jobs.jsonl").is_file():
            summarize(folder)
        else:  # a launcher of Hydra's own keeps no book
            for returned in (job for batch in returns for job in batch):
                _ = returned.return_value  # raises what ended a failed job
    return returns


@contextlib.contextmanager
def _reporting(folder: Path) -> Iterator[None]:
    """A full disk keeps no one from being told which jobs failed."""
    try:
        yield
    except OSError as error:
        print(f"jdistill: {error.filename or folder} cannot be written ({error.strerror or error})", file=sys.stderr)


def launch(launcher: Any, job_overrides: Sequence[Sequence[str]], first: int) -> Sequence[JobReturn]:
    """Carries out the jobs of one batch; every config is checked before any job starts."""
    setup_globals()
    if launcher.composer is None:
        launcher.composer = Composer(launcher.context.config_loader, launcher.config)
    composed = [launcher.composer.job(overrides, first + i) for i, overrides in enumerate(job_overrides)]
    jobs = [c.job for c in composed]
    blueprints = check_all(jobs)
    if launcher.plan:
        show_plan(jobs, blueprints, launcher)
        return []
    folder = Path(launcher.config.hydra.sweep.dir)
    folder.mkdir(parents=True, exist_ok=True)
    with _held(folder):
        if not first:
            claim(folder, jobs)
        return _Batch(launcher, composed, folder, first).carry_out(blueprints)


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[None]:
    """While a sweep writes to its folder, no other one may."""
    from filelock import FileLock, Timeout

    try:
        with FileLock(folder / ".lock", timeout=0):
            yield
    except Timeout as error:
        raise UsageError(
            f"{folder} is in use by another jdistill; wait until that ends, or choose another hydra.sweep.dir"
        ) from error


class _Batch:
    """The jobs that a sweeper asked for at once, and what has become of them."""

    def __init__(self, launcher: Any, composed: Sequence[Composed], folder: Path, first: int):
        self.launcher, self.composed, self.folder, self.first = launcher, list(composed), folder, first
        self.replay = Replay(launcher.context, launcher.composer)
        self.book = JobBook(folder / "jobs.jsonl", [c.job for c in composed], first)
        self.returns: dict[int, JobReturn] = {}
        self.interrupted: Exception | None = None
        self.started: set[int] = set()
        self.starting = threading.Lock()
        self.twins: dict[Path, list[Composed]] = {}
        for c in composed:  # equal configs have one folder, and are one run
            self.twins.setdefault(c.job.folder, []).append(c)

    def carry_out(self, blueprints: Sequence[Any]) -> list[JobReturn]:
        from jdistill.run import ended
        from jdistill.sweep.plan import plan_units

        force, fail_fast = (any(c.job.config[key] for c in self.composed) for key in ("force", "fail_fast"))
        known: dict[int, Outcome] = {}
        todo: list[tuple[Job, Any]] = []
        for same in self.twins.values():
            job = same[0].job
            outcome = None if force else ended(job.folder, job.identity)
            if outcome is None:
                todo.append((job, blueprints[job.number - self.first]))
            else:
                known[job.number] = outcome
        settings = self.launcher.settings
        units = plan_units([job for job, _ in todo], [b for _, b in todo], self.folder, settings)
        self._write_units(units, {job.number: blueprint for job, blueprint in todo})
        print(f"{many(len(self.composed), 'job')} in {self.folder}", file=sys.stderr)
        waiting = sum(len(self.twins[job.folder]) for job, _ in todo)
        with Display(units, self.book.total, self.book.total - waiting) as self.display:
            for number, outcome in sorted(known.items()):
                self._end(self.composed[number - self.first].job, outcome, kept=True)
            self.launcher.make_executor().run(
                units, self._done, stop=self.launcher.stop, progress=self._progress, judge=self.launcher.judge,
                fail_fast=fail_fast,
            )  # fmt: skip
        if self.interrupted is not None and not (fail_fast and not self.launcher.stop()):
            raise self.interrupted
        return [self.returns[number] for number in sorted(self.returns)]

    def _write_units(self, units: Sequence[Unit], blueprints: dict[int, Any]) -> None:
        """`units.json`, for whoever watches: the units of this session, and those of earlier ones whose jobs are done."""
        rows: list[dict[str, Any]] = []
        for unit in units:
            numbers = [job.number for job in unit.jobs]
            blueprint = next(blueprints[n] for n in numbers if n in blueprints)
            epochs = sum(int(stage.optim.epochs) for stage in blueprint.method().stages)
            rows.append({"jobs": numbers, "strategy": unit.strategy, "reason": unit.reason, "epochs": epochs})
        path, now = self.folder / "units.json", {number for row in rows for number in row["jobs"]}
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            rows = [row for row in json.loads(path.read_text()) if not now & set(row["jobs"])] + rows
        write_json(path, rows)

    def _progress(self, unit: Unit, stage: str, done: int, total: int, rate: float) -> None:
        with self.starting:
            if unit.jobs[0].number not in self.started:
                self.started.add(unit.jobs[0].number)
                self.book.note([job.number for job in unit.jobs], status="running", started=time.time())
        self.display.progress(unit, stage, done, total, rate)

    def _done(self, unit: Unit, outcomes: list[Outcome]) -> None:
        self._progress(unit, "", 0, 1, 0.0)
        for job, outcome in zip(unit.jobs, outcomes, strict=True):
            if job.folder in self.twins:  # a resumed population may hold jobs of a larger sweep
                self._end(job, outcome)

    def _end(self, job: Job, outcome: Outcome, kept: bool = False) -> None:
        """Records what became of a job and of those with the same config."""
        for c in self.twins[job.folder]:
            number = c.job.number
            if number in self.returns:
                continue
            if isinstance(outcome, Interrupted):
                self.interrupted = outcome
                self.book.note([number], status="pending")
                continue
            try:
                self.returns[number] = self.replay(c, outcome)
            except OSError as error:  # a full disk: the job's own result may be there, the sweep goes on
                if not isinstance(outcome, Exception):  # else that says more of the job
                    outcome = from_system(error, c.job.folder)
                self.returns[number] = _failure(outcome)
            self.launcher.results[number] = None if isinstance(outcome, Exception) else outcome
            status, text = _status(outcome)
            error_text = text if isinstance(outcome, Exception) else None
            self.book.note([number], status=status, error=error_text, ended=time.time())
            self.display.job(number, c.job.overrides, text, status, kept)


def _failure(error: Exception) -> JobReturn:
    from hydra.core.utils import JobStatus

    returned = JobReturn()
    returned.return_value, returned.status = error, JobStatus.FAILED
    return returned


def _status(outcome: Outcome) -> tuple[str, str]:
    """A job's status, and one line for it."""
    if not isinstance(outcome, Exception):
        return "finished", describe(outcome)
    return status_of(outcome), first_line(outcome)


def check_all(jobs: Sequence[Job]) -> list[Any]:
    """The blueprints of all jobs; raises `UsageError` with one line for each different mistake."""
    blueprints: list[Any] = []
    mistakes: dict[str, list[int]] = {}
    folders: dict[Path, tuple[int, str]] = {}
    for job in jobs:
        try:
            blueprints.append(job.blueprint)
            number, other = folders.setdefault(job.folder, (job.number, job.identity))
            if other != job.identity:
                raise UsageError(f"jobs {number} and {job.number} share the folder {job.folder}; let its name tell them apart")
        except UsageError as error:
            mistakes.setdefault(str(error), []).append(job.number)
    if mistakes:
        lines = [f"{text} ({_numbers(numbers)} of {len(jobs)})" for text, numbers in mistakes.items()]
        raise UsageError("\njdistill: error: ".join(lines))
    return blueprints


def _numbers(numbers: list[int]) -> str:
    shown = ", ".join(str(n) for n in numbers[:5]) + (", ..." if len(numbers) > 5 else "")
    return f"job{'s' if len(numbers) > 1 else ''} {shown}"


def show_plan(jobs: Sequence[Job], blueprints: Sequence[Any], launcher: Any) -> None:
    """Prints jobs by group, that is by compiled program, and how each group would be carried out."""
    from jdistill.sweep.plan import width_of

    groups: dict[Any, list[int]] = {}
    for i, blueprint in enumerate(blueprints):
        groups.setdefault(blueprint.population(), []).append(i)
    folder = launcher.config.hydra.sweep.dir
    print(f"{many(len(jobs), 'job')} in {many(len(groups), 'group')}; sweep folder {folder}")
    for number, members in enumerate(groups.values()):
        width, reason = width_of(blueprints[members[0]], len(members), launcher.settings)
        how = f"{width} at a time in one program" if width > 1 else "one after another"
        print(f"group {number}: {many(len(members), 'job')}, {how} ({reason})")
        for i in members:
            print(f"  {jobs[i].number:4d}  {jobs[i].folder.name}  {' '.join(jobs[i].overrides)}")


def summarize(folder: Path) -> None:
    """Prints the sweep's table and the path of its figure; raises `SweepFailed` when a job failed."""
    from jdistill.commands import write_report
    from jdistill.report.collect import read_jobs

    with _reporting(folder):
        print(write_report(folder))
    jobs = read_jobs(folder)
    failed = [job for job in jobs if job["status"] in ("failed", "diverged")]
    if failed:
        raise SweepFailed(f"{len(failed)} of {len(jobs)} jobs failed; `jdistill status {folder}` shows why")


__all__ = ["SweepFailed", "launch", "summarize", "sweep"]
