"""Terms and stages: what is trained towards what, on which examples, as one pytree whose numbers are leaves."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jdistill.compress.base import Compressor
from jdistill.errors import UsageError
from jdistill.losses import CrossEntropy, Loss, at_least_float32
from jdistill.optim import Optimizer
from jdistill.pytrees import pytree, require_fraction, require_nonnegative, static
from jdistill.tuning import Tuning
from jdistill.types import Batch, Outputs, PyTree


@pytree
class Gate:
    """How much of each example a teacher among several may teach: the surer it is of the label, the more.

    Weight [B] of teacher k of K: (1 - softmax_j(cross-entropy of teacher j)_k) / (K - 1), which adds up to 1 over the
    teachers: Zhang et al. 2022 (CA-MKD), https://arxiv.org/abs/2201.00007, equation 3. The authors' code divides the sum
    over the teachers by K once more.

    Attributes:
      among: names of the teachers, this term's included.
    """

    among: tuple[str, ...] = static()

    def __call__(self, known: dict[str, Outputs], teacher: str, batch: Batch, held: PyTree = None) -> Array:
        del held
        errors = jnp.stack([CrossEntropy()({}, known[name], None, batch) for name in self.among])
        shares = jax.nn.softmax(errors, axis=0)
        return (1 - shares[self.among.index(teacher)]) / (len(self.among) - 1)


@pytree
class LearnedGate:
    """How much of each example a teacher among several may teach, learned from what all of them say of it.

    Weight [B] of teacher k of M: softmax_j(w_j . z + b_j)_k, z [B, M K] the teachers' logits side by side, which adds up to 1
    over the teachers. It has the form of the teacher gating of Zhu et al. 2020, https://arxiv.org/abs/2011.04106: a softmax
    whose w_j and b_j are learned, over all teachers' outputs. That those are the logits, that the shares weigh terms (and not
    logits), that w and b start at 0 (equal shares) and that nothing but the gated terms trains them are choices made here: no
    gradient goes through the weights to the student, none to the teachers. The objective being the weighted sum of the terms,
    shares move to the teacher whose term is smaller: the one that the student follows most easily, not the one that is most
    often right.

    Attributes:
      among: names of the teachers, this term's included, in the order of w and b.
      holder: name of the term whose loss holds w and b (`losses.HoldsGate`).
    """

    among: tuple[str, ...] = static()
    holder: str = static()

    def __call__(self, known: dict[str, Outputs], teacher: str, batch: Batch, held: PyTree) -> Array:
        del batch
        gate = held[self.holder]["gate"]
        said = jnp.concatenate([at_least_float32(known[name].logits) for name in self.among], axis=-1)
        return jax.nn.softmax(said @ gate["weight"] + gate["bias"], axis=-1)[:, self.among.index(teacher)]


@pytree
class Term:
    """`weight` times the mean of `loss` between a learner and (where the loss needs one) a teacher.

    Attributes:
      name: the metric's name in records.
      learner: name of a trained network.
      teacher: name of a frozen network or of another learner (no gradient goes there), or None for a loss of labels.
      loss: the loss.
      weight: factor in the objective, >= 0, or a schedule. A term of weight 0 is still computed; leave it out instead.
      where: name of a boolean array of the batch: the mean is over the examples where it is true; None takes all.
      gate: a weight for each example, or None.
      reduction: "mean" of the values over the batch, or their "sum".
    """

    name: str = static()
    learner: str = static(default="student")
    teacher: str | None = static(default=None)
    loss: Loss
    weight: Any = 1.0
    where: str | None = static(default=None)
    gate: Gate | LearnedGate | None = None
    reduction: str = static(default="mean")

    def __post_init__(self) -> None:
        require_nonnegative(weight=self.weight)

    def mean(self, values: Array, known: dict[str, Outputs], batch: Batch, held: PyTree = None) -> Array:
        """What the loss's values [B] come to, reduced, without the weight: [] float. `held` are all terms' parameters."""
        if self.gate is not None:
            values = values * self.gate(known, self.teacher or "", batch, held)
        counted = None if self.where is None else batch[self.where]
        if self.reduction == "sum":
            return values.sum() if counted is None else jnp.where(counted, values, 0).sum()
        if counted is None:
            return values.mean()
        return jnp.where(counted, values, 0).sum() / jnp.maximum(counted.sum(), 1)


@dataclasses.dataclass(frozen=True)
class Rows:
    """Which examples of the training set a stage sees: those of the classes kept, without those omitted."""

    keep: tuple[int, ...] | None = None
    omit: tuple[int, ...] = ()

    def select(self, label: np.ndarray) -> np.ndarray:
        """Row numbers [M] int32 among labels [N]; raises `UsageError` where none is left."""
        wanted = np.ones(len(label), bool) if self.keep is None else np.isin(label, self.keep)
        rows = np.flatnonzero(wanted & ~np.isin(label, self.omit)).astype(np.int32)
        if not len(rows):
            raise UsageError(f"transfer.keep={self.keep}, transfer.omit={self.omit} leave no training example")
        return rows

    def within(self, other: "Rows | None") -> "Rows":
        """The examples that both see."""
        if other is None:
            return self
        keeps = [set(rows.keep) for rows in (self, other) if rows.keep is not None]
        keep = tuple(sorted(set.intersection(*keeps))) if keeps else None
        return Rows(keep, tuple(sorted({*self.omit, *other.omit})))


@pytree
class Average:
    """A network that is not trained but follows another one: after each step, decay old + (1 - decay) new.

    In the first steps decay is at most (1 + step) / (10 + step), so that the average forgets the random start.

    Attributes:
      name: the averaged network.
      of: the learner it follows, of the same form.
      decay: in [0, 1).
    """

    name: str = static()
    of: str = static(default="student")
    decay: Any = 0.999

    def __post_init__(self) -> None:
        require_fraction(decay=self.decay)

    def __call__(self, old: PyTree, new: PyTree, step: Array) -> PyTree:
        decay = jnp.minimum(self.decay, (1 + step) / (10 + step))

        def blend(a: Array, b: Array) -> Array:
            return (decay * a + (1 - decay) * b).astype(a.dtype) if jnp.issubdtype(a.dtype, jnp.floating) else b

        return jax.tree.map(blend, old, new)


@pytree
class Stage:
    """A part of training.

    Attributes:
      name: in records and progress.
      terms: their weighted sum is the objective.
      optim: optimizer and length.
      trains: names of the networks that change; other learners that a term reads run in evaluation mode.
      compressors: in force on the student.
      rows: the examples it sees; None for all.
      starts: (learner, where from): learners that begin the stage as copies of others.
      averages: networks that follow learners.
      tuning: which part of the student is trained, and how; None for all of it.
    """

    name: str = static()
    terms: tuple[Term, ...]
    optim: Optimizer
    trains: tuple[str, ...] = static(default=("student",))
    compressors: tuple[Compressor, ...] = ()
    rows: Rows | None = static(default=None)
    starts: tuple[tuple[str, str], ...] = static(default=())
    averages: tuple[Average, ...] = ()
    tuning: Tuning | None = None

    def with_epochs(self, epochs: int) -> "Stage":
        return dataclasses.replace(self, optim=dataclasses.replace(self.optim, epochs=epochs))

    def read(self) -> set[str]:
        """Names of all networks that the terms, gates and averages read."""
        names = {name for term in self.terms for name in (term.learner, term.teacher) if name}
        return names | {name for term in self.terms if term.gate for name in term.gate.among} | set(self.trains)


@pytree
class Method:
    """The stages of one run, in order. `structure_key(method)` tells which runs share compiled programs."""

    stages: tuple[Stage, ...]
