"""VGG with BatchNorm for small images (Simonyan and Zisserman 2015), as `vggN_bn` of RepDistiller's `models/vgg.py`."""

from flax import linen as nn
from jax import Array

from jdistill.models.base import model, positive_integer, positive_integers
from jdistill.models.layers import conv, global_mean, linear, max_pool, norm, require_images

CHANNELS = (64, 128, 256, 512, 512)


class VGG(nn.Module):
    """VGG with BatchNorm and one linear layer for small images: five groups of 3x3 convolutions.

    2x2 maximum pooling follows the first three groups (and the fourth, for images of 64x64), a mean the last.

    Features: `stem`, the first group; `stage1` to `stage4`, the others, after ReLU; `stage1_pre` to `stage4_pre`
    before it; `embedding` [B, 512].

    Attributes:
      outputs: number of logits.
      blocks: convolutions of each of the five groups.
      channels: those of every convolution; None for 64, 128, 256, 512 and 512 in the five groups.

    Raises:
      UsageError: blocks that are not 5 positive integers, as many `channels` as there are convolutions; inputs that are
        not images.
    """

    outputs: int
    blocks: tuple[int, ...] = (1, 1, 1, 1, 1)
    channels: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        positive_integer(outputs=self.outputs)
        positive_integers(5, blocks=self.blocks)
        self.blocks = tuple(self.blocks)
        if self.channels is not None:
            positive_integers(sum(self.blocks), channels=self.channels)
            self.channels = tuple(self.channels)
        super().__post_init__()

    def _channels(self) -> tuple[int, ...]:
        default = (width for width, count in zip(CHANNELS, self.blocks, strict=True) for _ in range(count))
        return tuple(default) if self.channels is None else self.channels

    @property
    def removable(self) -> dict[str, tuple[int, ...]]:
        return {"channels": self._channels()}

    @nn.compact
    def __call__(self, inputs: Array, train: bool = False) -> tuple[Array, dict[str, Array]]:
        require_images(self, inputs)
        features: dict[str, Array] = {}
        x = inputs
        channels = iter(self._channels())
        for i, count in enumerate(self.blocks):
            for j in range(count):
                pre = norm(conv(x, next(channels), 3, bias=True, name=f"conv{i}_{j}"), train, name=f"bn{i}_{j}")
                x = nn.relu(pre)
            if i == 0:
                features["stem"] = x
            else:
                features[f"stage{i}_pre"], features[f"stage{i}"] = pre, x
            if i < 3 or (i == 3 and inputs.shape[1] == 64):
                x = max_pool(x)
        features["embedding"] = x = global_mean(x)
        normal, zeros = nn.initializers.normal(0.01), nn.initializers.zeros
        return linear(x, self.outputs, kernel_init=normal, bias_init=zeros, name="fc"), features


for _name, _blocks in {
    "vgg8": (1, 1, 1, 1, 1),
    "vgg11": (1, 1, 2, 2, 2),
    "vgg13": (2, 2, 2, 2, 2),
    "vgg16": (2, 2, 3, 3, 3),
    "vgg19": (2, 2, 4, 4, 4),
}.items():
    model(_name, teacher={"blocks": _blocks}, student={"blocks": _blocks})(VGG)
