"""State, step and the compiled programs a run is made of. Pure: state in, state out; nothing here knows Hydra."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jdistill import schedules
from jdistill.compress import apply_all
from jdistill.method import Stage
from jdistill.optim import Clock
from jdistill.pytrees import pytree
from jdistill.teachers.targets import Target
from jdistill.types import Batch, Context, Model, Network, Outputs, PyTree

EVAL_CHUNK = 512


@pytree
class TrainState:
    """Everything that changes while training.

    Attributes:
      step: [] int32, steps since the run began; with the run's key it determines all randomness of the next step.
      stage_step: [] int32, steps since the stage began; drives the schedule.
      params: network name -> parameters; `loss` -> term name -> the loss's own parameters; `tuning` in stages that have it.
      model_state: network name -> running statistics; `loss` -> term name -> what the loss remembers.
      opt_state: the stage's optimizer state.
      compressor_state: one state for each of the stage's compressors.
    """

    step: Array
    stage_step: Array
    params: dict[str, PyTree]
    model_state: dict[str, PyTree]
    opt_state: PyTree
    compressor_state: tuple[PyTree, ...]


class Learner(NamedTuple):
    """A network of the run whose parameters are in the state.

    Attributes:
      name: the key of its parameters.
      model: the network.
      reads: None for a network of the inputs; else the name of an earlier learner, whose features are its inputs.
    """

    name: str
    model: Model
    reads: str | None = None


class Parts(NamedTuple):
    """The hashable parts of a program; two runs with equal parts and methods of one structure share what was compiled.

    Attributes:
      learners: what may be trained, the student first.
      targets: (name, function) of what is frozen; `initial` is the student as it was initialised.
      preprocess: raw inputs -> float32 inputs.
      augment: `(key, raw inputs) -> raw inputs`, or None.
      observe: `(Outputs, batch) -> {name: [B]}`, metrics of the first network a stage trains.
    """

    learners: tuple[Learner, ...]
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


class Passed(NamedTuple):
    """What a forward pass through the networks and terms of a stage gives.

    Attributes:
      total: [] the objective.
      means: term name -> [] mean of the loss's values.
      outputs: learner name -> outputs.
      model_state: what changed of the state's `model_state`.
    """

    total: Array
    means: dict[str, Array]
    outputs: dict[str, Outputs]
    model_state: dict[str, PyTree]


def references(parts: Parts, stage: Stage, frozen: PyTree, batch: Batch) -> dict[str, Outputs]:
    """Outputs of the frozen networks that a stage reads, without gradient."""
    wanted = stage.read() | ({"initial"} if any(term.loss.reads_initial for term in stage.terms) else set())
    return jax.lax.stop_gradient({name: target(frozen[name], batch) for name, target in parts.targets if name in wanted})


def forward_pass(
    parts: Parts, stage: Stage, params: PyTree, model_state: PyTree, frozen: PyTree, referred: dict[str, Outputs],
    batch: Batch, key: Array,
) -> Passed:  # fmt: skip
    """The networks and terms of `stage` on a preprocessed batch; `params` are effective, `referred` the frozen outputs."""
    targets, networks = dict(parts.targets), {}
    outputs: dict[str, Outputs] = {}
    changed: dict[str, PyTree] = {}
    needed = _needed(parts, stage)
    for i, learner in enumerate(parts.learners, start=1):
        if learner.name not in needed:
            continue
        name, tuned = learner.name, stage.tuning is not None and learner.name == "student"
        mode = {"key": jax.random.fold_in(key, i), "train": name in stage.trains and not tuned}
        source = batch["inputs"] if learner.reads is None else outputs[learner.reads].features
        outputs[name], changed[name] = learner.model.apply(params[name], model_state[name], source, **mode)
        networks[name] = learner, mode

    def network(name: str | None, *, frozen_too: bool) -> Network | None:
        if name in targets:
            return targets[name].network(frozen[name], batch)
        if name is None or name not in networks:
            return None
        learner, mode = networks[name]
        own = jax.lax.stop_gradient(params[name]) if frozen_too else params[name]
        made = learner.model.network(own, model_state[name], **mode)
        if learner.reads is None:
            return made
        base = network(learner.reads, frozen_too=frozen_too)
        assert base is not None
        return made._replace(outputs=lambda inputs: made.outputs(base.outputs(inputs).features))

    known = {**jax.lax.stop_gradient(outputs), **referred}
    means, loss_state = {}, dict(model_state["loss"])
    for i, term in enumerate(stage.terms):
        student = network(term.learner, frozen_too=False)
        assert student is not None
        context = Context(
            student=outputs[term.learner],
            teacher=known.get(term.teacher or ""),
            batch=batch,
            key=jax.random.fold_in(key, 1000 + i),
            student_network=student,
            teacher_network=network(term.teacher, frozen_too=True),
            initial=referred.get("initial"),
        )
        values, loss_state[term.name] = term.loss.evaluate(params["loss"][term.name], loss_state[term.name], context)
        means[term.name] = term.mean(values, known, batch)
    total = sum((term.weight * means[term.name] for term in stage.terms), start=jnp.zeros(()))
    return Passed(total, means, outputs, jax.lax.stop_gradient({**changed, "loss": loss_state}))


def _needed(parts: Parts, stage: Stage) -> set[str]:
    """The learners that a stage must run."""
    needed = stage.read()
    for learner in reversed(parts.learners):
        if learner.name in needed and learner.reads:
            needed.add(learner.reads)
    return needed


def trained(stage: Stage, params: PyTree) -> PyTree:
    """The part of the parameters that a stage's optimizer moves."""
    names = [name for name in (*stage.trains, "loss") if name != "student" or stage.tuning is None]
    return {name: params[name] for name in names} | ({"tuning": params["tuning"]} if stage.tuning is not None else {})


def effective(stage: Stage, params: PyTree, compressor_state: tuple[PyTree, ...]) -> PyTree:
    """Parameters of all networks as they act: the student's under the stage's tuning and compressors."""
    student = params["student"]
    if stage.tuning is not None:
        student = stage.tuning.apply(jax.lax.stop_gradient(student), params["tuning"])
    return {**params, "student": apply_all(stage.compressors, student, compressor_state)}


def make_step(parts: Parts) -> Callable[..., tuple[TrainState, dict[str, Array]]]:
    """Builds `step(state, frozen, batch, key, stage, lengths) -> (state, metrics)`.

    `frozen` maps target names to their arrays; `batch` holds raw inputs; `key` is the run's step key, folded with
    `state.step` inside; `stage` is a `Stage` whose numbers are float32 leaves (or schedules of such); `lengths` is
    (steps per epoch, epochs). `metrics` are sums over the batch, and `examples`, so that they merge by adding.
    """

    def prepare(batch: Batch, key: Array) -> Batch:
        inputs = batch["inputs"]
        if parts.augment is not None:
            inputs = parts.augment(key, inputs)
        return {**batch, "inputs": parts.preprocess(inputs)}

    def step(state, frozen, batch, key, stage: Stage, lengths):
        clock = Clock(state.stage_step, *lengths)
        stage = schedules.at(stage, clock)
        key = jax.random.fold_in(key, state.step)
        batch = prepare(batch, jax.random.fold_in(key, 0))
        referred = references(parts, stage, frozen, batch)

        def objective(moved):
            params = effective(stage, {**state.params, **moved}, state.compressor_state)
            passed = forward_pass(parts, stage, params, state.model_state, frozen, referred, batch, key)
            return passed.total, passed

        moved = trained(stage, state.params)
        (total, passed), grads = jax.value_and_grad(objective, has_aux=True)(moved)
        updated, opt_state = stage.optim.update(grads, state.opt_state, moved, clock)
        held = {t.name: t.loss.hold(moved["loss"][t.name], updated["loss"][t.name]) for t in stage.terms}
        params = {**state.params, **updated, "loss": held}
        model_state = {**state.model_state, **passed.model_state}
        for average in stage.averages:
            for tree in (params, model_state):
                tree[average.name] = average(tree[average.name], tree[average.of], state.stage_step)
        examples = batch["label"].shape[0]
        observed = parts.observe(passed.outputs[next(iter((*stage.trains, *passed.outputs)))], batch)
        metrics = {name: jnp.sum(value, dtype=jnp.float32) for name, value in observed.items()}
        metrics |= {name: (mean * examples).astype(jnp.float32) for name, mean in passed.means.items()}
        metrics |= {"loss": (total * examples).astype(jnp.float32), "examples": jnp.float32(examples)}
        new = TrainState(
            step=state.step + 1,
            stage_step=state.stage_step + 1,
            params=params,
            model_state=model_state,
            opt_state=opt_state,
            compressor_state=state.compressor_state,
        )
        return new, metrics

    return step


class Programs(NamedTuple):
    """Compiled forms of one step. Of a population all but `frozen`, `data`, `start`, `count`, `lengths` have members first.

    Attributes:
      single: `(state, totals, frozen, batch, key, stage, lengths) -> (state, totals)`, one step on a given batch.
      block: `(state, totals, frozen, data, order, start, count, key, stage, lengths) -> (state, totals)`, `count` steps
        on rows `order[(start + i) * B : ...]` of data on the device. `start` and `count` are arguments: any cutting of
        an epoch into blocks is the same program and the same arithmetic, so a run may stop and resume anywhere.
    """

    single: Callable[..., Any]
    block: Callable[..., Any]


@functools.lru_cache(maxsize=64)
def programs(parts: Parts, stacked: bool = False) -> Programs:
    """The compiled programs of `parts`, kept for the next run that has equal ones; `stacked` for a population."""
    step = make_step(parts)

    def single(state, totals, frozen, batch, key, stage, lengths):
        state, metrics = step(state, frozen, batch, key, stage, lengths)
        return state, add(totals, metrics)

    def chosen(i, state, totals, frozen, data, order, key, stage, lengths):
        rows = jax.lax.dynamic_slice(order, (i * stage.optim.batch_size,), (stage.optim.batch_size,))
        state, metrics = step(state, frozen, take(data, rows), key, stage, lengths)
        return state, add(totals, metrics)

    if stacked:
        own = {name: 0 if name == "initial" else None for name, _ in parts.targets}
        single = jax.vmap(single, in_axes=(0, 0, own, 0, 0, 0, None))
        chosen = jax.vmap(chosen, in_axes=(None, 0, 0, own, None, 0, 0, 0, None))

    def block(state, totals, frozen, data, order, start, count, key, stage, lengths):
        def body(i, carry):
            return chosen(start + i, *carry, frozen, data, order, key, stage, lengths)

        return jax.lax.fori_loop(0, count, body, (state, totals))

    return Programs(jax.jit(single, donate_argnums=(0, 1)), jax.jit(block, donate_argnums=(0, 1)))


def take(data: Batch, rows: Array) -> Batch:
    """The batch of `rows` [B] int32 of `data`; `index` is the row itself."""
    return {**{name: array[rows] for name, array in data.items()}, "index": rows}


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
