"""What Hydra wants under this name; the work is in `jdistill.sweep`. Kept tiny: every Hydra app here executes it."""

from dataclasses import dataclass
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_store import ConfigStore
from hydra.plugins.launcher import Launcher


@dataclass
class LauncherConf:
    _target_: str = "hydra_plugins.jdistill_plugins.launcher.PopulationLauncher"
    plan: bool = False
    strategy: str = "auto"
    workers: int = 0
    max_members: int = 0


class PopulationLauncher(Launcher):
    """Composes and checks all jobs, trains those of one structure as populations; a failed one does not end the sweep."""

    def __init__(self, plan=False, strategy="auto", workers=0, max_members=0):
        self.plan = plan
        self.keys = {"strategy": strategy, "workers": workers, "max_members": max_members}
        self.composer = self.judge = None
        self.results = {}

    def setup(self, *, hydra_context, task_function, config):
        from jdistill.sweep.units import Settings

        self.context, self.config = hydra_context, config
        self.stop = getattr(task_function, "stop", lambda: False)
        self.settings = Settings(**self.keys)

    def launch(self, job_overrides, initial_job_idx):
        from jdistill.sweep.launch import launch

        return launch(self, job_overrides, initial_job_idx)

    def make_executor(self):
        from jdistill.sweep.executors.threads import Threads
        from jdistill.sweep.plan import workers_of

        return Threads(workers_of(self.settings))


class JdistillSweeper(BasicSweeper):
    """Hydra's cartesian sweeper, without composing every job a second time, and with a summary at the end."""

    def __init__(self, max_batch_size=None, params=None, zip=None):
        super().__init__(max_batch_size, params)
        self.zip = zip

    def validate_batch_is_legal(self, batch):
        pass  # the launcher composes all jobs before it runs any

    def sweep(self, arguments):
        from jdistill.sweep.launch import sweep

        return sweep(self, arguments)


@dataclass
class SweeperConf:
    _target_: str = "hydra_plugins.jdistill_plugins.launcher.JdistillSweeper"
    max_batch_size: int | None = None
    params: dict[str, str] | None = None
    zip: Any = None


_store = ConfigStore.instance()
_store.store(group="hydra/launcher", name="population", node=LauncherConf, provider="jdistill")
_store.store(group="hydra/sweeper", name="jdistill", node=SweeperConf, provider="jdistill")
