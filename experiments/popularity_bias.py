"""UnKD's table on CiteULike: MF 100 into MF 10; recall and NDCG at 10, and recall on popular and unpopular items.

Source: Chen, Chen, Gao, Chen, Wu, He 2023, Unbiased Knowledge Distillation for Recommendation (WSDM), Table 3 and the table of
popularity groups; settings of the baselines from the authors' code.

    python experiments/popularity_bias.py [--seeds 5] [--methods Student,UnKD] [--add]

needs CiteULike (citeulike-t) in $JDISTILL_DATA. Finished runs are kept in sweeps/ and not repeated; a stopped run continues.
The weights of RD, CD and UnKD are chosen on validation with seed 0 (the paper tunes too, and does not say with which seeds);
those of DE-RRD and HTD are their own authors'.
Recall in a group counts users without an item of it as 0, as their code does ("all users"); which of their groups the paper's
"popular" and "unpopular" are, the code does not say: here two groups of equal total popularity.
Expected and time: results/popularity_bias/README.md.
"""

from _common import Method, add_choice, arguments, make, run_methods, with_notes, write_tables
from _ranking import chosen, weights, with_published
from _records import add_option, recorded, with_recorded, write_records

NAME = "popularity_bias"
METHODS = (
    Method("Student", ("loss=none",)),
    Method("RD", ("loss=rd", "loss.top=30", "loss.mu=0.1", "loss.samples=100")),
    Method("CD", ("loss=cd", "loss.samples=50", "loss.temperature=2", "loss.shift=0")),
    Method("DE-RRD", ("loss=de_rrd", "loss.de={experts: 5, temperature: {name: annealing}}",
                      "loss.rrd={top: 100, temperature: 30, interesting: 20, uninteresting: 20}", "loss.weight=0.01")),
    Method("HTD", ("loss=htd", "loss.temperature={name: annealing}", "loss.weight=1e-3")),
    Method("UnKD", ("loss=unkd",)),
)  # fmt: skip
TUNED = {"RD": (0.01, 0.1, 1.0), "CD": (0.01, 0.1, 1.0, 10.0), "UnKD": (0.03, 0.1, 0.3, 1.0)}
PAPER = {
    "R@10": {"Student": 0.0760, "RD": 0.0808, "CD": 0.0801, "DE-RRD": 0.0793, "HTD": 0.0788, "UnKD": 0.0863},
    "popular": {"Student": 0.0831, "RD": 0.0910, "CD": 0.0887, "DE-RRD": 0.0899, "HTD": 0.0885, "UnKD": 0.0854},
    "unpopular": {"Student": 0.0095, "RD": 0.0085, "CD": 0.0088, "DE-RRD": 0.0075, "HTD": 0.0068, "UnKD": 0.0208},
}
GROUPS = ("test.recall_at_10_popular_all_users", "test.recall_at_10_unpopular_all_users")


def main() -> None:
    parser = arguments(NAME, __doc__, seeds=5)
    add_choice(parser, "--methods", (m.label for m in METHODS), always="Student")
    add_option(parser)
    given = parser.parse_args()
    wanted = [m for m in METHODS if m.label in given.methods]
    wanted = [chosen(NAME, m, TUNED[m.label], given) if m.label in TUNED else m for m in wanted]
    wanted = [recorded(NAME, m, given) for m in wanted]
    frame = with_recorded(run_methods(NAME, wanted, given), given)
    columns = ["n", "metric", "difference", "p", "test.ndcg_at_10", *GROUPS, "epoch"]
    table = make(frame, baseline="method=Student", metric="test.recall_at_10", columns=columns)
    for group, published in PAPER.items():
        table = with_published(table, published, f"{group} in the paper")
    write_tables(given.out, with_notes(table, *weights(frame, TUNED), "the teacher in the paper: R@10 0.1518"))
    write_records(given.out, frame)


if __name__ == "__main__":
    main()
