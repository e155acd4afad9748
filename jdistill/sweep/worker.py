"""Carrying out units of a sweep in another process than the one that handed them out.

`carry_out` is what every such process does, whoever started it. `main` is the process of `hydra/launcher=processes`: it
serves one unit after another over a pipe, so that JAX is imported once and compiled programs are kept.

Nothing here imports JAX before the first unit: a process may still be told which devices are its own.
"""

import dataclasses
import importlib
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

from jdistill.errors import RunError, UsageError
from jdistill.sweep.units import Job, Judge, Outcome, Unit

Packed = dict[str, Any] | tuple[str, str]
"""An outcome on its way between processes: a result, or the name of an exception's class and its message."""

CARRY = "jdistill.sweep.worker:train"
GRACE_SECONDS = 60.0
"""How long a process whose parent is gone may take to write its checkpoints."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a process needs to know besides its units.

    Attributes:
      plugins: what `plugins=[...]` names, loaded before the first unit.
      cache: the cache folder, absolute; compiled programs and teachers in it are shared by all processes.
      folder: where the command was given; relative paths of a config start there.
      fail_fast: whether the first failed job of a unit ends it.
      carry: `module:function` that carries a unit out in a process, called as `train` is.
    """

    plugins: tuple[str, ...]
    cache: str
    folder: str
    fail_fast: bool = False
    carry: str = CARRY


class Channel(Protocol):
    """What a process and the one that handed it a unit say to each other meanwhile."""

    def stop(self) -> bool: ...

    def progress(self, stage: str, done: int, total: int, rate: float) -> None: ...

    def judge(self, job: int, epoch: int, metrics: dict[str, float]) -> str | None: ...


def settings_of(units: tuple[Unit, ...], fail_fast: bool, carry: str = CARRY) -> Settings:
    """The settings of a sweep's processes; its jobs share `plugins` and `cache`."""
    from jdistill.paths import cache_folder

    config = units[0].jobs[0].config
    plugins, cache = tuple(config.get("plugins") or ()), str(cache_folder(config.get("cache") or ""))
    return Settings(plugins, cache, os.getcwd(), fail_fast, carry)


def carry_out(unit: Unit, settings: Settings, channel: Channel, judged: bool) -> list[Packed]:
    """Carries `unit` out in this process; never raises: what went wrong is what became of its jobs.

    Args:
      judged: whether a search wants to be asked after each evaluation.
    """
    try:
        module, _, name = settings.carry.partition(":")
        carry: Callable[..., list[Outcome]] = getattr(importlib.import_module(module), name)
        judge: Judge | None = channel.judge if judged else None

        def progress(unit: Unit, stage: str, done: int, total: int, rate: float) -> None:
            channel.progress(stage, done, total, rate)

        found = carry(unit, settings, stop=channel.stop, progress=progress, judge=judge)
        return [pack(outcome) for outcome in found]
    except Exception as error:
        traceback.print_exc()  # into the log of this process
        return [pack(error)] * len(unit.jobs)


def train(
    unit: Unit,
    settings: Settings,
    *,
    stop: Callable[[], bool],
    progress: Callable[[Unit, str, int, int, float], None],
    judge: Judge | None,
) -> list[Outcome]:
    """Trains the jobs of `unit`: what this process would do had the command been given here."""
    prepare(settings)
    from jdistill.sweep.execute import run_unit

    return run_unit(unit, stop=stop, progress=progress, judge=judge, fail_fast=settings.fail_fast)


def prepare(settings: Settings) -> None:
    """Loads plug-ins and sets the caches; a second time it does nothing new.

    Raises:
      UsageError: a plug-in cannot be loaded.
    """
    from jdistill.environment import use_compilation_cache
    from jdistill.paths import CACHE_VARIABLE
    from jdistill.plugins import load_plugins

    if Path(settings.folder).is_dir():
        os.chdir(settings.folder)
    os.environ[CACHE_VARIABLE] = settings.cache
    load_plugins(settings.plugins)
    use_compilation_cache(Path(settings.cache) / "compiled")


def pack(outcome: Outcome) -> Packed:
    """An outcome that can always be pickled: exceptions of other libraries often cannot."""
    if not isinstance(outcome, Exception):
        return outcome
    if isinstance(outcome, RunError | UsageError):
        return type(outcome).__name__, str(outcome)
    return RunError.__name__, f"{type(outcome).__name__}: {outcome}"


def unpack(packed: Packed) -> Outcome:
    """The outcome again; an exception is of its own class where jdistill has it, else a `RunError`."""
    if isinstance(packed, dict):
        return packed
    from jdistill.standing import Diverged, Interrupted, Pruned

    name, text = packed
    known = {kind.__name__: kind for kind in (UsageError, Diverged, Interrupted, Pruned)}
    return known.get(name, RunError)(text)


def lost(unit: Unit, why: str) -> list[Outcome]:
    """The outcomes of a unit whose process is gone: what had ended is on disk, the rest failed, because of `why`."""
    return [_on_disk(job) or RunError(f"{why}; the same command goes on from its last checkpoint") for job in unit.jobs]


def _on_disk(job: Job) -> Outcome | None:
    from jdistill.run import ended

    if job.config.get("force"):
        return None  # it may be the result that was to be repeated
    return ended(job.folder, job.identity)


# -- the process of hydra/launcher=processes


class Pipe:
    """The channel of a process that was started for this: a pipe to its parent. Its end is a wish to stop.

    Messages to the process: `("unit", (unit, settings, judged))`, `("stop", None)`, `("verdict", reason or None)`.
    Messages from it: `("progress", (stage, done, total, rate))`, `("judge", (job, epoch, metrics))`, `("outcomes", list)`.
    """

    def __init__(self, connection: Connection, signalled: Callable[[], bool]):
        self.connection, self.signalled = connection, signalled
        self.units: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._verdicts: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._stop, self._told = False, 0.0
        self._sending = threading.Lock()
        threading.Thread(target=self._listen, daemon=True).start()

    def stop(self) -> bool:
        return self._stop or self.signalled()

    def progress(self, stage: str, done: int, total: int, rate: float) -> None:
        if time.monotonic() - self._told > 0.2 or done == total:
            self._told = time.monotonic()
            self.send("progress", (stage, done, total, rate))

    def judge(self, job: int, epoch: int, metrics: dict[str, float]) -> str | None:
        self.send("judge", (job, epoch, metrics))
        return self._verdicts.get()

    def send(self, kind: str, value: Any) -> None:
        with self._sending:
            try:
                self.connection.send((kind, value))
            except OSError:
                self._stop = True  # nobody is left to hear it

    def _listen(self) -> None:
        try:
            while True:
                kind, value = self.connection.recv()
                if kind == "stop":
                    self._stop = True
                else:
                    (self.units if kind == "unit" else self._verdicts).put(value)
        except (EOFError, OSError):
            self._stop = True
            self._verdicts.put(None)
            self.units.put(None)
            time.sleep(GRACE_SECONDS)
            os._exit(1)


def main(descriptor: int) -> None:
    """Serves units from the pipe `descriptor` until it is closed; SIGTERM stops the unit that runs."""
    terminated = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: terminated.set())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends Ctrl-C to all; the parent passes it on
    pipe = Pipe(Connection(descriptor), terminated.is_set)
    while (work := pipe.units.get()) is not None:
        unit, settings, judged = work
        terminated.clear()
        pipe.send("outcomes", carry_out(unit, settings, pipe, judged))


if __name__ == "__main__":
    main(int(sys.argv[1]))
