"""The commands that make a table's rows again."""

import shlex
from collections.abc import Sequence
from typing import Any

import pandas as pd

from jdistill.report import keys
from jdistill.report.cells import Table


def commands(frame: pd.DataFrame, table: Table) -> list[str]:
    """One line a row of `table`, made from `frame`: `jdistill -m` with the overrides of its runs and their seeds.

    Where runs of a row differ in more than their seeds, one line a run. Run anywhere, with the same data and versions, they
    give the row's numbers; a run that was trained in a population is best repeated with that population's other members,
    since the last bits of `vmap` depend on their number.
    """
    columns = [key for key in table.rows[0] if key.startswith(("choices.", "config.")) and key in frame]
    records: list[dict[str, Any]] = [{str(k): v for k, v in r.items()} for r in frame.to_dict("records")]
    found = keys.group([r for r in records if r["status"] == "finished"], columns)
    lines: list[str] = []
    for row in table.rows:
        lines += _lines(found.get(tuple(None if keys.missing(row[c]) else row[c] for c in columns), []))
    return lines


def _lines(runs: Sequence[dict[str, Any]]) -> list[str]:
    made: dict[tuple[str, ...], list[int]] = {}
    for run in runs:
        rest = tuple(override for override in run["overrides"] if not override.startswith("seed="))
        made.setdefault(rest, []).append(int(run[keys.SEED]))
    lines = []
    for rest, seeds in made.items():
        many = ["-m"] if len(seeds) > 1 else []
        lines.append(shlex.join(["jdistill", *many, *rest, f"seed={','.join(map(str, sorted(set(seeds))))}"]))
    return lines
