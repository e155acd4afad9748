"""What the threads of one process share: the right to compile, to compute, and to have the machine for themselves."""

import contextlib
import threading
from collections.abc import Iterator


class Machine:
    """Any number of threads may compute at once; one that measures a latency waits until none does, and is then alone.

    `compiling` is a lock for first calls: two threads that need one program shall not both compile it.
    """

    def __init__(self) -> None:
        self.compiling = threading.RLock()
        self._changed = threading.Condition()
        self._busy, self._quiet = 0, 0

    @contextlib.contextmanager
    def busy(self) -> Iterator[None]:
        """While computing; begins no sooner than all who want quiet are done."""
        with self._changed:
            self._changed.wait_for(lambda: not self._quiet)
            self._busy += 1
        try:
            yield
        finally:
            with self._changed:
                self._busy -= 1
                self._changed.notify_all()

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        """While measuring: nobody else computes. Not to be entered within `busy`."""
        with self._changed:
            self._changed.wait_for(lambda: not self._quiet)
            self._quiet += 1
            self._changed.wait_for(lambda: not self._busy)
        try:
            yield
        finally:
            with self._changed:
                self._quiet -= 1
                self._changed.notify_all()


MACHINE = Machine()
