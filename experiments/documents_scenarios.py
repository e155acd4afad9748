"""The source documents' scenarios, each a row with a number: teacher, plain student, distilled student, bytes, latency.

Source: the project's source documents on distillation for e-commerce search and recommendation. They name the scenarios, not
the data; sizes, data and recipes here are our own, on public data sets, except where the row says synthetic.

    python experiments/documents_scenarios.py [--seeds 5] [--out results/documents_scenarios] [--only "price prediction"]

needs the data in $JDISTILL_DATA. The row of search ranking is read out of results/search_icecat. Each row: one teacher (seed
0), `--seeds` plain and distilled students; the weight of the distillation loss is chosen on validation where several are
tried, one for all seeds.
Bytes and latency of the teacher are those of its network trained once as a student.
Expected and time: results/documents_scenarios/README.md.
"""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from _common import (
    COLOURS,
    METHOD,
    PROBLEM,
    Method,
    add_choice,
    arguments,
    run_methods,
    save,
    with_notes,
    write_tables,
)
from _records import write_records
from _selection import select

from jdistill.report import Table, compare, correct, mean_std
from jdistill.report.cells import Column, lower_is_better

NAME = "documents_scenarios"


@dataclasses.dataclass(frozen=True)
class Scenario:
    """A row: its data and networks.

    Attributes:
      name: as the documents have it.
      about: data and networks, for the table.
      metric: of the test split.
      common: overrides of all runs.
      teacher, student: the options of a network, `name` first, then `key=value`.
      loss: overrides of the distilled student.
      recipe: overrides of the teacher's optimizer, without the prefix `teacher.`.
      distilled: more overrides of the distilled student.
    """

    name: str
    about: str
    metric: str
    common: tuple[str, ...]
    teacher: tuple[str, ...]
    student: tuple[str, ...]
    loss: tuple[str, ...]
    recipe: tuple[str, ...]
    distilled: tuple[str, ...] = ()

    def methods(self) -> list[Method]:
        """The teacher's network as a student, the plain student, the distilled one."""
        student, alone = network("student", self.student), (*self.common, "loss=none")
        taught = (*network("teacher", self.teacher), *(f"teacher.{override}" for override in self.recipe))
        return [
            Method("teacher", (*alone, *network("student", self.teacher), *self.recipe)),
            Method("plain", (*alone, *student)),
            Method("distilled", (*self.common, *student, *taught, "teacher.seed=0", *self.loss, *self.distilled)),
        ]


def network(group: str, options: Sequence[str]) -> tuple[str, ...]:
    """Overrides of a group: `("mlp", "widths=[8]")` is `teacher=mlp teacher.widths=[8]`."""
    name, *keys = options
    return (f"{group}={name}", *(f"{group}.{key}" for key in keys))


def optim(lr: float, epochs: int, batch: int) -> tuple[str, ...]:
    """Adam at a learning rate."""
    return (f"optim.lr={lr:g}", f"optim.epochs={epochs}", f"optim.batch_size={batch}")


TABLE = optim(2e-3, 20, 256)
SEQUENCES = ("task=next_item", "task.objective=sampled_softmax", "task.negatives=100", "task.cutoffs=[10]")
SCENARIOS = (
    Scenario(
        "behaviour prediction", "Retailrocket, view, cart or purchase: mlp 128-64 to mlp 8", "cross_entropy",
        ("data=retailrocket_behaviour", "task=classification", "report=last", *TABLE),
        ("mlp", "widths=[128,64]"), ("mlp", "widths=[8]"),
        ("loss=kd", "loss.temperature=2", "loss.weight=0.3,1,3"), TABLE,
    ),
    Scenario(
        "product recommendation", "Retailrocket, whole catalogue: BPR 64 to BPR 8, KD on candidates", "ndcg_at_10",
        ("data=retailrocket", "task=recommend", "task.objective=bpr", "task.cutoffs=[10]", "task.reduction=sum",
         "evaluate.every=10", *optim(3e-3, 40, 1024), "optim.weight_decay=1e-3"),
        ("bpr", "dim=64"), ("bpr", "dim=8"),
        ("loss=kd", "loss.temperature=1", "loss.weight=0.3,1,3"), (*optim(3e-3, 40, 1024), "optim.weight_decay=1e-3"),
    ),
    Scenario(
        "price prediction", "Icecat, log price: wide_mlp 256-128 to wide_mlp 8, squared error of the predictions", "rmse",
        ("data=icecat_price", "task=regression", *optim(2e-3, 30, 256)),
        ("wide_mlp", "widths=[256,128]"), ("wide_mlp", "widths=[8]"),
        ("loss=logit_mse", "loss.weight=0.3,1,3"), optim(1e-3, 30, 256),
    ),
    Scenario(
        "personalised recommendation", "MovieLens latest-small, next film: SASRec 32 to GRU4Rec 8, KD on candidates",
        "ndcg_at_10",
        ("data=movielens", "data.history=20", *SEQUENCES, "evaluate.every=5", *optim(3e-3, 15, 64)),
        ("sasrec", "dim=32", "layers=2", "heads=2", "dropout=0.3"), ("gru4rec", "dim=8"),
        ("loss=kd", "loss.temperature=2", "loss.weight=1"), optim(1e-3, 15, 64),
    ),
    Scenario(
        "related items", "Amazon Beauty, the item after an item: SASRec 64 to SASRec 8 on a history of one, KD on candidates",
        "ndcg_at_10",
        ("data=amazon", "data.category=Beauty", "data.history=1", *SEQUENCES, "evaluate.every=5",
         *optim(3e-3, 10, 512)),
        ("sasrec", "dim=64", "layers=1", "heads=1"), ("sasrec", "dim=8", "layers=1", "heads=1"),
        ("loss=kd", "loss.temperature=2", "loss.weight=1"), optim(2e-3, 10, 512),
    ),
    Scenario(
        "risk control", "credit card default: mlp 128-64 to mlp 8, soft cross-entropy", "auc",
        ("data=credit_default", "task=click", *TABLE),
        ("mlp", "widths=[128,64]", "dropout=0.2"), ("mlp", "widths=[8]"),
        ("loss=bce_soft", "loss.weight=0.3,1,3"), TABLE,
    ),
    Scenario(
        "real-time", "Online Shoppers, conversion: mlp 1024-1024 to mlp 16, soft cross-entropy", "auc",
        ("data=online_shoppers", "task=click", *TABLE),
        ("mlp", "widths=[1024,1024]", "dropout=0.5"), ("mlp", "widths=[16]"),
        ("loss=bce_soft", "loss.weight=0.3,1,3"), optim(1e-3, 10, 256),
    ),
    Scenario(
        "several teachers", "credit card default: DeepFM, DCNv2 and wide_mlp to wide_mlp 8, soft cross-entropy", "auc",
        ("data=credit_default", "data.encoding=index", "task=click", *TABLE),
        ("deepfm",), ("wide_mlp", "widths=[8]", "dim=2"),
        ("loss=bce_soft", "loss.weight=0.3,1,3"), optim(1e-3, 10, 256),
        ("scheme=multi_teacher", "scheme.teachers=[{}, {name: dcnv2}, {name: wide_mlp}]"),
    ),
    Scenario(
        "cross-domain", "synthetic shop: BPR 16 of one domain; BPR 16 of the other starts with its users", "ndcg_at_10",
        ("data=synthetic_shop", "data.domain=second", "data.items=300", "data.events=6", "task=recommend", "task.cutoffs=[10]",
         "evaluate.every=5", *optim(3e-3, 40, 256)),
        ("bpr", "dim=16"), ("bpr", "dim=16"),
        ("loss=none", "transfer.inherit=true"), optim(3e-3, 40, 256),
        ("teacher.data={domain: main, items: 400, events: 20}",),
    ),
)  # fmt: skip


def summary(frame: pd.DataFrame, metric: str) -> dict[str, Any]:
    """The numbers of a scenario out of its finished runs: means, the paired difference, bytes, latency.

    `teacher.mean` is that of the very teacher of the distilled students, not of the network trained again.
    """
    done = frame[frame["status"] == "finished"]
    runs = {method: done[done[METHOD] == method] for method in ("teacher", "plain", "distilled")}
    column = f"metrics.test.{metric}"
    seeds = {method: dict(zip(own["config.seed"], own[column].astype(float))) for method, own in runs.items()}
    common = [seed for seed in seeds["distilled"] if seed in seeds["plain"]]
    row: dict[str, Any] = {"n": len(common), "baseline": False, "metric": metric.replace("_", " ")}
    for method in ("plain", "distilled"):
        row[f"{method}.mean"], row[f"{method}.std"] = mean_std([seeds[method][seed] for seed in common])
    taught = runs["distilled"].get(f"teacher.{column}", pd.Series(dtype=float)).dropna()
    row["teacher.mean"] = float(taught.mean()) if len(taught) else float("nan")
    found = compare([seeds["distilled"][s] for s in common], [seeds["plain"][s] for s in common])
    row |= {"difference": found.difference, "difference.low": found.low, "difference.high": found.high, "p.raw": found.p}
    for method, own in (("teacher", runs["teacher"]), ("student", runs["distilled"])):
        row[f"bytes.{method}"] = float(own["size.bytes"].mean())
        row[f"latency.{method}"] = float(own["latency_ms.1.p50"].median())
    return row


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """A line a scenario; p corrected (Holm) over all of them."""
    corrected = correct([row["p.raw"] for row in rows], "holm")
    made = tuple({**row, "p": float(p)} for row, p in zip(rows, corrected, strict=True))
    columns = [
        Column(name, name, "key", {name: name}) for name in ("scenario", "data and networks", "metric")
    ]  # fmt: skip
    columns.append(Column("n", "n", "count", {"n": "n"}))
    for name, title in (("teacher", "teacher"), ("plain", "plain student"), ("distilled", "distilled student")):
        columns.append(Column(name, title, "metric", {f"{name}.{part}": f"{name}.{part}" for part in ("mean", "std")}))
    ends = {name: name for name in ("difference", "difference.low", "difference.high")}
    columns.append(Column("difference", "difference to plain [95 % CI]", "difference", ends))
    columns.append(Column("p", "p (Holm)", "p", {"p": "p", "p.raw": "p.raw"}))
    for kind, name, title in (("whole", "bytes", "bytes"), ("number", "latency", "latency b=1 (ms)")):
        for who in ("teacher", "student"):
            columns.append(Column(f"{name}.{who}", f"{title}, {who}", kind, {f"{name}.{who}": f"{name}.{who}"}))
    return Table(tuple(columns), made, (), "")


def from_search(folder: Path) -> list[dict[str, Any]]:
    """The row of search ranking: the small ranker on cheap features, out of the records of search_icecat; or none."""
    path = folder / "search_icecat" / "runs.jsonl"
    if not path.is_file():
        return []
    runs = pd.DataFrame([json.loads(line) for line in path.read_text().splitlines()])
    runs = runs.rename(columns={"seed": "student_seed", "problem": PROBLEM}).rename(columns={"data.fold": "config.seed"})
    cheap, metric = runs[runs[PROBLEM] == "cheap features, 32 units"], "metrics.test.ndcg_at_10"
    own = [cheap[cheap["method"] == name].assign(**{METHOD: label})
           for name, label in (("plain", "plain"), ("listwise KD", "distilled"))]  # fmt: skip
    own.append(runs[runs[PROBLEM] == "the teacher's network"].assign(**{METHOD: "teacher"}))
    keys = ["config.seed", METHOD, "status"]
    numbers = [metric, f"teacher.{metric}", "size.bytes", "latency_ms.1.p50"]
    folds = pd.concat(own).groupby(keys, as_index=False)[numbers].mean()
    about = "Icecat: ltr_mlp 64-32 on all features to ltr_mlp 32 on cheap ones, listwise KD; a seed is a fold"
    return [{"scenario": "search ranking", "data and networks": about, **summary(folds, "ndcg_at_10")}]


def run(scenario: Scenario, given: argparse.Namespace) -> pd.DataFrame:
    """The scenario's runs, of the distilled ones those of the weight that is best on validation."""
    teacher, *students = scenario.methods()
    once = argparse.Namespace(**{**vars(given), "seeds": 1})
    tried = pd.concat(
        [run_methods(NAME, [teacher], once, scenario.name), run_methods(NAME, students, given, scenario.name)],
        ignore_index=True,
    )
    return select(tried, ("loss.weight",), scenario.metric, None, least=lower_is_better(scenario.metric))


def figure(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Of each scenario the difference to plain in percent of the plain student's value, positive where better."""
    import matplotlib.pyplot as plt

    plot, axis = plt.subplots(figsize=(7, 0.42 * len(rows) + 1.2), layout="constrained")
    for place, row in enumerate(rows):
        sign = -1 if lower_is_better(row["metric"].replace(" ", "_")) else 1
        mean, low, high = (sign * 100 * row[f"difference{end}"] / row["plain.mean"] for end in ("", ".low", ".high"))
        colour = COLOURS[place % len(COLOURS)]
        axis.plot([low, high], [place, place], color=colour, linewidth=2)
        axis.plot([mean], [place], "D", color=colour)
    axis.axvline(0, color="0.4", linewidth=1)
    axis.set_yticks(range(len(rows)), [f"{row['scenario']} ({row['metric']})" for row in rows])
    axis.invert_yaxis()
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_xlabel("distilled minus plain, % of plain (right: better)")
    save(plot, path)


def main() -> None:
    parser = arguments(NAME, __doc__)
    add_choice(parser, "--only", (scenario.name for scenario in SCENARIOS))
    given = parser.parse_args()
    scenarios = [scenario for scenario in SCENARIOS if scenario.name in given.only]
    frames = {scenario: run(scenario, given) for scenario in scenarios}
    rows = [
        {"scenario": s.name, "data and networks": s.about, **summary(frame, s.metric)} for s, frame in frames.items()
    ] + from_search(given.out.parent)
    note = "metrics as fractions; cross entropy in nats, rmse of the natural logarithm of the price: smaller is better in both."
    write_tables(given.out, with_notes(table(rows), note))
    write_records(given.out, pd.concat(frames.values(), ignore_index=True))
    figure(rows, given.out / "difference.png")


if __name__ == "__main__":
    main()
