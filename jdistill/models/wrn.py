"""Wide residual networks (Zagoruyko and Komodakis 2016), as RepDistiller's `models/wrn.py`."""

from typing import Any

from flax import linen as nn
from jax import Array

from jdistill.models.base import blocks_of_depth, model, positive_integer, positive_integers
from jdistill.models.layers import conv, global_mean, linear, norm, require_images
from jdistill.pytrees import require_fraction


class WideBlock(nn.Module):
    """BatchNorm, ReLU, convolution, twice; gives the sum and the first BatchNorm's output.

    `inner` are the channels between the convolutions; None for `width`.
    """

    width: int
    stride: int
    dropout: float
    inner: int | None = None

    @nn.compact
    def __call__(self, x: Array, train: bool) -> tuple[Array, Array]:
        normalised = norm(x, train, name="bn1")
        activated = nn.relu(normalised)
        inner = self.inner or self.width
        out = nn.relu(norm(conv(activated, inner, 3, stride=self.stride, name="conv1"), train, name="bn2"))
        out = nn.Dropout(self.dropout)(out, deterministic=not train)
        out = conv(out, self.width, 3, name="conv2")
        if x.shape[-1] == self.width:
            return x + out, normalised
        # unlike the identity, the projection reads the activated input
        return conv(activated, self.width, 1, stride=self.stride, name="shortcut") + out, normalised


class WideResNet(nn.Module):
    """Wide ResNet for 32x32 images: three stages of pre-activation blocks with 16, 32, 64 times `widen` channels.

    Features, as the published feature losses read them: `stem`, the first convolution; `stage1` to `stage3`, the
    sums that a stage hands on (a pre-activation network applies no ReLU there); `stage1_pre` to `stage3_pre`, those
    after the BatchNorm that follows, just before its ReLU; `embedding` [B, D].

    Attributes:
      outputs: number of logits.
      depth: layers with weights, 6n+4; a stage has n blocks.
      widen: the widening factor k of WRN-depth-k.
      dropout: probability in [0, 1) between the two convolutions of a block.
      inner: channels between the two convolutions of each block, 3n numbers; None for those of its stage.

    Raises:
      UsageError: a depth that is not 6n+4, a widening factor below 1, a dropout outside [0, 1), as many of `inner` as
        there are blocks; inputs that are not images.
    """

    outputs: int
    depth: int = 40
    widen: int = 2
    dropout: float = 0.0
    inner: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        positive_integer(outputs=self.outputs, widen=self.widen)
        blocks_of_depth(self.depth, 4)
        require_fraction(dropout=self.dropout)
        if self.inner is not None:
            positive_integers(len(self._stages()), inner=self.inner)
            self.inner = tuple(self.inner)
        super().__post_init__()

    def _stages(self) -> tuple[int, ...]:
        """The channels of each block's output."""
        count = blocks_of_depth(self.depth, 4)
        return tuple(width * self.widen for width in (16, 32, 64) for _ in range(count))

    @property
    def removable(self) -> dict[str, tuple[int, ...]]:
        return {"inner": self.inner or self._stages()}

    @nn.compact
    def __call__(self, inputs: Array, train: bool = False) -> tuple[Array, dict[str, Array]]:
        require_images(self, inputs)
        features: dict[str, Array] = {}
        features["stem"] = x = conv(inputs, 16, 3, name="conv1")
        inner = iter(self.inner or self._stages())
        for i, width in enumerate((16, 32, 64), 1):
            for j in range(blocks_of_depth(self.depth, 4)):
                stride = 2 if i > 1 and j == 0 else 1
                block = WideBlock(width * self.widen, stride, self.dropout, next(inner), name=f"block{i}_{j}")
                x, normalised = block(x, train)
                if i > 1 and j == 0:
                    features[f"stage{i - 1}_pre"] = normalised
            features[f"stage{i}"] = x
        features["stage3_pre"] = x = norm(x, train, name="bn1")
        features["embedding"] = x = global_mean(nn.relu(x))
        return linear(x, self.outputs, bias_init=nn.initializers.zeros, name="fc"), features


model("wrn", student={"depth": 16})(WideResNet)

for _depth, _widen in ((16, 1), (16, 2), (40, 1), (40, 2)):
    _fields: dict[str, Any] = {"depth": _depth, "widen": _widen}
    model(f"wrn_{_depth}_{_widen}", teacher=_fields, student=_fields)(WideResNet)
