"""`jobs.jsonl`: what becomes of each job of a sweep, a line a change; later lines supersede earlier ones."""

import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jdistill.checkpoint import write_atomically
from jdistill.errors import UsageError
from jdistill.report.collect import read_jobs
from jdistill.sweep.units import Job


class JobBook:
    """The journal of a sweep. A line that a kill cuts short is ignored by whoever reads it."""

    def __init__(self, path: Path, jobs: Iterable[Job], first: int):
        self.path, self.folder = path, path.parent
        known = {row["job"]: row for row in self._old(first)}
        for job in jobs:
            known[job.number] = {
                "job": job.number,
                "dir": os.path.relpath(job.folder, self.folder),
                "overrides": list(job.overrides),
                "choices": job.choices,
                "status": "pending",
                "error": None,
            }
        text = "".join(json.dumps(row) + "\n" for _, row in sorted(known.items()))
        write_atomically(path, lambda temporary: temporary.write_text(text))
        self.total = len(known)

    def _old(self, first: int) -> list[dict[str, Any]]:
        """The jobs of earlier batches of the same sweep."""
        if not first or not self.path.is_file():
            return []
        return [row for row in read_jobs(self.folder) if isinstance(row.get("job"), int) and row["job"] < first]

    def note(self, numbers: Iterable[int], **fields: Any) -> None:
        """Notes that something changed for some jobs. Where it cannot be written, the sweep goes on: results decide."""
        text = "".join(json.dumps({"job": number, **fields}) + "\n" for number in numbers)
        try:
            with self.path.open("a") as file:
                file.write(text)
        except OSError as error:
            print(f"jdistill: {self.path} cannot be written ({error.strerror or error})", file=sys.stderr)


def claim(folder: Path, jobs: Iterable[Job]) -> None:
    """Raises `UsageError` where a sweep folder holds another sweep: nothing is overwritten unasked.

    A sweep may be repeated, extended or narrowed in its folder, that is, have all the jobs there, or none but those.
    """
    if not (folder / "jobs.jsonl").is_file():
        return
    there = {row["dir"]: row for row in read_jobs(folder) if row.get("dir")}
    own = {os.path.relpath(job.folder, folder) for job in jobs}
    others = [row for name, row in there.items() if name not in own]
    if others and not own <= set(there):
        example = " ".join(others[0].get("overrides") or []) or others[0]["dir"]
        raise UsageError(
            f"{folder} holds another sweep: {len(others)} of its {len(there)} jobs are not in this one ({example});"
            " choose another hydra.sweep.dir, or delete the folder"
        )
