"""All losses on Fashion-MNIST with one pair of convolutional networks, ranked, with tests of what differs.

Each loss is added to the cross-entropy (task.weight 1), other options at their defaults, at two weights: its published one
(the default of loss.weight) and the one of 0.1, 1 and 10 times that which has the best validation accuracy at
seed 100, which no table reports. A tie goes to the published weight. The test images decide nothing.
Seeds 0, 1, ... are reported, the same for every loss and for the plain student. Losses that are recipes of their own (simkd
is published with task.weight=0) are here as one more term beside the cross-entropy. Networks, subset and length are in
conf/experiment/losses_fashion_mnist.yaml.

    python experiments/losses_fashion_mnist.py [--seeds 5] [--losses kd,dkd] [--out results/losses_fashion_mnist]
    python experiments/losses_fashion_mnist.py --collect   tables of the losses that are done, while others still run
    python experiments/losses_fashion_mnist.py --full      all 57,000 training images, 30 epochs: for a GPU

needs Fashion-MNIST in $JDISTILL_DATA (or a network). Finished runs are kept in sweeps/ and not repeated; a stopped run
continues. A loss that fails or diverges keeps its row, with the reason. All weights and seeds of a loss are one multirun (a
second one for the reported seeds), since they share a program.
Time: about an hour on two free cores for 45 losses, estimated from two of them (some 5 s of processor time a run).
"""

import argparse
import dataclasses
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from _common import METHOD, PROBLEM, add_choice, arguments, make, with_column, with_notes, write_tables
from _records import write_records

from jdistill import options as _registered
from jdistill.registry import options
from jdistill.report import Ranks, Table, collect, rank, ranks_figure
from jdistill.report.collect import read_jobs

del _registered  # imported to register

NAME = "losses_fashion_mnist"
PLAIN, PUBLISHED, CHOSEN, BOTH, SELECTION = "plain", "published", "chosen", "published and chosen", "selection"
NO_LOSSES = ("none", "cross_entropy", "sum")  # the baseline, what every student is trained by, and a combination
FACTORS = (0.1, 1.0, 10.0)
SELECTION_SEEDS = (100,)
FULL = ("data.limit=null", "teacher.data={limit: null}", "teacher.optim.epochs=30", "optim.epochs=30", "evaluate.every=30")
WEIGHT, SEED, SCORE = "config.loss.weight", "config.seed", "metrics.validation.accuracy"


def losses() -> dict[str, float]:
    """Every registered loss with its published weight."""
    return {name: float(option.fields["weight"][1]) for name, option in options("loss").items() if name not in NO_LOSSES}


def grid(published: float) -> list[float]:
    """The weights that are tried, rounded to what a command line shows."""
    return [float(f"{factor * published:.6g}") for factor in FACTORS]


def choose(frame: pd.DataFrame, published: float) -> float:
    """The weight of best mean validation accuracy, of those of which every selection run finished.

    A tie goes to the published weight; so does a loss of which none finished.
    """
    done = frame[frame["status"] == "finished"]
    if SCORE not in done:
        return published
    scores = {}
    for weight, runs in done.groupby(WEIGHT):
        if set(runs.dropna(subset=[SCORE])[SEED]) >= set(SELECTION_SEEDS):
            scores[float(weight)] = float(runs[SCORE].mean())
    return max(scores, key=lambda w: (scores[w], w == published), default=published)


def sweep(folder: Path, overrides: Sequence[str], seeds: Sequence[int], train: bool = True) -> pd.DataFrame:
    """`jdistill -m` in `folder`, where finished runs are not repeated; the collected runs, failed ones among them.

    Without `train` only what is there is collected.

    Where no run can start (a loss that cannot be with these networks), one failed row a seed says why.
    """
    if not train and (folder / "jobs.jsonl").is_file():
        return collect(folder)
    command = [sys.executable, "-m", "jdistill", "-m", f"experiment={NAME}", *overrides]
    command += [f"seed={','.join(map(str, seeds))}", f"hydra.sweep.dir={folder}"]
    last = ""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as job:
        for line in job.stderr or ():
            sys.stderr.write(line)
            last = line.strip() or last
    if job.returncode == 2 or (job.returncode == 1 and not (folder / "jobs.jsonl").is_file()):
        return refused(overrides, seeds, last.removeprefix("jdistill: error: "))
    if job.returncode not in (0, 1):
        sys.exit(job.returncode)
    return collect(folder)


def refused(overrides: Sequence[str], seeds: Sequence[int], error: str) -> pd.DataFrame:
    """Failed rows for runs that were never started."""
    given = dict(o.split("=", 1) for o in overrides if o.startswith("loss"))
    rows = [
        {"status": "failed", "error": error, "overrides": [*overrides, f"seed={seed}"], "choices.loss": given["loss"],
         WEIGHT: float(weight), SEED: seed}
        for weight in given["loss.weight"].split(",")
        for seed in seeds
    ]  # fmt: skip
    return pd.DataFrame(rows)


def complete(folder: Path) -> bool:
    """Whether all runs of a loss have ended, well or not."""
    parts = [folder / part for part in ("selection", "reported")]
    if not all((part / "jobs.jsonl").is_file() for part in parts):
        return False
    states = {job["status"] for part in parts for job in read_jobs(part)}
    return states <= {"finished", "failed", "diverged"}


def run_loss(name: str, published: float, given: argparse.Namespace) -> tuple[pd.DataFrame, float]:
    """All runs of a loss, with their part in `choices.problem`, and the chosen weight."""
    folder, seeds, full = given.sweeps / name, range(given.seeds), FULL if given.full else ()

    def at(weights: Sequence[float]) -> list[str]:
        return [f"loss={name}", f"loss.weight={','.join(f'{w:g}' for w in weights)}", *full]

    tried = sweep(folder / "selection", at(grid(published)), SELECTION_SEEDS, not given.collect)
    chosen = choose(tried, published)
    reported = sweep(folder / "reported", at(list(dict.fromkeys([published, chosen]))), seeds, not given.collect)
    parts = {published: PUBLISHED, chosen: CHOSEN} if chosen != published else {published: BOTH}
    reported = reported.assign(**{PROBLEM: [parts.get(float(w)) for w in reported[WEIGHT]]})
    return pd.concat([tried.assign(**{PROBLEM: SELECTION}), reported], ignore_index=True).assign(**{METHOD: name}), chosen


def part(frame: pd.DataFrame, which: str) -> pd.DataFrame:
    """The reported runs at the `published` or the `chosen` weight, and those of the plain student."""
    return frame[frame[PROBLEM].isin((which, BOTH, PLAIN))].reset_index(drop=True)


def ranked(table: Table) -> Ranks:
    """The ranks of a table's rows; those with failed seeds are left out."""
    return rank({row[METHOD]: row["by_seed"] for row in table.rows})


def failures(frame: pd.DataFrame) -> dict[str, str]:
    """Loss -> what failed in its runs, selection included."""
    found: dict[str, str] = {}
    for name, runs in frame[frame["status"] != "finished"].groupby(METHOD):
        of = int((frame[METHOD] == name).sum())
        reason = " ".join(str(runs["error"].dropna().iloc[0] if runs["error"].notna().any() else "").split())
        found[str(name)] = f"{len(runs)} of {of} {runs['status'].iloc[0]}: {reason[:100]}"
    return found


def combine(frame: pd.DataFrame, weights: Mapping[str, tuple[float, float]], ranks: Mapping[str, Ranks]) -> Table:
    """One row a loss, best average rank first: both weights, accuracies, differences to plain, ranks, failures."""
    columns = ("metric", "difference", "p", "bytes")
    tables = {which: make(part(frame, which), columns=columns) for which in (PUBLISHED, CHOSEN)}
    other = {row[METHOD]: row for row in tables[PUBLISHED].rows}
    place = {which: dict(zip(found.methods, found.average, strict=True)) for which, found in ranks.items()}
    table = tables[CHOSEN]
    titles = {"metric": "test accuracy at chosen (%)", "p": "p (Holm) at chosen"}
    renamed = [
        dataclasses.replace(c, title=titles.get("metric" if c.kind == "main" else c.name, c.title)) for c in table.columns
    ]
    rows = sorted(table.rows, key=lambda row: place[CHOSEN].get(row[METHOD], float("inf")))
    table = dataclasses.replace(table, columns=tuple(renamed), rows=tuple(rows))

    def text(which: int) -> Any:
        return lambda row: f"{weights[row[METHOD]][which]:g}" if row[METHOD] in weights else None

    def at_published(row: Mapping[str, Any]) -> tuple[float, float]:
        found = other[row[METHOD]]
        return found["test.accuracy.mean"], found["test.accuracy.std"]

    def p_published(row: Mapping[str, Any]) -> str | None:
        found = other[row[METHOD]]
        return (
            None
            if found.get("p") is None or found["p"] != found["p"]
            else f"{found['difference'] * 100:+.2f}, {found['p']:.3f}"
        )

    def place_of(which: str) -> Any:
        return lambda row: f"{place[which][row[METHOD]]:.1f}" if row[METHOD] in place[which] else None

    table = with_column(table, "rank at chosen", place_of(CHOSEN))
    table = with_column(table, "chosen weight", text(1))
    table = with_column(table, "published weight", text(0))
    table = with_column(table, "test accuracy at published (%)", at_published, "published", 100.0)
    table = with_column(table, "difference to plain at published, p (Holm)", p_published)
    table = with_column(table, "rank at published", place_of(PUBLISHED))
    failed = failures(frame)
    return with_column(table, "failed runs", lambda row: failed.get(row[METHOD])) if failed else table


def notes(weights: Mapping[str, tuple[float, float]], full: bool) -> list[str]:
    """How weights were chosen, and for which losses the grid may have been too small."""
    edge = [name for name, (published, chosen) in weights.items() if chosen != published]
    return [
        f"chosen weight: of {', '.join(f'{f:g}' for f in FACTORS)} times the published one, by validation accuracy at "
        f"seed {' and '.join(map(str, SELECTION_SEEDS))}, which is not reported; ties go to the published weight.",
        f"at the edge of that grid, so that a weight further out may be better still ({len(edge)} of {len(weights)}): "
        f"{', '.join(edge) or 'none'}.",
        "all training images, 30 epochs (--full)." if full else "a subset and a length for a CPU: see the recipe.",
    ]


def parse() -> argparse.Namespace:
    parser = arguments(NAME, __doc__)
    known = losses()
    add_choice(parser, "--losses", known)
    parser.add_argument("--full", action="store_true", help="all training images and 30 epochs, for a GPU")
    parser.add_argument("--collect", action="store_true", help="train nothing: tables of the losses whose runs are all there")
    given = parser.parse_args()
    if not 2 <= given.seeds <= min(SELECTION_SEEDS):
        parser.error(
            f"--seeds must be 2 to {min(SELECTION_SEEDS)}, got {given.seeds}: tests need two, later seeds choose weights"
        )
    given.sweeps = given.sweeps / "full" if given.full else given.sweeps
    names = [name for name in given.losses if not given.collect or complete(given.sweeps / name)]
    given.losses = {name: known[name] for name in names}
    return given


def main() -> None:
    given = parse()
    full = FULL if given.full else ()
    plain = sweep(given.sweeps / PLAIN, ["loss=none", "loss.weight=1", *full], range(given.seeds), not given.collect)
    frames = [plain.assign(**{METHOD: PLAIN, PROBLEM: PLAIN})]
    weights = {}
    for name, published in given.losses.items():
        frame, chosen = run_loss(name, published, given)
        frames.append(frame)
        weights[name] = (published, chosen)
    frame = pd.concat(frames, ignore_index=True)
    ranks = {which: ranked(make(part(frame, which))) for which in (PUBLISHED, CHOSEN)}
    table = with_notes(combine(frame, weights, ranks), *notes(weights, given.full), ranks[CHOSEN].note)
    write_tables(given.out, table)
    write_records(given.out, frame)
    ranks_figure(ranks[CHOSEN], given.out / "critical_difference.png")
    ranks_figure(ranks[PUBLISHED], given.out / "critical_difference_published.png")


if __name__ == "__main__":
    main()
