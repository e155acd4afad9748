"""ShuffleNet V1 (Zhang et al. 2018) and V2 (Ma et al. 2018) for 32x32 images.

As RepDistiller's `models/ShuffleNetv1.py` and `models/ShuffleNetv2.py`: a 1x1 stem without pooling, PyTorch's default
initialisation.
"""

import functools

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from jdistill.models.base import model, positive_integer, positive_integers
from jdistill.models.layers import conv as he_conv
from jdistill.models.layers import global_mean, linear, norm, require_images, shuffle, torch_uniform

STEM = 24
conv = functools.partial(he_conv, kernel_init=torch_uniform)


class GroupedBlock(nn.Module):
    """V1: grouped 1x1, shuffle, 3x3 depthwise, grouped 1x1; gives its sum (or concatenation) before the ReLU."""

    width: int
    stride: int
    groups: int

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        # Concatenation with the pooled input completes a strided block to `width` channels.
        width = self.width - (x.shape[-1] if self.stride == 2 else 0)
        groups = 1 if x.shape[-1] == STEM else self.groups
        out = nn.relu(norm(conv(x, width // 4, 1, groups=groups, name="conv1"), train, name="bn1"))
        out = conv(shuffle(out, groups), width // 4, 3, stride=self.stride, groups=width // 4, name="conv2")
        out = nn.relu(norm(out, train, name="bn2"))
        out = norm(conv(out, width, 1, groups=self.groups, name="conv3"), train, name="bn3")
        if self.stride == 1:
            return out + x
        pooled = nn.avg_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))
        return jnp.concatenate([out, pooled], -1)


@model("shufflenetv1")
class ShuffleNetV1(nn.Module):
    """ShuffleNet V1 for 32x32 images: 3 groups, 240, 480 and 960 channels (the CRD paper's ShuffleNetV1).

    Features: `stem`, `stage1` to `stage3` after ReLU, `stage1_pre` to `stage3_pre` before it, `embedding` [B, 960].

    Attributes:
      outputs: number of logits.

    Raises:
      UsageError: inputs that are not images.
    """

    outputs: int

    def __post_init__(self) -> None:
        positive_integer(outputs=self.outputs)
        super().__post_init__()

    @nn.compact
    def __call__(self, inputs: Array, train: bool = False) -> tuple[Array, dict[str, Array]]:
        require_images(self, inputs)
        x = nn.relu(norm(conv(inputs, STEM, 1, name="conv1"), train, name="bn1"))
        features = {"stem": x}
        for i, (width, count) in enumerate(((240, 4), (480, 8), (960, 4)), 1):
            for j in range(count):
                pre = GroupedBlock(width, 2 if j == 0 else 1, groups=3, name=f"layer{i}_{j}")(x, train)
                x = nn.relu(pre)
            features[f"stage{i}_pre"], features[f"stage{i}"] = pre, x
        features["embedding"] = x = global_mean(x)
        return linear(x, self.outputs, name="fc"), features


class DownBlock(nn.Module):
    """V2: two strided branches, concatenated and shuffled."""

    width: int

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        half, inputs = self.width // 2, x.shape[-1]
        left = norm(conv(x, inputs, 3, stride=2, groups=inputs, name="conv1"), train, name="bn1")
        left = nn.relu(norm(conv(left, half, 1, name="conv2"), train, name="bn2"))
        right = nn.relu(norm(conv(x, half, 1, name="conv3"), train, name="bn3"))
        right = norm(conv(right, half, 3, stride=2, groups=half, name="conv4"), train, name="bn4")
        right = nn.relu(norm(conv(right, half, 1, name="conv5"), train, name="bn5"))
        return shuffle(jnp.concatenate([left, right], -1), 2)


class SplitBlock(nn.Module):
    """V2: half of the channels pass, half are convolved; gives the shuffled result before its ReLU."""

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        half = x.shape[-1] // 2
        passed, out = x[..., :half], x[..., half:]
        out = nn.relu(norm(conv(out, half, 1, name="conv1"), train, name="bn1"))
        out = norm(conv(out, half, 3, groups=half, name="conv2"), train, name="bn2")
        out = norm(conv(out, half, 1, name="conv3"), train, name="bn3")
        # The passed half is not negative, so that one ReLU over both is the original's ReLU over the second.
        return shuffle(jnp.concatenate([passed, out], -1), 2)


@model("shufflenetv2")
class ShuffleNetV2(nn.Module):
    """ShuffleNet V2 of size 1 for 32x32 images (the CRD paper's ShuffleNetV2).

    Features: `stem`, `stage1` to `stage3` after ReLU, `stage1_pre` to `stage3_pre` before it (in the same order of
    channels; RepDistiller has them unshuffled), `embedding` [B, 1024].

    Attributes:
      outputs: number of logits.
      channels: channels of the three stages, even numbers.

    Raises:
      UsageError: channels that are not 3 positive even integers; inputs that are not images.
    """

    outputs: int
    channels: tuple[int, ...] = (116, 232, 464)

    def __post_init__(self) -> None:
        positive_integer(outputs=self.outputs)
        positive_integers(3, even=True, channels=self.channels)
        self.channels = tuple(self.channels)
        super().__post_init__()

    @nn.compact
    def __call__(self, inputs: Array, train: bool = False) -> tuple[Array, dict[str, Array]]:
        require_images(self, inputs)
        x = nn.relu(norm(conv(inputs, STEM, 1, name="conv1"), train, name="bn1"))
        features = {"stem": x}
        for i, (width, count) in enumerate(zip(self.channels, (3, 7, 3), strict=True), 1):
            x = DownBlock(width, name=f"layer{i}_0")(x, train)
            for j in range(1, count + 1):
                pre = SplitBlock(name=f"layer{i}_{j}")(x, train)
                x = nn.relu(pre)
            features[f"stage{i}_pre"], features[f"stage{i}"] = pre, x
        x = nn.relu(norm(conv(x, 1024, 1, name="conv2"), train, name="bn2"))
        features["embedding"] = x = global_mean(x)
        return linear(x, self.outputs, name="fc"), features
