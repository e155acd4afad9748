"""What a sweep is made of: jobs, and units of jobs that are trained together."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

Outcome = dict[str, Any] | Exception
"""What became of a job: its result, as in `result.json`, or what ended it."""

Judge = Callable[[int, int, dict[str, float]], str | None]
"""`(job number, epoch, held-out metrics)` -> why the job is hopeless and shall stop, or None. Called after each evaluation."""


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
