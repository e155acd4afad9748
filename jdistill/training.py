"""One training run in a folder: how a `Setup` comes from a blueprint. Used for students and teachers alike."""

from collections.abc import Callable
from typing import Any

import jax

from jdistill.blueprint import Blueprint
from jdistill.checkpoint import Checkpoints
from jdistill.fitting import Member, Setup, sample_of
from jdistill.passes import with_lookups
from jdistill.sampling import Ranking
from jdistill.stages import init_state
from jdistill.train import Keys, Parts, TrainState, has_convolution
from jdistill.types import PyTree

Stop = Callable[[], bool]
Progress = Callable[[str, int, int, float], None]


def never() -> bool:
    """A `Stop` that never does."""
    return False


def silent(stage: str, done: int, total: int, rate: float) -> None:
    """A `Progress` that shows nothing."""


def choose_strategy(blueprint: Blueprint, initial: TrainState) -> tuple[str, str]:
    """(`loop` or `block`, the reason): a convolution in a compiled loop is tens of times slower on a CPU."""
    wanted = blueprint.parallel.strategy
    if wanted != "auto":
        return wanted, "asked for by parallel.strategy"
    if jax.default_backend() == "cpu" and has_convolution(initial.params):
        return "loop", "convolutions inside a compiled loop are slow on a CPU"
    return "block", "one call for many steps saves dispatch"


def training(
    blueprint: Blueprint,
    members: tuple[Member, ...],
    parts: Parts,
    frozen: PyTree,
    checkpoints: Checkpoints,
    *,
    stacked: bool = False,
    selecting: bool = False,
    judge: Any = None,
    begin: Callable[[TrainState], TrainState] = lambda state: state,
    rankings: dict[str, Ranking] | None = None,
    stop: Stop = never,
    progress: Progress = silent,
) -> Setup:
    """The `Setup` that trains `members`, with the config's data and checkpoints.

    `begin` is what else happened to the members' initial states. `rankings` are those of the teachers that losses draw
    from. `selecting` follows the config's `report` and `evaluate.patience`; a teacher is always the network after its last
    epoch.
    """
    dataset, layout, config = blueprint.dataset, blueprint.parallel, blueprint.config
    evaluated = "test" if selecting and config["report"] == "best_test" else config["evaluate"]["on"]
    task, model = blueprint.task, parts.learners[0].model

    def evaluate(params: PyTree, state: PyTree) -> Callable[[int], dict[str, float]]:
        if stacked:
            answers = task.answers(model, dataset, (params, state), evaluated)
            return lambda row: task.metrics(answers(row), dataset, evaluated)
        answer = task.answer(model, dataset, (params, state), evaluated)
        return lambda _: task.metrics(answer, dataset, evaluated)

    if parts.sampler is not None:
        frozen = {**frozen, "tables": {**task.tables(dataset), "rankings": rankings or {}}}
        frozen = with_lookups(frozen, members[0].method.stages)
    strategy, _ = choose_strategy(blueprint, members[0].initial)
    return Setup(
        parts=parts,
        members=members,
        data=blueprint.arrays(),
        frozen=frozen,
        strategy=strategy,
        resident=is_resident(blueprint),
        checkpoints=checkpoints,
        policy=blueprint.policy,
        observed=task.observed,
        begin=begin,
        layout=layout,
        stacked=stacked,
        evaluate=evaluate if len(getattr(dataset, evaluated)["label"]) else None,
        evaluated=evaluated,
        evaluate_every=int(config["evaluate"]["every"]),
        primary=task.primary,
        select=task.primary if selecting and config["report"] != "last" else None,
        patience=int(config["evaluate"]["patience"]) if selecting else 0,
        judge=judge or (lambda *_: None),
        last_checkpoint=stacked,
        multiple=layout.devices,
        stop=stop,
        progress=progress,
    )


def is_resident(blueprint: Blueprint) -> bool:
    """Whether the training set stays on the device."""
    return sum(array.nbytes for array in blueprint.dataset.train.values()) <= blueprint.parallel.device_bytes


def initial_state(blueprint: Blueprint, parts: Parts, seed: int) -> TrainState:
    """The networks as the seed initialises them."""
    return init_state(parts, Keys.of(seed).init, sample_of(blueprint.arrays()))
