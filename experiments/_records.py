"""`runs.jsonl`: what is kept of the runs of an experiment, and how a later command's table is made with them."""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from _common import METHOD, PROBLEM, portable

from jdistill.report.collect import as_frame, parse_overrides
from jdistill.report.keys import SEED

FILE = "runs.jsonl"
CURVE = "curve"  # a metric by epoch: {"epoch": [...], NAME: [...]}
_RECORDED = ("metrics.", "size.", "cost.", "teacher.metrics.", "teacher.size.", "environment.", "data.", "time_s.")
_RUN = ("status", "error", "fingerprint", "report", "epoch", "steps", SEED, "teacher.hash", "teacher.name", "derived", CURVE)
_TIMES = tuple(f"latency_ms.{batch}.{which}" for batch in (1, 256) for which in ("p50", "cpu50"))
_ALSO = (*_RUN, *_TIMES, "config.data.fold", "tried")


def write_records(out: Path, frame: pd.DataFrame) -> None:
    """Writes `runs.jsonl`: for every run what the table was made from, and where it came from."""
    out.mkdir(parents=True, exist_ok=True)
    lines = [portable(json.dumps(record(row), sort_keys=True)) for row in frame.to_dict("records")]
    (out / FILE).write_text("\n".join(lines) + "\n")


def record(row: Mapping[str, Any]) -> dict[str, Any]:
    """One run as a flat line without its folder."""
    kept = {k: row[k] for k in row if k in (METHOD, PROBLEM, *_ALSO) or k.startswith(_RECORDED)}
    kept = {str(k).removeprefix("choices.").removeprefix("config."): plain(v) for k, v in kept.items()}
    return {"overrides": list(row["overrides"]), **{k: v for k, v in kept.items() if v is not None}}


def plain(value: Any) -> Any:
    """A JSON value; NaN, which is what a frame has for "none", becomes None."""
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and value != value else value


def add_option(parser: argparse.ArgumentParser) -> None:
    """The option `--add` of the experiments whose rows are too costly to be made by one command."""
    parser.add_argument(
        "--add", action="store_true", help="tables with the runs that --out records already; with --seeds 0 of those alone"
    )


def with_recorded(frame: pd.DataFrame, given: argparse.Namespace, *keys: str, out: Path | None = None) -> pd.DataFrame:
    """`frame`, with `--add` after it the runs that `runs.jsonl` of `out` (`given.out`) has of other rows and other seeds.

    Rows are told apart by method, problem and `keys` (columns). Of a row that `frame` has with other overrides, such as
    another weight of the loss, nothing is added, and standard error says so: a row is of one recipe.
    """
    path = (out or given.out) / FILE
    if not given.add or not path.is_file():
        return _some(frame, path)
    earlier, columns = read_records(path), (METHOD, PROBLEM, *keys)
    mine = [(_row(run, columns), _recipe(run), run.get(SEED)) for run in frame.to_dict("records")]
    known, recipes = {(row, seed) for row, _, seed in mine}, {row: recipe for row, recipe, _ in mine}
    keep, other = [], set()
    for run in earlier.to_dict("records"):
        row = _row(run, columns)
        agrees = recipes.get(row, _recipe(run)) == _recipe(run)
        keep.append(agrees and (row, run[SEED]) not in known)
        if not agrees:
            other.add(", ".join(filter(None, row)))
    for row in sorted(other):
        print(f"{path}: not added: {row}: its overrides are not this command's", file=sys.stderr)
    frames = [part for part in (frame, earlier[keep]) if len(part)]
    return _some(pd.concat(frames, ignore_index=True) if frames else frame, path)


def read_records(path: Path) -> pd.DataFrame:
    """The runs of a `runs.jsonl` under the names that `collect` gives: of the configuration only what was overridden."""
    return as_frame([_run(json.loads(line)) for line in path.read_text().splitlines()])


def _run(line: dict[str, Any]) -> dict[str, Any]:
    names = {"method": METHOD, "problem": PROBLEM, "seed": SEED, "data.fold": "config.data.fold"}
    chosen = {
        f"{'config' if '.' in key else 'choices'}.{key}": value
        for key, value in parse_overrides(line["overrides"]).items()
        if key != "seed"
    }
    return {**chosen, **{names.get(key, key): value for key, value in line.items()}}


def _row(run: Mapping[str, Any], columns: Sequence[str]) -> tuple[str, ...]:
    return tuple("" if plain(run.get(column)) is None else str(run[column]) for column in columns)


def _recipe(run: Mapping[str, Any]) -> frozenset[str]:
    return frozenset(override for override in run["overrides"] if not override.startswith("seed="))


def _some(frame: pd.DataFrame, path: Path) -> pd.DataFrame:
    """The frame, unless it is empty: then the program ends."""
    if not len(frame):
        sys.exit(f"no runs: --seeds is 0 and {path} {'has none' if path.is_file() else 'does not exist'}, or --add is missing")
    return frame
