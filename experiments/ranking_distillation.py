"""DE-RRD on CiteULike: BPR 200 into BPR 20; student alone, RD, CD, DE, RRD, IR-RRD, DE-RRD; one item among 499 random ones.

Source: Kang, Hwang, Kweon, Yu 2020, DE-RRD: A Knowledge Distillation Framework for Recommender System (CIKM), Table 2 (five
seeds), and the logs in their repository and in that of IR-RRD (seed 0 of the published split).

    python experiments/ranking_distillation.py [--seeds 3] [--methods Student,RRD] [--split derrd] [--add]
    python experiments/ranking_distillation.py --split own --seeds 5      five splits of our own instead of the published one

needs CiteULike in $JDISTILL_DATA (citeulike-derrd; citeulike-t for --split own). Finished runs are kept in sweeps/ and not
repeated; a stopped run continues. The 499 candidates were not published: ours are drawn by `data.split_seed`. RD's and CD's
weights, which their papers tune, are chosen on validation with seed 0. DE anneals its temperature over 1,000 epochs, as the
authors' code does, whether or not it stops earlier. --split own: a seed is a split, the student's seed, and its own teacher's.
Expected and time: results/ranking_distillation/README.md.
"""

from _common import Method, add_choice, arguments, make, run_methods, with_notes, write_tables
from _ranking import chosen, weights, with_published
from _records import add_option, recorded, with_recorded, write_records

NAME = "ranking_distillation"
ANNEALED = "{name: annealing, epochs: 1000}"
METHODS = (
    Method("Student", ("loss=none",)),
    Method("RD", ("loss=rd",)),
    Method("CD", ("loss=cd", "evaluate.patience=200")),  # its H@5 falls from epoch 55, is back at 180, rises till 600
    Method("RRD", ("loss=rrd",)),
    Method("IR-RRD", ("loss=ir_rrd",)),
    Method("DE", ("loss=de", f"loss.temperature={ANNEALED}")),
    Method("DE-RRD", ("loss=de_rrd", f"loss.de={{temperature: {ANNEALED}}}")),
)
TUNED = {"RD": (0.01, 0.1, 1.0, 10.0), "CD": (0.1, 1.0, 10.0)}
LOG = {"Student": 0.4486, "DE": 0.4773, "RRD": 0.4698, "IR-RRD": 0.4947}
PAPER = {"Student": 0.4441, "RD": 0.4533, "CD": 0.4550, "DE": 0.4817, "RRD": 0.4622, "DE-RRD": 0.4843}
OWN = ("data.split=leave_one_out", "data.min_interactions=5", "data.split_seed=${seed}", "teacher.seed=${seed}")


def main() -> None:
    parser = arguments(NAME, __doc__, seeds=3)
    add_choice(parser, "--methods", (m.label for m in METHODS), always="Student")
    parser.add_argument("--split", choices=("derrd", "own"), default="derrd", help="default: %(default)s")
    add_option(parser)
    given = parser.parse_args()
    wanted = [m for m in METHODS if m.label in given.methods]
    more = OWN if given.split == "own" else ()
    wanted = [chosen(NAME, m, TUNED[m.label], given) if m.label in TUNED else m for m in wanted]
    if more:  # on other data: nothing is done yet
        wanted = [Method(m.label, (*m.overrides, *more)) for m in wanted]
    given.sweeps = given.sweeps / given.split
    name = "table" if given.split == "derrd" else "own_splits"
    records = given.out if given.split == "derrd" else given.out / name
    wanted = [recorded(NAME, m, given, records) for m in wanted]
    frame = with_recorded(run_methods(NAME, wanted, given), given, out=records)
    columns = ["n", "metric", "difference", "p", "test.mrr_at_5", "test.ndcg_at_5", "test.hit_rate_at_10", "test.ndcg_at_10",
               "test.hit_rate_at_20", "test.ndcg_at_20", "epoch"]  # fmt: skip
    table = make(frame, baseline="method=Student", metric="test.hit_rate_at_5", columns=columns)
    if not more:  # their log is of their split
        table = with_published(table, LOG, "H@5 in their log")
    table = with_published(table, PAPER, "H@5 in the paper")
    write_tables(given.out, with_notes(table, *weights(frame, TUNED)), name)
    write_records(records, frame)


if __name__ == "__main__":
    main()
