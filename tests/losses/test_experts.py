"""The mixture of experts: the sorted forms equal the full one in value and gradient, whichever experts the rows choose."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdistill.losses import _experts

N, D_S, D_T, M, H = 300, 3, 5, 12, 4
random = np.random.RandomState(0)
S, T = random.randn(N, D_S), random.randn(N, D_T)


def in_loops(params, z):
    made = np.zeros((N, D_T))
    for m in range(M):
        hidden = np.maximum(S @ params["in_kernel"][m] + params["in_bias"][m], 0)
        made += z[:, m : m + 1] * (hidden @ params["out_kernel"][m] + params["out_bias"][m])
    return made


def cost(form, params, s, z):
    return jnp.sum(jnp.sin(form(params, s, z)))


@pytest.mark.parametrize("lean", [pytest.param(0, marks=pytest.mark.slow), 3, 50])  # the third sends every row to one expert
@pytest.mark.parametrize(
    ("temperature", "count"), [(1.0, M), (3e-3, 4), (1e-4, 2), pytest.param(1e-10, 2, marks=pytest.mark.slow)]
)
def test_every_form_is_the_sum_over_all_experts(temperature, count, lean):
    with jax.enable_x64(True):
        params = _experts.init_experts(jax.random.key(1), jnp.asarray(S), jnp.asarray(T), M, H)
        params["selection"]["bias"] += lean * (jnp.arange(M) == 7)
        z = _experts.draw(params, jax.random.key(2), jnp.asarray(T), temperature)
        expected = in_loops(jax.tree.map(np.asarray, params), np.asarray(z))

        def chosen(params, s, z):
            return _experts.mixture(params, s, z, temperature)

        def few(params, s, z):
            return _experts.few_experts({k: v for k, v in params.items() if k != "selection"}, s, z, count)

        forms = [chosen] if count == M else [chosen, few]
        values, gradients = [], []
        for form in forms:
            values.append(jax.jit(form)(params, S, z))
            gradients.append(jax.jit(jax.grad(cost, argnums=(1, 2, 3)), static_argnums=0)(form, params, S, z))
        if count == M:  # the plain form, differentiated by JAX
            everything = {k: v for k, v in params.items() if k != "selection"}
            gradients.append(jax.grad(cost, argnums=(1, 2, 3))(lambda p, s, z: plain(p, s, z), everything, S, z))
    left_out = 0 if count == M else np.sort(np.asarray(z), axis=1)[:, -count - 1].max()
    for value in values:
        np.testing.assert_allclose(value, expected, rtol=1e-10, atol=1e-12 + 100 * left_out)
    for name in ("in_kernel", "in_bias", "out_kernel", "out_bias"):
        first, last = gradients[0][0][name], gradients[-1][0][name]
        np.testing.assert_allclose(first, last, rtol=1e-9, atol=1e-11 + 1000 * left_out)
    np.testing.assert_allclose(gradients[0][1], gradients[-1][1], rtol=1e-9, atol=1e-11 + 1000 * left_out)


def plain(params, s, z):
    hidden = jax.nn.relu(jnp.einsum("nd,mdh->nmh", s, params["in_kernel"]) + params["in_bias"])
    return jnp.einsum("nm,nmd->nd", z, jnp.einsum("nmh,mhd->nmd", hidden, params["out_kernel"]) + params["out_bias"])


def test_the_number_of_experts_follows_the_rows_not_the_temperature_alone():
    """A row with three equal weights keeps the full form at any temperature, and values stay those of the sum."""
    with jax.enable_x64(True):
        params = _experts.init_experts(jax.random.key(1), jnp.asarray(S), jnp.asarray(T), M, H)
        z = np.eye(M)[random.randint(M, size=N)]
        for equal in (1, 3, 6):
            z[5] = np.arange(M) < equal
            z[5] /= z[5].sum()
            found = jax.jit(_experts.mixture)(params, S, z, 1e-10)
            np.testing.assert_allclose(found, in_loops(jax.tree.map(np.asarray, params), z), rtol=1e-10, atol=1e-12)


def test_a_population_gives_each_member_its_own():
    with jax.enable_x64(True):
        keys = jax.random.split(jax.random.key(3), 2)
        params = jax.vmap(lambda key: _experts.init_experts(key, jnp.asarray(S), jnp.asarray(T), M, H))(keys)
        temperature = jnp.asarray([1.0, 1e-10])
        z = jax.vmap(lambda p, t: _experts.draw(p, jax.random.key(2), jnp.asarray(T), t))(params, temperature)
        found = jax.jit(jax.vmap(_experts.mixture, in_axes=(0, None, 0, 0)))(params, jnp.asarray(S), z, temperature)
        for i in range(2):
            one = in_loops(jax.tree.map(lambda x, i=i: np.asarray(x[i]), params), np.asarray(z[i]))
            np.testing.assert_allclose(found[i], one, rtol=1e-10, atol=1e-12)
