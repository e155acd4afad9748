"""Cosines within groups: the form by blocks and that by all pairs, beside NumPy and a derivative that JAX makes itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdistill.losses import _groups

FORMS = {"by_blocks": _groups.by_blocks, "all_pairs": _groups.all_pairs}
every_form = pytest.mark.parametrize("form", FORMS)


def rows(count: int, groups: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Directions of 3 and 5 numbers, every seventh row 0, and groups of unlike sizes, the last of them empty."""
    random = np.random.default_rng(seed)
    s, t = (random.normal(size=(count, width)) for width in (3, 5))
    s, t = (x / np.linalg.norm(x, axis=1, keepdims=True) * (np.arange(count) % 7 > 0)[:, None] for x in (s, t))
    return s, t, (random.random(count) ** 2 * groups).astype(np.int32)


def expected(s, t, group):
    """The sum in loops over groups, and its derivative by s."""
    total, gradient = 0.0, np.zeros_like(s)
    for one in np.unique(group):
        some = group == one
        cosines = t[some] @ t[some].T
        apart = (s[some] @ s[some].T - cosines) * (cosines > 0)
        total += (apart**2).sum()
        gradient[some] = 2 * (apart + apart.T) @ s[some]
    return total, gradient


@every_form
@pytest.mark.parametrize(("count", "groups"), [(1, 1), (50, 3), (128, 1), (700, 5), (700, 300)])
def test_the_sum_and_its_derivative(form, count, groups):
    given = rows(count, groups)
    with jax.enable_x64(True):
        found = jax.jit(FORMS[form])(*map(jnp.asarray, given))
    for value, wanted in zip(found, expected(*given), strict=True):
        np.testing.assert_allclose(value, wanted, rtol=1e-10, atol=1e-10)


@every_form
def test_the_derivative_is_that_of_the_sum(form):
    s, t, group = (jnp.asarray(x, x.dtype if x.dtype == np.int32 else np.float32) for x in rows(300, 4))

    def plain(s):
        cosines = t @ t.T
        return jnp.where((group[:, None] == group) & (cosines > 0), (s @ s.T - cosines) ** 2, 0).sum()

    value, gradient = jax.jit(FORMS[form])(s, t, group)
    wanted, derivative = jax.jit(jax.value_and_grad(plain))(s)
    assert value.dtype == gradient.dtype == np.float32 and float(value) == pytest.approx(float(wanted), rel=1e-5)
    np.testing.assert_allclose(gradient, derivative, rtol=1e-4, atol=1e-4)


def test_groups_of_members_of_a_population_differ():
    """The blocks that a block meets are other ones in each member."""
    given = [jnp.stack(x) for x in zip(*(map(jnp.asarray, rows(300, groups, groups)) for groups in (2, 40)), strict=True)]
    found = jax.jit(jax.vmap(jax.value_and_grad(_groups.within_groups)))(*given)
    for member in range(2):
        alone = jax.value_and_grad(_groups.within_groups)(*(x[member] for x in given))
        for value, wanted in zip(found, alone, strict=True):
            np.testing.assert_allclose(value[member], wanted, rtol=1e-5, atol=1e-5)


def test_no_gradient_reaches_the_teacher():
    s, t, group = map(jnp.asarray, rows(50, 3))
    of_s, of_t = jax.grad(lambda s, t: 3 * _groups.within_groups(s, t, group), argnums=(0, 1))(s, t)
    np.testing.assert_allclose(of_s, 3 * _groups.all_pairs(s, t, group)[1], rtol=1e-4, atol=1e-4)
    assert not np.any(of_t)
