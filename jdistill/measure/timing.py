"""Timing a call: wall and processor time, and latency of a network as it is deployed here, jitted JAX on one device."""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array

from jdistill.errors import UsageError
from jdistill.train import forward
from jdistill.types import Model, PyTree

BATCHES = (1, 256)
WARM_UP = 5
MAX_SECONDS = 1.0


def require_batches(batches: Sequence[int]) -> None:
    """Raises `UsageError` for batch sizes that are not different positive integers."""
    if not batches or min(batches) < 1 or len(set(batches)) < len(batches):
        raise UsageError(f"--batch must be different positive integers such as 1,256, got {','.join(map(str, batches))}")


class Time(NamedTuple):
    """Of one call: milliseconds by the clock, and of all the process's threads on a processor."""

    wall: float
    cpu: float


def timed(call: Callable[[], Any]) -> Time:
    """One call, which must not return before its result is there."""
    cpu, wall = time.process_time_ns(), time.perf_counter_ns()
    call()
    return Time((time.perf_counter_ns() - wall) / 1e6, (time.process_time_ns() - cpu) / 1e6)


def summary(times: Sequence[Time], size: int) -> dict[str, Any]:
    """`p50`, `p90`, `p99` (milliseconds), `cpu50` (of processor time), `throughput` (examples a second), `repeats`.

    Processor time says what a call would take on a machine with nothing else to do, as far as it is one thread's; a median
    by the clock far above it was measured on a busy machine. `throughput` is `size` over the median.
    """
    p50, p90, p99 = (float(v) for v in np.percentile([t.wall for t in times], (50, 90, 99)))
    cpu50 = float(np.median([t.cpu for t in times]))
    return {"p50": p50, "p90": p90, "p99": p99, "cpu50": cpu50, "throughput": 1e3 * size / p50, "repeats": len(times)}


def latency(
    model: Model,
    preprocess: Callable[[Array], Array],
    variables: tuple[PyTree, PyTree],
    inputs: np.ndarray,
    repeats: int,
) -> dict[str, dict[str, Any]]:
    """From raw inputs on the device to logits, at each batch size: what `summary` says.

    After `WARM_UP` calls, `repeats` are timed one by one, or as many as fit into `MAX_SECONDS`, at least 5.
    """
    call = forward(model, preprocess)
    out = {}
    for size in BATCHES:
        batch = jax.device_put(np.resize(inputs, (size, *inputs.shape[1:])))

        def once(batch: Array = batch) -> None:
            jax.block_until_ready(call(*variables, batch))

        for _ in range(WARM_UP):
            once()
        times: list[Time] = []
        while len(times) < repeats and (sum(t.wall for t in times) < MAX_SECONDS * 1e3 or len(times) < 5):
            times.append(timed(once))
        out[str(size)] = summary(times, size)
    return out
