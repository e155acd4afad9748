"""Students that are not networks: `tree`, `gbt`, `linear_svm`."""

from jdistill.estimators.base import Estimator
from jdistill.estimators.linear import LinearSVM
from jdistill.estimators.trees import BoostedTrees, Tree

__all__ = ["BoostedTrees", "Estimator", "LinearSVM", "Tree"]
