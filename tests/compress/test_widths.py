"""Which axes belong to a width: against lists written by hand; and what networks declare."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from jdistill.compress.widths import axes_of
from jdistill.data.base import Schema
from jdistill.errors import UsageError
from jdistill.models.lenet import LeNet
from jdistill.models.mlp import MLP
from jdistill.models.recommend.sasrec import SASRec
from jdistill.models.resnet import DeepResNet, ResNet
from jdistill.models.tabular.ltr import LtrMLP
from jdistill.models.tabular.wide_mlp import WideMLP
from jdistill.models.vgg import VGG
from jdistill.models.wrn import WideResNet
from jdistill.modules import from_linen
from jdistill.registry import build
from tests.tiny import assert_same_bits

SHOP = Schema(users=7, items=13, history=5)


def zeros(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


IMAGES = zeros(2, 8, 8, 2)
REQUEST = {"user": jax.ShapeDtypeStruct((2,), jnp.int32), "history": jax.ShapeDtypeStruct((2, 5), jnp.int32)}


def names(model, inputs):
    """Width -> {(leaf, axis)}."""
    return {name: {(a.leaf, a.axis) for a in axes} for name, axes in axes_of(model, inputs).items()}


def batch_norm(name):
    return {(f"{name}/scale", 0), (f"{name}/bias", 0)} | {(f"running/batch_stats/{name}/{s}", 0) for s in ("mean", "var")}


def test_perceptron():
    model = from_linen(MLP(3, (7, 6)))
    assert model.widths.sizes == (("widths.0", 7), ("widths.1", 6)) and not model.widths.streams
    assert names(model, zeros(2, 4)) == {
        "widths.0": {("fc1/kernel", 1), ("fc1/bias", 0), ("fc2/kernel", 0)},
        "widths.1": {("fc2/kernel", 1), ("fc2/bias", 0), ("fc/kernel", 0)},
    }
    assert all(axis.positions == tuple((i,) for i in range(7)) for axis in axes_of(model, zeros(2, 4))["widths.0"])


def test_units_of_flattened_images_lie_apart():
    (axis,) = (a for a in axes_of(from_linen(LeNet(3, (4, 6), (5,))), IMAGES)["channels.1"] if a.leaf == "fc1/kernel")
    assert (axis.axis, axis.size) == (0, 24)  # 2x2 places of 6 channels
    assert axis.positions[1] == (1, 7, 13, 19)


def test_residual_network():
    found = names(from_linen(ResNet(3, 8, (4, 4, 6, 8))), IMAGES)
    assert set(found) == {"inner.0", "inner.1", "inner.2", "widths.0", "widths.2", "widths.3"}
    block = "layer2_0"
    assert found["inner.1"] == {(f"{block}/conv1/kernel", 3), (f"{block}/conv2/kernel", 2), *batch_norm(f"{block}/bn1")}
    assert found["widths.0"] == {
        ("conv1/kernel", 3), *batch_norm("bn1"), ("layer1_0/conv1/kernel", 2), ("layer1_0/conv2/kernel", 3),
        *batch_norm("layer1_0/bn2"), ("layer2_0/conv1/kernel", 2), ("layer2_0/downsample_conv/kernel", 2),
    }  # fmt: skip
    assert found["widths.3"] == {
        ("layer3_0/conv2/kernel", 3), ("layer3_0/downsample_conv/kernel", 3), ("fc/kernel", 0),
        *batch_norm("layer3_0/bn2"), *batch_norm("layer3_0/downsample_bn"),
    }  # fmt: skip
    projected = from_linen(ResNet(3, 8, (4, 8, 6, 8)))
    assert projected.widths.streams == {"widths.0", "widths.1", "widths.2", "widths.3"}
    assert names(projected, IMAGES)["widths.0"] == {
        ("conv1/kernel", 3), *batch_norm("bn1"), ("layer1_0/conv1/kernel", 2), ("layer1_0/downsample_conv/kernel", 2),
    }  # fmt: skip


def test_heads():
    found = axes_of(from_linen(SASRec(SHOP, dim=6, layers=2, heads=3)), REQUEST)
    assert set(found) == {"hidden.0", "hidden.1", "kept_heads.0", "kept_heads.1"}
    assert {(a.leaf, a.axis) for a in found["kept_heads.1"]} == {
        *((f"block2/{name}/kernel", 1) for name in ("query", "key", "value")),
        *((f"block2/{name}/bias", 0) for name in ("query", "key", "value")),
    }
    assert all(a.positions == ((0, 1), (2, 3), (4, 5)) for a in found["kept_heads.1"])
    ranker = axes_of(from_linen(LtrMLP(1, widths=(7,), context="attention", dim=8, heads=4)), zeros(2, 5, 4))
    assert {(a.leaf, a.axis) for a in ranker["kept_heads"]} == {
        *((f"attention/{name}/kernel", 1) for name in ("query", "key", "value")), ("attention/out/kernel", 0),
        *((f"attention/{name}/bias", 0) for name in ("query", "key", "value")),
    }  # fmt: skip


def test_what_is_concatenated_behind_the_units_belongs_to_none():
    model = from_linen(WideMLP(3, Schema(fields=(4, 5, 0)), widths=(7,), wide=True))
    (axis,) = (a for a in axes_of(model, zeros(2, 3))["widths.0"] if a.leaf == "fc/kernel")
    assert axis.size == 7 + 3 and axis.positions == tuple((i,) for i in range(7))


def test_config_keys_of_smaller_networks():
    widths = from_linen(ResNet(3, 8, (4, 4, 6, 8))).widths
    assert widths.changed({"inner.2": [0, 5]}) == {"inner": [4, 6, 2], "widths": [4, 4, 6, 8]}
    assert widths.changed({"widths.0": [1, 2, 3]})["widths"] == [3, 3, 6, 8]
    heads = from_linen(SASRec(SHOP, dim=6, heads=3, layers=2, kept_heads=((0, 2), (1,)))).widths
    assert heads.sizes[2:] == (("kept_heads.0", 2), ("kept_heads.1", 1))
    assert heads.changed({"kept_heads.0": [1]}) == {"hidden": [6, 6], "kept_heads": [[2], [1]]}
    assert from_linen(LtrMLP(1, widths=(), context="attention")).widths.changed({"kept_heads": [0, 3]})["kept_heads"] == 2
    assert from_linen(MLP(3, ())).widths is None and from_linen(Mixed()).widths is not None


DEFAULTS = {
    "resnet": (ResNet(3, 8), {"inner": (16, 32, 64)}, IMAGES),
    "basic": (DeepResNet(3, (1, 1, 1, 1), "basic"), {"inner": (64, 128, 256, 512)}, IMAGES),
    "wrn": (WideResNet(3, 10, 2), {"inner": (32, 64, 128)}, IMAGES),
    "vgg": (VGG(3), {"channels": (64, 128, 256, 512, 512)}, IMAGES),
    "sasrec": (SASRec(SHOP, dim=6, layers=2, heads=2), {"hidden": (6, 6), "kept_heads": ((0, 1), (0, 1))}, REQUEST),
    "ltr": (LtrMLP(1, context="attention"), {"kept_heads": 4}, zeros(2, 5, 4)),
}


@pytest.mark.parametrize("name", DEFAULTS)
def test_none_stands_for_the_published_widths(name):
    module, fields, inputs = DEFAULTS[name]
    given = module.clone(**fields)
    assert module != given and from_linen(module).widths.sizes == from_linen(given).widths.sizes
    own, same = (jax.eval_shape(from_linen(m).init, jax.random.key(0), inputs) for m in (module, given))
    assert own == same


def test_a_kept_network_starts_with_the_same_bits():
    networks = (from_linen(ResNet(3, 8, (4, 4, 6, 8), inner)) for inner in (None, (4, 6, 8)))
    own, same = (model.init(jax.random.key(3), IMAGES) for model in networks)
    assert_same_bits(own, same)


class Mixed(nn.Module):
    """Two widths of which the last layer reads the sum of flattened outer products, or one that changes the layers."""

    widths: tuple[int, ...] = (3, 4)
    deeper: bool = False

    @property
    def removable(self):
        return {"widths": self.widths}

    @nn.compact
    def __call__(self, inputs, train=False):
        first, second = (nn.Dense(width, name=f"fc{i}")(inputs) for i, width in enumerate(self.widths))
        if self.deeper and self.widths[0] != 3:
            first = nn.Dense(self.widths[0], name="more")(first)
        joined = first @ jnp.ones((self.widths[0], 1)) + second if self.deeper else jnp.concatenate([first, second], -1)
        return nn.Dense(2, name="fc")(joined), {}


def test_what_cannot_be_cut_is_one_line():
    with pytest.raises(UsageError, match="axis 0 of fc/kernel holds units of several widths"):
        axes_of(from_linen(Mixed()), zeros(2, 5))
    with pytest.raises(UsageError, match="has other layers where its widths are others"):
        axes_of(from_linen(Mixed(deeper=True)), zeros(2, 5))


@pytest.mark.parametrize(
    ("name", "fields", "expected"),
    [
        ("resnet8", {"inner": [4, 4]}, r"student.inner must be 3 positive integers, got \[4, 4\]"),
        ("resnet18", {"inner": [4]}, "student.inner must be 8 positive integers"),
        ("resnet50", {"inner": [0] * 32}, "student.inner must be 32 positive integers"),
        ("wrn", {"inner": [1]}, "student.inner must be 6 positive integers"),
        ("vgg8", {"channels": [1]}, "student.channels must be 5 positive integers"),
        ("ltr_mlp", {"kept_heads": 0}, "student.kept_heads must be a positive integer"),
    ],
)
def test_refused_fields(name, fields, expected):
    with pytest.raises(UsageError, match=f"^{expected}"):
        build("student", {"name": name, **fields}, outputs=3)


@pytest.mark.parametrize("value", [[[0]], [[0, 2], [1]], [[], [1]], [0, 1], 3])
def test_refused_heads(value):
    with pytest.raises(UsageError, match=r"^student\.kept_heads must list for each of 2 blocks those of its heads 0 to 1"):
        build("student", {"name": "sasrec", "dim": 6, "heads": 2, "layers": 2, "kept_heads": value}, schema=SHOP)


def test_numbers_of_units_apart_and_side_by_side():
    lenet = axes_of(from_linen(LeNet(3, (4, 6), ())), IMAGES)
    (axis,) = (a for a in lenet["channels.1"] if a.leaf == "fc/kernel")
    places = np.arange(24).reshape(2, 2, 6)
    assert [list(p) for p in axis.positions] == [places[..., c].ravel().tolist() for c in range(6)]
