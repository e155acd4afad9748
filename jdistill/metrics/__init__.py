"""Metrics of recommendation, search, yes/no and regression, and of agreement between two networks: NumPy, float64."""

from jdistill.metrics.agreement import kendall, kendall_of_tops, overlap_at_k
from jdistill.metrics.binary import binary_metrics
from jdistill.metrics.lists import list_metrics
from jdistill.metrics.ranking import popularity_groups, ranking_metrics
from jdistill.metrics.regression import regression_metrics

__all__ = [
    "binary_metrics",
    "kendall",
    "kendall_of_tops",
    "list_metrics",
    "overlap_at_k",
    "popularity_groups",
    "ranking_metrics",
    "regression_metrics",
]
