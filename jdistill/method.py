"""Terms, stages and schemes: what is trained towards what, as one pytree whose numbers are leaves."""

import dataclasses
from typing import Any

from jax import Array

from jdistill.compress.base import Compressor
from jdistill.errors import UsageError
from jdistill.losses import KD, Loss
from jdistill.optim import Optimizer
from jdistill.pytrees import pytree, require_nonnegative, require_positive, static
from jdistill.registry import register
from jdistill.teachers.targets import Difference, Live, Target
from jdistill.types import Model


@pytree
class Term:
    """`weight` times the mean of `loss` between a learner and (where the loss needs one) a teacher.

    Attributes:
      name: the metric's name in records.
      learner: name of a trained network.
      teacher: name of a frozen network, or None for a loss of labels only.
      loss: the loss.
      weight: factor in the objective, >= 0. A term of weight 0 is still computed; leave it out instead.
    """

    name: str = static()
    learner: str = static(default="student")
    teacher: str | None = static(default=None)
    loss: Loss
    weight: float | Array = 1.0

    def __post_init__(self) -> None:
        require_nonnegative(weight=self.weight)


@pytree
class Stage:
    """A part of training: which terms, which networks may change, by which optimizer, under which compressors."""

    name: str = static()
    terms: tuple[Term, ...]
    optim: Optimizer
    trains: tuple[str, ...] = static(default=("student",))
    compressors: tuple[Compressor, ...] = ()

    def with_epochs(self, epochs: int) -> "Stage":
        return dataclasses.replace(self, optim=dataclasses.replace(self.optim, epochs=epochs))


@pytree
class Method:
    """The stages of one run, in order. `structure_key(method)` tells which runs share compiled programs."""

    stages: tuple[Stage, ...]


class Scheme:
    """How terms are laid out in stages, and what the learner is compared with."""

    def stages(self, task: Term, distil: Term | None, optim: Optimizer) -> tuple[Stage, ...]:
        """The stages that train the student, before any compression."""
        raise NotImplementedError

    def target(self, teacher: Target, teacher_vars: Any, student: Model, initial: Any) -> tuple[Target, Any]:
        """The frozen function the distillation term sees and its arrays; `initial` is the student as initialised."""
        del student, initial
        return teacher, teacher_vars

    @property
    def target_is_teacher(self) -> bool:
        """False where `target` depends on the student's own initial parameters."""
        return True


@register("scheme", "offline")
@pytree
class Offline(Scheme):
    """One stage: the task's loss and the distillation loss together (Hinton, Vinyals, Dean 2015)."""

    def stages(self, task: Term, distil: Term | None, optim: Optimizer) -> tuple[Stage, ...]:
        terms = tuple(t for t in (task, distil) if t is not None)
        if distil is None and not task.weight:
            raise UsageError("task.weight=0 with loss=none leaves nothing to learn; choose a loss, or task.weight=1")
        return (Stage(name="distil" if distil else "train", terms=terms, optim=optim),)


@register("scheme", "two_stage")
@pytree
class TwoStage(Scheme):
    """First the distillation loss alone (a hint), then the task with softened logits (FitNets, Romero et al. 2015).

    Attributes:
      init_epochs: length of the first stage.
      temperature, kd_weight: of the `kd` term of the second stage; `kd_weight=0` leaves that term out.
    """

    init_epochs: int = static(default=5)
    temperature: float = 4.0
    kd_weight: float = 1.0

    def __post_init__(self) -> None:
        require_positive(init_epochs=self.init_epochs, temperature=self.temperature)
        require_nonnegative(kd_weight=self.kd_weight)

    def stages(self, task: Term, distil: Term | None, optim: Optimizer) -> tuple[Stage, ...]:
        if distil is None:
            raise UsageError("scheme=two_stage needs a distillation loss for its first stage, got loss=none; use loss=hint")
        first = Stage(name="hint", terms=(distil,), optim=optim).with_epochs(self.init_epochs)
        kd = Term(name="kd", teacher=distil.teacher, loss=KD(temperature=self.temperature), weight=self.kd_weight)
        terms = (task, kd) if self.kd_weight else (task,)
        return (first, Stage(name="distil", terms=terms, optim=optim))


@register("scheme", "residual")
@pytree
class Residual(Scheme):
    """The target is the teacher's logits minus those of the student as initialised (the documents' residual target).

    The student h is trained so that h(x) is near t(x) - h_0(x), with h_0 its own initial function. It amounts to
    distilling a teacher shifted by a random function that the student could represent from the start: as h_0 is small
    at usual initialisations, to plain distillation with a perturbed target. It would be boosting only if h_0 were
    added back at prediction, which that text does not do.
    """

    def stages(self, task: Term, distil: Term | None, optim: Optimizer) -> tuple[Stage, ...]:
        if distil is None:
            raise UsageError("scheme=residual needs a distillation loss, got loss=none; use loss=logit_mse")
        return Offline().stages(task, distil, optim)

    def target(self, teacher: Target, teacher_vars: Any, student: Model, initial: Any) -> tuple[Target, Any]:
        return Difference(teacher, Live(student)), (teacher_vars, initial)

    @property
    def target_is_teacher(self) -> bool:
        return False
