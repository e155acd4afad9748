"""The students of a fit: as they act, which is what is evaluated, and as they are stored, which is what is reported."""

import jax

from jdistill.method import Stage
from jdistill.schedules import at_end
from jdistill.train import TrainState, effective, stored
from jdistill.types import PyTree


def acting(stage: Stage, state: TrainState, stacked: bool) -> tuple[PyTree, PyTree]:
    """The networks as they act now, `(params, running statistics)`; of a population `stacked` by row of the state.

    What a schedule moves is where it comes to, so that what is evaluated is what would be deployed.
    """
    params = state.params["student"]
    if stage.compressors or stage.tuning is not None:
        params = _acting[stacked](at_end(stage), state.params, state.compressor_state)
    return params, state.model_state["student"]


def reported(stage: Stage, state: TrainState, stacked: bool) -> tuple[PyTree, PyTree, PyTree]:
    """The students as they are stored now, their running statistics, and what their compressors hold."""
    params = state.params["student"]
    if stage.tuning is not None:
        params = _stored[stacked](stage, state.params)
    return params, state.model_state["student"], state.compressor_state


def _act(stage: Stage, params: PyTree, compressor_state: PyTree) -> PyTree:
    return effective(stage, params, compressor_state)["student"]


_acting, _stored = ((jax.jit(form), jax.jit(jax.vmap(form))) for form in (_act, stored))
