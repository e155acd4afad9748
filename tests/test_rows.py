"""Row-wise updates of tables: lazy Adam by NumPy, the dense step where a batch names every row, memory, what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdistill import blueprint
from jdistill.data.base import Schema
from jdistill.errors import UsageError
from jdistill.losses import LogitMSE
from jdistill.method import Stage, Term
from jdistill.pytrees import as_leaves
from jdistill.registry import build
from jdistill.run import run
from jdistill.sampling import Known, Lists
from jdistill.stages import enter_stage, init_state
from jdistill.tasks.recommendation import Pairs
from jdistill.teachers.targets import Live
from jdistill.train import Learner, Parts, make_step, programs, zero_totals
from tests import tiny
from tests.models.recommend import shop
from tests.tiny import assert_close, assert_same_bits

USERS, ITEMS, DIM, BATCH, STEPS = 9, 14, 3, 5, 4
WEIGHT = 0.625
NUMBERS = {"lr": 0.125, "momentum": 0.875, "beta2": 0.96875, "eps": 2**-10, "weight_decay": 0.03125}  # exact in float32
SCHEMA = Schema(users=USERS, items=ITEMS)
LENGTHS = (np.float32(STEPS), np.float32(1))
BPR = Term(name="bpr", loss=build("loss", {"name": "bpr"}))
MSE = Term(name="mse", teacher="teacher", loss=LogitMSE(), weight=WEIGHT)


def problem(name="bpr", *, rows=True, terms=(BPR, MSE), seed=0, microbatches=1, **optim):
    """Parts, stage, entered state and frozen arrays, in float64 under `enable_x64`; all parameters N(0, 1)."""
    fields = {"bpr": {"bias": True}, "neumf": {"layers": 1}, "two_tower": {}}[name]
    student, teacher = (shop.network(name, SCHEMA, None, dim=dim, **fields) for dim in (DIM, 2))
    learners, targets = (Learner("student", student),), (("teacher", Live(teacher)),)
    parts = Parts(learners, targets, tiny.identity, None, lambda *_: {}, microbatches=microbatches)
    optim = {**NUMBERS, "batch_size": BATCH, "rows": rows, **optim}
    stage = floats(as_leaves(Stage(name="train", terms=terms, optim=build("optim", {"name": "adam", **optim}))))
    sample, rng = batches(np.random.default_rng(0))[0], np.random.default_rng(seed)
    frozen = {"teacher": normal(rng, teacher.init(jax.random.key(0), sample["inputs"]))}
    state = init_state(parts, jax.random.key(0), sample)
    state = dataclasses.replace(state, params={**state.params, "student": normal(rng, state.params["student"])})
    return parts, stage, enter_stage(parts, stage, state, jax.random.key(0), sample, frozen, sample["label"]), frozen


def floats(tree):
    """In float64 under `enable_x64`, else in float32."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, float), tree)


def normal(rng, tree):
    return floats(jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), tree))


def batches(rng, *, every=False):
    """Batches of BATCH rows of few users and items, with repetitions; `every` names all of both."""
    made = []
    for _ in range(STEPS):
        user, items = rng.choice([1, 4, 8], BATCH), rng.choice([0, 5, 6, 11, 13], (BATCH, 3))
        if every:
            rows = 2 * USERS
            user, items = rng.permutation(rows) % USERS, rng.permutation(3 * rows).reshape(rows, 3) % ITEMS
        inputs = {"user": user.astype(np.int32), "items": items.astype(np.int32)}
        index = np.arange(len(user), dtype=np.int32)
        made.append({"inputs": inputs, "label": np.zeros_like(index), "index": index})
    return made


def trained(parts, stage, state, frozen, given):
    """The states after each step."""
    step, states = jax.jit(make_step(parts)), [state]
    for batch in given:
        states.append(step(states[-1], frozen, batch, jax.random.key(7), stage, LENGTHS)[0])
    return states


def moments(state):
    """Of each table what the optimizer remembers: [(table name -> array), ...]."""
    return [tree["student"] for part in state.opt_state for tree in part if isinstance(tree, dict)]


# -- values


def slopes(tables, teacher, batch):
    """By loops: the gradient of mean BPR plus WEIGHT times mean squared difference to the teacher, and the rows named."""
    grads, users, items = {k: np.zeros_like(v) for k, v in tables.items()}, batch["inputs"]["user"], batch["inputs"]["items"]
    for u, candidates in zip(users, items, strict=True):
        s, t = (
            np.array([p["user"][u] @ p["item"][i] + p["bias"][i] for i in candidates]) for p in (tables, teacher)
        )  # fmt: skip
        slope = WEIGHT * 2 * (s - t) / len(s)
        for k in range(1, len(s)):
            wrong = 1 / (1 + np.exp(s[0] - s[k]))
            slope[k] += wrong
            slope[0] -= wrong
        for i, d in zip(candidates, slope / len(users), strict=True):
            grads["user"][u] += d * tables["item"][i]
            grads["item"][i] += d * tables["user"][u]
            grads["bias"][i] += d
    return grads, {"user": set(users), "item": set(items.ravel()), "bias": set(items.ravel())}


def lazily(tables, teacher, given, kind):
    """Tables after each batch, row by row: a row that a batch does not name is not looked at."""
    lr, momentum, beta2, eps, decay = NUMBERS.values()
    m, v = ({k: np.zeros_like(x) for k, x in tables.items()} for _ in range(2))
    path = []
    for step, batch in enumerate(given, 1):
        grads, named = slopes(tables, teacher, batch)
        tables = {k: x.copy() for k, x in tables.items()}
        for name, rows in named.items():
            for r in rows:
                p = tables[name][r]
                g = grads[name][r] + (0 if kind == "adamw" else decay * p)
                if kind == "sgd":
                    m[name][r] = move = momentum * m[name][r] + g
                else:
                    m[name][r] = momentum * m[name][r] + (1 - momentum) * g
                    v[name][r] = beta2 * v[name][r] + (1 - beta2) * g * g
                    move = m[name][r] / (1 - momentum**step) / (np.sqrt(v[name][r] / (1 - beta2**step)) + eps)
                    move = move + (decay * p if kind == "adamw" else 0)
                tables[name][r] = p - lr * move
        path.append(tables)
    return path, m, v


@pytest.mark.parametrize("kind", [pytest.param("sgd", marks=pytest.mark.slow), "adam", "adamw"])
def test_steps_are_those_of_a_lazy_optimizer_by_numpy(kind):
    """With a live teacher, which is asked for the request's own ids."""
    with jax.enable_x64(True):
        parts, stage, state, frozen = problem(kind=kind)
        given = batches(np.random.default_rng(1))
        states = trained(parts, stage, state, frozen, given)
        before, teacher = jax.tree.map(np.asarray, (state.params["student"], frozen["teacher"][0]))
        path, m, v = lazily(before, teacher, given, kind)
        for found, expected in zip(states[1:], path, strict=True):
            assert_close(found.params["student"], expected, rtol=1e-10, atol=1e-13)
        assert_close(moments(states[-1]), [m] if kind == "sgd" else [m, v], rtol=1e-10, atol=1e-13)


def test_rows_that_no_batch_names_keep_their_bits_and_have_no_moments():
    """A step of a batch elsewhere leaves parameters and moments of earlier rows as they are."""
    parts, stage, state, frozen = problem()
    first, second = batches(np.random.default_rng(1))[:2]
    second["inputs"] = {"user": np.array([4, 4, 8, 8, 4], np.int32), "items": np.full((BATCH, 3), 5, np.int32)}
    start, after, last = trained(parts, stage, state, frozen, [first, second])
    others = {"user": [0, 2, 3, 5, 6, 7], "item": [1, 2, 3, 4, 7, 8, 9, 10, 12]}
    for name, rows in {**others, "bias": others["item"]}.items():
        for state in (after, last):
            assert_same_bits(state.params["student"][name][rows, ...], start.params["student"][name][rows, ...])
            assert all(not np.any(tree[name][rows, ...]) for tree in moments(state))
    assert np.any(after.params["student"]["user"][1] != start.params["student"]["user"][1])
    for tree, old in zip((last.params["student"], *moments(last)), (after.params["student"], *moments(after)), strict=True):
        assert_same_bits(tree["user"][1], old["user"][1])
        assert_same_bits(tree["item"][[0, 6, 11, 13], :], old["item"][[0, 6, 11, 13], :])
    assert np.any(last.params["student"]["user"][4] != after.params["student"]["user"][4])


@pytest.mark.parametrize(
    ("name", "given"),
    [("bpr", {}), pytest.param("bpr", {"kind": "adamw"}, marks=pytest.mark.slow), ("bpr", {"kind": "sgd"}),
     ("bpr", {"microbatches": 2}), ("neumf", {}), pytest.param("two_tower", {}, marks=pytest.mark.slow)],
)  # fmt: skip
def test_where_every_row_is_named_it_is_the_dense_step(name, given):
    with jax.enable_x64(True):
        each = batches(np.random.default_rng(2), every=True)
        dense, by_rows = (trained(*problem(name, rows=rows, **given), each)[-1] for rows in (False, True))
        assert_close(by_rows, dense, rtol=1e-11, atol=1e-13)


def test_members_of_a_population_are_their_own_runs():
    with jax.enable_x64(True):
        each = [batches(np.random.default_rng(seed)) for seed in (3, 4)]
        alone = [trained(*problem(seed=seed), given)[-1] for seed, given in enumerate(each)]
        parts, stage, _, frozen = problem()
        state = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(problem(seed=seed)[2] for seed in (0, 1)))
        frozen = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(problem(seed=seed)[3] for seed in (0, 1)))
        step = jax.jit(jax.vmap(make_step(parts), in_axes=(0, 0, 0, None, None, None)))
        for pair in zip(*each, strict=True):
            batch = jax.tree.map(lambda *leaves: np.stack(leaves), *pair)
            state, _ = step(state, frozen, batch, jax.random.key(7), stage, LENGTHS)
        for i, expected in enumerate(alone):
            assert_close(jax.tree.map(lambda leaf, i=i: leaf[i], state), expected, rtol=1e-10, atol=1e-13)


# -- memory


def temporaries(rows):
    """Bytes that a block of steps on 300,000 items of 32 numbers needs beside its arguments; and a table's bytes."""
    schema, examples = Schema(users=1000, items=300_000), 4096
    model, optim = shop.network("bpr", schema, None, dim=32), {"name": "adam", "batch_size": 256, "rows": rows}
    parts = Parts((Learner("student", model),), (), tiny.identity, None, lambda *_: {}, sampler=Pairs(schema, 1))
    stage = as_leaves(Stage(name="train", terms=(BPR,), optim=build("optim", optim)))

    def ints(*shape):
        return jax.ShapeDtypeStruct(shape, np.int32)

    data = {"inputs": ints(examples, 2), "label": jax.ShapeDtypeStruct((examples,), np.float32)}
    sample = {name: jax.ShapeDtypeStruct((2, *a.shape[1:]), a.dtype) for name, a in data.items()} | {"index": ints(2)}
    frozen = {"tables": {"known": Known(ints(), Lists(start=ints(1001), values=ints(examples), halvings=10), ints(300_000))}}
    key = jax.eval_shape(lambda: jax.random.key(0))

    def entered(key, label, frozen):
        return enter_stage(parts, stage, init_state(parts, key, sample), key, sample, frozen, label)

    state = jax.eval_shape(entered, key, data["label"], frozen)
    order, scalar = ints(examples), ints()
    block = programs(parts).block.lower(
        state, zero_totals(stage, ()), frozen, data, order, scalar, scalar, key, stage, LENGTHS
    )  # fmt: skip
    return block.compile().memory_analysis().temp_size_in_bytes, 300_000 * 32 * 4


def test_no_array_of_a_tables_size_is_made():
    by_rows, table = temporaries(True)
    assert by_rows < table / 20
    assert temporaries(False)[0] > table / 2  # what a gradient of the whole table takes: the bound above tells them apart


# -- the program


SHOP = (("data.users", 60), ("data.items", 50), ("optim.batch_size", 64), ("optim.epochs", 1), ("evaluate.latency", False))


def config(*overrides, **choices):
    given = {"data": "synthetic_shop", "task": "recommend", "student": "bpr", "teacher": "none", "loss": "none", **choices}
    return tiny.config(*SHOP, ("optim.rows", True), *overrides, **given)


def test_a_run_trains_teacher_and_student_by_rows(tmp_path):
    """Distilled on the task's candidates."""
    overrides = (("optim.lr", 0.05), ("optim.epochs", 3), ("teacher.optim.epochs", 1), ("teacher.optim.rows", True))
    found = run(config(*overrides, teacher="bpr", loss="logit_mse"), tmp_path)
    assert found["status"] == "finished" and found["metrics"]["train"]["ordered"] > 0.6


REFUSED = [
    ({"student": "lightgcn"}, (), r"needs a network whose tables are read by the request's users and items alone"),
    ({"student": "two_tower"}, (("data.history", 5),), r"this one has none, or reads other rows too \(histories"),
    ({"teacher": "bpr", "loss": "cd"}, (), r"trains on the batch's users and items, and loss cd draws others"),
    ({"scheme": "online"}, (), r"trains the student alone, and this scheme trains student, "),
    ({"compression": "prune"}, (("compression.recover_epochs", 1),), r"stage recover1 trains a student under compression"),
]


@pytest.mark.parametrize(("choices", "overrides", "message"), REFUSED, ids=lambda value: str(value)[:30])
def test_refuses_what_moves_other_rows(choices, overrides, message):
    with pytest.raises(UsageError, match=f"^optim.rows.*{message}.*; set optim.rows=false$"):
        blueprint.read(config(*overrides, **choices))


def test_refuses_networks_without_tables():
    with pytest.raises(UsageError, match=r"^optim\.rows needs a network"):
        blueprint.read(tiny.config(("optim.rows", True), loss="none"))
