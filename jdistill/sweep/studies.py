"""Optuna's studies on disk: opened, continued, and read by the judge that prunes trials while they train."""

import dataclasses
import sqlite3
import statistics
import threading
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from jdistill.errors import RunError, UsageError
from jdistill.sweep.space import Direction

FILE = "study.db"
IDENTITY = "jdistill.search"
PATIENCE_SECONDS = 60  # how long a process waits for others that write to the same SQLite file


def require_optuna() -> None:
    """Raises `UsageError` where Optuna is missing; else quietens it: what matters is printed here."""
    try:
        import optuna
    except ImportError:
        raise UsageError("hydra/sweeper=optuna needs Optuna; install it: pip install 'jdistill[optuna]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)


@dataclasses.dataclass(frozen=True)
class Store:
    """Where a study is kept.

    Attributes:
      url: of the database, as SQLAlchemy writes it.
      study: its name there.
      own: whether the database is the file of the sweep folder.
    """

    url: str
    study: str
    own: bool

    @classmethod
    def of(cls, settings: dict[str, Any], folder: Path) -> "Store":
        """The store that `hydra.sweeper.storage` and `study_name` name, by default `study.db` in the sweep folder.

        Raises:
          UsageError: the storage is no URL, or has no name of a study.
        """
        url, name = settings["storage"], settings["study_name"]
        if url is None:
            return cls(f"sqlite:///{(folder / FILE).absolute()}", name or "search", own=True)
        if "://" not in url:
            raise UsageError(f"hydra.sweeper.storage must be a URL such as sqlite:///{url}, got '{url}'")
        if not name:
            raise UsageError("hydra.sweeper.storage needs hydra.sweeper.study_name, the name of the study in that database")
        return cls(url, name, own=False)

    def open(self) -> Any:
        """Optuna's storage.

        Raises:
          RunError: the database cannot be read or made.
        """
        from optuna.exceptions import StorageInternalError
        from optuna.storages import RDBStorage, get_storage
        from sqlalchemy.exc import SQLAlchemyError

        waiting = {"connect_args": {"timeout": PATIENCE_SECONDS}} if self.url.startswith("sqlite") else {}
        options = {"creator": partial(_connect, self.url.removeprefix("sqlite:///"))} if self.own else waiting
        try:
            return get_storage(RDBStorage(self.url, engine_kwargs=options))
        except (SQLAlchemyError, StorageInternalError, RuntimeError, ValueError, ImportError) as error:
            remedy = "; delete it and jobs.jsonl to begin a new study (finished runs are kept)" if self.own else ""
            raise RunError(f"{self.url}: not a database of Optuna: {_cause(error)}{remedy}") from error


def _connect(path: str) -> sqlite3.Connection:
    """A connection that appends to a log, without waiting for the disk at each report; a kill loses and damages nothing."""
    connection = sqlite3.connect(path, timeout=PATIENCE_SECONDS, check_same_thread=False)
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=NORMAL")
    return connection


def in_memory(directions: Sequence[Direction]) -> Any:
    """A study that is kept nowhere."""
    import optuna

    return optuna.create_study(directions=directions)


def begin_or_resume(store: Store, identity: dict[str, Any], directions: Sequence[Direction]) -> Any:
    """The study of `store`, new or continued; one in which no trial has ended is begun anew where it was another search.

    Raises:
      UsageError: it is another search, of which trials have ended.
      RunError: the database is damaged.
    """
    import optuna

    storage = store.open()
    if store.study in optuna.get_all_study_names(storage):
        study = optuna.load_study(study_name=store.study, storage=storage)
        found = study.user_attrs.get(IDENTITY)
        if found == identity:
            return study
        ended = any(trial.state.is_finished() for trial in study.get_trials(deepcopy=False))
        if found is None and not store.own:
            raise UsageError(
                f"the study '{store.study}' in {store.url} was not made here; name another hydra.sweeper.study_name"
            )
        if ended:
            other = "hydra.sweep.dir" if store.own else "hydra.sweeper.study_name"
            raise UsageError(f"{store.url} holds another search ({_difference(found or {}, identity)}); choose another {other}")
        optuna.delete_study(study_name=store.study, storage=storage)
    study = optuna.create_study(study_name=store.study, storage=storage, directions=directions)
    study.set_user_attr(IDENTITY, identity)
    return study


def _difference(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    before, now = found.get("space", {}), wanted["space"]
    for key in {**before, **now}:
        if before.get(key) != now.get(key):
            return f"{key} was {before.get(key, 'not searched')}, now {now.get(key, 'not searched')}"
    named = {"objectives": "the objectives were", "budget": "the budget was", "fixed": "the fixed overrides were"}
    for kind, what in named.items():
        old, new = found.get(kind, []), wanted.get(kind, [])
        if old != new:
            return f"{what} {' '.join(old) or 'none'}, now {' '.join(new) or 'none'}"
    return "made by another version"


class OptunaJudge:
    """Reports a trial's metric to its study after each evaluation and says when the pruner gives it up.

    Call it with `(job number, epoch, held-out metrics)`: it returns the reason to stop, or None. Any thread may call it, and
    it can be pickled; one judge sees what was reported to it and what was stored when it was opened. A trial that was given
    up before a kill is given up again at the same epoch. Sources: median stopping rule, Golovin et al. 2017 (Vizier); ASHA,
    Li et al. 2020 (arXiv:1810.05934); both as in Optuna.
    """

    def __init__(self, store: Store, metric: str, direction: Direction, pruning: dict[str, Any]):
        self.store, self.metric, self.direction, self.pruning = store, metric, direction, pruning
        self._lock = threading.Lock()
        self._opened: tuple[Any, Any] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return OptunaJudge, (self.store, self.metric, self.direction, self.pruning)

    def __call__(self, number: int, epoch: int, metrics: dict[str, float]) -> str | None:
        from sqlalchemy.exc import SQLAlchemyError

        if self.metric not in metrics:
            raise UsageError(f"the pruner judges by '{self.metric}'; evaluations have {', '.join(sorted(metrics))}")
        try:
            with self._lock:
                return self._judge(number, epoch, float(metrics[self.metric]))
        except SQLAlchemyError as error:
            raise RunError(f"{self.store.url}: the pruner cannot use it: {_cause(error)}") from error

    def _judge(self, number: int, epoch: int, value: float) -> str | None:
        if self._opened is None or number >= len(self._opened[1].get_trials(deepcopy=False)):
            self._opened = self._open()
        storage, study = self._opened
        here = study._storage  # the pruner itself writes there
        trial = study.get_trials(deepcopy=False)[number]
        given_up = trial.user_attrs.get("pruned")
        if given_up is not None:
            return given_up["reason"] if epoch >= given_up["epoch"] else None
        stored = storage.get_trial_id_from_study_id_trial_number(storage.get_study_id_from_name(self.store.study), number)
        if epoch not in trial.intermediate_values:
            here.set_trial_intermediate_value(trial._trial_id, epoch, value)
            storage.set_trial_intermediate_value(stored, epoch, value)
        known, trial = set(trial.system_attrs), here.get_trial(trial._trial_id)
        hopeless = epoch >= self.pruning["min_epochs"] and study.pruner.prune(study, trial)
        for key, noted in here.get_trial(trial._trial_id).system_attrs.items():
            if key not in known:  # ASHA's rungs
                storage.set_trial_system_attr(stored, key, noted)
        if not hopeless:
            return None
        reason = f"pruned at epoch {epoch}: {self._reason(study, trial, epoch, value)}"
        for where, trial_id in ((here, trial._trial_id), (storage, stored)):
            where.set_trial_user_attr(trial_id, "pruned", {"epoch": epoch, "reason": reason})
        return reason

    def _open(self) -> tuple[Any, Any]:
        """The storage, and a copy of the study in memory, which answers a pruner many times faster than a database."""
        import optuna

        require_optuna()
        numbers = self.pruning
        if numbers["pruner"] == "median":
            pruner = optuna.pruners.MedianPruner(n_startup_trials=numbers["min_trials"], n_warmup_steps=numbers["min_epochs"])
        else:
            pruner = optuna.pruners.SuccessiveHalvingPruner(
                min_resource=numbers["min_epochs"], reduction_factor=numbers["reduction_factor"]
            )  # type: ignore[assignment]
        storage = self.store.open()
        copy = optuna.create_study(direction=self.direction, pruner=pruner)
        copy.add_trials(optuna.load_study(study_name=self.store.study, storage=storage).get_trials())
        return storage, copy

    def _reason(self, study: Any, trial: Any, epoch: int, value: float) -> str:
        from optuna.trial import TrialState

        metric = f"validation {self.metric.replace('_', ' ')}"
        if self.pruning["pruner"] == "asha":
            share = f"the best 1/{self.pruning['reduction_factor']}"
            return f"{metric} {value:.4g} is not in {share} of the trials that came as far"
        ended = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        others = [other.intermediate_values[epoch] for other in ended if epoch in other.intermediate_values]
        high = self.direction == "maximize"
        best = (max if high else min)(trial.intermediate_values.values())
        side = "below" if high else "above"
        return f"{metric} {best:.4g} at best is {side} the median {statistics.median(others):.4g} of the others"


def _cause(error: BaseException) -> str:
    """The innermost cause, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())
