"""A small convolutional network of the size of LeNet-5."""

from flax import linen as nn
from jax import Array

from jdistill.models.base import model, positive_integer, positive_integers
from jdistill.models.layers import conv, linear, max_pool, require_images, torch_uniform


@model("lenet")
class LeNet(nn.Module):
    """LeNet-5 with ReLU and maximum pooling (LeCun et al. 1998), for images of 4x4 and more.

    Each stage is a 5x5 convolution with padding 2, ReLU and 2x2 pooling, so that 8x8, 28x28 and 32x32 images fit;
    then hidden linear layers. PyTorch's default initialisation.

    Features: `stage1`, `stage2` [B, H, W, C] after ReLU (before pooling), `stage1_pre`, `stage2_pre` before ReLU,
    `embedding` [B, D].

    Attributes:
      outputs: number of logits.
      channels: channels of each stage.
      widths: units of each hidden linear layer.

    Raises:
      UsageError: entries that are not positive integers; inputs that are not images.
    """

    outputs: int
    channels: tuple[int, ...] = (6, 16)
    widths: tuple[int, ...] = (120, 84)

    def __post_init__(self) -> None:
        positive_integer(outputs=self.outputs)
        positive_integers(channels=self.channels, widths=self.widths)
        self.channels, self.widths = tuple(self.channels), tuple(self.widths)
        super().__post_init__()

    @property
    def removable(self) -> dict[str, tuple[int, ...]]:
        return {"channels": self.channels, "widths": self.widths}

    @nn.compact
    def __call__(self, inputs: Array, train: bool = False) -> tuple[Array, dict[str, Array]]:
        require_images(self, inputs)
        features: dict[str, Array] = {}
        x = inputs
        for i, width in enumerate(self.channels, 1):
            x = conv(x, width, 5, bias=True, kernel_init=torch_uniform, name=f"conv{i}")
            features[f"stage{i}_pre"] = x
            features[f"stage{i}"] = x = nn.relu(x)
            x = max_pool(x)
        x = x.reshape(x.shape[0], -1)
        for i, width in enumerate(self.widths, 1):
            x = nn.relu(linear(x, width, name=f"fc{i}"))
        features["embedding"] = x
        return linear(x, self.outputs, name="fc"), features
