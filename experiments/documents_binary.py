"""Binary, 10 features, sigmoid, hidden 64 to 32: soft labels on random data, where nothing can be learned, and on real data.

Source: the project's source documents on distillation for e-commerce search and recommendation. They give the network
sizes, the sigmoid output, the teacher's probabilities as soft labels, 1,000 random examples, and the scatter plot of
teacher against student probability. They do not give epochs, batch size or learning rate (here 50, 32, Adam 1e-3).

    python experiments/documents_binary.py [--seeds 5] [--out results/documents_binary]

needs no data beyond what scikit-learn embeds. On random data (Gaussian inputs, labels independent of them) each seed draws
its own data set. The real set of the same form is breast cancer with its 10 mean features.
Expected (5 seeds, test accuracy): random data 51 % for teacher and every student, which is chance, no difference; breast
cancer about 93 % for all, no difference that 114 test examples could show.
Time: 1 minute on a 2-core CPU shared with other work.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from _common import (
    COLOURS,
    METHOD,
    PROBLEM,
    Method,
    arguments,
    chance,
    difference_figure,
    make,
    run_methods,
    save,
    teacher_accuracy,
    with_column,
    with_notes,
    write_tables,
)
from _records import write_records

NAME = "documents_binary"
PROBLEMS = {"random data": "documents_binary_random", "breast cancer": "documents_binary_real"}
SOFT = "soft labels"
METHODS = (
    Method("plain", ("loss=none",)),
    Method(SOFT, ("loss=kd", "loss.temperature=1", "task.weight=0")),
    Method("labels and soft labels", ("loss=kd", "loss.temperature=1", "loss.weight=1")),
)


def probabilities(frame: pd.DataFrame, problem: str, method: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Teacher's and student's probability of class 1 and the label, on the test splits of all seeds: three of [N].

    The plain student has no teacher: it stands against the one that taught the soft-label student of its seed.
    """
    columns: list[tuple[np.ndarray, ...]] = []
    part = frame[(frame[PROBLEM] == problem) & (frame["status"] == "finished")]
    taught = {run["config.seed"]: _predictions(run) for run in part[part[METHOD] == SOFT].to_dict("records")}
    for run in part[part[METHOD] == method].to_dict("records"):
        own, soft = _predictions(run), taught[run["config.seed"]]
        if not np.array_equal(own["ids"], soft["ids"]):
            raise ValueError(f"{problem}, {method}: the test splits of a seed differ")
        columns.append((_sigmoid(soft["teacher_logits"]), _sigmoid(own["logits"]), own["label"]))
    teacher, student, label = (np.concatenate(arrays) for arrays in zip(*columns))
    return teacher, student, label


def _predictions(run: dict[str, Any]) -> dict[str, np.ndarray]:
    with np.load(Path(run["path"]) / "predictions.npz") as saved:
        return dict(saved)


def _sigmoid(logits: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-np.asarray(logits[:, 0], np.float64)))


def scatter(frame: pd.DataFrame, path: Path) -> None:
    """Teacher probability against student probability on the test split, all seeds; a panel a problem and method."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(PROBLEMS), len(METHODS), figsize=(9.2, 6.4), sharex=True, sharey=True, layout="constrained")
    for row, problem in zip(axes, PROBLEMS):
        for axis, method in zip(row, METHODS):
            teacher, student, label = probabilities(frame, problem, method.label)
            for value, marker in ((0, "o"), (1, "^")):
                own = label == value
                axis.scatter(teacher[own], student[own], s=9, alpha=0.4, marker=marker, color=COLOURS[value],
                             linewidths=0, label=f"label {value}")  # fmt: skip
            axis.plot([0, 1], [0, 1], color="0.5", linewidth=0.8, linestyle="--")
            gap, r = np.abs(teacher - student).mean(), np.corrcoef(teacher, student)[0, 1]
            axis.set_title(f"{problem}, {method.label}\nmean |difference| {gap:.3f}, r = {r:.2f}", fontsize=9)
            axis.set_aspect("equal")
        row[0].set_ylabel("student probability of class 1")
    for axis in axes[-1]:
        axis.set_xlabel("teacher probability of class 1")
    axes[0][0].legend(loc="upper left", fontsize=8, framealpha=0.9)
    save(figure, path)


def main() -> None:
    given = arguments(NAME, __doc__).parse_args()
    frame = pd.concat([run_methods(e, METHODS, given, problem) for problem, e in PROBLEMS.items()], ignore_index=True)
    columns = ("n", "metric", "difference", "p", "detectable", "test.cross_entropy", "test.teacher_agreement", "train.accuracy")
    table = make(frame, by=("problem", "method"), columns=columns)
    table = with_column(table, "its teacher (%)", teacher_accuracy(frame), "teacher", 100.0)
    table, notes = chance(table, frame, "random data")
    write_tables(given.out, with_notes(table, *notes))
    write_records(given.out, frame)
    difference_figure(frame, given.out / "difference.png", title="Binary, 10 features, sigmoid, 64 to 32")
    scatter(frame, given.out / "scatter.png")


if __name__ == "__main__":
    main()
