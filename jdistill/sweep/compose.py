"""The jobs of a sweep from their overrides: composed by Hydra once, copied and updated where only values change."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hydra._internal.config_loader_impl import get_overrides_dirname
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.utils import filter_overrides
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from jdistill.sweep.jobs import choices, plain
from jdistill.sweep.units import Job

BY_FINGERPRINT = "${jdistill.fingerprint:}"


class Template(NamedTuple):
    """A composed config that stands for all jobs that change the same keys by values.

    Attributes:
      config: the config; the values of the last job are in it.
      choices: config group -> option.
      literal: the task's config holds no interpolation, so that it is the same resolved and not.
      by_fingerprint: the job's folder is named by its fingerprint.
    """

    config: DictConfig
    choices: dict[str, str]
    literal: bool
    by_fingerprint: bool


class Composed(NamedTuple):
    """A job, the template it came from, and all its overrides as they were given."""

    job: Job
    template: Template
    overrides: tuple[str, ...]


class Composer:
    """Composes the jobs of one sweep."""

    def __init__(self, loader: Any, master: DictConfig):
        self.loader, self.master = loader, master
        self.folder = Path(str(master.hydra.sweep.dir)).absolute()
        self._templates: dict[tuple[str, ...], Template] = {}
        self.parse = functools.lru_cache(maxsize=4096)(OverridesParser.create(config_loader=loader).parse_override)
        self._is_group = functools.lru_cache(maxsize=4096)(lambda key: bool(loader.repository.get_group_options(key)))

    def job(self, overrides: Sequence[str], number: int) -> Composed:
        """Job `number`; raises Hydra's errors for overrides that do not fit."""
        texts = tuple(overrides)
        parsed = [self.parse(text) for text in texts]
        values = self._values(parsed)
        key = tuple(f"{o.key_or_group}=" if o in values else text for o, text in zip(parsed, texts, strict=True))
        template = self._templates.get(key)
        try:
            if template is not None:
                for override in values:
                    OmegaConf.update(template.config, override.key_or_group, override.value(), merge=True)
        except OmegaConfBaseException:
            template = None  # composing raises what Hydra says of such a value
        if template is None:
            template = self._templates[key] = self._template(self.compose(texts, number))
        with open_dict(hydra := template.config.hydra):
            hydra.job.id = hydra.job.num = number
            if not template.by_fingerprint:  # the folder may be named by them
                hydra.overrides.task = [text for text, o in zip(texts, parsed, strict=True) if not o.is_hydra_override()]
                hydra.job.override_dirname = self.override_dirname(texts, template.config)
        config = plain(template.config)
        job = Job(number, tuple(filter_overrides(texts)), config, template.choices, self.folder)
        own = job.identity if template.by_fingerprint else str(template.config.hydra.sweep.subdir)
        job = dataclasses.replace(job, folder=self.folder / own)
        return Composed(job, template, texts)

    def compose(self, overrides: Sequence[str], number: int) -> DictConfig:
        """The config of one job, as Hydra composes it."""
        config = self.loader.load_sweep_config(self.master, list(overrides))
        with open_dict(config):
            config.hydra.job.id = number
            config.hydra.job.num = number
            config.hydra.sweep.dir = str(self.master.hydra.sweep.dir)  # one folder, whatever a job's own overrides
        return config

    def override_dirname(self, overrides: Sequence[str], config: DictConfig) -> str:
        """`hydra.job.override_dirname` of a job."""
        rule = config.hydra.job.config.override_dirname
        parsed = [override for override in map(self.parse, overrides) if not override.is_hydra_override()]
        return get_overrides_dirname(
            overrides=parsed, kv_sep=rule.kv_sep, item_sep=rule.item_sep, exclude_keys=rule.exclude_keys
        )

    def _values(self, parsed: Sequence[Override]) -> list[Override]:
        """The overrides that only give keys of the composed config other values, which nothing else in the job touches."""
        values = [override for override in parsed if self._changes_value(override)]
        keys = [o.key_or_group for o in parsed if o not in values and not self._is_group(o.key_or_group)]
        return [o for o in values if not any(_overlap(o.key_or_group, key) for key in keys)]

    def _changes_value(self, override: Override) -> bool:
        """Whether an override gives a key of the composed config another plain value."""
        if override.is_delete() or override.is_add() or override.is_force_add() or override.package is not None:
            return False
        if override.is_hydra_override() or override.is_sweep_override() or self._is_group(override.key_or_group):
            return False
        value = override.value()
        values = value if isinstance(value, list) else [value]
        return all(v is None or (isinstance(v, bool | int | float | str) and "${" not in str(v)) for v in values)

    def _template(self, config: DictConfig) -> Template:
        raw = {str(key): config._get_node(key) for key in config if key != "hydra"}
        literal = not any("${" in str(_unresolved(node)) for node in raw.values())
        subdir = OmegaConf.to_container(config.hydra.sweep, resolve=False)["subdir"]  # type: ignore[call-overload, index]
        return Template(config, choices(config.hydra), literal, subdir == BY_FINGERPRINT)


def _overlap(a: str, b: str) -> bool:
    """Whether one of two dotted keys is, or lies in, the other."""
    return f"{a}.".startswith(f"{b}.") or f"{b}.".startswith(f"{a}.")


def _unresolved(node: Any) -> Any:
    return OmegaConf.to_container(node, resolve=False) if OmegaConf.is_config(node) else node._value()
