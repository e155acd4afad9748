"""State, step and the compiled programs a run is made of. Pure: state in, state out; nothing here knows Hydra."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from jdistill import rows, schedules
from jdistill.applying import Share
from jdistill.compress import apply_all
from jdistill.method import Stage
from jdistill.optim import Clock
from jdistill.passes import Learner, Parts, Shares, forward_pass, references
from jdistill.pytrees import pytree
from jdistill.types import Batch, Model, PyTree

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


class Keys(NamedTuple):
    """The independent random streams of a run, from its seed."""

    init: Array
    order: Array
    step: Array

    @classmethod
    def of(cls, seed: int) -> "Keys":
        root = jax.random.key(seed)
        return cls(*(jax.random.fold_in(root, i) for i in range(3)))


def trained(stage: Stage, params: PyTree) -> PyTree:
    """The part of the parameters that a stage's optimizer moves."""
    names = [name for name in (*stage.trains, "loss") if name != "student" or stage.tuning is None]
    return {name: params[name] for name in names} | ({"tuning": params["tuning"]} if stage.tuning is not None else {})


def stored(stage: Stage, params: PyTree) -> PyTree:
    """The student's parameters with what is tuned, in their stored form (see `compress.base`)."""
    student = params["student"]
    if stage.tuning is None:
        return student
    return stage.tuning.apply(jax.lax.stop_gradient(student), params["tuning"])


def effective(stage: Stage, params: PyTree, compressor_state: tuple[PyTree, ...]) -> PyTree:
    """Parameters of all networks as they act: the student's under the stage's tuning and compressors."""
    return {**params, "student": apply_all(stage.compressors, stored(stage, params), compressor_state)}


def make_step(parts: Parts) -> Callable[..., tuple[TrainState, dict[str, Array]]]:
    """Builds `step(state, frozen, batch, key, stage, lengths) -> (state, metrics)`.

    `frozen` maps target names to their arrays, and `tables` to what a sampler draws from; `batch` holds raw inputs; `key`
    is the run's step key, folded with `state.step` inside; `stage` is a `Stage` whose numbers are float32 leaves (or
    schedules of such); `lengths` is (steps per epoch, epochs). `metrics` are sums over the batch, and `examples`, so that
    they merge by adding.
    """

    def prepare(batch: Batch, key: Array, frozen: PyTree) -> Batch:
        if parts.sampler is not None:
            return parts.sampler(key, batch, frozen["tables"])
        inputs = batch["inputs"]
        if parts.augment is not None:
            inputs = parts.augment(key, inputs)
        return {**batch, "inputs": parts.preprocess(inputs)}

    def step(state, frozen, batch, key, stage: Stage, lengths):
        clock = Clock(state.stage_step, *lengths)
        stage = schedules.at(stage, clock)
        key = jax.random.fold_in(key, state.step)
        batch = prepare(_on_mesh(parts, batch), jax.random.fold_in(key, 0), frozen)
        own, whole = parts, state
        if stage.optim.rows:
            own, state, touched = rows.gather(parts, stage, state, batch["inputs"])
        grads, metrics, changed = _gradients(own, stage, state, frozen, batch, key)
        moved = trained(stage, state.params)
        updated, opt_state = stage.optim.update(grads, state.opt_state, moved, clock)
        held = {t.name: t.loss.hold(moved["loss"][t.name], updated["loss"][t.name]) for t in stage.terms}
        params = {**state.params, **updated, "loss": held}
        if stage.tuning is None and "student" in stage.trains:
            for compressor, own in zip(stage.compressors, state.compressor_state, strict=True):
                params["student"] = compressor.project(params["student"], own)
        model_state = {**state.model_state, **changed}
        for average in stage.averages:
            for tree in (params, model_state):
                tree[average.name] = average(tree[average.name], tree[average.of], state.stage_step)
        new = TrainState(
            step=state.step + 1,
            stage_step=state.stage_step + 1,
            params=params,
            model_state=model_state,
            opt_state=opt_state,
            compressor_state=state.compressor_state,
        )
        return rows.scatter(parts, whole, new, touched) if stage.optim.rows else new, metrics

    return step


def _on_mesh(parts: Parts, batch: Batch, axis: int = 0) -> Batch:
    """`batch`, whose axis of examples the compiler splits over the devices of `parts.mesh`, where they divide it."""
    if parts.mesh is None or batch["label"].shape[axis] % parts.mesh.size:
        return batch
    place = NamedSharding(parts.mesh, PartitionSpec(*(None,) * axis, "data"))
    return jax.lax.with_sharding_constraint(batch, place)


def _gradients(
    parts: Parts, stage: Stage, state: TrainState, frozen: PyTree, batch: Batch, key: Array
) -> tuple[PyTree, dict[str, Array], dict[str, PyTree]]:
    """Gradients of a prepared batch for what the stage trains, the step's metrics, and the changed model state.

    The batch goes through micro-batch by micro-batch, or whole where `parts.microbatches` does not divide it.
    """
    size, count = batch["label"].shape[0], parts.microbatches
    if count == 1 or size % count:
        return _pass(parts, stage, state, state.model_state, frozen, batch, key, None)
    pieces = jax.tree.map(lambda rows: rows.reshape(count, rows.shape[0] // count, *rows.shape[1:]), batch)
    pieces = _on_mesh(parts, pieces, axis=1)

    def one(model_state, number, piece):
        *sums, changed = _pass(parts, stage, state, model_state, frozen, piece, key, Share(number, count))
        return tuple(sums), {**model_state, **changed}

    def body(carry, numbered):
        sums, model_state = carry
        further, model_state = one(model_state, *numbered)
        return (jax.tree.map(jnp.add, sums, further), model_state), None

    numbers = jnp.arange(count)
    first = one(state.model_state, numbers[0], jax.tree.map(lambda rows: rows[0], pieces))
    rest = jax.tree.map(lambda rows: rows[1:], (numbers, pieces))
    # A convolution in a compiled loop is tens of times slower on a CPU.
    (sums, model_state), _ = jax.lax.scan(body, first, rest, unroll=jax.default_backend() == "cpu")
    grads, metrics = sums
    return jax.tree.map(lambda grad: grad / count, grads), metrics, model_state


def _pass(
    parts: Parts, stage: Stage, state: TrainState, model_state: PyTree, frozen: PyTree, batch: Batch, key: Array,
    micro: Share | None,
) -> tuple[PyTree, dict[str, Array], dict[str, PyTree]]:  # fmt: skip
    """`_gradients` of one (micro-)batch."""
    shares, examples = Shares(micro, _device_share(parts, batch)), batch["label"].shape[0]
    referred = references(parts, stage, frozen, batch, shares)

    def objective(moved):
        params = effective(stage, {**state.params, **moved}, state.compressor_state)
        passed = forward_pass(parts, stage, params, model_state, frozen, referred, batch, key, shares)
        return passed.total, passed

    (total, passed), grads = jax.value_and_grad(objective, has_aux=True)(trained(stage, state.params))
    if parts.axis is not None:
        grads = jax.lax.pmean(grads, parts.axis)
    observed = parts.observe(passed.outputs[next(iter((*stage.trains, *passed.outputs)))], batch)
    metrics = {name: jnp.sum(value, dtype=jnp.float32) for name, value in observed.items()}
    metrics |= {name: (mean * examples).astype(jnp.float32) for name, mean in passed.means.items()}
    metrics |= {"loss": (total * examples).astype(jnp.float32), "examples": jnp.float32(examples)}
    return grads, metrics, passed.model_state


def _device_share(parts: Parts, batch: Batch) -> Share | None:
    """The share of a batch that a mapped device takes; None where each takes all of it, as of one they do not divide."""
    if parts.axis is None or batch["label"].shape[0] % jax.lax.axis_size(parts.axis):
        return None
    return Share(jax.lax.axis_index(parts.axis), jax.lax.axis_size(parts.axis), parts.axis)


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

    nth: Callable[..., Any] = chosen
    if stacked:
        own: dict[str, Any] = {name: 0 if name == "initial" else None for name, _ in parts.targets}
        own |= {"tables": None} if parts.sampler is not None else {}
        single = jax.vmap(single, in_axes=(0, 0, own, 0, 0, 0, None))
        nth = jax.vmap(chosen, in_axes=(None, 0, 0, own, None, 0, 0, 0, None))

    def block(state, totals, frozen, data, order, start, count, key, stage, lengths):
        def body(i, carry):
            return nth(start + i, *carry, frozen, data, order, key, stage, lengths)

        return jax.lax.fori_loop(0, count, body, (state, totals))

    return Programs(jax.jit(single, donate_argnums=(0, 1)), jax.jit(block, donate_argnums=(0, 1)))


def take(data: Batch, rows: Array) -> Batch:
    """The batch of `rows` [B] int32 of `data`; `index` is the row itself."""
    return {**{name: array[rows] for name, array in data.items()}, "index": rows}


take_jit = jax.jit(take)
take_members = jax.jit(jax.vmap(take, in_axes=(None, 0)))


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


@functools.partial(jax.jit, static_argnums=1)
def epoch_orders(keys: Array, examples: int, epoch: Array) -> Array:
    """`epoch_order` of every member of a population: [members, examples] int32 from [members] keys."""
    return jax.vmap(lambda key: epoch_order(key, examples, epoch))(keys)


@functools.lru_cache(maxsize=64)
def forward(model: Model, preprocess: Callable[[Array], Array], stacked: bool = False) -> Callable[..., Array]:
    """Compiled `(params, state, raw inputs [B, ...]) -> logits [B, K]` in evaluation mode; `stacked` [members, B, K]."""

    def logits(params, state, inputs):
        return model.apply(params, state, preprocess(inputs), train=False)[0].logits

    return jax.jit(jax.vmap(logits, in_axes=(0, 0, None)) if stacked else logits)


def predict(
    model: Model,
    preprocess: Callable[[Array], Array],
    variables: tuple[PyTree, PyTree],
    inputs: np.ndarray,
    stacked: bool = False,
) -> np.ndarray:
    """Logits [N, K] float32 of raw inputs [N, ...] in evaluation mode, chunk by chunk (one shape, one program).

    `stacked` variables of a population give [members, N, K].
    """
    call = forward(model, preprocess, stacked)
    chunks = []
    for start in range(0, len(inputs), EVAL_CHUNK):
        chunk = inputs[start : start + EVAL_CHUNK]
        missing = EVAL_CHUNK - len(chunk)
        padded = np.concatenate([chunk, np.repeat(chunk[:1], missing, axis=0)]) if missing else chunk
        chunks.append((call(*variables, padded), len(chunk)))
    if not chunks:
        return np.zeros((0, 1), np.float32)
    with np.errstate(over="ignore"):  # float64 logits of a network that diverged
        return np.concatenate([np.asarray(logits, np.float32)[..., :n, :] for logits, n in chunks], axis=-2)


def has_convolution(params: PyTree) -> bool:
    """Whether any parameter is a convolution kernel; decides between loop and block on a CPU."""
    return any(leaf.ndim >= 4 for leaf in jax.tree.leaves(params))


__all__ = [
    "EVAL_CHUNK", "Keys", "Learner", "Parts", "Programs", "TrainState", "add", "effective", "epoch_order", "epoch_orders",
    "forward", "forward_pass", "has_convolution", "make_step", "predict", "programs", "references", "stored", "take",
    "take_jit", "take_members", "trained", "zero_totals",
]  # fmt: skip
