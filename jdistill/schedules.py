"""Numbers that change while a stage runs: a schedule may stand wherever a loss or a term has a number."""

import numbers
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jdistill.errors import UsageError
from jdistill.optim import Clock
from jdistill.pytrees import pytree, require_nonnegative, require_one_of, static
from jdistill.registry import register

KINDS = ("constant", "linear", "cubic", "cosine", "exponential")


@pytree
class Schedule:
    """A number that goes from `start` to `end` and stays there; a pytree, so that its numbers can be swept too.

    With t = (epoch - delay) / epochs, held in [0, 1]: `constant` start; `linear` start + (end - start) t; `cubic`
    end + (start - end) (1 - t)^3, as pruning ramps up (Zhu and Gupta 2017, https://arxiv.org/abs/1710.01878, equation 1);
    `cosine` end + (start - end) (1 + cos(pi t)) / 2; `exponential` start (end / start)^t. The options `warmup` (linear
    from 0) and `annealing` (exponential from 1 to 1e-10, as DE anneals its Gumbel softmax: Kang et al. 2020,
    https://arxiv.org/abs/2012.04357, section 4.1.2) are these with other defaults.

    Attributes:
      kind: one of the five above.
      start, end: the number before and after; `exponential` wants both above 0.
      epochs: how long it takes, in epochs of the stage; None takes the whole stage after `delay`.
      delay: epochs at `start` first.
    """

    kind: str = static()
    start: float = 0.0
    end: float = 1.0
    epochs: float | None = None
    delay: float = 0.0

    def __post_init__(self) -> None:
        require_one_of(KINDS, kind=self.kind)
        require_nonnegative(epochs=self.epochs, delay=self.delay)
        if self.kind == "exponential":
            for name, value in (("start", self.start), ("end", self.end)):
                if isinstance(value, numbers.Real) and not value > 0:
                    raise UsageError(f"{name} must be positive for an exponential schedule, got {value!r}")

    def __call__(self, clock: Clock) -> Array:
        """The number at `clock`: [] float."""
        length = clock.epochs - self.delay if self.epochs is None else jnp.asarray(self.epochs)
        passed = clock.step / clock.steps_per_epoch - self.delay
        t = jnp.where(passed > 0, jnp.clip(passed / jnp.maximum(length, 1e-9), 0, 1), 0)
        start, end = jnp.asarray(self.start), jnp.asarray(self.end)
        if self.kind == "linear":
            return start + (end - start) * t
        if self.kind == "cubic":
            return end + (start - end) * (1 - t) ** 3
        if self.kind == "cosine":
            return end + (start - end) * (1 + jnp.cos(jnp.pi * t)) / 2
        if self.kind == "exponential":
            return start * jnp.exp(t * (jnp.log(end) - jnp.log(start)))
        return start

    def endpoints(self) -> tuple[Any, ...]:
        """The two numbers it lies between, for checks."""
        return (self.start,) if self.kind == "constant" else (self.start, self.end)


START = Clock(np.int32(0), np.float32(1), np.float32(1))  # type: ignore[arg-type]


def at(tree: Any, clock: Clock) -> Any:
    """`tree` with every schedule replaced by its number at `clock`."""
    return jax.tree.map(
        lambda node: node(clock) if isinstance(node, Schedule) else node, tree, is_leaf=lambda n: isinstance(n, Schedule)
    )


def at_start(tree: Any) -> Any:
    """`tree` with every schedule replaced by its number when a stage begins; one program, and none where there is none."""
    found = any(isinstance(n, Schedule) for n in jax.tree.leaves(tree, is_leaf=lambda n: isinstance(n, Schedule)))
    return _at_start(tree) if found else tree


def at_end(tree: Any) -> Any:
    """`tree` with every schedule replaced by the number it comes to."""

    def last(node: Any) -> Any:
        return (node.start if node.kind == "constant" else node.end) if isinstance(node, Schedule) else node

    return jax.tree.map(last, tree, is_leaf=lambda n: isinstance(n, Schedule))


@jax.jit
def _at_start(tree: Any) -> Any:
    return at(tree, START)


def _register(name: str, kind: str, **defaults: float) -> None:
    def make(start: float = 0.0, end: float = 1.0, epochs: float | None = None, delay: float = 0.0) -> Schedule:
        return Schedule(kind=kind, start=start, end=end, epochs=epochs, delay=delay)

    make.__doc__ = {
        "constant": "`start` throughout.",
        "warmup": "From 0 to `end` in equal steps.",
        "annealing": "From 1 down to 1e-10 by equal factors.",
    }.get(name, f"From `start` to `end`, {kind}.")
    make.__qualname__ = f"Schedule.{name}"
    register("schedule", name, **defaults)(make)  # type: ignore[arg-type]


_register("constant", "constant", start=1.0)
_register("linear", "linear")
_register("cubic", "cubic")
_register("cosine", "cosine")
_register("exponential", "exponential", start=1.0, end=1e-3)
_register("warmup", "linear")
_register("annealing", "exponential", start=1.0, end=1e-10)
