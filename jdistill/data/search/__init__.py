"""Search: graded lists of documents, and the features of (query, product) pairs."""

from jdistill.data.search.icecat import icecat, icecat_price
from jdistill.data.search.lambdarank import lambdarank
from jdistill.data.search.own import ranking
from jdistill.data.search.wands import wands

__all__ = ["icecat", "icecat_price", "lambdarank", "ranking", "wands"]
