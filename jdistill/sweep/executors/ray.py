"""Units as tasks of a Ray cluster."""

import contextlib
import dataclasses
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jdistill.errors import UsageError
from jdistill.sweep.executors.dispatch import Done, Progress, dispatch, interrupted, require
from jdistill.sweep.executors.mailbox import Mailbox, Reader
from jdistill.sweep.units import Judge, Outcome, Unit
from jdistill.sweep.worker import CARRY, Packed, Settings, carry_out, lost, settings_of, unpack

POLL_SECONDS = 0.5
PASSED_ON = ("JDISTILL_", "JAX_", "XLA_")


@dataclasses.dataclass(frozen=True)
class Ray:
    """One Ray task a unit. All nodes must see the sweep folder and the cache.

    A task whose process or node dies is tried again, `retries` times, and goes on from its checkpoints.

    Attributes:
      folder: for what parent and tasks say to each other.
      address: of a running cluster (`auto`, `ray://host:10001`); None starts one on this machine, for this sweep only.
      num_cpus, num_gpus: what a task needs; Ray runs as many at a time as fit.
      retries: how often a task that died is tried again.
      carry: what carries a unit out.
    """

    folder: Path
    address: str | None = None
    num_cpus: float = 1
    num_gpus: float = 0
    retries: int = 3
    carry: str = CARRY

    def __post_init__(self) -> None:
        require("ray", "ray", "ray")
        for key in ("num_cpus", "num_gpus", "retries"):
            if getattr(self, key) < 0:
                raise UsageError(f"hydra.launcher.{key} must be 0 or more, got {getattr(self, key)}")

    def run(
        self, units: Sequence[Unit], done: Done, *, stop: Callable[[], bool], progress: Progress,
        judge: Judge | None = None, fail_fast: bool = False,
    ) -> None:  # fmt: skip
        """Carries out all units; see `dispatch`."""
        if not units:
            return
        import ray

        settings = settings_of(tuple(units), fail_fast, self.carry)
        with self._cluster(ray):
            remote = ray.remote(num_cpus=self.num_cpus, num_gpus=self.num_gpus, max_retries=self.retries)(_carry_out)

            def start(some: list[Unit]) -> list[Submitted]:
                readers = [Reader(self.folder / f"unit-{unit.jobs[0].number}") for unit in some]
                return [
                    Submitted(unit, remote.remote(unit, settings, reader.folder, judge is not None), reader)
                    for unit, reader in zip(some, readers, strict=True)
                ]

            def wait(running: list[Submitted]) -> None:
                ray.wait([task.reference for task in running], timeout=POLL_SECONDS)

            dispatch(
                units, done, start=start, wait=wait, slots=len(units), stop=stop, progress=progress, judge=judge,
                fail_fast=fail_fast,
            )  # fmt: skip

    @contextlib.contextmanager
    def _cluster(self, ray: Any) -> Iterator[None]:
        variables = {name: value for name, value in os.environ.items() if name.startswith(PASSED_ON)}
        variables["PJRT_NPROC"] = str(max(1, int(self.num_cpus)))  # threads of XLA
        handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        alone = {}
        if self.address is None:
            variables["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)  # the modules this process sees
            alone = {"include_dashboard": False}
        given = {"runtime_env": {"env_vars": variables}, "log_to_driver": False, "logging_level": "error", **alone}
        try:
            with warnings.catch_warnings():  # JAX warns of forks; these run another program at once
                warnings.filterwarnings("ignore", message=r"os\.fork\(\) was called")
                ray.init(self.address, **given)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise UsageError(f"hydra.launcher.address={self.address}: no Ray cluster: {error}") from error
        for number, handler in handlers.items():
            signal.signal(number, handler)  # Ray sets its own, which ends this process at once
        try:
            yield
        finally:
            ray.shutdown()


def _carry_out(unit: Unit, settings: Settings, folder: Path, judged: bool) -> list[Packed]:
    channel = Mailbox(folder)
    channel.began()
    return carry_out(unit, settings, channel, judged)


@dataclasses.dataclass
class Submitted:
    """A task that waits for room, or runs."""

    unit: Unit
    reference: Any
    reader: Reader
    stopping: bool = False

    def poll(self, progress: Progress, judge: Judge | None) -> list[Outcome] | None:
        import ray

        self.reader.poll(self.unit, progress, judge)
        if not ray.wait([self.reference], timeout=0)[0]:
            return None
        try:
            return [unpack(packed) for packed in ray.get(self.reference)]
        except ray.exceptions.RayError as error:
            if self.stopping and not self.reader.has_begun:
                return interrupted(self.unit)
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            return lost(self.unit, f"the Ray task died ({type(error).__name__}: {(lines or ['?'])[-1]})")

    def ask_to_stop(self) -> None:
        import ray

        if not self.stopping:
            self.stopping = True
            self.reader.ask_to_stop()
            if not self.reader.has_begun:
                ray.cancel(self.reference)

    def kill(self) -> None:
        import ray

        self.ask_to_stop()
        ray.cancel(self.reference, force=True)
