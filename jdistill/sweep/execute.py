"""One unit of a sweep, carried out in this process."""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from jdistill.checkpoint import first_line
from jdistill.errors import UsageError
from jdistill.run import run_jobs
from jdistill.standing import Interrupted, Pruned
from jdistill.sweep.plan import unit_of
from jdistill.sweep.units import Job, Judge, Outcome, Unit
from jdistill.training import Stop, never

Progress = Callable[[Unit, str, int, int, float], None]


def run_unit(
    unit: Unit,
    *,
    stop: Stop = never,
    progress: Progress = lambda *_: None,
    judge: Judge | None = None,
    fail_fast: bool = False,
) -> list[Outcome]:
    """The outcomes of a unit's jobs, in order. Never raises: what went wrong is the outcome of the job concerned.

    A population that does not fit into memory is halved; one that cannot be trained as such is trained job by job.
    """
    given: dict[str, Any] = {"stop": stop, "progress": partial(progress, unit), "judge": judge}
    if unit.folder is None:
        return _one_by_one(unit.jobs, fail_fast, given)
    about = {"strategy": unit.strategy, "members": len(unit.jobs), "reason": unit.reason}
    try:
        return run_jobs(unit.jobs, population=about, folder=unit.folder, **given)
    except UsageError as error:
        return [error for _ in unit.jobs]
    except Exception as error:
        if not _out_of_memory(error) or len(unit.jobs) < 3:
            why = f"{type(error).__name__}: {first_line(error)[:200]}"
            print(f"jdistill: {len(unit.jobs)} jobs are trained one by one, not as one population: {why}", file=sys.stderr)
            return _one_by_one(unit.jobs, fail_fast, given)
        outcomes: list[Outcome] = []
        half = (len(unit.jobs) + 1) // 2
        for jobs in (unit.jobs[:half], unit.jobs[half:]):
            reason = f"{len(unit.jobs)} members do not fit into memory"
            smaller = unit_of(jobs, reason, unit.folder.parent.parent)
            outcomes += run_unit(smaller, stop=stop, progress=progress, judge=judge, fail_fast=fail_fast)
        return outcomes


def _one_by_one(jobs: Sequence[Job], fail_fast: bool, given: dict[str, Any]) -> list[Outcome]:
    outcomes: list[Outcome] = []
    for job in jobs:
        if fail_fast and any(map(failed, outcomes)):
            outcomes.append(Interrupted("not begun: fail_fast=true ends a sweep at its first failure"))
            continue
        try:
            outcomes += run_jobs((job,), **given)
        except Exception as error:
            outcomes.append(error)
    return outcomes


def failed(outcome: Outcome) -> bool:
    """Whether a job failed: one that was interrupted, or stopped by a search, did not."""
    return isinstance(outcome, Exception) and not isinstance(outcome, Interrupted | Pruned)


def _out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)
