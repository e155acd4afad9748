"""Recommendation: BPR epochs and full ranking against PyTorch, ranking as items grow, tables updated by rows, a whole teacher.

    python benchmarks/recommend.py [--torch-python PATH] [--parts epoch,ranking,growth,...] [--out FILE]

epoch    A BPR epoch on CiteULike (115,142 pairs, batch 1,024, Adam with L2 1e-3 in the gradient, losses summed: the recipe
         of conf/experiment/topology_distillation.yaml), d = 200 and 20, against the same in eager PyTorch. Both draw a
         negative for every pair that its user has not met, and shuffle. The sides take turns, an epoch each.
ranking  The best 50 of 25,182 items for the 5,219 test users, d = 200, without training and validation items:
         `jdistill.ranking.rank_split` against product, mask and `topk` in PyTorch, 1,024 users at a time. Both have the
         lists of exclusions beforehand, and their answers are compared. In turns, too.
growth   Ranking for up to 1,000 users as the catalogue grows, d = 32, random tables, 20 items excluded for each user; fewer
         users where there would be more than `--scores` scores. Memory: the largest resident size in a process of its
         own, less that before ranking, compilation included; and what XLA counts for the program that it runs.
rows     Steps a second of BPR with Adam, d = 32, batch 1,024, 100,000 users, and what XLA counts beside the arguments:
         `optim.rows` against the dense update.
frozen   Steps a second of a BPR student of 20 dimensions with KD from a frozen recommender of 64 on CiteULike: the teacher as
         tables of its vectors, as jdistill trains, against running its network in every step. Untrained teachers of three
         kinds; histories of 50 random items.
own      Scores of 1,024 rows with candidates of their own among 25,182 items, random tables: `score` as the networks call it
         against looking all vectors up and one product, in turns; the largest difference.
teacher  The command: a BPR teacher of 200 dimensions, 100 epochs, evaluated every 10. Start-up and compilation are in it.

Compilation and a first call are outside the timing elsewhere; medians of `--rounds`. Random pairs stand in for CiteULike
where $JDISTILL_DATA has none (`teacher` is then left out). PyTorch's sides need torch, in another Python if need be; without
it they are left out.
"""

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from _bpr import Training, citeulike, dataset
from _common import cores, finish, fresh, has_torch, jdistill, keep_to, names, options, report, results, table, workplace

PARTS = ("epoch", "ranking", "growth", "rows", "frozen", "own", "teacher")
HERE = Path(__file__).resolve().parent
DIMS, SIZE = (200, 20), 50
EXCLUDED, LEAST = 20, 100_000
"""Items excluded for each user, where the tables are random; the smallest catalogue that is updated by rows."""


class Torch:
    """A process of PyTorch's that waits between requests."""

    def __init__(self, process: subprocess.Popen[str]):
        self.process = process

    def __call__(self, **request: Any) -> dict[str, float]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        if not (answer := self.process.stdout.readline()):
            raise SystemExit("PyTorch's side ended; what it said is above")
        return json.loads(answer)


@contextmanager
def torch_side(given: argparse.Namespace, data: Any, folder: Path) -> Iterator[Torch | None]:
    """PyTorch's side, or None where that Python has no torch."""
    import numpy as np

    if not has_torch(given.torch_python):
        print(f"{given.torch_python} has no torch: its sides are left out", file=sys.stderr)
        yield None
        return
    schema = data.schema
    np.savez(folder / "pairs.npz", pairs=data.train["inputs"], users=schema.users, items=schema.items)
    command = [given.torch_python, str(HERE / "_torch_recommend.py")]
    command += ["--data", str(folder / "pairs.npz"), "--threads", str(given.threads)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield Torch(process)
        assert process.stdin is not None
        process.stdin.close()


def compared(rows: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Medians, ranges and PyTorch's median over ours."""
    seconds = {side: [found["seconds"] for found in each] for side, each in rows.items() if each}
    medians = {side: statistics.median(values) for side, values in seconds.items()}
    ratio = medians["pytorch"] / medians["jdistill"] if "pytorch" in medians else None
    return {"seconds": seconds, "median": medians, "ratio": ratio}


def epochs(given: argparse.Namespace, data: Any, torch: Torch | None) -> tuple[dict[str, Any], Training]:
    """Times epochs of every width, the sides in turns; the numbers, and the widest network for the ranking."""
    found, trained = {}, {}
    for dim in DIMS:
        ours, rows = Training(data, dim), {"jdistill": [], "pytorch": []}
        trained[dim] = ours
        for number in range(given.rounds + 1):  # the first is a warm-up
            each = {"jdistill": ours.epoch(), **({"pytorch": torch(do="epoch", dim=dim)} if torch else {})}
            for side, result in each.items():
                if number:
                    rows[side].append(result)
        found[str(dim)] = compared(rows) | {"loss": {side: each[-1]["loss"] for side, each in rows.items() if each}}
    return found, trained[DIMS[0]]


def ranking(given: argparse.Namespace, data: Any, torch: Torch | None, ours: Training, folder: Path) -> dict[str, Any]:
    """Times the ranking of the test users, the sides in turns, and compares their answers."""
    import numpy as np

    from jdistill.ranking import excluded_from, rank_split

    params, rows = ours.state.params["student"], {"jdistill": [], "pytorch": []}
    lists, asked, best = excluded_from(data, "test"), data.test["inputs"][:, 0], None
    tables = {name: np.asarray(params[name]) for name in ("user", "item")}
    np.savez(folder / "ranking.npz", **tables, start=lists.start, values=lists.values, asked=asked)
    request = {"data": str(folder / "ranking.npz"), "out": str(folder / "best.npy"), "size": SIZE}
    for number in range(given.rounds + 1):
        started = time.perf_counter()
        best = rank_split(ours.model, data, (params, {}), "test", SIZE).items
        each = {"jdistill": {"seconds": time.perf_counter() - started}}
        if torch:
            each["pytorch"] = torch(do="rank", **request)
        for side, result in each.items():
            if number:
                rows[side].append(result)
    found = compared(rows) | {"users": len(asked), "items": data.schema.items}
    if torch:
        other = np.load(folder / "best.npy")
        found["same"] = float(np.mean([len(np.intersect1d(a, b)) / SIZE for a, b in zip(best, other)]))
    return found


def largest_growth(call: Any) -> int | None:
    """Bytes by which the resident size rises at most while `call` runs; None where the system does not tell (Linux does)."""

    def resident(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

    known = Path("/proc/self/clear_refs")
    if not known.exists():
        call()
        return None
    known.write_text("5")  # the peak so far is forgotten
    before = resident("VmRSS")
    call()
    return resident("VmHWM") - before


def growth_worker(given: argparse.Namespace) -> dict[str, Any]:
    """In a process of its own: the ranking of one catalogue."""
    import jax
    import numpy as np

    from jdistill import ranking
    from jdistill.models.recommend.bpr import BPR
    from jdistill.modules import from_linen
    from jdistill.sampling import as_lists

    (items,), dim = given.items, 32
    users = int(max(1, min(given.users, given.scores // items)))
    rng, data = np.random.default_rng(0), dataset(users, items, np.zeros((0, 2), np.int32))
    model = from_linen(BPR(schema=data.schema, dim=dim))
    tables = {name: rng.standard_normal((rows, dim), np.float32) for name, rows in (("user", users), ("item", items))}
    params = jax.block_until_ready(jax.device_put(tables))
    excluded = as_lists(np.repeat(np.arange(users), EXCLUDED), rng.integers(0, items, users * EXCLUDED), users)

    def call() -> None:
        ranking.rank(model, data, (params, {}), data.test["inputs"], excluded, SIZE)

    memory = largest_growth(call)
    started = time.perf_counter()
    call()
    seconds = time.perf_counter() - started
    width = min(items, ranking.CATALOGUE)
    rows = max(1, min(users, 1024, ranking.SCORES // width))
    pairs = np.zeros(1 << int(np.ceil(np.log2(rows * EXCLUDED))), np.int32)
    best = (np.zeros((rows, SIZE), np.float32), np.zeros((rows, SIZE), np.int32))
    merge = ranking._best(model, data.preprocess, SIZE, width, items)
    lowered = merge.lower(params, {}, data.test["inputs"][:rows], pairs, pairs, *best, np.int32(0))
    program = lowered.compile().memory_analysis().temp_size_in_bytes
    return {"users": users, "seconds": seconds, "peak": memory, "program": program, "tables": 4 * dim * (users + items)}


def rows_worker(given: argparse.Namespace) -> dict[str, Any]:
    """In a process of its own: steps of one table size, by rows or dense."""
    import jax
    import numpy as np

    (items,), users, dim = given.items, 100_000, 32
    rng = np.random.default_rng(0)
    pairs = np.stack([rng.integers(0, users, 1_000_000), rng.integers(0, items, 1_000_000)], axis=1).astype(np.int32)
    ours = Training(dataset(users, items, pairs), dim, rows=given.worker == "rows")
    used = ours.programs.block.lower(*ours.block(1)).compile().memory_analysis()
    state = sum(leaf.nbytes for leaf in jax.tree.leaves((ours.state.params, ours.state.opt_state)))
    return {"rate": ours.rate(given.rounds), "beside": used.temp_size_in_bytes, "state": state}


def frozen_teachers(given: argparse.Namespace) -> list[dict[str, Any]]:
    """Prints steps a second with the teacher as tables and as a network; returns the numbers."""
    import jax
    import numpy as np

    from jdistill.data.base import Side
    from jdistill.models.recommend.frozen import tabled
    from jdistill.modules import as_model
    from jdistill.ranking import requests_of_all
    from jdistill.registry import build, options

    rng, found = np.random.default_rng(0), []
    data, what = citeulike()
    sequence = rng.integers(0, data.schema.items, (data.schema.users, 51)).astype(np.int32)
    schema, side = dataclasses.replace(data.schema, history=50), Side(np.unique(data.train["inputs"], axis=0))
    data = dataclasses.replace(data, schema=schema, side=side, tables={"sequence": sequence})
    requests = data.preprocess(requests_of_all(data))
    for name in ("sasrec", "gru4rec", "lightgcn"):
        fields = {key: default for key, (_, default) in options("teacher")[name].fields.items()}
        given_ = {"schema": schema} | ({"side": side} if name == "lightgcn" else {})
        model = as_model(build("teacher", {**fields, "name": name, "dim": 64}, **given_))
        variables = model.init(jax.random.key(0), jax.tree.map(lambda a: a[:2], requests))
        tables = tabled(model, variables, requests, (), float("inf"))
        sides = [Training(data, 20, teacher=own) for own in (tables, (model, variables))]
        rates = zip(*[[side.rate(1) for side in sides] for _ in range(given.rounds)], strict=True)  # in turns
        found.append({"teacher": name, **dict(zip(("tables", "network"), map(statistics.median, rates), strict=True))})
    print(f"data: {what}, {given.threads} threads")
    shown = [
        (one["teacher"], f"{one['tables']:.1f}", f"{one['network']:.1f}", f"{one['tables'] / one['network']:.1f}x")
        for one in found
    ]
    table(("teacher", "tables, steps/s", "network", "tables / network"), shown)
    return found


def own_candidates(given: argparse.Namespace) -> list[dict[str, Any]]:
    """Prints milliseconds of scores by rows and of all at once; returns the numbers."""
    import jax
    import numpy as np

    from jdistill.models.recommend._scores import products, score

    sides = (jax.jit(lambda u, t, i: score(u, t, i)[0]), jax.jit(lambda u, t, i: products(u, t[i])))
    rng, found = np.random.default_rng(0), []
    for count, dim in ((50, 20), (50, 200), (500, 20), (500, 200)):
        user, items = (rng.standard_normal((rows, dim), np.float32) for rows in (1024, 25_182))
        args = jax.device_put((user, items, rng.integers(0, len(items), (len(user), count)).astype(np.int32)))
        by_rows, at_once = (np.asarray(side(*args)) for side in sides)
        rounds = []
        for _ in range(4 * given.rounds):
            rounds.append([])
            for side in sides:
                started = time.perf_counter()
                side(*args).block_until_ready()
                rounds[-1].append(1e3 * (time.perf_counter() - started))
        medians = dict(zip(("rows", "once"), map(statistics.median, zip(*rounds, strict=True)), strict=True))
        found.append({"candidates": count, "dim": dim, **medians, "apart": float(np.abs(by_rows - at_once).max())})
    shown = [
        (str(one["candidates"]), str(one["dim"]), f"{one['rows']:.2f}", f"{one['once']:.2f}",
         f"{one['once'] / one['rows']:.1f}x", f"{one['apart']:.0e}")
        for one in found
    ]  # fmt: skip
    table(("candidates", "dim", "by rows, ms", "at once", "at once / by rows", "apart"), shown)
    return found


def ask(given: argparse.Namespace, what: str, items: int) -> dict[str, Any]:
    """What a process of its own measured."""
    command = [sys.executable, __file__, "--worker", what, "--items", str(items), "--users", str(given.users)]
    command += ["--scores", str(given.scores), "--rounds", str(given.rounds), "--threads", str(given.threads)]
    return {"items": items, **json.loads(finish(command)[1].splitlines()[-1])}


def teacher(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Wall time of the command that trains the teacher of topology distillation, as a student without a loss."""
    command = jdistill(
        "experiment=topology_distillation", "loss=none", f"student.dim={DIMS[0]}", f"optim.epochs={given.epochs}",
        "evaluate.every=10", "evaluate.latency=false", f"cache={folder / 'cache'}",
        f"hydra.run.dir={fresh(folder / 'teachers') / 'one'}",
    )  # fmt: skip
    seconds, _ = finish(command, cwd=folder)
    (result,) = results(folder / "teachers")
    return {"seconds": seconds, "epochs": given.epochs, "recall_at_50": result["metrics"]["test"]["recall_at_50"]}


def against_torch(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The parts that PyTorch has a side in; printed."""
    data, what = citeulike()
    print(f"data: {what}; {len(data.train['label'])} pairs, {given.threads} threads")
    numbers: dict[str, Any] = {"data": what}
    with torch_side(given, data, folder) as torch:
        if "epoch" in given.parts:
            numbers["epoch"], ours = epochs(given, data, torch)
        else:
            ours = Training(data, DIMS[0])
            ours.epoch()
        if "ranking" in given.parts:
            numbers["ranking"] = ranking(given, data, torch, ours, folder)
    lines = [(f"epoch, d = {dim}", found) for dim, found in numbers.get("epoch", {}).items()]
    if "ranking" in numbers:
        lines.append((f"ranking of {numbers['ranking']['users']} x {numbers['ranking']['items']}", numbers["ranking"]))
    shown = [
        (what, side, f"{median:.3f}", f"{min(found['seconds'][side]):.3f} to {max(found['seconds'][side]):.3f}",
         f"{found['loss'][side]:.4f}" if "loss" in found else "", f"{median / found['median']['jdistill']:.2f}x")
        for what, found in lines for side, median in found["median"].items()
    ]  # fmt: skip
    table(("", "side", "seconds", "range", "loss", "to jdistill"), shown)
    if "same" in numbers.get("ranking", {}):
        print(f"of PyTorch's best {SIZE}, {numbers['ranking']['same']:.2%} are jdistill's")
    return numbers


def growth(given: argparse.Namespace) -> list[dict[str, Any]]:
    """Prints cost and memory of ranking for each catalogue; returns the numbers."""
    found = [ask(given, "growth", items) for items in given.items]
    shown = [
        (f"{one['items']:,}", str(one["users"]), f"{one['seconds']:.2f}", f"{one['seconds'] / one['users'] * 1e3:.2f}",
         f"{one['seconds'] / one['users'] / one['items'] * 1e9:.1f}", f"{one['tables'] / 1e6:.0f}",
         "" if one["peak"] is None else f"{one['peak'] / 1e6:.0f}", f"{one['program'] / 1e6:.0f}")
        for one in found
    ]  # fmt: skip
    head = ("items", "users", "seconds", "ms a user", "ns a score", "tables, MB", "peak beside, MB", "program, MB")
    table(head, shown)
    return found


def by_rows(given: argparse.Namespace) -> list[dict[str, Any]]:
    """Prints steps a second and memory of both updates for the larger catalogues; returns the numbers."""
    found = []
    for items in (n for n in given.items if n >= LEAST):
        found.append({"items": items, **{side: ask(given, side, items) for side in ("rows", "dense")}})
    shown = [
        (f"{one['items']:,}", f"{one['rows']['rate']:.1f}", f"{one['dense']['rate']:.2f}",
         f"{one['rows']['rate'] / one['dense']['rate']:.0f}x", f"{one['rows']['state'] / 1e6:.0f}",
         f"{one['rows']['beside'] / 1e6:.1f}", f"{one['dense']['beside'] / 1e6:.0f}")
        for one in found
    ]  # fmt: skip
    table(("items", "rows, steps/s", "dense", "rows / dense", "state, MB", "rows beside, MB", "dense beside, MB"), shown)
    return found


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--parts", type=names(PARTS), default=list(PARTS), help="comma-separated")
    parser.add_argument("--torch-python", default=sys.executable, help="a Python that has torch")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=cores())
    items, numbers_of = [10_000, 100_000, 1_000_000, 10_000_000], lambda text: [int(n) for n in text.split(",")]
    parser.add_argument("--items", type=numbers_of, default=items, help="of growth and rows")
    parser.add_argument("--users", type=int, default=1000, help="of growth, at most")
    parser.add_argument("--scores", type=int, default=10**9, help="of growth, at most, where that leaves a user")
    parser.add_argument("--epochs", type=int, default=100, help="of the teacher")
    parser.add_argument("--folder", type=Path, help="work here and keep it (default: a temporary folder)")
    parser.add_argument("--worker", choices=("growth", "rows", "dense"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    keep_to(given.threads)
    if given.worker:
        print(json.dumps(growth_worker(given) if given.worker == "growth" else rows_worker(given)))
        return
    numbers: dict[str, Any] = {}
    with workplace(given.folder) as folder:
        if {"epoch", "ranking"} & set(given.parts):
            numbers |= against_torch(given, folder)
        for part, measure in (("growth", growth), ("rows", by_rows), ("frozen", frozen_teachers), ("own", own_candidates)):
            if part in given.parts:
                numbers[part] = measure(given)
        if "teacher" in given.parts:
            numbers["teacher"] = teacher(given, folder)
            print("teacher: {seconds:.1f} s for {epochs} epochs, recall_at_50 {recall_at_50:.4f}".format(**numbers["teacher"]))
    report(numbers, given.out)


if __name__ == "__main__":
    main()
