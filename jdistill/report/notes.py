"""The footer of a table: what its numbers mean, and what a reader must know before comparing them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from jdistill.report import stats
from jdistill.report.baseline import Baseline
from jdistill.report.cells import is_percent
from jdistill.report.keys import SEED, missing

Record = dict[str, Any]
_REPORT = {
    "last": "last (after the final epoch)",
    "best_val": "best_val (chosen on the validation set)",
    "best_test": "best_test: chosen on the test set, for reproducing papers only",
}


def footer(
    records: Sequence[Record],
    runs: Sequence[Record],
    rows: Sequence[Record],
    base: Baseline,
    metric: str,
    protocol: stats.Protocol,
    problems: Sequence[str],
) -> list[str]:
    """The lines under a table. `records`: all jobs; `runs`: without repeats; `problems`: from the comparisons."""
    finished = [run for run in runs if run["status"] == "finished"]
    lines = [f"mean ± sample standard deviation (ddof = 1) over n finished runs; metric: {metric}."]
    if base:
        lines.append(_test(rows, base, metric, protocol))
    lines += [_report(finished), *_teacher(finished, metric), *_machine(finished)]
    lines += [f"WARNING: {problem}." for problem in problems]
    return [line for line in [*lines, *_pooled(rows, finished, metric, len(records) - len(runs)), *_jobs(records)] if line]


def _test(rows: Sequence[Record], base: Baseline, metric: str, protocol: stats.Protocol) -> str:
    count = sum(not missing(row.get("p")) for row in rows)
    unit = " in percentage points," if is_percent(metric) else ""
    return (
        f"difference to the row with {base.text} and the same other keys:{unit} paired over common seeds, "
        f"{100 * protocol.level:g} % confidence interval (t, uncorrected); "
        f"p: two-sided {stats.TEST_TITLES[protocol.test]}, {stats.CORRECTIONS[protocol.correction]} over "
        f"{count} comparison{'s' * (count != 1)}; min. detectable: the difference such a t test finds with power "
        f"{protocol.power:g} at alpha = {protocol.alpha:g} (uncorrected)."
    )


def _report(finished: Sequence[Record]) -> str:
    found = Counter(str(run["report"]) for run in finished if not missing(run.get("report")))
    if not found:
        return ""
    if len(found) > 1:
        mixed = ", ".join(f"{count} {_REPORT.get(name, name)}" for name, count in sorted(found.items()))
        return f"WARNING: runs report different epochs, their metrics are not comparable: {mixed}."
    name = next(iter(found))
    return f"reported epoch: {_REPORT.get(name, name)}."


def _teacher(finished: Sequence[Record], metric: str) -> list[str]:
    """Each teacher's metric once (teachers are told apart by their hash); a range where there are many."""
    column = f"teacher.metrics.{metric}"
    teachers = {
        str(run.get("teacher.hash")): run
        for run in finished
        if not missing(run.get("teacher.hash")) and not missing(run.get(column))
    }
    name = metric.replace(".", " ").replace("_", " ")
    if not teachers:
        return []
    values = sorted(float(run[column]) for run in teachers.values())
    if len(values) > 1:
        return [f"teachers ({len(values)}): {name} {_value(values[0], metric)} to {_value(values[-1], metric)}."]
    run = next(iter(teachers.values()))
    whats = [what for what in ("parameters", "bytes") if not missing(run.get(f"teacher.{what}"))]
    sizes = [f"{run[f'teacher.{what}']:,.0f} {what}" for what in whats]
    return [f"teacher: {name} {_value(values[0], metric)}{', ' * bool(sizes)}{', '.join(sizes)}."]


def _value(value: float, metric: str) -> str:
    return f"{100 * value:.2f} %" if is_percent(metric) else f"{value:.4f}"


def _machine(finished: Sequence[Record]) -> list[str]:
    def found(*names: str) -> list[str]:
        columns = [f"environment.{name}" for name in names]
        texts = (" ".join(str(run[c]) for c in columns if not missing(run.get(c))) for run in finished)
        return sorted({text for text in texts if text})

    machines, versions, commits = found("machine", "device"), found("jax"), found("commit")
    dirty = any(run.get("environment.dirty") is True for run in finished)
    if not machines:
        return []
    lines = []
    if len(machines) == 1:
        parts = [f"machine: {machines[0]}", *(f"jax {v}" for v in versions[:1])]
        parts += [f"commit {c[:12]}" for c in commits[:1]]
        lines.append(", ".join(parts) + (" with uncommitted changes" if dirty else "") + ".")
    else:
        lines.append(f"WARNING: runs mix machines or devices, times are not comparable: {', '.join(machines)}.")
    lines += [f"WARNING: runs mix jax versions: {', '.join(versions)}."] if len(versions) > 1 else []
    lines += [f"WARNING: runs mix commits: {', '.join(c[:12] for c in commits)}."] if len(commits) > 1 else []
    return lines


def _pooled(rows: Sequence[Record], finished: Sequence[Record], metric: str, repeats: int) -> list[str]:
    lines = []
    pooled = sum(0 < len(row["by_seed"]) < row["n"] for row in rows)
    absent = sum(missing(run.get(f"metrics.{metric}")) for run in finished)
    seedless = sum(missing(run.get(SEED)) for run in finished)
    if repeats:
        lines.append(f"{repeats} repeated run{'s' * (repeats != 1)} (same fingerprint and seed) counted once.")
    if absent:
        lines.append(f"WARNING: {absent} finished run{'s' * (absent != 1)} without {metric}: not in its mean.")
    if pooled and not absent:
        lines.append("WARNING: rows hold several runs of the same seed: n counts runs; tests use their mean a seed.")
    if seedless:
        lines.append(f"WARNING: {seedless} run{'s' * (seedless != 1)} without a seed: not in the paired comparisons.")
    return lines


def _jobs(records: Sequence[Record]) -> list[str]:
    statuses = Counter(record["status"] for record in records)
    if set(statuses) == {"finished"}:
        return []
    parts = ", ".join(f"{count} {status}" for status, count in statuses.most_common())
    error = frequent_error([record for record in records if record["status"] != "pruned"])
    why = f"; most frequent error: {error[:200]}" if error else ""
    return [f"jobs: {len(records)} in all, {parts}{why}."]


def frequent_error(runs: Sequence[Record]) -> str:
    """The most frequent error, on one line, or an empty text. Why runs were pruned counts only where none failed."""
    failed = [run for run in runs if run["status"] != "pruned"]
    for some in (failed, runs):
        errors = Counter(" ".join(str(run["error"]).split()) for run in some if not missing(run.get("error")))
        if errors:
            return errors.most_common(1)[0][0]
    return ""
