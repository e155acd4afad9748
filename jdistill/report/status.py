"""How far a sweep is: `status` counts its jobs, `status_text` says it in a few lines."""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

from jdistill.report.collect import read_jobs, read_sweep

STATUSES = ("finished", "failed", "diverged", "running", "pending", "missing", "unreadable")
_DONE = ("finished", "failed", "diverged")


def status(sweep: str | os.PathLike[str]) -> dict[str, Any]:
    """The state of a sweep folder.

    Returns:
      `sweep`; `jobs` (their number); `counts` (status -> number, all of `STATUSES`); `failures`: a list of
      `{"job", "dir", "status", "overrides", "error"}` first lines of errors; `seconds_left`: float or None.
      The estimate is the remaining jobs times the time the done ones kept the sweep busy (the union of their
      `started` to `ended`, in seconds since the epoch), so that parallel jobs do not count twice
      and pauses not at all; None where no job has both times, 0 where none remains.

    Raises:
      UsageError: not a sweep folder.
    """
    jobs, records = read_jobs(sweep), read_sweep(sweep)
    counts = Counter(record["status"] for record in records)
    failures = [
        {
            "job": record["job"],
            "dir": job.get("dir"),
            "status": record["status"],
            "overrides": list(record["overrides"]),
            "error": (str(record.get("error") or "").strip().splitlines() or ["no reason recorded"])[0],
        }
        for job, record in zip(jobs, records, strict=True)
        if record["status"] not in ("finished", "running", "pending")
    ]
    remaining = counts["running"] + counts["pending"]
    spans = [
        (float(job["started"]), float(job["ended"]))
        for job, record in zip(jobs, records, strict=True)
        if record["status"] in _DONE and job.get("started") is not None and job.get("ended") is not None
    ]
    left = 0.0 if not remaining else remaining * _busy(spans) / len(spans) if spans else None
    return {
        "sweep": str(sweep),
        "jobs": len(records),
        "counts": {name: counts[name] for name in (*STATUSES, *(s for s in counts if s not in STATUSES))},
        "failures": failures,
        "seconds_left": left,
    }


def status_text(state: dict[str, Any], failures: int = 10) -> str:
    """The result of `status` in lines: the counts, the time left, and the first failures with their overrides."""
    shown = ", ".join(f"{count} {name}" for name, count in state["counts"].items() if count)
    lines = [f"{state['sweep']}: {state['jobs']} job{'s' * (state['jobs'] != 1)}: {shown or 'none yet'}"]
    if state["seconds_left"]:
        lines.append(f"about {duration(state['seconds_left'])} left")
    for failure in state["failures"][:failures]:
        overrides = " ".join(failure["overrides"]) or failure["dir"] or ""
        job = "" if failure["job"] is None else f"job {failure['job']} "
        lines.append(f"  {job}{failure['status']}: {overrides}: {failure['error']}")
    if len(state["failures"]) > failures:
        lines.append(f"  ... and {len(state['failures']) - failures} more")
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3 h 20 min`, `2 d 3 h`."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes // 1440} d {minutes % 1440 // 60} h"


def _busy(spans: list[tuple[float, float]]) -> float:
    """The length of the union of intervals."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
