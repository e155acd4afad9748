"""What is to be learned: losses on labels, and metrics."""

from jdistill.tasks.base import Task
from jdistill.tasks.classification import Classification, Click
from jdistill.tasks.lists import ListRanking
from jdistill.tasks.recommendation import NextItem, Recommend
from jdistill.tasks.regression import Regression

__all__ = ["Classification", "Click", "ListRanking", "NextItem", "Recommend", "Regression", "Task"]
