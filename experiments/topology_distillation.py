"""Topology distillation on CiteULike: BPR 200 into BPR 10, 20, 100, 200; student alone, FitNet, DE, FTD, HTD.

Source: Kang, Hwang, Kweon, Yu 2021, Topology Distillation for Recommender System (KDD), their repository's split and the
learning curves of its notebook (one run each; published_history.json beside the split), and Table 1 of the paper for the
student of 20 dimensions.

    python experiments/topology_distillation.py [--seeds 5] [--losses none,ftd] [--dims 10,20] [--costly-seeds 1]
        [--add]

needs CiteULike (citeulike-t) in $JDISTILL_DATA. Finished runs are kept in sweeps/ and not repeated; a stopped run continues.
`de` and `htd` train 30 dense experts on all entities of a batch, some 20 to 90 minutes a run on two cores: --costly-seeds
says how many of their runs to make. Their epoch 100 is the 101st here; test curves are shown, nothing is chosen by them.
FitNet is `entity_hint`, one regressor for users and one for items, with DE's weight: the repository does not hold theirs.
Expected and time: results/topology_distillation/README.md.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import pandas as pd
from _common import METHOD, Method, add_choice, arguments, joined, run_methods, with_notes, write_tables
from _ranking import curve_figure, curves, with_curves, with_published
from _records import CURVE, add_option, recorded, with_recorded, write_records

from jdistill.report import make_table

NAME = "topology_distillation"
LABELS = {"none": "Student", "entity_hint": "FitNet", "de": "DE", "ftd": "FTD", "htd": "HTD"}
COSTLY = ("de", "htd")
TEMPERATURE = dict.fromkeys(COSTLY, ("loss.temperature={name: annealing}",))
METRIC = "test.recall_at_50"
EPOCHS = range(0, 101, 10)
PAPER = {  # Table 1, BPR, student of 20 dimensions: Recall@50
    "Student": 0.2347, "FitNet": 0.2521, "DE": 0.2615, "FTD": 0.2624, "HTD": 0.2803,
}  # fmt: skip


def main() -> None:
    parser = arguments(NAME, __doc__)
    add_choice(parser, "--losses", LABELS, always="none")
    parser.add_argument("--dims", default="10,20,100,200", help="sizes of the student (default: %(default)s)")
    parser.add_argument(
        "--costly-seeds", type=int, default=1, help="how many of the seeds de and htd take (default: %(default)s)"
    )
    add_option(parser)
    given = parser.parse_args()
    dims = [int(dim) for dim in given.dims.split(",")]
    frames = []
    for loss in given.losses:
        own = argparse.Namespace(seeds=min(given.costly_seeds, given.seeds) if loss in COSTLY else given.seeds)
        for dim in dims:
            own.sweeps = given.sweeps / f"{dim}"
            method = Method(LABELS[loss], (f"loss={loss}", f"student.dim={dim}", *TEMPERATURE.get(loss, ())))
            frames.append(run_methods(NAME, [recorded(NAME, method, given)], own))
    frame = with_recorded(with_curves(joined(frames), METRIC), given, "config.student.dim")
    published = history()
    table = make_table(
        frame, by=["student.dim", "method"], baseline="method=Student", metric=METRIC,
        columns=["n", "metric", "difference", "p", "test.recall_at_10", "test.ndcg_at_10", "test.recall_at_20",
                 "test.ndcg_at_20", "test.ndcg_at_50", "bytes"],
    )  # fmt: skip
    last = {(dim, name): curve[-1] for dim, own in published.items() for name, curve in own.items()}
    table = with_published(table, last, "R@50 in their log", "config.student.dim", METHOD)
    paper = {("20", name): value for name, value in PAPER.items()}
    table = with_published(table, paper, "R@50 in the paper", "config.student.dim", METHOD)
    write_tables(given.out, with_notes(table, "the teacher in their log: R@50 0.3123."))
    write_records(given.out, frame)
    draw(frame, published, given.out)


def history() -> dict[str, Any]:
    """The authors' curves: dim -> method -> test Recall@50 at `EPOCHS`."""
    path = Path(os.environ["JDISTILL_DATA"]) / "citeulike-t" / "published_history.json"
    return json.loads(path.read_text())["students"]


def draw(frame: pd.DataFrame, published: dict[str, Any], out: Path) -> None:
    """`curves.png`; `some_curves.png` where recorded runs hold no curve, of those that do."""
    done = frame[frame["status"] == "finished"]
    known = done[CURVE].notna() if CURVE in done else pd.Series(False, done.index)
    path = out / ("curves.png" if known.all() else "some_curves.png")
    if not known.all():
        print(f"{path.name}: {(~known).sum()} recorded runs without a learning curve are left out", file=sys.stderr)
    done = done[known]
    panels: dict[str, dict[str, Any]] = {}
    theirs: dict[str, dict[str, Any]] = {}
    for (dim, name), runs in done.groupby(["config.student.dim", METHOD]):
        epochs, values = curves(runs, METRIC)
        panels.setdefault(f"student of {dim}", {})[name] = (epochs, values)
        if name in published.get(str(dim), {}):
            theirs.setdefault(f"student of {dim}", {})[name] = (list(EPOCHS), published[str(dim)][name])
    if panels:
        curve_figure(panels, theirs, path, "test Recall@50")


if __name__ == "__main__":
    main()
