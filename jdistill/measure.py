"""Latency of a network as it is deployed here: jitted JAX on this machine's default device."""

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import Array

from jdistill.train import forward
from jdistill.types import Model, PyTree

BATCHES = (1, 256)
WARM_UP = 5
MAX_SECONDS = 1.0


def latency(
    model: Model,
    preprocess: Callable[[Array], Array],
    variables: tuple[PyTree, PyTree],
    inputs: np.ndarray,
    repeats: int,
) -> dict[str, dict[str, Any]]:
    """Milliseconds from raw inputs on the device to logits, at each batch size: p50, p90, p99 and the number of calls.

    After `WARM_UP` calls, `repeats` are timed one by one, or as many as fit into `MAX_SECONDS`, at least 5.
    """
    call = forward(model, preprocess)
    out = {}
    for size in BATCHES:
        batch = jax.device_put(np.resize(inputs, (size, *inputs.shape[1:])))
        for _ in range(WARM_UP):
            jax.block_until_ready(call(*variables, batch))
        times: list[float] = []
        while len(times) < repeats and (sum(times) < MAX_SECONDS or len(times) < 5):
            started = time.perf_counter()
            jax.block_until_ready(call(*variables, batch))
            times.append(time.perf_counter() - started)
        p50, p90, p99 = (float(v) for v in np.percentile(np.array(times) * 1e3, (50, 90, 99)))
        out[str(size)] = {"p50": p50, "p90": p90, "p99": p99, "repeats": len(times)}
    return out
