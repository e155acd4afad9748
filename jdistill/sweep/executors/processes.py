"""Units in processes of this machine: one worker a GPU, or a few that share the CPU's cores."""

import contextlib
import dataclasses
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from multiprocessing import connection
from pathlib import Path
from typing import Any

from jdistill.environment import cores
from jdistill.errors import UsageError
from jdistill.sweep.executors.dispatch import Done, Progress, dispatch
from jdistill.sweep.units import Judge, Outcome, Unit
from jdistill.sweep.worker import CARRY, Settings, lost, settings_of, unpack

POLL_SECONDS = 0.2


@dataclasses.dataclass(frozen=True)
class Processes:
    """Worker processes that serve units one after another, each on its own share of the machine.

    A worker that dies takes only its own unit with it; another takes its place.

    Attributes:
      folder: for the workers' logs, `0.log`, `1.log`, ...
      workers: how many at a time; 0: one a GPU, without GPUs one a core.
      gpus: `auto`, or how many to use; worker i sees GPU i modulo `gpus`, and no other.
      carry: what carries a unit out in a worker.
    """

    folder: Path
    workers: int = 0
    gpus: str | int = "auto"
    carry: str = CARRY

    def __post_init__(self) -> None:
        if self.gpus != "auto" and (not isinstance(self.gpus, int) or self.gpus < 0):
            raise UsageError(f"hydra.launcher.gpus must be 'auto' or a count, 0 or more, got '{self.gpus}'")

    def run(
        self, units: Sequence[Unit], done: Done, *, stop: Callable[[], bool], progress: Progress,
        judge: Judge | None = None, fail_fast: bool = False,
    ) -> None:  # fmt: skip
        """Carries out all units; see `dispatch`."""
        if not units:
            return
        shares = shares_of_machine(self.workers, visible_gpus(self.gpus), len(units))
        settings = settings_of(tuple(units), fail_fast, self.carry)
        self.folder.mkdir(parents=True, exist_ok=True)
        slots = [Slot(self.folder / f"{i}.log", share) for i, share in enumerate(shares)]

        def start(some: list[Unit]) -> list[Slot]:
            free = [slot for slot in slots if slot.unit is None]
            return [slot.begin(unit, settings, judge is not None) for slot, unit in zip(free, some, strict=False)]

        def wait(running: list[Slot]) -> None:
            connection.wait([slot.connection for slot in running], timeout=POLL_SECONDS)

        try:
            dispatch(
                units, done, start=start, wait=wait, slots=len(slots), stop=stop, progress=progress, judge=judge,
                fail_fast=fail_fast,
            )  # fmt: skip
        finally:
            for slot in slots:
                slot.close()


class Slot:
    """A place for a worker process, started when it is needed, and again after it died."""

    def __init__(self, log: Path, environment: dict[str, str]):
        self.log, self.environment = log, environment
        self.process: subprocess.Popen[bytes] | None = None
        self.connection: Any = None
        self.unit: Any = None
        self._asked = False

    def begin(self, unit: Unit, settings: Settings, judged: bool) -> "Slot":
        """Hands `unit` to the worker of this slot."""
        self.unit = unit
        if self.process is None or self.process.poll() is not None:
            self._start()
        self._send("unit", (unit, settings, judged))
        return self

    def poll(self, progress: Progress, judge: Judge | None) -> list[Outcome] | None:
        """Answers what the worker says; the outcomes once it has ended the unit, or died."""
        try:
            while self.connection.poll():
                kind, value = self.connection.recv()
                if kind == "outcomes":
                    return self._ended([unpack(packed) for packed in value])
                if kind == "progress":
                    progress(self.unit, *value)
                elif judge is not None:
                    self._send("verdict", judge(*value))
        except (EOFError, OSError):
            assert self.process is not None
            return self._ended(lost(self.unit, f"the worker process died ({_end(self.process.wait())}; its log is {self.log})"))
        return None

    def ask_to_stop(self) -> None:
        if not self._asked:
            self._asked = True
            self._send("stop", None)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()

    def close(self) -> None:
        """Ends the worker, which has nothing to do."""
        if self.process is not None:
            self.connection.close()
            self.process.wait()
            self.process = None

    def _start(self) -> None:
        self.close()
        ours, theirs = connection.Pipe()
        environment = {**os.environ, **self.environment, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        with self.log.open("ab") as log:  # -P: the modules that this process sees, no others
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "jdistill.sweep.worker", str(theirs.fileno())],
                pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment,
            )  # fmt: skip
        theirs.close()
        self.connection = ours

    def _ended(self, outcomes: list[Outcome]) -> list[Outcome]:
        self.unit, self._asked = None, False
        return outcomes

    def _send(self, kind: str, value: Any) -> None:
        with contextlib.suppress(OSError):  # it is dead: poll says so
            self.connection.send((kind, value))


def shares_of_machine(workers: int, gpus: list[str], units: int) -> list[dict[str, str]]:
    """The environment of each worker: its GPU or none, and how many threads it may compute with.

    XLA takes the number of its threads from PJRT_NPROC, measured with jax 0.10.2; OMP_NUM_THREADS and
    `--xla_cpu_multi_thread_eigen=false` have no effect there.
    """
    count = min(units, workers or len(gpus) or cores())
    threads = {"PJRT_NPROC": str(max(1, cores() // count))}
    if not gpus:
        return [threads] * count
    return [{**threads, "CUDA_VISIBLE_DEVICES": gpus[i % len(gpus)]} for i in range(count)]


def visible_gpus(wanted: str | int) -> list[str]:
    """The NVIDIA GPUs that workers may use, as CUDA_VISIBLE_DEVICES names them, without asking JAX, which would take them.

    Raises:
      UsageError: more were wanted than there are.
    """
    found = _found_gpus()
    if wanted == "auto":
        return found
    if int(wanted) > len(found):
        raise UsageError(f"hydra.launcher.gpus={wanted}, but {len(found)} can be used here")
    return found[: int(wanted)]


def _found_gpus() -> list[str]:
    platforms = os.environ.get("JAX_PLATFORMS", "")
    supported = any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13))
    if not supported or (platforms and not {"cuda", "gpu"} & set(platforms.split(","))):
        return []
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [name for name in given.split(",") if name]
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    listed = subprocess.run([tool, "-L"], capture_output=True, text=True, check=False).stdout.splitlines()
    return [str(i) for i in range(sum(line.startswith("GPU ") for line in listed))]


def _end(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    return f"signal {-code}{', perhaps out of memory' if -code == signal.SIGKILL else ''}"
