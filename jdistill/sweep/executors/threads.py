"""Units in this process, several at a time: compiled programs run without Python's lock, and share data and teachers."""

import dataclasses
import queue
import threading
from collections.abc import Sequence

from jdistill.sweep.execute import failed, run_unit
from jdistill.sweep.executors.dispatch import Done, Progress, interrupted
from jdistill.sweep.units import Judge, Outcome, Unit
from jdistill.training import Stop


@dataclasses.dataclass(frozen=True)
class Threads:
    """At most `workers` units at a time, each in a thread; a single one in the calling thread."""

    workers: int = 1

    def run(
        self, units: Sequence[Unit], done: Done, *, stop: Stop, progress: Progress, judge: Judge | None, fail_fast: bool
    ) -> None:
        """Carries out all units, and calls `done(unit, outcomes)` here as each ends."""
        ended = threading.Event()
        stopping = lambda: stop() or ended.is_set()  # noqa: E731

        def carry_out(unit: Unit) -> list[Outcome]:
            if stopping():
                return interrupted(unit)
            progress(unit, "", 0, 1, 0.0)
            given = {"stop": stopping, "progress": progress, "judge": judge, "fail_fast": fail_fast}
            try:
                outcomes = run_unit(unit, **given)  # type: ignore[arg-type]
            except Exception as error:
                outcomes = [error for _ in unit.jobs]
            if fail_fast and any(map(failed, outcomes)):
                ended.set()
            return outcomes

        if min(self.workers, len(units)) < 2:
            for unit in units:
                done(unit, carry_out(unit))
            return
        waiting: queue.SimpleQueue[Unit | None] = queue.SimpleQueue()
        finished: queue.SimpleQueue[tuple[Unit, list[Outcome]]] = queue.SimpleQueue()

        def work() -> None:
            while (unit := waiting.get()) is not None:
                finished.put((unit, carry_out(unit)))

        for unit in units:
            waiting.put(unit)
        threads = [threading.Thread(target=work, daemon=True) for _ in range(min(self.workers, len(units)))]
        for thread in threads:
            waiting.put(None)
            thread.start()
        for _ in units:
            done(*_next(finished))


def _next(finished: "queue.SimpleQueue[tuple[Unit, list[Outcome]]]") -> tuple[Unit, list[Outcome]]:
    """Waits in short pieces, so that a signal is seen."""
    while True:
        try:
            return finished.get(timeout=0.5)
        except queue.Empty:
            continue
