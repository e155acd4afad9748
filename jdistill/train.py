"""State, step and the compiled programs a run is made of. Pure: state in, state out; nothing here knows Hydra."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jdistill.compress import apply_all
from jdistill.method import Stage
from jdistill.optim import Clock
from jdistill.pytrees import pytree
from jdistill.teachers.targets import ReadFeatures, Target
from jdistill.types import Batch, Model, Outputs, PyTree

EVAL_CHUNK = 512


@pytree
class TrainState:
    """Everything that changes while training.

    Attributes:
      step: [] int32, steps since the run began; with the run's key it determines all randomness of the next step.
      stage_step: [] int32, steps since the stage began; drives the schedule.
      params: network name -> parameters; and `loss` -> term name -> the loss's own parameters.
      model_state: network name -> running statistics.
      opt_state: the stage's optimizer state.
      compressor_state: one state for each of the stage's compressors.
    """

    step: Array
    stage_step: Array
    params: dict[str, PyTree]
    model_state: dict[str, PyTree]
    opt_state: PyTree
    compressor_state: tuple[PyTree, ...]


class Parts(NamedTuple):
    """The hashable parts of a program; two runs with equal parts and methods of one structure share what was compiled.

    Attributes:
      learners: (name, network) of what is trained.
      targets: (name, function) of what is frozen.
      preprocess: raw inputs -> float32 inputs.
      augment: `(key, raw inputs) -> raw inputs`, or None.
      observe: `(Outputs, batch) -> {name: [B]}`, metrics of the first learner while training.
    """

    learners: tuple[tuple[str, Model], ...]
    targets: tuple[tuple[str, Target], ...]
    preprocess: Callable[[Array], Array]
    augment: Callable[[Array, Array], Array] | None
    observe: Callable[[Outputs, Batch], dict[str, Array]]


class Keys(NamedTuple):
    """The independent random streams of a run, from its seed."""

    init: Array
    order: Array
    step: Array

    @classmethod
    def of(cls, seed: int) -> "Keys":
        root = jax.random.key(seed)
        return cls(*(jax.random.fold_in(root, i) for i in range(3)))


def make_step(parts: Parts) -> Callable[..., tuple[TrainState, dict[str, Array]]]:
    """Builds `step(state, frozen, batch, key, stage, lengths) -> (state, metrics)`.

    `frozen` maps target names to their arrays; `batch` holds raw inputs; `key` is the run's step key, folded with
    `state.step` inside; `stage` is a `Stage` whose numbers are float32 leaves; `lengths` is (steps per epoch, epochs).
    `metrics` are sums over the batch, and `examples`, so that they merge by adding.
    """
    learners, targets = dict(parts.learners), dict(parts.targets)

    def prepare(batch: Batch, key: Array) -> Batch:
        inputs = batch["inputs"]
        if parts.augment is not None:
            inputs = parts.augment(key, inputs)
        return {**batch, "inputs": parts.preprocess(inputs)}

    def step(state, frozen, batch, key, stage: Stage, lengths):
        key = jax.random.fold_in(key, state.step)
        batch = prepare(batch, jax.random.fold_in(key, 0))
        wanted = {term.teacher for term in stage.terms if term.teacher in targets}
        references = jax.lax.stop_gradient({name: targets[name](frozen[name], batch) for name in sorted(wanted)})

        def objective(trainable):
            params = {**state.params, **trainable}
            params["student"] = apply_all(stage.compressors, params["student"], state.compressor_state)
            outputs, model_state = {}, {}
            for i, (name, model) in enumerate(learners.items(), start=1):
                outputs[name], model_state[name] = model.apply(
                    params[name], state.model_state[name], batch["inputs"], key=jax.random.fold_in(key, i), train=True
                )
            known = {**jax.lax.stop_gradient(outputs), **references}
            values = {
                term.name: term.loss(params["loss"][term.name], outputs[term.learner], known.get(term.teacher or ""), batch)
                for term in stage.terms
            }
            total = sum(term.weight * values[term.name].mean() for term in stage.terms)
            return total, (model_state, outputs, values)

        trainable = {name: state.params[name] for name in (*stage.trains, "loss")}
        (total, (model_state, outputs, values)), grads = jax.value_and_grad(objective, has_aux=True)(trainable)
        clock = Clock(state.stage_step, *lengths)
        updated, opt_state = stage.optim.update(grads, state.opt_state, trainable, clock)
        examples = batch["label"].shape[0]
        observed = parts.observe(outputs[parts.learners[0][0]], batch)
        metrics = {name: jnp.sum(value, dtype=jnp.float32) for name, value in {**values, **observed}.items()}
        metrics |= {"loss": (total * examples).astype(jnp.float32), "examples": jnp.float32(examples)}
        new = TrainState(
            step=state.step + 1,
            stage_step=state.stage_step + 1,
            params={**state.params, **updated},
            model_state={**state.model_state, **model_state},
            opt_state=opt_state,
            compressor_state=state.compressor_state,
        )
        return new, metrics

    return step


class Programs(NamedTuple):
    """Compiled forms of one step.

    Attributes:
      single: `(state, totals, frozen, batch, key, stage, lengths) -> (state, totals)`, one step on a given batch.
      block: `(state, totals, frozen, data, order, start, count, key, stage, lengths) -> (state, totals)`, `count` steps
        on rows `order[(start + i) * B : ...]` of data on the device. `start` and `count` are arguments: any cutting of
        an epoch into blocks is the same program and the same arithmetic, so a run may stop and resume anywhere.
    """

    single: Callable[..., Any]
    block: Callable[..., Any]


@functools.lru_cache(maxsize=64)
def programs(parts: Parts) -> Programs:
    """The compiled programs of `parts`, kept for the next run that has equal ones."""
    step = make_step(parts)

    def single(state, totals, frozen, batch, key, stage, lengths):
        state, metrics = step(state, frozen, batch, key, stage, lengths)
        return state, add(totals, metrics)

    def block(state, totals, frozen, data, order, start, count, key, stage, lengths):
        size = stage.optim.batch_size

        def body(i, carry):
            rows = jax.lax.dynamic_slice(order, ((start + i) * size,), (size,))
            state, totals = carry
            return single(state, totals, frozen, take(data, rows), key, stage, lengths)

        return jax.lax.fori_loop(0, count, body, (state, totals))

    return Programs(jax.jit(single, donate_argnums=(0, 1)), jax.jit(block, donate_argnums=(0, 1)))


def take(data: Batch, rows: Array) -> Batch:
    """The batch of `rows` [B] int32 of `data`; `index` is the row itself."""
    return {"inputs": data["inputs"][rows], "label": data["label"][rows], "index": rows}


take_jit = jax.jit(take)


def add(totals: dict[str, Array], metrics: dict[str, Array]) -> dict[str, Array]:
    """Merges two dicts of sums."""
    return {name: totals[name] + metrics[name] for name in totals}


def zero_totals(stage: Stage, observed: tuple[str, ...]) -> dict[str, Any]:
    """Empty sums for every metric of a stage."""
    return {name: np.float32(0) for name in ("loss", "examples", *observed, *(t.name for t in stage.terms))}


@functools.partial(jax.jit, static_argnums=1)
def epoch_order(key: Array, examples: int, epoch: Array) -> Array:
    """The order of the training rows in `epoch` (counted over the whole run): [examples] int32.

    One sort by 32 random bits a row, where `jax.random.permutation` sorts twice or more: sorting is a tenth of an MNIST
    epoch on a CPU. Rows with equal bits keep their order, which concerns 1 in 2^32 pairs.
    """
    return jnp.argsort(jax.random.bits(jax.random.fold_in(key, epoch), (examples,), jnp.uint32)).astype(jnp.int32)


def init_state(parts: Parts, key: Array, sample: Batch) -> TrainState:
    """The state before the first stage: networks initialised, no optimizer state yet (`enter_stage` makes it).

    `sample` is a raw batch, abstract or not; only shapes and dtypes are used.
    """
    inputs = jax.eval_shape(parts.preprocess, sample["inputs"])
    made = {name: model.init(jax.random.fold_in(key, i), inputs) for i, (name, model) in enumerate(parts.learners)}
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        stage_step=jnp.zeros((), jnp.int32),
        params={**{name: params for name, (params, _) in made.items()}, "loss": {}},
        model_state={name: model_state for name, (_, model_state) in made.items()},
        opt_state=(),
        compressor_state=(),
    )
    return state


def enter_stage(parts: Parts, stage: Stage, state: TrainState, key: Array, sample: Batch, frozen: PyTree) -> TrainState:
    """The state with which a stage begins: loss parameters and compressor states made, optimizer state fresh.

    Parameters that the previous stage's losses trained are kept for terms of the same name.
    """
    outputs = abstract_outputs(parts, state, sample, frozen, stage)
    trained = state.params["loss"]
    extra = {}
    for i, term in enumerate(stage.terms):
        reference = outputs.get(term.teacher) if term.teacher else None
        fresh = term.loss.init(jax.random.fold_in(key, 1000 + i), outputs[term.learner], reference)
        extra[term.name] = trained.get(term.name, fresh)
    params = {**state.params, "loss": extra}
    compressor_state = state.compressor_state
    for compressor in stage.compressors[len(compressor_state) :]:
        effective = apply_all(stage.compressors[: len(compressor_state)], params["student"], compressor_state)
        compressor_state = (*compressor_state, jax.jit(compressor.init)(effective))
    trainable = {name: params[name] for name in (*stage.trains, "loss")}
    return TrainState(
        step=state.step,
        stage_step=jnp.zeros((), jnp.int32),
        params=params,
        model_state=state.model_state,
        opt_state=stage.optim.init(trainable),
        compressor_state=compressor_state,
    )


def abstract_outputs(parts: Parts, state: TrainState, sample: Batch, frozen: PyTree, stage: Stage) -> dict[str, Outputs]:
    """Shapes of what every network of a stage gives for `sample`, without computing anything."""
    sample = {**sample, "inputs": jax.eval_shape(parts.preprocess, sample["inputs"])}

    def learner(name: str, model: Model) -> Outputs:
        def outputs(params, model_state, inputs):
            return model.apply(params, model_state, inputs, train=False)[0]

        return jax.eval_shape(outputs, state.params[name], state.model_state[name], sample["inputs"])

    known = {name: learner(name, model) for name, model in parts.learners}
    wanted = {term.teacher for term in stage.terms}
    return known | {name: jax.eval_shape(target, frozen[name], sample) for name, target in parts.targets if name in wanted}


def features_read(stage: Stage, outputs: dict[str, Outputs], params: PyTree, sample: Batch) -> dict[str, set[str]]:
    """Which features of each teacher the terms of a stage read; found by tracing them on shapes."""
    read: dict[str, set[str]] = {}

    for term in stage.terms:
        if term.teacher is None:
            continue
        spies: list[ReadFeatures] = []

        def call(params, student, teacher, batch, term=term, spies=spies):
            spies.append(ReadFeatures(teacher.features))
            return term.loss(params, student, Outputs(teacher.logits, spies[0]), batch)

        jax.eval_shape(call, params[term.name], outputs[term.learner], outputs[term.teacher], sample)
        read.setdefault(term.teacher, set()).update(spies[0].read)
    return read


@functools.lru_cache(maxsize=64)
def forward(model: Model, preprocess: Callable[[Array], Array]) -> Callable[..., Array]:
    """Compiled `(params, state, raw inputs [B, ...]) -> logits [B, K]` in evaluation mode."""
    return jax.jit(lambda params, state, inputs: model.apply(params, state, preprocess(inputs), train=False)[0].logits)


def predict(
    model: Model, preprocess: Callable[[Array], Array], variables: tuple[PyTree, PyTree], inputs: np.ndarray
) -> np.ndarray:
    """Logits [N, K] float32 of raw inputs [N, ...] in evaluation mode, chunk by chunk (one shape, one program)."""
    call = forward(model, preprocess)
    chunks = []
    for start in range(0, len(inputs), EVAL_CHUNK):
        chunk = inputs[start : start + EVAL_CHUNK]
        missing = EVAL_CHUNK - len(chunk)
        padded = np.concatenate([chunk, np.repeat(chunk[:1], missing, axis=0)]) if missing else chunk
        chunks.append((call(*variables, padded), len(chunk)))
    return (
        np.concatenate([np.asarray(logits, np.float32)[:n] for logits, n in chunks]) if chunks else np.zeros((0, 1), np.float32)
    )


def has_convolution(params: PyTree) -> bool:
    """Whether any parameter is a convolution kernel; decides between loop and block on a CPU."""
    return any(leaf.ndim >= 4 for leaf in jax.tree.leaves(params))
