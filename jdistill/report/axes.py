"""How the axes of a figure are named and numbered."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jdistill.report.cells import is_percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def engineering(axes: Axes, x: str) -> None:
    """Writes large numbers of the x axis with prefixes (20 kB, 4 M), and a logarithmic axis without exponents."""
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    if axes.get_xscale() == "log":
        low, high = axes.get_xlim()
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high / low < 1e3 else (1.0,)))
        axes.xaxis.set_minor_formatter(NullFormatter())
    if x.endswith(("bytes", "parameters", "nonzero", "flops", "macs")):
        axes.xaxis.set_major_formatter(EngFormatter(unit="B" if x.endswith("bytes") else ""))
    elif axes.get_xscale() == "log":
        axes.xaxis.set_major_formatter("{x:g}")


def titles(axes: Axes, x: str, y: str) -> None:
    """Names both axes after the columns they show."""
    axes.set_xlabel(axis_title(x))
    axes.set_ylabel(axis_title(y))


def axis_title(column: str) -> str:
    """What an axis that shows a column of the frame is called."""
    known = {
        "size.bytes": "size on disk",
        "size.parameters": "parameters",
        "size.nonzero": "nonzero parameters",
        "latency_ms.1.p50": "median latency at batch 1 (ms)",
        "latency_ms.256.p50": "median latency at batch 256 (ms)",
        "cost.flops": "floating-point operations an example",
        "cost.macs": "multiply-accumulates an example",
        "cost.memory_bytes": "memory at batch 256",
    }
    name = column.removeprefix("metrics.")
    return known.get(column, name.replace(".", " ").replace("_", " ") + (" (%)" if is_percent(name) else ""))
