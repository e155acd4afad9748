"""What a student may cost at most: `bytes=20000,latency_ms=0.5`, for searches and tables. Needs no JAX."""

import math
from collections.abc import Mapping
from typing import Any

from jdistill.errors import UsageError, unknown

COSTS = {
    "bytes": ("size", "bytes"),
    "nonzero": ("size", "nonzero"),
    "flops": ("cost", "flops"),
    "latency_ms": ("latency_ms", "1", "p50"),
}
"""What can be limited -> where it is in `result.json`. `latency_ms` is the median at batch 1; see docs/measuring.md."""

Budget = dict[str, float]


def read(given: Mapping[str, Any] | str | None, where: str) -> Budget:
    """A budget from text (`bytes=20000,flops=1e6`) or from a mapping; empty for None and for neither.

    `where` names the option in messages.

    Raises:
      UsageError: an unknown cost, or a limit that is not a positive number.
    """
    if isinstance(given, str):
        pairs = [pair.partition("=") for pair in given.split(",") if pair.strip()]
        given = {key.strip(): value for key, _, value in pairs}
    if given is not None and not isinstance(given, Mapping):
        raise UsageError(f"{where} must name costs and their limits, such as bytes and 20000, got {given!r}")
    limits = {}
    for key, value in (given or {}).items():
        if key not in COSTS:
            raise unknown(f"cost in {where}", str(key), COSTS)
        try:
            limit = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            limit = math.nan
        if not 0 < limit < math.inf:
            raise UsageError(f"{where}: {key} must be a positive number, such as {key}=20000, got '{value}'")
        limits[key] = limit
    return limits


def show(limits: Budget) -> str:
    """`bytes <= 20,000 and latency_ms <= 0.5`."""
    return " and ".join(f"{key} <= {number(limit)}" for key, limit in limits.items())


def number(value: float) -> str:
    """Whole numbers in full, others to six digits."""
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:.6g}"
