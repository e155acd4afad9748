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
@pytest.mark.parametrize("temperature", [1.0, 0.03, 1e-4, pytest.param(1e-10, marks=pytest.mark.slow)])
def test_every_form_is_the_sum_over_all_experts(temperature, lean):
    with jax.enable_x64(True):
        params = _experts.init_experts(jax.random.key(1), jnp.asarray(S), jnp.asarray(T), M, H)
        params["selection"]["bias"] += lean * (jnp.arange(M) == 7)
        z = _experts.draw(params, jax.random.key(2), jnp.asarray(T), temperature)
        experts = {k: v for k, v in params.items() if k != "selection"}
        expected = in_loops(jax.tree.map(np.asarray, params), np.asarray(z))
        heavy = z > 1e-16 * min(temperature, 1)
        size = int(heavy.sum()) + 5
        forms = (
            lambda params, s, z: _experts.mixture(params, s, z, temperature),
            lambda params, s, z: _experts.heavy_experts(params, s, z, heavy, size),
            plain,  # differentiated by JAX
        )
        values, gradients = [], []
        for form in forms:
            values.append(jax.jit(form)(experts, S, z))
            gradients.append(jax.jit(jax.grad(cost, argnums=(1, 2, 3)), static_argnums=0)(form, experts, S, z))
    kept = np.asarray(z) > 1e-14 * min(temperature, 1)  # by each of the forms
    for value in values:
        np.testing.assert_allclose(value, expected, rtol=1e-10, atol=1e-12)
    for of_params, of_s, of_z in gradients[:2]:
        for name, one in of_params.items():
            np.testing.assert_allclose(one, gradients[-1][0][name], rtol=1e-9, atol=1e-11)
        np.testing.assert_allclose(of_s, gradients[-1][1], rtol=1e-9, atol=1e-11)
        np.testing.assert_allclose(np.where(kept, of_z, 0), np.where(kept, gradients[-1][2], 0), rtol=1e-9, atol=1e-11)


def plain(params, s, z):
    hidden = jax.nn.relu(jnp.einsum("nd,mdh->nmh", s, params["in_kernel"]) + params["in_bias"])
    return jnp.einsum("nm,nmd->nd", z, jnp.einsum("nmh,mhd->nmd", hidden, params["out_kernel"]) + params["out_bias"])


def test_few_pairs_are_sorted_whatever_the_temperature(monkeypatch):
    """Not each row by itself: one of twelve equal weights leaves the others their form, and values stay those of the sum."""
    full = _experts.all_experts
    monkeypatch.setattr(_experts, "all_experts", lambda *given: full(*given) + 1)  # to see which form it was
    with jax.enable_x64(True):
        params = _experts.init_experts(jax.random.key(1), jnp.asarray(S), jnp.asarray(T), M, H)
        z = np.eye(M)[random.randint(M, size=N)]
        for equal, rows in ((1, N), (3, 30), (M, 3), (M, 120)):
            z[:rows] = (np.arange(M) < equal) / equal
            found = jax.jit(_experts.mixture)(params, S, z, 1e-10)
            expected = in_loops(jax.tree.map(np.asarray, params), z) + ((z > 0).sum() > 4 * N)
            np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)
        assert (z > 0).sum() > 4 * N


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
