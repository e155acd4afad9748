"""How far a run is: a bar on a terminal, a line now and then elsewhere; how that is said. And the wish to stop."""

import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from types import FrameType
from typing import Any

LINE_SECONDS = 10.0


class Bar:
    """Callable `(stage, done, total, rate)`; `rate` in steps per second, 0 while it is not known."""

    def __init__(self, label: str = "", stream: Any = None):
        self.label, self.stream = label, stream or sys.stderr
        self.terminal = self.stream.isatty()
        self._progress: Any = None
        self._task: Any = None
        self._stage = ""
        self._shown = time.monotonic()

    def __call__(self, stage: str, done: int, total: int, rate: float) -> None:
        if self.terminal:
            self._draw(stage, done, total, rate)
        elif rate and time.monotonic() - self._shown > LINE_SECONDS:
            self._shown = time.monotonic()
            left = (total - done) / max(rate, 1e-9)
            print(
                f"{self.label}{stage}: step {done}/{total}, {rate:.1f} steps/s, {duration(left)} left",
                file=self.stream,
            )

    def _draw(self, stage: str, done: int, total: int, rate: float) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        if self._progress is None:
            self._progress = Progress(
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"),
                TimeRemainingColumn(), console=Console(file=self.stream), transient=True,
            )  # fmt: skip
            self._progress.start()
        if stage != self._stage:
            self._stage = stage
            if self._task is not None:
                self._progress.remove_task(self._task)
            self._task = self._progress.add_task(f"{self.label}{stage}", total=total, rate="")
        self._progress.update(self._task, completed=done, rate=f"{rate:.0f} steps/s" if rate else "compiling")

    def close(self) -> None:
        """Takes the bar off the terminal."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3 h 20 min`, `2 d 3 h`; negative ones (a clock was set back) are `0 s`."""
    seconds = max(0.0, seconds)
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes // 1440} d {minutes % 1440 // 60} h"


def groups_text(units: Sequence[tuple[str, int]], done: int) -> str:
    """`3 of 5 groups done: 4 vmap (60 jobs), 1 loop (1 job)`; `units`: strategy and number of jobs of each."""
    count, jobs = Counter(strategy for strategy, _ in units), Counter[str]()
    for strategy, size in units:
        jobs[strategy] += size
    kinds = ", ".join(f"{n} {strategy} ({many(jobs[strategy], 'job')})" for strategy, n in count.items())
    return f"{done} of {many(len(units), 'group')} done" + (f": {kinds}" if kinds else "")


def many(count: int, thing: str) -> str:
    """`1 job`, `3 jobs`."""
    return f"{count} {thing}{'' if count == 1 else 's'}"


def numbers(jobs: Sequence[int]) -> str:
    """`job 3`, `jobs 0-31` (all between), `jobs 0, 4, 8, ... (12)`."""
    if len(jobs) == 1:
        return f"job {jobs[0]}"
    if list(jobs) == list(range(jobs[0], jobs[0] + len(jobs))):
        return f"jobs {jobs[0]}-{jobs[-1]}"
    shown = ", ".join(map(str, jobs[:3]))
    return f"jobs {shown}" if len(jobs) <= 3 else f"jobs {shown}, ... ({len(jobs)})"


class StopSignal:
    """True once SIGTERM or Ctrl-C came; the run then writes a checkpoint and ends. A second Ctrl-C ends at once."""

    def __init__(self) -> None:
        self.received: int | None = None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._receive)

    def __call__(self) -> bool:
        return self.received is not None

    def _receive(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.received = number
        print("jdistill: stopping after this block of steps; the same command will continue", file=sys.stderr)
        signal.signal(signal.SIGINT, signal.default_int_handler)
