"""Contrastive losses against the published number, against plain loops over several steps, and in their edge cases."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jdistill.errors import UsageError
from jdistill.losses.contrast import (
    ContrastiveConsistent,
    ContrastiveRepresentation,
    noise_contrast,
    rows_of_other_classes,
)
from jdistill.pytrees import as_leaves
from jdistill.registry import build, options
from jdistill.types import Context, Outputs
from tests.reference import contrast as reference

LABEL = np.array([2, 0, 2, 5, 0, 2, 5, 5, 0], np.int32)
INDEX = [[7, 1, 2, 3], [0, 8, 4, 1], [3, 1, 5, 6]]  # row 1 comes three times, row 3 twice
KEYS = jax.random.split(jax.random.key(7), 3)
SMALL = {"queue": 6, "hidden_size": 5, "embedding_size": 3}
LOSSES = {
    "crd": ContrastiveRepresentation(embedding_size=4, negatives=5),
    "cocord": ContrastiveConsistent(**SMALL),
    "cocord_batch": ContrastiveConsistent(**{**SMALL, "queue": 0, "same_class_negatives": False}),
    "cocord_linear": ContrastiveConsistent(**{**SMALL, "hidden_size": 0}),
}
every = pytest.mark.parametrize("name", LOSSES)


def one(feature) -> Outputs:
    return Outputs(jnp.zeros((len(feature), 3)), {"embedding": jnp.asarray(feature)})


def draw(seed: int, width_s: int = 6, width_t: int = 6) -> tuple[Outputs, Outputs]:
    random = np.random.RandomState(seed)
    return one(random.randn(4, width_s)), one(random.randn(4, width_t))


def context(student: Outputs, teacher: Outputs, step: int = 0, count: int = 4) -> Context:
    rows = np.array(INDEX[step], np.int32)[:count]
    return Context(student, teacher, {"index": jnp.asarray(rows), "label": jnp.asarray(LABEL[rows])}, KEYS[step], None)


def start(loss, student: Outputs, teacher: Outputs, label=LABEL):
    abstract = jax.eval_shape(lambda: (student, teacher))

    @jax.jit
    def make(label):
        return loss.init(jax.random.key(0), *abstract), loss.init_state(jax.random.key(1), *abstract, label)

    return make(jnp.asarray(label))


draw_rows = functools.partial(jax.jit, static_argnums=3)(rows_of_other_classes)


@jax.jit
def step_of(loss, params, state, student, teacher, batch, key):
    return loss.evaluate(params, state, Context(student, teacher, batch, key, None))


def run(loss, params, state, context):
    return step_of(loss, params, state, context.student, context.teacher, context.batch, context.key)


def test_published_value_of_crd():
    """RepDistiller `ContrastLoss(n_data=100)` in float64."""
    scores = reference.golden_scores()
    with jax.enable_x64(True):
        value = noise_contrast(jnp.log(scores), 100).mean()
    np.testing.assert_allclose(value, 13.77810193795729, rtol=1e-10)
    np.testing.assert_allclose(reference.contrast_loss(scores, 100), 13.77810193795729, rtol=1e-10)


@pytest.mark.parametrize(("negatives", "drawn"), [(5, 5), (50, 9)], ids=["5", "more than rows"])
def test_crd_over_three_steps(negatives, drawn):
    loss = ContrastiveRepresentation(embedding_size=4, negatives=negatives, temperature=0.5, momentum=0.3)
    with jax.enable_x64(True):
        params, state = start(loss, *draw(0, 6, 3))
        memory = reference.Memory(state["student"], state["teacher"], 0.5, 0.3)
        for step in range(3):
            student, teacher = draw(step, 6, 3)
            others = draw_rows(KEYS[step], state, jnp.asarray(INDEX[step]), drawn)
            embedded = {
                side: reference.embed(np.asarray(out.features["embedding"]), params[side])
                for side, out in (("student", student), ("teacher", teacher))
            }
            values, state = run(loss, params, state, context(student, teacher, step))
            expected = memory.step(embedded, INDEX[step], np.asarray(others).tolist())
            assert values.shape == (4,) and values.dtype == jnp.float64
            np.testing.assert_allclose(values.mean(), expected, rtol=1e-10)
            for side in ("student", "teacher"):
                np.testing.assert_allclose(state[side], memory.banks[side], rtol=1e-10)
                np.testing.assert_allclose(np.exp(state[f"log_z_{side}"]), memory.z[side], rtol=1e-10)


@pytest.mark.parametrize("label", [LABEL, [0, 0, 0, 0, 0, 0, 0, 0, 1], [-3, 7, 7, 7, 7, 7, 7, 7, -3]])
def test_negatives_of_crd_are_uniform_over_rows_of_other_classes(label):
    label, count = np.asarray(label), 6000
    _, state = start(LOSSES["crd"], *draw(0), label)
    others = np.asarray(draw_rows(jax.random.key(3), state, jnp.arange(len(label)), count))
    for row, drawn in enumerate(others):
        allowed = label != label[row]
        share = np.bincount(drawn, minlength=len(label)) / count
        assert np.all(share[~allowed] == 0)
        deviation = 5 * np.sqrt(1 / allowed.sum() / count)
        np.testing.assert_allclose(share[allowed], 1 / allowed.sum(), atol=deviation)


def test_negatives_of_crd_where_there_is_one_class_are_any_other_row():
    _, state = start(LOSSES["crd"], *draw(0), np.ones(5, np.int32))
    others = np.asarray(draw_rows(jax.random.key(3), state, jnp.arange(5), 200))
    assert [sorted(set(drawn)) for drawn in others.tolist()] == [[j for j in range(5) if j != i] for i in range(5)]
    _, state = start(LOSSES["crd"], *draw(0), np.ones(1, np.int32))
    assert np.all(draw_rows(jax.random.key(3), state, jnp.zeros(2, jnp.int32), 4) == 0)


def test_negatives_of_crd_are_drawn_anew_and_banks_start_as_published():
    loss = ContrastiveRepresentation(negatives=5)
    params, state = start(loss, *draw(0))
    at = context(*draw(0))
    first, again, other = (run(loss, params, state, at._replace(key=key))[0] for key in (KEYS[0], KEYS[0], KEYS[1]))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-3
    for side in ("student", "teacher"):
        assert state[side].shape == (9, 128) and params[side]["kernel"].shape == (6, 128)
        np.testing.assert_allclose(np.abs(state[side]).max(), (3 / 128) ** 0.5, rtol=0.01)
    assert np.abs(state["student"] - state["teacher"]).max() > 0.1


def test_crd_trains_both_embeddings():
    loss = LOSSES["crd"]
    params, state = start(loss, *draw(0))
    grads = jax.grad(lambda params: run(loss, params, state, context(*draw(0)))[0].mean())(params)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads))


@pytest.mark.parametrize(("queue", "same_class"), [(0, True), (0, False), (2, True), (6, False)])
def test_cocord_over_three_steps(queue, same_class):
    """No queue, one shorter than a batch, and one that wraps round in the middle of a batch."""
    config = {**SMALL, "queue": queue, "same_class_negatives": same_class}
    loss = ContrastiveConsistent(**config, temperature=0.5, momentum=0.6)
    with jax.enable_x64(True):
        params, state = start(loss, *draw(0))
        teacher_head = jax.tree.map(np.asarray, params)
        keys = [(-1, key) for key in np.asarray(state["keys"])] if queue else []
        for step in range(3):
            student, teacher = draw(step)
            params = jax.tree.map(lambda p, s=step: p * (1 + 0.1 * s) + 0.05 * s, params)  # as if it was trained
            if step:
                teacher_head = jax.tree.map(lambda t, s: 0.6 * t + 0.4 * np.asarray(s), teacher_head, params)
            q = reference.head(np.asarray(student.features["embedding"]), params)
            k = reference.head(np.asarray(teacher.features["embedding"]), teacher_head)
            own = LABEL[INDEX[step]]
            others = []
            for i in range(4):
                known = keys if queue else [(own[j], k[j]) for j in range(4) if j != i]
                others.append([key for label, key in known if same_class or label != own[i]])
            values, state = run(loss, params, state, context(student, teacher, step))
            np.testing.assert_allclose(values.mean(), reference.pick(q, k, others, 0.5), rtol=1e-10)
            keys = (keys + list(zip(own, k, strict=True)))[-queue:] if queue else []
            if queue:
                assert sorted(np.asarray(state["label"]).tolist()) == sorted(int(label) for label, _ in keys)


def test_cocord_teachers_head_of_another_width_keeps_its_first_layer_and_follows_with_the_rest():
    loss = ContrastiveConsistent(**SMALL)
    params, state = start(loss, *draw(0, 6, 2))
    _, after = run(loss, params, state, context(*draw(0, 6, 2)))
    np.testing.assert_array_equal(after["head"]["hidden"], state["head"]["hidden"])
    assert after["head"]["hidden"].shape == (2, 5)
    for name in ("kernel", "bias", "scale", "offset"):
        np.testing.assert_array_equal(after["head"][name], params[name])


def test_cocord_teachers_head_is_the_students_at_first_so_one_network_twice_agrees_best():
    out = draw(0)[0]
    loss = ContrastiveConsistent(**{**SMALL, "queue": 0, "embedding_size": 16})
    params, state = start(loss, out, out)
    same, _ = run(loss, params, state, context(out, out))
    turned = one(np.asarray(out.features["embedding"])[[1, 2, 3, 0]])
    other, _ = run(loss, params, state, context(out, turned))
    assert np.all(same < other) and np.all(same > 0)


@pytest.mark.slow
@every
def test_gradients_by_finite_differences_and_none_through_the_state(name):
    loss = LOSSES[name]
    with jax.enable_x64(True):
        student, teacher = draw(0)
        params, state = start(loss, student, teacher)
        _, state = run(loss, params, state, context(student, teacher))  # Z and the teacher's head are constants now
        at = context(*draw(1), 1)
        moved = {**state, "started": jnp.ones((), bool)}
        if "head" in state:  # a momentum of 1: finite differences would see the head follow
            loss = dataclasses.replace(loss, momentum=jnp.ones(()))

        @jax.jit
        def total(params, student):
            return loss.evaluate(params, moved, at._replace(student=student))[0].sum()

        check_grads(total, (params, at.student), order=1, modes=["rev"], atol=1e-5, rtol=1e-5, eps=1e-6)

        def remembered(params):
            return sum(x.sum() for x in jax.tree.leaves(loss.evaluate(params, moved, at)[1]) if x.dtype == float)

        grads = jax.jit(jax.grad(remembered))(params)
        assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(grads))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["crd", "cocord"])
def test_jit_is_eager(name):
    with jax.enable_x64(True):
        loss, at = LOSSES[name], context(*draw(0))
        params, state = start(loss, at.student, at.teacher)
        eager, compiled = loss.evaluate(params, state, at), run(loss, params, state, at)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-14), eager, compiled)


@pytest.mark.slow
@every
def test_state_keeps_its_types_and_is_no_narrower_than_float32(name):
    loss, at = LOSSES[name], context(*(jax.tree.map(lambda x: x.astype(jnp.bfloat16), out) for out in draw(0)))
    params, state = start(loss, at.student, at.teacher)
    values, after = run(loss, params, state, at)
    kinds = [jax.tree.map(lambda x: (x.shape, x.dtype), tree) for tree in (state, after)]
    assert kinds[0] == kinds[1] and values.dtype == jnp.float32
    assert {x.dtype for x in jax.tree.leaves(state)} <= {jnp.dtype(t) for t in ("float32", "int32", "bool")}


@pytest.mark.slow
@every
def test_vmap_over_numbers_is_the_loop_and_no_number_retraces(name):
    with jax.enable_x64(True):
        at, traces = context(*draw(0)), []
        members = [jax.tree.map(lambda x, i=i: x * np.float32(1 - 0.2 * i), as_leaves(LOSSES[name])) for i in range(3)]
        params, state = start(LOSSES[name], at.student, at.teacher)

        @jax.jit
        def value(loss):
            traces.append(loss)
            return loss.evaluate(params, state, at)

        loop = jax.tree.map(lambda *x: np.stack(x), *[value(loss) for loss in members])
        assert len(traces) == 1 and np.abs(np.diff(loop[0], axis=0)).max() > 1e-4
        stacked = jax.tree.map(lambda *x: jnp.stack(x), *members)
        together = jax.jit(jax.vmap(lambda loss: loss.evaluate(params, state, at)))(stacked)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), together, loop)


@pytest.mark.slow
@every
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_finite_at_extremes(name, dtype):
    """At +-1e4, features of zeros with and without bias, student = teacher, and a temperature at which exp overflows."""
    large = jnp.where(draw(0)[0].features["embedding"] > 0, 1e4, -1e4).astype(dtype)

    @jax.jit
    def value_and_grad(loss, params, state, student, teacher):
        def mean(params, student):
            values, after = loss.evaluate(params, state, context(one(student), one(teacher)))
            return values.mean(), (values, after)

        return jax.value_and_grad(mean, argnums=(0, 1), has_aux=True)(params, student)

    hot = dataclasses.replace(as_leaves(LOSSES[name]), temperature=jnp.float32(0.005))
    for loss in (as_leaves(LOSSES[name]), hot):
        params, state = start(loss, one(large), one(large))
        zeros = jnp.zeros_like(large)
        dead = jax.tree.map(jnp.zeros_like, params)
        for student, teacher, p in (
            (large, -large, params),
            (zeros, large, params),
            (large, zeros, dead),
            (large, large, params),
        ):
            (_, (values, after)), grads = value_and_grad(loss, p, state, student, teacher)
            (_, (later, _)), _ = value_and_grad(loss, p, after, student, teacher)
            finite = jax.tree.map(lambda x: bool(np.all(np.isfinite(x.astype(jnp.float32)))), (values, later, after, grads))
            assert all(jax.tree.leaves(finite)), finite
            assert np.all(values >= 0) and np.all(values < 1e5)


@every
def test_declarations(name):
    loss, (student, teacher) = LOSSES[name], draw(0)
    assert not loss.per_example and not loss.zero_at_teacher and loss.needs_teacher
    assert not loss.calls_networks and not loss.reads_initial
    params, state = start(loss, student, teacher)
    at = context(student, teacher)
    other = jax.tree.map(lambda x: x.at[1:].set(x[:0:-1] * 1.5), student)
    if name != "cocord_linear":  # with a queue and no BatchNorm a value is its example's alone
        assert abs(run(loss, params, state, at._replace(student=other))[0][0] - run(loss, params, state, at)[0][0]) > 1e-6
    values, _ = run(loss, params, state, context(*(one(out.features["embedding"][:1]) for out in (student, teacher)), count=1))
    assert values.shape == (1,) and np.all(np.isfinite(values))


def test_weights_and_defaults():
    assert {name: options("loss")[name].fields["weight"][1] for name in ("crd", "cocord")} == {"crd": 0.8, "cocord": 1.0}
    crd, cocord = build("loss", {"name": "crd"}), build("loss", {"name": "cocord"})
    assert (crd.temperature, crd.momentum, crd.negatives, crd.embedding_size) == (0.07, 0.5, 16384, 128)
    assert (cocord.temperature, cocord.momentum, cocord.queue, cocord.embedding_size) == (0.1, 0.999, 0, 2048)


@pytest.mark.parametrize("loss", [ContrastiveRepresentation, ContrastiveConsistent])
@pytest.mark.parametrize("field", ["student_layer", "teacher_layer"])
def test_a_layer_that_does_not_exist(loss, field):
    with pytest.raises(UsageError, match=rf"^{field} 'embeding' does not exist in the .*; did you mean 'embedding'\?"):
        loss(**{field: "embeding"}).init(jax.random.key(0), *draw(0))
    with pytest.raises(UsageError, match="needs a teacher"):
        loss().init(jax.random.key(0), draw(0)[0], None)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"name": "crd", "temperature": 0.0}, "loss.temperature must be positive, got 0.0"),
        ({"name": "crd", "momentum": 1.0}, "loss.momentum must be at least 0 and below 1, got 1.0"),
        ({"name": "crd", "negatives": 0}, "loss.negatives must be positive, got 0"),
        ({"name": "crd", "embedding_size": 0}, "loss.embedding_size must be positive, got 0"),
        ({"name": "cocord", "temperature": -1.0}, "loss.temperature must be positive, got -1.0"),
        ({"name": "cocord", "momentum": -0.1}, "loss.momentum must be at least 0 and below 1, got -0.1"),
        ({"name": "cocord", "queue": -1}, "loss.queue must be at least 0, got -1"),
        ({"name": "cocord", "hidden_size": -1}, "loss.hidden_size must be at least 0, got -1"),
    ],
)
def test_bad_options(config, message):
    with pytest.raises(UsageError) as error:
        build("loss", config)
    assert message in str(error.value) and "\n" not in str(error.value)
