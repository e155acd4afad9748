"""Recommendation by the command: losses, families of networks, catalogues, tables, and wrong requests."""

import csv
import io
from pathlib import Path

import numpy as np
import pytest

from jdistill.teachers import store
from tests.e2e.helpers import call, finish, jobs, result, rows, run, sole_error, start, succeed, teachers

SHOP = (
    "data=synthetic_shop", "data.users=60", "data.items=50", "data.queries=20", "task=recommend", "task.cutoffs=[5,10]",
    "optim.epochs=2", "teacher.optim.epochs=2", "optim.batch_size=50", "teacher.optim.batch_size=50",
    "evaluate.latency=false",
)  # fmt: skip
TINY = (*SHOP, "teacher=bpr", "teacher.dim=8", "student=bpr", "student.dim=3")
RRD = ("loss=rrd", "loss.interesting=4", "loss.uninteresting=4", "loss.top=10")
SEQUENCES = ("data.history=6", "teacher=sasrec", "teacher.dim=8", "teacher.layers=1", "teacher.optim.batch_size=20")
METRICS = {f"{name}_at_{k}" for name in ("recall", "ndcg", "hit_rate", "precision", "mrr", "map") for k in (5, 10)}


pytestmark = pytest.mark.usefixtures("one_cache")


def write(path, lines, header="user,item,time"):
    Path(path).write_text("\n".join([header, *(",".join(map(str, line)) for line in lines), ""]))


def log(users=20, items=30, length=8):
    """(user, item, time) of users who each met `length` different items."""
    rng = np.random.default_rng(0)
    return [(f"u{u}", f"i{i}", t) for u in range(users) for t, i in enumerate(rng.choice(items, length, replace=False))]


OWN = ("data=interactions", "data.path=log.csv", "task=recommend", "teacher=bpr", "student=bpr", "loss=none",
       "optim.epochs=1", "optim.batch_size=20", "evaluate.latency=false")  # fmt: skip


# -- what runs


@pytest.mark.parametrize(
    "loss",
    [
        pytest.param(("loss=kd",), marks=pytest.mark.slow), RRD, pytest.param(("loss=none",), marks=pytest.mark.slow),
        pytest.param(("loss=cd", "loss.pool=10", "loss.samples=5"), marks=pytest.mark.slow),
        pytest.param(("loss=de", "loss.experts=2"), marks=pytest.mark.slow),
        pytest.param(("loss=ftd",), marks=pytest.mark.slow),
    ],
    ids=lambda loss: loss[0],
)  # fmt: skip
def test_a_run_of_each_loss(loss):
    found = run(Path("run"), *TINY, *loss)
    assert found["status"] == "finished" and found["primary"] == "ndcg_at_5"
    assert set(found["metrics"]["test"]) >= METRICS and set(found["metrics"]["validation"]) >= METRICS
    assert all(np.isfinite(value) for value in found["metrics"]["test"].values())
    assert ("teacher_overlap_at_10" in found["metrics"]["test"]) == (loss[0] != "loss=none")
    (last,) = [row for row in rows(Path("run")) if row["epoch"] == 2]
    assert set(last["train"]) == {"loss", "bpr", "ordered"} | ({loss[0][5:]} - {"none"})
    assert set(last["validation"]) >= METRICS


def test_two_losses_and_two_seeds_in_one_table():
    succeed("-m", *TINY, "loss=none,kd", "seed=0,1", "hydra.sweep.dir=sweep")
    assert [job["status"] for job in jobs(Path("sweep"))] == ["finished"] * 4
    text = Path("sweep/table.md").read_text()
    assert "test.ndcg_at_5" in text
    lines = list(csv.DictReader(io.StringIO(Path("sweep/table.csv").read_text())))
    assert {line["loss"] for line in lines} == {"none", "kd"} and {line["n"] for line in lines} == {"2"}
    for line in lines:
        own = [result(Path("sweep") / job["dir"])["metrics"]["test"]["ndcg_at_5"] for job in jobs(Path("sweep"))
               if f"loss={line['loss']}" in job["overrides"]]  # fmt: skip
        shown = [float(v) for v in line.values() if v and v.replace(".", "").isdigit() and abs(float(v) - np.mean(own)) < 1e-3]
        assert shown


@pytest.mark.slow
def test_a_population_is_its_members_alone():
    """Four jobs in one program, and each in a program of its own."""
    arguments = ("-m", *TINY, *RRD, "seed=0,1,2", "hydra.sweep.dir={}")
    for strategy in ("vmap", "loop"):
        made = [argument.format(strategy) for argument in arguments]
        succeed(*made, f"hydra.launcher.strategy={strategy}", "force=true")
    one, other = ({job["dir"]: result(Path(name) / job["dir"]) for job in jobs(Path(name))} for name in ("vmap", "loop"))
    assert one.keys() == other.keys() and len(one) == 3
    for folder, found in one.items():
        for name in METRICS:
            assert found["metrics"]["test"][name] == pytest.approx(other[folder]["metrics"]["test"][name], abs=0.02)


@pytest.mark.slow
def test_an_attention_teacher_into_a_recurrent_student():
    found = run(
        Path("run"), *SHOP, *SEQUENCES, "task=next_item", "student=gru4rec", "student.dim=4",
        "optim.batch_size=20", "loss=kd",
    )  # fmt: skip
    assert found["teacher"]["name"] == "sasrec" and set(found["metrics"]["test"]) >= METRICS
    assert 0 <= rows(Path("run"))[-1]["train"]["ordered"] <= 1


@pytest.mark.slow
def test_an_attention_teacher_into_a_factorisation(one_cache):
    found = run(Path("run"), *SHOP, *SEQUENCES, "student=bpr", "teacher.task={name: next_item}", *RRD)
    assert found["teacher"]["name"] == "sasrec" and found["choices"]["task"] == "recommend"
    (manifest,) = [path / "manifest.json" for path in teachers(one_cache) if path.name == Path(found["teacher"]["folder"]).name]
    assert '"next_item"' in manifest.read_text() and "pointwise_bce" in (manifest.parent / "metrics.jsonl").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("task", ["recommend", "next_item"])
def test_a_teacher_as_tables_teaches_as_the_network_does(task, monkeypatch):
    """Drawn items, features and the task's own candidates."""
    losses = "loss.of={rrd: {interesting: 4, uninteresting: 4, top: 10, weight: 1}, hint: {weight: 1}, kd: {weight: 1}}"
    small = ("student=sasrec", "student.dim=3", "student.dropout=0", "optim.batch_size=20")
    taught = (*SHOP, *SEQUENCES, f"task={task}", *small, "loss=sum", losses)
    cached = run(Path("cached"), *taught)
    monkeypatch.setattr(store, "CACHED_OUTPUT_BYTES", 0)
    store._ready.cache_clear()
    live = run(Path("live"), *taught)
    assert (cached["teacher"]["outputs"], live["teacher"]["outputs"]) == ("cached", "live")
    for name, value in live["metrics"]["train"].items():
        assert cached["metrics"]["train"][name] == pytest.approx(value, rel=1e-4)


@pytest.mark.slow
def test_teachers_of_different_families():
    families = "scheme.teachers=[{name: bpr}, {name: lightgcn, dim: 4}]"
    found = run(Path("run"), *TINY, "loss=kd", "scheme=multi_teacher", families)
    assert [teacher["name"] for teacher in found["teachers"]] == ["bpr", "lightgcn"]


def test_predictions_are_lists():
    run(Path("run"), *TINY, "loss=kd", "evaluate.predictions=true")
    with np.load("run/predictions.npz") as file:
        arrays = dict(file)
    count = len(arrays["ids"])
    assert set(arrays) == {
        "ids", "label", "items", "scores", "teacher_items", "teacher_scores", "validation_items", "validation_scores",
        "validation_label",
    }  # fmt: skip
    for name in ("", "teacher_", "validation_"):
        items, scores = arrays[f"{name}items"], arrays[f"{name}scores"]
        assert items.shape == scores.shape and items.shape[1] == 10 and items.dtype == np.int32
        assert items.min() >= -1 and items.max() < 50 and np.all(np.diff(scores, axis=1) <= 0)
        assert all(len(set(row[row >= 0])) == (row >= 0).sum() for row in items)
    hits = (arrays["items"] == arrays["label"][:, :1]).any(1)
    assert arrays["label"].shape == (count, 1)
    assert result(Path("run"))["metrics"]["test"]["hit_rate_at_10"] == pytest.approx(hits.mean())


def test_a_compressed_recommender_is_smaller():
    whole = run(Path("whole"), *TINY, "student.dim=16", "loss=none")
    small = run(Path("small"), *TINY, "student.dim=16", "loss=none", "compression=int8")
    assert small["size"]["bytes"] < 0.6 * whole["size"]["bytes"]
    assert small["metrics"]["test"]["ndcg_at_10"] == pytest.approx(whole["metrics"]["test"]["ndcg_at_10"], abs=0.1)


def test_yesterdays_student_teaches_todays():
    run(Path("yesterday"), *TINY, "data.days=[0,0.7]", "loss=none")
    again = ("teacher.checkpoint=yesterday", "loss=kd", "teacher.data={days: [0, 0.7]}", "teacher.dim=3")
    found = run(Path("today"), *TINY, *again)
    assert found["teacher"]["folder"].endswith("yesterday")
    assert "teacher_kendall" in found["metrics"]["test"]


@pytest.mark.slow
@pytest.mark.parametrize("changes", ["{items: 80}", "{domain: second}"])
def test_a_teacher_of_another_catalogue(changes):
    found = run(Path("run"), *TINY, f"teacher.data={changes}", "loss=kd")
    assert 0 <= found["metrics"]["test"]["teacher_overlap_at_10"] <= 1


@pytest.mark.slow
def test_a_users_own_file_in_a_process_of_its_own(tmp_path):
    write("log.csv", log())
    done = finish(start(*OWN, "hydra.run.dir=run", cwd=tmp_path))
    assert done.code == 0 and "test ndcg_at_10" in done.out, done.err
    found = result(Path("run"))
    assert found["size"]["parameters"] == (20 + len({i for _, i, _ in log()})) * 20 and found["data"]["name"] == "interactions"


def test_an_item_of_the_test_alone_is_a_miss():
    """It has no training row: kept as relevant, dropped or refused, as `data.unseen` says."""
    write("log.csv", [*log(), *[(f"u{u}", "never_before", 99) for u in range(3)]])
    by_time = (*OWN, "data.split=leave_last_out", "data.time=time")
    kept = run(Path("kept"), *by_time, "evaluate.predictions=true")
    dropped = run(Path("dropped"), *by_time, "data.unseen=drop", "evaluate.predictions=true")
    counts = [len(np.load(f"{name}/predictions.npz")["ids"]) for name in ("kept", "dropped")]
    assert counts == [20, 17] and kept["status"] == dropped["status"] == "finished"
    sole_error(call(*by_time, "data.unseen=error"), "held-out interactions are of items without a training row", 2)


# -- what is refused

ALONE = (*TINY, "loss=none")
FOREIGN = (*SHOP, "loss=none", "teacher=none")
DIGITS = "data=digits"
NO_SUCH_DATA = r"task=recommend needs data of users and items.*; data=digits has none"
NOT_ROWS = r"needs rows with a label; data=synthetic_shop holds users and items: task=recommend"
WRONG = {
    "no such data": ([DIGITS, "task=recommend", "student=bpr", "teacher=bpr"], NO_SUCH_DATA),
    "a recommender of a table": ([DIGITS, "student=bpr", "loss=none"], r"student=bpr: needs data of users and items"),
    "classes": (["data=synthetic_shop", "student=bpr", "loss=none", "task=classification"], f"task=classification {NOT_ROWS}"),
    "clicks": (["data=synthetic_shop", "student=bpr", "loss=none", "task=click"], f"task=click {NOT_ROWS}"),
    "many classes": ([DIGITS, "loss=none", "task=click"], r"task=click needs labels of yes or no .*data=digits has 10 classes"),
    "lists": (["data=synthetic_shop", "student=bpr", "loss=none", "task=ranking"], r"needs lists of documents with grades"),
    "a network of rows": ([*FOREIGN, "student=mlp"], r"student=mlp cannot score items for users; .*such as student=bpr"),
    "a tree": ([*FOREIGN, "student=tree"], r"student=tree cannot score items for users"),
    "a teacher of rows": ([*SHOP, "student=bpr", "loss=kd", "teacher=mlp"], r"teacher=mlp cannot score items for users"),
    "no history": (
        [*SHOP, "student=bpr", "loss=none", "task=next_item"],
        r"task=next_item needs data with histories, got data.history=0; set data.history=50",
    ),
    "no history to read": ([*ALONE, "student=sasrec"], r"student=sasrec: reads the items that .* data.history is 0"),
    "a ranking of classes": (["loss=rrd", DIGITS], r"loss=rrd: .* needs? .*task=recommend|loss=rrd: this loss draws items"),
    "embeddings of classes": (["loss=de", DIGITS], r"loss=de: this loss needs the features user \[B, D\] and item"),
    "no frozen teacher": ([*TINY, "loss=rrd", "scheme=online"], r"loss=rrd: .* ranking of a frozen teacher.*scheme=offline"),
    "no teacher": ([*SHOP, "student=bpr", "loss=rrd", "teacher=none"], r"loss=rrd needs a teacher, got teacher=none"),
    "more than there is": ([*TINY, *RRD, "loss.top=60", "loss.interesting=55"], r"loss.\w+ must be at most \d+, the number of"),
    "microbatches of a sum": (
        [*ALONE, "parallel.microbatches=2", "task.reduction=sum"], r"task.reduction=sum needs microbatches=1"
    ),
    "negatives": ([*ALONE, "task.negatives=-1"], r"task.negatives must be positive, got -1"),
    "cutoffs": ([*ALONE, "task.cutoffs=[]"], r"task.cutoffs must name at least one k, such as \[10\], got \[\]"),
    "no such metric": ([*ALONE, "task.select=ndcg_at_7"], r"task.select must be one of recall_at_5, .*did you mean 'ndcg_at_"),
    "an objective": ([*ALONE, "task.objective=softmax"], r"task.objective must be one of bpr, .*mean 'sampled_softmax'"),
    "few candidates": (
        [*ALONE, "data.candidates=6"], r"task.cutoffs must be at most 7, the candidates of data=synthetic_shop .*, got 10"
    ),
    "a large batch": ([*ALONE, "optim.batch_size=5000"], r"optim.batch_size is 5000, but there are \d+ training examples"),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "pattern"), WRONG.values(), ids=WRONG)
def test_wrong_requests(arguments, pattern):
    sole_error(call(*arguments), pattern, 2)
    assert not list(Path().glob("runs/*"))


def test_logits_of_rows_are_no_teacher_of_requests():
    np.savez("given.npz", ids=np.arange(9), logits=np.zeros((9, 50)))
    sole_error(
        call(*SHOP, "student=bpr", "loss=kd", "teacher=logits", "teacher.path=given.npz"),
        r"teacher=logits holds logits of rows; requests to a recommender differ in every step", 2,
    )  # fmt: skip


LINES = log()
FILES = {
    "a column": ("user,thing,time", LINES, (), r"log.csv has no column 'item' \(columns: user, thing, time\)"),
    "a count": ("user,item,time", [("u0", "i1", -2), *LINES], ("data.value=time",), r"log.csv row 1: value '-2' .*is negative"),
    "nothing": ("user,item,time", [], (), r"log.csv has a header and no rows"),
}


@pytest.mark.parametrize("name", FILES)
def test_wrong_files(name):
    header, lines, more, pattern = FILES[name]
    write("log.csv", lines, header)
    sole_error(call(*OWN, *more), pattern, 2)


def test_no_file():
    sole_error(call(*OWN), r"data.path 'log.csv' is missing; name a CSV, TSV or Parquet file", 2)
    sole_error(call(*OWN, "data.path=null"), r"data.path is not set; name your file, such as data.path=my.csv", 2)
