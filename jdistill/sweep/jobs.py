"""One Hydra job: from a composed config to `run`."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from jdistill.config import GROUPS, fingerprint
from jdistill.errors import UsageError
from jdistill.progress import Bar


def plain(config: DictConfig) -> dict[str, Any]:
    """A composed config as plain containers, without Hydra's own node."""
    out = {}
    for key in config:
        if key != "hydra":
            value = config[key]
            is_node = OmegaConf.is_config(value)
            out[str(key)] = OmegaConf.to_container(value, resolve=True, enum_to_str=True) if is_node else value
    return out


def choices(hydra: Any) -> dict[str, str]:
    """Which option each group has, from Hydra's own config."""
    chosen = OmegaConf.to_container(hydra.runtime.choices)
    assert isinstance(chosen, dict)
    return {group: chosen[group] for group in GROUPS if chosen.get(group) is not None}


def resolve_fingerprint(*, _root_: DictConfig) -> str:
    """`${jdistill.fingerprint:}`: the identity of the config it stands in."""
    return fingerprint(plain(_root_))


def resolve_sweep(*, _root_: DictConfig) -> str:
    """`${jdistill.sweep:}`: a name for a multirun: its experiment, and a hash of all that was asked for."""
    from jdistill.config import digest

    hydra = _root_.hydra
    task = [str(o) for o in hydra.overrides.task if str(o).partition("=")[0].lstrip("+") not in ("force", "cache", "fail_fast")]
    experiment = OmegaConf.select(hydra, "runtime.choices.experiment") or "sweep"
    sweeper = OmegaConf.to_container(hydra.sweeper)
    assert isinstance(sweeper, dict)
    own = {key: value for key, value in sweeper.items() if key not in ("max_batch_size", "n_trials", "batch", "storage")}
    return f"{experiment}-{digest([sorted(task), own])[:8]}"


def make_task(stop: Callable[[], bool]) -> Callable[[DictConfig], float | None]:
    """The function Hydra calls for a single run, and a launcher not ours for each job; returns the task's primary metric."""

    def task(config: DictConfig) -> float | None:
        from jdistill.run import run

        hydra = HydraConfig.get()
        folder = Path(hydra.runtime.output_dir)
        number = OmegaConf.select(hydra, "job.num", default=None)  # type: ignore[arg-type]
        bar = Bar("" if number is None else f"job {number} ")
        overrides = [str(o) for o in hydra.overrides.task]
        try:
            result = run(plain(config), folder, choices=choices(hydra), overrides=overrides, stop=stop, progress=bar)
        except UsageError:
            _remove_if_empty(folder)
            raise
        finally:
            bar.close()
        return result["metrics"]["test"].get(result.get("primary", "accuracy"))

    return task


def describe(result: dict[str, Any]) -> str:
    """One line for a finished run."""
    test, size = result["metrics"]["test"], result["size"]
    primary = result.get("primary", "accuracy")
    shown = f"{test[primary]:.2%}" if primary == "accuracy" else f"{test[primary]:.4f}"
    line = f"test {primary} {shown}"
    if "cross_entropy" in test:
        line += f", cross-entropy {test['cross_entropy']:.4f}"
    line += f", {size['bytes']:,} bytes"
    if "teacher_agreement" in test:
        line += f", agrees with the teacher on {test['teacher_agreement']:.2%}"
    return line + f", {result['time_s']['total']:.1f} s"


def _remove_if_empty(folder: Path) -> None:
    """A refused config leaves no folder behind, unless a run had been there before."""
    import shutil

    if not any((folder / name).exists() for name in ("result.json", "metrics.jsonl", "checkpoints")):
        shutil.rmtree(folder / ".hydra", ignore_errors=True)
        with contextlib.suppress(OSError):
            folder.rmdir()  # only an empty one: it may be a folder of the user's
