"""Importing this registers every option of every config group."""

from jdistill import compress, config, data, estimators, losses, models, optim, parallel, records, schedules, schemes, tasks

__all__ = [
    "compress",
    "config",
    "data",
    "estimators",
    "losses",
    "models",
    "optim",
    "parallel",
    "records",
    "schedules",
    "schemes",
    "tasks",
]
