"""The launcher's and the sweeper's work: compose and check all jobs, run them one by one, sum up."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus, filter_overrides, run_job, setup_globals
from omegaconf import DictConfig, OmegaConf, open_dict

from jdistill.checkpoint import first_line, write_atomically
from jdistill.errors import RunError, UsageError
from jdistill.fit import Diverged, Interrupted
from jdistill.sweep.jobs import choices, describe, now, plain


class SweepFailed(RunError):
    """Some jobs of a sweep failed; all others have finished."""


def sweep(sweeper: Any, arguments: list[str]) -> Any:
    """Hydra's cartesian sweep: launches all jobs, prints the table, raises `SweepFailed` if any job failed."""
    context = sweeper.hydra_context
    parser = OverridesParser.create(config_loader=context.config_loader)
    overrides = parser.parse_overrides([*sweeper._parse_config(), *arguments])
    batches = sweeper.split_arguments(overrides, sweeper.max_batch_size)
    folder = Path(sweeper.config.hydra.sweep.dir)
    plan = sweeper.config.hydra.launcher.get("plan", False)
    returns, first = [], 0
    for batch in batches:
        returns.append(sweeper.launcher.launch(batch, initial_job_idx=first))
        first += len(batch)
    if not plan:
        OmegaConf.save(sweeper.config, folder / "multirun.yaml")
        summarize(folder)
    return returns


def launch(launcher: Any, job_overrides: Sequence[Sequence[str]], first: int) -> Sequence[JobReturn]:
    """Runs the jobs of one batch in this process, in order; every config is checked before any job starts."""
    setup_globals()
    composed = [compose(launcher, list(overrides), first + i) for i, overrides in enumerate(job_overrides)]
    blueprints = check_all(composed)
    if launcher.plan:
        show_plan(composed, blueprints)
        return []
    folder = Path(launcher.config.hydra.sweep.dir)
    folder.mkdir(parents=True, exist_ok=True)
    book = JobBook(folder / "jobs.jsonl", composed, first)
    print(f"{_many(len(composed), 'job')} in {folder}", file=sys.stderr)
    returns = []
    for config in composed:
        returns.append(_run_one(launcher, config, book, total=first + len(composed)))
        if config.fail_fast and returns[-1].status == JobStatus.FAILED:
            break
    return returns


def compose(launcher: Any, overrides: list[str], number: int) -> DictConfig:
    """The config of one job."""
    config = launcher.context.config_loader.load_sweep_config(launcher.config, overrides)
    with open_dict(config):
        config.hydra.job.id = number
        config.hydra.job.num = number
        config.hydra.sweep.dir = str(launcher.config.hydra.sweep.dir)  # one folder, whatever a job's own overrides
    return config


def overrides_of(config: DictConfig) -> list[str]:
    """What a job's command line says, without Hydra's own keys."""
    return list(filter_overrides([str(override) for override in config.hydra.overrides.task]))


def check_all(composed: Sequence[DictConfig]) -> list[Any]:
    """The blueprints of all jobs; raises `UsageError` with one line for each different mistake."""
    from jdistill.blueprint import read

    blueprints: list[Any] = []
    mistakes: dict[str, list[int]] = {}
    for config in composed:
        try:
            blueprints.append(read(plain(config)))
        except UsageError as error:
            mistakes.setdefault(str(error), []).append(config.hydra.job.num)
    if mistakes:
        lines = [f"{text} ({_jobs(numbers)} of {len(composed)})" for text, numbers in mistakes.items()]
        raise UsageError("\njdistill: error: ".join(lines))
    return blueprints


def _many(count: int, thing: str) -> str:
    return f"{count} {thing}{'' if count == 1 else 's'}"


def _jobs(numbers: list[int]) -> str:
    shown = ", ".join(str(n) for n in numbers[:5]) + (", ..." if len(numbers) > 5 else "")
    return f"job{'s' if len(numbers) > 1 else ''} {shown}"


def _run_one(launcher: Any, config: DictConfig, book: "JobBook", total: int) -> JobReturn:
    number = config.hydra.job.num
    book.update(number, status="running", started=now(), error=None)
    returned = run_job(
        hydra_context=launcher.context, task_function=launcher.task, config=config,
        job_dir_key="hydra.sweep.dir", job_subdir_key="hydra.sweep.subdir",
    )  # fmt: skip
    label = f"[{number + 1}/{total}] {' '.join(book.jobs[number]['overrides'])}"
    if returned.status == JobStatus.COMPLETED:
        book.update(number, status="finished", ended=now())
        result = json.loads((book.path.parent / book.jobs[number]["dir"] / "result.json").read_text())
        print(f"{label}: {describe(result)}", file=sys.stderr)
        return returned
    error = returned._return_value
    if isinstance(error, Interrupted):
        book.update(number, status="pending")
        raise error
    status = "diverged" if isinstance(error, Diverged) else "failed"
    book.update(number, status=status, ended=now(), error=first_line(error))
    text = first_line(error)
    print(f"{label}: {text if text.startswith(status) else f'{status}: {text}'}", file=sys.stderr)
    return returned


class JobBook:
    """`jobs.jsonl`: one line a job, rewritten whole and atomically at each change."""

    def __init__(self, path: Path, composed: Sequence[DictConfig], first: int):
        self.path = path
        self.jobs: dict[int, dict[str, Any]] = {}
        if first and path.is_file():  # a later batch of the same sweep
            self.jobs = {row["job"]: row for row in map(json.loads, path.read_text().splitlines())}
        for config in composed:
            number = config.hydra.job.num
            self.jobs[number] = {
                "job": number,
                "dir": str(config.hydra.sweep.subdir),
                "overrides": overrides_of(config),
                "choices": choices(config.hydra),
                "status": "pending",
                "error": None,
            }
        self._write()

    def update(self, number: int, **fields: Any) -> None:
        self.jobs[number] |= fields
        self._write()

    def _write(self) -> None:
        text = "".join(json.dumps(row) + "\n" for _, row in sorted(self.jobs.items()))
        write_atomically(self.path, lambda temporary: temporary.write_text(text))


def show_plan(composed: Sequence[DictConfig], blueprints: Sequence[Any]) -> None:
    """Prints jobs by group: the jobs of a group run in one compiled program."""
    groups: dict[Any, list[DictConfig]] = {}
    for config, blueprint in zip(composed, blueprints, strict=True):
        groups.setdefault(blueprint.group(), []).append(config)
    print(f"{_many(len(composed), 'job')} in {_many(len(groups), 'group')}; sweep folder {composed[0].hydra.sweep.dir}")
    for i, members in enumerate(groups.values()):
        print(f"group {i}: {_many(len(members), 'job')}")
        for config in members:
            print(f"  {config.hydra.job.num:4d}  {config.hydra.sweep.subdir}  {' '.join(overrides_of(config))}")


def summarize(folder: Path) -> None:
    """Prints the sweep's table and the path of its figure; raises `SweepFailed` when a job failed."""
    from jdistill.commands import write_report

    print(write_report(folder))
    jobs = [json.loads(line) for line in (folder / "jobs.jsonl").read_text().splitlines()]
    failed = [job for job in jobs if job["status"] in ("failed", "diverged")]
    if failed:
        raise SweepFailed(f"{len(failed)} of {len(jobs)} jobs failed; `jdistill status {folder}` shows why")


__all__ = ["SweepFailed", "launch", "summarize", "sweep"]
