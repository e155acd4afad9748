"""Wrong requests: one line, no traceback, exit code 2, before anything is trained and without a folder left behind."""

from pathlib import Path

import numpy as np
import pytest

from tests.e2e.helpers import TINY, call, files, finish, jobs, result, sole_error, start
from tests.marks import slow_but

LIMITS = "optim.batch_size is 5000, but there are 256 training examples; lower it or set optim.drop_last=false"
WRONG = [
    (["loss=kdd"], r"loss=kdd: no such option; did you mean 'kd'\? \(known: .*hint.*\)"),
    (["loss.temprature=3"], r"unknown key 'loss.temprature'; did you mean 'temperature'\?"),
    (["+loss.temprature=3"], r"unknown key 'loss.temprature'; did you mean 'temperature'\?"),
    (["loss.temperature=hot"], r"loss.temperature must be a number, or a schedule such as \{name: .*\}, got 'hot'"),
    (["loss.temperature=-1"], r"loss.temperature must be positive, got -1"),
    (["loss.temperature=null"], r"loss.temperature must be a number, or a schedule such as \{name: .*\}, got None"),
    (["loss.weight=-1"], r"loss.weight must be at least 0, got -1"),
    (["loss.weight=inf"], r"loss.weight must be at least 0, got inf"),
    (["~seed"], r"seed must have a value; leave ~seed out"),
    (["task.weight=-2"], r"task.weight must be at least 0, got -2"),
    (["data.root=/nowhere"], r"data.root '/nowhere' is not a directory"),
    (["data.limit=0"], r"data.limit must be positive, got 0"),
    (["data.validation=2"], r"data.validation must be at least 0 and below 1, got 2"),
    (
        ["data=mnist", "data.root=.", "data.limit=100", "data.download=false"],
        r"train-images-idx3-ubyte.gz is missing; put http",
    ),
    (["student.widths=[0]"], r"student.widths must be positive integers, got \[0\]"),
    (["student.widths=[a]"], r"student.widths\[0\] must be an integer, got 'a'"),
    (["student.widths=16"], r"student.widths must be a list such as \[1,2\], got '16'"),
    (["teacher.widths=[-3]"], r"teacher.widths must be positive integers, got \[-3\]"),
    (["teacher.checkpoint=/nowhere/x"], r"teacher.checkpoint '/nowhere/x' is not a teacher's folder .*list teachers"),
    (["teacher.optim.lr=-1"], r"teacher.optim.lr must be positive, got -1"),
    (["optim@teacher.optim=sdg"], r"optim=sdg: no such option; did you mean 'sgd'"),
    (["optim.lr=-1"], r"optim.lr must be positive, got -1"),
    (["optim.epochs=0"], r"optim.epochs must be positive, got 0"),
    (["optim.epochs=1.5"], r"optim.epochs must be an integer, got '1.5'"),
    (["optim.batch_size=5000"], LIMITS),
    (["optm.lr=3"], r"unknown key 'optm'; did you mean 'optim'\?"),
    (["seeed=3"], r"unknown key 'seeed'; did you mean 'seed'\?"),
    (["seed=x"], r"seed must be an integer, got 'x'"),
    (["loss=null"], r"a group takes the name of an option, not null"),
    (["force=maybe"], r"force must be true or false, got 'maybe'"),
    (["task=binary"], r"task.outputs=sigmoid needs data of 2 classes, this has 10; use softmax"),
    (["report=best"], r"report must be one of last, best_val, best_test, got 'best'"),
    (["report=best_val", "data.validation=0"], r"report=best_val needs validation data, got data.validation=0"),
    (["checkpoint.every_steps=-1"], r"checkpoint.every_steps must be at least 0, got -1"),
    (["evaluate.every=0"], r"evaluate.every must be positive, got 0"),
    (["compression=prun"], r"compression=prun: no such option; did you mean 'prune'\?"),
    (["compression=prune", "compression.sparsity=2"], r"compression.sparsity must be at least 0 and below 1, got 2"),
    (["loss=attention"], r"networks have no stage in common; use convolutional networks"),
    (["loss=none", "scheme=two_stage"], r"scheme=two_stage needs a distillation loss .* got loss=none"),
    (["loss=kd,none"], r"loss=kd,none gives several values to a single run; add -m"),
    (["experiment=quikstart"], r"experiment=quikstart: no such option; did you mean 'quickstart'\?"),
]  # fmt: skip


def refused(*arguments: str, pattern: str) -> None:
    """One line that matches `pattern`, exit code 2, and nothing written: no run, no sweep, no teacher."""
    before = files(Path())
    sole_error(call(*arguments), pattern, 2)
    assert files(Path()) == before
    assert {path.name for path in Path().iterdir() if path.is_dir()} <= {"runs"} and not list(Path().glob("runs/*"))


REQUESTS = {" ".join(arguments): (arguments, pattern) for arguments, pattern in WRONG}
ALIKE = (
    "+loss.temprature=3", "loss.temperature=null", "loss.weight=inf", "task.weight=-2", "data.limit=0",
    "student.widths=[a]", "student.widths=16", "teacher.widths=[-3]", "teacher.optim.lr=-1", "optim.lr=-1", "optim.epochs=0",
    "optim.epochs=1.5", "seeed=3", "force=maybe", "evaluate.every=0", "compression=prun", "experiment=quikstart",
)  # fmt: skip
"""Mistakes of a kind that another request makes as well."""


@pytest.mark.parametrize("mistake", slow_but(REQUESTS.keys() - ALIKE, REQUESTS))
def test_wrong_requests(mistake):
    arguments, pattern = mistake
    refused(*TINY, *arguments, pattern=pattern)


def test_kd_without_a_teacher():
    refused(
        "teacher=none", "evaluate.latency=false", pattern="loss=kd needs a teacher, got teacher=none; choose one, or loss=none"
    )


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        (["tabel"], r"unknown command 'tabel'; did you mean 'table'\?"),
        (["list"], r"usage: jdistill list WHAT"),
        (["list", "lossess"], r"unknown list 'lossess'; did you mean 'losses'\?"),
        (["table"], r"arguments are required: SWEEP"),
        (["table", "/nowhere"], r"/nowhere: does not exist"),
        (["table", "."], r"neither a run folder \(result.json\) nor a sweep folder \(jobs.jsonl\)"),
        (["status", "/nowhere"], r"/nowhere: not a sweep folder"),
        (["plan", "loss=kdd"], r"loss=kdd: no such option"),
        (["plan", "loss.temperature=2,-1"], r"loss.temperature must be positive, got -1.0 \(job 1 of 2\)"),
    ],
    ids=" ".join,
)
def test_wrong_commands(arguments, pattern):
    refused(*arguments, pattern=pattern)


MEMBERS = ("loss.temperature=4,-1", "loss.temperature=4,hot", "loss=kd,kdd", "student.widths=[16],[0]")


@pytest.mark.parametrize("bad", slow_but(("loss.temperature=4,-1", "loss=kd,kdd"), MEMBERS))
def test_one_bad_member_stops_a_sweep_before_anything_trains(bad):
    refused("-m", *TINY, "seed=0,1", bad, pattern=r"got -1.0 \(jobs 1, 3 of 4\)|got 'hot'|loss=kdd|got \[0\] \(jobs ")


def test_each_different_mistake_of_a_sweep_has_a_line():
    done = call("-m", *TINY, "loss.temperature=4,-1", "student.widths=[16],[0]")
    assert done.code == 2 and files(Path()) == set()
    assert len(done.err.splitlines()) == len(done.error_lines) == 2
    assert "loss.temperature must be positive, got -1.0 (jobs" in done.err and "student.widths must be positive" in done.err


@pytest.mark.slow
def test_in_a_process_of_its_own(tmp_path):
    done = finish(start(*TINY, "loss.temprature=3", cwd=tmp_path))
    sole_error(done, "unknown key 'loss.temprature'; did you mean 'temperature'", 2)
    assert files(tmp_path) == set() and done.out == ""


IDS = np.arange(1797)
FILES = {
    "no_arrays": ({"x": np.zeros(3)}, r"lacks ids and logits; it holds x"),
    "no_logits": ({"ids": IDS}, r"lacks logits; it holds ids"),
    "twice": ({"ids": np.append(IDS, 3), "logits": np.zeros((1798, 10))}, r"id 3 occurs more than once"),
    "absent": ({"ids": IDS[:1500], "logits": np.zeros((1500, 10))}, r"training examples have no logits, first id 1\d\d\d;"),
    "empty": ({"ids": IDS[:0], "logits": np.zeros((0, 10))}, r"1294 of 1294 training examples have no logits"),
    "classes": ({"ids": IDS, "logits": np.zeros((1797, 7))}, r"logits \[N, 10\], found \(1797,\) and \(1797, 7\)"),
    "length": ({"ids": IDS, "logits": np.zeros((1700, 10))}, r"found \(1797,\) and \(1700, 10\)"),
    "nan": ({"ids": IDS, "logits": np.full((1797, 10), np.nan)}, r"logits of id \d+ are not finite numbers"),
    "words": ({"ids": IDS.astype(str), "logits": np.zeros((1797, 10))}, r"expected integer ids and real logits, found <U"),
    "halves": ({"ids": IDS + 0.5, "logits": np.zeros((1797, 10))}, r"expected integer ids .* found float64"),
    "complex": ({"ids": IDS, "logits": np.zeros((1797, 10), complex)}, r"found int64 and complex128"),
    "pickled": ({"ids": IDS, "logits": np.array([{}] * 1797, object)}, r"cannot be loaded when allow_pickle=False"),
}


@pytest.mark.parametrize("name", slow_but(("no_logits", "twice", "absent", "classes", "nan", "pickled"), tuple(FILES)))
def test_wrong_files_of_logits(name):
    arrays, pattern = FILES[name]
    np.savez("given.npz", **arrays)
    refused("teacher=logits", "teacher.path=given.npz", pattern=rf"teacher\.path given\.npz.*{pattern}")


def test_files_of_logits_that_are_no_npz():
    refused("teacher=logits", pattern="teacher.path is missing: teacher=logits needs teacher.path=FILE.npz")
    refused("teacher=logits", "teacher.path=no.npz", pattern="teacher.path 'no.npz' does not exist")
    Path("text.npz").write_text("hello")
    refused("teacher=logits", "teacher.path=text.npz", pattern="text.npz is not a readable .npz file")
    np.savez("whole.npz", ids=IDS, logits=np.zeros((1797, 10)))
    Path("cut.npz").write_bytes(Path("whole.npz").read_bytes()[:5000])
    refused("teacher=logits", "teacher.path=cut.npz", pattern="cut.npz is not a readable .npz file")


@pytest.mark.slow
def test_wrong_logits_stop_a_sweep_before_anything_trains():
    np.savez("given.npz", ids=IDS, logits=np.zeros((1797, 7)))
    refused("-m", "loss=none,kd", "teacher=logits", "teacher.path=given.npz", pattern=r"logits \[N, 10\].* \(job 1 of 2\)")


def test_a_diverging_run_says_so_and_exits_with_1():
    arguments = (*TINY, "loss=none", "optim=sgd", "optim.lr=1e30", "hydra.run.dir=run")
    stamps = []
    for again in range(3):  # to diverge is final: the second time nothing is trained, unless forced
        done = call(*arguments, *(["force=true"] if again == 2 else []))
        line = sole_error(done, r"diverged: the training loss is not finite in epoch 1 \(lower optim.lr or loss.weight\)", 1)
        found = result(Path("run"))
        assert found["status"] == "diverged" and found["error"] == line.removeprefix("jdistill: error: ")
        assert found["config"]["optim"]["lr"] == 1e30 and "metrics" not in found
        stamps.append(Path("run/result.json").stat().st_mtime_ns)
    assert stamps[0] == stamps[1] < stamps[2]


def test_a_folder_that_cannot_be_made_is_one_line():
    Path("file").write_text("")
    sole_error(call(*TINY, "loss=none", "hydra.run.dir=file/run"), "file", 1)


@pytest.mark.parametrize("folder", [".", "thesis"])
def test_a_refused_run_leaves_the_users_folder_alone(folder):
    Path("thesis").mkdir()
    Path(folder, "chapter.txt").write_text("years of work")
    sole_error(call(*TINY, "loss.temperature=-1", f"hydra.run.dir={folder}"), "must be positive", 2)
    assert files(Path()) == {str(Path(folder, "chapter.txt"))}


@pytest.mark.slow
def test_a_damaged_result_is_trained_again():
    assert call(*TINY, "loss=none", "hydra.run.dir=run").code == 0
    good = result(Path("run"))
    Path("run/result.json").write_text('{"status": "fini')
    assert call(*TINY, "loss=none", "hydra.run.dir=run").code == 0
    assert result(Path("run"))["metrics"] == good["metrics"]


def test_jobs_of_a_bad_sweep_do_not_replace_those_of_a_good_one():
    assert call("-m", *TINY, "loss=none", "seed=0", "hydra.sweep.dir=sweep").code == 0
    before = jobs(Path("sweep"))
    sole_error(
        call("-m", *TINY, "loss=none", "seed=0,1", "optim.lr=-1", "hydra.sweep.dir=sweep"), "optim.lr must be positive", 2
    )
    assert jobs(Path("sweep")) == before


def test_no_traceback_from_a_wrong_flag(tmp_path):
    done = finish(start("--nonsense", cwd=tmp_path))
    assert done.code == 2 and "Traceback" not in done.err
    assert done.err.splitlines()[-1].startswith("jdistill: error: ") and "--nonsense" in done.err
