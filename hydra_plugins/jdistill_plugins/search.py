"""`hydra/sweeper=optuna`; the work is in `jdistill.sweep.search`. Kept tiny: every Hydra app here executes it."""

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.plugins.sweeper import Sweeper


@dataclass
class OptunaConf:
    _target_: str = "hydra_plugins.jdistill_plugins.search.OptunaSweeper"
    sampler: str = "tpe"
    seed: int = 0
    n_trials: int = 32
    batch: int = 8
    startup_trials: int = 10
    objectives: list[str] = field(default_factory=lambda: ["validation.accuracy:max"])
    allow_test: bool = False
    budget: Any = None
    params: dict[str, str] | None = None
    storage: str | None = None
    study_name: str | None = None
    pruner: str = "none"
    min_epochs: int = 1
    min_trials: int = 5
    reduction_factor: int = 3


class OptunaSweeper(Sweeper):
    """Asks Optuna for batches of trials, has the launcher run each batch, and tells Optuna what came of it."""

    def __init__(self, **settings):
        self.settings = settings

    def setup(self, *, hydra_context, task_function, config):
        from hydra.core.plugins import Plugins

        self.hydra_context, self.config = hydra_context, config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments):
        from jdistill.sweep.search import search

        return search(self, arguments)


ConfigStore.instance().store(group="hydra/sweeper", name="optuna", node=OptunaConf, provider="jdistill")
