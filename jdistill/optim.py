"""Optimizers and learning-rate schedules as pytrees: their numbers are arguments of the compiled step."""

import numbers
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from jdistill.pytrees import pytree, require_fraction, require_nonnegative, require_one_of, require_positive, static
from jdistill.registry import register
from jdistill.types import PyTree

KINDS = ("sgd", "adam", "adamw")
SCHEDULES = ("constant", "step", "cosine")


class Clock(NamedTuple):
    """Where a stage is: `step` [] int32 since the stage began, and the stage's lengths as float32 scalars."""

    step: Array
    steps_per_epoch: Array
    epochs: Array


@pytree
class Optimizer:
    """An optimizer, its schedule, the length of training and the batch size.

    Attributes:
      kind: `sgd`, `adam` or `adamw`.
      lr: peak learning rate, > 0.
      epochs: passes over the training set; a stage may set its own.
      batch_size: examples a step.
      weight_decay: added to the gradient as `weight_decay * param` before the optimizer (coupled, as torch's SGD and
        Adam do), for every parameter, BatchNorm and biases included; decoupled for `adamw`. 0 (or None) leaves it out of
        the program: it costs a small network a twentieth of its step.
      momentum: SGD's momentum, or Adam's beta_1.
      beta2, eps: Adam's.
      nesterov: SGD with Nesterov momentum.
      schedule: `constant`; `step` (times `decay` from each of `milestones` on, in epochs counted from 0);
        `cosine` (half a period down to 0 at the end of the stage).
      warmup_epochs: linear rise from 0 over the first epochs.
      rows: update only those rows of embedding tables that a batch names (row-wise SGD, lazy Adam): the moments and the
        weight decay of the others wait. For one student that declares its tables (bpr, neumf; two_tower without
        features and histories) and losses that draw no items. See `jdistill.rows`, also for memory.
      drop_last: leave out the last, smaller batch of an epoch (each epoch has its own order, so other examples each time).
    """

    kind: str = static(default="adam")
    lr: float = 1e-3
    epochs: int = 20
    batch_size: int = static(default=64)
    weight_decay: float | None = 0.0
    momentum: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    nesterov: bool = static(default=False)
    schedule: str = static(default="constant")
    milestones: tuple[float, ...] = ()
    decay: float = 0.1
    warmup_epochs: float = 0.0
    drop_last: bool = static(default=True)
    rows: bool = static(default=False)

    def __post_init__(self) -> None:
        require_positive(lr=self.lr, epochs=self.epochs, batch_size=self.batch_size, eps=self.eps, decay=self.decay)
        require_nonnegative(weight_decay=self.weight_decay, warmup_epochs=self.warmup_epochs)
        require_fraction(momentum=self.momentum, beta2=self.beta2)
        if isinstance(self.milestones, tuple):
            require_nonnegative(**{f"milestones[{i}]": epoch for i, epoch in enumerate(self.milestones)})
        require_one_of(SCHEDULES, schedule=self.schedule)
        require_one_of(KINDS, kind=self.kind)
        if isinstance(self.weight_decay, numbers.Real) and not self.weight_decay:
            object.__setattr__(self, "weight_decay", None)

    def init(self, params: PyTree) -> PyTree:
        """The optimizer's state for `params`."""
        return self._transform().init(params)

    def update(self, grads: PyTree, state: PyTree, params: PyTree, clock: Clock) -> tuple[PyTree, PyTree]:
        """New parameters and optimizer state after one step."""
        updates, state = self._transform().update(grads, state, params)
        lr = self.lr * self.factor(clock)
        return jax.tree.map(lambda p, u: (p - lr * u).astype(p.dtype), params, updates), state

    def factor(self, clock: Clock) -> Array:
        """What the schedule multiplies `lr` by at `clock`: float scalar in [0, 1] (above 1 only where `decay` is)."""
        epoch = clock.step / clock.steps_per_epoch
        factor = jnp.ones(())
        if self.schedule == "step":
            passed = sum(jnp.floor(epoch + 1e-4) >= milestone for milestone in self.milestones)
            factor = self.decay ** jnp.asarray(passed, jnp.float32)
        elif self.schedule == "cosine":
            factor = 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(epoch / clock.epochs, 0, 1)))
        rise = (epoch + 1 / clock.steps_per_epoch) / jnp.maximum(self.warmup_epochs, 1e-9)
        return factor * jnp.minimum(1.0, rise)

    def _transform(self) -> optax.GradientTransformation:
        # Built anew inside each trace, so that momentum and the rest may be traced numbers.
        decay = optax.identity() if self.weight_decay is None else optax.add_decayed_weights(self.weight_decay)
        if self.kind == "sgd":
            return optax.chain(decay, optax.trace(self.momentum, nesterov=self.nesterov))
        adam = scale_by_adam(self.momentum, self.beta2, self.eps)
        return optax.chain(adam, decay) if self.kind == "adamw" else optax.chain(decay, adam)


def scale_by_adam(b1: float | Array, b2: float | Array, eps: float | Array) -> optax.GradientTransformation:
    """`optax.scale_by_adam`, same state and same result, with the bias corrections as two scalars.

    optax divides every element by them, which the compiler may not turn into a multiplication: a tenth of the time of
    a small network's step on a CPU. `m / c1 / (sqrt(v / c2) + eps)`, Kingma and Ba 2015, algorithm 1.
    """

    def update(grads: PyTree, state: optax.ScaleByAdamState, params: PyTree = None) -> tuple[PyTree, optax.ScaleByAdamState]:
        del params
        count = state.count + 1
        mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, grads)
        nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * (g * g), state.nu, grads)
        first, root = 1 / (1 - b1**count), jax.lax.rsqrt(1 - b2**count)
        updates = jax.tree.map(lambda m, v: first * m / (root * jnp.sqrt(v) + eps), mu, nu)
        return updates, optax.ScaleByAdamState(count=count, mu=mu, nu=nu)

    return optax.GradientTransformation(optax.scale_by_adam().init, update)


register("optim", "adam", kind="adam")(Optimizer)
register("optim", "adamw", kind="adamw", weight_decay=1e-2)(Optimizer)
register("optim", "sgd", kind="sgd", lr=0.05, weight_decay=5e-4)(Optimizer)
