"""`jdistill latency RUN ...`: finished runs and exported models, timed in turns in one process."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jdistill.checkpoint import write_atomically
from jdistill.errors import UsageError
from jdistill.measure.interleaved import Subject, interleaved, load_average, one_core
from jdistill.measure.timing import BATCHES, require_batches
from jdistill.report.cells import Column, Table
from jdistill.report.render import render

FORMATS = {".md": "markdown", ".csv": "csv", ".tex": "latex", ".txt": "text", ".json": "json"}
_NUMBERS = {  # key of a row -> title
    "p50": "p50 (ms)",
    "p90": "p90 (ms)",
    "p99": "p99 (ms)",
    "cpu50": "CPU p50 (ms)",
    "throughput": "examples/s",
}
COLUMNS = (
    Column("model", "model", "key", {"model": "model"}),
    Column("runtime", "runtime", "key", {"runtime": "runtime"}),
    Column("batch", "batch", "count", {"batch": "batch"}),
    *(Column(key, title, "number", {key: key}) for key, title in _NUMBERS.items()),
    Column("repeats", "calls", "count", {"repeats": "repeats"}),
    *(
        Column(key, f"{title} over first [95 % CI]", "ratio", {name: name for name in (key, f"{key}.low", f"{key}.high")})
        for key, title in (("ratio", "time"), ("cpu_ratio", "CPU time"))
    ),
)


def compare(
    paths: Sequence[Path],
    batches: Sequence[int] = BATCHES,
    repeats: int = 200,
    rounds: int = 10,
    runtimes: Sequence[str] = ("jax",),
    out: Sequence[Path] = (),
) -> str:
    """Times models in one process, in turns (see `interleaved`); returns the table as text, after writing it to `out`.

    Args:
      paths: folders of finished runs, and of models that `jdistill export` wrote; times are compared with the first's.
      batches: rows at once.
      repeats, rounds: counted calls of each model at each batch size, and turns that they are divided into.
      runtimes: what each run is timed in: `jax`, or the name of a folder in its `export`, such as `onnx`.
      out: files; the suffix of each decides its format: `.md`, `.csv`, `.tex`, `.txt` or `.json`.

    Raises:
      UsageError: a folder that is neither, an export that was not compared with JAX at a batch size, a wrong number or suffix.
    """
    _check(paths, batches, repeats, rounds, out)
    places = list(dict.fromkeys(place for path in paths for place in _places(path, runtimes)))
    with one_core() as alone:
        subjects = load(places, batches)
        before = load_average()
        rows = [row for size in batches for row in interleaved(subjects, size, repeats, rounds)]
        about = _about(alone, before, rounds)
    table = Table(COLUMNS, tuple(rows), tuple(_footer(about)), "p50")
    for path in out:
        kind = FORMATS[path.suffix.lower()]
        text = json.dumps({"rows": rows, **about}, indent=1) + "\n" if kind == "json" else render(table, kind)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda temporary, text=text: temporary.write_text(text))  # type: ignore[misc]
    return "\n".join([render(table, "text"), *(f"written: {path}" for path in out)])


def _is_run(folder: Path) -> bool:
    return (folder / "result.json").is_file()


def _places(path: Path, runtimes: Sequence[str]) -> list[Path]:
    """The folders that `path` stands for: of a run, one for each runtime."""
    if not _is_run(path):
        return [path]
    places = [path if runtime == "jax" else path / "export" / runtime for runtime in runtimes]
    for place in places:
        if not place.is_dir():
            raise UsageError(f"{place} is not there; make it first: jdistill export {path} --to {place.name}")
    return places


def load(paths: Sequence[Path], batches: Sequence[int]) -> list[Subject]:
    """The models of run folders, and of those that `jdistill export` wrote, which are timed on the first run's data.

    Raises:
      UsageError: a folder is neither, or none is a run; an export that was not compared with JAX at a batch size.
    """
    runs = {path: _of_run(path) for path in paths if _is_run(path)}
    if runs:
        rows = next(iter(runs.values())).inputs
    else:  # exported models alone
        run = next((path.parent.parent for path in paths if _is_run(path.parent.parent)), None)
        if run is None:
            raise UsageError(f"{paths[0]} holds no result.json; give a finished run's folder too: models are given its data")
        rows = _of_run(run).inputs
    return [runs[path] if path in runs else _of_export(path, rows, batches) for path in paths]


def _of_run(folder: Path) -> Subject:
    import jax

    import jdistill.options  # noqa: F401 (registers every option)
    from jdistill.environment import use_compilation_cache
    from jdistill.export.model import read_run
    from jdistill.paths import cache_folder
    from jdistill.train import forward

    use_compilation_cache(cache_folder("") / "compiled")
    run = read_run(folder)
    variables = jax.device_put(run.variables)
    dataset = run.blueprint.dataset
    program = forward(run.model, dataset.preprocess)
    return Subject(str(folder), "jax", lambda raw: np.asarray(program(*variables, raw)), dataset.test["inputs"])


def _of_export(folder: Path, rows: np.ndarray, batches: Sequence[int]) -> Subject:
    from jdistill.export.runtimes import load

    runner = load(folder)
    for size in batches:
        if not runner.passed(size):
            raise UsageError(
                f"{folder}: not known to give what JAX gives at batch {size}, so that its time would mean nothing;"
                f" export it with --batch {size}"
            )
    return Subject(str(folder), runner.card["runtime"], lambda raw: runner(*runner.inputs(raw)), rows)


def _check(paths: Sequence[Path], batches: Sequence[int], repeats: int, rounds: int, out: Sequence[Path]) -> None:
    for path in paths:
        if not path.is_dir():
            raise UsageError(f"{path} is no folder; give folders of finished runs or of exported models")
        if (path / "jobs.jsonl").is_file():
            raise UsageError(f"{path} is a sweep; give the folders of the runs in it that are to be compared")
    if len(set(paths)) < len(paths):
        raise UsageError("a folder is given twice; each model is timed once")
    require_batches(batches)
    if repeats < 1 or rounds < 2:
        raise UsageError(f"--repeats must be at least 1 and --rounds at least 2, got {repeats} and {rounds}")
    for path in out:
        if path.suffix.lower() not in FORMATS:
            raise UsageError(f"--out {path}: cannot write '{path.suffix}'; use {', '.join(FORMATS)}")


def _about(alone: bool, before: float | None, rounds: int) -> dict[str, Any]:
    from jdistill.environment import environment

    return {"one_core": alone, "load_average": [before, load_average()], "rounds": rounds, "environment": environment()}


def _footer(about: dict[str, Any]) -> list[str]:
    found, loads = about["environment"], [load for load in about["load_average"] if load is not None]
    threads = "on one core" if about["one_core"] else "on as many cores as the runtimes take (this system cannot limit them)"
    load = f", load average {' to '.join(f'{value:.1f}' for value in loads)}" if loads else ""
    return [
        f"NumPy in, NumPy out; {about['rounds']} rounds in turns {threads}; a ratio under 1.3 may be noise on a shared machine",
        f"{found['machine']}, {found['system']}, {found['device_kind']}, jax {found['jax']}{load}",
    ]
