"""Tables: one row per example, columns of numbers and categories."""

from jdistill.data.tables.behaviour import retailrocket_behaviour
from jdistill.data.tables.build import Splitting, build_table
from jdistill.data.tables.columns import Features
from jdistill.data.tables.credit_default import credit_default
from jdistill.data.tables.online_shoppers import online_shoppers
from jdistill.data.tables.own import ctr
from jdistill.data.tables.ratings import movielens_ratings

__all__ = [
    "Features",
    "Splitting",
    "build_table",
    "credit_default",
    "ctr",
    "movielens_ratings",
    "online_shoppers",
    "retailrocket_behaviour",
]
