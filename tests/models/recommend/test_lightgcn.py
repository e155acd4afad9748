"""Propagation over the graph against a dense adjacency matrix; the graph as state."""

import jax
import jax.numpy as jnp
import numpy as np

from jdistill.data.base import Side
from jdistill.models.recommend.lightgcn import adjacency, propagate
from tests.models.recommend.shop import EDGES, ITEMS, SIDE, USERS, network, request, run, started


def dense(edges):
    """D^-1/2 A D^-1/2 of the graph of all users and items; rows without neighbours are 0."""
    a = np.zeros((USERS + ITEMS, USERS + ITEMS))
    for user, item in edges:
        a[user, USERS + item] = a[USERS + item, user] = 1
    degree = a.sum(1)
    root = np.array([d**-0.5 if d else 0.0 for d in degree])
    return root[:, None] * a * root[None]


def means(embeddings, a, layers):
    total = layer = embeddings
    for _ in range(layers):
        layer = a @ layer
        total = total + layer
    return total / (layers + 1)


def test_propagation_and_gradient_equal_the_dense_form():
    rng = np.random.default_rng(1)
    e, weight = rng.normal(size=(2, USERS + ITEMS, 4)).astype(np.float32)
    a, graph = dense(EDGES), {name: jnp.asarray(array) for name, array in adjacency(EDGES, USERS, ITEMS).items()}
    for layers in (1, 3):

        def objective(user, item, layers=layers):
            out = jnp.concatenate(propagate(graph, user, item, layers))
            return jnp.sum(jnp.sin(out) * weight), out

        gradients, out = jax.jit(jax.grad(objective, (0, 1), has_aux=True))(e[:USERS], e[USERS:])
        expected = means(e, a, layers)
        np.testing.assert_allclose(out, expected, atol=1e-6)
        back = means(np.cos(expected) * weight, a, layers)  # the matrix is symmetric
        np.testing.assert_allclose(np.concatenate(gradients), back, atol=1e-5)


def test_adjacency_counts_a_pair_once_in_any_order():
    shuffled = np.random.default_rng(0).permutation(EDGES)
    a, b = adjacency(EDGES, USERS, ITEMS), adjacency(shuffled, USERS, ITEMS)
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])
        assert a[name].dtype == np.int32
    for user in range(USERS):
        assert sorted(EDGES[EDGES[:, 0] == user, 1]) == list(a["item"][a["user_start"][user] : a["user_start"][user + 1]])


def test_logits():
    model = network("lightgcn", dim=6, layers=2)
    params, state = started(model, scale=1.0)
    out = means(np.concatenate([params["user"], params["item"]]), dense(EDGES), 2)
    got = run(model, params, state, request())
    np.testing.assert_allclose(got.logits, out[request()["user"]] @ out[USERS:].T, atol=1e-5)


def test_graphs_of_one_size_share_programs_but_not_their_state():
    other = Side(np.unique((EDGES + np.array([1, 0])) % [USERS, ITEMS], axis=0).astype(np.int32))
    assert len(other.edges) == len(EDGES)
    one, two = network("lightgcn"), network("lightgcn", side=other)
    assert one is not two and one.apply is two.apply
    assert network("lightgcn", side=SIDE) is one
    (params, state), (same, moved) = started(one), started(two)
    jax.tree.map(np.testing.assert_array_equal, params, same)
    assert set(state) == set(moved) == {"graph"}
    assert np.any(state["graph"]["user"] != moved["graph"]["user"])
    assert np.any(run(one, params, state, request()).logits != run(two, params, moved, request()).logits)


def test_initial_values_may_be_abstract():
    model = network("lightgcn")
    abstract = jax.eval_shape(lambda: model.init(jax.random.key(0), request()))
    assert jax.tree.map(lambda leaf: leaf.shape, abstract) == jax.tree.map(lambda leaf: leaf.shape, started(model))
