"""Losses: each a frozen pytree of numbers, registered as an option of the config group `loss`."""

from jdistill.losses.base import Loss, loss
from jdistill.losses.features import Attention, Hint
from jdistill.losses.logits import KD, CrossEntropy, LogitMSE, NoDistillation, as_classes

__all__ = ["KD", "Attention", "CrossEntropy", "Hint", "LogitMSE", "Loss", "NoDistillation", "as_classes", "loss"]
