"""How the members of a `fit` stand: which still run, how the others ended, which epoch of each was the best."""

from typing import NamedTuple

import numpy as np

from jdistill.errors import RunError

RUNNING, STOPPED, DIVERGED, PRUNED = range(4)


class Diverged(RunError):
    """The training loss is no longer a finite number."""


class Pruned(RunError):
    """A search stopped the run, since it looked hopeless."""


class Interrupted(RunError):
    """The run was asked to stop; a checkpoint was written and the same command continues it."""


FINAL: dict[str, type[RunError]] = {"diverged": Diverged, "pruned": Pruned}
"""How a run may end, other than finished, so that another session need not try again."""


def status_of(error: Exception) -> str:
    """The status of a job that `error` ended."""
    return next((name for name, kind in FINAL.items() if isinstance(error, kind)), "failed")


class Standing(NamedTuple):
    """Of N members, M of which are still in the state (those that ended leave it when half of them have).

    Attributes:
      slots: [M] int64, which member stands at each row of the state.
      ended: [N] int64, `RUNNING` or how it ended.
      ended_epoch: [N] int64, when, in epochs since the start.
      log_bytes: [N] int64, length of the member's metrics file.
      best_value: [N] float64, best held-out value of the present stage, -inf before any.
      best_epoch: [N] int64, its epoch.
    """

    slots: np.ndarray
    ended: np.ndarray
    ended_epoch: np.ndarray
    log_bytes: np.ndarray
    best_value: np.ndarray
    best_epoch: np.ndarray

    @classmethod
    def beginning(cls, count: int, width: int | None = None) -> "Standing":
        """`count` members, all running; `width` rows in the state where it is another number."""
        slots = np.arange(count if width is None else width, dtype=np.int64)
        ended, when, log, best = (np.zeros(count, np.int64) for _ in range(4))
        return cls(slots, ended, when, log, np.full(count, -np.inf), best)

    @property
    def running(self) -> np.ndarray:
        """[N] bool."""
        return self.ended == RUNNING

    def end(self, member: int, how: int, epoch: int) -> None:
        """Notes that a member ended; the first reason counts."""
        if self.ended[member] == RUNNING:
            self.ended[member], self.ended_epoch[member] = how, epoch

    def compact(self, multiple: int) -> np.ndarray | None:
        """The rows of the state to keep, once half of them are of members that ended; None before.

        Their number stays a multiple of `multiple` (of devices). The rule looks at nothing but the standing, so that a
        resumed population shrinks when the undisturbed one would.
        """
        running = np.flatnonzero(self.running[self.slots])
        wanted = -(-len(running) // multiple) * multiple
        if not len(running) or wanted > len(self.slots) // 2:
            return None
        ended = np.flatnonzero(~self.running[self.slots])
        return np.sort(np.concatenate([running, ended[: wanted - len(running)]]))
