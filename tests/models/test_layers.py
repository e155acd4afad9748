"""Layers against NumPy formulas and PyTorch's documented initialisation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from jdistill.models import ResNet, WideResNet
from jdistill.models.layers import BatchNorm, conv, linear, max_pool, shuffle
from jdistill.models.shufflenet import GroupedBlock


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("shape", [(6, 3), (4, 5, 5, 3)])
def test_batch_norm_against_numpy(shape):
    """Two training steps, then eval: biased variance normalises, unbiased variance is stored with weight 0.1."""
    layer = BatchNorm()
    x1, x2 = 3 + 2 * normal(0, *shape), normal(1, *shape) - 1
    variables = layer.init(jax.random.key(0), x1, False)
    scale, bias = np.array([0.5, 1.0, 2.0], np.float32), np.array([1.0, 0.0, -1.0], np.float32)
    params, stats = {"scale": jnp.asarray(scale), "bias": jnp.asarray(bias)}, variables["batch_stats"]

    mean, var = np.zeros(3), np.ones(3)
    for x in (x1, x2):
        y, new = layer.apply({"params": params, "batch_stats": stats}, x, True, mutable=["batch_stats"])
        stats = new["batch_stats"]
        rows = x.reshape(-1, 3)
        expected = (x - rows.mean(0)) / np.sqrt(rows.var(0) + 1e-5) * scale + bias
        np.testing.assert_allclose(y, expected, atol=1e-5)
        mean, var = 0.9 * mean + 0.1 * rows.mean(0), 0.9 * var + 0.1 * rows.var(0, ddof=1)
        np.testing.assert_allclose(stats["mean"], mean, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(stats["var"], var, rtol=1e-5)

    y = layer.apply({"params": params, "batch_stats": stats}, x1, False)
    np.testing.assert_allclose(y, (x1 - mean) / np.sqrt(var + 1e-5) * scale + bias, atol=1e-5)


def test_batch_norm_of_a_large_mean_and_of_one_row():
    """E[x^2] - E[x]^2 would lose all digits of the variance here; one row has no unbiased variance."""
    layer = BatchNorm()
    x = 1000 + 0.1 * normal(0, 64, 2)
    variables = layer.init(jax.random.key(0), x, False)
    _, new = layer.apply(variables, x, True, mutable=["batch_stats"])
    expected = 0.9 + 0.1 * x.astype(np.float64).var(0, ddof=1)
    np.testing.assert_allclose(new["batch_stats"]["var"], expected, rtol=1e-5)
    y, new = layer.apply(variables, x[:1], True, mutable=["batch_stats"])
    assert np.isfinite(y).all() and np.isfinite(new["batch_stats"]["var"]).all()


class Layers(nn.Module):
    """Conv and linear as the networks use them."""

    stride: int = 1
    groups: int = 1
    kernel: int = 3

    @nn.compact
    def __call__(self, x):
        x = conv(x, 4, self.kernel, stride=self.stride, groups=self.groups, bias=True, name="conv")
        return x, linear(x.reshape(x.shape[0], -1), 5, name="fc")


@pytest.mark.parametrize(
    ("kernel", "stride", "groups", "size"),
    [(1, 1, 1, 6), (1, 2, 1, 6), (1, 1, 2, 6), (3, 1, 1, 6), (3, 2, 1, 6), (3, 2, 1, 7), (3, 2, 2, 6), (5, 1, 1, 7)],
)
def test_convolution_against_numpy(kernel, stride, groups, size):
    x = normal(0, 2, size, size, 4)
    net = Layers(stride=stride, groups=groups, kernel=kernel)
    variables = net.init(jax.random.key(0), x)
    weights = np.asarray(variables["params"]["conv"]["kernel"])
    bias = np.asarray(variables["params"]["conv"]["bias"]) + 0.5
    variables["params"]["conv"]["bias"] = jnp.asarray(bias)
    out = net.apply(variables, x)[0]

    pad = kernel // 2
    padded = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    steps = range(0, size + 2 * pad - kernel + 1, stride)
    inputs, outputs = 4 // groups, 4 // groups
    expected = np.zeros((2, len(steps), len(steps), 4))
    for r, row in enumerate(steps):
        for c, column in enumerate(steps):
            patch = padded[:, row : row + kernel, column : column + kernel]
            for g in range(groups):
                part = patch[..., g * inputs : (g + 1) * inputs]
                chosen = weights[..., g * outputs : (g + 1) * outputs]
                expected[:, r, c, g * outputs : (g + 1) * outputs] = np.einsum("bhwi,hwio->bo", part, chosen)
    np.testing.assert_allclose(out, expected + bias, atol=1e-5)


def test_shuffle_and_pool():
    x = jnp.arange(6.0).reshape(1, 6)
    np.testing.assert_array_equal(shuffle(x, 2), [[0, 3, 1, 4, 2, 5]])
    np.testing.assert_array_equal(shuffle(x, 3), [[0, 2, 4, 1, 3, 5]])
    image = jnp.arange(9.0).reshape(1, 3, 3, 1)
    np.testing.assert_array_equal(max_pool(image), [[[[4.0]]]])


def kernels(net):
    """Convolution kernels by path, and the last linear layer."""
    key = jax.random.key(0, impl="rbg")  # compiles in half the time
    variables = jax.jit(lambda key: net.init(key, jnp.zeros((1, 8, 8, 3))))(key)
    leaves = jax.tree_util.tree_flatten_with_path(variables["params"])[0]
    found = {"/".join(k.key for k in path): np.asarray(leaf) for path, leaf in leaves}
    convolutions = {path: leaf for path, leaf in found.items() if leaf.ndim == 4}
    return convolutions, found["fc/kernel"], found["fc/bias"]


@pytest.mark.parametrize("net", [ResNet(outputs=100, depth=8, widths=(32, 64, 128, 256)), WideResNet(100, 10, 4)])
def test_kaiming_normal_by_fan_out(net):
    """std = sqrt(2 / (k k out)), to 4 standard errors of a sample standard deviation; normal tails, mean 0."""
    convolutions, weights, bias = kernels(net)
    assert len(convolutions) >= 7
    for path, kernel in convolutions.items():
        expected = np.sqrt(2 / (kernel.shape[0] * kernel.shape[1] * kernel.shape[3]))
        error = 4 / np.sqrt(2 * kernel.size)
        assert abs(kernel.std() / expected - 1) < error, path
        assert abs(kernel.mean()) < 4 * expected / np.sqrt(kernel.size), path
        if kernel.size > 10_000:
            assert np.abs(kernel).max() > 3 * expected, f"{path}: truncated"
    bound = 1 / np.sqrt(weights.shape[0])
    assert 0.99 * bound < np.abs(weights).max() <= bound
    assert np.all(bias == 0) if isinstance(net, WideResNet) else 0.8 * bound < np.abs(bias).max() <= bound


def test_uniform_by_fan_in():
    """ShuffleNets keep PyTorch's default: uniform in +-1/sqrt(fan_in), groups counted; so do linear layers."""
    block = GroupedBlock(width=96, stride=1, groups=3)
    params = jax.jit(block.init, static_argnums=2)(jax.random.key(0), jnp.zeros((1, 4, 4, 96)), False)["params"]
    found = {name: np.asarray(params[name]["kernel"]) for name in ("conv1", "conv2", "conv3")}
    assert [kernel.shape for kernel in found.values()] == [(1, 1, 32, 24), (3, 3, 1, 24), (1, 1, 8, 96)]
    params = Layers().init(jax.random.key(0), jnp.zeros((1, 8, 8, 4)))["params"]["fc"]
    fans = [(kernel, np.prod(kernel.shape[:3])) for kernel in found.values()]
    for values, fan in [*fans, (np.asarray(params["kernel"]), 256)]:
        bound = 1 / np.sqrt(fan)
        assert 0.9 * bound < np.abs(values).max() <= bound * (1 + 1e-6)
        assert abs(values.std() / (bound / np.sqrt(3)) - 1) < 4 / np.sqrt(2 * values.size)
    assert 0 < np.abs(params["bias"]).max() <= 1 / 16
