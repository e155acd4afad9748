"""What a network costs once it is shipped: arithmetic, memory, time. See docs/measuring.md."""

from jdistill.measure.cost import memory_bytes, operations
from jdistill.measure.timing import BATCHES, latency

__all__ = ["BATCHES", "latency", "memory_bytes", "operations"]
