"""Search on Icecat: a ranker with text, attribute and price features into small rankers; NDCG@10 over five folds by query.

Data: 135 queries with 3,668 products graded 0 to 3 (Open Icecat, ratings of the Chorus project). No published table of learned
rankers on these folds is known to us; the rows compare our own runs.

    python experiments/search_icecat.py [--seeds 3] [--out results/search_icecat]

needs the data in $JDISTILL_DATA (or a network). Of each fold: 27 queries test, a quarter of the others validate and choose
epochs and loss weights, the rest train; one teacher, and `--seeds` students for every row. The repetition is the fold: a row's
mean over the seeds of a fold is compared with the plain student's of that fold, so that p and intervals are of 5 pairs.
"cheap": features of a first stage (two BM25 scores, one fraction, two lengths); all features are the teacher's.
Latency is that of the network for one query of 60 products, features ready.
Expected (mean NDCG@10 of five folds): teacher 0.833, cheap features 0.798 plain, 0.794 to 0.798 distilled; all features 0.816.
Time: 8 minutes on a 2-core CPU shared with other work.
"""

import pandas as pd
from _common import (
    METHOD,
    PROBLEM,
    arguments,
    difference_figure,
    make,
    run_sweep,
    teacher_accuracy,
    with_column,
    with_notes,
    write_tables,
)
from _records import write_records
from _selection import FOLD, select, settings

NAME, METRIC = "search_icecat", "ndcg_at_10"
FOLDS, ALL = "data.fold=0,1,2,3,4", "data.privileged_features=false"
LOSSES = {
    "none": "plain",
    "kd": "KD",
    "margin_mse": "margin-MSE",
    "listwise_kd": "listwise KD",
    "rank_distil": "RankDistil",
}
GRID = "loss.weight=0.3,1"
SWEEPS = {  # one sweep each, since reading the text of the catalogue takes longer than training
    "cheap": ("student=ltr_mlp", f"loss={','.join(LOSSES)}", GRID),
    "teacher": (ALL, "loss=none", "student=ltr_mlp", "student.widths=[64,32]", "student.context=mean", "student.dropout=0.2",
                "optim.lr=1e-3"),
    "all": (ALL, "student=ltr_mlp", "loss=none,listwise_kd", GRID),
}  # fmt: skip
STUDENTS = {"cheap": "cheap features, 32 units", "all": "all features, 32 units", "teacher": "the teacher's network"}


def labelled(frame: pd.DataFrame, sweep: str) -> pd.DataFrame:
    """The runs of a sweep with problem and method; without a loss, its weight means nothing, and the first alone stays."""
    frame = frame[(frame["choices.loss"] != "none") | (frame["config.loss.weight"] == frame["config.loss.weight"].min())]
    return frame.assign(**{PROBLEM: STUDENTS[sweep], METHOD: frame["choices.loss"].map(LOSSES)})


def by_fold(frame: pd.DataFrame) -> pd.DataFrame:
    """The runs with their fold for a seed: what is paired and compared are folds, of which a table takes means."""
    return frame.assign(**{"config.seed": frame[FOLD], "choices.student_seed": frame["config.seed"]})


def main() -> None:
    given = arguments(NAME, __doc__, seeds=3).parse_args()
    frames = [
        labelled(run_sweep(given.sweeps / name, [f"experiment={NAME}", FOLDS, *overrides], range(given.seeds)), name)
        for name, overrides in SWEEPS.items()
    ]
    tried = pd.concat(frames, ignore_index=True)
    frame = select(tried, ("loss.weight",), METRIC, FOLD)
    columns = ("n", "metric", "difference", "p", "detectable", "test.ndcg_at_5", "test.mrr", "test.teacher_kendall", "bytes",
               "latency_1", "latency_256")  # fmt: skip
    table = make(by_fold(frame), by=("problem", "method"), columns=columns)
    table = with_column(table, "its teacher", teacher_accuracy(frame, METRIC), "teacher")
    table = with_column(table, "chosen on validation (folds)", settings(frame, FOLD))
    notes = (
        f"n counts runs; a fold is one repetition: its mean over {given.seeds} seeds is paired, so that there are 5 pairs.",
        "folds share training queries, so that intervals and p are somewhat too good.",
    )
    write_tables(given.out, with_notes(table, *notes))
    write_records(given.out, frame)
    students = by_fold(frame[frame[PROBLEM] != STUDENTS["teacher"]])
    difference_figure(students, given.out / "difference.png", title="Search on Icecat, by fold", metric=METRIC, scale=1.0)


if __name__ == "__main__":
    main()
