"""Scores of each row's own candidates: the vectors of some rows at a time, or of all."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdistill.models.recommend import _scores

ROWS, CANDIDATES, DIM, ITEMS = 41, 6, 4, 20


@pytest.fixture(params=[1, 3 * CANDIDATES * DIM, 1 << 18], ids=["one row", "three rows, two left", "all rows"])
def block(request, monkeypatch):
    monkeypatch.setattr(_scores, "BLOCK", request.param)


@pytest.fixture
def given(rng):
    user, table = rng.normal(size=(ROWS, DIM)).astype(np.float32), rng.normal(size=(ITEMS, DIM)).astype(np.float32)
    return user, table, rng.integers(0, ITEMS, (ROWS, CANDIDATES), np.int32), rng.normal(size=ITEMS).astype(np.float32)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def expected(user, table, items, bias):
    return np.array([[user[b] @ table[i] + bias[i] for i in row] for b, row in enumerate(items)])


def logits(user, table, items, bias):
    return _scores.score(jnp.asarray(user), jnp.asarray(table), jnp.asarray(items), jnp.asarray(bias))[0]


@pytest.mark.usefixtures("block")
def test_each_row_has_its_own_candidates(given):
    for compiled in (logits, jax.jit(lambda *given: logits(*given))):
        np.testing.assert_allclose(compiled(*given), expected(*given), rtol=0, atol=1e-5)


@pytest.mark.usefixtures("block")
def test_a_population_is_its_members(given, rng):
    user, _, items, bias = given
    several = rng.normal(size=(3, ITEMS, DIM)).astype(np.float32)
    found = jax.vmap(lambda table: logits(user, table, items, bias))(several)
    for one, own in zip(found, several, strict=True):
        np.testing.assert_allclose(one, expected(user, own, items, bias), rtol=0, atol=1e-5)


@pytest.mark.usefixtures("block")
def test_derivatives_in_both_directions(given, rng):
    """Linear in the users, in the items and in the bias: a NumPy form of each."""
    user, table, items, bias = given
    weight = rng.normal(size=items.shape).astype(np.float32)
    d_user, d_table, d_bias = jax.grad(lambda u, t, b: (weight * logits(u, t, items, b)).sum(), argnums=(0, 1, 2))(
        user, table, bias
    )
    want_table, want_bias = np.zeros_like(table), np.zeros_like(bias)
    for row in range(ROWS):
        for column, item in enumerate(items[row]):
            want_table[item] += weight[row, column] * user[row]
            want_bias[item] += weight[row, column]
    np.testing.assert_allclose(d_user, np.einsum("bk,bkd->bd", weight, table[items]), atol=1e-5)
    np.testing.assert_allclose(d_table, want_table, atol=1e-5)
    np.testing.assert_allclose(d_bias, want_bias, atol=1e-5)
    along = rng.normal(size=user.shape).astype(np.float32)
    _, forward = jax.jvp(lambda u: logits(u, table, items, bias), (user,), (along,))
    np.testing.assert_allclose(forward, expected(along, table, items, np.zeros_like(bias)), rtol=0, atol=1e-5)
