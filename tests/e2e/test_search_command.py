"""The search by the real command on digits: batches, results, resuming, failures; zipped sweeps."""

import re
import signal
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from jdistill.report.collect import read_jobs
from tests.e2e.helpers import TINY, call, finish, result, rows, sole_error, start, succeed, until

optuna = pytest.importorskip("optuna")

SPACE = ("loss.temperature=interval(1,10)", "optim.lr=tag(log,interval(1e-3,1e-1))")
SEARCH = ("-m", "hydra/sweeper=optuna", *TINY, *SPACE, "hydra.sweeper.batch=3", "hydra.sweep.dir=sweep")


def trials(sweep: Path) -> list["optuna.trial.FrozenTrial"]:
    return optuna.load_study(study_name="search", storage=f"sqlite:///{sweep / 'study.db'}").trials


def jobs_now(sweep: Path) -> dict[int, dict]:
    """Job number -> its record, after all changes."""
    return {job["job"]: job for job in read_jobs(sweep)}


def stamps(sweep: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in sweep.glob("*/result.json")}


def test_six_trials_in_two_batches_and_two_more():
    done, sweep = succeed(*SEARCH, "hydra.sweeper.n_trials=6"), Path("sweep")
    found, told = list(jobs_now(sweep).values()), trials(sweep)
    assert [job["job"] for job in found] == [trial.number for trial in told] == list(range(6))
    assert {job["status"] for job in found} == {"finished"}
    assert len(re.findall(r"^search: [36] of 6 trials", done.err, re.M)) == 2
    for job, trial in zip(found, told, strict=True):
        record = result(sweep / job["dir"])
        assert record["config"]["loss"]["temperature"] == trial.params["loss.temperature"]
        assert record["config"]["optim"]["lr"] == trial.params["optim.lr"]
        assert trial.values == [record["metrics"]["validation"]["accuracy"]]
    best = OmegaConf.load(sweep / "optimization_results.yaml")
    assert best.best_value == max(trial.value for trial in told) and best.best_params == told[best.best_job].params
    assert f"job {best.best_job}: validation.accuracy" in done.out and "table: sweep/table.md" in done.out
    before = stamps(sweep)
    more = succeed(*SEARCH, "hydra.sweeper.n_trials=8")
    assert len(jobs_now(sweep)) == len(trials(sweep)) == 8 and before.items() < stamps(sweep).items()
    assert [trial.params for trial in trials(sweep)[:6]] == [trial.params for trial in told]
    assert "8 of 8 trials" in more.err and "6 of" not in more.err
    sole_error(call(*SEARCH, "student.dropout=interval(0,0.5)"), "another search .student.dropout was not searched", 2)


def test_accuracy_against_bytes_with_diverging_trials():
    space = ("loss=none", "optim=sgd", "optim.lr=choice(1e-1,1e30)", "student.widths=choice([4],[8],[16])")
    search = ("sampler=nsga2", "objectives=[validation.accuracy:max,size.bytes:min]", "n_trials=6", "batch=6")
    keys = (*(f"hydra.sweeper.{setting}" for setting in search), "hydra.sweep.dir=sweep")
    done = succeed("-m", "hydra/sweeper=optuna", *TINY, *space, *keys)
    sweep = Path("sweep")
    told, status = trials(sweep), {number: job["status"] for number, job in jobs_now(sweep).items()}
    for trial in told:
        diverged = trial.params["optim.lr"] == "1e+30"
        assert (trial.state.name, status[trial.number]) == (("FAIL", "diverged") if diverged else ("COMPLETE", "finished"))
    assert set(status.values()) == {"finished", "diverged"}
    solutions = OmegaConf.load(sweep / "optimization_results.yaml").solutions
    assert f"Pareto set of {len(solutions)}:" in done.out
    assert min(trial.values[1] for trial in told if trial.values) in [solution["values"][1] for solution in solutions]


@pytest.mark.slow
def test_asha_saves_the_time_of_hopeless_trials():
    pruning = ("hydra.sweeper.pruner=asha", "hydra.sweeper.n_trials=6", "optim.epochs=9")
    succeed(*SEARCH, *pruning)
    sweep = Path("sweep")
    told, found = trials(sweep), jobs_now(sweep)
    pruned = {trial.number for trial in told if trial.state.name == "PRUNED"}
    assert pruned and {trial.state.name for trial in told} == {"PRUNED", "COMPLETE"}
    assert {number for number, job in found.items() if job["status"] == "pruned"} == pruned
    for trial in told:
        epochs = [row["epoch"] for row in rows(sweep / found[trial.number]["dir"])]
        assert list(trial.intermediate_values) == epochs and (len(epochs) < 9) == (trial.number in pruned)
        if trial.number in pruned:
            assert re.match(rf"pruned at epoch {epochs[-1]}: validation accuracy", found[trial.number]["error"])


def test_mistakes_are_one_line_and_leave_nothing():
    for extra, message in [
        (("hydra.sweeper.objectives=[test.accuracy:max]",), "would choose by test data"),
        (("hydra.sweeper.sampler=tpee",), "did you mean 'tpe'"),
        (("hydra.sweeper.n_trial=6",), "n_trial.*did you mean 'n_trials'"),
        (("hydra.sweeper.n_trials=six",), "hydra.sweeper.n_trials must be an integer, got 'six'"),
        (("hydra.sweeper.pruner=median", "report=best_test"), "judges by a validation metric"),
        (("data.validation=0",), "needs validation data"),
    ]:
        sole_error(call(*SEARCH, *extra), message, 2)
    assert list(Path.cwd().iterdir()) == []


def test_the_plan_of_a_search_is_its_first_batch_and_writes_nothing():
    planned = succeed("plan", *SEARCH[1:], "hydra.sweeper.n_trials=6")
    assert "search: 6 trials in batches of 3 by tpe; the first batch:" in planned.out and "3 jobs" in planned.out
    assert list(Path.cwd().iterdir()) == []


@pytest.mark.slow
def test_a_zipped_sweep_combines_points_with_the_other_keys():
    points = "hydra.sweeper.zip=[{loss:none},{loss:kd,loss.temperature:4},{loss:dkd,loss.temperature:2}]"
    planned = succeed("plan", *TINY, points, "seed=0,1", "hydra.sweep.dir=sweep").out
    found = [re.search(r"seed=\d.*", line)[0].split() for line in planned.splitlines() if "seed=" in line]
    wanted = [["loss=none"], ["loss=kd", "loss.temperature=4"], ["loss=dkd", "loss.temperature=2"]]
    assert sorted(found) == sorted([f"seed={seed}", *point] for point in wanted for seed in (0, 1))
    sole_error(call("plan", *TINY, points, "loss=kd,dkd"), "'loss' is set both by hydra.sweeper.zip and by 'loss=kd'", 2)
    sole_error(call("plan", *TINY, "hydra.sweeper.zip=[loss]"), "each point of hydra.sweeper.zip must be keys with values", 2)


@pytest.mark.slow
def test_a_killed_search_goes_on_without_repeating_or_renumbering(tmp_path):
    longer = (*SEARCH[:-1], "optim.epochs=200", "hydra.sweeper.n_trials=6")
    succeed(*longer, "hydra.sweep.dir=whole")

    def second_batch_trains() -> bool:
        folder = tmp_path / "killed"
        return (folder / "jobs.jsonl").is_file() and any(
            number > 2 and (folder / job["dir"] / "metrics.jsonl").is_file() for number, job in jobs_now(folder).items()
        )

    process = start(*longer, "hydra.sweep.dir=killed", cwd=tmp_path)
    assert until(process, second_batch_trains)
    process.kill()
    assert finish(process).code == -signal.SIGKILL
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    before = stamps(killed)
    assert [trial.state.name for trial in trials(killed)] == ["COMPLETE"] * 3 + ["RUNNING"] * 3
    succeed(*longer, "hydra.sweep.dir=killed")
    assert before.items() < stamps(killed).items()
    assert [(trial.params, trial.values) for trial in trials(killed)] == [(t.params, t.values) for t in trials(whole)]
    assert [(job["job"], job["dir"], job["status"]) for job in jobs_now(killed).values()] == [
        (job["job"], job["dir"], "finished") for job in jobs_now(whole).values()
    ]
