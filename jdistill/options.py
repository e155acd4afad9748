"""Importing this registers every option of every config group."""

from jdistill import compress, config, data, losses, method, models, optim, records, tasks

__all__ = ["compress", "config", "data", "losses", "method", "models", "optim", "records", "tasks"]
