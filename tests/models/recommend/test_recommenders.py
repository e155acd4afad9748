"""What every recommender promises: candidates, features, counts, gradients, seeds at once, refused data."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdistill.data.base import Schema
from jdistill.errors import UsageError
from tests.marks import slow_but
from tests.models.recommend.shop import (
    HISTORY,
    ITEMS,
    LENGTH,
    NAMES,
    PAIRS,
    READ_HISTORY,
    SCHEMA,
    SHARED,
    USER,
    USERS,
    network,
    request,
    run,
    started,
)

FIELDS = {"dim": 6}
QUICK = ("bpr", "cdae", "lightgcn")
"""One by factors alone, one that reads histories, one on a graph; the others compile longer."""


@functools.cache
def case(name):
    model = network(name, **FIELDS)
    return model, *started(model, scale=0.5)


@pytest.mark.parametrize("name", slow_but((*QUICK, "sasrec"), NAMES))
def test_ways_of_asking_agree(name):
    model, params, state = case(name)
    every, pairs, shared = (run(model, params, state, request(items)) for items in (None, PAIRS, SHARED))
    assert every.logits.shape == (4, ITEMS) and every.logits.dtype == jnp.float32
    np.testing.assert_allclose(pairs.logits, np.take_along_axis(np.asarray(every.logits), PAIRS, 1), atol=2e-5)
    np.testing.assert_allclose(shared.logits, np.asarray(every.logits)[:, SHARED], atol=2e-5)
    item = np.asarray(every.features["item"])
    np.testing.assert_allclose(pairs.features["item"], item[PAIRS], atol=1e-5)
    np.testing.assert_allclose(shared.features["item"], item[SHARED], atol=1e-5)
    for outputs in (every, pairs, shared):
        user = outputs.features["user"]
        assert user.shape == (4, item.shape[1])
        np.testing.assert_array_equal(user, outputs.features["embedding"])
        np.testing.assert_allclose(user, every.features["user"], atol=1e-5)
        assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(outputs))


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("neumf", "cdae", "gru4rec")])
def test_scores_are_products_of_the_features(name):
    model, params, state = case(name)
    outputs = run(model, params, state, request(PAIRS))
    expected = np.sum(np.asarray(outputs.features["user"])[:, None] * np.asarray(outputs.features["item"]), -1)
    np.testing.assert_allclose(outputs.logits, expected, atol=1e-5)


def perceptron(*widths):
    return sum(a * b + b for a, b in itertools.pairwise(widths))


D = 6
COUNTS = {
    "bpr": (USERS + ITEMS) * D,
    "lightgcn": (USERS + ITEMS) * D,
    "neumf": (USERS + ITEMS) * 2 * D + perceptron(2 * D, 6, 3, 1) + (D + 1 + 1),
    "cdae": (USERS + 2 * ITEMS) * D + D + ITEMS,
    "sasrec": (ITEMS + LENGTH) * D + 5 * (D * D + D) + 3 * 2 * D,  # three linear maps and two layers, three norms
    "gru4rec": ITEMS * D + ITEMS + 6 * D * D + 4 * D,  # three gates of two matrices; no bias of r and z twice
    "two_tower": (USERS + ITEMS) * D + D * D + perceptron(3, 32, D) + perceptron(4, 32, D),
}


@pytest.mark.parametrize("name", NAMES)
def test_parameter_count(name):
    _, params, _ = case(name)
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)) == COUNTS[name]


def test_further_parameters():
    def count(name, **fields):
        params, _ = jax.eval_shape(lambda: started(network(name, **FIELDS, **fields)))
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))

    assert count("bpr", bias=True) == COUNTS["bpr"] + ITEMS
    assert count("sasrec", layers=2) == COUNTS["sasrec"] + 5 * (D * D + D) + 2 * 2 * D
    assert count("gru4rec", layers=2) == COUNTS["gru4rec"] + 6 * D * D + 4 * D
    assert count("two_tower", ids=False) == COUNTS["two_tower"] - ITEMS * D
    assert count("two_tower", schema=Schema(users=USERS, items=ITEMS)) == COUNTS["two_tower"] - D * D
    assert count("two_tower", side=None) == (USERS + ITEMS) * D + D * D


@pytest.mark.parametrize("name", slow_but((*QUICK, "two_tower"), NAMES))
def test_gradients_are_finite_and_reach_what_scores_read(name):
    model, params, state = case(name)

    @jax.jit
    def gradient(params, key):
        def objective(params):
            outputs, _ = model.apply(params, state, request(), key=key, train=True)
            return jnp.mean(jnp.square(outputs.logits - 1))

        return jax.grad(objective)(params)

    grads = gradient(params, jax.random.key(3))
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(grads))
    paths = jax.tree_util.tree_leaves_with_path(grads)
    still = [jax.tree_util.keystr(path) for path, leaf in paths if not np.any(np.abs(leaf) > 1e-7)]
    assert still in ([], ["['block1']['key']['bias']"])  # a softmax ignores what is added to all


@pytest.mark.parametrize("name", slow_but((*QUICK, "gru4rec"), NAMES))
def test_only_dropout_tells_training_from_evaluation(name):
    _, params, state = case(name)
    droppers = {"cdae", "gru4rec", "sasrec"}
    plain = network(name, **FIELDS, **({"dropout": 0.0} if name in droppers else {}))
    outputs = run(plain, params, state, request(PAIRS))
    trained = run(plain, params, state, request(PAIRS), train=True, key=jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, trained, outputs)
    if name in droppers:
        dropping = network(name, **FIELDS, dropout=0.5)
        one, again, other = (
            run(dropping, params, state, request(PAIRS), train=True, key=jax.random.key(i)).logits for i in (1, 1, 2)
        )
        np.testing.assert_array_equal(one, again)
        assert np.any(one != other)
        np.testing.assert_array_equal(run(dropping, params, state, request(PAIRS)).logits, outputs.logits)


@pytest.mark.parametrize("name", NAMES)
def test_state_is_handed_on(name):
    model, params, state = case(name)
    after = jax.jit(lambda *a: model.apply(*a, key=jax.random.key(0), train=True)[1])(params, state, request(PAIRS))
    assert jax.tree.structure(after) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, after, state)


@pytest.mark.parametrize("name", slow_but(QUICK, NAMES))
def test_seeds_at_once(name):
    model, *one = case(name)
    two = started(model, seed=1, scale=0.5)
    stacked = jax.tree.map(lambda a, b: jnp.stack([a, b]), tuple(one), two)

    def value(params, state):
        return jnp.sum(jnp.sin(model.apply(params, state, request(SHARED))[0].logits))

    got = jax.jit(jax.vmap(jax.value_and_grad(value)))(*stacked)
    for i, (params, state) in enumerate((one, two)):
        expected = jax.jit(jax.value_and_grad(value))(params, state)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a[i], b, atol=2e-5), got, expected)  # noqa: B023


@pytest.mark.parametrize("name", READ_HISTORY)
def test_each_position_asks_with_what_was_met_up_to_it(name):
    model, params, state = case(name)
    rows = {"user": np.repeat(USER, LENGTH), "items": np.repeat(PAIRS, LENGTH, 0)}
    got = run(model, params, state, request(rows["items"], user=rows["user"]))
    assert got.logits.shape == (4 * LENGTH, 2)
    cut = np.full((4, LENGTH, LENGTH), ITEMS, np.int32)  # the history of each position, filled up again on the left
    for s in range(4):
        for p in range(LENGTH):
            cut[s, p, LENGTH - 1 - p :] = HISTORY[s, : p + 1]
    alone = run(model, params, state, request(rows["items"], user=rows["user"], history=cut.reshape(-1, LENGTH)))
    if name != "sasrec":  # whose positions count from the end of the history, so that they move
        np.testing.assert_allclose(got.logits, alone.logits, atol=2e-5)
    last = run(model, params, state, request(PAIRS))
    np.testing.assert_allclose(got.logits.reshape(4, LENGTH, 2)[:, -1], last.logits, atol=2e-5)


@pytest.mark.parametrize("name", READ_HISTORY)
def test_filling_changes_nothing(name):
    """A history without its filling gives what the filled one gives: no more than zeros are added."""
    model, params, state = case(name)
    full = run(model, params, state, request(PAIRS)).logits
    short = run(model, params, state, request(PAIRS[2:3], user=USER[2:3], history=HISTORY[2:3, 2:])).logits
    np.testing.assert_allclose(short, full[2:3], atol=2e-5)
    other = HISTORY.copy()
    other[2, 2] = 9
    assert np.abs(run(model, params, state, request(PAIRS, history=other)).logits - full)[2].max() > 1e-4


def test_equal_networks_share_their_functions():
    for name in NAMES:
        assert network(name, **FIELDS).apply is network(name, **FIELDS).apply
        assert network(name, **FIELDS) is network(name, **FIELDS)
        assert network(name, dim=7) is not network(name, dim=8)


@pytest.mark.parametrize("name", NAMES)
def test_refuses_data_without_users_and_items(name):
    message = f"teacher={name}: needs data of users and items, such as data=citeulike; this data has none"
    with pytest.raises(UsageError) as error:
        network(name, schema=Schema(), side=None, group="teacher")
    assert str(error.value) == message


@pytest.mark.parametrize("name", ["cdae", "gru4rec", "sasrec"])
def test_refuses_requests_without_history(name):
    with pytest.raises(UsageError, match=f"student={name}: reads the items .* data.history is 0; set data.history=50"):
        network(name, schema=Schema(users=3, items=4))


def test_refuses_a_batch_that_is_neither_one_a_history_nor_all():
    model, params, state = case("sasrec")
    with pytest.raises(UsageError, match=r"3 users and histories of shape \(4, 5\)"):
        jax.eval_shape(model.apply, params, state, request(PAIRS[:3], user=USER[:3]))


BAD = [
    ("bpr", {"dim": 0}, "student.dim must be a positive integer, got 0"),
    ("bpr", {"init_std": -1.0}, "student.init_std must be positive, got -1.0"),
    ("neumf", {"layers": 0}, "student.layers must be a positive integer, got 0"),
    ("lightgcn", {"layers": 0}, "student.layers must be a positive integer, got 0"),
    ("lightgcn", {"side": None}, "student=lightgcn: propagates over the training pairs"),
    ("cdae", {"activation": "sigmoidal"}, "student.activation must be one of .* did you mean 'sigmoid'"),
    ("cdae", {"pooling": "max"}, "student.pooling must be one of sum, mean, got 'max'"),
    ("sasrec", {"dim": 10, "heads": 3}, "student.heads must divide dim=10, got 3"),
    ("sasrec", {"dropout": 1.0}, "student.dropout must be at least 0 and below 1"),
    ("gru4rec", {"layers": 0}, "student.layers must be a positive integer, got 0"),
    ("two_tower", {"temperature": 0.0}, "student.temperature must be positive, got 0.0"),
    ("two_tower", {"ids": False, "side": None}, "student.ids must be true where the data have no item features"),
]


@pytest.mark.parametrize(("name", "fields", "message"), BAD)
def test_refuses(name, fields, message):
    with pytest.raises(UsageError, match=message):
        network(name, **fields)


def test_schema_is_part_of_the_network():
    assert network("bpr", schema=SCHEMA) is not network("bpr", schema=Schema(users=USERS, items=ITEMS + 1))
