"""`hydra/launcher=processes|slurm|ray`: the population launcher with another executor. Kept tiny, as `launcher` is."""

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from hydra_plugins.jdistill_plugins.launcher import LauncherConf, PopulationLauncher

HERE = "hydra_plugins.jdistill_plugins.executors"


class _Elsewhere(PopulationLauncher):
    """Takes the population launcher's keys, and keeps its own for the executor."""

    def __init__(self, plan=False, strategy="auto", workers=0, max_members=0, **own):
        super().__init__(plan, strategy, workers, max_members)
        self.own = {key: OmegaConf.to_object(value) if OmegaConf.is_config(value) else value for key, value in own.items()}
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # this process leaves the GPUs to its workers

    def setup(self, *, hydra_context, task_function, config):
        super().setup(hydra_context=hydra_context, task_function=task_function, config=config)
        if self.own.get("gpus_per_node") or self.own.get("num_gpus"):
            self.settings = replace(self.settings, platform="gpu")  # this process may have none
        self.executor = None if self.plan else self.executor_in(Path(config.hydra.sweep.dir).absolute())  # keys are checked

    def make_executor(self):
        return self.executor


@dataclass
class ProcessesConf(LauncherConf):
    _target_: str = f"{HERE}.ProcessesLauncher"
    gpus: Any = "auto"


class ProcessesLauncher(_Elsewhere):
    """One worker process a GPU or, without, a core."""

    def executor_in(self, sweep):
        from jdistill.sweep.executors.processes import Processes

        return Processes(sweep / "workers", workers=self.settings.workers, **self.own)


@dataclass
class SlurmConf(LauncherConf):
    _target_: str = f"{HERE}.SlurmLauncher"
    cluster: str = "slurm"
    partition: str | None = None
    timeout_min: int = 240
    gpus_per_node: int | None = None
    cpus_per_task: int | None = None
    mem_gb: float | None = None
    array_parallelism: int = 256
    max_num_timeout: int = 20
    additional_parameters: dict[str, Any] = field(default_factory=dict)
    setup: list[str] = field(default_factory=list)


class SlurmLauncher(_Elsewhere):
    """One Slurm job a unit."""

    def executor_in(self, sweep):
        from jdistill.sweep.executors.slurm import Slurm

        return Slurm(sweep / "submitit", workers=self.settings.workers, **self.own)


@dataclass
class RayConf(LauncherConf):
    _target_: str = f"{HERE}.RayLauncher"
    address: str | None = None
    num_cpus: float = 1
    num_gpus: float = 0
    retries: int = 3


class RayLauncher(_Elsewhere):
    """One Ray task a unit."""

    def executor_in(self, sweep):
        from jdistill.sweep.executors.ray import Ray

        return Ray(sweep / "ray", **self.own)


_store = ConfigStore.instance()
for _name, _conf in (("processes", ProcessesConf), ("slurm", SlurmConf), ("ray", RayConf)):
    _store.store(group="hydra/launcher", name=_name, node=_conf, provider="jdistill")
