"""How far a sweep is, read from its folder: `status` counts, `status_text` says it in a few lines, `watch` goes on."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jdistill.progress import duration, groups_text, many, numbers
from jdistill.report.collect import CURVES, Record, read_jobs, read_sweep

STATUSES = ("finished", "failed", "diverged", "pruned", "running", "pending", "missing", "unreadable")
UNITS = "units.json"
_DONE = ("finished", "failed", "diverged", "pruned")
_TAIL = 65536  # bytes that hold the last line of a metrics.jsonl
_SILENT = 60.0  # seconds without a line that are worth a word


def status(sweep: str | os.PathLike[str], now: float | None = None) -> dict[str, Any]:
    """The state of a sweep folder.

    Args:
      now: seconds since the epoch; None: of the system's clock.

    Returns:
      `sweep`; `jobs` (their number); `counts` (status -> number, all of `STATUSES`); `failures`: a list of
      `{"job", "dir", "status", "overrides", "error"}` first lines of errors; `units`: of `units.json`, a list of
      `{"jobs", "strategy", "reason", "epochs", "done"}`; `running`: those of them that run (where `units.json` does not
      say, each running job alone), with `epoch` (completed; the furthest running member's), `seconds` since their start
      and `silent` (seconds since a line was written; None before the first); `problems`: files that cannot be used, a
      line each; `jobs_per_minute` and `seconds_left`: floats or None.
      The time left is the work that remains, in jobs, times the time a job kept the sweep busy: the union of the done
      jobs' `started` to `ended`, so that parallel jobs do not count twice and pauses not at all. Running jobs
      count by their epochs, where `units.json` tells how many there are. None where nothing is done yet, 0 where
      nothing remains. A job that ended before it started (the clock was set back) tells no time.

    Raises:
      UsageError: not a sweep folder.
    """
    now = time.time() if now is None else now
    jobs = read_jobs(sweep)
    records = read_sweep(sweep, jobs)
    counts = Counter(record["status"] for record in records)
    units, problems = _units(Path(sweep))
    by_number = {job["job"]: (job, record) for job, record in zip(jobs, records, strict=True) if job["job"] is not None}
    for unit in units:
        unit["done"] = all(by_number[n][1]["status"] not in ("running", "pending") for n in unit["jobs"] if n in by_number)
    alone = sorted(set(by_number) - {n for unit in units for n in unit["jobs"]})
    loose: list[Record] = [{"jobs": [n], "strategy": "loop", "reason": "", "epochs": None} for n in alone]
    running = [found for unit in (*units, *loose) if (found := _running(unit, by_number, now))]
    if not (Path(sweep) / UNITS).exists() and counts["running"] + counts["pending"]:
        problems = [f"no {UNITS} in {sweep}: which jobs are trained together is not known"]
    spans = [span for job, record in by_number.values() if record["status"] in _DONE and (span := _span(job))]
    busy = _busy(spans)
    return {
        "sweep": str(sweep),
        "jobs": len(records),
        "counts": {name: counts[name] for name in (*STATUSES, *(s for s in counts if s not in STATUSES))},
        "failures": _failures(jobs, records),
        "units": units,
        "running": running,
        "problems": problems,
        "jobs_per_minute": 60 * len(spans) / busy if busy else None,
        "seconds_left": _left(counts["running"] + counts["pending"], spans, running, now),
    }


def status_text(state: dict[str, Any], failures: int = 10) -> str:
    """The result of `status` in lines: counts, groups, rate and time left, running groups, the first failures."""
    shown = ", ".join(f"{count} {name}" for name, count in state["counts"].items() if count)
    lines = [f"{state['sweep']}: {many(state['jobs'], 'job')}: {shown or 'none yet'}"]
    if units := state["units"]:
        sizes = [(unit["strategy"], len(unit["jobs"])) for unit in units]
        lines.append(groups_text(sizes, sum(unit["done"] for unit in units)))
    speeds = [f"{state['jobs_per_minute']:.3g} jobs/min"] if state["jobs_per_minute"] else []
    speeds += [f"about {duration(state['seconds_left'])} left"] if state["seconds_left"] else []
    lines += [", ".join(speeds)] if speeds else []
    lines += [f"  {_running_text(unit)}" for unit in state["running"][:failures]]
    if len(state["running"]) > failures:
        lines.append(f"  ... and {len(state['running']) - failures} more running")
    for failure in state["failures"][:failures]:
        overrides = " ".join(map(str, failure["overrides"])) or failure["dir"] or ""
        job = "" if failure["job"] is None else f"job {failure['job']} "
        lines.append(f"  {job}{failure['status']}: {overrides}: {failure['error']}")
    if len(state["failures"]) > failures:
        lines.append(f"  ... and {len(state['failures']) - failures} more")
    return "\n".join([*lines, *state["problems"]])


def watch(sweep: str | os.PathLike[str], seconds: float, stream: Any = None) -> None:
    """Writes `status_text` every `seconds` until no job runs or waits: drawn anew on a terminal, elsewhere when it changed.

    Raises:
      UsageError: not a sweep folder, or no longer one.
    """
    stream = sys.stdout if stream is None else stream
    last = None
    with _screen(stream) as show:
        while True:
            state = status(sweep)
            text = status_text(state)
            if text != last:
                show(text)
                last = text
            if not state["counts"]["running"] + state["counts"]["pending"]:
                return
            time.sleep(seconds)


@contextlib.contextmanager
def _screen(stream: Any) -> Iterator[Callable[[str], Any]]:
    """Gives a function that shows a text: in place of the one before on a terminal, elsewhere below it."""
    if not stream.isatty():
        yield lambda text: print(text, file=stream, flush=True)
        return
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    with Live(console=Console(file=stream), auto_refresh=False) as live:
        yield lambda text: live.update(Text(text), refresh=True)


def _running_text(unit: Record) -> str:
    of = "" if unit["epochs"] is None else f" of {unit['epochs']}"
    words = [f"epoch {unit['epoch']}{of}" if unit["epoch"] else "no epoch yet"]
    words += [f"for {duration(unit['seconds'])}"] if unit["seconds"] is not None else []
    words += [f"nothing written for {duration(unit['silent'])}"] if (unit["silent"] or 0) >= _SILENT else []
    return f"{unit['strategy']}, {numbers(unit['jobs'])}: {', '.join(words)}"


def _failures(jobs: list[Record], records: list[Record]) -> list[Record]:
    return [
        {
            "job": record["job"],
            "dir": job.get("dir"),
            "status": record["status"],
            "overrides": list(record["overrides"]),
            "error": (str(record.get("error") or "").strip().splitlines() or ["no reason recorded"])[0],
        }
        for job, record in zip(jobs, records, strict=True)
        if record["status"] not in ("finished", "pruned", "running", "pending")
    ]


# -- groups


def _units(sweep: Path) -> tuple[list[Record], list[str]]:
    """The groups of `units.json`, and what is wrong with it."""
    path = sweep / UNITS
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return [], []
    except (OSError, ValueError) as problem:
        return [], [f"{path} cannot be read ({' '.join(str(problem).split())}): groups are not shown"]
    rows = found if isinstance(found, list) else [found]
    if not all(isinstance(row, dict) and _are_numbers(row.get("jobs")) for row in rows):
        return [], [f'{path}: expected a list of {{"jobs": [numbers], "strategy": ..., "reason": ...}}: groups are not shown']
    units = []
    for row in rows:
        epochs = _number(row.get("epochs"))
        unit = {"jobs": row["jobs"], "strategy": str(row.get("strategy", "loop")), "reason": str(row.get("reason", ""))}
        units.append({**unit, "epochs": int(epochs) if epochs and epochs > 0 else None})
    return units, []


def _are_numbers(jobs: Any) -> bool:
    return isinstance(jobs, list) and bool(jobs) and all(isinstance(number, int) for number in jobs)


def _running(unit: Record, by_number: dict[int, tuple[Record, Record]], now: float) -> Record | None:
    """The unit with how far its running jobs are, or None where none runs."""
    members = [by_number[n] for n in unit["jobs"] if n in by_number and by_number[n][1]["status"] == "running"]
    if not members:
        return None
    reached = [_reached(record.get("path")) for _, record in members]
    starts = [start for job, _ in members if (start := _number(job.get("started"))) is not None]
    written = [at for _, at in reached if at is not None]
    epochs = unit["epochs"]
    return {
        **unit,
        "epoch": max(epoch for epoch, _ in reached),
        "seconds": max(0.0, now - min(starts)) if starts else None,
        "silent": max(0.0, now - max(written)) if written else None,
        "work": sum(min(1.0, epoch / epochs) for epoch, _ in reached) if epochs else 0.0,
    }


def _reached(folder: str | None) -> tuple[int, float | None]:
    """The epoch of the last whole line of a run's metrics, 0 before the first, and when it was written."""
    path = Path(folder or "") / CURVES
    try:
        with path.open("rb") as file:
            at = os.fstat(file.fileno()).st_mtime
            file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL))
            lines = file.read().splitlines()
    except OSError:
        return 0, None
    for line in reversed(lines):
        try:
            row = json.loads(line)
        except ValueError:
            continue  # being written, or cut short by a kill
        if isinstance(row, dict) and (epoch := _number(row.get("epoch"))) is not None:
            return max(0, int(epoch)), at
    return 0, None


# -- times


def _number(value: Any) -> float | None:
    """A finite number, or None: a damaged file may hold anything."""
    usable = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if usable else None


def _span(job: Record) -> tuple[float, float] | None:
    start, end = _number(job.get("started")), _number(job.get("ended"))
    return (start, end) if start is not None and end is not None and end >= start else None


def _left(remaining: int, spans: list[tuple[float, float]], running: list[Record], now: float) -> float | None:
    if not remaining:
        return 0.0
    partly = [unit for unit in running if unit["work"] and unit["seconds"]]
    begun = sum(unit["work"] for unit in partly)
    work = len(spans) + begun
    busy = _busy([*spans, *((now - unit["seconds"], now) for unit in partly)])
    return (remaining - begun) * busy / work if work and busy else None


def _busy(spans: list[tuple[float, float]]) -> float:
    """The length of the union of intervals."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
