"""Networks: importing this package registers every `teacher=` and `student=` option."""

from jdistill.models.base import model
from jdistill.models.lenet import LeNet
from jdistill.models.mlp import MLP
from jdistill.models.mobilenet import MobileNetV2
from jdistill.models.recommend import BPR, CDAE, GRU4Rec, NeuMF, SASRec, lightgcn, two_tower
from jdistill.models.resnet import DeepResNet, ResNet
from jdistill.models.shufflenet import ShuffleNetV1, ShuffleNetV2
from jdistill.models.tabular import DCNv2, DeepFM, LtrMLP, WideMLP
from jdistill.models.vgg import VGG
from jdistill.models.wrn import WideResNet

__all__ = [
    "BPR",
    "CDAE",
    "MLP",
    "VGG",
    "DCNv2",
    "DeepFM",
    "DeepResNet",
    "GRU4Rec",
    "LeNet",
    "LtrMLP",
    "MobileNetV2",
    "NeuMF",
    "ResNet",
    "SASRec",
    "ShuffleNetV1",
    "ShuffleNetV2",
    "WideMLP",
    "WideResNet",
    "lightgcn",
    "model",
    "two_tower",
]
