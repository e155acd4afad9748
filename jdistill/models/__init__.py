"""Networks: importing this package registers every `teacher=` and `student=` option."""

from jdistill.models.base import model
from jdistill.models.lenet import LeNet
from jdistill.models.mlp import MLP
from jdistill.models.mobilenet import MobileNetV2
from jdistill.models.resnet import DeepResNet, ResNet
from jdistill.models.shufflenet import ShuffleNetV1, ShuffleNetV2
from jdistill.models.vgg import VGG
from jdistill.models.wrn import WideResNet

__all__ = [
    "MLP",
    "VGG",
    "DeepResNet",
    "LeNet",
    "MobileNetV2",
    "ResNet",
    "ShuffleNetV1",
    "ShuffleNetV2",
    "WideResNet",
    "model",
]
