"""CIFAR-100, resnet32x4 to resnet8x4: the plain student and KD by the recipe of RepDistiller, beside the published values.

Source: Tian, Krishnan, Isola 2020, Contrastive Representation Distillation (arXiv 1910.10699), and the tables of their
repository RepDistiller: teacher 79.42, student 72.50, KD 73.33 (last epoch). An independent replication of that recipe with
5 seeds (a public results file): student 72.49 +- 0.27, KD 73.17 +- 0.21. The recipe is conf/experiment/cifar100_kd.yaml.

    python experiments/cifar100_kd.py [--seeds 5] [--out results/cifar100_kd]      in full: for a GPU
    python experiments/cifar100_kd.py --steps 10                                   seconds a step, on any machine

needs CIFAR-100 (binary version) in $JDISTILL_DATA, or a network. Finished runs are kept in sweeps/ and not repeated; a
stopped run continues.
Expected in full: the published values within the 95 % interval of 5 seeds. It was NOT run in full for the committed results:
those are a check of speed and plumbing over 10 steps on a 2-core CPU (results/cifar100_kd/README.md), which took 5 minutes.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from _common import (
    METHOD,
    Method,
    arguments,
    difference_figure,
    make,
    portable,
    run_methods,
    with_column,
    with_notes,
    write_tables,
)
from _records import plain, write_records

from jdistill.report import mean_interval

NAME, BATCH, EXAMPLES = "cifar100_kd", 64, 50_000
STEPS_AN_EPOCH = -(-EXAMPLES // BATCH)  # 782: the last batch of 16 is kept
METHODS = (
    Method("plain", ("loss=none", "task.weight=1")),
    Method("KD", ("loss=kd", "loss.temperature=4", "loss.weight=0.9", "task.weight=0.1")),
)
PUBLISHED = {"plain": 0.7250, "KD": 0.7333}
REPLICATION = {"plain": (0.72488, 0.00272), "KD": (0.73174, 0.00206)}
TEACHER = 0.7942


def covered(row: Mapping[str, Any]) -> str | None:
    """Whether the 95 % interval of our mean holds the published value; None with fewer than two seeds."""
    values = list(row["by_seed"].values())
    if len(values) < 2:
        return None
    low, high = mean_interval(values)
    return f"{'yes' if low <= PUBLISHED[row[METHOD]] <= high else 'no'}: [{100 * low:.2f}, {100 * high:.2f}]"


def reproduce(given: argparse.Namespace) -> None:
    """All methods and seeds in full, and the table with the published values."""
    frame = run_methods(NAME, METHODS, given)
    table = make(frame, columns=("n", "metric", "difference", "p", "detectable", "test.teacher_agreement", "bytes", "train_s"))
    table = with_column(table, "published", lambda row: (PUBLISHED[row[METHOD]], None), "published", 100.0)
    table = with_column(table, "replication, n = 5", lambda row: REPLICATION[row[METHOD]], "replication", 100.0)
    table = with_column(table, "published in our 95 % interval", covered)
    source = f"published: RepDistiller, one run, last epoch; its teacher {100 * TEACHER:.2f} %."
    write_tables(given.out, with_notes(table, source))
    write_records(given.out, frame)
    difference_figure(frame, given.out / "difference.png", title="CIFAR-100, resnet8x4 students of a resnet32x4 teacher")


def one_run(folder: Path, overrides: list[str]) -> dict[str, Any]:
    """The result of `jdistill` in `folder`, always run anew: a time must not come from an earlier, busier moment."""
    command = [sys.executable, "-m", "jdistill", f"experiment={NAME}", *overrides, f"hydra.run.dir={folder}", "force=true"]
    done = subprocess.run(command, check=False)
    if done.returncode:
        sys.exit(done.returncode)
    return json.loads((folder / "result.json").read_text())


def speed(given: argparse.Namespace) -> None:
    """Times `--steps` real steps of the teacher, the plain student and KD (with the live teacher in each step)."""
    few = [f"data.limit={BATCH * given.steps}", f"data.classes_kept=[{','.join(map(str, range(10)))}]"]
    few += ["optim.epochs=1", "evaluate.latency=false"]
    folder = given.sweeps / "steps"
    runs = {"teacher": one_run(folder / "teacher", [*few, "student=resnet32x4", *METHODS[0].overrides])}
    runs["plain"] = one_run(folder / "plain", [*few, *METHODS[0].overrides])
    runs["KD"] = one_run(folder / "kd", [*few, f"teacher.checkpoint={folder / 'teacher'}", *METHODS[1].overrides])
    rows = [timing(name, result) for name, result in runs.items()]
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "steps.jsonl").write_text("".join(portable(json.dumps(row, sort_keys=True)) + "\n" for row in rows))
    frame = pd.DataFrame(rows)[["run", "steps", "seconds_per_step", "seconds_per_epoch", "hours_per_240_epochs"]]
    print(frame.to_string(index=False, float_format=lambda value: f"{plain(value):.3g}"))
    print("a check of speed and plumbing, not a result: a few steps on a few images")


def timing(name: str, result: Mapping[str, Any]) -> dict[str, Any]:
    """Seconds a step without compilation, extrapolated to an epoch of 782 steps and to the whole recipe."""
    seconds = result["time_s"]["train"] / result["steps"]
    return {
        "run": name,
        "steps": result["steps"],
        "seconds_per_step": seconds,
        "seconds_per_epoch": seconds * STEPS_AN_EPOCH,
        "hours_per_240_epochs": seconds * STEPS_AN_EPOCH * 240 / 3600,
        "train_loss": result["metrics"]["train"]["loss"],
        "compile_s": result["time_s"]["compile"],
        "parameters": result["size"]["parameters"],
        "overrides": result["overrides"],
        "environment": result["environment"],
        "data": result["data"],
    }


def main() -> None:
    parser = arguments(NAME, __doc__)
    parser.add_argument("--steps", type=int, default=0, help="time this many steps of each network instead")
    given = parser.parse_args()
    speed(given) if given.steps else reproduce(given)


if __name__ == "__main__":
    main()
