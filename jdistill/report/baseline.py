"""Which row a row of a table is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from jdistill.errors import UsageError, did_you_mean
from jdistill.report import keys

_TEACHER_KEYS = ("teacher", "scheme")


@dataclass(frozen=True)
class Baseline:
    """Conditions that mark baseline rows: column -> value as text; none at all: no comparisons."""

    conditions: dict[str, str] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.conditions)

    @property
    def text(self) -> str:
        return ", ".join(f"{keys.short(k)}={v}" for k, v in self.conditions.items())

    def holds(self, column: str, value: Any) -> bool:
        """Whether this value of a column is the baseline's; False for columns the baseline leaves open."""
        return column in self.conditions and _same(value, self.conditions[column])

    def mark(self, rows: Sequence[dict[str, Any]]) -> None:
        """Sets `baseline` of the rows that are baselines."""
        for row in rows:
            row["baseline"] = all(self.holds(k, row[k]) for k in self.conditions)

    def partner(self, row: dict[str, Any], rows: Sequence[dict[str, Any]], group_keys: Sequence[str]) -> dict[str, Any] | None:
        """The one baseline row with the same values of the other keys; None where there is none, or no single one.

        Keys a baseline row does not have need not agree, nor do keys of the baseline's own option (`loss.weight` for
        `loss=none`), nor, without distillation, the teacher and the scheme; all of these decide only between several.
        """
        loose = {keys.short(k) for k in self.conditions}
        if self.conditions.get("choices.loss") == "none":
            loose.update(_TEACHER_KEYS)
        others = [k for k in group_keys if k not in self.conditions]
        strict = [k for k in others if keys.short(k).split(".")[0] not in loose]
        found = [b for b in rows if b["baseline"] and all(b[k] is None or b[k] == row[k] for k in strict)]
        if len(found) > 1:
            found = [b for b in found if all(b[k] == row[k] for k in others)]
        return found[0] if len(found) == 1 else None


def parse_baseline(columns: Sequence[str], records: Sequence[dict[str, Any]], text: str | None, explicit_by: Any) -> Baseline:
    """Reads `loss=none` or `loss=none,compression=none`; `auto` is `loss=none` where it can be used.

    Raises:
      UsageError: not `key=value`, an unknown key, or a value no run has.
    """
    if text is None:
        return Baseline()
    if text == "auto":
        has = any(record.get("choices.loss") == "none" for record in records)
        wanted = [explicit_by] if isinstance(explicit_by, str) else explicit_by
        usable = wanted is None or "loss" in wanted or "choices.loss" in wanted
        return Baseline({"choices.loss": "none"}) if has and usable else Baseline()
    conditions = {}
    for part in text.split(","):
        key, equals, value = (t.strip() for t in part.partition("="))
        if not (key and equals and value):
            raise UsageError(f"baseline '{text}': expected key=value such as loss=none, got '{part.strip()}'")
        column = keys.resolve(columns, key)
        values = {keys.show(record.get(column)) for record in records if not keys.missing(record.get(column))}
        if not any(_same(record.get(column), value) for record in records):
            raise UsageError(
                f"baseline '{text}': no run has {key}={value}{did_you_mean(value, values)} (found: {', '.join(sorted(values))})"
            )
        conditions[column] = value
    return Baseline(conditions)


def _same(value: Any, text: str) -> bool:
    if isinstance(value, bool):
        return str(value).lower() == text.lower()
    if isinstance(value, int | float):
        try:
            return float(value) == float(text)
        except ValueError:
            return False
    return value is not None and str(value) == text
