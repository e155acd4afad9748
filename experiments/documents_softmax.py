"""Two-class softmax, 10 features 128 to 64 and 100 features 512 to 128, CE + 0.5 KL: on random and on real data.

Source: the project's source documents on distillation for e-commerce search and recommendation. They give the network
sizes, the learning rate 0.001, lambda = 0.5 and random data. They do not give the temperature (here 4), the optimizer
(here Adam), epochs or batch size (here 50 and 32), or the number of examples (here 1,000).

    python experiments/documents_softmax.py [--seeds 5] [--out results/documents_softmax]

needs MNIST in $JDISTILL_DATA (or a network). On random data (Gaussian inputs, labels independent of them) each seed draws
its own data set. Real data of the same form: breast cancer with its 10 mean features; there is no embedded real set of 100
features, so the larger pair learns to tell 3 from 8 from 2,000 images of MNIST (784 features), which can resolve smaller
differences than scikit-learn's digits (64 features, some 70 test images of two digits).
Expected (5 seeds, test accuracy): random data 50 % for teachers and students, within what 1,000 test examples allow; breast
cancer 94 % (teachers 96 %), 3 or 8 98.3 %; no method differs from plain.
Time: 2 minutes on a 2-core CPU shared with other work.
"""

import pandas as pd
from _common import (
    Method,
    arguments,
    chance,
    difference_figure,
    make,
    run_methods,
    teacher_accuracy,
    with_column,
    with_notes,
    write_tables,
)
from _records import write_records

NAME = "documents_softmax"
PROBLEMS = {
    "random data, 10 features": "documents_softmax10_random",
    "breast cancer, 10 features": "documents_softmax10_real",
    "random data, 100 features": "documents_softmax100_random",
    "MNIST 3 or 8, 784 features": "documents_softmax100_real",
}
METHODS = (
    Method("plain", ("loss=none",)),
    Method("KD alone", ("loss=kd", "loss.temperature=4", "task.weight=0")),
    Method("CE + 0.5 KL", ("loss=kd", "loss.temperature=4", "loss.weight=0.5")),
)


def main() -> None:
    given = arguments(NAME, __doc__).parse_args()
    frame = pd.concat([run_methods(e, METHODS, given, problem) for problem, e in PROBLEMS.items()], ignore_index=True)
    columns = ("n", "metric", "difference", "p", "detectable", "test.cross_entropy", "test.teacher_agreement", "train.accuracy")
    table = make(frame, by=("problem", "method"), columns=columns)
    table = with_column(table, "its teacher (%)", teacher_accuracy(frame), "teacher", 100.0)
    table, notes = chance(table, frame, "random data")
    write_tables(given.out, with_notes(table, *notes))
    write_records(given.out, frame)
    difference_figure(frame, given.out / "difference.png", title="Two-class softmax students")


if __name__ == "__main__":
    main()
