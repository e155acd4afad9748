"""From runs to a table: one row a method, with seeds, differences to a baseline, sizes and times."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

from jdistill import budget as budgets
from jdistill.errors import UsageError, unknown
from jdistill.report import keys, stats
from jdistill.report.baseline import Baseline, parse_baseline
from jdistill.report.cells import Column, Table, is_percent, title
from jdistill.report.notes import footer, frequent_error
from jdistill.report.render import render

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["COLUMNS", "Table", "make_table", "render"]

UNFINISHED = ("running", "pending")
_NUMBERS = {  # name of the column: (title, column of the frame, kind)
    "parameters": ("parameters", "size.parameters", "whole"),
    "nonzero": ("nonzero", "size.nonzero", "whole"),
    "bytes": ("bytes", "size.bytes", "whole"),
    "latency_1": ("latency b=1 (ms)", "latency_ms.1.p50", "number"),
    "latency_256": ("latency b=256 (ms)", "latency_ms.256.p50", "number"),
    "train_s": ("train (s)", "time_s.train", "number"),
    "flops": ("FLOPs", "cost.flops", "whole"),
    "macs": ("MACs", "cost.macs", "whole"),
    "memory": ("memory b=256 (bytes)", "cost.memory_bytes", "whole"),
    "throughput": ("examples/s b=256", "latency_ms.256.throughput", "whole"),
    "cpu_1": ("CPU time b=1 (ms)", "latency_ms.1.cpu50", "number"),
    "cpu_256": ("CPU time b=256 (ms)", "latency_ms.256.cpu50", "number"),
}
_ASKED = ("flops", "macs", "memory", "throughput", "cpu_1", "cpu_256")  # shown only where asked for: a table is wide enough
COLUMNS = ("n", "failed", "pruned", "metric", "difference", "p", "detectable", "within", *_NUMBERS)
"""The names `columns` takes, besides metrics and numeric columns of the frame."""


def column_of(name: str) -> str:
    """The frame's column of a number of the table: `flops` -> `cost.flops`; any other name is itself."""
    return _NUMBERS[name][1] if name in _NUMBERS else name


def make_table(
    frame: pd.DataFrame,
    by: str | Sequence[str] | None = None,
    baseline: str | None = "auto",
    metric: str | None = None,
    metrics: Sequence[str] = (),
    columns: Sequence[str] | None = None,
    budget: Mapping[str, float] | str | None = None,
    test: str = "t",
    correction: str = "holm",
    level: float = 0.95,
    alpha: float = 0.05,
    power: float = 0.8,
) -> Table:
    """One row for each combination of the values of `by`, compared with a baseline by a paired test over seeds.

    Args:
      frame: from `collect`.
      by: keys that tell rows apart, resolved first among choices, then in the config: `loss`, `loss.temperature`.
        None: the keys that vary over the runs, except seeds.
      baseline: `key=value`, several joined by commas, such as `loss=none`. Each row is compared with the baseline row
        that has the same values of the other keys. `auto`: `loss=none` where such runs exist; None: no comparison.
      metric: the metric that is compared, `split.name`; None: the task's own, on the test split.
      metrics: more metrics to show, such as `teacher_agreement` (of the split of `metric`).
      columns: names out of `COLUMNS`, metrics, or numeric columns of the frame, in this order; None: all with data, save
        `flops`, `macs`, `memory`, `throughput`, `cpu_1` and `cpu_256`.
      budget: `bytes=20000,latency_ms=0.5` (see `jdistill.budget`): a column says which rows cost no more, in the mean.
      test, correction, level, alpha, power: see `stats.compare` and `stats.correct`.

    Raises:
      UsageError: an unknown key, baseline, metric, column, cost, test or correction; a frame without runs.
    """
    protocol = stats.Protocol(test, correction, level, alpha, power)
    limits = budgets.read(budget, "--budget")
    records: list[dict[str, Any]] = [{str(k): v for k, v in r.items()} for r in frame.to_dict("records")]
    if not records:
        raise UsageError("there are no runs to make a table of")
    names = list(map(str, frame.columns))
    metric = metric or f"test.{keys.primary(frame)}"
    main = metric = _metric(names, records, metric if "." in metric else f"test.{metric}")
    split = metric.rpartition(".")[0]

    def full(name: str) -> str:  # a metric without a split is of the split of `metric`
        return f"{split}.{name}" if f"metrics.{split}.{name}" in names else name

    asked = [full(c) for c in columns or ()]
    more = [*(full(m) for m in metrics), *(c for c in asked if f"metrics.{c}" in names and c != main)]
    shown = list(dict.fromkeys(_metric(names, records, m if "." in m else f"{split}.{m}") for m in more))
    base = parse_baseline(names, records, baseline, explicit_by=by)
    group_keys = _group_keys(names, records, by, base)
    numbers = {name: column for name, (_, column, _) in _NUMBERS.items()}
    numbers.update({c: c for c in asked if c not in COLUMNS and c not in (main, *shown)})
    _check_columns(frame, numbers)
    kept = {values: _once(runs) for values, runs in keys.group(records, group_keys).items()}
    rows = [_row(group_keys, values, runs, [main, *shown], numbers) for values, runs in kept.items()]
    rows.sort(key=lambda row: [(not base.holds(k, row[k]), keys.order(row[k])) for k in group_keys])
    _judge(rows, limits)
    problems = _compare(rows, base, group_keys, main, protocol) if base else []
    if limits and asked and "within" not in asked:
        asked.append("within")
    layout = _columns(rows, group_keys, main, shown, numbers, asked, base, protocol)
    notes = footer(records, list(chain(*kept.values())), rows, base, main, protocol, problems)
    if limits:
        notes.append(f"within: {budgets.show(limits)}, in the mean over the runs of a row")
    return Table(tuple(layout), tuple(rows), tuple(notes), main)


def _metric(names: Sequence[str], records: Sequence[dict[str, Any]], metric: str) -> str:
    known = [n.removeprefix("metrics.") for n in names if n.startswith("metrics.")]
    if metric not in known and any(r["status"] == "finished" for r in records):
        raise unknown("metric", metric, known)
    return metric


def _group_keys(
    names: Sequence[str], records: Sequence[dict[str, Any]], by: str | Sequence[str] | None, base: Baseline
) -> list[str]:
    if by is None:
        found = keys.varying(records)
        found += [k for k in base.conditions if k not in found]
        return found or [c for c in names if c == "choices.loss"]
    group_keys = [keys.resolve(names, key) for key in ([by] if isinstance(by, str) else by)]
    for key in base.conditions:
        if key not in group_keys:
            raise UsageError(
                f"baseline '{base.text}': its key '{keys.short(key)}' must be one of the table's keys; "
                f"add it to by (now: {', '.join(map(keys.short, group_keys)) or 'none'})"
            )
    return list(dict.fromkeys(group_keys))


def _check_columns(frame: pd.DataFrame, numbers: dict[str, str]) -> None:
    from pandas.api.types import is_numeric_dtype

    usable = [str(c) for c in frame.columns if is_numeric_dtype(frame[c])]
    for name, column in numbers.items():
        if name not in _NUMBERS and column not in usable:
            raise unknown("table column", name, [*COLUMNS, *usable])


def _once(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Counts a configuration that was run again (same fingerprint and seed) once: repeats are not further seeds."""
    kept: dict[Any, dict[str, Any]] = {}
    for i, run in enumerate(runs):
        known = run["status"] == "finished" and not keys.missing(run.get("fingerprint"))
        kept.setdefault((run["fingerprint"], run.get(keys.SEED)) if known else i, run)
    return list(kept.values())


def _row(
    group_keys: Sequence[str],
    values: Sequence[Any],
    runs: list[dict[str, Any]],
    metrics: Sequence[str],
    numbers: dict[str, str],
) -> dict[str, Any]:
    finished = [run for run in runs if run["status"] == "finished"]
    bad = Counter(run["status"] for run in runs if run["status"] not in ("finished", "pruned", *UNFINISHED))
    row: dict[str, Any] = dict(zip(group_keys, values, strict=True))
    row.update(n=len(finished), failed=sum(bad.values()), baseline=False)
    row["pruned"] = sum(run["status"] == "pruned" for run in runs)
    row["failed.text"] = str(row["failed"]) if set(bad) <= {"failed"} else _counts(bad)
    row["reason"] = _reason([run for run in runs if run["status"] != "finished"])
    for metric in metrics:
        found = _values(finished, f"metrics.{metric}")
        row[f"{metric}.mean"], row[f"{metric}.std"] = stats.mean_std(found)
    for name, column in numbers.items():
        row[name] = stats.mean_std(_values(finished, column))[0]
    row["costs"] = {name: stats.mean_std(_values(finished, ".".join(path)))[0] for name, path in budgets.COSTS.items()}
    row["by_seed"] = _by_seed(finished, f"metrics.{metrics[0]}")
    return row


def _judge(rows: Sequence[dict[str, Any]], limits: budgets.Budget) -> None:
    """Sets `within` of every row."""
    for row in rows:
        known = {key: row["costs"][key] for key in limits if not keys.missing(row["costs"][key])}
        beyond = any(cost > limits[key] for key, cost in known.items())
        row["within"] = False if beyond else True if limits and len(known) == len(limits) else None


def _values(runs: Sequence[dict[str, Any]], column: str) -> list[float]:
    return [float(run[column]) for run in runs if not keys.missing(run.get(column))]


def _by_seed(runs: Sequence[dict[str, Any]], column: str) -> dict[Any, float]:
    """The metric of each seed; where a row pools several runs of a seed, their mean."""
    seeds: dict[Any, list[float]] = {}
    for run in runs:
        if not keys.missing(run.get(column)) and not keys.missing(run.get(keys.SEED)):
            seeds.setdefault(run[keys.SEED], []).append(float(run[column]))
    return {seed: stats.mean_std(found)[0] for seed, found in seeds.items()}


def _counts(statuses: Counter[str]) -> str:
    return ", ".join(f"{count} {status}" for status, count in sorted(statuses.items(), key=lambda s: (-s[1], s[0])))


def _reason(runs: Sequence[dict[str, Any]]) -> str:
    """`failed (2), diverged (1): the most frequent error`."""
    counts = Counter(run["status"] for run in runs)
    text = ", ".join(f"{s} ({c})" for s, c in sorted(counts.items(), key=lambda s: (-s[1], s[0])))
    error = frequent_error(runs)
    return f"{text}: {error}" if error else text


def _compare(
    rows: list[dict[str, Any]], base: Baseline, group_keys: Sequence[str], metric: str, protocol: stats.Protocol
) -> list[str]:
    """Adds the comparison with its baseline to every row; returns what went wrong, for the footer."""
    base.mark(rows)
    compared, alone, undefined, shorter = [], 0, 0, 0
    for row in rows:
        partner = None if row["baseline"] else base.partner(row, rows, group_keys)
        if row["baseline"] or row["n"] == 0:
            continue
        if partner is None or partner["n"] == 0:
            alone += 1
            continue
        pairs = stats.pair(row["by_seed"], partner["by_seed"])
        c = stats.compare(*pairs, protocol.test, protocol.level, protocol.alpha, protocol.power)
        row.update(
            {
                "difference": c.difference,
                "difference.low": c.low,
                "difference.high": c.high,
                "pairs": c.n,
                "p.raw": c.p,
                "detectable": c.detectable,
            }
        )
        compared.append(row)
        undefined += c.n > 1 and keys.missing(c.low) and c.difference != 0
        shorter += c.n < min(row["n"], len(partner["by_seed"])) or c.n < 2
    for row, p in zip(compared, stats.correct([row["p.raw"] for row in compared], protocol.correction), strict=True):
        row["p"] = float(p)
    notes = {
        "{} without a baseline row of the same other keys that finished: not compared": alone,
        "{} with equal differences in all seeds: their spread is unknown, so no interval": undefined,
        "{} with fewer than 2 or fewer common seeds with the baseline than runs; see `pairs` in the CSV": shorter,
    }
    return [note.format(f"{k} row{'s' * (k != 1)}") for note, k in notes.items() if k]


def _columns(
    rows: Sequence[dict[str, Any]],
    group_keys: Sequence[str],
    main: str,
    shown: Sequence[str],
    numbers: dict[str, str],
    asked: Sequence[str],
    base: Baseline,
    protocol: stats.Protocol,
) -> list[Column]:
    known = {
        "n": Column("n", "n", "count", {"n": "n"}),
        "failed": Column("failed", "failed", "failed", {"failed": "failed", "reason": "reason"}),
        "pruned": Column("pruned", "pruned", "count", {"pruned": "pruned"}),
        "metric": _metric_column(main, "main"),
        **{m: _metric_column(m, "metric") for m in shown},
        **_comparison_columns(main, base, protocol),
        "within": Column("within", "within budget", "within", {"within": "within"}),
    }
    for name, column in numbers.items():
        text, _, kind = _NUMBERS.get(name, (column, column, "number"))
        known[name] = Column(name, text, kind, {name if column.startswith(("size.", "cost.")) else column: name})
    data = {"metric", "n", *shown, *(c for c in known if c not in _ASKED and any(not keys.missing(row.get(c)) for row in rows))}
    data -= {name for name in ("failed", "pruned") if not any(row[name] for row in rows)}
    names = [*asked, *(m for m in shown if m not in asked)] if asked else [c for c in known if c in data]
    group_columns = [Column(keys.short(k), keys.short(k), "key", {keys.short(k): k}) for k in group_keys]
    return group_columns + [known["metric" if c == main else c] for c in names]


def _metric_column(metric: str, kind: str) -> Column:
    raw = {f"{metric}.{part}": f"{metric}.{part}" for part in ("mean", "std")}
    return Column(metric, title(metric), kind, raw, 100.0 if is_percent(metric) else 1.0)


def _comparison_columns(main: str, base: Baseline, protocol: stats.Protocol) -> dict[str, Column]:
    scale = 100.0 if is_percent(main) else 1.0
    headers = ("difference", "difference.low", "difference.high", "pairs")
    names = {"holm": "Holm", "bonferroni": "Bonferroni", "bh": "BH", "none": "uncorrected"}
    against = f"difference to {base.text}" if base else "difference"
    return {
        "difference": Column(
            "difference", f"{against} [{100 * protocol.level:g} % CI]", "difference", {h: h for h in headers}, scale
        ),
        "p": Column("p", f"p ({names[protocol.correction]})", "p", {"p": "p", "p.raw": "p.raw"}),
        "detectable": Column("detectable", "min. detectable", "detectable", {"detectable": "detectable"}, scale),
    }
