"""Compressed recommenders on CiteULike: Recall against bytes, for one BPR network and for smaller, distilled ones.

Source of the methods: the survey of Li et al. 2024, Embedding Compression in Recommender Systems (arXiv 2408.02304); data and
recipe: Kang et al. 2021, Topology Distillation for Recommender System (KDD).

    python experiments/compress_recommender.py [--seeds 3] [--methods full;row int8]

needs CiteULike (citeulike-t) in $JDISTILL_DATA. Rows "full" to "hashing" compress one trained network of 100 dimensions; those
whose form is trained get 5 more epochs. "20" and "20, FTD" are students of 20 dimensions, alone and distilled from it, trained
for 60 epochs. Finished runs are kept in sweeps/ and not repeated.
Expected and time: results/compress_recommender/README.md.
"""

from _common import Method, add_choice, arguments, make, run_methods, with_notes, write_tables
from _records import write_records

from jdistill.report import scatter_figure

NAME = "compress_recommender"
SMALL = ("student.dim=20", "transfer.inherit=false", "optim.epochs=60")
METHODS = (
    Method("full", ()),
    Method("row int8", ("compression=row_int8",)),
    Method("row int4", ("compression=row_int4",)),
    Method("half of the weights", ("compression=prune", "compression.sparsity=0.5")),
    Method("k-means, 16 values", ("compression=weight_sharing",)),
    Method("product quantization", ("compression=pq_embedding",)),
    Method("low rank, 25 of 100", ("compression=low_rank", "compression.only='user,item'")),
    Method("half of the dimensions", ("compression=embedding_dims",)),
    Method("half of the rows", ("compression=embedding_rows",)),
    Method("quotient-remainder", ("compression=qr_embedding",)),
    Method("hashing", ("compression=hash_embedding",)),
    Method("20", SMALL),
    Method("20, FTD", (*SMALL, "loss=ftd")),
    Method("20, FTD, row int8", (*SMALL, "loss=ftd", "compression=row_int8")),
    Method("20, FTD, row int4", (*SMALL, "loss=ftd", "compression=row_int4")),
)


def main() -> None:
    """Runs the sweeps and writes table, figure and records."""
    parser = arguments(NAME, __doc__, seeds=3)
    add_choice(parser, "--methods", (m.label for m in METHODS), always="full", separator=";")
    given = parser.parse_args()
    wanted = [method for method in METHODS if method.label in given.methods]
    frame = run_methods(NAME, wanted, given)
    shown = ("n", "metric", "difference", "p", "test.recall_at_10", "test.ndcg_at_50", "bytes", "nonzero", "cpu_1", "train_s")
    table = make(frame, baseline="method=full", metric="test.recall_at_50", columns=shown)
    write_tables(given.out, with_notes(table, "train (s): without that of the network of 100 dimensions."))
    scatter_figure(frame, path=given.out / "recall_bytes.png", by="method", y="metrics.test.recall_at_50")
    write_records(given.out, frame)


if __name__ == "__main__":
    main()
