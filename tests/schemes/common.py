"""One step of a stage, from its beginning."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jdistill.fitting import sample_of
from jdistill.method import Stage
from jdistill.stages import enter_stage, init_state
from jdistill.train import Parts, TrainState, make_step
from tests import tiny

LENGTHS = (jnp.float32(5), jnp.float32(3))
KEY = jax.random.key(5)


@functools.lru_cache(maxsize=64)
def _step(parts: Parts) -> Any:
    return jax.jit(make_step(parts))


def begin(parts: Parts, stage: Stage, frozen: Any, dtype: Any = np.float32, **arrays: Any) -> TrainState:
    """A state at the beginning of `stage`; `arrays` are those that a scheme adds to the training set."""
    data = {**tiny.data(dtype=dtype), **arrays}
    sample, key = sample_of(data), jax.random.key(0)
    state = init_state(parts, key, sample)
    if dtype == np.float64:
        state = tiny.as_float64(state)
    return enter_stage(parts, stage, state, key, sample, frozen, jnp.asarray(data["label"]))


def step_once(parts: Parts, stage: Stage, state: TrainState, frozen: Any, **batch: Any) -> tuple[TrainState, dict[str, Any]]:
    """The next state and the step's metrics, on `tiny.batch()` with changes."""
    return _step(parts)(state, frozen, {**tiny.batch(), **batch}, KEY, stage, LENGTHS)
