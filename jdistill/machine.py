"""What the threads of one process share: the right to compile, to compute, and to have the machine for themselves."""

import contextlib
import threading
import time
from collections.abc import Iterator


class Machine:
    """Any number of threads may compute at once; one that measures a latency waits until none does, and is then alone."""

    def __init__(self) -> None:
        self._compiling = threading.RLock()
        self._changed = threading.Condition()
        self._busy = 0
        self._quiet = False
        self._own = threading.local()

    def waited(self) -> float:
        """Seconds that this thread has waited for others, in all."""
        return getattr(self._own, "waited", 0.0)

    @contextlib.contextmanager
    def compiling(self) -> Iterator[None]:
        """For first calls: two threads that need one program shall not both compile it."""
        started = time.perf_counter()
        with self._compiling:
            self._note(started)
            yield

    @contextlib.contextmanager
    def busy(self) -> Iterator[None]:
        """While computing; begins no sooner than whoever wants quiet is done."""
        started = time.perf_counter()
        with self._changed:
            self._changed.wait_for(lambda: not self._quiet)
            self._busy += 1
        self._note(started)
        try:
            yield
        finally:
            with self._changed:
                self._busy -= 1
                self._changed.notify_all()

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        """While measuring: nobody else computes. Not to be entered within `busy`."""
        started = time.perf_counter()
        with self._changed:
            self._changed.wait_for(lambda: not self._quiet)
            self._quiet = True
            self._changed.wait_for(lambda: not self._busy)
        self._note(started)
        try:
            yield
        finally:
            with self._changed:
                self._quiet = False
                self._changed.notify_all()

    def _note(self, started: float) -> None:
        self._own.waited = self.waited() + time.perf_counter() - started


MACHINE = Machine()
