"""Interactions of users with items: logs, splits, and published data as options of the config group `data`."""

from jdistill.data.interactions.amazon import amazon
from jdistill.data.interactions.build import build_interactions
from jdistill.data.interactions.citeulike import citeulike
from jdistill.data.interactions.log import Interactions
from jdistill.data.interactions.movielens import movielens
from jdistill.data.interactions.own import interactions_file
from jdistill.data.interactions.retailrocket import retailrocket
from jdistill.data.interactions.splits import Rows

__all__ = [
    "Interactions",
    "Rows",
    "amazon",
    "build_interactions",
    "citeulike",
    "interactions_file",
    "movielens",
    "retailrocket",
]
