"""A loss under test: the problems and compiled programs that several properties share."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from jdistill.losses.base import Loss
from jdistill.pytrees import structure_key
from jdistill.testing.problem import Arrays, Problem, Weights, asks, draw_batch, make_problem, read_by, small
from jdistill.testing.requests import Shop, shop_for
from jdistill.types import Model, Outputs, PyTree

EXTREME = 1e4
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
"""Compiles a third faster; for programs that run a few times."""


@dataclasses.dataclass(frozen=True)
class Subject:
    """A loss under test, with the problems and programs that several properties share; `notes` is what they leave.

    With `execute` what is else only traced is run as well.
    """

    loss: Loss
    execute: bool = False
    notes: dict[str, Any] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def runs_without_teacher(self) -> bool:
        """Whether the loss is usable where there is no teacher."""
        return self._runs(teacher_given=False, requests=self.shop is not None)

    @functools.cached_property
    def runs_without_initial(self) -> bool:
        """Whether the loss is usable where the context has no `initial`."""
        return self._runs(teacher_given=self.given, initial_given=False, requests=self.shop is not None)

    @functools.cached_property
    def given(self) -> bool:
        """Whether there is a teacher here: also for a loss that wrongly says that it needs none."""
        return self.loss.needs_teacher or not self.runs_without_teacher

    @functools.cached_property
    def shop(self) -> Shop | None:
        """What requests are made of, None for a loss of classes; also for one that wrongly says that it needs no requests."""
        wrongly = not asks(self.loss) and not self.runs_on_classes and self._runs(requests=True)
        return shop_for(self.loss) if asks(self.loss) or wrongly else None

    @functools.cached_property
    def runs_on_classes(self) -> bool:
        """Whether it is usable where there are no requests."""
        return not self.loss.drawn and self._runs(requests=False)

    @functools.cached_property
    def reads(self) -> set[str]:
        return read_by(self.problem(tables=False))

    @functools.cached_property
    def calls_a_network(self) -> bool:
        return bool(self.reads & {"student_network", "teacher_network"})

    @property
    def runs_networks(self) -> bool:
        """Whether a table of outputs is not enough to try it on: it calls a network, or has items drawn and scored."""
        return self.calls_a_network or bool(self.loss.drawn)

    @functools.cached_property
    def plain(self) -> Problem:
        """Three classes in float32."""
        return self.of(3, jnp.float32)

    @functools.cached_property
    def at_plain(self) -> Callable[..., Any]:
        return value_and_gradients(self.plain)

    @functools.cached_property
    def first(self) -> Any:
        """Values of the plain problem."""
        return self.at_plain(self.plain.params, self.plain.state, self.plain.arrays)[0][1][0]

    @functools.cached_property
    def wide(self) -> tuple[Problem, Callable[..., Any]]:
        """The problem and its program in float64; read under `jax.enable_x64`."""
        problem = self.problem(dtype=jnp.float64, wide=jnp.float64)
        return problem, value_and_gradients(problem, quick=True)

    @functools.cached_property
    def is_default(self) -> bool:
        """Whether the switches are the class's own: what a class denies need not hold for every setting."""
        return all(
            getattr(self.loss, field.name) == field.default
            for field in dataclasses.fields(self.loss)  # type: ignore[arg-type]
            if field.metadata.get("static") and field.default is not dataclasses.MISSING
        )

    def of(self, classes: int, dtype: Any) -> Problem:
        """The problem of so many classes in that precision."""
        key = f"{classes} {jnp.dtype(dtype).name}"
        if key not in self.notes:
            self.notes[key] = self.problem(classes=classes, dtype=dtype)
        return self.notes[key]

    def pair(self, *kinds: tuple[bool, int]) -> tuple[Model, ...]:
        """Networks for a problem: with maps (or embeddings) or without, each of a width."""
        return tuple(small(self.shop, 3, maps, width) for maps, width in kinds)

    def problem(self, *, tables: bool | None = None, **options: Any) -> Problem:
        """A problem, with the networks' outputs as arrays (`tables`; None: where these are enough)."""
        initial = self.loss.reads_initial or not self.runs_without_initial
        options |= {"requests": self.shop is not None}
        problem = make_problem(self.loss, teacher_given=self.given, initial_given=initial, **options)
        tables = not self.runs_networks if tables is None else tables
        return dataclasses.replace(problem, arrays=problem.as_tables(problem.arrays)) if tables else problem

    def another_batch(self, problem: Problem) -> Arrays:
        """The arrays of a batch that shares the last row alone."""
        arrays = problem.weights._replace(batch=draw_batch(1, 3, shop=self.shop))
        return arrays if self.runs_networks else problem.as_tables(arrays)

    def _runs(self, **given: bool) -> bool:
        try:
            problem = make_problem(self.loss, **given)  # type: ignore[arg-type]
            jax.eval_shape(problem.evaluate, problem.params, problem.state, problem.arrays)
        except Exception:
            return False
        return True


def mean_of(problem: Problem, params: PyTree, state: PyTree, arrays: Arrays) -> tuple[Any, tuple[Any, PyTree]]:
    """What training differentiates, then values and next state."""
    values, after = problem.evaluate(params, state, arrays)
    return values.mean(), (values, after)


def value_and_gradients(problem: Problem, quick: bool = False) -> Callable[..., Any]:
    """Compiled: (params, state, arrays) -> ((mean, (values, state)), gradients by parameters, student and teacher)."""

    @functools.partial(jax.jit, compiler_options=QUICK if quick else None)
    def program(params: PyTree, state: PyTree, arrays: Arrays) -> Any:
        def mean(params: PyTree, student: PyTree, teacher: PyTree) -> Any:
            return mean_of(problem, params, state, arrays._replace(student=student, teacher=teacher))

        return jax.value_and_grad(mean, argnums=(0, 1, 2), has_aux=True)(params, arrays.student, arrays.teacher)

    return program


def extremes(problem: Problem) -> Iterator[tuple[str, Arrays]]:
    """Arrays at which norms, logarithms and exponentials go wrong, and what to call them."""
    arrays, equal = problem.arrays, equal_networks(problem)

    def large(given: Any, sign: float = 1.0) -> Any:
        if isinstance(given, Weights):
            return given._replace(scale=jnp.asarray(sign * EXTREME, given.scale.dtype))
        return jax.tree.map(lambda x: jnp.where(x > 0, sign * EXTREME, -sign * EXTREME).astype(x.dtype), given)

    def none(given: Any) -> Any:
        if isinstance(given, Weights):
            return given._replace(scale=jnp.zeros_like(given.scale))
        return jax.tree.map(jnp.zeros_like, given)

    student, teacher = arrays.student, arrays.teacher
    yield "student = teacher", equal
    yield "student = teacher, both large", equal._replace(student=large(equal.student), teacher=large(teacher))
    yield "both large", arrays._replace(student=large(student), teacher=large(teacher))
    yield "both large, of opposite signs", arrays._replace(student=large(equal.student, -1), teacher=large(teacher))
    yield "a student of zeros", arrays._replace(student=none(student), teacher=large(teacher))
    yield "a teacher of zeros", arrays._replace(student=large(student), teacher=none(teacher))
    yield "both of zeros", arrays._replace(student=none(student), teacher=none(teacher))


def equal_networks(problem: Problem) -> Arrays:
    """The arrays with the teacher's in the student's place, as far as the student has the like."""
    arrays = problem.arrays
    student, teacher = arrays.student, arrays.teacher
    if isinstance(student, Outputs) and isinstance(teacher, Outputs):
        features = {name: teacher.features.get(name, own) for name, own in student.features.items()}
        return arrays._replace(student=Outputs(teacher.logits, features))
    if structure_key(student) == structure_key(teacher):
        return arrays._replace(student=teacher)
    return arrays
