"""The experiments' configs hold the published recipes, their scripts do what they say, committed results add up."""

import argparse
import csv
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from jdistill.report.cells import Column, Table
from tests.realdata import require_files

ROOT = Path(__file__).resolve().parents[1]
OWN_METRICS = ("documents_scenarios",)  # rows of different metrics: tests/test_experiments_recommend.py
RESULTS = sorted(
    path.parent for path in (ROOT / "results").glob("documents_*/runs.jsonl") if path.parent.name not in OWN_METRICS
)


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    """`experiments/` importable, as it is for its own scripts."""
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    monkeypatch.setenv("MPLBACKEND", "Agg")


def script(name):
    return importlib.import_module(name)


def composed(*overrides):
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    from jdistill import options
    from jdistill.paths import conf_dir
    from jdistill.sweep.jobs import plain

    assert options
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return plain(compose("train", overrides=list(overrides)))


@pytest.mark.parametrize(
    ("experiment", "teacher", "student", "batch", "outputs"),
    [
        ("documents_mnist", [128], [64], 32, "softmax"),
        ("documents_binary_random", [64], [32], 32, "sigmoid"),
        ("documents_binary_real", [64], [32], 32, "sigmoid"),
        ("documents_softmax10_random", [128], [64], 32, "softmax"),
        ("documents_softmax10_real", [128], [64], 32, "softmax"),
        ("documents_softmax100_random", [512], [128], 32, "softmax"),
        ("documents_softmax100_real", [512], [128], 32, "softmax"),
    ],
)
def test_documents_configs_have_their_sizes_and_recipe(experiment, teacher, student, batch, outputs):
    config = composed(f"experiment={experiment}", "seed=3")
    assert (config["teacher"]["widths"], config["student"]["widths"]) == (teacher, student)
    assert config["task"]["outputs"] == outputs
    assert config["data"]["validation"] == 0
    for optim in (config["optim"], config["teacher"]["optim"]):
        assert (optim["kind"], optim["lr"], optim["batch_size"]) == ("adam", 1e-3, batch)
        assert optim["epochs"] == (10 if experiment == "documents_mnist" else 50)
    assert config["teacher"]["seed"] == 3  # a seed repeats the whole experiment
    if experiment.endswith("random"):
        assert (config["data"]["separation"], config["data"]["examples"], config["data"]["seed"]) == (0, 1000, 3)
        assert config["data"]["features"] == (100 if "100" in experiment else 10)


def test_cifar100_recipe_is_the_published_one():
    config = composed("experiment=cifar100_kd")
    assert (config["teacher"]["name"], config["student"]["name"]) == ("resnet32x4", "resnet8x4")
    assert (config["loss"]["name"], config["loss"]["temperature"], config["loss"]["weight"]) == ("kd", 4.0, 0.9)
    assert (config["task"]["weight"], config["report"]) == (0.1, "last")
    assert (config["data"]["name"], config["data"]["validation"]) == ("cifar100", 0)
    assert (config["data"]["augment"], config["data"]["crop_padding"]) == (["crop", "flip"], 4)
    assert config["optim"] == config["teacher"]["optim"]
    wanted = {"kind": "sgd", "lr": 0.05, "epochs": 240, "batch_size": 64, "momentum": 0.9, "nesterov": False,
              "weight_decay": 5e-4, "drop_last": False, "warmup_epochs": 0}  # fmt: skip
    assert {key: config["optim"][key] for key in wanted} == wanted


@pytest.mark.parametrize(
    ("epoch", "factor"), [(1, 1), (150, 1), (151, 0.1), (180, 0.1), (181, 0.01), (211, 0.001), (240, 0.001)]
)
def test_cifar100_learning_rate_falls_once_the_epoch_counted_from_1_is_past_150_180_210(epoch, factor):
    from jdistill.optim import Clock
    from jdistill.registry import build

    optim = build("optim", composed("experiment=cifar100_kd")["optim"])
    for step in (0, 781):  # the first and the last of the epoch's 782 steps
        clock = Clock(np.int32(782 * (epoch - 1) + step), np.float32(782), np.float32(240))
        np.testing.assert_allclose(optim.factor(clock), factor, rtol=1e-5)


def test_plain_student_of_cifar100_composes_from_the_same_experiment():
    config = composed("experiment=cifar100_kd", *script("cifar100_kd").METHODS[0].overrides)
    assert (config["loss"]["name"], config["task"]["weight"]) == ("none", 1)


def test_cifar100_epoch_has_the_last_smaller_batch():
    assert script("cifar100_kd").STEPS_AN_EPOCH == 782


def test_cifar100_timing_extrapolates_seconds_per_step():
    result = {"time_s": {"train": 5.0, "compile": 1.0}, "steps": 10, "metrics": {"train": {"loss": 2.0}}, "overrides": [],
              "size": {"parameters": 7}, "environment": {}, "data": {}}  # fmt: skip
    row = script("cifar100_kd").timing("KD", result)
    assert row["seconds_per_step"] == 0.5
    assert row["seconds_per_epoch"] == 391.0
    assert row["hours_per_240_epochs"] == pytest.approx(391 * 240 / 3600)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({0: 0.733, 1: 0.733, 2: 0.7339}, "yes: [73.20, 73.46]"),
        ({0: 0.72, 1: 0.721, 2: 0.722}, "no: [71.85, 72.35]"),
        ({0: 0.733}, None),
    ],
)
def test_reproduced_only_where_the_interval_covers_the_published_value(values, said):
    assert script("cifar100_kd").covered({"choices.method": "KD", "by_seed": values}) == said


def frame(**columns):
    rows = [
        {"choices.method": m, "choices.problem": p, "config.seed": s, "status": "finished", "error": None, "overrides": ["a=b"],
         "fingerprint": f"{m}{p}{s}", "metrics.test.accuracy": a, "data.test": 200, "path": "/somewhere/run",
         "teacher.hash": None if m == "plain" else "abc",
         "teacher.metrics.test.accuracy": np.nan if m == "plain" else 0.9 + s / 100}
        for p in ("random data", "real")
        for m, accuracies in columns.items()
        for s, a in enumerate(accuracies)
    ]  # fmt: skip
    return pd.DataFrame(rows)


def test_chance_pools_test_examples_of_all_seeds():
    common = script("_common")
    runs = frame(plain=(0.5, 0.5), kd=(0.6, 0.65))
    table, notes = common.chance(common.make(runs, by=("problem", "method")), runs, "random")
    said = {(r["choices.problem"], r["choices.method"]): r["against chance (50 %)"] for r in table.rows}
    assert said["random data", "plain"] == "200 of 400 right, p = 1.00"
    assert said["random data", "kd"] == "250 of 400 right, p = 0.00"
    assert said["real", "plain"] is None
    assert "mean over all students 56.2 %. Different from chance (Bonferroni over 2 rows): kd." in notes[1]


def test_chance_says_that_nothing_differs():
    common = script("_common")
    runs = frame(plain=(0.5, 0.51), kd=(0.5, 0.49))
    _, notes = common.chance(common.make(runs, by=("problem", "method")), runs, "random")
    assert notes[1].endswith("(Bonferroni over 2 rows): none. Different from plain: none.")


def test_columns_added_to_a_table_show_and_export(tmp_path, capsys):
    common = script("_common")
    runs = frame(plain=(0.5, 0.51), kd=(0.5, 0.49))
    table = common.make(runs, by=("problem", "method"), columns=("n", "metric"))
    table = common.with_column(table, "its teacher (%)", common.teacher_accuracy(runs), "teacher", 100.0)
    table = common.with_column(table, "document: loss", lambda _: (0.5625, None), "document.loss")
    common.write_tables(tmp_path, common.with_notes(table, "a note"))
    text = (tmp_path / "table.md").read_text()
    assert "90.50 ± 0.71" in text and "0.5625" in text and "- a note" in text
    rows = list(csv.DictReader((tmp_path / "table.csv").read_text().splitlines()))
    assert [row["document.loss.mean"] for row in rows] == ["0.5625"] * 4
    assert float(rows[0]["test.accuracy.mean"]) == pytest.approx(0.505)  # the baseline comes first
    assert "| real" in capsys.readouterr().out


def test_records_are_one_line_a_run_without_folders(tmp_path):
    runs = frame(plain=(0.5, 0.51), kd=(0.5, 0.49)).assign(**{"environment.machine": "x, 2 cores", "size.bytes": 10})
    script("_records").write_records(tmp_path, runs)
    lines = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    assert len(lines) == 8
    assert lines[3]["metrics.test.accuracy"] == 0.49 and lines[3]["seed"] == 1 and lines[3]["method"] == "kd"
    assert lines[3]["teacher.hash"] == "abc" and lines[3]["size.bytes"] == 10 and lines[3]["overrides"] == ["a=b"]
    assert "teacher.hash" not in lines[0] and not any("path" in line for line in lines)


def recorded(tmp_path, runs, add=True):
    """What the next command of an experiment needs, after one that made `runs`."""
    script("_records").write_records(tmp_path, runs)
    return argparse.Namespace(out=tmp_path, add=add)


def test_records_read_again_are_the_runs(tmp_path):
    runs = frame(plain=(0.5, 0.51), kd=(0.5, 0.49)).assign(**{"config.student.dim": 10, "size.bytes": 10})
    runs["overrides"] = [["loss=kd", "student.dim=10", f"seed={seed}"] for seed in runs["config.seed"]]
    given = recorded(tmp_path, runs)
    again = script("_records").with_recorded(pd.DataFrame(), given)
    assert again["choices.loss"].tolist() == ["kd"] * 8 and again["path"].isna().all()
    kept = [column for column in runs if column != "path"]
    pd.testing.assert_frame_equal(again[kept], runs[kept], check_dtype=False)
    before = (tmp_path / "runs.jsonl").read_text()
    script("_records").write_records(tmp_path, again)
    assert (tmp_path / "runs.jsonl").read_text() == before


def test_recorded_runs_fill_in_other_rows_and_seeds_of_the_same_recipe(tmp_path, capsys):
    given = recorded(tmp_path, frame(plain=(0.5, 0.51), kd=(0.5, 0.49), fitnet=(0.4, 0.41)))
    new = frame(plain=(0.7,), kd=(0.8,))
    new.loc[new["choices.method"] == "kd", "overrides"] = pd.Series([["a=c"]] * 4)
    made = script("_records").with_recorded(new, given)
    values = {(r["choices.problem"], r["choices.method"], r["config.seed"]): r["metrics.test.accuracy"]
              for r in made.to_dict("records")}  # fmt: skip
    for problem in ("random data", "real"):
        own = {key[1:]: value for key, value in values.items() if key[0] == problem}
        assert own == {("plain", 0): 0.7, ("plain", 1): 0.51, ("kd", 0): 0.8, ("fitnet", 0): 0.4, ("fitnet", 1): 0.41}
    assert len(made) == len(values) == 10
    said = capsys.readouterr().err.splitlines()
    assert said[0].endswith("runs.jsonl: not added: kd, random data: its overrides are not this command's") and len(said) == 2
    given.add = False
    assert script("_records").with_recorded(new, given) is new


def test_a_failed_run_takes_no_recorded_ones_place(tmp_path):
    given = recorded(tmp_path, frame(plain=(0.5, 0.51)))
    made = script("_records").with_recorded(frame(plain=(np.nan,)).assign(status="failed"), given)
    values = made.set_index(["choices.problem", "config.seed"])["metrics.test.accuracy"].to_dict()
    assert values == {(problem, seed): 0.5 + seed / 100 for problem in ("random data", "real") for seed in (0, 1)}
    assert len(made) == 4 and set(made["status"]) == {"finished"}


@pytest.mark.parametrize(("add", "asked", "weight"), [(True, "20", "loss.weight=3"), (True, "30", None), (False, "20", None)])
def test_a_weight_once_chosen_and_recorded_is_not_chosen_again(add, asked, weight, tmp_path, monkeypatch):
    runs = frame(plain=(0.5,), rd=(0.5,))
    own = ["experiment=e", "loss=rd", "loss.de={top:20,mu:1}"]
    runs["overrides"] = [[*own, "loss.weight=3", "seed=0"] if m == "rd" else own for m in runs["choices.method"]]
    given = recorded(tmp_path, runs, add)
    given.seeds, given.sweeps = 2, tmp_path / "sweeps"
    ranking, common = script("_ranking"), script("_common")
    grid = pd.DataFrame({"metrics.validation.ndcg_at_k": [0.2, 0.1], "config.loss.weight": [0.5, 7.0]})
    monkeypatch.setattr(ranking, "run_sweep", lambda *_: grid)
    monkeypatch.setattr(ranking, "primary", lambda _: "ndcg_at_k")
    method = common.Method("rd", ("loss=rd", f"loss.de={{top: {asked}, mu: 1}}"))
    made = ranking.chosen("e", method, (0.5, 7.0), given)
    assert made.overrides == (*method.overrides, weight or "loss.weight=0.5") and (made.done is None) == bool(weight)


@pytest.mark.parametrize(
    ("add", "weight", "trained"), [(True, "1e-3", [1, 3]), (True, "2", [0, 1, 2, 3]), (False, "1e-3", [0, 1, 2, 3])]
)
def test_recorded_runs_of_a_recipe_are_not_made_again(add, weight, trained, tmp_path, monkeypatch):
    runs = frame(rd=(0.5, 0.6, 0.7)).query("`choices.problem` == 'real'")
    runs["overrides"] = [
        ["experiment=e", "loss.weight=0.001", "data.split_seed=$\\{seed\\}", "a={b:c,d:1}", f"seed={seed}"] for seed in range(3)
    ]
    runs["status"] = ["finished", "failed", "finished"]
    given = recorded(tmp_path, runs, add)
    given.seeds, given.sweeps, asked = 4, tmp_path, []
    common, records = script("_common"), script("_records")
    overrides = ("loss.weight=7", f"loss.weight={weight}", "data.split_seed=${seed}", "a={b: c, d: 1}")
    method = records.recorded("e", common.Method("RD", overrides), given)
    monkeypatch.setattr(common, "run_sweep", lambda *sweep: asked.append(sweep) or pd.DataFrame({"config.seed": sweep[-1]}))
    made = common.run_methods("e", [method], given, "real")
    assert asked == [(tmp_path / "real-RD", ["experiment=e", *overrides], trained)]
    assert sorted(made["config.seed"]) == [0, 1, 2, 3] and set(made["choices.method"]) == {"RD"}
    values = {} if method.done is None else made.dropna(subset="metrics.test.accuracy").set_index("config.seed")
    assert dict(values.get("metrics.test.accuracy", {})) == ({0: 0.5, 2: 0.7} if trained == [1, 3] else {})


def test_a_broken_record_is_named(tmp_path):
    given = recorded(tmp_path, frame(plain=(0.5,)))
    with (tmp_path / "runs.jsonl").open("a") as file:
        file.write('{"status": "finished"')
    with pytest.raises(SystemExit, match=r"runs.jsonl line 3: expected a run as JSON, .* got '{\"status\": .*delete the line"):
        script("_records").with_recorded(pd.DataFrame(), given)


def test_no_runs_and_nothing_recorded_ends_with_the_reason(tmp_path):
    given = argparse.Namespace(out=tmp_path / "none", add=True)
    with pytest.raises(SystemExit, match=r"no runs: --seeds is 0 and .*runs.jsonl does not exist"):
        script("_records").with_recorded(pd.DataFrame(), given)


def test_curves_are_recorded_and_aligned_on_the_epochs_all_runs_have(tmp_path):
    for name, epochs in (("a", (1, 2, 3)), ("b", (1, 3))):
        (tmp_path / name).mkdir()
        lines = [{"epoch": epoch, "metrics": {"test": {"recall_at_50": epoch / 10}}} for epoch in epochs]
        text = "\n".join(json.dumps(line) for line in [*lines, {"epoch": 4, "metrics": {"train": {"loss": 1.0}}}])
        (tmp_path / name / "metrics.jsonl").write_text(text)
    runs = frame(plain=(0.5,)).assign(path=[str(tmp_path / "a"), str(tmp_path / "b")])
    runs = script("_ranking").with_curves(runs, "test.recall_at_50")
    again = script("_records").with_recorded(pd.DataFrame(), recorded(tmp_path, runs))
    epochs, values = script("_ranking").curves(again, "test.recall_at_50")
    assert epochs.tolist() == [1, 3] and values.tolist() == [[0.1, 0.3], [0.1, 0.3]]


@pytest.mark.parametrize(
    ("name", "options", "records", "table"),
    [
        ("topology_distillation", (), "runs.jsonl", "table.csv"),
        ("ranking_distillation", (), "runs.jsonl", "table.csv"),
        ("ranking_distillation", ("--split=own",), "own_splits/runs.jsonl", "own_splits.csv"),
        ("popularity_bias", (), "runs.jsonl", "table.csv"),
        ("sequential", (), "runs.jsonl", "table.csv"),
    ],
)
def test_committed_tables_of_several_commands_are_those_of_their_records(name, options, records, table, tmp_path, monkeypatch):
    if name == "topology_distillation":
        require_files("citeulike-t/published_history.json")
    committed = ROOT / "results" / name
    (tmp_path / records).parent.mkdir(exist_ok=True)
    shutil.copy(committed / records, tmp_path / records)
    given = ["--seeds=0", "--add", f"--out={tmp_path}", f"--sweeps={tmp_path}/none", *options]
    monkeypatch.setattr(sys, "argv", [name, *given])
    script(name).main()
    for file in (records, table):
        assert (tmp_path / file).read_text() == (committed / file).read_text()


@pytest.mark.parametrize(
    ("name", "options", "records"),
    [
        ("topology_distillation", ("--seeds=5", "--losses=none,entity_hint,ftd"), "runs.jsonl"),
        ("ranking_distillation", ("--seeds=1",), "runs.jsonl"),
        ("ranking_distillation", ("--split=own", "--seeds=5", "--methods=Student,RD,CD,RRD,IR-RRD"), "own_splits/runs.jsonl"),
        ("popularity_bias", ("--seeds=5",), "runs.jsonl"),
        ("sequential", ("--seeds=5", "--data=movielens,amazon"), "runs.jsonl"),
    ],
)
def test_committed_runs_are_of_the_scripts_recipes_and_not_made_again(name, options, records, tmp_path, monkeypatch):
    if name == "topology_distillation":
        require_files("citeulike-t/published_history.json")
    shutil.copytree(ROOT / "results" / name, tmp_path / "out")
    before = (tmp_path / "out" / records).read_text()
    monkeypatch.setattr(sys, "argv", [name, "--add", f"--out={tmp_path}/out", f"--sweeps={tmp_path}/none", *options])
    monkeypatch.setattr(script("_common").subprocess, "run", lambda command, **_: pytest.fail(f"would train: {command}"))
    script(name).main()
    assert sorted((tmp_path / "out" / records).read_text().splitlines()) == sorted(before.splitlines())


def test_portable_cuts_off_this_machine(monkeypatch, tmp_path):
    portable = script("_common").portable
    monkeypatch.setenv("JDISTILL_CACHE", "/var/somewhere/cache")
    text = f'{{"a": "{os.getcwd()}/sweeps/x", "b": "/var/somewhere/cache/teachers/t", "c": "{os.getcwd()}", "d": "1/2"}}'
    assert json.loads(portable(text)) == {"a": "sweeps/x", "b": "teachers/t", "c": "", "d": "1/2"}


def test_slug_is_a_plain_folder_name():
    assert script("_common").slug(" CE + 0.5 KL") == "CE-0-5-KL"


def test_difference_figure_has_a_panel_a_problem(tmp_path):
    import matplotlib.pyplot as plt

    common = script("_common")
    common.difference_figure(frame(plain=(0.5, 0.51), kd=(0.5, 0.49)), tmp_path / "difference.png", title="t")
    image = plt.imread(tmp_path / "difference.png")
    assert image.shape[1] > image.shape[0] > 100  # two panels side by side
    assert not plt.get_fignums()


def test_with_column_leaves_the_table_it_was_given():
    table = Table((Column("n", "n", "count", {"n": "n"}),), ({"n": 1},), (), "test.accuracy")
    assert script("_common").with_column(table, "x", lambda row: row["n"] + 1).rows == ({"n": 1, "x": 2},)
    assert table.rows == ({"n": 1},)


@pytest.mark.parametrize("folder", RESULTS, ids=lambda path: path.name)
def test_committed_tables_follow_from_their_records(folder):
    runs = [json.loads(line) for line in (folder / "runs.jsonl").read_text().splitlines()]
    rows = list(csv.DictReader((folder / "table.csv").read_text().splitlines()))
    assert rows
    for row in rows:
        own = [r for r in runs if all(r.get(key) == row[key] for key in ("problem", "method") if key in row)]
        values = {r["seed"]: r["metrics.test.accuracy"] for r in own}
        base = {r["seed"]: r["metrics.test.accuracy"] for r in runs
                if r.get("method") == "plain" and r.get("problem") == row.get("problem")}  # fmt: skip
        assert len(own) == len(values) == int(row["n"])
        assert float(row["test.accuracy.mean"]) == pytest.approx(np.mean(list(values.values())), abs=1e-12)
        assert float(row["test.accuracy.std"]) == pytest.approx(np.std(list(values.values()), ddof=1), abs=1e-12)
        if row["difference"]:
            gaps = [values[seed] - base[seed] for seed in values]
            assert float(row["difference"]) == pytest.approx(np.mean(gaps), abs=1e-12)


@pytest.mark.parametrize("folder", sorted(p for p in (ROOT / "results").glob("*") if p.is_dir()), ids=lambda path: path.name)
def test_committed_results_name_no_folder_of_a_machine(folder):
    for path in folder.glob("*"):
        if path.suffix in (".md", ".csv", ".jsonl"):
            assert not re.search(r"(?:^|[\s\"'=(])/(?:tmp|home|root|work|Users|var|mnt|data)\b", path.read_text()), path


@pytest.mark.slow
def test_binary_experiment_runs_and_is_not_repeated(tmp_path):
    command = [sys.executable, str(ROOT / "experiments/documents_binary.py"), "--seeds", "2", "--out", "out"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"table.md", "table.csv", "runs.jsonl", "difference.png", "scatter.png"}
    assert len((tmp_path / "out" / "runs.jsonl").read_text().splitlines()) == 2 * 3 * 2
    assert "nothing can be learned" in (tmp_path / "out" / "table.md").read_text()
    assert str(tmp_path) not in (tmp_path / "out" / "runs.jsonl").read_text()
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "sweeps").rglob("result.json")}
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
    assert len(stamps) == 12 and {p: p.stat().st_mtime_ns for p in stamps} == stamps


def test_a_choice_is_checked_before_anything_runs(capsys):
    parser = script("_common").arguments("name", "what it does")
    script("_common").add_choice(parser, "--methods", ("Student", "DE", "DE-RRD, 20 %"), always="Student", separator=";")
    script("_common").add_choice(parser, "--data", ("movielens", "amazon"), default="amazon")
    assert parser.parse_args([]).methods == ["Student", "DE", "DE-RRD, 20 %"]
    assert parser.parse_args([]).data == ["amazon"]
    assert parser.parse_args(["--methods", "DE-RRD, 20 %; DE"]).methods == ["Student", "DE", "DE-RRD, 20 %"]
    assert parser.parse_args(["--methods", "DE"]).methods == ["Student", "DE"]
    with pytest.raises(SystemExit):
        parser.parse_args(["--data", "movielens,amazn"])
    assert "argument --data: unknown amazn; did you mean 'amazon'? (known: movielens, amazon)" in capsys.readouterr().err
    assert "20 %" in parser.format_help()
