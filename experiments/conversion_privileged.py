"""Conversion with privileged features: a teacher knows PageValues, BounceRates and ExitRates, its students do not; AUC.

Source of the idea: Lopez-Paz et al. 2016, Unifying distillation and privileged information (arXiv 1511.03643); Xu et al. 2020,
Privileged Features Distillation at Taobao Recommendations (KDD). Data: Online Shoppers Purchasing Intention (Sakar et al.
2018, UCI 468), 12,330 sessions, of which 15.5 % end in a purchase.

    python experiments/conversion_privileged.py [--seeds 5] [--out results/conversion_privileged]

needs the data in $JDISTILL_DATA (or a network). Five folds; seed s tests on fold s, with a teacher, networks and batches of its
own. Students: a network of one hidden layer of 16, a decision tree, gradient-boosted trees, a linear support vector machine,
each on labels alone ("plain") and on the teacher's soft labels. Whether labels count beside soft labels, and weights, are
chosen on the validation rows of each fold, 20 % of what is not tested on. "all features" is the plain network with the
privileged features: what a student could have known.
Expected (5 seeds, test AUC): teacher 0.918, plain network 0.745, by soft cross-entropy 0.751, all features 0.917.
Time: 5 minutes on a 2-core CPU shared with other work.
"""

import pandas as pd
from _common import (
    METHOD,
    Method,
    arguments,
    difference_figure,
    make,
    run_methods,
    teacher_accuracy,
    with_column,
    with_notes,
    write_tables,
)
from _records import write_records
from _selection import select, settings

NAME, ALL = "conversion_privileged", "all features, plain"
SOFT = ("loss=kd", "loss.temperature=1", "task.weight=0,1", "report=last")
ESTIMATORS = (
    Method("plain", ("loss=none", "report=last")),
    Method("soft labels", SOFT),
)
NETWORK = (
    Method("plain", ("loss=none",)),
    Method("soft cross-entropy", ("loss=bce_soft", "task.weight=0,1")),
    Method("KD, T = 2", ("loss=kd", "loss.temperature=2", "task.weight=0,1")),
    Method("logit MSE", ("loss=logit_mse", "loss.weight=0.01,0.1")),
    Method(ALL, ("loss=none", "data.privileged=[]")),
)
STUDENTS = {
    "mlp": (("student=mlp", "student.widths=[16]"), NETWORK),
    **{name: ((f"student={name}",), ESTIMATORS) for name in ("tree", "gbt", "linear_svm")},
}
SETTINGS = ("task.weight", "loss.weight")


def methods(student: str) -> list[Method]:
    """The rows of a student."""
    chosen, rows = STUDENTS[student]
    return [Method(row.label, (*chosen, *row.overrides)) for row in rows]


def main() -> None:
    given = arguments(NAME, __doc__).parse_args()
    tried = pd.concat([run_methods(NAME, methods(name), given, name) for name in STUDENTS], ignore_index=True)
    frame = select(tried, SETTINGS, "auc")
    columns = ("n", "metric", "difference", "p", "detectable", "test.pr_auc", "test.log_loss", "test.calibration_error",
               "bytes", "latency_1")  # fmt: skip
    table = make(frame, by=("problem", "method"), columns=columns)
    table = with_column(table, "its teacher: test auc", teacher_accuracy(frame, "auc"), "teacher")
    table = with_column(table, "chosen on validation (folds)", settings(frame))
    note = f"chosen on validation: {len(frame)} of {len(tried)} runs, whose setting is best on their fold's validation rows."
    write_tables(given.out, with_notes(table, note))
    write_records(given.out, frame)
    hidden = frame[frame[METHOD] != ALL]
    difference_figure(hidden, given.out / "difference.png", title="Conversion, privileged features", metric="auc", scale=1.0)


if __name__ == "__main__":
    main()
