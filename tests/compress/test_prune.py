"""Masks against NumPy, and against torch.nn.utils.prune's rule."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdistill.compress import MagnitudePrune, apply_all
from jdistill.compress.artifact import count_nonzero
from jdistill.errors import UsageError
from jdistill.pytrees import as_leaves
from jdistill.registry import build

RANDOM = np.random.default_rng(0)
PARAMS = {
    "fc1": {"kernel": RANDOM.normal(size=(7, 9)).astype(np.float32), "bias": np.full(9, 0.01, np.float32)},
    "conv": {"kernel": (3 * RANDOM.normal(size=(3, 3, 2, 4))).astype(np.float32)},
    "norm": {"scale": np.zeros(4, np.float32), "kernel": np.zeros(5, np.float32)},
    "items": {"embedding": (0.1 * RANDOM.normal(size=(11, 3))).astype(np.float32)},
}
WEIGHTS = (("fc1", "kernel"), ("conv", "kernel"), ("items", "embedding"))


def smallest(values, sparsity):
    """A mask without the `round(sparsity n)` smallest magnitudes, the earlier of equal ones first."""
    flat = np.abs(values).ravel()
    mask = np.ones(flat.size)
    mask[sorted(range(flat.size), key=lambda i: (flat[i], i))[: round(sparsity * flat.size)]] = 0
    return mask.reshape(np.shape(values))


def masks(params=PARAMS, **options):
    return jax.jit(MagnitudePrune.init)(as_leaves(MagnitudePrune(**options)), params)


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.73, 0.99])
def test_layer_masks(sparsity):
    found = masks(sparsity=sparsity)
    for module, name in WEIGHTS:
        np.testing.assert_array_equal(found[module][name], smallest(PARAMS[module][name], sparsity))
    rest = (found["fc1"]["bias"], found["norm"]["scale"], found["norm"]["kernel"])
    assert all(np.all(np.asarray(mask) == 1) for mask in rest)


@pytest.mark.parametrize("sparsity", [0.0, 0.25, 0.5, 0.9])
def test_global_masks_have_one_threshold(sparsity):
    found = masks(sparsity=sparsity, scope="global")
    everything = np.concatenate([PARAMS[m][n].ravel() for m, n in WEIGHTS])
    kept = np.concatenate([np.asarray(found[m][n]).ravel() for m, n in WEIGHTS])
    assert (kept == 0).sum() == round(sparsity * everything.size)
    if sparsity:
        assert np.abs(everything[kept == 0]).max() < np.abs(everything[kept == 1]).min()
    assert np.all(np.asarray(found["norm"]["scale"]) == 1) and np.all(np.asarray(found["fc1"]["bias"]) == 1)


def test_equal_magnitudes_go_in_order():
    kernel = np.array([[2, -1, 1, 1], [-1, 1, 2, -1]], np.float32)
    found = masks({"kernel": kernel}, sparsity=0.5)["kernel"]
    np.testing.assert_array_equal(found, [[1, 0, 0, 0], [0, 1, 1, 1]])
    both = masks({"a": {"kernel": kernel[:1]}, "b": {"kernel": kernel[1:]}}, sparsity=0.5, scope="global")
    np.testing.assert_array_equal(np.concatenate([both["a"]["kernel"], both["b"]["kernel"]]), found)


def test_the_number_pruned_is_torchs():
    """`_compute_nparams_toprune` is Python's round(amount * n), ties to even; the float32 amount may decide a tie."""
    count = jax.jit(lambda own, kernel: jnp.sum(own.init({"kernel": kernel})["kernel"] == 0))
    for n in (1, 2, 3, 5, 6, 10, 14, 25, 30):
        for percent in range(0, 100, 5):
            wanted = percent * n / 100
            found = int(count(as_leaves(MagnitudePrune(sparsity=percent / 100)), jnp.arange(1.0, n + 1)[None]))
            tie = percent * n % 100 == 50
            assert found == round(wanted) if not tie or percent == 50 else abs(found - wanted) == 0.5, (n, percent)


def test_effective_parameters_and_gradients_are_masked():
    own, state = MagnitudePrune(sparsity=0.6), masks(sparsity=0.6)
    effective = apply_all((own,), PARAMS, (state,))
    jax.tree.map(lambda leaf, p, mask: np.testing.assert_array_equal(leaf, p * mask), effective, PARAMS, state)
    grads = jax.grad(lambda p: sum(leaf.sum() for leaf in jax.tree.leaves(own.apply(p, state))))(PARAMS)
    jax.tree.map(np.testing.assert_array_equal, grads, state)
    total, nonzero = count_nonzero({m: {n: effective[m][n]} for m, n in WEIGHTS})
    assert (total, nonzero) == (63 + 72 + 33, sum(n - round(0.6 * n) for n in (63, 72, 33)))
    assert count_nonzero(jax.tree.map(np.asarray, PARAMS)) == (63 + 9 + 72 + 4 + 5 + 33, 63 + 9 + 72 + 33)


def test_options():
    assert build("compression", {"name": "prune"}).steps() == (MagnitudePrune(sparsity=0.5, scope="layer", recover_epochs=5),)
    assert MagnitudePrune(recover_epochs=0).recover_epochs == 0 and MagnitudePrune().recover_epochs == 5
    assert build("compression", {"name": "none"}).steps() == () and apply_all((), PARAMS, ()) is PARAMS
    for key, value in (("sparsity", 1.0), ("sparsity", -0.1), ("scope", "globl"), ("recover_epochs", -1)):
        with pytest.raises(UsageError, match=rf"^compression\.{key} must be"):
            build("compression", {"name": "prune", key: value})
