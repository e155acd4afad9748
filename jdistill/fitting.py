"""What `fit` is given and what it gives."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from jdistill.checkpoint import Checkpoints
from jdistill.errors import UsageError
from jdistill.machine import MACHINE
from jdistill.method import Method, Stage
from jdistill.parallel import Layout, Single
from jdistill.pytrees import Carried, require_nonnegative
from jdistill.records import MetricsFile
from jdistill.train import Keys, Parts, TrainState
from jdistill.types import PyTree


@dataclasses.dataclass(frozen=True)
class CheckpointPolicy:
    """When to write checkpoints: whichever comes first; 0 switches a rule off. It never changes results."""

    every_steps: int = 0
    every_epochs: int = 0
    every_seconds: float = 60.0

    def __post_init__(self) -> None:
        require_nonnegative(every_steps=self.every_steps, every_epochs=self.every_epochs, every_seconds=self.every_seconds)


class Fitted(NamedTuple):
    """What training gave.

    Attributes:
      state: the final state.
      steps: taken by this member.
      variables: the network to report, `(params in their stored form, running statistics)`; see `compress.base`.
      epoch: the epoch it is from, counted from 1 over all stages.
      train_metrics: of the last epoch.
      seconds, examples: spent and seen in compiled steps, without the first call of each stage, which compiles; of a
        population the member's share of the seconds.
      states: what the compressors that were entered hold about `variables`.
    """

    state: TrainState
    steps: int
    variables: tuple[PyTree, PyTree]
    epoch: int
    train_metrics: dict[str, float]
    seconds: float
    examples: int
    states: tuple[PyTree, ...] = ()


class Member(NamedTuple):
    """What a run has for itself: the numbers of its method, its randomness, its records, the state before training."""

    method: Method
    keys: Keys
    metrics: MetricsFile
    initial: TrainState


@dataclasses.dataclass
class Setup:
    """Everything `fit` needs.

    Attributes:
      members: one run, or (`stacked`) a population: methods of one structure, with stages of equal length.
      data: host arrays `inputs`, `label` of the training split.
      frozen: target name -> arrays; of a population `initial` is stacked, all others are shared.
      resident: keep the data on the device and run blocks of compiled steps; otherwise batches are sent one by one.
      strategy: `block` (many steps a call, where a loop inside the program is cheap) or `loop` (one step a call).
      evaluate: `(params, state) -> (row of the state -> {metric: value})` on held-out data, or None; `evaluated` names the
        split.
      select: metric of `evaluate` whose largest value picks the reported epoch, or None for the last epoch.
      patience: epochs of the last stage without a better value of `primary`, after which a member ends; 0 for never.
      judge: `(member, epoch, held-out metrics)` -> why it is hopeless, or None.
      begin: what else happens to a state as it was initialised (weights taken over from a teacher).
      observed: names that `parts.observe` gives.
      last_checkpoint: write one when training is over, for what comes after it.
      multiple: the number of rows in a population's state stays a multiple of it.
    """

    parts: Parts
    members: tuple[Member, ...]
    data: dict[str, Any]
    frozen: PyTree
    strategy: str
    resident: bool
    checkpoints: Checkpoints | None
    policy: CheckpointPolicy
    observed: tuple[str, ...]
    begin: Callable[[TrainState], TrainState] = lambda state: state
    layout: Layout = dataclasses.field(default_factory=Single)
    stacked: bool = False
    evaluate: Callable[[PyTree, PyTree], Callable[[int], dict[str, float]]] | None = None
    evaluated: str = "validation"
    evaluate_every: int = 1
    primary: str = "accuracy"
    select: str | None = None
    patience: int = 0
    judge: Callable[[int, int, dict[str, float]], str | None] = lambda *_: None
    last_checkpoint: bool = False
    multiple: int = 1
    stop: Callable[[], bool] = lambda: False
    progress: Callable[[str, int, int, float], None] = lambda *_: None


def steps_per_epoch(stage: Stage, examples: int) -> int:
    """Steps in one epoch; raises `UsageError` when the batch is larger than the data."""
    size = stage.optim.batch_size
    if size > examples and stage.optim.drop_last:
        raise UsageError(
            f"optim.batch_size is {size}, but there are {examples} training examples; lower it or set optim.drop_last=false"
        )
    return examples // size if stage.optim.drop_last else math.ceil(examples / size)


def sample_of(data: dict[str, Any]) -> dict[str, Any]:
    """Shapes and dtypes of a batch of two rows of `data`."""
    shapes = {k: jax.ShapeDtypeStruct((2, *v.shape[1:]), v.dtype) for k, v in data.items()}
    return {**shapes, "index": jax.ShapeDtypeStruct((2,), np.int32)}


def on_device(setup: Setup) -> Any:
    """The training arrays on the device, which all runs of the process share."""
    names = tuple((name, id(array)) for name, array in setup.data.items())
    with MACHINE.compiling():
        return _put_data(repr(setup.layout), names, Carried((setup.layout, setup.data)))


@functools.lru_cache(maxsize=4)
def _put_data(layout: str, names: tuple[tuple[str, int], ...], carried: Carried) -> Any:
    """By identity of the arrays; the cache holds them too, so that no other array can take over an identity."""
    del layout, names
    own, data = carried.value
    return own.put_data(data)
