"""A multirun's Hydra without a command: its config loader, its master config, its context."""

from pathlib import Path
from typing import Any, NamedTuple

from hydra import version
from hydra._internal.callbacks import Callbacks
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import setup_globals
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

import jdistill.options  # noqa: F401 (registers every option)
from jdistill.paths import conf_dir
from jdistill.sweep.compose import Composer
from jdistill.sweep.jobs import resolve_fingerprint, resolve_sweep


class Multirun(NamedTuple):
    """What Hydra hands to a launcher; `composed` keeps what it composed of some overrides."""

    context: HydraContext
    master: DictConfig
    composed: dict[tuple[str, ...], DictConfig]

    @property
    def loader(self) -> Any:
        return self.context.config_loader

    def composer(self) -> Composer:
        return Composer(self.loader, self.master)

    def basic(self, overrides: list[str], number: int) -> DictConfig:
        """A job's config as Hydra's own launcher composes it."""
        config = self.composed.get(tuple(overrides))
        if config is None:
            config = self.composed[tuple(overrides)] = self.loader.load_sweep_config(self.master, overrides)
        with open_dict(config):
            config.hydra.job.id = config.hydra.job.num = number
        return config


def multirun(folder: Path, *overrides: str) -> Multirun:
    """The multirun of `overrides` with the sweep folder `folder`."""
    version.setbase("1.3")
    setup_globals()
    OmegaConf.register_new_resolver("jdistill.fingerprint", resolve_fingerprint, replace=True)
    OmegaConf.register_new_resolver("jdistill.sweep", resolve_sweep, replace=True)
    GlobalHydra.instance().clear()
    hydra = Hydra.create_main_hydra2("jdistill", create_config_search_path(str(conf_dir())))
    asked = [f"hydra.sweep.dir={folder}", "hydra.mode=MULTIRUN", *overrides]
    master = hydra.compose_config(config_name="train", overrides=asked, run_mode=RunMode.MULTIRUN, with_log_configuration=False)
    HydraConfig.instance().set_config(master)
    return Multirun(HydraContext(config_loader=hydra.config_loader, callbacks=Callbacks(master)), master, {})
