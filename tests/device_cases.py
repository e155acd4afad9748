"""Trains the tiny problem under every layout in a process with several devices; prints how far each is from one device.

Run by `test_parallel.py` with 8 forced devices; by itself: python -m tests.device_cases first others
"""

import json
import sys

import jax

jax.config.update("jax_enable_x64", True)

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from flax import linen as nn  # noqa: E402
from jax.sharding import PartitionSpec  # noqa: E402

from jdistill.fitting import sample_of  # noqa: E402
from jdistill.losses import InputGradient, RelationalKD, SimilarityPreserving  # noqa: E402
from jdistill.method import Stage, Term  # noqa: E402
from jdistill.models.layers import BatchNorm  # noqa: E402
from jdistill.modules import from_linen  # noqa: E402
from jdistill.parallel import Auto, Data, Members, Pmap, Single  # noqa: E402
from jdistill.schemes import Online  # noqa: E402
from jdistill.stages import enter_stage, init_state  # noqa: E402
from jdistill.tasks.classification import Classification, hits  # noqa: E402
from jdistill.teachers.targets import Lookup  # noqa: E402
from jdistill.train import Keys, epoch_order, take_jit, zero_totals  # noqa: E402
from tests import tiny  # noqa: E402

SIZE = 16  # of a batch: 44 examples are two, and one of 12, which 8 devices do not divide


class Dense(nn.Module):
    """Two linear layers with BatchNorm, jdistill's or Flax's, and Dropout between them."""

    flax: bool = False

    @nn.compact
    def __call__(self, inputs, train=False):
        x = nn.Dense(6, name="fc1")(inputs.reshape(inputs.shape[0], -1))
        x = nn.BatchNorm(use_running_average=not train)(x) if self.flax else BatchNorm()(x, train)
        x = nn.relu(x)
        x = nn.Dropout(0.4, broadcast_dims=(1,))(x, deterministic=not train)
        return nn.Dense(tiny.CLASSES, name="fc")(x), {"embedding": x}


def term(loss, weight=1.0):
    return Term(name="distil", teacher="teacher", loss=loss, weight=weight)


DISTIL = {
    "kd": tiny.kd(),
    "sp": term(SimilarityPreserving(), 30.0),
    "rkd": term(RelationalKD()),
    "input_gradient": term(InputGradient()),
}
NETWORKS = {
    "convolutional": tiny.CONVOLUTIONAL,
    "dense": from_linen(Dense()),
    "flax": from_linen(Dense(flax=True)),
    "dropout": tiny.DROPPING,
}


def problem(network, distil, teacher):
    """Parts, stage and frozen arrays in float64."""
    frozen = tiny.as_float64(tiny.frozen())
    parts = tiny.parts(NETWORKS[network], augment=tiny.AUGMENT if teacher == "live" else None)
    if teacher == "cached":
        frozen = {"teacher": tiny.TEACHER.apply(*frozen["teacher"], tiny.data(dtype=np.float64)["inputs"])[0]}
        parts = parts._replace(targets=(("teacher", Lookup()),))
    # SGD: Adam divides by their size gradients that are zero but for rounding, as of a bias before BatchNorm.
    optim = {"kind": "sgd", "batch_size": SIZE, "drop_last": False, "schedule": "cosine"}
    if distil == "online":
        parts, frozen = tiny.parts(NETWORKS[network], None, scheme=Online()), {}
        (stage,) = tiny.method(scheme=Online(), **optim).stages
    else:
        stage = Stage(name="s", terms=(tiny.TASK, DISTIL[distil]), optim=tiny.optimizer(**optim))
    return parts, tiny.as_float64(stage), frozen


def begin(parts, stage, frozen, seed=0):
    data = tiny.data(dtype=np.float64)
    sample, key = sample_of(data), jax.random.key(seed)
    state = tiny.as_float64(init_state(parts, key, sample))
    return enter_stage(parts, stage, state, key, sample, frozen, data["label"])


def train(layout, parts, stage, frozen, strategy="loop", epochs=2):
    """The state and totals after some epochs, as `fit` would do them."""
    parts = parts._replace(microbatches=layout.microbatches)
    programs = layout.programs(parts)
    state = layout.put(begin(parts, stage, frozen))
    totals = layout.put(jax.tree.map(jnp.asarray, zero_totals(stage, Classification.observed)))
    frozen, data = layout.put(frozen), layout.put_data(tiny.data(dtype=np.float64))
    keys, lengths = Keys.of(3), (jnp.float32(3), jnp.float32(epochs))
    for epoch in range(epochs):
        order = epoch_order(keys.order, tiny.EXAMPLES, np.int32(epoch))
        start = 0
        if strategy == "block":
            span = (np.int32(0), np.int32(2))
            state, totals = programs.block(state, totals, frozen, data, order, *span, keys.step, stage, lengths)
            start = 2
        for i in range(start, 3):
            batch = take_jit(data, order[i * SIZE : (i + 1) * SIZE])
            state, totals = programs.single(state, totals, frozen, batch, keys.step, stage, lengths)
    return state, totals


def apart(a, b):
    """The largest difference of two trees, relative to 1 or to the value."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    pairs = zip(map(np.asarray, jax.tree.leaves(a)), map(np.asarray, jax.tree.leaves(b)), strict=True)
    return max(float(np.max(np.abs(x - y) / np.maximum(1, np.abs(y)), initial=0)) for x, y in pairs)


CASES = {  # network, loss, teacher, strategy
    "dense-rkd": ("dense", "rkd", "live", "block"),
    "convolutional-kd": ("convolutional", "kd", "cached", "loop"),
    "convolutional-rkd": ("convolutional", "rkd", "live", "loop"),
    "flax-sp": ("flax", "sp", "live", "block"),
    "dropout-input_gradient": ("dropout", "input_gradient", "live", "loop"),
    "dense-online": ("dense", "online", None, "loop"),
}


def compare(layouts, cases):
    """How far each of several layouts is from one device, by `layout/case`."""
    found = {}
    for name in cases:
        network, distil, teacher, strategy = CASES[name]
        case = problem(network, distil, teacher)
        state, totals = train(Single(), *case)
        for layout in layouts:
            other = train(layout, *case, strategy=strategy)
            sums = apart(jax.tree.map(lambda x: x / 100, other[1]), jax.tree.map(lambda x: x / 100, totals))  # float32
            found[f"{type(layout).__name__.lower()}/{name}"] = [apart(other[0], state), sums]
    return found


def accumulated(layouts):
    """Micro-batches on several devices against the whole batch on one: networks without BatchNorm."""
    case = problem("dropout", "kd", "live")
    state, totals = train(Single(), *case)
    return {type(layout).__name__.lower(): [apart(x, y) for x, y in zip(train(layout, *case), (state, totals), strict=True)]
            for layout in layouts}  # fmt: skip


def stacked(tree):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *tree)


def population(layout, count=8):
    """A population under a layout against the same on one device, and the devices that hold the state."""
    parts, stage, frozen = problem("dense", "kd", "live")
    keys = [Keys.of(seed) for seed in range(count)]
    data, lengths = tiny.data(dtype=np.float64), (jnp.float32(3), jnp.float32(2))
    results = []
    for place in (Single(), layout):
        programs = place.programs(parts, count)
        state, totals, stages, step_keys, order = place.put(
            (
                stacked([begin(parts, stage, frozen, seed) for seed in range(count)]),
                stacked([jax.tree.map(jnp.asarray, zero_totals(stage, Classification.observed))] * count),
                stacked([stage] * count),
                stacked([k.step for k in keys]),
                stacked([epoch_order(k.order, tiny.EXAMPLES, np.int32(0)) for k in keys]),
            ),
            count,
        )
        span = (np.int32(0), np.int32(2))
        arguments = (place.put(frozen), place.put_data(data), order, *span, step_keys, stages, lengths)
        results.append(programs.block(state, totals, *arguments)[0])
    kernel = results[1].params["student"]["fc"]["kernel"]
    return [apart(results[1], results[0]), len(kernel.sharding.device_set), kernel.sharding.spec == PartitionSpec("members")]


def retraced():
    """How often each layout traces its step over runs with other numbers: once for every shape of a batch."""
    counts = {}
    for layout in (Data, Pmap):
        traced = []

        def observe(outputs, batch, traced=traced):
            traced.append(batch["label"].shape)
            return hits(outputs, batch)

        parts, _, frozen = problem("dense", "kd", "cached")
        parts = parts._replace(observe=observe)
        for weight in (0.5, 2.0):
            stage = Stage(name="s", terms=(tiny.TASK, tiny.kd(weight)), optim=tiny.optimizer(batch_size=SIZE, drop_last=False))
            train(layout(), parts, tiny.as_float64(stage), frozen, epochs=1 + int(weight))
        counts[layout.__name__.lower()] = len(traced)
    return counts


WANTED = {
    "first": lambda: compare([Data(), Pmap()], ["dense-rkd"]),
    "others": lambda: compare([Data(), Pmap()], [name for name in CASES if name != "dense-rkd"]),
    "accumulated": lambda: accumulated([Data(microbatches=2), Pmap(microbatches=2)]),
    "population": lambda: {type(x).__name__.lower(): population(x) for x in (Members(), Auto(), Data(), Pmap())},
    "retraced": retraced,
}

if __name__ == "__main__":
    assert len(jax.devices()) == 8, jax.devices()
    print(json.dumps({name: WANTED[name]() for name in sys.argv[1:]}))
