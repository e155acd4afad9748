"""Which runs belong to one row: resolving the names of keys, finding those that vary, grouping."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from jdistill.errors import unknown
from jdistill.report.collect import parse_overrides

if TYPE_CHECKING:
    import pandas as pd

Record = dict[str, Any]
SEED = "config.seed"


def primary(frame: pd.DataFrame) -> str:
    """The metric that the runs' task is judged by: the first run's where they differ, `accuracy` where none says."""
    said = frame["primary"].dropna().tolist() if "primary" in frame else []
    return str(said[0]) if said else "accuracy"


def missing(value: Any) -> bool:
    """None and NaN: the run has no such key."""
    return value is None or (isinstance(value, float) and value != value)


def short(column: str) -> str:
    """`config.loss.temperature` -> `loss.temperature`, `choices.loss` -> `loss`."""
    return column.removeprefix("choices.").removeprefix("config.")


def resolve(columns: Iterable[str], key: str) -> str:
    """The column of a key: first the choice of that name, then the config key; full column names work too.

    Raises:
      UsageError: there is none; the message lists those there are.
    """
    columns = list(columns)
    for column in (f"choices.{key}", f"config.{key}", key):
        if column in columns and column.startswith(("choices.", "config.")):
            return column
    raise unknown("table key", key, {short(c) for c in columns if c.startswith(("choices.", "config."))})


def varying(records: Sequence[Record]) -> list[str]:
    """The columns by which the runs differ, except seeds, with an option's keys behind the option.

    A key of an option (`loss.temperature`) counts where it differs among the runs of that option. Keys the user did
    not set count only where the others and the seed do not determine them (an output folder, an interpolation).
    """
    columns = list(dict.fromkeys(n for r in records for n in r if n.startswith(("choices.", "config."))))
    columns.sort(key=lambda c: not c.startswith("choices."))
    names = {short(c): c for c in reversed(columns)}  # a choice hides a config key of the same name
    overridden = {key for r in records for key in parse_overrides(r.get("overrides") or [])}
    free = [c for c in columns if names[short(c)] == c and c.split(".")[-1] != "seed" and _varies(records, c)]
    chosen: list[str] = []
    for column in sorted(free, key=lambda c: short(c) not in overridden):
        if short(column) in overridden or not _determined(records, column, [*chosen, SEED]):
            chosen.append(column)
    groups = [short(c) for c in columns if c.startswith("choices.")]

    def place(column: str) -> tuple[int, int]:
        group = short(column).split(".")[0]
        return (groups.index(group) if group in groups else len(groups), columns.index(column))

    return sorted(chosen, key=place)


def group(records: Sequence[Record], columns: Sequence[str]) -> dict[tuple[Any, ...], list[Record]]:
    """Runs by the values of columns, in the order of first appearance; missing values are None."""
    rows: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        values = (record.get(c) for c in columns)
        rows.setdefault(tuple(None if missing(v) else v for v in values), []).append(record)
    return rows


def order(value: Any) -> tuple[int, Any]:
    """A sort key for mixed values: missing ones first, then numbers, then text."""
    if missing(value):
        return (0, 0)
    return (1, value) if isinstance(value, int | float) else (2, str(value))


def show(value: Any) -> str:
    """A key's value as text: `4` for 4.0, `-` where there is none."""
    if missing(value):
        return "-"
    return f"{value:g}" if isinstance(value, float) else str(value)


def label(columns: Sequence[str], values: Sequence[Any]) -> str:
    """A legend entry: choices by their value, config keys as `key=value`; missing ones left out."""
    parts = []
    for column, value in zip(columns, values, strict=True):
        if not missing(value):
            name = short(column).split(".")[-1]
            parts.append(show(value) if column.startswith("choices.") else f"{name}={show(value)}")
    return ", ".join(parts) or "all runs"


def _varies(records: Sequence[Record], column: str) -> bool:
    scope = f"choices.{short(column).split('.')[0]}" if column.startswith("config.") else ""
    values: dict[Any, set[Any]] = {}
    for record in records:
        if not missing(record.get(column)):
            values.setdefault(record.get(scope), set()).add(record[column])
    return any(len(found) > 1 for found in values.values())


def _determined(records: Sequence[Record], column: str, given: Sequence[str]) -> bool:
    known: dict[tuple[Any, ...], Any] = {}
    for record in records:
        value = record.get(column)
        if not missing(value) and known.setdefault(tuple(record.get(g) for g in given), value) != value:
            return False
    return True
