"""ResNets for 32x32 images (He et al. 2016), in the form that RepDistiller and the CRD paper compare.

Blocks, shortcuts, strides and initialisation follow RepDistiller's `models/resnet.py` (three stages, basic blocks)
and `models/resnetv2.py` (four stages, stem of 64 channels without pooling).
"""

from typing import Any

from flax import linen as nn
from jax import Array

from jdistill.errors import UsageError
from jdistill.models.base import blocks_of_depth, model, positive_integer, positive_integers
from jdistill.models.layers import conv, global_mean, linear, norm, require_images


def _shortcut(x: Array, features: int, stride: int, train: bool) -> Array:
    """The input itself, or a 1x1 projection where its shape differs from the block's output (option B)."""
    if stride == 1 and x.shape[-1] == features:
        return x
    x = conv(x, features, 1, stride=stride, name="downsample_conv")
    return norm(x, train, name="downsample_bn")


class BasicBlock(nn.Module):
    """Two 3x3 convolutions, the first to `inner[0]` channels; gives the sum before its ReLU."""

    width: int
    stride: int
    inner: tuple[int, ...]

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        out = nn.relu(norm(conv(x, self.inner[0], 3, stride=self.stride, name="conv1"), train, name="bn1"))
        out = norm(conv(out, self.width, 3, name="conv2"), train, name="bn2")
        return out + _shortcut(x, self.width, self.stride, train)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions to `inner[0]`, `inner[1]`, `4 * width` channels; gives the sum before its ReLU."""

    width: int
    stride: int
    inner: tuple[int, ...]

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        out = nn.relu(norm(conv(x, self.inner[0], 1, name="conv1"), train, name="bn1"))
        out = nn.relu(norm(conv(out, self.inner[1], 3, stride=self.stride, name="conv2"), train, name="bn2"))
        out = norm(conv(out, 4 * self.width, 1, name="conv3"), train, name="bn3")
        return out + _shortcut(x, 4 * self.width, self.stride, train)


_INNER = {BasicBlock: 1, Bottleneck: 2}


def _all_inner(block: Any, widths: tuple[int, ...], blocks: tuple[int, ...], inner: Any) -> tuple[int, ...]:
    """Channels between the convolutions of every block; where `inner` is None, those of the stages (`widths` [1:])."""
    own = tuple(w for w, count in zip(widths[1:], blocks, strict=True) for _ in range(count * _INNER[block]))
    if inner is None:
        return own
    positive_integers(len(own), inner=inner)
    return tuple(inner)


def _features(
    x: Array, block: Any, widths: tuple[int, ...], blocks: tuple[int, ...], inner: tuple[int, ...], train: bool
) -> dict[str, Array]:
    """Stem and stages; `widths` has the stem's first. Every stage but the first halves the image."""
    inside = iter(inner)
    x = nn.relu(norm(conv(x, widths[0], 3, name="conv1"), train, name="bn1"))
    features = {"stem": x}
    for i, (width, count) in enumerate(zip(widths[1:], blocks, strict=True), 1):
        for j in range(count):
            own = tuple(next(inside) for _ in range(_INNER[block]))
            pre = block(width, stride=2 if i > 1 and j == 0 else 1, inner=own, name=f"layer{i}_{j}")(x, train)
            x = nn.relu(pre)
        features[f"stage{i}_pre"], features[f"stage{i}"] = pre, x
    return {**features, "embedding": global_mean(x)}


class ResNet(nn.Module):
    """ResNet of three stages of basic blocks for 32x32 images (He et al. 2016, section 4.2; CRD's resnetNx4).

    Features: `stem`, `stage1` to `stage3` after ReLU, `stage1_pre` to `stage3_pre` before it, `embedding` [B, D].

    Attributes:
      outputs: number of logits.
      depth: layers with weights, 6n+2; a stage has n blocks.
      widths: channels of the stem and of the three stages.
      inner: channels between the two convolutions of each block, 3n numbers; None for those of its stage.

    Raises:
      UsageError: a depth that is not 6n+2, widths that are not 4 positive integers, as many of `inner` as there are
        blocks; inputs that are not images.
    """

    outputs: int
    depth: int = 20
    widths: tuple[int, ...] = (16, 16, 32, 64)
    inner: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        positive_integer(outputs=self.outputs)
        blocks_of_depth(self.depth, 2)
        positive_integers(4, widths=self.widths)
        self.widths = tuple(self.widths)
        if self.inner is not None:
            self.inner = self._inner()
        super().__post_init__()

    def _blocks(self) -> tuple[int, ...]:
        return (blocks_of_depth(self.depth, 2),) * 3

    def _inner(self) -> tuple[int, ...]:
        return _all_inner(BasicBlock, self.widths, self._blocks(), self.inner)

    @property
    def removable(self) -> dict[str, tuple[int, ...]]:
        return {"inner": self._inner(), "widths": self.widths}

    @property
    def streams(self) -> tuple[tuple[str, ...], ...]:
        """The first block adds the stem itself to its output where both have equally many channels."""
        stem: tuple[tuple[str, ...], ...] = (("widths.0",), ("widths.1",))
        if self.widths[0] == self.widths[1]:
            stem = (("widths.0", "widths.1"),)
        return (*stem, ("widths.2",), ("widths.3",))

    @nn.compact
    def __call__(self, inputs: Array, train: bool = False) -> tuple[Array, dict[str, Array]]:
        require_images(self, inputs)
        features = _features(inputs, BasicBlock, self.widths, self._blocks(), self._inner(), train)
        return linear(features["embedding"], self.outputs, name="fc"), features


class DeepResNet(nn.Module):
    """ResNet of four stages (64 to 512 channels) for 32x32 images: the ImageNet layout without its first pooling.

    Features: `stem`, `stage1` to `stage4` after ReLU, `stage1_pre` to `stage4_pre` before it, `embedding` [B, D].

    Attributes:
      outputs: number of logits.
      blocks: blocks of each of the four stages.
      block: `basic` (two 3x3 convolutions) or `bottleneck`.
      inner: channels between the convolutions of each block, one number for a basic one, two for a bottleneck; None for
        those of its stage.

    Raises:
      UsageError: blocks that are not 4 positive integers, an unknown block, another length of `inner`; inputs that are
        not images.
    """

    outputs: int
    blocks: tuple[int, ...] = (3, 4, 6, 3)
    block: str = "bottleneck"
    inner: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        positive_integer(outputs=self.outputs)
        positive_integers(4, blocks=self.blocks)
        if self.block not in _BLOCKS:
            raise UsageError(f"block must be one of {', '.join(_BLOCKS)}, got {self.block!r}")
        self.blocks = tuple(self.blocks)
        if self.inner is not None:
            self.inner = self._inner()
        super().__post_init__()

    def _inner(self) -> tuple[int, ...]:
        return _all_inner(_BLOCKS[self.block], _FOUR_WIDTHS, self.blocks, self.inner)

    @property
    def removable(self) -> dict[str, tuple[int, ...]]:
        return {"inner": self._inner()}

    @nn.compact
    def __call__(self, inputs: Array, train: bool = False) -> tuple[Array, dict[str, Array]]:
        require_images(self, inputs)
        features = _features(inputs, _BLOCKS[self.block], _FOUR_WIDTHS, self.blocks, self._inner(), train)
        return linear(features["embedding"], self.outputs, name="fc"), features


_BLOCKS = {"basic": BasicBlock, "bottleneck": Bottleneck}
_FOUR_WIDTHS = (64, 64, 128, 256, 512)

_NARROW, _WIDE = (16, 16, 32, 64), (32, 64, 128, 256)
_THREE_STAGES = {f"resnet{depth}": (depth, _NARROW) for depth in (8, 14, 20, 32, 44, 56, 110)}
_THREE_STAGES |= {"resnet8x4": (8, _WIDE), "resnet32x4": (32, _WIDE)}
_FOUR_STAGES = {
    "resnet18": ((2, 2, 2, 2), "basic"),
    "resnet34": ((3, 4, 6, 3), "basic"),
    "resnet50": ((3, 4, 6, 3), "bottleneck"),
}

for _name, (_depth, _widths) in _THREE_STAGES.items():
    _fields: dict[str, Any] = {"depth": _depth, "widths": _widths}
    model(_name, teacher=_fields, student=_fields)(ResNet)

for _name, (_blocks, _block) in _FOUR_STAGES.items():
    _fields = {"blocks": _blocks, "block": _block}
    model(_name, teacher=_fields, student=_fields)(DeepResNet)
