"""Every registered network: parameter counts, features, values against PyTorch, refused fields."""

import functools
import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdistill.errors import UsageError
from jdistill.models import MLP
from jdistill.models.resnet import DeepResNet
from jdistill.models.wrn import WideBlock
from jdistill.registry import build, options
from tests.marks import slow_but

# `sum(p.numel() for p in net.parameters())` in PyTorch 2.13.0, 100 classes, 32x32x3 images, over a transcription of
# RepDistiller's models/*.py (commit eedab9d; mobilenetv2.py at b13aecc). Those of three-stage ResNets and of wide
# ResNets are checked again by closed form below.
COUNTS = {
    "resnet8": 83_892,
    "resnet14": 181_108,
    "resnet20": 278_324,
    "resnet32": 472_756,
    "resnet44": 667_188,
    "resnet56": 861_620,
    "resnet110": 1_736_564,
    "resnet8x4": 1_233_540,
    "resnet32x4": 7_433_860,
    "resnet18": 11_220_132,
    "resnet34": 21_328_292,
    "resnet50": 23_705_252,
    "wrn": 703_284,  # as a student: depth 16, widen 2
    "wrn_16_1": 180_916,
    "wrn_16_2": 703_284,
    "wrn_40_1": 569_780,
    "wrn_40_2": 2_255_156,
    "vgg8": 3_965_028,
    "vgg11": 9_277_284,
    "vgg13": 9_462_180,
    "vgg16": 14_774_436,
    "vgg19": 20_086_692,
    "mobilenetv2": 812_836,
    "shufflenetv1": 949_258,
    "shufflenetv2": 1_355_528,
    "lenet": 144_536,  # 456 + 2,416 (convolutions) + 1,024*120+120 + 120*84+84 + 84*100+100
    "mlp": 101_636,  # as a student: 3,072*32+32 + 32*100+100
}

NAMES = sorted(COUNTS)  # the networks for images


def network(name, group="student", outputs=100, **fields):
    """The option as the command line builds it: the option's own defaults, then `fields`."""
    defaults = {key: default for key, (_, default) in options(group)[name].fields.items()}
    return build(group, {"name": name, **defaults, **fields}, outputs=outputs)


@functools.cache
def shapes(name, size=32, channels=3, outputs=100):
    """Logits, features and variables for a batch of 2, as shapes only: nothing is computed."""
    inputs = jnp.zeros((2, size, size, channels))
    net = network(name, outputs=outputs)
    (logits, features), variables = jax.eval_shape(lambda: net.init_with_output(jax.random.key(0), inputs))
    return logits, features, variables


def count(tree):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def test_every_option_is_counted_and_in_both_groups():
    others = {
        name for name, option in options("student").items()
        if {"schema", "side"} & set(inspect.signature(option.target).parameters) or name.startswith("ltr_")
    } | {"tree", "gbt"}  # fmt: skip
    assert set(COUNTS) == set(options("student")) - others
    assert set(COUNTS) == set(options("teacher")) - {"none", "logits"} - others


@pytest.mark.parametrize("name", NAMES)
def test_parameter_count(name):
    assert count(shapes(name)[2]["params"]) == COUNTS[name]


@pytest.mark.parametrize(("depth", "stem", "widen"), [(8, 16, 1), (20, 16, 1), (56, 16, 1), (110, 16, 1), (32, 32, 4)])
def test_resnet_count_in_closed_form(depth, stem, widen):
    blocks, w = (depth - 2) // 6, 16 * widen
    total = 27 * stem + 2 * stem
    for inputs, width in ((stem, w), (w, 2 * w), (2 * w, 4 * w)):
        total += 9 * inputs * width + (2 * blocks - 1) * 9 * width**2 + 2 * blocks * 2 * width
        total += 0 if inputs == width else inputs * width + 2 * width
    assert total + 4 * w * 100 + 100 == COUNTS[f"resnet{depth}" + ("x4" if widen == 4 else "")]


@pytest.mark.parametrize(("depth", "widen"), [(16, 1), (16, 2), (40, 1), (40, 2)])
def test_wide_resnet_count_in_closed_form(depth, widen):
    blocks, w = (depth - 4) // 6, 16 * widen
    total = 27 * 16 + 2 * 4 * w
    for inputs, width in ((16, w), (w, 2 * w), (2 * w, 4 * w)):
        total += 9 * inputs * width + (2 * blocks - 1) * 9 * width**2
        total += 2 * inputs + (2 * blocks - 1) * 2 * width + (0 if inputs == width else inputs * width)
    assert total + 4 * w * 100 + 100 == COUNTS[f"wrn_{depth}_{widen}"]


# name -> (stem, stage1, stage2, ..., embedding); images as (side, channels)
FEATURES = {
    "resnet8": ((32, 16), (32, 16), (16, 32), (8, 64), 64),
    "resnet8x4": ((32, 32), (32, 64), (16, 128), (8, 256), 256),
    "resnet50": ((32, 64), (32, 256), (16, 512), (8, 1024), (4, 2048), 2048),
    "wrn_40_2": ((32, 16), (32, 32), (16, 64), (8, 128), 128),
    "vgg8": ((32, 64), (16, 128), (8, 256), (4, 512), (4, 512), 512),
    "mobilenetv2": ((16, 16), (16, 12), (8, 16), (4, 48), (2, 160), 1280),
    "shufflenetv1": ((32, 24), (16, 240), (8, 480), (4, 960), 960),
    "shufflenetv2": ((32, 24), (16, 116), (8, 232), (4, 464), 1024),
}


@pytest.mark.parametrize("name", FEATURES)
def test_feature_names_and_shapes(name):
    stem, *stages, embedding = FEATURES[name]
    expected = {"stem": (2, stem[0], stem[0], stem[1]), "embedding": (2, embedding)}
    for i, (side, channels) in enumerate(stages, 1):
        expected[f"stage{i}"] = expected[f"stage{i}_pre"] = (2, side, side, channels)
    logits, features, _ = shapes(name)
    assert logits.shape == (2, 100)
    assert {key: value.shape for key, value in features.items()} == expected


@pytest.mark.parametrize("name", NAMES)
def test_embedding_is_what_the_last_layer_reads(name):
    _, features, variables = shapes(name)
    assert variables["params"]["fc"]["kernel"].shape == (features["embedding"].shape[1], 100)


@pytest.mark.parametrize(("size", "channels"), [(8, 1), (28, 1), (32, 3), (64, 3)])
@pytest.mark.parametrize("name", ["lenet", "mlp", "resnet8", "wrn_16_1", "vgg8", "shufflenetv1"])
def test_other_image_sizes(name, size, channels):
    logits, features, _ = shapes(name, size, channels, outputs=7)
    assert logits.shape == (2, 7)
    assert all(0 not in value.shape for value in features.values())


def test_lenet_and_mlp_features():
    _, features, variables = shapes("lenet", 28, 1, outputs=10)
    assert {key: value.shape for key, value in features.items()} == {
        "stage1": (2, 28, 28, 6),
        "stage1_pre": (2, 28, 28, 6),
        "stage2": (2, 14, 14, 16),
        "stage2_pre": (2, 14, 14, 16),
        "embedding": (2, 84),
    }
    assert count(variables["params"]) == 156 + 2_416 + 784 * 120 + 120 + 120 * 84 + 84 + 84 * 10 + 10
    teacher = network("mlp", "teacher", outputs=10)
    (_, features), _ = jax.eval_shape(lambda: teacher.init_with_output(jax.random.key(0), jnp.zeros((5, 64))))
    assert {key: value.shape for key, value in features.items()} == {
        "hidden1": (5, 256),
        "hidden1_pre": (5, 256),
        "hidden2": (5, 128),
        "hidden2_pre": (5, 128),
        "embedding": (5, 128),
    }


# Recipe: `draw` below, then eval mode. First three logits of two images and the means of stage1_pre, stage2_pre, ...,
# computed in float64 by PyTorch 2.13.0 from the same transcription of RepDistiller as COUNTS. (Random weights in
# float64 agreed to 1e-13 on all features, and after a training step on all running statistics, for these networks.)
TORCH = {
    "resnet8x4": ([[2.24499, 1.32228, 1.398403], [2.159404, 1.267483, 1.337888]], [-0.054828, -0.135824, -0.083272]),
    "wrn_16_2": ([[-0.807236, 1.600403, -0.074139], [-0.94791, 1.752607, 0.089466]], [-0.088458, -0.124861, -0.12445]),
    "vgg8": (
        [[-0.880089, 1.976683, 0.706073], [-0.817172, 2.025689, 0.73243]],
        [-0.025128, 0.038181, 0.132222, 0.051513],
    ),
    "mobilenetv2": ([[-0.608204, 1.005817, -0.536524], [-0.789209, 0.963516, -0.360421]], []),
    "shufflenetv1": (
        [[-4.577109, 3.922818, -0.956093], [-4.424949, 3.362972, -1.278017]],
        [0.358375, 1.753715, 2.582263],
    ),
    "shufflenetv2": (
        [[0.755754, -0.13058, -0.197929], [0.718697, -0.115846, -0.219576]],
        [0.177068, 0.135622, 0.070599],
    ),
    "bottleneck": (
        [[-0.828965, -0.770188, 0.322013], [-0.830655, -0.752393, 0.408163]],
        [0.00287, -0.031923, 0.01143, -0.019481],
    ),
}


def draw(salt, *shape):
    """NumPy's frozen legacy stream, so that the same numbers can be made next to PyTorch."""
    return np.random.RandomState(math.prod(shape) + salt).standard_normal(shape)


def drawn(path, leaf):
    """Weights by shape alone, drawn in PyTorch's axis order (out, in, height, width)."""
    kind, shape = path[-1].key, leaf.shape
    if kind == "kernel":
        values = draw(0, *shape[:-3:-1], *shape[:-2])
        values = values * np.sqrt(2 / values[0].size)
        values = values.transpose(2, 3, 1, 0) if values.ndim == 4 else values.T
    else:
        values = {
            "bias": lambda: 0.1 * draw(1, *shape),
            "scale": lambda: 1 + 0.1 * draw(2, *shape),
            "mean": lambda: 0.1 * draw(3, *shape),
            "var": lambda: 1 + draw(4, *shape) ** 2,
        }[kind]()
    return jnp.asarray(values, jnp.float32)


@functools.cache
def outputs_of_drawn(name, train=False):
    net = DeepResNet(outputs=100, blocks=(1, 1, 1, 1)) if name == "bottleneck" else network(name)
    inputs = jnp.asarray(draw(5, 2, 32, 32, 3), jnp.float32)
    variables = jax.eval_shape(lambda: net.init(jax.random.key(0), inputs))
    variables = jax.tree_util.tree_map_with_path(drawn, variables)
    if train:
        return jax.jit(lambda v: net.apply(v, inputs, train=True, mutable=["batch_stats"]))(variables)
    return jax.jit(lambda v: net.apply(v, inputs))(variables)


QUICK = ("resnet8x4", "wrn_16_2", "vgg8", "mobilenetv2")
"""Families that compile in seconds."""


@pytest.mark.parametrize("name", slow_but(QUICK, tuple(TORCH)))
def test_values_equal_pytorch(name):
    expected_logits, expected_means = TORCH[name]
    logits, features = outputs_of_drawn(name)
    np.testing.assert_allclose(logits[:, :3], expected_logits, rtol=1e-4, atol=1e-4)
    means = [features[f"stage{i}_pre"].mean() for i, _ in enumerate(expected_means, 1)]
    np.testing.assert_allclose(means, expected_means, rtol=1e-4, atol=1e-4)


def test_training_equals_pytorch():
    """One forward pass in training mode: logits by batch statistics, and the running statistics it leaves."""
    (logits, _), state = outputs_of_drawn("resnet8x4", train=True)
    expected = [[0.836605, 1.351479, 0.119518], [0.773499, 1.567817, 0.00896]]
    np.testing.assert_allclose(logits[:, :3], expected, rtol=1e-4, atol=1e-4)
    running = state["batch_stats"]["layer3_0"]["bn2"]
    np.testing.assert_allclose(running["mean"][:3], [-0.00026661, 0.00496079, 0.01449232], atol=1e-6)
    np.testing.assert_allclose(running["var"][:3], [0.98718331, 0.99997029, 1.60552003], rtol=1e-5)


@pytest.mark.parametrize(
    "name", slow_but(("resnet8x4", "vgg8"), ("resnet8x4", "vgg8", "shufflenetv1", "shufflenetv2", "bottleneck"))
)
def test_stage_is_the_relu_of_its_pre_activation(name):
    _, features = outputs_of_drawn(name)
    stages = [key for key in features if key.startswith("stage") and not key.endswith("_pre")]
    assert len(stages) >= 3
    for stage in stages:
        pre = np.asarray(features[f"{stage}_pre"])
        assert (pre < 0).any()
        np.testing.assert_array_equal(features[stage], np.maximum(pre, 0))


def test_linear_stages():
    """MobileNetV2's groups end without an activation; wide ResNets hand on sums, normalised by the next block."""
    _, features = outputs_of_drawn("mobilenetv2")
    for i in (1, 2, 3, 4):
        np.testing.assert_array_equal(features[f"stage{i}"], features[f"stage{i}_pre"])
    _, features = outputs_of_drawn("wrn_16_2")
    for i, width in ((1, 32), (2, 64), (3, 128)):
        mean, var = 0.1 * draw(3, width), 1 + draw(4, width) ** 2
        normalised = (np.asarray(features[f"stage{i}"]) - mean) / np.sqrt(var + 1e-5)
        expected = normalised * (1 + 0.1 * draw(2, width)) + 0.1 * draw(1, width)
        np.testing.assert_allclose(features[f"stage{i}_pre"], expected, rtol=1e-4, atol=1e-4)
    embedding = np.maximum(expected, 0).mean((1, 2))
    np.testing.assert_allclose(features["embedding"], embedding, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("activation", ["relu", "tanh", "sigmoid", "gelu"])
def test_mlp_equals_numpy(activation):
    net = network("mlp", outputs=3, widths=[5, 4], activation=activation)
    inputs = draw(0, 6, 2, 2, 1).astype(np.float32)
    variables = net.init(jax.random.key(0), inputs)
    logits, features = net.apply(variables, inputs)
    formula = {
        "relu": lambda v: np.maximum(v, 0),
        "tanh": np.tanh,
        "sigmoid": lambda v: 1 / (1 + np.exp(-v)),
        "gelu": lambda v: 0.5 * v * (1 + np.tanh(np.sqrt(2 / np.pi) * (v + 0.044715 * v**3))),
    }[activation]
    x = inputs.reshape(6, 4)
    for i in (1, 2):
        layer = variables["params"][f"fc{i}"]
        x = x @ np.asarray(layer["kernel"]) + np.asarray(layer["bias"])
        np.testing.assert_allclose(features[f"hidden{i}_pre"], x, atol=1e-5)
        x = formula(x)
        np.testing.assert_allclose(features[f"hidden{i}"], x, atol=1e-5)
    np.testing.assert_array_equal(features["embedding"], features["hidden2"])
    fc = variables["params"]["fc"]
    np.testing.assert_allclose(logits, x @ np.asarray(fc["kernel"]) + np.asarray(fc["bias"]), atol=1e-5)


def test_mlp_without_hidden_layers_is_linear():
    net = network("mlp", outputs=3, widths=[])
    variables = net.init(jax.random.key(0), jnp.ones((2, 4)))
    assert set(variables["params"]) == {"fc"}
    assert set(net.apply(variables, jnp.ones((2, 4)))[1]) == {"embedding"}


@pytest.mark.parametrize("make", [lambda p: MLP(10, (32,), dropout=p), lambda p: WideBlock(8, stride=1, dropout=p)])
def test_dropout_acts_in_training_only(make):
    inputs = jnp.asarray(draw(0, 4, 6, 6, 3), jnp.float32)
    variables = jax.eval_shape(lambda: make(0.0).init(jax.random.key(0), inputs, False))
    variables = jax.tree_util.tree_map_with_path(drawn, variables)

    def run(dropout, train, seed):
        rngs = {"dropout": jax.random.key(seed)}
        return make(dropout).apply(variables, inputs, train, rngs=rngs, mutable=["batch_stats"])[0][0]

    np.testing.assert_array_equal(run(0.5, False, 1), run(0.0, False, 2))
    np.testing.assert_array_equal(run(0.5, True, 1), run(0.5, True, 1))
    assert np.abs(np.asarray(run(0.5, True, 1) - run(0.5, True, 2))).max() > 1e-3


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("mlp", {"widths": [0]}, "student.widths must be positive integers, got [0]"),
        ("mlp", {"widths": [32, -1]}, "student.widths must be positive integers, got [32, -1]"),
        ("mlp", {"widths": [8.5]}, "student.widths must be positive integers, got [8.5]"),
        ("mlp", {"widths": 32}, "student.widths must be positive integers, got 32"),
        ("mlp", {"activation": "rel"}, "student.activation must be one of relu, tanh, sigmoid, gelu, got 'rel'; "),
        ("mlp", {"dropout": 1.0}, "student.dropout must be at least 0 and below 1, got 1.0"),
        ("lenet", {"channels": [0, 1]}, "student.channels must be positive integers, got [0, 1]"),
        ("resnet20", {"depth": 21}, "student.depth must be 6n+2 (8, 14, 20, ...), got 21"),
        ("resnet20", {"depth": 2}, "student.depth must be 6n+2 (8, 14, 20, ...), got 2"),
        ("resnet20", {"widths": [16, 32]}, "student.widths must be 4 positive integers, got [16, 32]"),
        ("resnet50", {"block": "wide"}, "student.block must be one of basic, bottleneck, got 'wide'"),
        ("resnet50", {"blocks": [3]}, "student.blocks must be 4 positive integers, got [3]"),
        ("wrn", {"depth": 20}, "student.depth must be 6n+4 (10, 16, 22, ...), got 20"),
        ("wrn", {"widen": 0}, "student.widen must be a positive integer, got 0"),
        ("vgg8", {"blocks": [1, 1, 1, 1, -1]}, "student.blocks must be 5 positive integers, got [1, 1, 1, 1, -1]"),
        ("mobilenetv2", {"width": 0.1}, "student.width must be a number of at least 0.125, got 0.1"),
        ("mobilenetv2", {"width": float("nan")}, "student.width must be a number of at least 0.125, got nan"),
        ("mobilenetv2", {"expansion": 0}, "student.expansion must be a positive integer, got 0"),
        ("shufflenetv2", {"channels": [48, 96]}, "student.channels must be 3 positive even integers, got [48, 96]"),
        ("shufflenetv2", {"channels": [3, 4, 4]}, "student.channels must be 3 positive even integers, got [3, 4, 4]"),
    ],
)
def test_bad_fields_are_refused(name, fields, message):
    with pytest.raises(UsageError) as error:
        network(name, **fields)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "mlp"])
def test_tables_are_refused_by_image_networks(name):
    with pytest.raises(UsageError, match=r"reads images \[B, H, W, C\], got inputs of shape \(2, 13\)"):
        jax.eval_shape(lambda: network(name).init(jax.random.key(0), jnp.zeros((2, 13))))


def test_lists_are_taken_where_tuples_are():
    assert MLP(outputs=2, widths=[4]) == MLP(outputs=2, widths=(4,))
    assert hash(MLP(outputs=2, widths=[4])) == hash(MLP(outputs=2, widths=(4,)))
