"""A generated shop with known truth, as one option of the config group `data`."""

from jdistill.data.shop.truth import best_possible
from jdistill.data.shop.views import synthetic_shop

__all__ = ["best_possible", "synthetic_shop"]
