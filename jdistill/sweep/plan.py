"""Which jobs are trained together, and why: the rule behind `hydra.launcher.strategy=auto`.

Measured on a CPU (benchmarks/members.py): a dense network whose state is small gains by being stacked, since each
operation is then worth its call; beyond a few megabytes of states a stack leaves the caches and loses again. A stack of
convolutions becomes a grouped convolution, several times slower than a loop.
"""

import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jdistill.blueprint import Blueprint
from jdistill.checkpoint import write_json
from jdistill.config import digest
from jdistill.environment import cores
from jdistill.sweep.units import Job, Settings, Unit
from jdistill.train import has_convolution
from jdistill.training import is_resident

CACHE_BYTES = 4e6
"""A population's states on a CPU, by which its width is chosen."""

LARGE_BYTES = 2.5e5
"""The state of a member that has nothing to gain on a CPU: its operations are worth their calls."""

WIDEST = 512


def plan_units(jobs: Sequence[Job], blueprints: Sequence[Blueprint], folder: Path, settings: Settings) -> list[Unit]:
    """The units for jobs that are still to be done; populations that a killed session left come first, as they were."""
    todo = {job.identity: (job, blueprint) for job, blueprint in zip(jobs, blueprints, strict=True)}
    units = _resumed(todo, folder)
    for unit in units:
        for job in unit.jobs:
            todo.pop(job.identity, None)
    groups: dict[Any, list[tuple[Job, Blueprint]]] = {}
    for job, blueprint in todo.values():
        if any((job.folder / "checkpoints").glob("*")):
            units.append(Unit((job,), "loop", "goes on from its own checkpoint"))
        else:
            groups.setdefault(blueprint.population(), []).append((job, blueprint))
    for members in groups.values():
        width, reason = width_of(members[0][1], len(members), settings)
        for start in range(0, len(members), width):
            units.append(unit_of([job for job, _ in members[start : start + width]], reason, folder))
    return units


def unit_of(jobs: Sequence[Job], reason: str, folder: Path) -> Unit:
    """A unit of one job, or a population, whose record is written: what a later session goes on with."""
    if len(jobs) == 1:
        return Unit(tuple(jobs), "loop", reason)
    prints = [job.identity for job in jobs]
    own = folder / "populations" / digest(prints)
    own.mkdir(parents=True, exist_ok=True)
    write_json(own / "unit.json", {"reason": reason, "fingerprints": prints, "jobs": [_record(job, folder) for job in jobs]})
    return Unit(tuple(jobs), "vmap", reason, own)


def _record(job: Job, folder: Path) -> dict[str, Any]:
    """A job as JSON: a member that is finished is needed too, where its population goes on."""
    return {**dataclasses.asdict(job), "overrides": list(job.overrides), "folder": os.path.relpath(job.folder, folder)}


def _job(record: dict[str, Any], folder: Path) -> Job:
    return Job(**{**record, "overrides": tuple(record["overrides"]), "folder": folder.absolute() / record["folder"]})


def _resumed(todo: dict[str, tuple[Job, Blueprint]], folder: Path) -> list[Unit]:
    """The recorded populations, some members of which are still to be done."""
    units: list[Unit] = []
    taken: set[str] = set()
    for path in sorted((folder / "populations").glob("*/unit.json")):
        try:
            record = json.loads(path.read_text())
            prints, reason = record["fingerprints"], str(record["reason"])
            old = [_job(row, folder) for row in record["jobs"]]
            if digest(prints) != path.parent.name or len(old) != len(prints):
                raise ValueError("not the record of this population")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            if todo:
                why = f"{type(error).__name__}: {error}"
                print(f"jdistill: {path} cannot be used ({why}); jobs of it that have not ended begin anew", file=sys.stderr)
            continue
        wanted = {name for name in prints if name in todo}
        if not wanted or wanted & taken or not any((path.parent / "checkpoints").glob("*")):
            continue
        taken |= wanted
        jobs = tuple(todo[name][0] if name in todo else job for name, job in zip(prints, old, strict=True))
        units.append(Unit(jobs, "vmap", reason, path.parent))
    return units


def width_of(blueprint: Blueprint, count: int, settings: Settings) -> tuple[int, str]:
    """(members in one program, the reason) for `count` jobs of one structure."""
    params, state = jax.eval_shape(lambda: blueprint.student.init(jax.random.key(0), blueprint.inputs))
    own = sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves((params, state)))
    own *= 2 if blueprint.optim.kind == "sgd" else 3
    cpu = (settings.platform or jax.default_backend()) == "cpu"
    if count == 1:
        return 1, "the only job of its structure"
    if blueprint.estimator is not None:
        return 1, "fitted one by one, not by gradients"
    if settings.strategy == "loop":
        return 1, "asked for by hydra.launcher.strategy"
    if not blueprint.parallel.stacks:
        return 1, f"parallel={blueprint.config['parallel']['name']} gives every step all devices"
    if not is_resident(blueprint):
        return 1, "the data is sent batch by batch"
    fitting = WIDEST if settings.platform else _fitting(blueprint, own)  # elsewhere: halved there if need be
    most = min(count, settings.max_members or WIDEST, fitting)
    if settings.strategy == "vmap":
        return max(1, most), "asked for by hydra.launcher.strategy"
    if not cpu:
        return max(1, most), "an accelerator has room for many small networks in one step"
    if has_convolution(params):
        return 1, "convolutions of several members in one step are slow on a CPU"
    if own > LARGE_BYTES:
        return 1, f"dense, {own / 1e3:.0f} kB a member: each operation is worth its call on a CPU"
    best = min(most, int(CACHE_BYTES / own))
    spread = -(-count // workers_of(settings))  # every worker shall have a unit
    if spread < 2:
        return 1, f"{count} jobs for {workers_of(settings)} workers"
    return min(best, spread), f"dense, {own / 1e3:.0f} kB a member: {best} states stay in the cache"


def workers_of(settings: Settings) -> int:
    """Threads that carry out units: one a core on a CPU, one for accelerators, which a step fills."""
    if settings.workers:
        return settings.workers
    if (settings.platform or jax.default_backend()) != "cpu":
        return 1
    return cores()


def _fitting(blueprint: Blueprint, state: int) -> int:
    """How many members fit into half of the free memory: states (with gradients and a copy to report), activations, orders."""
    shapes = jax.eval_shape(
        lambda x: blueprint.student.apply(*blueprint.student.init(jax.random.key(0), x), x, train=False)[0], blueprint.inputs
    )
    batch, rows = blueprint.optim.batch_size, len(blueprint.dataset.train["label"])
    example = sum(int(np.prod(leaf.shape[1:])) * 4 for leaf in jax.tree.leaves((shapes, blueprint.inputs)))
    own = 3 * state + 4 * example * max(batch, 512) + 8 * rows
    return max(1, int(free_memory() / 2 / own))


def free_memory() -> float:
    """Bytes that are free on the device."""
    device = jax.local_devices()[0]
    if device.platform != "cpu":
        stats = device.memory_stats() or {}
        return stats.get("bytes_limit", 8e9) - stats.get("bytes_in_use", 0)
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable"):
                return float(line.split()[1]) * 1024
    except OSError:
        pass
    return 4e9
