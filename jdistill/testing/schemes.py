"""A loss under every scheme: all stages of a tiny training, traced on shapes or really run for a step each."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jdistill.errors import UsageError
from jdistill.losses import CrossEntropy
from jdistill.losses.base import Loss
from jdistill.method import Stage, Term
from jdistill.optim import Optimizer
from jdistill.pytrees import as_leaves
from jdistill.registry import build, options
from jdistill.schemes import Scheme, Setting
from jdistill.schemes.base import preparing
from jdistill.stages import abstract, enter_stage, init_state, leave_stage
from jdistill.teachers.targets import Live, Target
from jdistill.testing.problem import SIZE, asks, draw_batch, labels, small
from jdistill.testing.requests import Shop, known_with, shop_for
from jdistill.train import Learner, Parts, make_step
from jdistill.types import Batch, Model, PyTree

CLASSES = 6  # three in each group of scheme=continual, which logit standardisation needs
FORMS: tuple[dict[str, Any], ...] = (
    {"name": "self", "form": "heads"},
    {"name": "self", "form": "average"},
    {"name": "fine_tune", "body": "low_rank"},
    {"name": "multi_teacher", "gate": "confidence"},
)
"""Further settings of schemes, beside each one's default."""


OF_CLASSES = ("continual",)
"""Schemes that divide the classes, which requests have none of."""


class Refused(Exception):
    """The loss cannot be used so: it adapts the student to one frozen teacher, or draws from such a one's ranking."""


def settings(loss: Loss) -> Iterator[dict[str, Any]]:
    """Every registered scheme, and `FORMS`; for requests without `OF_CLASSES`."""
    names = [name for name in options("scheme") if not (asks(loss) and name in OF_CLASSES)]
    yield from ({"name": name} for name in names)
    yield from FORMS


def describe(setting: dict[str, Any]) -> str:
    """`self form=heads`."""
    return " ".join([setting["name"], *(f"{key}={value}" for key, value in setting.items() if key != "name")])


def train_under(setting: dict[str, Any], loss: Loss, execute: bool = False) -> None:
    """Traces every stage of a training with `loss`; with `execute` takes a step of each.

    Raises:
      Refused: the loss adapts the student or needs requests, and this scheme cannot have such a one.
      AssertionError: a step gave a number that is not finite, in the objective or in a parameter.
    """
    try:
        _train_under(setting, loss, execute)
    except UsageError as error:
        if (type(loss).adapt is Loss.adapt and not asks(loss)) or setting == {"name": "offline"}:
            raise
        raise Refused(str(error)) from error


def _train_under(setting: dict[str, Any], loss: Loss, execute: bool) -> None:
    scheme: Scheme = build("scheme", setting)
    shop = shop_for(loss) if asks(loss) else None
    student, teacher = small(shop, CLASSES), small(shop, CLASSES)
    frozen_names = tuple(scheme.frozen()) if loss.needs_teacher else ()
    student = loss.adapt(student, teacher if len(frozen_names) == 1 and not scheme.trained() else None)
    batch = draw_batch(0, CLASSES, shop=shop)
    method = _stages(scheme, loss, student, batch)
    parts = _parts(scheme, loss, student, teacher, frozen_names, batch)
    batch |= {name: array[:SIZE] for name, array in scheme.arrays(np.asarray(labels(CLASSES, shop))).items()}

    def train(key: Any, batch: Any) -> tuple[PyTree, PyTree]:
        variables = {name: model.init(key, batch["inputs"]) for name, model in (("student", student), ("teacher", teacher))}
        frozen = {name: variables["student" if name == "initial" else "teacher"] for name, _ in parts.targets}
        frozen |= _tables(shop, teacher, frozen_names)
        state, before = init_state(parts, key, batch), None
        metrics: dict[str, Any] = {}
        if frozen_names:
            adopted = loss.adopt(state.model_state["student"], variables["teacher"])
            state = dataclasses.replace(state, model_state={**state.model_state, "student": adopted})
        step = make_step(parts)
        for stage in method:
            state = state if before is None else leave_stage(before, state)
            state = enter_stage(parts, stage, state, key, batch, frozen, labels(CLASSES, shop))
            state, metrics = step(state, frozen, batch, key, stage, (jnp.float32(2), jnp.float32(1)))
            before = stage
        return state.params, metrics

    if not execute:
        jax.eval_shape(train, jax.random.key(0), batch)
        return
    params, metrics = jax.jit(train)(jax.random.key(0), batch)
    for leaf in jax.tree.leaves((params, metrics)):
        assert bool(np.isfinite(np.asarray(leaf)).all()), "a parameter or the objective is not finite after a step"


def _tables(shop: Shop | None, teacher: Model, frozen_names: tuple[str, ...]) -> dict[str, Any]:
    """What losses on requests draw from, as training keeps it beside the frozen networks."""
    if shop is None:
        return {}
    known = known_with(shop, teacher if frozen_names else None)
    rankings = {} if known.ranking is None else dict.fromkeys(frozen_names, known.ranking)
    return {"tables": {"known": known._replace(ranking=None), "rankings": rankings}}


def _stages(scheme: Scheme, loss: Loss, student: Model, batch: Batch) -> tuple[Stage, ...]:
    outputs = abstract(student, batch["inputs"])
    setting = Setting(
        task=Term(name="cross_entropy", loss=CrossEntropy()),
        distil=Term(name="loss", teacher="teacher" if loss.needs_teacher else None, loss=loss),
        optim=Optimizer(batch_size=SIZE, epochs=1),
        classes=CLASSES,
        student=outputs,
    )
    stages: list[Stage] = []
    for stage in scheme.stages(setting):
        stages += [*preparing(stage, stages), stage]
    return tuple(as_leaves(stage) for stage in stages)


def _parts(scheme: Scheme, loss: Loss, student: Model, teacher: Model, frozen_names: tuple[str, ...], batch: Batch) -> Parts:
    outputs = abstract(student, batch["inputs"])
    of_group = {"student": student, "teacher": teacher}
    learners = (
        Learner("student", student),
        *(Learner(name, of_group[group]) for name, (group, _) in scheme.trained().items()),
        *scheme.branches(outputs, CLASSES),
    )
    targets: dict[str, Target] = {name: Live(teacher) for name in frozen_names}
    if loss.reads_initial:
        targets["initial"] = Live(student)
    return Parts(learners, tuple(targets.items()), _same, None, _nothing)


def _same(inputs: Any) -> Any:
    return inputs


def _nothing(outputs: Any, batch: Any) -> dict[str, Any]:
    del outputs, batch
    return {}
