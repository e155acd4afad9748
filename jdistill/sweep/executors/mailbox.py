"""How a unit on another machine and its parent speak: small files in a folder that both see."""

import json
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jdistill.sweep.executors.dispatch import Progress
from jdistill.sweep.units import Judge, Unit

PROGRESS_SECONDS = 1.0


class Mailbox:
    """The channel of a process that its parent has no pipe to.

    `progress.json` and `reports.jsonl` are written by the process, `stop` and `verdicts.json` by the parent. A report is
    answered when the parent gets to it: a job that is judged hopeless stops at one of its next evaluations.
    """

    def __init__(self, folder: Path, signalled: Callable[[], bool] = lambda: False):
        self.folder, self.signalled = folder, signalled
        self._told, self._looked, self._stop = 0.0, 0.0, False

    def began(self) -> None:
        """Says that the unit is being carried out, and where."""
        self.folder.mkdir(parents=True, exist_ok=True)
        _write(self.folder / "began.json", {"host": socket.gethostname(), "pid": os.getpid()})

    def stop(self) -> bool:
        if not self._stop and time.monotonic() - self._looked > 0.5:  # a shared file system is slow
            self._looked = time.monotonic()
            self._stop = (self.folder / "stop").exists()
        return self._stop or self.signalled()

    def progress(self, stage: str, done: int, total: int, rate: float) -> None:
        if time.monotonic() - self._told > PROGRESS_SECONDS or done == total:
            self._told = time.monotonic()
            _write(self.folder / "progress.json", [stage, done, total, rate])

    def judge(self, job: int, epoch: int, metrics: dict[str, float]) -> str | None:
        with (self.folder / "reports.jsonl").open("a") as file:
            file.write(json.dumps([job, epoch, {name: float(value) for name, value in metrics.items()}]) + "\n")
        return _read(self.folder / "verdicts.json", {}).get(str(job))


class Reader:
    """The parent's side of a `Mailbox`."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("stop", "began.json", "progress.json", "reports.jsonl", "verdicts.json"):  # of an earlier time
            (folder / name).unlink(missing_ok=True)
        self._shown: Any = None
        self._read = 0
        self._verdicts: dict[str, str] = {}

    @property
    def has_begun(self) -> bool:
        return (self.folder / "began.json").exists()

    def ask_to_stop(self) -> None:
        (self.folder / "stop").touch()

    def poll(self, unit: Unit, progress: Progress, judge: Judge | None) -> None:
        """Passes on new progress, and has new reports judged."""
        said = _read(self.folder / "progress.json", None)
        if said is not None and said != self._shown:
            self._shown = said
            progress(unit, *said)
        if judge is not None:
            self._judge(judge)

    def _judge(self, judge: Judge) -> None:
        path, known = self.folder / "reports.jsonl", len(self._verdicts)
        if not path.exists():
            return
        with path.open() as file:
            file.seek(self._read)
            for line in iter(file.readline, ""):
                if not line.endswith("\n"):
                    break  # it is being written
                self._read += len(line)
                job, epoch, metrics = json.loads(line)
                reason = judge(job, epoch, metrics)
                if reason is not None:
                    self._verdicts.setdefault(str(job), reason)
        if len(self._verdicts) > known:
            _write(self.folder / "verdicts.json", self._verdicts)


def _write(path: Path, value: Any) -> None:
    """Whole or not at all, but not safe from a power cut: nothing here outlives the sweep."""
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(value))
    temporary.replace(path)


def _read(path: Path, default: Any) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return default
