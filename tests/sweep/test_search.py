"""The search against a launcher that computes known functions: samplers, failures, pruning, kills, resuming."""

import concurrent.futures
import math
import multiprocessing
import pickle
import statistics
from pathlib import Path
from types import SimpleNamespace

import pytest
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import OmegaConf

from hydra_plugins.jdistill_plugins.search import OptunaConf
from jdistill.errors import RunError, UsageError
from jdistill.standing import Diverged, Interrupted, Pruned
from jdistill.sweep.launch import SweepFailed
from jdistill.sweep.search import contiguous, search
from jdistill.sweep.studies import OptunaJudge, Store

optuna = pytest.importorskip("optuna")
from optuna.trial import TrialState  # noqa: E402

from tests.marks import slow_but  # noqa: E402

SPACE = ("loss.temperature=interval(1,10)", "optim.lr=tag(log,interval(1e-4,1))")
EPOCHS = 9
FEW = {"n_trials": 16, "startup_trials": 5}


@pytest.fixture(autouse=True)
def no_table(monkeypatch):
    """Fake jobs leave no runs to tabulate."""
    monkeypatch.setattr("jdistill.commands.write_report", lambda folder: f"table of {folder}")


def smooth(params: dict[str, float]) -> dict[str, float]:
    """Best, 1, at temperature 4 and rate 0.01."""
    distance = (params["loss.temperature"] - 4) ** 2 / 9 + (math.log10(params["optim.lr"]) + 2) ** 2
    return {"accuracy": 1 - distance, "bytes": 1000.0}


class FakeLauncher:
    """Carries jobs out as `function(params) -> {"accuracy", "bytes"}`; with a judge, epoch by epoch as a population."""

    def __init__(self, function=smooth, kill=None, curve=lambda value, epoch: value - (EPOCHS - epoch), fail_fast=False):
        self.function, self.kill, self.curve = function, kill, curve
        self.fail_fast = fail_fast
        self.judge, self.launched, self.results = None, {}, {}
        self.batches, self.curves, self.reasons = [], {}, {}

    def launch(self, job_overrides, initial_job_idx):
        numbers = range(initial_job_idx, initial_job_idx + len(job_overrides))
        self.batches.append(list(numbers))
        outcomes = {}
        for number, overrides in zip(numbers, job_overrides, strict=True):
            self.launched[number] = list(overrides)
            if number == self.kill:
                raise KeyboardInterrupt
            try:
                outcomes[number] = self.function({k: as_number(v) for k, _, v in (o.partition("=") for o in overrides)})
            except RunError as error:
                outcomes[number] = error
                if self.fail_fast:
                    break
        if self.judge is not None:
            self._train(outcomes)
        for number, found in outcomes.items():
            self.results[number] = None
            if isinstance(found, dict):
                metrics = {"validation": {"accuracy": found["accuracy"]}, "test": {"accuracy": 0.0}}
                self.results[number] = {"metrics": metrics, "size": {"bytes": found["bytes"]}}
        return [returned(outcome) for _, outcome in sorted(outcomes.items())]

    def _train(self, outcomes):
        for epoch in range(1, EPOCHS + 1):
            for number, found in outcomes.items():
                if isinstance(found, dict):
                    value = self.curve(found["accuracy"], epoch)
                    self.curves.setdefault(number, []).append(value)
                    if reason := self.judge(number, epoch, {"accuracy": value}):
                        outcomes[number] = Pruned(reason)
                        self.reasons[number] = reason


def as_number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def returned(outcome) -> JobReturn:
    failed = isinstance(outcome, Exception)
    value = outcome if failed else outcome["accuracy"]
    return JobReturn(status=JobStatus.FAILED if failed else JobStatus.COMPLETED, _return_value=value)


def run(folder: Path, launcher: FakeLauncher, *arguments: str, **settings) -> "optuna.Study":
    """The search in `folder`; its study."""
    conf = OmegaConf.structured(OptunaConf(**{"n_trials": 24, **settings}))
    values = {key: conf[key] for key in conf if key != "_target_"}
    config = {
        "hydra": {"sweep": {"dir": str(folder)}, "launcher": {"plan": False}},
        "data": {"validation": 0.1}, "evaluate": {"latency": False}, "report": "last", "fail_fast": False,
    }  # fmt: skip
    context = SimpleNamespace(config_loader=None)
    sweeper = SimpleNamespace(settings=values, launcher=launcher, config=OmegaConf.create(config), hydra_context=context)
    search(sweeper, list(arguments or SPACE))
    return study_of(folder)


def study_of(folder: Path) -> "optuna.Study":
    return optuna.load_study(study_name="search", storage=f"sqlite:///{folder / 'study.db'}")


def parameters(study: "optuna.Study") -> list[dict[str, float]]:
    return [trial.params for trial in study.trials]


def states(study: "optuna.Study") -> list[str]:
    return [trial.state.name for trial in study.trials]


@pytest.mark.slow
def test_tpe_comes_closer_to_the_optimum_than_chance(tmp_path):
    found = {}
    for sampler in ("tpe", "random"):
        study = run(tmp_path / sampler, FakeLauncher(), n_trials=40, sampler=sampler)
        found[sampler] = [trial.value for trial in study.trials]
        assert len(found[sampler]) == 40 and len({str(params) for params in parameters(study)}) == 40
    late, start = statistics.mean(found["tpe"][-8:]), statistics.mean(found["tpe"][:8])
    assert late > start + 0.5 and late > statistics.mean(found["random"][-8:]) + 0.5
    assert max(found["tpe"]) > 0.95
    best = OmegaConf.load(tmp_path / "tpe" / "optimization_results.yaml")
    assert best.best_value == max(found["tpe"]) and best.best_job == found["tpe"].index(best.best_value)
    assert smooth(best.best_params)["accuracy"] == best.best_value


def test_values_reach_the_jobs_without_loss_and_fixed_overrides_with_them(tmp_path):
    launcher = FakeLauncher(lambda params: {"accuracy": 0.0, "bytes": 1})
    spaces = ("student.widths=choice([16],[32])", "w=range(8,1,-3)", "d=tag(int,log,interval(1,64))", "f=range(0.1,0.5,0.2)")
    study = run(tmp_path, launcher, "seed=3", *spaces, *SPACE, n_trials=20, sampler="random")
    seen = [dict(override.split("=", 1) for override in launcher.launched[n]) for n in range(20)]
    for trial, job in zip(study.trials, seen, strict=True):
        assert job.pop("seed") == "3" and job.pop("student.widths") == trial.params["student.widths"]
        assert all(float(text) == trial.params[key] for key, text in job.items())
    assert {job["student.widths"] for job in map(dict, (t.params.items() for t in study.trials))} == {"[16]", "[32]"}
    assert {job["w"] for job in seen} == {"2", "5", "8"} and {float(job["f"]) for job in seen} == {0.1, 0.3}
    assert {int(job["d"]) for job in seen} <= set(range(1, 65)) and min(int(job["d"]) for job in seen) < 8


def test_nsga2_finds_a_pareto_set(tmp_path):
    def conflict(params):  # accuracy costs bytes; y only harms
        return {"accuracy": params["x"] - params["y"] ** 2, "bytes": 100 * params["x"] + 100 * params["y"]}

    space = ("x=interval(0,1)", "y=interval(0,1)")
    both = ["validation.accuracy:max", "size.bytes:min"]
    study = run(tmp_path, FakeLauncher(conflict), *space, n_trials=48, batch=8, sampler="nsga2", objectives=both)
    points = [tuple(trial.values) for trial in study.trials]
    front = {
        n for n, (a, b) in enumerate(points) if not any(c >= a and d <= b and (c, d) != (a, b) for c, d in points)
    }  # fmt: skip
    solutions = OmegaConf.load(tmp_path / "optimization_results.yaml").solutions
    assert {solution.job for solution in solutions} == front and len(front) > 3
    for solution in solutions:
        assert tuple(solution["values"]) == points[solution.job] and solution.params == study.trials[solution.job].params
    harm = [params["y"] for params in parameters(study)]
    assert statistics.mean(harm[number] for number in front) < statistics.mean(harm[:8]) / 3


def test_what_fails_is_told_as_failed_and_the_search_goes_on(tmp_path, capsys):
    def fragile(params):
        if params["optim.lr"] > 0.1:
            raise Diverged("diverged: the training loss is nan in epoch 1")
        return smooth(params) | ({"accuracy": math.nan} if params["loss.temperature"] > 8 else {})

    study = run(tmp_path, FakeLauncher(fragile), sampler="random")
    for trial in study.trials:
        diverged, nan = trial.params["optim.lr"] > 0.1, trial.params["loss.temperature"] > 8
        assert trial.state == (TrialState.FAIL if diverged or nan else TrialState.COMPLETE)
        assert ("diverged" in trial.user_attrs.get("error", "")) == diverged
    assert {"FAIL", "COMPLETE"} == set(states(study)) and len(study.trials) == 24
    assert "best trial:" in capsys.readouterr().out


def test_a_failed_job_fails_the_search_at_its_end(tmp_path):
    def broken(params):
        if params["loss.temperature"] > 5:
            raise RunError("disk full")
        return smooth(params)

    with pytest.raises(SweepFailed, match=r"\d+ of 16 trials failed"):
        run(tmp_path, FakeLauncher(broken), n_trials=16)
    assert len(study_of(tmp_path).trials) == 16 and (tmp_path / "optimization_results.yaml").is_file()


def test_fail_fast_stops_at_the_first_failure(tmp_path):
    def broken(params):
        if params["loss.temperature"] > 5:
            raise RunError("disk full")
        return smooth(params)

    with pytest.raises(SweepFailed, match=r"fail_fast=true: the search stopped at job \d: disk full"):
        run(tmp_path, FakeLauncher(broken, fail_fast=True), n_trials=16)
    found = states(study_of(tmp_path))
    assert found[found.index("FAIL") :] == ["FAIL"] + ["RUNNING"] * (7 - found.index("FAIL")) and len(found) == 8


def test_a_search_without_any_finished_trial_says_so(tmp_path):
    def hopeless(params):
        raise Diverged("diverged")

    with pytest.raises(RunError, match=r"no trial finished \(8 diverged\)") as caught:
        run(tmp_path, FakeLauncher(hopeless), n_trials=8)
    assert not isinstance(caught.value, SweepFailed)


@pytest.mark.parametrize("sampler", slow_but(["tpe"], ("tpe", "nsga2", "random")))
def test_killed_in_a_batch_it_goes_on_as_if_nothing_had_happened(tmp_path, sampler):
    whole = run(tmp_path / "whole", FakeLauncher(), sampler=sampler, **FEW)
    killed = tmp_path / "killed"
    with pytest.raises(KeyboardInterrupt):
        run(killed, FakeLauncher(kill=12), sampler=sampler, **FEW)
    assert states(study_of(killed)) == ["COMPLETE"] * 8 + ["RUNNING"] * 8
    again = FakeLauncher()
    study = run(killed, again, sampler=sampler, **FEW)
    assert again.batches == [list(range(8, 16))]
    assert parameters(study) == parameters(whole) and states(study) == ["COMPLETE"] * 16
    assert [trial.value for trial in study.trials] == [trial.value for trial in whole.trials]


def test_killed_while_asking_a_trial_gets_the_parameters_it_would_have_had(tmp_path):
    whole, part = run(tmp_path / "whole", FakeLauncher(), **FEW), run(tmp_path / "part", FakeLauncher(), n_trials=8)
    part._storage.create_new_trial(part._study_id)  # begun, without any parameter
    again = FakeLauncher()
    study = run(tmp_path / "part", again, **FEW)
    assert again.batches == [list(range(8, 16))] and parameters(study) == parameters(whole)


def test_killed_while_telling_nothing_told_is_launched_again(tmp_path):
    class Torn(dict):
        def __getitem__(self, number):
            if number == 11:
                raise KeyboardInterrupt
            return super().__getitem__(number)

    launcher = FakeLauncher()
    launcher.results = Torn()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, launcher, **FEW)
    again = FakeLauncher()
    study = run(tmp_path, again, **FEW)
    assert sorted(again.launched) == list(range(11, 16)) and states(study) == ["COMPLETE"] * 16
    assert all(again.launched[n] == launcher.launched[n] for n in range(11, 16))


def test_a_stopped_sweep_leaves_its_trials_unfinished(tmp_path):
    def stopping(params):
        raise Interrupted("interrupted: a checkpoint was written")

    with pytest.raises(Interrupted):
        run(tmp_path, FakeLauncher(stopping), n_trials=8)
    assert states(study_of(tmp_path)) == ["RUNNING"] * 8
    run(tmp_path, again := FakeLauncher(), n_trials=8)
    assert again.batches == [list(range(8))]


def test_more_trials_continue_the_study(tmp_path):
    run(tmp_path, FakeLauncher(), n_trials=8)
    more = FakeLauncher()
    study = run(tmp_path, more, n_trials=20)
    assert more.batches == [list(range(8, 16)), list(range(16, 20))] and len(study.trials) == 20
    run(tmp_path, nothing := FakeLauncher(), n_trials=20)
    assert nothing.batches == []


def test_another_search_in_the_same_folder_is_refused(tmp_path):
    run(tmp_path, FakeLauncher(), n_trials=8)
    for arguments, settings, message in [
        (("loss.temperature=interval(1,20)", SPACE[1]), {}, r"loss.temperature was float \[1.0, 10.0\], now float \[1.0, 20.0"),
        ((*SPACE, "w=choice(a,b)"), {}, r"w was not searched, now choice\(a,b\)"),
        ((*SPACE, "seed=1"), {}, "the fixed overrides were none, now seed=1"),
        (SPACE, {"objectives": ["size.bytes:min"]}, "the objectives were validation.accuracy:max, now size.bytes:min"),
    ]:
        with pytest.raises(UsageError, match=message):
            run(tmp_path, FakeLauncher(), *arguments, n_trials=8, **settings)
    run(tmp_path, FakeLauncher(), *SPACE, "force=true", n_trials=8)
    assert len(study_of(tmp_path).trials) == 8


def test_a_search_of_which_nothing_ended_can_be_corrected(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, FakeLauncher(kill=0), n_trials=8)
    study = run(tmp_path, FakeLauncher(), "loss.temperature=interval(2,3)", SPACE[1], n_trials=8)
    assert len(study.trials) == 8 and all(2 <= params["loss.temperature"] <= 3 for params in parameters(study))


def test_median_pruning_stops_the_hopeless_and_only_them(tmp_path):
    launcher = FakeLauncher()
    study = run(tmp_path, launcher, n_trials=32, sampler="random", pruner="median", min_epochs=3, min_trials=5)
    epochs = sum(map(len, launcher.curves.values()))
    assert set(states(study)) == {"COMPLETE", "PRUNED"} and epochs < 32 * EPOCHS * 0.8
    finished = {trial.number for trial in study.trials if trial.state == TrialState.COMPLETE}
    for trial in study.trials:
        curve, first = launcher.curves[trial.number], trial.number // 8 * 8
        others = [launcher.curves[n] for n in finished if n < first]  # a batch is told when it has ended
        wanted = next(
            (
                epoch for epoch in range(3, EPOCHS + 1)
                if len(others) >= 5 and max(curve[:epoch]) < statistics.median(other[epoch - 1] for other in others)
            ),
            None,
        )  # fmt: skip
        assert len(curve) == (wanted or EPOCHS) and (trial.state == TrialState.PRUNED) == (wanted is not None)
        assert trial.intermediate_values == {epoch + 1: value for epoch, value in enumerate(curve)}
        if wanted:
            start = f"pruned at epoch {wanted}: validation accuracy {max(curve):.4g} at best is below the median"
            assert launcher.reasons[trial.number].startswith(start)
    assert max(smooth(params)["accuracy"] for params in parameters(study)) == study.best_value


def test_asha_keeps_a_third_at_each_rung(tmp_path):
    launcher = FakeLauncher()
    study = run(tmp_path, launcher, n_trials=24, batch=24, sampler="random", pruner="asha", min_epochs=1, reduction_factor=3)
    rungs: dict[int, list[float]] = {}
    running = dict.fromkeys(range(24), 0)
    for epoch in (1, 3, 9):  # members of a population are judged in their order
        for number in list(running):
            value = smooth(study.trials[number].params)["accuracy"]
            reached = rungs.setdefault(epoch, [])
            reached.append(value)
            if value < sorted(reached, reverse=True)[max(1, len(reached) // 3) - 1]:
                del running[number]
                assert len(launcher.curves[number]) == epoch and "best 1/3" in launcher.reasons[number]
    assert {number for number in range(24) if states(study)[number] == "COMPLETE"} == set(running) != set()
    assert sum(map(len, launcher.curves.values())) < 24 * EPOCHS / 2
    assert study.best_value == max(smooth(params)["accuracy"] for params in parameters(study))


def test_a_minimised_objective_prunes_from_above(tmp_path):
    falling = {"curve": lambda value, epoch: value + EPOCHS - epoch}
    launcher = FakeLauncher(lambda params: {**smooth(params), "accuracy": 5 - smooth(params)["accuracy"]}, **falling)
    study = run(tmp_path, launcher, sampler="random", pruner="median", objectives=["validation.accuracy:min"], n_trials=16)
    pruned = [trial for trial in study.trials if trial.state == TrialState.PRUNED]
    assert pruned and study.best_value == min(5 - smooth(params)["accuracy"] for params in parameters(study))
    assert "is above the median" in launcher.reasons[pruned[0].number]


def judged_elsewhere(pickled: bytes) -> list[str | None]:
    judge = pickle.loads(pickled)
    return [judge(8, epoch, {"accuracy": -100.0}) for epoch in (1, 2)]


def test_the_judge_works_in_other_processes_and_threads_and_repeats_itself(tmp_path):
    study = run(tmp_path, FakeLauncher(), n_trials=8, pruner="median", min_epochs=2)
    study.ask()
    settings = {"pruner": "median", "min_epochs": 2, "min_trials": 5, "reduction_factor": 3}
    judge = OptunaJudge(Store.of({"storage": None, "study_name": None}, tmp_path), "accuracy", "maximize", settings)
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
        first = pool.submit(judged_elsewhere, pickle.dumps(judge)).result()
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        again = list(pool.map(lambda epoch: judge(8, epoch, {"accuracy": 100.0}), (1, 2, 3, 2)))
    assert first[0] is None and first[1].startswith("pruned at epoch 2: validation accuracy -100 at best is below the median")
    assert again == [None, first[1], first[1], first[1]]
    assert study_of(tmp_path).trials[8].intermediate_values == {1: -100.0, 2: -100.0}
    with pytest.raises(UsageError, match="judges by 'acuracy'; evaluations have accuracy"):
        OptunaJudge(judge.store, "acuracy", "maximize", settings)(8, 1, {"accuracy": 0.0})


def test_two_searches_do_not_share_a_folder(tmp_path):
    def second(params):
        with pytest.raises(RunError, match="another search is running there"):
            run(tmp_path, FakeLauncher(), n_trials=8)
        return smooth(params)

    run(tmp_path, FakeLauncher(second), n_trials=2, batch=2)


@pytest.mark.parametrize(
    ("arguments", "settings", "message"),
    [
        (("seed=0",), {}, "nothing to search"),
        (("x=interval(3,3)",), {}, r"x=interval\(3,3\): the interval from 3.0 to 3.0 is empty"),
        (("x=tag(log,interval(0,1))",), {}, r"x=tag\(log,interval\(0,1\)\): "),
        (("x=tag(lgo,interval(1,2))",), {}, "unknown tag 'lgo'"),
        (("x=a,a",), {}, "must be different"),
        ((), {"sampler": "tpee"}, "must be one of tpe, nsga2, random, got 'tpee'; did you mean 'tpe'"),
        ((), {"pruner": "asha2"}, "did you mean 'asha'"),
        ((), {"n_trials": 0}, "n_trials must be at least 1, got 0"),
        ((), {"sampler": "nsga2", "batch": 1}, "batch of at least 2"),
        ((), {"objectives": ["validation.accuracy"]}, "'validation.accuracy' must be PATH:max or PATH:min"),
        ((), {"objectives": ["valdation.accuracy:max"]}, "did you mean 'validation'"),
        ((), {"objectives": ["test.accuracy:max"]}, "would choose by test data.*validation.accuracy.*allow_test=true"),
        ((), {"objectives": ["size.bytes:min", "size.bytes:min"]}, "different objectives"),
        ((), {"objectives": ["latency_ms.1.p50:min"]}, "needs evaluate.latency=true"),
        ((), {"objectives": ["validation.acuracy:max"]}, "no 'validation.acuracy'; did you mean 'accuracy'"),
        ((), {"objectives": ["size:min"]}, "'size:min' must be"),
        ((), {"objectives": ["validation.accuracy:max", "size.bytes:min"], "pruner": "asha"}, "several .* cannot prune"),
        ((), {"objectives": ["size.bytes:min"], "pruner": "asha"}, "judges by a validation metric"),
        (("data.validation=0", *SPACE), {"storage": "study.db"}, "must be a URL such as sqlite:///study.db"),
        ((), {"storage": "sqlite:///x.db"}, "needs hydra.sweeper.study_name"),
    ],
)
def test_mistakes_are_named_before_anything_is_run(tmp_path, arguments, settings, message):
    launcher = FakeLauncher()
    with pytest.raises(UsageError, match=message):
        run(tmp_path, launcher, *arguments, **{"n_trials": 2, **settings})
    assert len(launcher.batches) == ("no 'validation.acuracy'" in message)


def test_test_data_on_request(tmp_path):
    study = run(tmp_path, FakeLauncher(), n_trials=2, objectives=["test.accuracy:max"], allow_test=True)
    assert [trial.value for trial in study.trials] == [0.0, 0.0]


def test_a_damaged_study_is_one_line(tmp_path):
    (tmp_path / "study.db").write_text("this is no database, whatever its name says" * 100)
    with pytest.raises(RunError, match=r"not a database of Optuna: file is not a database; delete it and jobs.jsonl"):
        run(tmp_path, FakeLauncher())


def test_without_optuna_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "optuna", None)
    with pytest.raises(UsageError, match=r"pip install 'jdistill\[optuna\]'"):
        run(tmp_path, FakeLauncher())


def test_stretches_of_numbers():
    trials = [SimpleNamespace(number=n) for n in (3, 4, 7, 9, 10, 11)]
    assert [[trial.number for trial in stretch] for stretch in contiguous(trials)] == [[3, 4], [7], [9, 10, 11]]
