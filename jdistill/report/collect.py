"""Run folders into one table: `collect` reads `result.json` and `jobs.jsonl`, one row a job, none dropped."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jdistill.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    import pandas as pd

Record = dict[str, Any]

RESULT, JOBS, CURVES = "result.json", "jobs.jsonl", "metrics.jsonl"
_FIRST = ("path", "sweep", "job", "status", "error", "overrides")
SCHEDULE = {"name", "start", "end", "epochs", "delay"}  # the keys of a schedule (jdistill.schedules)


def collect(paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> pd.DataFrame:
    """One row a job of every given sweep or run folder, with flat dotted columns.

    Columns: `path`, `sweep` (None for a single run), `job`, `status`, `error`, `overrides` (a list), then everything in
    `result.json` (`choices.loss`, `config.loss.temperature`, `metrics.test.accuracy`, `size.bytes`, ...); lists are
    written as JSON text. `status` is `finished`, `failed`, `diverged`, `pruned` (stopped by a search), `running`,
    `pending`, or, where the file is the problem, `unreadable` or `missing`, with the reason in `error`. A readable
    `result.json` decides over `jobs.jsonl`, since a run writes it last. Jobs without a result take their choices and
    config from their overrides, and from what all other jobs of the sweep agree on.

    Raises:
      UsageError: a path that is neither a run folder nor a sweep folder.
    """
    given = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    records: list[Record] = []
    seen: set[Path] = set()
    for path in map(Path, given):
        if path.resolve() in seen:
            continue
        seen.add(path.resolve())
        found = read_sweep(path) if (path / JOBS).is_file() else [read_run(_run_folder(path))]
        records += [r for r in found if r["sweep"] is None or not _repeated(r, seen)]
    _fill_unfinished(records)
    return as_frame(records)


def as_frame(records: list[Record]) -> pd.DataFrame:
    """Flat records as a frame with the columns and dtypes that `collect` gives."""
    import pandas as pd

    columns = list(dict.fromkeys([*_FIRST, *(name for record in records for name in record)]))
    data = {}
    for name in columns:
        values = [record.get(name) for record in records]
        # Configuration keeps its own types (a seed stays an int where another job has none).
        kind = object if name.startswith(("choices.", "config.")) or name in _FIRST else None
        data[name] = pd.Series(values, dtype=kind)
    return pd.DataFrame(data)


def read_jobs(sweep: str | os.PathLike[str]) -> list[Record]:
    """The jobs of `jobs.jsonl`, one record a job number, by number; later lines supersede earlier ones.

    A line cut short by a kill is ignored where it is the last one (also if a resumed sweep went on writing behind it);
    any other unreadable line gives a record of status `unreadable` without a job number.

    Raises:
      UsageError: the file does not exist.
    """
    path = Path(sweep) / JOBS
    if not path.is_file():
        raise UsageError(f"{sweep}: not a sweep folder: it has no {JOBS}{_sibling(Path(sweep))}")
    jobs: dict[int, Record] = {}
    broken: list[Record] = []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, text in enumerate(lines, start=1):
        if not text.strip():
            continue
        line = _parse_line(text)
        if line is not None:
            old = jobs.get(line["job"], {})
            if line.get("status") in ("running", "pending"):
                old = {k: v for k, v in old.items() if k not in ("started", "ended", "error")}
            jobs[line["job"]] = {**old, **line}
        elif number < len(lines):  # the text after the last newline is a line that was being written
            error = f"{JOBS} line {number} is not a JSON job record"
            broken.append({"job": None, "status": "unreadable", "error": error})
    return [jobs[n] for n in sorted(jobs)] + broken


def read_sweep(path: str | os.PathLike[str], jobs: list[Record] | None = None) -> list[Record]:
    """Flat records of all jobs of a sweep folder. `jobs`: what `read_jobs` gave, where it has been read already."""
    sweep, records = Path(path), []
    for job in read_jobs(sweep) if jobs is None else jobs:
        status, error = str(job.get("status", "pending")), job.get("error")
        record: Record = {"path": None, "status": status, "error": error}
        if job.get("dir"):
            record = read_run(sweep / str(job["dir"]))
            if record["status"] == "missing" and status != "finished":
                record.update(status=status, error=error)
        if not record.get("overrides"):
            record["overrides"] = job["overrides"] if isinstance(job.get("overrides"), list) else []
        records.append({**record, "sweep": str(sweep), "job": job.get("job")})
    return records


def read_run(folder: str | os.PathLike[str]) -> Record:
    """The flat record of one run folder; status `missing` or `unreadable`, with a reason, without a result."""
    path = Path(folder) / RESULT
    record: Record = {"path": str(folder), "sweep": None, "job": None, "overrides": []}
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {**record, "status": "missing", "error": f"no {RESULT} in {folder}"}
    except (OSError, ValueError) as problem:
        return {**record, "status": "unreadable", "error": f"{path}: {_one_line(problem)}"}
    if not isinstance(result, dict) or not isinstance(result.get("status"), str):
        return {**record, "status": "unreadable", "error": f"{path}: expected an object with the key 'status'"}
    overrides = result.pop("overrides", None)
    return {**record, **flatten(result), "overrides": list(overrides) if isinstance(overrides, list) else []}


def read_curves(folder: str | os.PathLike[str]) -> list[Record]:
    """The lines of a run's `metrics.jsonl`, flat (`validation.accuracy`); `[]` without it. Cut lines are skipped."""
    path = Path(folder) / CURVES
    records = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict):
            records.append({name.removeprefix("metrics."): value for name, value in flatten(line).items()})
    return records


def flatten(value: dict[str, Any], prefix: str = "") -> Record:
    """Nested dicts as one dict with dotted keys; lists become JSON text, so that every value can be compared.

    A schedule, which stands where a number may, becomes one text: `linear(start=0, end=1)`.
    """
    flat: Record = {}
    for key, item in value.items():
        if isinstance(item, dict) and "name" in item and set(item) <= SCHEDULE:
            flat[f"{prefix}{key}"] = f"{item['name']}({', '.join(f'{k}={v}' for k, v in item.items() if k != 'name')})"
        elif isinstance(item, dict) and item:
            flat.update(flatten(item, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = _written(item)
    return flat


def _parse_line(text: str) -> Record | None:
    # A resumed sweep may append behind a line that a kill cut short: the record is then the last object of the line.
    for start in (0, text.rfind('{"job"')):
        try:
            line = json.loads(text[start:]) if start >= 0 else None
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("job"), int):
            return line
    return None


def _run_folder(path: Path) -> Path:
    if (path / RESULT).is_file() or (path / CURVES).is_file():
        return path
    if path.is_file():
        raise UsageError(f"{path}: is a file; give the run or sweep folder that holds it ({path.parent})")
    what = f"is neither a run folder ({RESULT}) nor a sweep folder ({JOBS})" if path.is_dir() else "does not exist"
    inside = [child.name for child in sorted(path.iterdir()) if _is_ours(child)] if path.is_dir() else []
    if inside:
        shown = ", ".join(inside[:5]) + (", ..." if len(inside) > 5 else "")
        raise UsageError(f"{path}: {what}; it contains {len(inside)}: give those ({shown})")
    raise UsageError(f"{path}: {what}{_sibling(path)}")


def _sibling(path: Path) -> str:
    parent = path.absolute().parent
    names = [p.name for p in sorted(parent.iterdir()) if _is_ours(p)] if parent.is_dir() else []
    return did_you_mean(path.name, names)


def _is_ours(path: Path) -> bool:
    return (path / JOBS).is_file() or (path / RESULT).is_file()


def _repeated(record: Record, seen: set[Path]) -> bool:
    """Whether the run folder of this job was read before (a run and its sweep both given)."""
    if record["path"] is None:
        return False
    path = Path(record["path"]).resolve()
    known = path in seen
    seen.add(path)
    return known


def _fill_unfinished(records: list[Record]) -> None:
    """Gives jobs without a result the choices and config that their overrides and their sweep tell."""
    names = dict.fromkeys(name for record in records for name in record)
    # Choices first: a choice decides whose config fits.
    columns = [n for start in ("choices.", "config.") for n in names if n.startswith(start)]
    complete: dict[str | None, list[Record]] = {}
    for record in records:
        if any(name.startswith("choices.") for name in record):
            complete.setdefault(record["sweep"], []).append(record)
    agreed: dict[tuple[Any, str, Any], set[Any]] = {}
    groups = {name.removeprefix("choices.") for name in columns if name.startswith("choices.")}
    for record in records:
        if any(name.startswith("choices.") for name in record):
            continue
        for key, value in parse_overrides(record.get("overrides") or []).items():
            record[f"choices.{key}" if key in groups else f"config.{key}"] = value
        sweep = record["sweep"]
        siblings = complete.get(sweep, []) if sweep is not None else []
        for name in columns:
            scope = f"choices.{name.split('.')[1]}"
            choice = record.get(scope) if name.startswith("config.") else None
            if (sweep, name, choice) not in agreed:
                same = [s for s in siblings if choice is None or s.get(scope) == choice]
                agreed[sweep, name, choice] = {s.get(name) for s in same}
            values = agreed[sweep, name, choice]
            if name not in record and len(values) == 1 and name != "config.seed":
                record[name] = next(iter(values))


def parse_overrides(overrides: Iterable[str]) -> Record:
    """`["loss=kd", "seed=0", "student.widths=[64]"]` as `{"loss": "kd", "seed": 0, "student.widths": "[64]"}`.

    Prefixes `+` and `++` are dropped; deletions (`~key`), packages (`group@package=`) and `hydra.*` are left out.
    """
    parsed: Record = {}
    for text in overrides:
        key, equals, value = str(text).lstrip("+").partition("=")
        if equals and not key.startswith(("~", "hydra.", "hydra/")) and "@" not in key:
            parsed[key] = _value(value)
    return parsed


def _value(text: str) -> Any:
    try:
        value = json.loads(text)
    except ValueError:
        plain = {"true": True, "false": False, "null": None}
        return plain.get(text.lower(), text.strip("'\""))
    return _written(value)


def _one_line(problem: Exception) -> str:
    return " ".join(str(problem).split())


def _written(value: Any) -> Any:
    """Lists and dicts as the command line takes them: `[distill, {name: prune, sparsity: 0.9}]`."""
    return json.dumps(value).replace('"', "") if isinstance(value, list | dict) else value
