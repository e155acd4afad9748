"""Losses: each a frozen pytree of numbers, registered as an option of the config group `loss`."""

from jdistill.losses._layers import at_least_float32
from jdistill.losses.base import Loss, loss
from jdistill.losses.boundaries import ActivationBoundaries, OverhauledFeatures
from jdistill.losses.collaborative import BidirectionalDistillation, CollaborativeDistillation, UnbiasedDistillation
from jdistill.losses.contrast import ContrastiveConsistent, ContrastiveRepresentation
from jdistill.losses.decoupled import DIST, DKD, MLKD, NKD
from jdistill.losses.divergences import JensenShannon, ReverseKL, SkewKL, SoftBCE, TotalVariation
from jdistill.losses.entities import DistillationExperts, FullTopology, HierarchicalTopology
from jdistill.losses.factors import FactorTransfer
from jdistill.losses.features import Attention, Hint
from jdistill.losses.gating import HoldsGate
from jdistill.losses.generation import MaskedGeneration
from jdistill.losses.gradients import GradientAttention, InputGradient, JacobianMatching
from jdistill.losses.graphs import InstanceRelationshipGraph
from jdistill.losses.labels import HardLabel, LabelSmoothing, TeacherFree
from jdistill.losses.listwise import (
    BayesianPersonalisedRanking,
    ListMLE,
    ListSoftmax,
    PairwiseLogistic,
    PointwiseBCE,
    SampledSoftmax,
    SquaredError,
)
from jdistill.losses.listwise_kd import ListwiseKD, MarginMSE, RankDistil
from jdistill.losses.logits import KD, CrossEntropy, LogitMSE, NoDistillation, as_classes
from jdistill.losses.maps import FlowOfSolution, NeuronSelectivity, VariationalInformation
from jdistill.losses.ranked import ExpertsAndRanking, ItemRegularisedRanking, RankingDistillation, RelaxedRanking
from jdistill.losses.regression import Huber, SoftMSE, TeacherBounded
from jdistill.losses.relations import CorrelationCongruence, ProbabilisticTransfer, RelationalKD, SimilarityPreserving
from jdistill.losses.reuse import EncoderDecoder, SimKD
from jdistill.losses.review import KnowledgeReview
from jdistill.losses.spectra import SingularVectors
from jdistill.losses.weighting import CurriculumTemperature, WeightedSoftLabels
from jdistill.losses.wrappers import LogitStd, OnClasses, Residual, Sum

__all__ = [
    "DIST",
    "DKD",
    "KD",
    "MLKD",
    "NKD",
    "ActivationBoundaries",
    "Attention",
    "BayesianPersonalisedRanking",
    "BidirectionalDistillation",
    "CollaborativeDistillation",
    "ContrastiveConsistent",
    "ContrastiveRepresentation",
    "CorrelationCongruence",
    "CrossEntropy",
    "CurriculumTemperature",
    "DistillationExperts",
    "EncoderDecoder",
    "ExpertsAndRanking",
    "FactorTransfer",
    "FlowOfSolution",
    "FullTopology",
    "GradientAttention",
    "HardLabel",
    "HierarchicalTopology",
    "Hint",
    "HoldsGate",
    "Huber",
    "InputGradient",
    "InstanceRelationshipGraph",
    "ItemRegularisedRanking",
    "JacobianMatching",
    "JensenShannon",
    "KnowledgeReview",
    "LabelSmoothing",
    "ListMLE",
    "ListSoftmax",
    "ListwiseKD",
    "LogitMSE",
    "LogitStd",
    "Loss",
    "MarginMSE",
    "MaskedGeneration",
    "NeuronSelectivity",
    "NoDistillation",
    "OnClasses",
    "OverhauledFeatures",
    "PairwiseLogistic",
    "PointwiseBCE",
    "ProbabilisticTransfer",
    "RankDistil",
    "RankingDistillation",
    "RelationalKD",
    "RelaxedRanking",
    "Residual",
    "ReverseKL",
    "SampledSoftmax",
    "SimKD",
    "SimilarityPreserving",
    "SingularVectors",
    "SkewKL",
    "SoftBCE",
    "SoftMSE",
    "SquaredError",
    "Sum",
    "TeacherBounded",
    "TeacherFree",
    "TotalVariation",
    "UnbiasedDistillation",
    "VariationalInformation",
    "WeightedSoftLabels",
    "as_classes",
    "at_least_float32",
    "loss",
]
