"""What a scheme is: how terms are laid out in stages, and which networks take part besides student and teacher."""

import dataclasses
import json
from typing import Any, NamedTuple

import numpy as np

from jdistill.errors import UsageError
from jdistill.method import Stage, Term
from jdistill.optim import Optimizer
from jdistill.schedules import Schedule
from jdistill.train import Learner
from jdistill.types import Outputs

Overrides = dict[str, Any]
"""What of a group's config is changed for one more network: `{}`, `{"seed": 1}`, `{"name": "mlp", "widths": [64]}`."""


class Setting(NamedTuple):
    """What a scheme lays out.

    Attributes:
      task: the student's term on the labels.
      distil: the student's term with the chosen loss, towards `teacher` where the loss needs one; None with loss=none.
      optim: optimizer and length of a stage.
      classes: number of classes of the data.
      student: the student's abstract outputs.
    """

    task: Term
    distil: Term | None
    optim: Optimizer
    classes: int
    student: Outputs

    def terms(self, learner: str = "student", teachers: tuple[str, ...] = ("teacher",)) -> tuple[Term, ...]:
        """The terms with which `learner` learns the task, and from each of `teachers`."""
        return tuple(term for term in (of(self.task, learner), *self.distilling(learner, teachers)) if counts(term))

    def distilling(self, learner: str = "student", teachers: tuple[str, ...] = ("teacher",)) -> tuple[Term, ...]:
        """The distillation terms of `learner` alone: one a teacher, or one in all for a loss without teacher."""
        if self.distil is None:
            return ()
        if self.distil.teacher is None:
            return (of(self.distil, learner),)
        return tuple(of(self.distil, learner, teacher) for teacher in teachers)


def counts(term: Term) -> bool:
    """Whether a term is in the objective at all: a weight of exactly 0 leaves it out of the program."""
    return not (isinstance(term.weight, int | float) and term.weight == 0)


def of(term: Term, learner: str, teacher: str | None = None) -> Term:
    """`term` for another learner (and teacher); its name says which, save for the usual two."""
    names = [term.name]
    if learner != "student":
        names.append(learner)
    if teacher not in (None, "teacher"):
        names.append(f"from_{teacher}")
    return dataclasses.replace(term, name="_".join(names), learner=learner, teacher=teacher if term.teacher else None)


def networks(field: str, value: Any) -> tuple[str, ...]:
    """A config's list of changes to a group, each as canonical JSON: static fields must be hashable.

    Raises:
      UsageError: not a list of such, naming `field`.
    """
    if isinstance(value, tuple | list) and value and all(isinstance(entry, dict | str) for entry in value):
        return tuple(entry if isinstance(entry, str) else json.dumps(entry, sort_keys=True) for entry in value)
    raise UsageError(f"{field} must be a list of changes such as [{{seed: 0}}, {{name: mlp, seed: 1}}], got {value!r}")


def changes(networks: tuple[str, ...]) -> tuple[Overrides, ...]:
    """What `networks` made, as dicts."""
    return tuple(json.loads(entry) for entry in networks)


def times(term: Term, factor: Any) -> Term:
    """`term` with `factor` times its weight, where the weight is a number or a schedule."""
    weight = term.weight
    if isinstance(weight, Schedule):
        weight = dataclasses.replace(weight, start=weight.start * factor, end=weight.end * factor)
    else:
        weight = weight * factor
    return dataclasses.replace(term, weight=weight)


def preparing(stage: Stage, before: list[Stage]) -> list[Stage]:
    """The stage in which losses of `stage` that want it are prepared alone, unless one before did."""
    done = {term.name for earlier in before for term in earlier.terms}
    wanted = [(term, term.loss.preparation()) for term in stage.terms if term.name not in done]
    waiting = [(term, *prior) for term, prior in wanted if prior is not None]
    if not waiting:
        return []
    terms = tuple(dataclasses.replace(term, loss=loss, weight=1.0, gate=None, where=None) for term, loss, _ in waiting)
    prepare = Stage(name="prepare", terms=terms, optim=stage.optim, trains=(), rows=stage.rows, compressors=stage.compressors)
    return [prepare.with_epochs(max(epochs for _, _, epochs in waiting))]


class Scheme:
    """How terms are laid out in stages. Subclasses are frozen pytree dataclasses registered in group `scheme`."""

    def frozen(self) -> dict[str, Overrides]:
        """The frozen networks by name, each as changes to the group `teacher`; none where a scheme trains its own."""
        return {"teacher": {}}

    def trained(self) -> dict[str, tuple[str, Overrides]]:
        """Further networks that are trained in the run: name -> (group, changes to it)."""
        return {}

    def branches(self, student: Outputs, classes: int) -> tuple[Learner, ...]:
        """Further networks that read the student's features."""
        del student, classes
        return ()

    def stages(self, setting: Setting) -> tuple[Stage, ...]:
        """The stages that train the student, before any compression."""
        raise NotImplementedError

    def arrays(self, label: np.ndarray) -> dict[str, np.ndarray]:
        """Further arrays [N, ...] of the training set, from its labels, for the batches."""
        del label
        return {}

    def groups(self, classes: int) -> dict[str, tuple[int, ...]]:
        """Groups of classes by name, whose test accuracy is reported apart."""
        del classes
        return {}
