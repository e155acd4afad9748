"""Fitting a student that is no network: to labels, and to what a teacher says of the training rows."""

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jdistill.blueprint import Blueprint
from jdistill.compress.base import Training
from jdistill.errors import UsageError
from jdistill.fitting import Fitted, Member
from jdistill.networks import columns_kept
from jdistill.schemes import Offline
from jdistill.tasks import Regression, Task
from jdistill.tasks.classification import log_probabilities
from jdistill.teachers.store import Teacher
from jdistill.teachers.targets import Lookup
from jdistill.types import PyTree


def require_fittable(blueprint: Blueprint) -> None:
    """Raises `UsageError` for what only networks can do, where the student is none."""
    config = blueprint.config
    name, loss = f"student={config['student']['name']}", config["loss"]["name"]
    soft = "logit_mse" if isinstance(blueprint.task, Regression) else "kd"
    if loss not in ("none", soft):
        raise UsageError(
            f"{name} is fitted to labels and soft labels, not by gradients: set loss=none or loss={soft}, got loss={loss}"
        )
    if not isinstance(blueprint.scheme, Offline):
        raise UsageError(f"{name} is fitted once, got scheme={config['scheme']['name']}; set scheme=offline")
    training = [step.kind for step in blueprint.sequence if isinstance(step, Training)]
    if training != ["distill"] or any(compressor.recover_epochs for compressor in blueprint.compressors):
        raise UsageError(f"{name} is fitted once; leave recover_epochs at 0, and train and recover out of compression.steps")
    numbers = {
        "loss.weight": blueprint.weight,
        "loss.temperature": getattr(blueprint.loss, "temperature", 1.0),
        "task.weight": blueprint.task.weight,
        "task.label_smoothing": getattr(blueprint.task, "label_smoothing", 0.0),
    }
    for key, value in numbers.items():
        if not isinstance(value, int | float):
            raise UsageError(f"{key} is a schedule, but {name} is fitted once; give a number")


def fit_estimator(blueprint: Blueprint, member: Member, teachers: dict[str, Teacher], seed: int) -> Fitted:
    """The student fitted to (task.weight labels + loss.weight soft labels) / (their sum), as `fit` gives a network.

    Labels are smoothed by `task.label_smoothing`; soft labels are the teacher's probabilities at the loss's temperature,
    for numbers its predictions. The rows are those that `transfer.keep` and `transfer.omit` leave.
    """
    started, dataset, estimator = time.perf_counter(), blueprint.dataset, blueprint.estimator
    assert estimator is not None
    prepared = jax.jit(dataset.preprocess)  # as compiled for evaluation: the last bit may decide on which side of a threshold
    inputs = np.asarray(prepared(dataset.train["inputs"]))
    if dataset.privileged:
        inputs = inputs[..., columns_kept(dataset)]
    targets, (stage, *_) = _targets(blueprint, teachers), blueprint.method().stages
    if stage.rows is not None:  # transfer.keep, transfer.omit
        rows = stage.rows.select(dataset.train["label"])
        inputs, targets = inputs[rows], targets[rows]
    params = estimator.fit(inputs, targets, seed)
    variables: tuple[PyTree, PyTree] = jax.tree.map(jnp.asarray, params), {}
    answer = blueprint.task.answer(blueprint.student, dataset, variables, "train")
    train = blueprint.task.metrics(answer, dataset, "train")
    member.metrics.append({"stage": "fit", "epoch": 1, "step": 0, "train": train})
    return Fitted(member.initial, 0, variables, 1, train, time.perf_counter() - started, len(inputs))


def _targets(blueprint: Blueprint, teachers: dict[str, Teacher]) -> np.ndarray:
    dataset, label = blueprint.dataset, blueprint.dataset.train["label"]
    numbers = isinstance(blueprint.task, Regression)
    hard: Any = label.astype(np.float64) if numbers else _smoothed(np.eye(dataset.classes)[label], blueprint.task)
    if not teachers or blueprint.config["loss"]["name"] == "none":
        return hard
    logits = blueprint.task.combine([_on_training_rows(blueprint, teacher) for teacher in teachers.values()])
    assert logits is not None
    logits = np.asarray(logits, np.float64)
    soft = logits[:, 0] if numbers else np.exp(log_probabilities(logits / float(blueprint.loss.temperature)))  # type: ignore[attr-defined]
    own, weight = float(blueprint.task.weight), float(blueprint.weight)
    return (own * hard + weight * soft) / (own + weight)


def _smoothed(labels: np.ndarray, task: Task) -> np.ndarray:
    """What `CrossEntropy` compares with: (1 - label_smoothing) one-hot + label_smoothing / K."""
    smoothing = float(getattr(task, "label_smoothing", 0.0))
    return (1 - smoothing) * labels + smoothing / labels.shape[1]


def _on_training_rows(blueprint: Blueprint, teacher: Teacher) -> np.ndarray:
    """The teacher's logits [N, K] of the training rows."""
    if isinstance(teacher.target, Lookup):
        return np.asarray(teacher.arrays.logits)
    return blueprint.task.answer(teacher.target.model, blueprint.dataset, teacher.variables, "train")  # type: ignore[attr-defined]
