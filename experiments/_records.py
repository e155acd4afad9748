"""`runs.jsonl`: what is kept of the runs of an experiment, and how a later command's table is made with them."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from _common import METHOD, PROBLEM, Method, joined, portable
from hydra.core.override_parser.overrides_parser import OverridesParser

from jdistill.checkpoint import write_atomically
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
    lines = [portable(json.dumps(record(row), sort_keys=True)) + "\n" for row in frame.to_dict("records")]
    write_atomically(out / FILE, lambda path: path.write_text("".join(lines)))


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
        "--add",
        action="store_true",
        help="tables with the runs that --out records already, which are not made again, and weights as chosen for them; "
        "with --seeds 0 of those alone",
    )


def with_recorded(frame: pd.DataFrame, given: argparse.Namespace, *keys: str, out: Path | None = None) -> pd.DataFrame:
    """`frame`, with `--add` after it the runs that `runs.jsonl` of `out` (`given.out`) has of other rows and other seeds.

    Rows are told apart by method, problem and `keys` (columns). Of a row that `frame` has with other overrides, such as
    another weight of the loss, nothing is added, and standard error says so: a row is of one recipe. A recorded run gives
    way to a finished one alone.
    """
    path = (out or given.out) / FILE
    if not given.add or not path.is_file():
        return _some(frame, path)
    mine, columns = frame.to_dict("records"), (METHOD, PROBLEM, *keys)
    place = {(_row(run, columns), run[SEED]): number for number, run in enumerate(mine)}
    recipes = {_row(run, columns): _recipe(run) for run in mine}
    earlier, added, dropped, other = read_records(path), [], [], {}
    for number, run in enumerate(earlier.to_dict("records")):
        row = _row(run, columns)
        same = place.get((row, run[SEED]))
        if recipes.get(row, _recipe(run)) != _recipe(run):
            other[row] = ", ".join(filter(None, row))
        elif same is None or (run["status"] == "finished" != mine[same]["status"]):
            added.append(number)
            dropped += [] if same is None else [same]
    for name in other.values():
        print(f"{path}: not added: {name}: its overrides are not this command's", file=sys.stderr)
    return _some(joined([frame.drop(index=dropped), earlier.iloc[added]]), path)


def recorded(experiment: str, method: Method, given: argparse.Namespace, out: Path | None = None) -> Method:
    """`method` with, under `--add`, the finished runs that `runs.jsonl` of `out` (`given.out`) has of its recipe.

    As it is with no seeds asked for: then `with_recorded` takes all there is, in the file's order.
    """
    path = (out or given.out) / FILE
    if method.done is not None or not (given.add and given.seeds and path.is_file()):
        return method
    recipe = _as_recorded([f"experiment={experiment}", *method.overrides])
    runs = read_records(path)
    own = runs[[run["status"] == "finished" and _recipe(run) == recipe for run in runs.to_dict("records")]]
    return dataclasses.replace(method, done=own) if len(own) else method


def recorded_weight(given: argparse.Namespace, overrides: Iterable[str]) -> str | None:
    """With `--add` the override `loss.weight=` of the recorded runs that have `overrides` and only it and a seed besides."""
    own, path = _as_recorded(overrides), given.out / FILE
    for run in read_records(path).to_dict("records") if given.add and path.is_file() else ():
        recipe = _recipe(run)
        more = recipe - own
        if own < recipe and len(more) == 1 and min(more).startswith("loss.weight="):
            return min(more)
    return None


def read_records(path: Path) -> pd.DataFrame:
    """The runs of a `runs.jsonl` under the names that `collect` gives: of the configuration only what was overridden."""
    runs = []
    for number, text in enumerate(path.read_text().splitlines(), start=1):
        try:
            runs.append(_run(json.loads(text)))
        except (ValueError, KeyError, TypeError):
            sys.exit(f"{path} line {number}: expected a run as JSON, with its overrides, got {text[:60]!r}; delete the line")
    return as_frame(runs)


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


def _as_recorded(overrides: Iterable[str]) -> frozenset[str]:
    """The overrides as a sweep records them: 1e-3 as 0.001, ${seed} escaped, no spaces, the last one of a key."""
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    values = {override.get_key_element(): override.get_value_element_as_str() for override in parsed}
    return frozenset(f"{key}={value}" for key, value in values.items())


def _recipe(run: Mapping[str, Any]) -> frozenset[str]:
    return frozenset(override for override in run["overrides"] if not override.startswith("seed="))


def _some(frame: pd.DataFrame, path: Path) -> pd.DataFrame:
    """The frame, unless it is empty: then the program ends."""
    if not len(frame):
        sys.exit(f"no runs: --seeds is 0 and {path} {'has none' if path.is_file() else 'does not exist'}, or --add is missing")
    return frame
