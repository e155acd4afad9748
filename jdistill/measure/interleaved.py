"""Comparing what several models take, in one process and in turns: what disturbs one measurement disturbs all."""

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from jdistill.checkpoint import first_line
from jdistill.errors import UsageError
from jdistill.measure.timing import WARM_UP, Time, summary, timed
from jdistill.report.stats import mean_interval

SECONDS = 10.0
"""What the calls of one model at one batch size may take in all; slower ones are repeated less often."""


class Subject(NamedTuple):
    """A model in a runtime.

    Attributes:
      name: of the model in tables.
      runtime: `jax`, `onnx`, ...
      call: raw rows [B, ...] -> outputs, both NumPy arrays.
      inputs: raw rows [N, ...] of data, from which batches are taken.
    """

    name: str
    runtime: str
    call: Callable[[np.ndarray], np.ndarray]
    inputs: np.ndarray

    def batch(self, size: int) -> np.ndarray:
        """The first `size` rows, over again where there are fewer."""
        return np.ascontiguousarray(np.resize(self.inputs, (size, *self.inputs.shape[1:])))


def interleaved(subjects: Sequence[Subject], size: int, repeats: int, rounds: int) -> list[dict[str, Any]]:
    """Times all models at batches of `size` rows: one row each, in their order.

    In each of `rounds` rounds every model has a turn, in a random order, of one call that is not counted and
    `repeats / rounds` that are. `ratio` is the geometric mean over rounds of the median time of a turn over that of the
    first model's turn in the same round, `ratio.low` and `ratio.high` its 95 % confidence interval (t on the logarithms);
    `cpu_ratio` likewise of processor time.

    Returns:
      `model`, `runtime`, `batch`, `baseline` (whether it is the first), what `timing.summary` says, and the ratios.

    Raises:
      UsageError: a model cannot take the rows.
    """
    calls = [_prepared(subject, size) for subject in subjects]
    turns = [_calls_per_turn(call, repeats, rounds) for call in calls]
    times: list[list[list[Time]]] = [[] for _ in subjects]
    order = np.random.default_rng(0)  # in a fixed order each model would always run in the caches that the same one left
    for _ in range(rounds):
        for i in order.permutation(len(subjects)):
            calls[i]()
            times[i].append([timed(calls[i]) for _ in range(turns[i])])
    medians = [np.array([np.median(turn, axis=0) for turn in own]) for own in times]  # [rounds, (wall, cpu)]
    rows = []
    for i, subject in enumerate(subjects):
        about = {"model": subject.name, "runtime": subject.runtime, "batch": size, "baseline": i == 0}
        own = summary([t for turn in times[i] for t in turn], size)
        logs = np.log(medians[i]) - np.log(medians[0])
        rows.append({**about, **own, **_ratio("ratio", logs[:, 0]), **_ratio("cpu_ratio", logs[:, 1])})
    return rows


def _prepared(subject: Subject, size: int) -> Callable[[], None]:
    """The call that is timed, once it has been warmed up."""
    batch = subject.batch(size)

    def call() -> None:
        subject.call(batch)

    try:
        for _ in range(WARM_UP):
            call()
    except (ValueError, TypeError, RuntimeError, IndexError) as error:
        shape = "x".join(map(str, batch.shape))
        raise UsageError(
            f"{subject.name} cannot be given {shape} {batch.dtype} rows of the data: {first_line(error)}"
        ) from error
    return call


def _calls_per_turn(call: Callable[[], None], repeats: int, rounds: int) -> int:
    one = timed(call).wall / 1e3
    return max(1, min(math.ceil(repeats / rounds), int(SECONDS / rounds / max(one, 1e-9))))


def _ratio(name: str, logs: np.ndarray) -> dict[str, float]:
    found = zip(("", ".low", ".high"), (logs.mean(), *mean_interval(logs)), strict=True)
    return {f"{name}{end}": float(np.exp(value)) for end, value in found}


@contextlib.contextmanager
def one_core() -> Iterator[bool]:
    """Keeps this thread, and those it starts, on one core; whether the system can do that. To be entered before JAX starts."""
    if not hasattr(os, "sched_setaffinity"):
        yield False
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(before)})
    try:
        yield True
    finally:
        os.sched_setaffinity(0, before)


def load_average() -> float | None:
    """Processes that wanted to run, over the last minute; None where the system does not say."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None
