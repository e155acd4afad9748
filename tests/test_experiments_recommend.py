"""Experiments on search, conversion and the documents' scenarios: settings chosen on validation, tables, committed results."""

import argparse
import csv
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from test_experiment_scripts import composed

from tests.realdata import require_files

ROOT = Path(__file__).resolve().parents[1]
METHOD, PROBLEM, SEED = "choices.method", "choices.problem", "config.seed"


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    """`experiments/` importable, as it is for its own scripts."""
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    monkeypatch.setenv("MPLBACKEND", "Agg")


def script(name):
    return importlib.import_module(name)


def frame():
    """Two methods, three seeds; KD with two weights, of which validation prefers 1, 1 and 3."""
    rows = [("plain", seed, 1.0, 0.5, 0.50 + seed / 100) for seed in range(3)]
    for seed, (low, high) in enumerate([(0.7, 0.6), (0.7, 0.6), (0.6, 0.9)]):
        rows += [("KD", seed, 1.0, low, 0.60), ("KD", seed, 3.0, high, 0.70)]
    return pd.DataFrame(
        [
            {METHOD: method, PROBLEM: "p", SEED: seed, "config.loss.weight": weight, "status": "finished",
             "metrics.validation.auc": validation, "metrics.test.auc": test, "size.bytes": 10.0 * weight,
             "latency_ms.1.p50": 0.1, "teacher.metrics.test.auc": np.nan if method == "plain" else 0.9}
            for method, seed, weight, validation, test in rows
        ]
    )  # fmt: skip


def test_a_setting_is_chosen_on_validation_in_each_repetition():
    kept = script("_selection").select(frame(), ("loss.weight", "loss.temperature"), "auc")
    assert kept[METHOD].tolist() == ["plain"] * 3 + ["KD"] * 3
    assert kept.loc[kept[METHOD] == "KD", "config.loss.weight"].tolist() == [1, 1, 3]
    assert kept["tried"].tolist() == ["", "", "", "loss.weight=1", "loss.weight=1", "loss.weight=3"]
    said = script("_selection").settings(kept)
    assert said({METHOD: "KD", PROBLEM: "p"}) == "loss.weight=1 (2), loss.weight=3 (1)"
    assert said({METHOD: "plain", PROBLEM: "p"}) is None


@pytest.mark.parametrize(("least", "weight"), [(False, 3), (True, 1)])
def test_one_setting_for_all_repetitions(least, weight):
    runs = frame()  # means over seeds: 0.667 for 1, 0.7 for 3
    kept = script("_selection").select(runs, ("loss.weight",), "auc", None, least=least)
    assert set(kept.loc[kept[METHOD] == "KD", "config.loss.weight"]) == {weight}
    assert len(kept) == 6


def test_runs_that_failed_stay_and_choose_nothing():
    runs = frame()
    failed = (runs[METHOD] == "KD") & (runs["config.loss.weight"] == 3) & (runs[SEED] == 2)
    runs.loc[failed, ["status", "metrics.validation.auc"]] = ["failed", np.nan]
    kept = script("_selection").select(runs, ("loss.weight",), "auc")
    assert kept.loc[kept[METHOD] == "KD", "status"].tolist() == ["finished", "finished", "finished", "failed"]
    assert kept.loc[kept["status"] == "finished", "config.loss.weight"].max() == 1


def test_folds_take_the_place_of_seeds():
    search = script("search_icecat")
    runs = frame().assign(**{"config.data.fold": frame()[SEED] % 2})
    assert search.by_fold(runs)[SEED].tolist() == (frame()[SEED] % 2).tolist()


def test_runs_of_a_sweep_are_labelled_and_repetitions_of_plain_left_out():
    runs = pd.DataFrame(
        {"choices.loss": ["none", "none", "kd", "kd"], "config.loss.weight": [0.1, 1, 0.1, 1], "choices.student": "ltr_mlp"}
    )
    labelled = script("search_icecat").labelled(runs, "cheap")
    assert labelled[METHOD].tolist() == ["plain", "KD", "KD"]
    assert set(labelled[PROBLEM]) == {"cheap features, 32 units"}


def test_summary_of_a_scenario():
    scenarios = script("documents_scenarios")
    runs = script("_selection").select(frame(), ("loss.weight",), "auc").replace({METHOD: {"KD": "distilled"}})
    teacher = runs.iloc[:1].assign(**{METHOD: "teacher", "size.bytes": 999.0, "latency_ms.1.p50": 2.0})
    row = scenarios.summary(pd.concat([runs, teacher], ignore_index=True), "auc")
    plain, distilled = np.array([0.50, 0.51, 0.52]), np.array([0.6, 0.6, 0.7])
    assert row["n"] == 3 and row["teacher.mean"] == pytest.approx(0.9)
    assert row["plain.mean"] == pytest.approx(plain.mean()) and row["distilled.std"] == pytest.approx(distilled.std(ddof=1))
    assert row["difference"] == pytest.approx((distilled - plain).mean())
    assert (row["bytes.teacher"], row["latency.teacher"], row["latency.student"]) == (999, 2, 0.1)
    made = scenarios.table([{**row, "scenario": name, "data and networks": "x"} for name in ("a", "b")])
    assert made.rows[0]["p"] == pytest.approx(min(1, 2 * row["p.raw"]))  # Holm over two equal p
    assert [column.name for column in made.columns][:4] == ["scenario", "data and networks", "metric", "n"]


def test_search_row_is_read_from_its_records(tmp_path):
    lines = []
    for problem, method, value in (
        ("cheap features, 32 units", "plain", 0.6),
        ("cheap features, 32 units", "listwise KD", 0.7),
        ("the teacher's network", "plain", 0.8),
        ("all features, 32 units", "plain", 0.1),
    ):
        for fold in range(2):
            for seed in range(2):
                lines.append(
                    {"problem": problem, "method": method, "data.fold": fold, "seed": seed, "status": "finished",
                     "metrics.test.ndcg_at_10": value + fold / 10 + seed / 100, "teacher.metrics.test.ndcg_at_10": 0.9,
                     "size.bytes": 5, "latency_ms.1.p50": 0.2}
                )  # fmt: skip
    (tmp_path / "search_icecat").mkdir()
    (tmp_path / "search_icecat" / "runs.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    (row,) = script("documents_scenarios").from_search(tmp_path)
    assert (row["n"], row["scenario"]) == (2, "search ranking")  # folds, not runs
    assert row["plain.mean"] == pytest.approx(0.655) and row["difference"] == pytest.approx(0.1)
    assert script("documents_scenarios").from_search(tmp_path / "elsewhere") == []


def one(override):
    """The first of the choices of a sweep's override."""
    key, _, value = override.partition("=")
    return override if value.startswith(("[", "{")) else f"{key}={value.split(',')[0]}"


def test_scenarios_compose_as_their_labels_say():
    scenarios = script("documents_scenarios").SCENARIOS
    assert len({scenario.name for scenario in scenarios}) == len(scenarios)
    for scenario in scenarios:
        teacher, plain, distilled = (
            composed("experiment=documents_scenarios", *map(one, method.overrides)) for method in scenario.methods()
        )
        assert teacher["student"]["name"] == distilled["teacher"]["name"] == scenario.teacher[0], scenario.name
        assert plain["student"] == distilled["student"] and plain["optim"] == distilled["optim"]
        assert (plain["loss"]["name"], teacher["loss"]["name"]) == ("none", "none")
        assert (distilled["loss"]["name"] != "none") != distilled["transfer"]["inherit"]
        assert distilled["teacher"]["optim"] == teacher["optim"] and distilled["teacher"]["seed"] == 0
        assert plain["report"] == distilled["report"] and not plain["transfer"]["inherit"]
        assert plain["data"] == distilled["data"] == teacher["data"]


@pytest.mark.parametrize("student", ["mlp", "tree", "gbt", "linear_svm"])
def test_conversion_hides_privileged_columns_from_every_student_but_the_one_that_says_so(student):
    for method in script("conversion_privileged").methods(student):
        config = composed("experiment=conversion_privileged", *map(one, method.overrides), "seed=3")
        hidden = [] if "all features" in method.label else ["PageValues", "BounceRates", "ExitRates"]
        assert config["data"]["privileged"] == hidden and config["student"]["name"] == student
        assert (config["data"]["fold"], config["teacher"]["seed"], config["data"]["folds"]) == (3, 3, 5)


def test_search_students_read_what_their_label_says():
    search = script("search_icecat")
    for sweep, overrides in search.SWEEPS.items():
        config = composed("experiment=search_icecat", *map(one, overrides))
        assert config["data"]["privileged_features"] == (sweep == "cheap")
        if sweep == "teacher":  # the teacher's network and recipe, as a student
            same = ("widths", "context", "dropout", "name")
            assert {k: config["student"][k] for k in same} == {k: config["teacher"][k] for k in same}
            assert config["optim"] == config["teacher"]["optim"]


@pytest.mark.slow
def test_a_scenario_runs_on_the_synthetic_shop(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    scenarios = script("documents_scenarios")
    tiny = ("optim.epochs=1", "optim.batch_size=32")
    shop = ("data=synthetic_shop", "data.view=risk", "data.users=60", "data.items=60", "task=click", *tiny)
    scenario = scenarios.Scenario(
        "tiny", "shop", "auc", shop, ("mlp", "widths=[8]"), ("mlp", "widths=[4]"), ("loss=bce_soft", "loss.weight=0.3,1"), tiny
    )
    given = argparse.Namespace(seeds=2, out=tmp_path / "out", sweeps=tmp_path / "sweeps")
    kept = scenarios.run(scenario, given)
    assert kept[METHOD].value_counts().to_dict() == {"plain": 2, "distilled": 2, "teacher": 1}
    row = scenarios.summary(kept, "auc")
    assert row["n"] == 2 and 0 <= row["teacher.mean"] <= 1 and row["bytes.teacher"] > row["bytes.student"]


@pytest.mark.slow
def test_conversion_runs_for_networks_and_trees(tmp_path):
    require_files("online-shoppers/online_shoppers_intention.csv")
    command = [sys.executable, "-m", "jdistill", "-m", "experiment=conversion_privileged", "data.limit=300", "optim.epochs=1",
               "teacher.optim.epochs=1", "loss=kd", "student=mlp,tree,linear_svm",
               f"hydra.sweep.dir={tmp_path / 's'}"]  # fmt: skip
    subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True, capture_output=True)
    from jdistill.report import collect

    runs = collect(tmp_path / "s")
    assert runs["status"].tolist() == ["finished"] * 3
    assert (runs["metrics.test.auc"] > 0.4).all() and runs["teacher.metrics.test.auc"].nunique() == 1


@pytest.mark.parametrize("name", ["conversion_privileged", "search_icecat"])
def test_committed_tables_follow_from_their_records(name):
    folder, metric = ROOT / "results" / name, {"conversion_privileged": "auc", "search_icecat": "ndcg_at_10"}[name]
    unit = "data.fold" if name == "search_icecat" else "seed"
    runs = [json.loads(line) for line in (folder / "runs.jsonl").read_text().splitlines()]
    rows = list(csv.DictReader((folder / "table.csv").read_text().splitlines()))
    assert rows

    def means(problem, method):
        own = [run for run in runs if (run["problem"], run["method"]) == (problem, method)]
        return own, {
            value: np.mean([run[f"metrics.test.{metric}"] for run in own if run[unit] == value])
            for value in {run[unit] for run in own}
        }

    for row in rows:
        own, values = means(row["problem"], row["method"])
        assert len(own) == int(row["n"])
        mean = np.mean([run[f"metrics.test.{metric}"] for run in own])
        assert float(row[f"test.{metric}.mean"]) == pytest.approx(mean, abs=1e-12)
        if row["difference"]:
            base = means(row["problem"], "plain")[1]
            assert float(row["difference"]) == pytest.approx(np.mean([values[u] - base[u] for u in values]), abs=1e-12)


def test_committed_scenarios_follow_from_their_records():
    folder = ROOT / "results" / "documents_scenarios"
    runs = [json.loads(line) for line in (folder / "runs.jsonl").read_text().splitlines()]
    rows = list(csv.DictReader((folder / "table.csv").read_text().splitlines()))
    own = {scenario.name: scenario for scenario in script("documents_scenarios").SCENARIOS}
    assert set(own) <= {row["scenario"] for row in rows}
    for row in rows:
        if row["scenario"] not in own:
            continue
        metric = f"metrics.test.{own[row['scenario']].metric}"
        values = {
            method: {r["seed"]: r[metric] for r in runs if (r["problem"], r["method"]) == (row["scenario"], method)}
            for method in ("plain", "distilled")
        }
        assert len(values["plain"]) == int(row["n"])
        gaps = [values["distilled"][seed] - values["plain"][seed] for seed in values["plain"]]
        assert float(row["difference"]) == pytest.approx(np.mean(gaps), abs=1e-12)


@pytest.mark.parametrize(
    ("known", "file", "drawn"),
    [((0, 1), "curves.png", 2), ((0,), "some_curves.png", 1), ((), None, 0)],
    ids=["all", "some", "none"],
)
def test_runs_that_hold_no_curve_are_left_out_of_the_picture(known, file, drawn, tmp_path, monkeypatch, capsys):
    topology = script("topology_distillation")
    runs = [{METHOD: "HTD", "config.student.dim": "200", SEED: seed, "status": "finished"} for seed in (0, 1)]
    for seed in known:
        runs[seed]["curve"] = {"epoch": [10, 20], topology.METRIC: [0.2, 0.3 + seed / 10]}
    found = []
    monkeypatch.setattr(topology, "curve_figure", lambda *given: found.append(given))
    topology.draw(pd.DataFrame(runs), {"200": {"HTD": [0.1] * 11}}, tmp_path)
    assert [path.name for _, _, path, _ in found] == ([file] if file else [])
    for panels, published, _, _ in found:
        epochs, values = panels["student of 200"]["HTD"]
        assert epochs.tolist() == [10, 20] and values.tolist() == [[0.2, 0.3], [0.2, 0.4]][:drawn]
        assert published == {"student of 200": {"HTD": (list(range(0, 101, 10)), [0.1] * 11)}}
    said = capsys.readouterr().err
    assert said == ("" if drawn == 2 else f"some_curves.png: {2 - drawn} recorded runs without a learning curve are left out\n")
