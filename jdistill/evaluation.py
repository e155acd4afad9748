"""A trained student as it is deployed: the artifact written, read back, and measured."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jdistill.blueprint import Blueprint
from jdistill.compress import apply_all
from jdistill.compress.artifact import count_nonzero, read_artifact, restore_structure, write_artifact
from jdistill.fitting import Fitted
from jdistill.machine import MACHINE
from jdistill.measure import latency
from jdistill.tasks.classification import as_two, log_probabilities, metrics
from jdistill.teachers.store import Teacher
from jdistill.train import predict
from jdistill.types import PyTree


class Deployed(NamedTuple):
    """What was measured of an artifact, and the network read back from it, `(params, state)`."""

    measured: dict[str, Any]
    variables: tuple[PyTree, PyTree]


def answers(teachers: dict[str, Teacher]) -> np.ndarray | None:
    """Logits [N, K] of the teacher on the test split; of several, the logarithm of their mean probabilities."""
    known = [teacher.test_logits for teacher in teachers.values() if teacher.test_logits is not None]
    if len(known) < 2:
        return known[0] if known else None
    log_p = np.stack([log_probabilities(logits) for logits in known])
    mean = np.logaddexp.reduce(log_p, axis=0) - np.log(len(known))
    return mean if known[0].shape[1] > 1 else mean[:, 1:] - mean[:, :1]


def deploy(blueprint: Blueprint, fitted: Fitted, reference: np.ndarray | None, folder: Path) -> Deployed:
    """Writes the artifact, reads it back, and measures what was read."""
    dataset, model, config = blueprint.dataset, blueprint.student, blueprint.config
    params, state = fitted.variables
    done = len(fitted.state.compressor_state)
    for compressor in blueprint.compressors[done:]:
        params = apply_all((compressor,), params, (compressor.init(params),))
    path = folder / "artifact.safetensors"
    about = {
        "student": config["student"], "outputs": blueprint.outputs,
        "input_shape": list(dataset.train["inputs"].shape[1:]),
        "preprocess": {"mean": list(dataset.mean), "std": list(dataset.std), "scale": dataset.scale},
    }  # fmt: skip
    size = write_artifact(path, blueprint.compressors, params, state, about)
    variables = _reload(path, fitted.variables)
    parameters, nonzero = count_nonzero(variables[0])

    logits = predict(model, dataset.preprocess, variables, dataset.test["inputs"])
    results = {"train": fitted.train_metrics, "test": metrics(logits, dataset.test["label"], reference)}
    label = dataset.test["label"]
    for name, classes in blueprint.scheme.groups(dataset.classes).items():
        rows = np.isin(label, classes)
        answers, known = as_two(logits)[rows], label[rows]
        within = np.asarray(classes)[answers[:, classes].argmax(-1)]
        results["test"] |= {
            f"accuracy_{name}": float((answers.argmax(-1) == known).mean()),
            f"accuracy_within_{name}": float((within == known).mean()),
        }
    arrays = {"ids": dataset.test["index"], "label": label, "logits": logits}
    arrays |= {"teacher_logits": reference} if reference is not None else {}
    if len(dataset.validation["label"]):
        validation = predict(model, dataset.preprocess, variables, dataset.validation["inputs"])
        results["validation"] = metrics(validation, dataset.validation["label"])
        arrays |= {"validation_label": dataset.validation["label"], "validation_logits": validation}
    if config["evaluate"]["predictions"]:
        np.savez(folder / "predictions.npz", **arrays)  # type: ignore[arg-type]
    measured = {
        "metrics": results,
        "size": {"parameters": parameters, "nonzero": nonzero, "bytes": size, "sha256": _sha256(path)},
    }
    return Deployed(measured, variables)


def latencies(blueprint: Blueprint, deployed: Sequence[Deployed]) -> list[dict[str, Any]]:
    """Latency of each network, or `{}` where the config asks for none; while this goes on no other thread computes."""
    evaluate, dataset = blueprint.config["evaluate"], blueprint.dataset
    if not evaluate["latency"]:
        return [{} for _ in deployed]
    inputs = dataset.test["inputs"]
    with MACHINE.quiet():
        return [latency(blueprint.student, dataset.preprocess, d.variables, inputs, evaluate["repeats"]) for d in deployed]


def _reload(path: Path, like: tuple[PyTree, PyTree]) -> tuple[PyTree, PyTree]:
    params, state, _ = read_artifact(path)
    return tuple(  # type: ignore[return-value]
        jax.tree.map(jnp.asarray, restore_structure(saved, wanted)) for saved, wanted in zip((params, state), like, strict=True)
    )


def _sha256(path: Path) -> str:
    import hashlib

    return hashlib.sha256(path.read_bytes()).hexdigest()
