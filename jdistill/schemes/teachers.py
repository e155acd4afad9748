"""Several teachers at once, and a chain of assistants from teacher to student."""

import dataclasses
import itertools
from typing import Any

from jdistill.errors import UsageError
from jdistill.losses import HoldsGate
from jdistill.method import Gate, LearnedGate, Stage, Term
from jdistill.pytrees import pytree, require_nonnegative, require_one_of, static
from jdistill.registry import register
from jdistill.schemes.base import Overrides, Scheme, Setting, changes, counts, networks, times


@register("scheme", "multi_teacher")
@pytree
class MultiTeacher(Scheme):
    """Several frozen teachers, one distillation term each.

    For the KL divergence the mean of the terms has the gradient of one term towards the teachers' mean probabilities.

    Attributes:
      teachers: each teacher as changes to the group `teacher`: [{seed: 0}, {seed: 1}], [{}, {name: lenet}].
      weights: factors of the teachers' terms, at least 0; [] gives each 1 / number of teachers.
      gate: "none", or "confidence": each example is taught most by the teachers that are surest of its label (CA-MKD:
        Zhang et al. 2022, https://arxiv.org/abs/2201.00007, equation 3), times `weights` (1 each where not given);
        "learned": a softmax over all teachers' logits says each one's share, with parameters that learn with the student
        (see `LearnedGate`); without `weights`.
    """

    teachers: Any = static(default=({"seed": 0}, {"seed": 1}))
    weights: tuple[float, ...] = ()
    gate: str = static(default="none")

    def __post_init__(self) -> None:
        object.__setattr__(self, "teachers", networks("teachers", self.teachers))
        require_one_of(("none", "confidence", "learned"), gate=self.gate)
        if len(self.teachers) < 2:
            raise UsageError("teachers must be at least two; use scheme=offline for one")
        if self.weights and len(self.weights) != len(self.teachers):
            raise UsageError(f"weights must be one a teacher, got {len(self.weights)} for {len(self.teachers)} teachers")
        if self.weights and self.gate == "learned":
            raise UsageError("weights are learned with gate=learned; leave them out, or set gate=none or confidence")
        require_nonnegative(**{f"weights[{i}]": weight for i, weight in enumerate(self.weights)})

    def frozen(self) -> dict[str, Overrides]:
        return dict(zip(self._names(), changes(self.teachers), strict=True))

    def stages(self, setting: Setting) -> tuple[Stage, ...]:
        names = self._names()
        equal = 1 / len(names) if self.gate == "none" else 1.0
        weights = self.weights or (equal,) * len(names)
        distilling = setting.distilling(teachers=names)
        if len(distilling) == len(names):
            distilling = self._gated(tuple(times(term, weight) for term, weight in zip(distilling, weights, strict=True)))
        terms = tuple(term for term in (setting.task, *distilling) if counts(term))
        return (Stage(name="distil" if distilling else "train", terms=terms, optim=setting.optim),)

    def _gated(self, terms: tuple[Term, ...]) -> tuple[Term, ...]:
        """The terms under the scheme's gate; a learned one's parameters are those of the first term."""
        names = self._names()
        if self.gate == "none":
            return terms
        if self.gate == "confidence":
            return tuple(dataclasses.replace(term, gate=Gate(among=names)) for term in terms)
        first, *others = (dataclasses.replace(term, gate=LearnedGate(among=names, holder=terms[0].name)) for term in terms)
        return (dataclasses.replace(first, loss=HoldsGate(of=first.loss, teachers=len(names))), *others)

    def _names(self) -> tuple[str, ...]:
        return ("teacher", *(f"teacher{i}" for i in range(2, len(self.teachers) + 1)))


@register("scheme", "assistant")
@pytree
class Assistant(Scheme):
    """A chain: the teacher teaches an assistant of a size between, which then teaches the student (TAKD).

    Mirzadeh et al. 2020, https://arxiv.org/abs/1902.03393. Each member of the chain learns by the same terms and for as
    long as the student.

    Attributes:
      assistants: from the teacher's side, each as changes to the group `student`: [{widths: [96]}], [{name: resnet14}].
    """

    assistants: Any = static(default=({},))

    def __post_init__(self) -> None:
        object.__setattr__(self, "assistants", networks("assistants", self.assistants))

    def trained(self) -> dict[str, tuple[str, Overrides]]:
        return {name: ("student", change) for name, change in zip(self._names(), changes(self.assistants), strict=True)}

    def stages(self, setting: Setting) -> tuple[Stage, ...]:
        chain = ("teacher", *self._names(), "student")
        return tuple(
            Stage(name=learner, terms=setting.terms(learner, (teacher,)), optim=setting.optim, trains=(learner,))
            for teacher, learner in itertools.pairwise(chain)
        )

    def _names(self) -> tuple[str, ...]:
        return tuple(f"assistant{i}" for i in range(1, len(self.assistants) + 1))
