"""One unit of a sweep, carried out in this process."""

import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from jdistill.checkpoint import first_line
from jdistill.errors import RunError, UsageError, from_system
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

    A population that does not fit into memory is halved; one that cannot be trained as such is trained job by job. One
    whose files are at fault (a full disk, a damaged checkpoint) is left as it is, so that it can go on once they are mended.
    """
    given: dict[str, Any] = {"stop": stop, "progress": partial(progress, unit), "judge": judge}
    if unit.folder is None:
        return _one_by_one(unit.jobs, fail_fast, given)

    def anew(jobs: Sequence[Job], reason: str) -> list[Outcome]:
        assert unit.folder is not None
        smaller = unit_of(jobs, reason, unit.folder.parent.parent)
        return run_unit(smaller, stop=stop, progress=progress, judge=judge, fail_fast=fail_fast)

    refused = {i: error for i, job in enumerate(unit.jobs) if (error := unwritable(job.folder))}
    if refused and not any((unit.folder / "checkpoints").glob("*")):
        shutil.rmtree(unit.folder, ignore_errors=True)
        others = [job for i, job in enumerate(unit.jobs) if i not in refused]
        rest = iter(anew(others, unit.reason) if others else [])
        return [refused[i] if i in refused else next(rest) for i in range(len(unit.jobs))]
    about = {"strategy": unit.strategy, "members": len(unit.jobs), "reason": unit.reason}
    try:
        return run_jobs(unit.jobs, population=about, folder=unit.folder, **given)
    except (UsageError, RunError) as error:
        return [error for _ in unit.jobs]
    except OSError as error:
        return [from_system(error, unit.folder) for _ in unit.jobs]
    except Exception as error:
        shutil.rmtree(unit.folder, ignore_errors=True)  # its checkpoints would not fit the records that now begin anew
        if not _out_of_memory(error) or len(unit.jobs) < 3:
            why = f"{type(error).__name__}: {first_line(error)[:200]}"
            print(f"jdistill: {len(unit.jobs)} jobs are trained one by one, not as one population: {why}", file=sys.stderr)
            return _one_by_one(unit.jobs, fail_fast, given)
        half, reason = (len(unit.jobs) + 1) // 2, f"{len(unit.jobs)} members do not fit into memory"
        return [*anew(unit.jobs[:half], reason), *anew(unit.jobs[half:], reason)]


def unwritable(folder: Path) -> RunError | None:
    """Why nothing can be written to a job's folder, or None."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return RunError(f"{folder} cannot be written to ({error.strerror or error})")


def _one_by_one(jobs: Sequence[Job], fail_fast: bool, given: dict[str, Any]) -> list[Outcome]:
    outcomes: list[Outcome] = []
    for job in jobs:
        if fail_fast and any(map(failed, outcomes)):
            outcomes.append(Interrupted("not begun: fail_fast=true ends a sweep at its first failure"))
            continue
        try:
            outcomes += run_jobs((job,), **given)
        except OSError as error:
            outcomes.append(from_system(error, job.folder))
        except Exception as error:
            outcomes.append(error)
    return outcomes


def failed(outcome: Outcome) -> bool:
    """Whether a job failed: one that was interrupted, or stopped by a search, did not."""
    return isinstance(outcome, Exception) and not isinstance(outcome, Interrupted | Pruned)


def _out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)
