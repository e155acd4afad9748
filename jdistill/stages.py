"""How a run's state begins, enters a stage and leaves it; and what a stage needs, found by tracing on shapes."""

import dataclasses
import functools
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jdistill import schedules
from jdistill.compress.base import Stored, Subject, apply_all, enter
from jdistill.errors import UsageError
from jdistill.method import Stage
from jdistill.pytrees import Carried
from jdistill.teachers.targets import ReadFeatures
from jdistill.train import Parts, TrainState, effective, forward_pass, references, trained
from jdistill.types import Batch, Model, Outputs, PyTree


def init_state(parts: Parts, key: Array, sample: Batch) -> TrainState:
    """The state before the first stage: networks initialised, no optimizer state yet (`enter_stage` makes it).

    `sample` is a raw batch, abstract or not; only shapes and dtypes are used.
    """
    inputs = prepared(parts, sample)["inputs"]
    params: dict[str, PyTree] = {}
    model_state: dict[str, PyTree] = {"loss": {}}
    outputs: dict[str, Outputs] = {}
    for i, learner in enumerate(parts.learners):
        source = inputs if learner.reads is None else outputs[learner.reads].features
        name, own = learner.name, jax.random.fold_in(key, i)
        params[name], model_state[name] = learner.model.init(own, source)
        if any(other.reads == name for other in parts.learners):
            outputs[name] = _abstract(learner.model, params[name], model_state[name], source)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        stage_step=jnp.zeros((), jnp.int32),
        params={**params, "loss": {}},
        model_state=model_state,
        opt_state=(),
        compressor_state=(),
    )


def prepared(parts: Parts, sample: Batch) -> Batch:
    """Shapes of the batch that is made of the raw batch `sample`."""
    if parts.sampler is not None:
        return parts.sampler.shapes(sample)
    return {**sample, "inputs": jax.eval_shape(parts.preprocess, sample["inputs"])}


def _abstract(model: Model, params: PyTree, state: PyTree, inputs: PyTree) -> Outputs:
    """Shapes of a network's outputs in evaluation mode, without computing anything."""
    return jax.eval_shape(lambda p, s, x: model.apply(p, s, x, train=False)[0], params, state, inputs)


def abstract(model: Model, inputs: Any) -> Outputs:
    """Shapes of what a network gives for `inputs` (abstract or not); kept, since every job of a sweep asks for the same."""
    leaves, treedef = jax.tree.flatten(inputs)
    return _abstract_of(model, treedef, tuple((tuple(leaf.shape), jnp.dtype(leaf.dtype)) for leaf in leaves))


@functools.lru_cache(maxsize=64)
def _abstract_of(model: Model, treedef: Any, shapes: Any) -> Outputs:
    given = jax.tree.unflatten(treedef, [jax.ShapeDtypeStruct(*shape) for shape in shapes])
    return jax.eval_shape(lambda x: model.apply(*model.init(jax.random.key(0), x), x, train=False)[0], given)


def leave_stage(stage: Stage, state: TrainState) -> TrainState:
    """The state at the end of a stage, with what was tuned made part of the student."""
    if stage.tuning is None:
        return state
    params = {name: tree for name, tree in state.params.items() if name != "tuning"}
    params["student"] = jax.jit(stage.tuning.apply)(params["student"], state.params["tuning"])
    return dataclasses.replace(state, params=params)


def enter_stage(
    parts: Parts, stage: Stage, state: TrainState, key: Array, sample: Batch, frozen: PyTree, label: Array,
    outputs: dict[str, Outputs] | None = None, first: Callable[[], tuple[PyTree, PyTree]] | None = None,
    rows: Callable[[int], PyTree] | None = None,
) -> TrainState:  # fmt: skip
    """The state with which a stage begins: what its losses, tuning and compressors hold is made, optimizer state fresh.

    Parameters and states of the previous stage's losses are kept for terms of the same name. `label` [N] int32 holds the
    training labels. `outputs` are the shapes that `abstract_outputs` gives, where the caller has them already. `first` gives
    the student's parameters and running statistics before any training, `rows` preprocessed training inputs (`Subject`);
    by default these are zeros.
    """
    steps, stage = stage.compressors, schedules.at_start(stage)
    params, model_state = dict(state.params), dict(state.model_state)
    for name, origin in stage.starts:
        params[name], model_state[name] = (jax.tree.map(jnp.copy, tree[origin]) for tree in (params, model_state))
    outputs = outputs or abstract_outputs(parts, state, sample, frozen, stage)
    losses: dict[str, tuple[PyTree, PyTree]] = {}
    for i, term in enumerate(stage.terms):
        own, pair = jax.random.fold_in(key, 1000 + i), (outputs[term.learner], outputs.get(term.teacher or ""))
        losses[term.name] = (
            params["loss"].get(term.name) or term.loss.init(own, *pair),
            model_state["loss"].get(term.name) or term.loss.init_state(jax.random.fold_in(own, 0), *pair, label),
        )
    params["loss"], model_state["loss"] = ({name: pair[i] for name, pair in losses.items()} for i in (0, 1))
    inputs, rows = prepared(parts, sample)["inputs"], rows or partial(calibration_rows, parts, None, sample)
    student = Stored(params["student"], state.compressor_state)
    for i in range(len(student.states), len(steps)):
        begun = first() if first is not None and steps[i].rewinds else None
        subject = Subject(parts.learners[0].model, inputs, model_state["student"], rows)
        student = enter(steps[: i + 1], student, jax.random.fold_in(key, 2000 + i), begun and begun[0], subject)
        if begun is not None:
            model_state["student"] = begun[1]
    params["student"] = student.params
    if stage.tuning is not None:
        params["tuning"] = jax.jit(stage.tuning.init)(jax.random.fold_in(key, 999), params["student"])
    return TrainState(
        step=state.step,
        stage_step=jnp.zeros((), jnp.int32),
        params=params,
        model_state=model_state,
        opt_state=stage.optim.init(trained(stage, params)),
        compressor_state=student.states,
    )


def calibration_rows(parts: Parts, inputs: Any, sample: Batch, count: int) -> PyTree:
    """`count` preprocessed training inputs, evenly spaced over `inputs` [N, ...]; zeros of their shape where that is None.

    Raises:
      UsageError: the task makes requests, which differ in every step.
    """
    if parts.sampler is not None:
        raise UsageError(
            "compression: activations=static is calibrated on rows of inputs, and this task makes requests; "
            "use activations=dynamic"
        )
    if inputs is None:
        return jax.tree.map(lambda x: jnp.zeros((count, *x.shape[1:]), x.dtype), prepared(parts, sample)["inputs"])
    rows = np.linspace(0, len(inputs) - 1, min(count, len(inputs))).astype(int)
    return jax.jit(parts.preprocess)(inputs[rows])


def abstract_outputs(parts: Parts, state: TrainState, sample: Batch, frozen: PyTree, stage: Stage) -> dict[str, Outputs]:
    """Shapes of what every network of a stage gives for `sample`, without computing anything; kept for other runs."""
    done = len(state.compressor_state)
    student = jax.eval_shape(partial(apply_all, stage.compressors[:done]), state.params["student"], state.compressor_state)
    given = ({**state.params, "student": student}, state.model_state, sample, frozen)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), given)
    leaves, treedef = jax.tree.flatten(shapes)
    wanted = (frozenset(stage.read()), any(term.loss.reads_initial for term in stage.terms))
    return _abstract_outputs(parts, treedef, tuple((leaf.shape, leaf.dtype) for leaf in leaves), wanted, Carried(stage))


@functools.lru_cache(maxsize=256)
def _abstract_outputs(parts: Parts, treedef: Any, shapes: Any, wanted: Any, carried: Carried) -> dict[str, Outputs]:
    del wanted
    leaves = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes]
    params, model_state, sample, frozen = jax.tree.unflatten(treedef, leaves)
    batch = prepared(parts, sample)
    known: dict[str, Outputs] = {}
    for learner in parts.learners:
        source = batch["inputs"] if learner.reads is None else known[learner.reads].features
        known[learner.name] = _abstract(learner.model, params[learner.name], model_state[learner.name], source)
    return known | jax.eval_shape(partial(references, parts, carried.value), frozen, batch)


def features_read(parts: Parts, stage: Stage, state: TrainState, frozen: PyTree, sample: Batch) -> dict[str, set[str]]:
    """Which features of each frozen network the terms of an entered stage read; found by tracing them on shapes."""
    stage = schedules.at_start(stage)
    batch = prepared(parts, sample)
    spies: dict[str, ReadFeatures] = {}

    def trace(state, frozen, batch, key):
        referred = references(parts, stage, frozen, batch)
        spies.update({name: ReadFeatures(outputs.features) for name, outputs in referred.items()})
        spied = {name: outputs._replace(features=spies[name]) for name, outputs in referred.items()}
        params = effective(stage, state.params, state.compressor_state)
        return forward_pass(parts, stage, params, state.model_state, frozen, spied, batch, key).total

    jax.eval_shape(trace, state, frozen, batch, jax.random.key(0))
    return {name: spy.read for name, spy in spies.items()}
