"""Digits: distillation strength and temperature chosen by cross-validation, then tested on data that took no part in it.

Source: the project's source documents on distillation for e-commerce search and recommendation, one of which prescribes:
loss = (1 - alpha) CE + alpha KL, alpha between 0.5 and 1, alpha and the temperature by cross-validation on validation data.
It gives neither grid nor folds (here alpha 0.5 to 1 by 0.1, T = 1, 2, 4, 8, five splits) nor figures to compare with.

    python experiments/cross_validation.py [--seeds 10] [--splits 5] [--out results/cross_validation]

Each of the splits draws its own fifth of the training set for validation (repeated random sub-sampling: data.split_seed), and
trains its own teacher on the rest. The pair with the best mean validation accuracy is then trained on the whole training
set over seeds, and its test accuracy is compared with the plain student's. The test set takes no part in the choice.
Finished runs are kept in sweeps/ and not repeated. Needs no file: digits come with scikit-learn.
Time: about 5 minutes on a 2-core CPU shared with other work.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from _common import (
    METHOD,
    Method,
    arguments,
    difference_figure,
    make,
    run_methods,
    run_sweep,
    save,
    with_notes,
    write_tables,
)
from _records import write_records

NAME = "cross_validation"
ALPHAS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
TEMPERATURES = (1.0, 2.0, 4.0, 8.0)
VALIDATION = "metrics.validation.accuracy"


def strength(alpha: float) -> tuple[str, ...]:
    """The overrides of (1 - alpha) CE + alpha KL."""
    return "loss=kd", f"loss.weight={alpha:g}", f"task.weight={round(1 - alpha, 10):g}"


def grid(frame: pd.DataFrame) -> pd.DataFrame:
    """Validation accuracy of every (alpha, T): columns alpha, temperature, mean, std, n."""
    keys = ["config.loss.weight", "config.loss.temperature"]
    cells = frame[frame["status"] == "finished"].groupby(keys)[VALIDATION].agg(["mean", "std", "count"]).reset_index()
    return cells.set_axis(["alpha", "temperature", "mean", "std", "n"], axis=1)


def choose(cells: pd.DataFrame) -> tuple[float, float]:
    """The best (alpha, T) by mean validation accuracy; of equal ones the weakest, then the coolest."""
    best = cells.sort_values(["mean", "alpha", "temperature"], ascending=[False, True, True]).iloc[0]
    return float(best["alpha"]), float(best["temperature"])


def as_markdown(cells: pd.DataFrame, splits: int) -> str:
    """The grid as a table: a row an alpha, a column a temperature."""
    temperatures = sorted(cells["temperature"].unique())
    lines = ["| alpha | " + " | ".join(f"T = {t:g}" for t in temperatures) + " |", "| ---: |" + " ---: |" * len(temperatures)]
    for alpha, row in cells.groupby("alpha"):
        values = {r["temperature"]: f"{100 * r['mean']:.2f} ± {100 * r['std']:.2f}" for r in row.to_dict("records")}
        lines.append(f"| {alpha:g} | " + " | ".join(values.get(t, "failed") for t in temperatures) + " |")
    return "\n".join([*lines, "", f"Validation accuracy (%), mean ± sample standard deviation over {splits} splits."]) + "\n"


def figure(cells: pd.DataFrame, path: Path, chosen: tuple[float, float]) -> None:
    """Validation accuracy over alpha, a line a temperature."""
    import matplotlib.pyplot as plt

    drawn, axis = plt.subplots(figsize=(5.5, 3.6), layout="constrained")
    for temperature, part in cells.groupby("temperature"):
        error = 100 * part["std"] / np.sqrt(part["n"])
        axis.errorbar(part["alpha"], 100 * part["mean"], error, marker="o", capsize=2, label=f"T = {temperature:g}")
    axis.axvline(chosen[0], color="0.6", linewidth=1)
    axis.set_xlabel("alpha: (1 - alpha) CE + alpha KL")
    axis.set_ylabel("validation accuracy (%), mean ± s.e.")
    axis.legend(fontsize=8)
    save(drawn, path)


def main(given_arguments: Sequence[str] | None = None) -> None:
    parser = arguments(NAME, __doc__, seeds=10)
    parser.add_argument("--splits", type=int, default=5, help="random splits of the training set (default: %(default)s)")
    given = parser.parse_args(given_arguments)
    swept = [f"data.split_seed=range(0,{given.splits})", f"loss.temperature={','.join(f'{t:g}' for t in TEMPERATURES)}"]
    frames = [
        run_sweep(given.sweeps / f"alpha-{100 * alpha:.0f}", [f"experiment={NAME}", *strength(alpha), *swept], [0])
        for alpha in ALPHAS
    ]
    searched = pd.concat(frames, ignore_index=True)
    cells = grid(searched)
    alpha, temperature = choose(cells)
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "grid.md").write_text(as_markdown(cells, given.splits))
    figure(cells, given.out / "grid.png", (alpha, temperature))
    label = f"chosen: alpha {alpha:g}, T = {temperature:g}"
    methods = (
        Method("plain", ("loss=none", "data.validation=0")),
        Method(label, (*strength(alpha), f"loss.temperature={temperature:g}", "data.validation=0")),
        Method("alpha 0.9, T = 4", (*strength(0.9), "loss.temperature=4", "data.validation=0")),
    )
    tested = run_methods(NAME, methods, given)
    table = make(tested, columns=("n", "metric", "difference", "p", "detectable", "test.cross_entropy"))
    note = f"chosen by validation accuracy over {given.splits} splits among {len(cells)} pairs (grid.md)."
    write_tables(given.out, with_notes(table, note))
    write_records(given.out, pd.concat([searched.assign(**{METHOD: "search"}), tested], ignore_index=True))
    difference_figure(tested, given.out / "difference.png", title="Digits, 12 units taught by 256-128")


if __name__ == "__main__":
    main()
