"""Digits: four losses, three compressions, three seeds; the table and the figure of the README.

Source: none; this is the project's main job, `jdistill -m experiment=quickstart`, with its results written to results/.

    python experiments/quickstart.py [--seeds 3] [--out results/quickstart]

Expected: with 3 seeds no loss differs significantly from plain training; int8 keeps the accuracy at a third of the bytes.
Time: 31 s on 2 cores from an empty cache.
"""

from _common import arguments, run_sweep, write_tables
from _records import write_records

from jdistill.report import make_table, scatter_figure

COLUMNS = ("n", "metric", "difference", "p", "detectable", "nonzero", "bytes")


def main() -> None:
    """Runs the sweep and writes table, figure and records."""
    given = arguments("quickstart", __doc__, seeds=3).parse_args()
    frame = run_sweep(given.sweeps, ["experiment=quickstart"], range(given.seeds))
    write_tables(given.out, make_table(frame, columns=COLUMNS))
    scatter_figure(frame, path=given.out / "accuracy_bytes.png")
    write_records(given.out, frame)


if __name__ == "__main__":
    main()
