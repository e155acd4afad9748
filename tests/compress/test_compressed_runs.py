"""Compressed students as whole runs: stopped anywhere they go on bit for bit, and what is written is what was evaluated."""

import json

import jax
import numpy as np
import pytest

from jdistill import blueprint
from jdistill.compress.artifact import read_artifact
from jdistill.evaluation import reload
from jdistill.run import run, run_jobs
from jdistill.standing import Interrupted
from jdistill.sweep.units import Job
from tests.marks import slow_but
from tests.tiny import config

SEQUENCES = {
    "weights": [
        {"name": "prune", "sparsity": {"name": "cubic", "end": 0.7, "epochs": 2}}, "distill",
        {"name": "qat", "recover_epochs": 2},
    ],
    "structure": [
        "distill", {"name": "structured", "recover_epochs": 1}, {"name": "low_rank", "share": 0.5, "recover_epochs": 2}, "int8",
    ],
    "movement": ["distill", {"name": "movement_prune", "recover_epochs": 3}, {"name": "int8", "activations": "static"}],
    "lottery": [{"name": "lottery", "rounds": 2, "recover_epochs": 2}, {"name": "ternary", "recover_epochs": 1}],
    "sharing": [
        "distill", {"name": "prune", "recover_epochs": 1}, {"name": "weight_sharing", "clusters": 4, "recover_epochs": 2},
    ],
}  # fmt: skip


def asked(steps, seed=0, report="last"):
    given = config(
        ("seed", seed), ("optim.epochs", 2), ("optim.batch_size", 40), ("data.examples", 160), ("student.widths", [64, 48]),
        ("evaluate.latency", False), ("checkpoint.every_epochs", 1), ("report", report), loss="none", teacher="none",
    )  # fmt: skip
    return given | {"compression": {"name": "pipeline", "steps": steps}}


def stopping(at):
    calls = iter(range(1, 1000))
    return lambda: next(calls) >= at


@pytest.mark.parametrize("steps", slow_but(["weights"], SEQUENCES))
def test_a_stopped_run_goes_on_bit_for_bit(steps, tmp_path):
    given = asked(steps, report="best_val")
    whole = run(given, tmp_path / "whole", choices={})
    rows = (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()
    stops, found = 0, None
    while found is None:  # several times an epoch, so at every border between stages
        try:
            found = run(given, tmp_path / "cut", choices={}, stop=stopping(2))
        except Interrupted:
            stops += 1
    assert stops >= len(rows)
    assert found["metrics"] == whole["metrics"] and found["size"] == whole["size"]
    cut, uncut = (tmp_path / name / "artifact.safetensors" for name in ("cut", "whole"))
    assert cut.read_bytes() == uncut.read_bytes()
    assert (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines() == rows


@pytest.mark.parametrize("steps", slow_but(["weights"], SEQUENCES))
def test_what_is_written_is_what_was_evaluated(steps, tmp_path):
    given = asked(steps)
    result = run(given, tmp_path, choices={})
    read = blueprint.read(given)
    model, variables = reload(read, tmp_path / "artifact.safetensors")
    answer = read.task.answer(model, read.dataset, variables, "test")
    assert read.task.metrics(answer, read.dataset, "test", None)["accuracy"] == result["metrics"]["test"]["accuracy"]
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["validation"]["accuracy"] == pytest.approx(result["metrics"]["validation"]["accuracy"], abs=0.1)
    plain = run(asked(["distill"]), tmp_path / "plain", choices={})
    assert result["size"]["bytes"] < plain["size"]["bytes"] and result["size"]["nonzero"] <= plain["size"]["nonzero"]


@pytest.mark.parametrize("steps", slow_but(["structure"], SEQUENCES))
def test_members_of_a_population_are_their_solo_runs(steps, tmp_path):
    jobs = [Job(i, (), asked(steps, seed=i), {}, tmp_path / str(i)) for i in range(2)]
    members = run_jobs(jobs, population={}, folder=tmp_path / "population")
    for i, member in enumerate(members):
        alone = run(asked(steps, seed=i), tmp_path / f"alone{i}", choices={})
        assert member["metrics"]["train"]["loss"] == pytest.approx(alone["metrics"]["train"]["loss"], rel=1e-3)
        found, wanted = (read_artifact(tmp_path / name / "artifact.safetensors")[0] for name in (str(i), f"alone{i}"))
        close = jax.tree.map(lambda a, b: np.mean(np.isclose(a, b, rtol=1e-3, atol=1e-4)), found, wanted)
        assert min(jax.tree.leaves(close)) > 0.9  # a rounding that falls the other way is one step of a few weights
