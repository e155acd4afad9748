"""MobileNetV2 for 32x32 images (Sandler et al. 2018), as RepDistiller's `models/mobilenetv2.py`."""

from flax import linen as nn
from jax import Array

from jdistill.errors import UsageError
from jdistill.models.base import is_positive, model, positive_integer
from jdistill.models.layers import conv, global_mean, linear, norm, require_images

# (channels, blocks, stride of the first block) of the seven groups; strides are those for 32x32 images
GROUPS = ((16, 1, 1), (24, 2, 1), (32, 3, 2), (64, 4, 2), (96, 3, 1), (160, 3, 2), (320, 1, 1))
STAGES = {1: "stage1", 2: "stage2", 4: "stage3", 6: "stage4"}


class InvertedResidual(nn.Module):
    """1x1 expansion, 3x3 depthwise, linear 1x1 projection; the input is added where shapes agree."""

    width: int
    stride: int
    expansion: int

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        hidden = x.shape[-1] * self.expansion
        out = nn.relu(norm(conv(x, hidden, 1, name="conv1"), train, name="bn1"))
        out = conv(out, hidden, 3, stride=self.stride, groups=hidden, name="conv2")
        out = nn.relu(norm(out, train, name="bn2"))
        out = norm(conv(out, self.width, 1, name="conv3"), train, name="bn3")
        return x + out if self.stride == 1 and x.shape[-1] == self.width else out


@model("mobilenetv2")
class MobileNetV2(nn.Module):
    """MobileNetV2 for 32x32 images; the default is half width ("MobileNetV2" in the CRD paper's tables).

    As in RepDistiller, ReLU stands in for ReLU6 and every channel count is width times the paper's, rounded down.

    Features: `stem` after ReLU; `stage1` to `stage4`, outputs of groups 2, 3, 5 and 7, which are linear, so that
    `stage1_pre` to `stage4_pre` are the same arrays; `embedding` [B, 1280].

    Attributes:
      outputs: number of logits.
      width: factor of the channel counts, at least 1/8.
      expansion: factor t by which a block widens, for all groups but the first.

    Raises:
      UsageError: a width below 1/8 or an expansion that is not a positive integer; inputs that are not images.
    """

    outputs: int
    width: float = 0.5
    expansion: int = 6

    def __post_init__(self) -> None:
        positive_integer(outputs=self.outputs, expansion=self.expansion)
        if not (isinstance(self.width, float) or is_positive(self.width)) or not self.width >= 0.125:
            raise UsageError(f"width must be a number of at least 0.125, got {self.width!r}")
        super().__post_init__()

    @nn.compact
    def __call__(self, inputs: Array, train: bool = False) -> tuple[Array, dict[str, Array]]:
        require_images(self, inputs)
        features: dict[str, Array] = {}
        x = nn.relu(norm(conv(inputs, int(32 * self.width), 3, stride=2, name="conv1"), train, name="bn1"))
        features["stem"] = x
        for i, (channels, count, first_stride) in enumerate(GROUPS):
            expansion = 1 if i == 0 else self.expansion
            for j in range(count):
                stride = first_stride if j == 0 else 1
                block = InvertedResidual(int(channels * self.width), stride, expansion, name=f"block{i}_{j}")
                x = block(x, train)
            if i in STAGES:
                features[STAGES[i]] = features[f"{STAGES[i]}_pre"] = x
        last = int(1280 * max(self.width, 1.0))
        features["embedding"] = x = global_mean(nn.relu(norm(conv(x, last, 1, name="conv2"), train, name="bn2")))
        normal, zeros = nn.initializers.normal(0.01), nn.initializers.zeros
        return linear(x, self.outputs, kernel_init=normal, bias_init=zeros, name="fc"), features
