"""How far a run is: a bar on a terminal, a line now and then elsewhere. And the wish to stop."""

import signal
import sys
import time
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
                f"{self.label}{stage}: step {done}/{total}, {rate:.1f} steps/s, {_duration(left)} left",
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


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


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
