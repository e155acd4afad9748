"""What a sweep costs a job beside its training: 1,000 jobs of one step each, by phase.

    python benchmarks/sweep_overhead.py [--jobs 1000] [--out FILE]

A real `jdistill -m` over seeds, temperatures and weights (digits, MLP 64-8-10, one step of batch 1024, kd from one teacher
that is trained before), its functions wrapped in clocks, one worker, so that units do not overlap. `compose`, `check`,
`group`, `record` (jobs.jsonl and the display), `replay` and `report` are what a sweep adds to its runs; `start` (Python,
JAX, Hydra) is paid once. Within units: `fit` trains, `deploy` writes and measures the artifact, `other` is the rest: run
folders, `result.json`, reading the config. The last line is all time outside units and after the start, a job.
"""

import argparse
import functools
import importlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from _common import finish, fresh, jdistill, options, report, results, table, workplace

STUDENT = (
    "data=digits", "data.validation=0", "student=mlp", "student.widths=[8]", "teacher=mlp", "teacher.optim.epochs=1",
    "loss=kd", "optim.batch_size=1024", "optim.epochs=1", "evaluate.latency=false",
)  # fmt: skip
PHASES = {
    "compose": ("jdistill.sweep.compose:Composer.job",),
    "check": ("jdistill.sweep.launch:check_all",),
    "group": ("jdistill.sweep.plan:plan_units",),
    "record": (
        "jdistill.sweep.launch:JobBook.__init__",
        "jdistill.sweep.launch:JobBook.note",
        "jdistill.sweep.launch:Display.job",
    ),
    "replay": ("jdistill.sweep.launch:Replay.__call__",),
    "report": ("jdistill.sweep.launch:summarize",),
    "units": ("jdistill.sweep.executors.threads:run_unit",),
    "fit": ("jdistill.run:fit",),
    "deploy": ("jdistill.run:deploy",),
    "launch": ("jdistill.sweep.launch:launch",),
}
"""Phase -> the functions, as the module that calls them names them."""

OUTSIDE = ("compose", "check", "group", "record", "replay", "report")


def clocked(function: Callable[..., Any], phase: str, spent: dict[str, float]) -> Callable[..., Any]:
    """`function`, its time added to `spent[phase]`."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            spent[phase] += time.perf_counter() - started

    return call


def wrap(spent: dict[str, float]) -> None:
    """Puts a clock around every function of `PHASES`."""
    for phase, places in PHASES.items():
        spent[phase] = 0.0
        for place in places:
            module, _, path = place.partition(":")
            owner: Any = importlib.import_module(module)
            *parents, name = path.split(".")
            for parent in parents:
                owner = getattr(owner, parent)
            setattr(owner, name, clocked(getattr(owner, name), phase, spent))


def command(out: Path, arguments: list[str]) -> None:
    """The command `jdistill` with its clocks, in this process; seconds by phase as JSON."""
    from jdistill.cli import main

    spent: dict[str, float] = {}
    wrap(spent)
    try:
        main(arguments)
    finally:
        out.write_text(json.dumps(spent))


def cube(jobs: int) -> tuple[str, str, str]:
    """Overrides that make `jobs` jobs of 10 temperatures, 10 weights and as many seeds as it takes."""
    seeds = jobs // 100
    tenths = ",".join(str((i + 1) / 10) for i in range(10))
    return f"seed=range(0,{seeds})", f"loss.weight={tenths}", "loss.temperature=1,2,3,4,5,6,7,8,9,10"


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--jobs", type=int, default=1000, help="a multiple of 100")
    parser.add_argument("--folder", type=Path, help="work here and keep it (default: a temporary folder)")
    parser.add_argument("--command", type=Path, help=argparse.SUPPRESS)
    given, rest = parser.parse_known_args()
    if given.command:
        command(given.command, rest)
        return
    if rest or given.jobs < 100 or given.jobs % 100:
        parser.error(f"--jobs must be a multiple of 100; got {given.jobs} {' '.join(rest)}")
    with workplace(given.folder) as folder:
        cache = f"cache={folder / 'cache'}"
        finish(jdistill(*STUDENT, cache, f"hydra.run.dir={fresh(folder / 'first')}"), cwd=folder)
        sweep, out = fresh(folder / "sweep"), folder / "spent.json"
        arguments = ["-m", *STUDENT, cache, f"hydra.sweep.dir={sweep}", "hydra.launcher.workers=1", *cube(given.jobs)]
        wall, _ = finish([sys.executable, __file__, "--command", str(out), *arguments], cwd=folder)
        spent: dict[str, float] = json.loads(out.read_text())
        done = len(results(sweep))
    if done != given.jobs:
        raise SystemExit(f"{done} of {given.jobs} jobs finished")
    show(spent, wall, given.jobs, given.out)


def show(spent: dict[str, float], wall: float, jobs: int, out: Path | None) -> None:
    launch = spent.pop("launch")
    spent["other"] = spent["units"] - spent["fit"] - spent["deploy"]
    spent["start"] = wall - launch - spent["report"]
    outside = launch + spent["report"] - spent["units"]
    spent["unnamed"] = outside - sum(spent[phase] for phase in OUTSIDE)
    order = ("start", *OUTSIDE, "unnamed", "units", "fit", "deploy", "other")
    shown = {phase: ("  of it " if phase in ("fit", "deploy", "other") else "") + phase for phase in order}
    table(
        ("phase", "seconds", "ms a job"),
        [(shown[phase], f"{spent[phase]:.2f}", f"{spent[phase] / jobs * 1e3:.2f}") for phase in order],
    )
    print(f"{jobs} jobs in {wall:.1f} s; outside units and after the start {outside / jobs * 1e3:.2f} ms a job")
    report({"jobs": jobs, "wall": wall, "outside_ms": outside / jobs * 1e3, "seconds": spent}, out)


if __name__ == "__main__":
    main()
