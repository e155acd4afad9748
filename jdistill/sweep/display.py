"""How far a whole sweep is, on standard error: a display on a terminal, a line now and then elsewhere."""

import contextlib
import dataclasses
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from jdistill.progress import LINE_SECONDS, duration, groups_text, numbers
from jdistill.sweep.units import Unit

_BARS = 10  # running units that are shown; the others are counted
_PREPARING = "teacher"  # the stage that is no part of a job's own training


@dataclasses.dataclass
class _Running:
    """What a running unit last said. `left`: its jobs that have not ended."""

    unit: Unit
    left: int
    stage: str = ""
    done: int = 0
    total: int = 1
    rate: float = 0.0

    def work(self) -> float:
        """How much of its unfinished jobs is done, in jobs; of several stages only the current one is known."""
        if self.stage == _PREPARING or not self.left:
            return 0.0
        fraction = min(1.0, self.done / max(self.total, 1))
        return fraction * (self.left if self.unit.strategy == "vmap" else 1)


class Display:
    """Shows units, jobs done by status, rates and the time left; a line for each job that ends scrolls above.

    On a terminal everything below the scrolling lines is redrawn four times a second (rich). Elsewhere there is a line
    a job, and at most one in ten seconds for the sweep. All methods may be called from any thread. What cannot be
    written (a closed pipe, a full disk) is left out: a sweep does not end because nobody watches it.

    Args:
      units: of this session, in any order.
      total: jobs of the whole sweep; `done`: those of them that ended before this session.
      stream: where to write; a terminal by its `isatty()`.
      clock: seconds, never going backwards.
    """

    def __init__(
        self,
        units: Sequence[Unit],
        total: int,
        done: int = 0,
        stream: Any = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._units, self._total, self._before = tuple(units), total, done
        self._stream = sys.stderr if stream is None else stream
        self._clock, self._started = clock, clock()
        self._shown = self._started
        self._lock = threading.Lock()  # a leaf: nothing is written while it is held, as rich holds locks of its own then
        self._ended: dict[int, str] = {}
        self._running: dict[int, _Running] = {}  # by the number of the unit's first job
        self._live: Any = None
        if self._stream.isatty():
            self._start_live()

    def __enter__(self) -> "Display":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def progress(self, unit: Unit, stage: str, done: int, total: int, rate: float) -> None:
        """`unit` has done `done` of the `total` steps of `stage`; `rate` in steps per second, 0 while not known."""
        with self._lock:
            left = sum(job.number not in self._ended for job in unit.jobs)
            if left:
                self._running[unit.jobs[0].number] = _Running(unit, left, stage, done, total, rate)
        self._line_now_and_then()

    def job(self, number: int, overrides: Sequence[str], text: str, status: str, kept: bool = False) -> None:
        """Job `number` ended with `status`; `text` says what it gave, or why it ended.

        `kept`: it ended in an earlier session and is among `done`: it has its line, but tells nothing about the rate.
        """
        with self._lock:
            if not kept:
                self._ended[number] = status
            for first, running in list(self._running.items()):
                running.left = sum(job.number not in self._ended for job in running.unit.jobs)
                if not running.left:
                    del self._running[first]
        said = text if status == "finished" or text.startswith(status) else f"{status}: {text}"
        self._write(f"[{number + 1}/{self._total}] {' '.join(overrides)}: {said}")
        self._line_now_and_then()

    def close(self) -> None:
        """Takes the display off the terminal; the jobs' lines stay."""
        live, self._live = self._live, None
        if live is not None:
            with contextlib.suppress(OSError):
                live.stop()

    # -- what is said

    def summary(self) -> str:
        """`12 of 64 jobs: 11 finished, 1 failed; 3.4 jobs/min, 210 steps/s, about 15 min left`."""
        with self._lock:
            counts, ended = Counter(self._ended.values()), len(self._ended)
            rate = sum(running.rate for running in self._running.values())
            work = ended + sum(running.work() for running in self._running.values())
        elapsed = max(0.0, self._clock() - self._started)
        parts = [f"{count} {status}" for status, count in counts.items()]
        parts += [f"{self._before} before"] if self._before else []
        speeds = [f"{60 * ended / elapsed:.3g} jobs/min"] if ended and elapsed else []
        speeds += [f"{rate:,.0f} steps/s"] if rate else []
        left = self._total - self._before - work
        if work > 0.02 * self._total and left > 0:  # before, it would be a guess
            speeds.append(f"about {duration(elapsed * left / work)} left")
        line = f"{self._before + ended} of {self._total} jobs" + (f": {', '.join(parts)}" if parts else "")
        return "; ".join([line, ", ".join(speeds)] if speeds else [line])

    def groups(self) -> str:
        """`3 of 5 groups done: 4 vmap (60 jobs), 1 loop (4 jobs)`."""
        with self._lock:
            over = sum(all(job.number in self._ended for job in unit.jobs) for unit in self._units)
        return groups_text([(unit.strategy, len(unit.jobs)) for unit in self._units], over)

    def _line_now_and_then(self) -> None:
        if self._live is not None:
            return
        with self._lock:
            now = self._clock()
            due = now - self._shown >= LINE_SECONDS
            if due:
                self._shown = now
        if due:
            self._write(self.summary())

    def _write(self, line: str) -> None:
        live = self._live
        with contextlib.suppress(OSError):
            if live is None:
                print(line, file=self._stream, flush=True)
            else:
                live.console.print(line, markup=False, highlight=False, emoji=False, soft_wrap=True)

    # -- on a terminal

    def _start_live(self) -> None:
        from rich.console import Console
        from rich.live import Live

        console = Console(file=self._stream)
        if not console.is_dumb_terminal:
            self._live = Live(get_renderable=self._picture, console=console, transient=True)
            self._live.start()

    def _picture(self) -> Any:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        with self._lock:
            running = [dataclasses.replace(one) for one in self._running.values()]
        rows = Table.grid(padding=(0, 2))
        for one in running[:_BARS]:
            rows.add_row(
                Text(f"{one.unit.strategy}, {numbers([job.number for job in one.unit.jobs])}"),
                Text(one.stage), ProgressBar(max(one.total, 1), one.done, width=24), Text(f"step {one.done}/{one.total}"),
                Text(f"{one.rate:,.0f} steps/s, {duration((one.total - one.done) / one.rate)}" if one.rate else "compiling"),
            )  # fmt: skip
        if len(running) > _BARS:
            rows.add_row(Text(f"and {len(running) - _BARS} more"))
        return Group(rows, Text(self.groups()), Text(self.summary(), style="bold"))
