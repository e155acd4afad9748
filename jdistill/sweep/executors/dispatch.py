"""Handing out units and waiting for them: the loop that all executors beyond one process share."""

import collections
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from jdistill.errors import UsageError
from jdistill.standing import Interrupted
from jdistill.sweep.units import Judge, Outcome, Unit

Done = Callable[[Unit, list[Outcome]], None]
Progress = Callable[[Unit, str, int, int, float], None]


class Task(Protocol):
    """A unit that was handed out."""

    @property
    def unit(self) -> Unit: ...

    def poll(self, progress: Progress, judge: Judge | None) -> list[Outcome] | None:
        """Passes on what the process says; the outcomes once the unit has ended."""

    def ask_to_stop(self) -> None:
        """Asks the process to write its checkpoints and end; asking twice does nothing more."""

    def kill(self) -> None:
        """Ends the process now; does nothing where it has ended."""


T = TypeVar("T", bound=Task)


def dispatch(
    units: Sequence[Unit],
    done: Done,
    *,
    start: Callable[[list[Unit]], list[T]],
    wait: Callable[[list[T]], None],
    slots: int,
    stop: Callable[[], bool],
    progress: Progress,
    judge: Judge | None,
    fail_fast: bool,
) -> None:
    """Hands out `units`, at most `slots` at a time, and calls `done(unit, outcomes)` as each ends.

    When `stop()` is true, or with `fail_fast` after the first failed job, no more units are handed out, and those that
    run are asked to write their checkpoints; units that did not run end as `Interrupted`. Tasks still running when an
    exception passes through are killed.

    Args:
      start: hands out some units.
      wait: returns soon after one of the tasks has something to say, at the latest after a second.
    """
    from jdistill.sweep.execute import failed

    waiting, stopping = collections.deque(units), False
    running: list[T] = []
    try:
        while waiting or running:
            if stopping or stop():
                stopping = True
                for task in running:
                    task.ask_to_stop()
                while waiting:
                    done(unit := waiting.popleft(), interrupted(unit))
            elif waiting and len(running) < slots:
                now = [waiting.popleft() for _ in range(min(len(waiting), slots - len(running)))]
                running += start(now)
            if running:
                wait(running)
            for task in list(running):
                unit, outcomes = task.unit, task.poll(progress, judge)
                if outcomes is not None:
                    running.remove(task)
                    stopping = stopping or (fail_fast and any(map(failed, outcomes)))
                    done(unit, outcomes)
    finally:
        for task in running:
            task.kill()


def interrupted(unit: Unit) -> list[Outcome]:
    """The outcomes of a unit that never ran."""
    return [Interrupted("interrupted before it began; the same command runs it") for _ in unit.jobs]


def require(package: str, extra: str, launcher: str) -> None:
    """Raises `UsageError` where an optional package is not installed."""
    import importlib.util

    if importlib.util.find_spec(package) is None:
        raise UsageError(f"hydra/launcher={launcher} needs the package '{package}': pip install 'jdistill[{extra}]'")
