"""What is to be learned: losses on labels, and metrics."""

from jdistill.tasks.classification import Classification

__all__ = ["Classification"]
