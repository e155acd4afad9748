"""`hydra/sweeper=optuna`: a search by Optuna's ask and tell, in which whole batches of trials are launched at once.

A trial's number is its job's number, and its parameters are in the study's storage before it starts, so that a killed
search goes on where it was. Source: Akiba et al. 2019, "Optuna" (arXiv:1907.10902).
"""

import contextlib
import dataclasses
import itertools
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jdistill import budget
from jdistill.checkpoint import first_line, write_atomically
from jdistill.errors import RunError, UsageError, did_you_mean
from jdistill.sweep.space import Objective, describe, override, read_objectives, read_space, suggest
from jdistill.sweep.studies import OptunaJudge, Store, begin_or_resume, in_memory, require_optuna

SAMPLERS = ("tpe", "nsga2", "random")
PRUNERS = ("none", "median", "asha")


@dataclasses.dataclass(frozen=True)
class Search:
    """What is searched and how.

    Attributes:
      space: key of an override -> Optuna's distribution of its values.
      fixed: the overrides that are the same for all trials.
      objectives: what is maximised or minimised.
      settings: the keys of `hydra/sweeper=optuna`, checked.
      limits: what a trial may cost at most; see `jdistill.budget`.
    """

    space: dict[str, Any]
    fixed: tuple[str, ...]
    objectives: tuple[Objective, ...]
    settings: dict[str, Any]
    limits: budget.Budget = dataclasses.field(default_factory=dict)

    def identity(self) -> dict[str, Any]:
        """What makes two searches the same study: the space, the fixed overrides, the objectives, the budget."""
        passing = ("force", "cache", "fail_fast")
        fixed = sorted(text for text in self.fixed if text.partition("=")[0].lstrip("+") not in passing)
        return {
            "space": {key: describe(distribution) for key, distribution in self.space.items()},
            "fixed": fixed,
            "objectives": [str(objective) for objective in self.objectives],
            **({"budget": [f"{key}={limit:g}" for key, limit in self.limits.items()]} if self.limits else {}),
        }

    def overrides(self, trial: Any) -> list[str]:
        """The overrides of a trial's job."""
        return [*self.fixed, *(override(key, trial.params[key]) for key in self.space)]

    def sampler(self, number: int) -> Any:
        """The sampler that proposes trial `number`.

        It is made anew for each trial, from the seed and the number: a resumed search draws what it would have drawn.
        """
        import numpy as np
        from optuna import samplers

        own = int(np.random.SeedSequence([self.settings["seed"], number]).generate_state(1)[0])
        if self.settings["sampler"] == "random":
            return samplers.RandomSampler(seed=own)
        if self.settings["sampler"] == "nsga2":
            return samplers.NSGAIISampler(population_size=self.settings["batch"], seed=own)
        # constant_liar: the trials of a batch see each other, so that they differ
        return samplers.TPESampler(n_startup_trials=self.settings["startup_trials"], seed=own, constant_liar=True)


def search(sweeper: Any, arguments: list[str]) -> list[Any]:
    """Runs batches of trials up to `n_trials`, prints the best and the table; returns the `JobReturn`s of each batch.

    Raises:
      UsageError: a key is wrong, or the sweep folder holds another search.
      SweepFailed: a job failed (a diverged or pruned trial is a result of the search, not a failure).
      RunError: no trial finished.
    """
    from omegaconf import OmegaConf

    require_optuna()
    wanted = read(sweeper, arguments)
    folder = Path(sweeper.config.hydra.sweep.dir)
    if sweeper.config.hydra.launcher.get("plan", False):
        return _plan(sweeper.launcher, wanted)
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        store = Store.of(wanted.settings, folder)
        study = begin_or_resume(store, wanted.identity(), [objective.direction for objective in wanted.objectives])
        if wanted.settings["pruner"] != "none":
            metric = wanted.objectives[0]
            sweeper.launcher.judge = OptunaJudge(store, metric.path[-1], metric.direction, _pruning(wanted.settings))
        OmegaConf.save(sweeper.config, folder / "multirun.yaml")
        returns = []
        while trials := ask(study, wanted):
            for batch in contiguous(trials):
                overrides = [wanted.overrides(trial) for trial in batch]
                returns.append(sweeper.launcher.launch(overrides, initial_job_idx=batch[0].number))
                tell(study, wanted, sweeper.launcher, batch, returns[-1])
            print(_progress(study, wanted), file=sys.stderr)
        conclude(study, wanted, folder)
    return returns


def read(sweeper: Any, arguments: list[str]) -> Search:
    """The search that the sweeper's keys and the command line ask for.

    Raises:
      UsageError: a key is wrong.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from omegaconf import OmegaConf

    settings = {key: _plain(value) for key, value in sweeper.settings.items()}
    params = settings.pop("params") or {}
    parser = OverridesParser.create(config_loader=sweeper.hydra_context.config_loader)
    parsed = parser.parse_overrides([*(f"{key}={value}" for key, value in params.items()), *arguments])
    latest: dict[str, Any] = {}
    for item in parsed:  # the command line comes last and wins
        latest.pop(item.get_key_element(), None)
        latest[item.get_key_element()] = item
    space = read_space([item for item in latest.values() if item.is_sweep_override()])
    fixed = tuple(str(item.input_line) for item in latest.values() if not item.is_sweep_override())
    objectives = read_objectives(settings["objectives"], settings["allow_test"])
    limits = budget.read(settings.pop("budget"), "hydra.sweeper.budget")
    wanted = Search(space, fixed, objectives, settings, limits)

    def value(key: str) -> Any:  # of the run config, where all jobs have the same
        return None if key in space else OmegaConf.select(sweeper.config, key, default=None)

    _check(wanted, value)
    return wanted


def _check(wanted: Search, value: Any) -> None:
    settings, objectives = wanted.settings, wanted.objectives
    for key, known in (("sampler", SAMPLERS), ("pruner", PRUNERS)):
        if settings[key] not in known:
            hint = did_you_mean(settings[key], known)
            raise UsageError(f"hydra.sweeper.{key} must be one of {', '.join(known)}, got '{settings[key]}'{hint}")
    lowest = {
        "n_trials": 1,
        "batch": 1,
        "seed": 0,
        "startup_trials": 0,
        "min_epochs": 1,
        "min_trials": 1,
        "reduction_factor": 2,
    }
    for key, low in lowest.items():
        if settings[key] < low:
            raise UsageError(f"hydra.sweeper.{key} must be at least {low}, got {settings[key]}")
    if settings["sampler"] == "nsga2" and settings["batch"] < 2:
        raise UsageError("hydra.sweeper.sampler=nsga2 needs hydra.sweeper.batch of at least 2: a batch is a generation")
    sections = {objective.section for objective in objectives}
    if "validation" in sections and value("data.validation") == 0:
        raise UsageError("a search by validation metrics needs validation data, got data.validation=0; set data.validation=0.1")
    if "latency_ms" in {*sections, *wanted.limits} and value("evaluate.latency") is False:
        raise UsageError("a search by latency_ms needs evaluate.latency=true")
    if settings["pruner"] == "none":
        return
    if wanted.limits:
        raise UsageError(
            "a search with a budget cannot prune: trials beyond it would set the bar for those within; set"
            " hydra.sweeper.pruner=none"
        )
    if len(objectives) > 1:
        raise UsageError("a search with several objectives cannot prune; set hydra.sweeper.pruner=none, or one objective")
    if objectives[0].section != "validation" or value("report") == "best_test":
        raise UsageError(
            f"hydra.sweeper.pruner={settings['pruner']} judges by a validation metric while training; the objective must be"
            f" one, got {objectives[0]} with report={value('report')}"
        )


def ask(study: Any, wanted: Search) -> list[Any]:
    """The next batch of trials, by number; empty at the end. Trials that a kill left unfinished come first."""
    import optuna

    trials = study.get_trials(deepcopy=False)
    unfinished = [trial for trial in trials if not trial.state.is_finished()]
    batch = []
    for trial in unfinished:
        study.sampler = wanted.sampler(trial.number)
        batch.append(optuna.Trial(study, trial._trial_id))
        for key, distribution in wanted.space.items():  # a kill may have come between two parameters
            suggest(batch[-1], key, distribution)
    settings = wanted.settings
    for _ in range(min(settings["batch"] - len(unfinished), settings["n_trials"] - len(trials))):
        study.sampler = wanted.sampler(len(trials) + len(batch) - len(unfinished))
        batch.append(study.ask(wanted.space))
    return sorted(batch, key=lambda trial: trial.number)


def contiguous(trials: Sequence[Any]) -> list[list[Any]]:
    """Trials in stretches of consecutive numbers: a launcher counts jobs upwards from the first."""
    stretches = itertools.groupby(enumerate(trials), key=lambda pair: pair[1].number - pair[0])
    return [[trial for _, trial in stretch] for _, stretch in stretches]


def tell(study: Any, wanted: Search, launcher: Any, trials: Sequence[Any], returns: Sequence[Any]) -> None:
    """Tells Optuna what became of a batch: values, pruned, or failed (never NaN). What did not run stays unfinished.

    Raises:
      Interrupted: the sweep was stopped.
      SweepFailed: `fail_fast` stopped it.
    """
    from hydra.core.utils import JobStatus
    from optuna.trial import TrialState

    from jdistill.standing import Diverged, Interrupted, Pruned
    from jdistill.sweep.launch import SweepFailed

    failure: str | None = None
    ran = [trial for trial in trials if trial.number in launcher.results]  # not all, where fail_fast stopped the batch
    stopped: Exception | None = Interrupted("the sweep was stopped") if len(ran) < len(trials) else None
    for trial, returned in zip(ran, returns, strict=True):
        error = None if returned.status == JobStatus.COMPLETED else returned._return_value
        if isinstance(error, Interrupted):
            stopped = error
        elif isinstance(error, Pruned):
            study.tell(trial.number, state=TrialState.PRUNED)
        elif error is not None:
            trial.set_user_attr("status", "diverged" if isinstance(error, Diverged) else "failed")
            trial.set_user_attr("error", first_line(error))
            study.tell(trial.number, state=TrialState.FAIL)
            failure = failure or f"job {trial.number}: {first_line(error)}"
        else:
            result = launcher.results[trial.number]
            values = [objective.value(result) for objective in wanted.objectives]
            if all(map(math.isfinite, values)):
                _constrain(trial, wanted.limits, result)
                study.tell(trial.number, values)
            else:
                trial.set_user_attr("error", f"the objectives are {values}")
                study.tell(trial.number, state=TrialState.FAIL)
    if stopped is not None:
        raise SweepFailed(f"fail_fast=true: the search stopped at {failure}") if failure else stopped


def _constrain(trial: Any, limits: budget.Budget, result: dict[str, Any]) -> None:
    """Notes what a trial costs, and tells Optuna by which part of each limit it is beyond it.

    Raises:
      UsageError: the result does not say what it costs.
    """
    found: dict[str, Any] = {}
    for key in limits:
        value: Any = result
        for part in budget.COSTS[key]:
            value = value.get(part) if isinstance(value, dict) else None
        if not isinstance(value, int | float):
            name = ".".join(budget.COSTS[key])
            raise UsageError(f"hydra.sweeper.budget: the result of job {trial.number} has no number {name}; limit another cost")
        found[key] = value
    if found and "costs" not in trial.user_attrs:  # a kill may have come before the trial was told
        trial.set_user_attr("costs", found)
    for key in set(limits) - set(trial.constraints):
        trial.set_constraint(key, found[key] / limits[key] - 1)


def conclude(study: Any, wanted: Search, folder: Path) -> None:
    """Writes `optimization_results.yaml`, prints the table and the best trials.

    Raises:
      SweepFailed: a job failed.
      RunError: no trial finished, or none within the budget.
    """
    from omegaconf import OmegaConf
    from optuna.trial import TrialState

    from jdistill.commands import write_report
    from jdistill.sweep.launch import SweepFailed

    print(write_report(folder, **({"budget": wanted.limits} if wanted.limits else {})))
    trials = study.get_trials(deepcopy=False)
    best = _best(study)
    if best:
        path = folder / "optimization_results.yaml"
        text = OmegaConf.to_yaml(OmegaConf.create(_results(wanted, best)))
        write_atomically(path, lambda temporary: temporary.write_text(text))
        within = f" within {budget.show(wanted.limits)}" if wanted.limits else ""
        print(f"best trial{within}:" if len(wanted.objectives) == 1 else f"Pareto set of {len(best)}{within}:")
        for trial in best:
            print(f"  {_line(wanted, trial)}")
        print(f"search: {path}")
    failed = [trial for trial in trials if trial.user_attrs.get("status") == "failed"]
    if failed:
        raise SweepFailed(f"{len(failed)} of {len(trials)} trials failed; `jdistill status {folder}` shows why")
    if not best and (smallest := _smallest(study)) is not None:
        raise RunError(
            f"none of {len(trials)} trials is within {budget.show(wanted.limits)}; the smallest is {_line(wanted, smallest)}"
        )
    if not best:
        names = {TrialState.FAIL: "diverged", TrialState.PRUNED: "pruned"}
        counts = [(sum(trial.state == state for trial in trials), name) for state, name in names.items()]
        ended = ", ".join(f"{count} {name}" for count, name in counts if count)
        raise RunError(f"no trial finished ({ended}); `jdistill status {folder}` shows why")


def _best(study: Any) -> list[Any]:
    """The best trial, or the Pareto set by number, of those within the budget; empty where none finished within it."""
    if not any(_beyond(trial) <= 0 for trial in _complete(study)):
        return []
    return [study.best_trial] if len(study.directions) == 1 else sorted(study.best_trials, key=lambda trial: trial.number)


def _complete(study: Any) -> list[Any]:
    from optuna.trial import TrialState

    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))


def _beyond(trial: Any) -> float:
    """By how much a trial is beyond its budget, in parts of the limits; 0 or less within it."""
    return max(trial.constraints.values(), default=0.0)


def _smallest(study: Any) -> Any:
    """The finished trial that is the least beyond its budget; None where none finished."""
    return min(_complete(study), key=_beyond, default=None)


def _results(wanted: Search, best: list[Any]) -> dict[str, Any]:
    names = [str(objective) for objective in wanted.objectives]
    if len(names) == 1:
        own = {"budget": wanted.limits, "best_costs": best[0].user_attrs["costs"]} if wanted.limits else {}
        return {
            "name": "optuna", "objective": names[0], "best_job": best[0].number, "best_value": best[0].value,
            "best_params": best[0].params, **own,
        }  # fmt: skip
    solutions = [{"job": trial.number, "values": list(trial.values), "params": trial.params} for trial in best]
    return {
        "name": "optuna", "objectives": names, "solutions": solutions, **({"budget": wanted.limits} if wanted.limits else {})
    }  # fmt: skip


def _line(wanted: Search, trial: Any) -> str:
    found = [f"{'.'.join(o.path)} {value:.6g}" for o, value in zip(wanted.objectives, trial.values, strict=True)]
    found += [f"{key} {budget.number(cost)}" for key, cost in trial.user_attrs.get("costs", {}).items()]
    return f"job {trial.number}: {', '.join(found)}: {' '.join(override(key, value) for key, value in trial.params.items())}"


def _progress(study: Any, wanted: Search) -> str:
    ended = sum(trial.state.is_finished() for trial in study.get_trials(deepcopy=False))
    best = _best(study)
    shown = (
        f"best {_line(wanted, best[0])}" if len(best) == 1
        else f"{len(best)} in the Pareto set" if best
        else "none within the budget" if _complete(study) else "none finished"
    )  # fmt: skip
    return f"search: {ended} of {max(ended, wanted.settings['n_trials'])} trials, {shown}"


def _plan(launcher: Any, wanted: Search) -> list[Any]:
    """Shows the first batch; nothing is written."""
    trials = ask(in_memory([objective.direction for objective in wanted.objectives]), wanted)
    settings = wanted.settings
    print(f"search: {settings['n_trials']} trials in batches of {settings['batch']} by {settings['sampler']}; the first batch:")
    launcher.launch([wanted.overrides(trial) for trial in trials], initial_job_idx=0)
    return []


def _pruning(settings: dict[str, Any]) -> dict[str, Any]:
    return {key: settings[key] for key in ("pruner", "min_epochs", "min_trials", "reduction_factor")}


def _plain(value: Any) -> Any:
    from omegaconf import OmegaConf

    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Two searches in one folder would run each other's trials."""
    from filelock import FileLock, Timeout

    lock = FileLock(folder / ".search.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise RunError(f"{folder}: another search is running there; wait for it, or choose another hydra.sweep.dir") from None
    try:
        yield
    finally:
        lock.release()
