"""What a sweep is made of: jobs, and units of jobs that are trained together."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jdistill.errors import UsageError, did_you_mean

Outcome = dict[str, Any] | Exception
"""What became of a job: its result, as in `result.json`, or what ended it."""

Judge = Callable[[int, int, dict[str, float]], str | None]
"""`(job number, epoch, held-out metrics)` -> why the job is hopeless and shall stop, or None. Called after each evaluation."""


STRATEGIES = ("auto", "loop", "vmap")


@dataclasses.dataclass(frozen=True)
class Settings:
    """The launcher's keys.

    Attributes:
      strategy: `loop` (job by job), `vmap` (jobs of one structure in each step), or by the rule of `sweep.plan` (`auto`).
      workers: units carried out at a time; 0 for a rule: a core each on a CPU, one on an accelerator.
      max_members: jobs in one program at most; 0 for as many as the rule finds good.
      platform: where the units will run, such as `gpu`; None for where this process does.
    """

    strategy: str = "auto"
    workers: int = 0
    max_members: int = 0
    platform: str | None = None

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            hint = did_you_mean(self.strategy, STRATEGIES)
            raise UsageError(f"hydra.launcher.strategy must be one of {', '.join(STRATEGIES)}, got {self.strategy!r}{hint}")
        for name in ("workers", "max_members"):
            if getattr(self, name) < 0:
                raise UsageError(f"hydra.launcher.{name} must be at least 0, got {getattr(self, name)}")


@dataclasses.dataclass(frozen=True)
class Job:
    """One job of a sweep, free of Hydra and of JAX: it can be sent to another process.

    Attributes:
      number: counted from 0 over the sweep.
      overrides: what its command line says, without Hydra's own keys.
      config: the composed and resolved config, without Hydra's node.
      choices: config group -> name of the option.
      folder: its run folder, absolute.
    """

    number: int
    overrides: tuple[str, ...]
    config: dict[str, Any]
    choices: dict[str, str]
    folder: Path

    @functools.cached_property
    def identity(self) -> str:
        """The fingerprint of the config."""
        from jdistill.config import fingerprint

        return fingerprint(self.config)

    @functools.cached_property
    def blueprint(self) -> Any:
        """What the config describes, checked; raises `UsageError`. It stays in this process."""
        from jdistill.blueprint import read

        return read(self.config)

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


@dataclasses.dataclass(frozen=True)
class Unit:
    """Jobs that are carried out together, by one worker: one job alone, or a population trained in one program.

    Attributes:
      jobs: in order; their results are in the same order.
      strategy: `loop` (one job, or one after another) or `vmap` (all in each step).
      reason: why.
      folder: of a population: where its record and its checkpoints are.
    """

    jobs: tuple[Job, ...]
    strategy: str
    reason: str
    folder: Path | None = None
