"""What the command prints and leaves: help, lists, plan, one run."""

import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest

from jdistill import options
from jdistill.registry import options as registered
from tests.e2e.helpers import TINY, call, files, names, result, rows, sole_error, succeed
from tests.report.fake_runs import small_sweep

del options  # imported to register

CHECK = """
import sys
from jdistill.cli import main
try:
    main(sys.argv[1:])
except SystemExit as end:
    print("imported", sorted({"jax", "flax", "orbax", "hydra"} & set(sys.modules)), file=sys.stderr)
    sys.exit(end.code)
"""


@pytest.mark.parametrize("command", ["--help", "--version", "table", "status"])
def test_reading_commands_do_not_import_jax(command, tmp_path):
    arguments = [command] if command.startswith("--") else [command, str(small_sweep(tmp_path / "sweep"))]
    done = subprocess.run([sys.executable, "-c", CHECK, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "imported []\n"
    assert done.stdout


def test_help_shows_how_to_override_and_the_commands():
    text = succeed("--help").out
    for wanted in (
        "loss.temperature=",
        "jdistill table",
        "jdistill plan",
        "jdistill status",
        "jdistill list",
        "-m ",
        "force=true",
    ):
        assert wanted in text
    assert "{" not in text
    assert succeed("-h").out == succeed("help").out == text


def test_version():
    assert succeed("--version").out == f"jdistill {version('jdistill')}\n"


@pytest.mark.parametrize("group", ["loss", "data", "scheme", "compression", "task", "optim", "tracker"])
def test_help_names_exactly_the_options_there_are(group):
    row = re.search(rf"^  {group} +(.*)$", succeed("--help").out, re.M)
    assert row and sorted(row[1].split()) == sorted(registered(group))


def test_help_names_only_networks_that_exist():
    row = re.search(r"^  teacher, student +(.*?) \.\.\.", succeed("--help").out, re.M)
    assert row and set(row[1].split()) <= set(registered("student")) & set(registered("teacher"))


def test_every_model_is_a_teacher_and_a_student():
    assert set(registered("teacher")) - set(registered("student")) == {"none", "logits"}
    assert set(registered("student")) - set(registered("teacher")) == {"tree", "gbt", "linear_svm"}


@pytest.mark.parametrize(
    ("what", "some"),
    [
        ("losses", {"none", "kd", "logit_mse", "hint", "attention", "cross_entropy"}),
        ("models", {"mlp", "lenet", "resnet20", "resnet8x4", "wrn_40_2", "vgg8", "mobilenetv2"}),
        ("data", {"digits", "mnist", "fashion_mnist", "cifar10", "cifar100", "synthetic"}),
        ("compression", {"none", "pipeline", "prune", "structured", "int8", "qat", "low_rank", "pq_embedding"}),
        ("schemes", {"offline", "two_stage", "online", "self", "multi_teacher"}),
        ("experiments", {"quickstart"}),
        ("teachers", set()),
    ],
)
def test_lists_print_one_name_a_line_first(what, some):
    lines = succeed("list", what).out.splitlines()
    assert all(re.fullmatch(r"[a-z0-9_]+\t[^\t]+", line) for line in lines), lines
    found = names("\n".join(lines))
    assert some <= set(found) and found == sorted(found) and len(set(found)) == len(found)


def test_list_of_teachers_shows_a_trained_one(tmp_path):
    succeed(*TINY, "hydra.run.dir=run")
    teacher = result(Path("run"))["teacher"]
    (line,) = succeed("list", "teachers").out.splitlines()
    name, text = line.split("\t")
    assert name == f"mlp-{teacher['hash']}"
    assert f"test accuracy {teacher['metrics']['test']['accuracy']:.2%}" in text and "2,410 parameters" in text
    assert str(tmp_path / "cache" / "teachers" / name) in text


def test_plan_lists_jobs_and_groups_and_writes_nothing():
    done = succeed("plan", *TINY, "loss=none,kd", "seed=0,1", "loss.weight=0.5,1", "hydra.launcher.workers=2")
    lines = done.out.splitlines()
    assert lines[0].startswith("8 jobs in 2 groups; sweep folder sweeps/sweep-")
    for number, line in enumerate(line for line in lines if line.startswith("group")):
        assert re.fullmatch(rf"group {number}: 4 jobs, 2 at a time in one program \(dense, \d+ kB a member: .*\)", line)
    listed = [line.split() for line in lines if line.startswith("  ")]
    assert sorted(int(words[0]) for words in listed) == list(range(8))
    assert len({words[1] for words in listed}) == 8
    assert {(w[-3], w[-2], w[-1]) for w in listed} == {
        (f"loss={loss}", f"seed={seed}", f"loss.weight={weight}")
        for loss in ("none", "kd") for seed in (0, 1) for weight in ("0.5", "1")
    }  # fmt: skip
    assert list(Path().iterdir()) == []


def test_plan_and_run_agree_on_folders():
    sweep = (*TINY, "seed=0,1", "loss=none", "hydra.launcher.workers=2")  # one would train both as a population
    planned = {line.split()[1] for line in succeed("plan", *sweep).out.splitlines() if "seed=" in line}
    done = succeed("-m", *sweep)
    (folder,) = Path("sweeps").iterdir()
    assert planned == {path.name for path in folder.iterdir() if path.is_dir()}
    assert f"sweep folder {folder}" in succeed("plan", *sweep).out
    assert f"table: {folder}/table.md" in done.out


def test_a_run_prints_its_accuracy_and_folder_and_fills_it():
    done = succeed(*TINY, "evaluate.latency=true", "evaluate.repeats=3")
    first, second = done.out.splitlines()
    (folder,) = Path("runs").iterdir()
    assert second == f"results in {folder}" and done.err == ""
    found = result(folder)
    assert first.startswith(f"test accuracy {found['metrics']['test']['accuracy']:.2%}, ")
    assert f" {found['size']['bytes']:,} bytes" in first
    wanted = {"result.json", "metrics.jsonl", "artifact.safetensors", ".hydra/config.yaml", ".hydra/overrides.yaml"}
    assert wanted <= files(folder) and not any("checkpoint" in name for name in files(folder))
    assert found["fingerprint"] == folder.name and found["status"] == "finished" and found["steps"] == 16
    assert found["size"]["bytes"] == (folder / "artifact.safetensors").stat().st_size
    assert found["size"]["parameters"] == 64 * 16 + 16 + 16 * 10 + 10
    assert [row["epoch"] for row in rows(folder)] == [1, 2]
    assert set(found["latency_ms"]) == {"1", "256"} and found["latency_ms"]["1"]["p50"] > 0
    assert found["config"]["data"]["limit"] == 256 and found["data"]["train"] == 256 and found["data"]["test"] == 359


def test_a_finished_run_is_shown_and_not_repeated():
    first = succeed(*TINY)
    (folder,) = Path("runs").iterdir()
    before = {
        name: ((folder / name).stat().st_mtime_ns, (folder / name).read_bytes()) for name in ("result.json", "metrics.jsonl")
    }
    second = succeed(*TINY)
    assert second.out == first.out
    for name, (when, content) in before.items():
        assert (folder / name).stat().st_mtime_ns == when and (folder / name).read_bytes() == content


def test_force_repeats_a_run_with_the_same_numbers():
    succeed(*TINY)
    (folder,) = Path("runs").iterdir()
    before, when = result(folder), (folder / "result.json").stat().st_mtime_ns
    metrics = (folder / "metrics.jsonl").read_bytes()
    succeed(*TINY, "force=true")
    after = result(folder)
    assert list(Path("runs").iterdir()) == [folder]  # `force` is no part of the identity
    assert (folder / "result.json").stat().st_mtime_ns > when
    assert after["metrics"] == before["metrics"] and after["size"] == before["size"]
    assert (folder / "metrics.jsonl").read_bytes() == metrics


def test_best_test_calls_its_metrics_test():
    succeed(*TINY, "loss=none", "report=best_test")
    (folder,) = Path("runs").iterdir()
    lines = rows(folder)
    assert all("validation" not in row for row in lines)
    found = result(folder)["metrics"]
    assert max(row["test"]["accuracy"] for row in lines) == found["test"]["accuracy"] and "validation" in found


def test_a_folder_of_another_finished_run_is_not_overwritten():
    succeed(*TINY, "loss=none", "hydra.run.dir=mine")
    before = (Path("mine") / "result.json").read_bytes()
    sole_error(call(*TINY, "loss=none", "seed=1", "hydra.run.dir=mine"), "holds a finished run of another config", 2)
    assert (Path("mine") / "result.json").read_bytes() == before


def test_predictions_are_those_the_metrics_are_of():
    succeed(*TINY, "evaluate.predictions=true", "hydra.run.dir=run")
    found = result(Path("run"))["metrics"]["test"]
    with np.load("run/predictions.npz") as file:
        arrays = dict(file)
    assert arrays["logits"].shape == arrays["teacher_logits"].shape == (359, 10)
    assert len(set(arrays["ids"].tolist())) == 359 and arrays["ids"].max() < 1797
    predicted = arrays["logits"].argmax(1)
    assert found["accuracy"] == pytest.approx((predicted == arrays["label"]).mean())
    assert found["teacher_agreement"] == pytest.approx((predicted == arrays["teacher_logits"].argmax(1)).mean())
    z = arrays["logits"].astype(np.float64)
    nll = np.log(np.exp(z).sum(1)) - z[np.arange(359), arrays["label"]]
    assert found["cross_entropy"] == pytest.approx(nll.mean(), rel=1e-5)


def test_latency_can_be_left_out():
    succeed(*TINY, "loss=none", "hydra.run.dir=run")
    found = result(Path("run"))
    assert found["latency_ms"] == {} and found["teacher"] is None and "teacher_agreement" not in found["metrics"]["test"]
    assert not (Path("run") / "predictions.npz").exists()


def test_a_closed_pipe_is_no_error():
    command = [sys.executable, "-m", "jdistill", "--help"]
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    finally:
        os.close(write)
    assert "Traceback" not in done.stderr and done.stderr == ""
