"""A search under a budget: the best trial costs no more, the sampler learns what does, and the real command on digits."""

import re
import statistics
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from jdistill.errors import RunError, UsageError
from jdistill.report.collect import read_jobs
from tests.e2e.helpers import TINY, call, result, sole_error, succeed
from tests.sweep.test_search import FakeLauncher, run, study_of

optuna = pytest.importorskip("optuna")

SPACE = ("width=interval(1,100)",)


@pytest.fixture(autouse=True)
def no_table(monkeypatch, request):
    """Fake jobs leave no runs to tabulate."""
    if "command" not in request.node.name:
        monkeypatch.setattr("jdistill.commands.write_report", lambda folder, **options: f"table of {folder} {options}")


def wider_is_better(params: dict[str, float]) -> dict[str, float]:
    return {"accuracy": params["width"], "bytes": 10 * params["width"]}


def searched(folder: Path, limit: float, **settings):
    return run(folder, FakeLauncher(wider_is_better), *SPACE, budget={"bytes": limit}, **settings)


@pytest.mark.parametrize("sampler", ["tpe", "nsga2", "random"])
def test_the_best_trial_is_the_best_of_those_within(tmp_path, capsys, sampler):
    study = searched(tmp_path, 300, sampler=sampler)
    widths = [trial.params["width"] for trial in study.trials]
    assert max(widths) > 30  # the best of all is beyond
    best = OmegaConf.load(tmp_path / "optimization_results.yaml")
    assert best.best_value == max(width for width in widths if width <= 30)
    assert (best.budget, best.best_costs) == ({"bytes": 300}, {"bytes": 10 * best.best_value})
    out, err = capsys.readouterr()
    assert "best trial within bytes <= 300:" in out and "{'budget': {'bytes': 300.0}}" in out
    line = re.search(r"job (\d+): validation.accuracy [\d.]+, bytes ([\d.]+): width=", out)
    assert widths[int(line[1])] == best.best_value and float(line[2]) <= 300
    assert re.search(r"24 of 24 trials, best job", err)


def test_tpe_stays_within_once_it_knows_and_comes_close_to_the_limit(tmp_path):
    settings = {"n_trials": 32, "startup_trials": 8}
    bound = searched(tmp_path / "bound", 300, **settings)
    free = run(tmp_path / "free", FakeLauncher(wider_is_better), *SPACE, **settings)
    late = [statistics.mean(trial.params["width"] for trial in study.trials[-16:]) for study in (bound, free)]
    assert late[0] < 45 and late[1] > 70
    assert max(t.params["width"] for t in bound.trials if t.params["width"] <= 30) > 25


def test_a_pareto_set_within_a_budget(tmp_path, capsys):
    launcher = FakeLauncher(wider_is_better)
    objectives = ["validation.accuracy:max", "size.bytes:min"]
    run(tmp_path, launcher, *SPACE, sampler="nsga2", objectives=objectives, budget={"bytes": 300})
    found = OmegaConf.load(tmp_path / "optimization_results.yaml")
    within = sum(r["size"]["bytes"] <= 300 for r in launcher.results.values())
    assert 0 < len(found.solutions) == within < 24 and all(s["values"][1] <= 300 for s in found.solutions)
    assert f"Pareto set of {within} within bytes <= 300:" in capsys.readouterr().out


def test_none_within_names_the_smallest(tmp_path, capsys):
    with pytest.raises(RunError) as error:
        searched(tmp_path, 9)
    widths = [trial.params["width"] for trial in study_of(tmp_path).trials]
    smallest = widths.index(min(widths))
    assert str(error.value).startswith("none of 24 trials is within bytes <= 9; the smallest is job ")
    assert f"job {smallest}: " in str(error.value) and f"width={min(widths)!r}" in str(error.value)
    assert "none within the budget" in capsys.readouterr().err
    assert not (tmp_path / "optimization_results.yaml").exists()


def test_a_killed_search_goes_on_as_it_would_have(tmp_path):
    few = {"n_trials": 12, "startup_trials": 4, "batch": 4}
    searched(tmp_path / "whole", 300, **few)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", FakeLauncher(wider_is_better, kill=6), *SPACE, budget={"bytes": 300}, **few)
    killed, whole = searched(tmp_path / "killed", 300, **few), study_of(tmp_path / "whole")
    assert [t.params for t in killed.trials] == [t.params for t in whole.trials]
    assert [t.constraints for t in killed.trials] == [t.constraints for t in whole.trials]


def test_another_budget_is_another_search(tmp_path):
    searched(tmp_path, 600, n_trials=4, batch=4)
    with pytest.raises(UsageError, match=r"another search .the budget was bytes=600, now bytes=500.; choose another"):
        searched(tmp_path, 500)
    with pytest.raises(UsageError, match="the budget was bytes=600, now none"):
        run(tmp_path, FakeLauncher(wider_is_better), *SPACE)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"budget": {"size": 3}}, "unknown cost in hydra.sweeper.budget 'size'"),
        ({"budget": {"bytes": "small"}}, "hydra.sweeper.budget: bytes must be a positive number"),
        ({"budget": {"latency_ms": 3}}, "needs evaluate.latency=true"),
        ({"budget": {"bytes": 3}, "pruner": "median"}, "a search with a budget cannot prune"),
        ({"budget": {"flops": 3}}, "the result of job 0 has no number cost.flops; limit another cost"),
    ],
)
def test_mistakes_are_one_line(tmp_path, settings, message):
    with pytest.raises(UsageError, match=message):
        run(tmp_path, FakeLauncher(wider_is_better), *SPACE, **settings)


SEARCH = (
    "-m", "hydra/sweeper=optuna", *TINY, "data=digits", "loss=none", "hydra.sweeper.batch=4",
    "hydra.sweeper.n_trials=6", "hydra.sweeper.sampler=random", "hydra.sweep.dir=sweep",
)  # fmt: skip


def test_the_command_searches_sparsities_within_bytes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pruned = ("compression=prune", "compression.recover_epochs=0", "student.widths=[64]")
    space = (*pruned, "compression.sparsity=choice(0.0,0.3,0.6,0.9)")
    done = succeed(*SEARCH, *space, "hydra.sweeper.budget={bytes:12000}")
    results = {job["job"]: result(Path("sweep") / job["dir"]) for job in read_jobs("sweep")}
    within = {number: r for number, r in results.items() if r["size"]["bytes"] <= 12000}
    assert 0 < len(within) < len(results)
    best = OmegaConf.load("sweep/optimization_results.yaml")
    assert best.best_value == max(r["metrics"]["validation"]["accuracy"] for r in within.values())
    assert within[best.best_job]["size"]["bytes"] == best.best_costs.bytes
    assert "best trial within bytes <= 12,000:" in done.out and "within budget" in done.out


@pytest.mark.slow
def test_the_command_searches_pipelines_within_operations(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    space = ("compression=choice(none,int8)", "student.widths=choice([16],[64])", "hydra.sweeper.n_trials=4")
    succeed(*SEARCH, *space, "hydra.sweeper.budget={flops:5000,bytes:7000}")
    best = OmegaConf.load("sweep/optimization_results.yaml")
    found = [result(Path("sweep") / job["dir"]) for job in read_jobs("sweep")]
    sizes = {(r["choices"]["compression"], r["size"]["bytes"] <= 7000, r["cost"]["flops"] <= 5000) for r in found}
    assert {("none", True, True), ("int8", True, False)} <= sizes  # more accurate, and small, but too much to compute
    assert max(r["metrics"]["validation"]["accuracy"] for r in found) > best.best_value
    assert best.best_params["student.widths"] == "[16]" and best.best_costs.flops <= 5000
    refused = call(*SEARCH, *space, "hydra.sweeper.budget={bytes:10}", "hydra.sweep.dir=small")
    assert refused.code == 1 and re.search(r"error: none of 4 trials is within bytes <= 10; the smallest is job", refused.err)
    sole_error(call(*SEARCH, *space, "hydra.sweeper.budget={byte:10}"), "unknown cost.*did you mean 'bytes'", 2)
