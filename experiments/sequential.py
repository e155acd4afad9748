"""The next item: a SASRec teacher into a small SASRec, a small GRU4Rec and a BPR student, on MovieLens and Amazon Beauty.

Source: our own choice of sizes for a 2-core CPU; SASRec after Kang & McAuley 2018. No published table is reproduced.

    python experiments/sequential.py [--seeds 5] [--data movielens,amazon] [--students sasrec,gru4rec,bpr] [--methods RRD,CD]
        [--add]

needs MovieLens (ml-latest-small) and Amazon 5-core (Beauty) in $JDISTILL_DATA. Finished runs are kept in sweeps/ and not
repeated; a stopped run continues. Weights of the losses are those that are best on validation with seed 0 of a small grid.
Expected and time: results/sequential/README.md.
"""

from _common import Method, add_choice, arguments, joined, make, run_methods, write_tables
from _ranking import chosen
from _records import add_option, recorded, with_recorded, write_records

NAME = "sequential"
DATA = {
    "movielens": (),
    "amazon": ("data=amazon", "data.category=Beauty", "data.history=20", "task.negatives=20", "teacher.optim.batch_size=256",
               "teacher.optim.epochs=40", "optim.batch_size=512", "optim.epochs=40"),
}  # fmt: skip
STUDENTS = {
    "sasrec": ("student=sasrec", "student.dim=8"),
    "gru4rec": ("student=gru4rec", "student.dim=8"),
    "bpr": ("student=bpr", "student.dim=8", "task=recommend", "task.objective=sampled_softmax", "task.negatives=100",
            "task.cutoffs=[10]", "task.select=ndcg_at_10", "optim.batch_size=256", "optim.epochs=40",
            "teacher.task={name: next_item, objective: sampled_softmax, negatives: ${task.negatives}}"),
}  # fmt: skip
METHODS = (
    Method("plain", ("loss=none",)),
    Method("KD on candidates", ("loss=kd", "loss.temperature=2")),
    Method("margin-MSE", ("loss=margin_mse",)),
    Method("RRD", ("loss=rrd", "loss.top=200")),
    Method("CD", ("loss=cd",)),
    Method("UnKD", ("loss=unkd",)),
)
WEIGHTS = {
    "KD on candidates": (0.3, 1, 3), "margin-MSE": (0.01, 0.1, 1), "RRD": (0.01, 0.1), "CD": (0.01, 0.1), "UnKD": (0.3, 1),
}  # fmt: skip


def main() -> None:
    parser = arguments(NAME, __doc__)
    add_choice(parser, "--data", DATA, default="movielens")
    add_choice(parser, "--students", STUDENTS)
    add_choice(parser, "--methods", (m.label for m in METHODS), always="plain")
    add_option(parser)
    given = parser.parse_args()
    frames, sweeps = [], given.sweeps
    for data in given.data:
        for student in given.students:
            given.sweeps = sweeps / f"{data}-{student}"
            own = [
                Method(m.label, (*STUDENTS[student], *DATA[data], *m.overrides)) for m in METHODS if m.label in given.methods
            ]
            own = [chosen(NAME, m, WEIGHTS[m.label], given) if m.label in WEIGHTS else m for m in own]
            own = [recorded(NAME, m, given) for m in own]
            frames.append(run_methods(NAME, own, given, f"{data}: {student}"))
    frame = with_recorded(joined(frames), given)
    columns = ["n", "metric", "difference", "p", "test.hit_rate_at_10", "test.mrr_at_10", "bytes", "latency_1"]
    columns += ["teacher.metrics.test.ndcg_at_10"]
    write_tables(given.out, make(frame, by=("problem", "method"), metric="test.ndcg_at_10", columns=columns))
    write_records(given.out, frame)


if __name__ == "__main__":
    main()
