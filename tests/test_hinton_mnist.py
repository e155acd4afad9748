"""The Hinton experiment: its config, its counting and bias correction, its tables, and the committed results."""

import csv
import importlib
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results" / "hinton_mnist"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    monkeypatch.setenv("MPLBACKEND", "Agg")
    return importlib.import_module("hinton_mnist")


def composed(*overrides):
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    from jdistill import options
    from jdistill.paths import conf_dir
    from jdistill.sweep.jobs import plain

    assert options
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return plain(compose("train", overrides=["experiment=hinton_mnist", *overrides]))


def test_config_is_the_papers_networks_and_data():
    config = composed("loss.temperature=20", "seed=2")
    teacher = config["teacher"]
    assert (teacher["widths"], config["student"]["widths"]) == ([1200, 1200], [800, 800])
    assert teacher["dropout"] > 0 and config["student"]["dropout"] == 0  # the student: no regularisation
    assert teacher["data"] == {"augment": ["crop"], "crop_padding": 2, "validation": 0.0}
    assert (config["data"]["augment"], config["data"]["validation"]) == ([], 0)
    assert (teacher["seed"], config["seed"]) == (0, 2)  # one teacher for all students
    assert config["evaluate"]["predictions"] is True


def test_all_students_of_all_rows_share_one_teacher(script):
    from jdistill.config import teacher_fingerprint

    rows = [m.overrides for m in script.METHODS] + [(script.SMALL, "loss.temperature=3")]
    assert len({teacher_fingerprint(composed(*overrides)) for overrides in rows if "loss=none" not in overrides}) == 1
    assert len({teacher_fingerprint(composed(*m.overrides, "seed=1")) for m in script.METHODS[1:]}) == 1


def test_rows_are_trained_on_the_papers_transfer_sets(script):
    found = {m.label: composed(*m.overrides) for m in script.METHODS}
    assert (found["plain 2x800"]["loss"]["name"], found["plain 2x800"]["task"]["weight"]) == ("none", 1)
    assert all(c["loss"]["temperature"] == 20 for label, c in found.items() if label != "plain 2x800")
    assert found["distilled 2x800"]["transfer"] == {"keep": None, "omit": [], "inherit": False}
    for end, validation in (("", 0), (", twin", 0.1667)):
        assert found["without threes" + end]["transfer"] == {"keep": None, "omit": [3], "inherit": False}
        assert found["sevens and eights only" + end]["transfer"] == {"keep": [7, 8], "omit": [], "inherit": False}
        assert found["without threes" + end]["data"]["validation"] == validation


def test_networks_of_the_search_never_see_its_validation_images(script):
    from jdistill.config import teaching

    for overrides in script.SEARCH.values():
        single = [text.split(",")[0] if "widths" not in text else text for text in overrides]
        config = composed(script.HELD_OUT, *single)
        assert config["data"]["validation"] == 0.1667
        if config["loss"]["name"] == "kd":
            assert teaching(config)["data"]["validation"] == 0.1667


def test_mistakes_are_counted_in_all_and_among_the_threes(script):
    logits = np.eye(10)[[3, 1, 3, 8, 3]]
    assert script.mistakes(np.array([3, 1, 3, 3, 5]), logits) == {"errors": 2, "errors_threes": 1}


def test_shifted_adds_to_the_given_classes_and_leaves_what_it_was_given(script):
    logits = np.zeros((2, 10), np.float32)
    moved = script.shifted(logits, (7, 8), -1.5)
    np.testing.assert_array_equal(moved, np.array([[0.0] * 7 + [-1.5, -1.5, 0.0]] * 2))
    assert not logits.any()


def low_bias(rng, classes, offset, n=400):
    """Labels, and logits that are right but for the biases of `classes`, `offset` off: margins are at least 0.5."""
    label = rng.integers(0, 10, n)
    logits = rng.uniform(0, 1, (n, 10))
    logits[np.arange(n), label] = 1.5
    logits[:, classes] -= offset
    return label, logits


@pytest.mark.parametrize(("classes", "offset"), [((3,), 3.5), ((7, 8), -7.6)])
def test_best_offset_finds_what_was_taken_away(script, classes, offset):
    label, logits = low_bias(np.random.default_rng(0), list(classes), offset)
    assert script.mistakes(label, logits)["errors"] > 20
    found = script.best_offset(label, logits, classes)
    assert script.mistakes(label, script.shifted(logits, classes, found))["errors"] == 0
    assert abs(found - offset) < 0.3


def test_best_offset_makes_fewest_errors_of_all_offsets(script):
    rng = np.random.default_rng(1)
    label, logits = rng.integers(0, 10, 300), rng.normal(0, 2, (300, 10))
    fewest = min(sum(int(np.argmax(z + o * (np.arange(10) == 3)) != y) for z, y in zip(logits, label))
                 for o in np.linspace(-30, 30, 601))  # fmt: skip
    found = script.best_offset(label, logits, (3,))
    assert script.mistakes(label, script.shifted(logits, (3,), found))["errors"] == fewest


@pytest.fixture
def frame(script, tmp_path):
    """Finished runs of every row, 2 seeds, with predictions: the twin's images want another offset than the test images."""
    rows = []
    for method in script.METHODS:
        for seed in (0, 1):
            folder = tmp_path / f"{method.label}-{seed}"
            folder.mkdir()
            rng = np.random.default_rng(seed)
            low = script.TRANSFER.get(method.label.removesuffix(", twin"), ("", ()))[1]
            label, logits = low_bias(rng, list(low), 3.5 if low == (3,) else -7.6)
            saved = {"label": label, "logits": logits, "teacher_logits": np.eye(10)[label]}
            if method.label.endswith("twin"):
                saved["validation_label"], saved["validation_logits"] = low_bias(rng, list(low), 6.0)
            np.savez(folder / "predictions.npz", **saved)
            rows.append({script.METHOD: method.label, "config.seed": seed, "status": "finished", "error": None, "path": folder,
                         "fingerprint": folder.name, "overrides": ["a=b"], "teacher.hash": "t", "config.teacher.seed": 0,
                         "size.bytes": 5})  # fmt: skip
    return script.counted(pd.DataFrame(rows))


def test_counted_leaves_a_failed_run_without_errors(script):
    failed = {script.METHOD: "plain 2x800", "status": "failed", "error": "x", "config.seed": 0}
    assert script.counted(pd.DataFrame([failed])).to_dict("records") == [failed]


def test_bias_is_chosen_on_the_twins_validation_images_or_on_test(script, frame):
    rows = script.corrected(frame.to_dict("records"), "without threes", (3,))
    assert [row[script.METHOD] for row in rows] == ["without threes, bias by validation", "without threes, bias by test"] * 2
    by_validation, by_test = rows[:2]
    assert abs(by_validation["metrics.test.offset"] - 6.0) < 0.3 and abs(by_test["metrics.test.offset"] - 3.5) < 0.3
    assert by_test["metrics.test.errors"] == 0 < by_validation["metrics.test.errors"]
    assert by_test["fingerprint"] is None and "run without threes-0, +" in by_test["derived"]
    assert "size.bytes" not in by_test


def test_correction_needs_the_twin_of_the_same_seed(script, frame):
    alone = frame[~((frame[script.METHOD] == "without threes, twin") & (frame["config.seed"] == 1))]
    rows = script.corrected(alone.to_dict("records"), "without threes", (3,))
    assert [row["config.seed"] for row in rows] == [0, 0]


def test_tables_stand_in_the_papers_order_beside_its_figures(script, frame, tmp_path, capsys):
    runs = frame.to_dict("records")
    rows = script.of_teacher(runs)
    for label, (_, classes) in script.TRANSFER.items():
        rows += script.corrected(runs, label, classes)
    whole = pd.concat([frame, pd.DataFrame(rows)], ignore_index=True)
    script.write_counts(tmp_path, script.main_table(whole))
    table = list(csv.DictReader((tmp_path / "table.csv").read_text().splitlines()))
    assert [row["method"] for row in table] == list(script.PUBLISHED)  # twins choose and are not shown
    assert [row["n"] for row in table] == ["1"] + ["2"] * 8
    assert [row["paper: errors"] for row in table[:5]] == ["67", "146", "74", "206", "109"]
    assert (table[4]["paper: on threes"], table[4]["paper: added"]) == ("14", "+3.5")
    assert float(table[5]["offset.mean"]) == pytest.approx(3.5, abs=0.3)
    assert float(table[5]["test.errors.mean"]) == 0
    assert "0.0 ± 0.0" in capsys.readouterr().out


def test_gain_is_paired_over_seeds(script):
    runs = pd.DataFrame({script.METHOD: ["plain 2x800"] * 3 + ["distilled 2x800"] * 3, "config.seed": [0, 1, 2] * 2,
                         "metrics.test.errors": [150, 140, 160, 80, 72, 88]})  # fmt: skip
    assert script.gain(runs)[0].startswith("distilled 2x800 minus plain 2x800: -70.0 errors [-75.0, -65.0]")
    assert script.gain(runs[:3]) == []


def test_temperatures_are_compared_with_3_and_drawn(script, tmp_path):
    import matplotlib.pyplot as plt

    labels = ["plain 2x30"] + [f"T {t:g}" for t in script.TEMPERATURES]
    rows = [{script.METHOD: label, "config.seed": seed, "status": "finished", "error": None, "fingerprint": f"{label}{seed}",
             "overrides": [], "config.loss.temperature": None if label[0] == "p" else label[2:],
             "metrics.test.errors": 400 + 10 * i + seed * (1 + i % 2)}
            for i, label in enumerate(labels) for seed in (0, 1)]  # fmt: skip
    runs = pd.DataFrame(rows)
    table = script.temperature_table(runs)
    assert [row[script.METHOD] for row in table.rows] == labels
    assert [row["baseline"] for row in table.rows] == [label == "T 3" for label in labels]
    assert table.rows[1]["difference"] == pytest.approx(-30.0 + 0.5)
    script.temperature_figure(runs, tmp_path / "t.png")
    assert plt.imread(tmp_path / "t.png").shape[0] > 100


def test_search_rows_are_named_by_what_was_searched(script):
    overrides = ["experiment=hinton_mnist", "loss=none", "student.dropout=0.5", "optim.epochs=10", "optim.lr=0.001"]
    assert script.searched("teacher", overrides) == "teacher: dropout=0.5, lr=0.001"


@pytest.mark.skipif(not (RESULTS / "runs.jsonl").is_file(), reason="no results are committed")
@pytest.mark.parametrize("name", ["table", "temperatures"])
def test_committed_tables_follow_from_their_records(name):
    runs = [json.loads(line) for line in (RESULTS / "runs.jsonl").read_text().splitlines()]
    for row in csv.DictReader((RESULTS / f"{name}.csv").read_text().splitlines()):
        errors = [r["metrics.test.errors"] for r in runs if r["method"] == row["method"] and r["status"] == "finished"]
        assert len(errors) == int(row["n"])
        assert float(row["test.errors.mean"]) == pytest.approx(np.mean(errors), abs=1e-9)
        if len(errors) > 1:
            assert float(row["test.errors.std"]) == pytest.approx(np.std(errors, ddof=1), abs=1e-9)
