"""A trained student as it is deployed: the artifact written, read back, and measured."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jdistill.blueprint import Blueprint
from jdistill.compress.artifact import count_nonzero, read_artifact, restore_structure, write_artifact
from jdistill.compress.base import Stored, Subject, finished
from jdistill.fitting import Fitted, sample_of
from jdistill.machine import MACHINE
from jdistill.measure import BATCHES, latency, memory_bytes, operations
from jdistill.stages import calibration_rows
from jdistill.tasks import Task
from jdistill.tasks.base import Answer
from jdistill.tasks.classification import as_two
from jdistill.teachers.store import Teacher
from jdistill.train import Keys
from jdistill.types import Model, PyTree


class Deployed(NamedTuple):
    """What was measured of an artifact, and the network read back from it, with its `(params, state)`."""

    measured: dict[str, Any]
    variables: tuple[PyTree, PyTree]
    model: Model


def answers(task: Task, teachers: dict[str, Teacher]) -> Answer | None:
    """What the teachers say about the test split."""
    known = [teacher.answer for teacher in teachers.values() if teacher.answer is not None]
    return task.combine(known) if known else None


def deploy(blueprint: Blueprint, fitted: Fitted, reference: Answer | None, folder: Path) -> Deployed:
    """Writes the artifact, reads it back, and measures what was read."""
    dataset, config, task = blueprint.dataset, blueprint.config, blueprint.task
    params, running = fitted.variables
    key = jax.random.fold_in(Keys.of(config["seed"]).init, 3000)
    stored = finished(blueprint.compressors, Stored(params, fitted.states), key, subject(blueprint, running))
    path = folder / "artifact.safetensors"
    about = {
        "student": config["student"], "outputs": blueprint.outputs,
        "input_shape": dataset.input_shape,
        "preprocess": {"mean": list(dataset.mean), "std": list(dataset.std), "scale": dataset.scale},
    }  # fmt: skip
    size = write_artifact(path, blueprint.compressors, stored, running, about, blueprint.student)
    model, variables = reload(blueprint, path)
    parameters, nonzero = count_nonzero(variables[0])

    answer = task.answer(model, dataset, variables, "test")
    results = {"train": fitted.train_metrics, "test": task.metrics(answer, dataset, "test", reference)}
    for name, classes in blueprint.scheme.groups(dataset.classes).items():
        results["test"] |= _of_group(name, classes, answer, dataset.test["label"])
    arrays = {"ids": dataset.test["index"], "label": dataset.test["label"], **task.arrays(answer)}
    if reference is not None:
        arrays |= {f"teacher_{name}": array for name, array in task.arrays(reference).items()}
    if len(dataset.validation["label"]):
        validation = task.answer(model, dataset, variables, "validation")
        results["validation"] = task.metrics(validation, dataset, "validation")
        arrays |= {f"validation_{name}": array for name, array in task.arrays(validation).items()}
        arrays["validation_label"] = dataset.validation["label"]
    if config["evaluate"]["predictions"]:
        np.savez(folder / "predictions.npz", **arrays)  # type: ignore[arg-type]
    measured = {
        "metrics": results,
        "size": {"parameters": parameters, "nonzero": nonzero, "bytes": size, "sha256": _sha256(path)},
        "cost": _cost(blueprint, model, variables),
    }
    return Deployed(measured, variables, model)


def _cost(blueprint: Blueprint, model: Model, variables: tuple[PyTree, PyTree]) -> dict[str, int | None]:
    """Operations of one example; and the memory of the largest batch, where the programs are compiled to be timed anyway."""
    given = model, blueprint.dataset.preprocess, variables, blueprint.dataset.test["inputs"]
    found = operations(*given)
    if blueprint.config["evaluate"]["latency"]:
        found["memory_bytes"] = memory_bytes(*given, max(BATCHES))
    return found


def _of_group(name: str, classes: Sequence[int], logits: np.ndarray, label: np.ndarray) -> dict[str, float]:
    """Accuracy on the examples of some classes: among all classes, and among those alone."""
    rows = np.isin(label, classes)
    found, known = as_two(logits)[rows], label[rows]
    within = np.asarray(classes)[found[:, classes].argmax(-1)]
    return {
        f"accuracy_{name}": float((found.argmax(-1) == known).mean()),
        f"accuracy_within_{name}": float((within == known).mean()),
    }


def latencies(blueprint: Blueprint, deployed: Sequence[Deployed]) -> list[dict[str, Any]]:
    """Latency of each network, or `{}` where the config asks for none; while this goes on no other thread computes."""
    evaluate, dataset = blueprint.config["evaluate"], blueprint.dataset
    if not evaluate["latency"]:
        return [{} for _ in deployed]
    inputs = dataset.test["inputs"]
    with MACHINE.quiet():
        return [latency(d.model, dataset.preprocess, d.variables, inputs, evaluate["repeats"]) for d in deployed]


def subject(blueprint: Blueprint, running: PyTree) -> Subject:
    """The student, for the steps that nothing is trained under."""
    data, parts = blueprint.arrays(), blueprint.parts({})
    rows = partial(calibration_rows, parts, data["inputs"], sample_of(data))
    return Subject(blueprint.student, blueprint.inputs, running, rows)


def reload(blueprint: Blueprint, path: Path) -> tuple[Model, tuple[PyTree, PyTree]]:
    """The network that an artifact of `blueprint`'s student holds, which may be a smaller one, and its `(params, state)`."""
    params, running, about = read_artifact(path)
    model = blueprint.resized(about["student"])
    if blueprint.estimator is not None:
        return model, jax.tree.map(jnp.asarray, (params, running))
    like = jax.eval_shape(lambda: model.init(jax.random.key(0), blueprint.inputs))
    variables = (restore_structure(saved, wanted) for saved, wanted in zip((params, running), like, strict=True))
    return model, jax.tree.map(jnp.asarray, tuple(variables))


def _sha256(path: Path) -> str:
    import hashlib

    return hashlib.sha256(path.read_bytes()).hexdigest()
