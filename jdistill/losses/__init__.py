"""Losses: each a frozen pytree of numbers, registered as an option of the config group `loss`."""

from jdistill.losses.base import Loss, loss
from jdistill.losses.decoupled import DIST, DKD, MLKD, NKD, LogitStdKD
from jdistill.losses.divergences import JensenShannon, ReverseKL, SkewKL, SoftBCE, TotalVariation
from jdistill.losses.features import Attention, Hint
from jdistill.losses.logits import KD, CrossEntropy, LogitMSE, NoDistillation, as_classes
from jdistill.losses.maps import FlowOfSolution, NeuronSelectivity, VariationalInformation
from jdistill.losses.relations import CorrelationCongruence, ProbabilisticTransfer, RelationalKD, SimilarityPreserving

__all__ = [
    "DIST",
    "DKD",
    "KD",
    "MLKD",
    "NKD",
    "Attention",
    "CorrelationCongruence",
    "CrossEntropy",
    "FlowOfSolution",
    "Hint",
    "JensenShannon",
    "LogitMSE",
    "LogitStdKD",
    "Loss",
    "NeuronSelectivity",
    "NoDistillation",
    "ProbabilisticTransfer",
    "RelationalKD",
    "ReverseKL",
    "SimilarityPreserving",
    "SkewKL",
    "SoftBCE",
    "TotalVariation",
    "VariationalInformation",
    "as_classes",
    "loss",
]
