"""What a table is, and how a raw number becomes the text of a cell."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jdistill.report.keys import missing, show

if TYPE_CHECKING:
    import pandas as pd

DASH = "-"
_REASON = 72  # characters of an error that fit a cell
_PERCENT = ("accuracy", "agreement")
_LOWER = ("cross_entropy", "loss", "error", "rmse", "mse", "mae", "ece", "nll", "brier", "kl", "perplexity", "log_loss")


@dataclass(frozen=True)
class Column:
    """A column: `name` as users ask for it, `kind` decides the text, `raw` maps CSV headers to keys of a row."""

    name: str
    title: str
    kind: str
    raw: dict[str, str]
    scale: float = 1.0


@dataclass(frozen=True)
class Table:
    """Rows of raw, unrounded numbers (fractions, not percent), columns that say how to show them, and a footer.

    A row's dict has the group keys under their column names (`choices.loss`), `n`, `failed`, `pruned`, `failed.text`,
    `reason`, `baseline` (whether it is the baseline), `<metric>.mean`, `<metric>.std`, `difference`, `difference.low`,
    `difference.high`, `pairs`, `p.raw`, `p`, `detectable`, `within` (the budget; None where there is none, or it is not
    known) and the means of all other numbers.
    """

    columns: tuple[Column, ...]
    rows: tuple[dict[str, Any], ...]
    footer: tuple[str, ...]
    metric: str

    @property
    def frame(self) -> pd.DataFrame:
        """The raw numbers with the headers of the CSV."""
        import pandas as pd

        raw = {header: key for column in self.columns for header, key in column.raw.items()}
        return pd.DataFrame({header: [row.get(key) for row in self.rows] for header, key in raw.items()})


def is_percent(metric: str) -> bool:
    """Whether a metric is shown in percent: accuracies and agreements."""
    return any(word in metric.split(".")[-1] for word in _PERCENT)


def lower_is_better(metric: str) -> bool:
    """Whether smaller values of a metric are better (errors and losses), judged by its name."""
    last = metric.split(".")[-1].lower()
    return any(last == word or last.endswith(f"_{word}") or last.startswith(f"{word}_") for word in _LOWER)


def title(metric: str) -> str:
    """`test.teacher_agreement` -> `test teacher agreement (%)`."""
    return metric.replace(".", " ").replace("_", " ") + (" (%)" if is_percent(metric) else "")


def cell(column: Column, row: dict[str, Any]) -> str:
    """The text of a cell (Unicode: `±`)."""
    return _KINDS[column.kind](column, row)


def _key(column: Column, row: dict[str, Any]) -> str:
    return show(row[next(iter(column.raw.values()))])


def _count(column: Column, row: dict[str, Any]) -> str:
    return str(row[column.name])


def _failed(column: Column, row: dict[str, Any]) -> str:
    return row["failed.text"]


def _metric(column: Column, row: dict[str, Any]) -> str:
    mean: Any = row.get(f"{column.name}.mean")
    std: Any = row.get(f"{column.name}.std")
    if missing(mean):
        return DASH
    text = _fixed(mean, column.scale)
    return text if missing(std) else f"{text} ± {_fixed(std, column.scale)}"


def _main(column: Column, row: dict[str, Any]) -> str:
    """The table's metric: a row without any finished run says why."""
    reason = row["reason"]
    if row["n"] or not reason:
        return _metric(column, row)
    return reason if len(reason) <= _REASON else f"{reason[: _REASON - 3]}..."


def _difference(column: Column, row: dict[str, Any]) -> str:
    if row["baseline"]:
        return "baseline"
    if missing(row.get("difference")):
        return DASH
    mean, low, high = (row[f"difference{end}"] for end in ("", ".low", ".high"))
    text = _fixed(mean, column.scale, "+")
    return text if missing(low) else f"{text} [{_fixed(low, column.scale, '+')}, {_fixed(high, column.scale, '+')}]"


def _p(column: Column, row: dict[str, Any]) -> str:
    p: Any = row.get("p")
    if missing(p):
        return DASH
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def _detectable(column: Column, row: dict[str, Any]) -> str:
    value: Any = row.get("detectable")
    return DASH if missing(value) else _fixed(value, column.scale)


def _within(column: Column, row: dict[str, Any]) -> str:
    return {True: "yes", False: "no"}.get(row["within"], DASH)


def _ratio(column: Column, row: dict[str, Any]) -> str:
    """A ratio and its confidence interval; of the row that the others are compared with, what it is."""
    if row["baseline"]:
        return "first"
    mean, low, high = (row[f"{column.name}{end}"] for end in ("", ".low", ".high"))
    return f"{mean:.2f}" if missing(low) else f"{mean:.2f} [{low:.2f}, {high:.2f}]"


def _whole(column: Column, row: dict[str, Any]) -> str:
    value: Any = row.get(column.name)
    return DASH if missing(value) else f"{value:,.0f}"


def _number(column: Column, row: dict[str, Any]) -> str:
    """Three significant digits, without exponents in the usual range."""
    value: Any = row.get(column.name)
    if missing(value):
        return DASH
    if not math.isfinite(value) or value == 0:
        return f"{value:g}"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{digits}f}" if digits <= 6 else f"{value:.2e}"


def _fixed(value: float, scale: float, sign: str = "") -> str:
    text = f"{value * scale:{sign}.{2 if scale == 100 else 4}f}"
    return text if any(c in "123456789" for c in text) or not math.isfinite(value) else text.lstrip("+-")


_KINDS: dict[str, Callable[[Column, dict[str, Any]], str]] = {
    "key": _key,
    "count": _count,
    "failed": _failed,
    "main": _main,
    "metric": _metric,
    "difference": _difference,
    "p": _p,
    "detectable": _detectable,
    "within": _within,
    "ratio": _ratio,
    "whole": _whole,
    "number": _number,
}
