"""The data set of a config."""

import functools
import json
from typing import Any

from jdistill.data.base import Dataset
from jdistill.registry import build


def load_dataset(config: dict[str, Any]) -> Dataset:
    """The data set that the node `data` of a config describes, read once a process."""
    return _dataset(json.dumps(config["data"]))


@functools.lru_cache(maxsize=8)
def _dataset(node: str) -> Dataset:
    return build("data", json.loads(node))
