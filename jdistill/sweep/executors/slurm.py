"""Units as Slurm jobs, by submitit; or, to rehearse, as processes of submitit's local executor."""

import contextlib
import dataclasses
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jdistill.errors import RunError, UsageError
from jdistill.sweep.executors.dispatch import Done, Progress, dispatch, interrupted, require
from jdistill.sweep.executors.mailbox import Mailbox, Reader
from jdistill.sweep.executors.processes import shares_of_machine, visible_gpus
from jdistill.sweep.units import Judge, Outcome, Unit
from jdistill.sweep.worker import CARRY, Packed, Settings, carry_out, lost, settings_of, unpack

POLL_SECONDS = 0.5
CLUSTERS = ("slurm", "local")


@dataclasses.dataclass(frozen=True)
class Slurm:
    """One Slurm job a unit. All processes must see the sweep folder and the cache.

    A job that is about to be preempted, or reaches its time limit, writes its checkpoints and is put in the queue again.
    Jobs live on without the process that submitted them; what they have finished is on disk.

    Attributes:
      folder: for submitit's scripts, pickles and logs.
      cluster: `slurm`, or `local`: processes of this machine, at most `workers` at a time.
      partition, timeout_min, gpus_per_node, cpus_per_task, mem_gb: what a job asks for; None leaves it to Slurm. On
        `local` only `timeout_min` and `gpus_per_node` count.
      array_parallelism: how many jobs may run at a time.
      max_num_timeout: how many times a job that reached its time limit is put in the queue again.
      additional_parameters: more parameters of sbatch, such as `{account: x, qos: y}`.
      setup: shell lines at a job's start, such as `module load cuda`.
      workers: of `local`; 0: as for `hydra/launcher=processes`.
      carry: what carries a unit out.
    """

    folder: Path
    cluster: str = "slurm"
    partition: str | None = None
    timeout_min: int = 240
    gpus_per_node: int | None = None
    cpus_per_task: int | None = None
    mem_gb: float | None = None
    array_parallelism: int = 256
    max_num_timeout: int = 20
    additional_parameters: dict[str, Any] = dataclasses.field(default_factory=dict)
    setup: tuple[str, ...] = ()
    workers: int = 0
    carry: str = CARRY

    def __post_init__(self) -> None:
        if self.cluster not in CLUSTERS:
            raise UsageError(f"hydra.launcher.cluster must be slurm or local, got '{self.cluster}'")
        for key in ("timeout_min", "cpus_per_task", "array_parallelism"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise UsageError(f"hydra.launcher.{key} must be 1 or more, got {value}")
        require("submitit", "slurm", "slurm")

    def run(
        self, units: Sequence[Unit], done: Done, *, stop: Callable[[], bool], progress: Progress,
        judge: Judge | None = None, fail_fast: bool = False,
    ) -> None:  # fmt: skip
        """Carries out all units; see `dispatch`."""
        if not units:
            return
        settings = settings_of(tuple(units), fail_fast, self.carry)
        executor, shares = self._executor(), self._shares(len(units))
        free = list(shares) if shares else []

        def start(some: list[Unit]) -> list[Submitted]:
            errands, readers = [], []
            for unit in some:
                readers.append(Reader(self.folder / f"unit-{unit.jobs[0].number}"))
                environment = free.pop() if shares else {}
                errands.append(Errand(unit, settings, readers[-1].folder, judge is not None, environment))
            with _ctrl_c_kept_away(), executor.batch():
                jobs = [executor.submit(errand) for errand in errands]
            return [Submitted(*parts, free) for parts in zip(jobs, errands, readers, strict=True)]

        dispatch(
            units, done, start=start, wait=lambda _: time.sleep(POLL_SECONDS), slots=len(shares) or len(units), stop=stop,
            progress=progress, judge=judge, fail_fast=fail_fast,
        )  # fmt: skip

    def _shares(self, units: int) -> list[dict[str, str]]:
        """The environment of each process of `local`; none on Slurm, which shares out the machines itself."""
        if self.cluster == "slurm":
            return []
        gpus = visible_gpus("auto" if self.gpus_per_node is None else self.gpus_per_node)
        return [{"CUDA_VISIBLE_DEVICES": "", **share} for share in shares_of_machine(self.workers, gpus, units)]

    def _executor(self) -> Any:
        import submitit

        slurm = {"slurm_max_num_timeout": self.max_num_timeout} if self.cluster == "slurm" else {}
        try:
            executor = submitit.AutoExecutor(folder=self.folder, cluster=self.cluster, **slurm)
        except RuntimeError as error:  # no sbatch
            raise UsageError(
                f"hydra/launcher=slurm: {error} (hydra.launcher.cluster=local rehearses on this machine)"
            ) from error
        executor.update_parameters(name="jdistill", timeout_min=self.timeout_min)
        if self.cluster == "slurm":
            executor.update_parameters(
                gpus_per_node=self.gpus_per_node, cpus_per_task=self.cpus_per_task, mem_gb=self.mem_gb,
                slurm_partition=self.partition, slurm_array_parallelism=self.array_parallelism,
                slurm_setup=list(self.setup) or None, slurm_additional_parameters=self.additional_parameters or None,
            )  # fmt: skip
        return executor


@dataclasses.dataclass
class Errand:
    """What submitit pickles and calls on the other machine.

    The signal that submitit sends before a preemption or a time limit is taken as a wish to stop; once the checkpoints
    are written, submitit's own handler puts the job in the queue again.
    """

    unit: Unit
    settings: Settings
    mailbox: Path
    judged: bool
    environment: dict[str, str]

    def __call__(self) -> list[Packed]:
        os.environ.update(self.environment)  # before JAX looks for devices; submitit's own choice would be no GPU, or GPU 0
        name = f"SIG{os.environ.get('SUBMITIT_PREEMPT_SIGNAL', 'USR2')}"
        number, told = getattr(signal, name), []
        requeue = signal.signal(number, lambda *caught: told.append(caught))
        channel = Mailbox(self.mailbox, lambda: bool(told))
        channel.began()
        outcomes = carry_out(self.unit, self.settings, channel, self.judged)
        if told and callable(requeue) and any(isinstance(o, tuple) and o[0] == "Interrupted" for o in outcomes):
            requeue(*told[0])  # does not return
        signal.signal(number, requeue)
        return outcomes

    def checkpoint(self) -> Any:
        """What is put in the queue again: the same, since the unit goes on from its checkpoints."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


@dataclasses.dataclass
class Submitted:
    """A unit in the queue, or running."""

    job: Any
    errand: Errand
    reader: Reader
    free: list[dict[str, str]]
    stopping: bool = False

    @property
    def unit(self) -> Unit:
        return self.errand.unit

    def poll(self, progress: Progress, judge: Judge | None) -> list[Outcome] | None:
        self.reader.poll(self.unit, progress, judge)
        if not self.job.done():
            return None
        self.free.append(self.errand.environment)
        if self.stopping and not self.reader.has_begun:
            return interrupted(self.unit)
        return self._outcomes()

    def ask_to_stop(self) -> None:
        if not self.stopping:
            self.stopping = True
            self.reader.ask_to_stop()
            if not self.reader.has_begun:
                self.job.cancel(check=False)

    def kill(self) -> None:
        self.ask_to_stop()
        self.job.cancel(check=False)

    def _outcomes(self) -> list[Outcome]:
        import submitit

        log = f"its log is {self.job.paths.stderr}"
        try:
            if "local" in type(self.job).__name__.lower() and not self.job.paths.result_pickle.exists():
                raise RunError  # submitit would wait for a slow file system
            return [unpack(packed) for packed in self.job.result()]
        except (RunError, submitit.core.utils.UncompletedJobError, submitit.core.utils.FailedJobError):
            return lost(self.unit, f"the job {self.job.job_id} died (state {self.job.state}; {log})")


@contextlib.contextmanager
def _ctrl_c_kept_away() -> Iterator[None]:
    """Processes started here do not get the terminal's Ctrl-C: their parent tells them to stop."""
    try:
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    except ValueError:  # not in the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
