"""The step: pure, equal to a backward pass by hand, the same under jit and vmap, and never compiled twice for a number."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jdistill.fit import fit_one as fit
from jdistill.fitting import sample_of
from jdistill.losses import Hint
from jdistill.method import Stage, Term
from jdistill.modules import from_nnx
from jdistill.pytrees import as_leaves
from jdistill.stages import abstract_outputs, enter_stage, features_read, init_state
from jdistill.tasks.classification import hits
from jdistill.train import (
    Keys,
    Learner,
    epoch_order,
    make_step,
    predict,
    programs,
    take,
    zero_totals,
)
from tests import tiny
from tests.tiny import assert_close, assert_same_bits

LENGTHS = (jnp.float32(5), jnp.float32(3))
KEY = jax.random.key(5)


def one_stage(*terms, trains=("student",), **optim):
    return Stage(name="s", terms=terms or (tiny.TASK, tiny.kd()), optim=tiny.optimizer(**optim), trains=trains)


def begin(parts, stage, frozen, seed=0, dtype=np.float32):
    """A state at the beginning of `stage`, in float64 where `dtype` is."""
    data = tiny.data(dtype=dtype)
    sample = sample_of(data)
    state = init_state(parts, jax.random.key(seed), sample)
    if dtype == np.float64:
        state = tiny.as_float64(state)
    return enter_stage(parts, stage, state, jax.random.key(seed), sample, frozen, data["label"])


@pytest.fixture
def wide():
    with jax.enable_x64(True):
        yield np.float64


# -- against a backward pass by hand


def numpy_gradients(p, x, label):
    """Loss and gradients of mean cross-entropy of a network of one hidden ReLU layer."""
    pre = x @ p["w1"] + p["b1"]
    h = np.maximum(pre, 0)
    z = h @ p["w2"] + p["b2"]
    q = np.exp(z - z.max(1, keepdims=True))
    q /= q.sum(1, keepdims=True)
    loss = -np.log(q[np.arange(len(label)), label]).sum()
    dz = (q - np.eye(q.shape[1])[label]) / len(label)
    dpre = (dz @ p["w2"].T) * (pre > 0)
    return loss, {"w1": x.T @ dpre, "b1": dpre.sum(0), "w2": h.T @ dz, "b2": dz.sum(0)}


def numpy_adam(p, m, v, grads, t, lr):
    m = {k: 0.9 * m[k] + 0.1 * g for k, g in grads.items()}
    v = {k: 0.999 * v[k] + 0.001 * g**2 for k, g in grads.items()}
    step = {k: m[k] / (1 - 0.9**t) / (np.sqrt(v[k] / (1 - 0.999**t)) + 1e-8) for k in p}
    return {k: p[k] - lr * step[k] for k in p}, m, v


def by_name(params):
    return {
        "w1": params["fc1"]["kernel"],
        "b1": params["fc1"]["bias"],
        "w2": params["fc"]["kernel"],
        "b2": params["fc"]["bias"],
    }


def test_steps_are_a_backward_pass_by_hand_and_adam(wide):
    parts, stage = tiny.parts(teacher=None), tiny.as_float64(one_stage(tiny.TASK))
    state, step = begin(parts, stage, {}, dtype=wide), jax.jit(make_step(parts))
    p = {k: np.asarray(v) for k, v in by_name(state.params["student"]).items()}
    m = v = {k: np.zeros_like(a) for k, a in p.items()}
    for t in (1, 2, 3):
        batch = tiny.batch(seed=t, dtype=wide)
        state, metrics = step(state, {}, batch, KEY, stage, LENGTHS)
        loss, grads = numpy_gradients(p, batch["inputs"].reshape(8, -1), batch["label"])
        p, m, v = numpy_adam(p, m, v, grads, t, 0.02)
        np.testing.assert_allclose(metrics["cross_entropy"], loss, rtol=1e-6)  # metrics are summed in float32
        assert_close(by_name(state.params["student"]), p, rtol=1e-10, atol=1e-13)
    assert int(state.step) == int(state.stage_step) == 3


# -- jit, vmap, blocks


def test_jit_is_eager(wide):
    parts, stage = tiny.parts(tiny.DROPPING, augment=tiny.AUGMENT), tiny.as_float64(one_stage(schedule="cosine"))
    frozen = tiny.as_float64(tiny.frozen())
    state, step = begin(parts, stage, frozen, dtype=wide), make_step(parts)
    arguments = (state, frozen, tiny.batch(dtype=wide), KEY, stage, LENGTHS)
    eager, compiled = step(*arguments), jax.jit(step)(*arguments)
    assert_close(compiled[0], eager[0], rtol=1e-10, atol=1e-12)
    assert_close(compiled[1], eager[1], rtol=1e-6)
    assert_same_bits(step(*arguments), eager)  # nothing is kept between calls


def test_vmap_over_methods_and_states_is_a_loop_over_them(wide):
    parts, frozen = tiny.parts(tiny.DROPPING), tiny.as_float64(tiny.frozen())
    stages = [
        tiny.as_float64(one_stage(tiny.TASK, tiny.kd(w, t), lr=lr, schedule="step", milestones=(m,)))
        for w, t, lr, m in ((0.5, 2.0, 0.01, 0.0), (3.0, 9.0, 0.1, 1.0), (0.0, 1.0, 1e-3, 2.0))
    ]
    states = [begin(parts, stage, frozen, seed, wide) for seed, stage in enumerate(stages)]
    keys = jax.random.split(KEY, 3)
    step = make_step(parts)
    batches = [tiny.batch(seed=s, dtype=wide) for s in range(2)]
    stack = [jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees) for trees in (states, stages)]
    together = jax.jit(jax.vmap(step, in_axes=(0, None, None, 0, 0, None)))
    stacked = stack[0]
    for batch in batches:
        stacked, metrics = together(stacked, frozen, batch, keys, stack[1], LENGTHS)
        results = [jax.jit(step)(states[i], frozen, batch, keys[i], stages[i], LENGTHS) for i in range(3)]
        states = [state for state, _ in results]
    for i, (state, own) in enumerate(results):
        assert_close(jax.tree.map(lambda leaf, i=i: leaf[i], stacked), state, rtol=1e-10, atol=1e-12)
        assert_close({name: value[i] for name, value in metrics.items()}, own, rtol=1e-5)


def test_sums_over_blocks_are_one_pass():
    parts, stage, frozen = tiny.parts(tiny.DROPPING, augment=tiny.AUGMENT), as_leaves(one_stage()), tiny.frozen()
    data = {k: jnp.asarray(v) for k, v in tiny.data().items()}
    order = epoch_order(KEY, tiny.EXAMPLES, jnp.int32(0))
    state, totals = begin(parts, stage, frozen), zero_totals(stage, ("accuracy",))
    for start, count in ((0, 3), (3, 2)):
        state, totals = programs(parts).block(
            state, totals, frozen, data, order, jnp.int32(start), jnp.int32(count), KEY, stage, LENGTHS
        )
    alone, step, seen = begin(parts, stage, frozen), jax.jit(make_step(parts)), []
    for i in range(5):
        alone, metrics = step(alone, frozen, take(data, order[8 * i : 8 * i + 8]), KEY, stage, LENGTHS)
        seen.append({k: float(v) for k, v in metrics.items()})
    assert totals.keys() == seen[0].keys() == {"loss", "examples", "accuracy", "cross_entropy", "kd"}
    for name, value in totals.items():
        np.testing.assert_allclose(value, sum(row[name] for row in seen), rtol=1e-4)
    assert float(totals["examples"]) == 40
    np.testing.assert_allclose(totals["loss"], totals["cross_entropy"] + 0.7 * totals["kd"], rtol=1e-5)
    assert_close(state.params, alone.params, rtol=1e-3, atol=1e-5)


def test_numbers_never_recompile(tmp_path):
    traces = []

    def observe(outputs, batch):
        traces.append(outputs.logits.shape)
        return hits(outputs, batch)

    parts, results = tiny.parts(observe=observe), []

    def run(seed=0, distil=None, **optim):
        own = tiny.method(distil=distil, **{"weight_decay": 0.01, "schedule": "step", "milestones": (1.0, 2.0), **optim})
        results.append(fit(tiny.setup(tmp_path / f"{len(results)}", own, parts=parts, seed=seed)).state.params["student"])

    run()
    assert traces == [(8, tiny.CLASSES)]
    for distil in (tiny.kd(temperature=1.5), tiny.kd(weight=2), tiny.kd(weight=np.float64(0.25))):
        run(distil=distil)
    for change in (
        {"lr": 0.5},
        {"weight_decay": 0.1},
        {"milestones": (1, 2.5)},
        {"epochs": 2},
        {"decay": 0.3},
        {"momentum": 0.5},
    ):
        run(**change)
    run(seed=1)
    assert len(traces) == 1
    kernels = [np.asarray(params["fc"]["kernel"]).tobytes() for params in results]
    assert len(set(kernels)) == len(kernels)  # and each of them matters
    run(batch_size=4)
    assert len(traces) == 2 and traces[1][0] == 4


# -- randomness


@pytest.mark.parametrize("kind", ["dropout", "augmentation"])
def test_randomness_is_drawn_by_step(kind):
    parts = tiny.parts(tiny.DROPPING) if kind == "dropout" else tiny.parts(augment=tiny.AUGMENT)
    stage, frozen = as_leaves(one_stage()), tiny.frozen()
    state, step = begin(parts, stage, frozen), jax.jit(make_step(parts))

    def loss(number, key=KEY):
        at = dataclasses.replace(state, step=jnp.int32(number))
        return float(step(at, frozen, tiny.batch(), key, stage, LENGTHS)[1]["cross_entropy"])

    assert loss(3) == loss(3) and len({loss(i) for i in range(4)}) == 4 and loss(3) != loss(3, jax.random.key(6))


def test_orders_are_permutations():
    orders = [np.asarray(epoch_order(KEY, 50, jnp.int32(e))) for e in range(4)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len({order.tobytes() for order in orders}) == 4
    np.testing.assert_array_equal(epoch_order(jax.random.key(5), 50, jnp.int32(2)), orders[2])
    assert np.any(np.asarray(epoch_order(jax.random.key(6), 50, jnp.int32(2))) != orders[2])


def test_take_gives_rows_and_their_numbers():
    data, rows = tiny.data(), np.array([5, 0, 5, 43], np.int32)
    batch = take({k: jnp.asarray(v) for k, v in data.items()}, rows)
    for name in ("inputs", "label"):
        np.testing.assert_array_equal(batch[name], data[name][rows])
    np.testing.assert_array_equal(batch["index"], rows)


def test_the_streams_of_a_seed_differ():
    first, again, other = Keys.of(3), Keys.of(3), Keys.of(4)
    data = [tuple(map(int, jax.random.key_data(key))) for key in (*first, *other)]
    assert len(set(data)) == 6 and all(a == b for a, b in zip(first, again, strict=True))


# -- what may change


def test_the_teacher_is_frozen():
    parts, stage, frozen = tiny.parts(), as_leaves(one_stage()), tiny.frozen()
    before = jax.tree.map(np.array, frozen)
    state, step = begin(parts, stage, frozen), make_step(parts)

    def after(frozen):
        new, metrics = step(state, frozen, tiny.batch(), KEY, stage, LENGTHS)
        return metrics["kd"] + sum(leaf.sum() for leaf in jax.tree.leaves(new.params))

    assert all(not np.any(leaf) for leaf in jax.tree.leaves(jax.grad(after)(frozen)))
    assert_same_bits(frozen, before)
    other = jax.tree.map(lambda leaf: leaf * 2, frozen)
    assert float(after(other)) != float(after(frozen))  # yet it matters


def test_a_learner_is_a_frozen_teacher_to_another():
    parts = tiny.parts(teacher=None)._replace(learners=(Learner("student", tiny.STUDENT), Learner("peer", tiny.TEACHER)))
    towards_peer = dataclasses.replace(tiny.kd(), teacher="peer")
    stage = as_leaves(one_stage(towards_peer, trains=("student", "peer"), kind="sgd"))
    state = begin(parts, stage, {})
    new, _ = make_step(parts)(state, {}, tiny.batch(), KEY, stage, LENGTHS)
    assert_same_bits(new.params["peer"], state.params["peer"])
    single, variables = tiny.parts(), (state.params["peer"], state.model_state["peer"])
    alone = dataclasses.replace(stage, terms=(as_leaves(tiny.kd()),), trains=("student",))
    expected, _ = make_step(single)(
        begin(single, alone, {"teacher": variables}), {"teacher": variables}, tiny.batch(), KEY, alone, LENGTHS
    )
    assert_close(new.params["student"], expected.params["student"], rtol=1e-6)


def test_only_what_a_stage_trains_changes():
    stage, frozen = as_leaves(one_stage(trains=())), tiny.frozen()
    state = begin(tiny.parts(), stage, frozen)
    new, _ = make_step(tiny.parts())(state, frozen, tiny.batch(), KEY, stage, LENGTHS)
    assert_same_bits(new.params, state.params)


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.hidden, self.norm = nnx.Linear(16, 7, rngs=rngs), nnx.BatchNorm(7, rngs=rngs)
        self.last = nnx.Linear(7, tiny.CLASSES, rngs=rngs)

    def __call__(self, inputs, rngs=None):
        hidden = nnx.relu(self.norm(self.hidden(inputs.reshape(len(inputs), -1))))
        return self.last(hidden), {"embedding": hidden}


def build_nnx(rngs):
    return NnxNet(rngs)


@pytest.mark.parametrize("nnx_student", [True, False])
def test_linen_and_nnx_teach_each_other(nnx_student, tmp_path):
    student, teacher = (from_nnx(build_nnx), tiny.TEACHER) if nnx_student else (tiny.STUDENT, from_nnx(build_nnx))
    own = tiny.method(
        epochs=8, distil=Term(name="hint", teacher="teacher", loss=Hint(student_layer="embedding", teacher_layer="embedding"))
    )
    frozen = tiny.frozen(teacher)
    before = jax.tree.map(np.array, frozen)
    setup = tiny.setup(tmp_path, own, parts=tiny.parts(student, teacher), frozen=frozen, checkpoints=None)
    initial = setup.members[0].initial
    initial = predict(
        student,
        tiny.identity,
        jax.tree.map(jnp.copy, (initial.params["student"], initial.model_state["student"])),
        tiny.data()["inputs"],
    )
    fitted = fit(setup)
    assert_same_bits(frozen, before)
    logits = predict(student, tiny.identity, fitted.variables, tiny.data()["inputs"])
    label = tiny.data()["label"]
    assert (logits.argmax(1) == label).mean() > (initial.argmax(1) == label).mean()
    assert set(fitted.state.params["loss"]["hint"]) == {"kernel", "bias"}


# -- shapes, evaluation


def test_features_read():
    parts, frozen, sample = tiny.parts(), tiny.frozen(), sample_of(tiny.data())
    hint = Term(name="hint", teacher="teacher", loss=Hint(student_layer="hidden1", teacher_layer="hidden2"))
    for terms, wanted in (
        ((tiny.TASK, tiny.kd()), {"teacher": set()}),
        ((hint, tiny.kd()), {"teacher": {"hidden2"}}),
        ((tiny.TASK,), {}),
    ):
        stage = as_leaves(one_stage(*terms))
        state = begin(parts, stage, frozen)
        assert features_read(parts, stage, state, frozen, sample) == wanted
        names = {"student", *wanted}
        assert {
            name: out.logits.shape for name, out in abstract_outputs(parts, state, sample, frozen, stage).items()
        } == dict.fromkeys(names, (2, tiny.CLASSES))


@pytest.mark.parametrize("examples", [0, 1, 511, 512, 513])
def test_predict_pads_and_cuts(examples):
    variables = tiny.TEACHER.init(jax.random.key(0), tiny.data()["inputs"])
    inputs = tiny.data(examples)["inputs"]
    logits = predict(tiny.TEACHER, tiny.identity, variables, inputs)
    assert logits.dtype == np.float32 and len(logits) == examples
    if examples:
        np.testing.assert_allclose(logits, tiny.TEACHER.apply(*variables, inputs)[0].logits, rtol=1e-5, atol=1e-6)


def test_equal_parts_share_programs():
    assert programs(tiny.parts()) is programs(tiny.parts())
    assert programs(tiny.parts()) is not programs(tiny.parts(teacher=None))
