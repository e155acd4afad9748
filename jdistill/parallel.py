"""How compiled steps are placed on devices: one device, or several. Nothing here changes what is computed."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from jdistill import train
from jdistill.pytrees import require_one_of, require_positive
from jdistill.registry import register
from jdistill.train import Parts, Programs
from jdistill.types import Batch, PyTree

STRATEGIES = ("auto", "loop", "block")


@register("parallel", "single")
@dataclasses.dataclass(frozen=True)
class Single:
    """One device.

    Attributes:
      strategy: steps one by one (`loop`), many in one call (`block`), or whichever is faster there (`auto`).
      device_bytes: the largest training set, in bytes, that is kept on the device; a larger one is sent batch by batch.
    """

    strategy: str = "auto"
    device_bytes: float = 4e9

    def __post_init__(self) -> None:
        require_one_of(STRATEGIES, strategy=self.strategy)
        require_positive(device_bytes=self.device_bytes)

    def programs(self, parts: Parts, members: int | None = None) -> Programs:
        """The compiled programs of `parts`, for one run, or for a population whose state has a leading axis of members."""
        return train.programs(parts, members is not None)

    def put(self, tree: PyTree, members: int | None = None) -> PyTree:
        """`tree` (of a population: with a leading axis of members) where the programs want it."""
        del members
        return tree

    def put_data(self, data: dict[str, Any]) -> Batch:
        """The training arrays [N, ...] on the device."""
        return {name: jnp.asarray(array) for name, array in data.items()}


__all__ = ["STRATEGIES", "Single"]
