"""One config, one run folder: teacher, training, artifact, measurements, `result.json` written last."""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jdistill import blueprint as blueprints
from jdistill.blueprint import Blueprint
from jdistill.checkpoint import first_line, write_json
from jdistill.compress import apply_all
from jdistill.compress.artifact import count_nonzero, read_artifact, restore_structure, write_artifact
from jdistill.config import fingerprint
from jdistill.environment import CompileClock, environment, peak_memory
from jdistill.errors import RunError, UsageError
from jdistill.fit import Diverged, Fitted, Interrupted, fit, sample_of
from jdistill.measure import latency
from jdistill.tasks.classification import metrics
from jdistill.teachers.store import Teacher, prepare
from jdistill.train import abstract_outputs, features_read, predict
from jdistill.training import Progress, Stop, choose_strategy, initial_state, never, silent, training
from jdistill.types import PyTree


def run(
    config: dict[str, Any],
    folder: Path,
    *,
    choices: dict[str, str] | None = None,
    overrides: list[str] | None = None,
    stop: Stop = never,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Carries a run out in `folder`, or returns the result that is already there.

    A run that was stopped goes on from its last checkpoint, bit for bit. A run that fails writes a `result.json`
    that says why, and raises.

    Raises:
      UsageError: the config is wrong (nothing has been trained).
      RunError: the run failed.
      Interrupted: `stop()` said so.
    """
    from filelock import FileLock

    blueprint = blueprints.read(config)
    folder.mkdir(parents=True, exist_ok=True)
    identity = fingerprint(config)
    about = {
        "fingerprint": identity,
        "choices": choices or {},
        "config": config,
        "overrides": overrides or [],
    }
    with FileLock(folder / ".lock"):
        done = finished(folder, identity)
        if done is not None and not config["force"]:
            return done
        _clean(folder, identity, config["force"])
        tracker, started = blueprint.tracker, time.perf_counter()
        listener = tracker.start(folder, identity, config)
        try:
            result = {"status": "finished", "error": None, **about}
            result |= _train_and_measure(blueprint, folder, started, (listener,) if listener else (), stop, progress)
        except Interrupted:
            raise
        except Exception as error:
            status = "diverged" if isinstance(error, Diverged) else "failed"
            result = {"status": status, "error": first_line(error), **about, "environment": environment()}
            write_json(folder / "result.json", result)
            tracker.finish(result)
            raise
        write_json(folder / "result.json", result)
        tracker.finish(result)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        return result


def finished(folder: Path, identity: str | None = None) -> dict[str, Any] | None:
    """The result of a finished run in `folder` (of the config `identity`), or None; a damaged file counts as none."""
    try:
        result = json.loads((folder / "result.json").read_text())
    except (OSError, ValueError):
        return None
    same = identity is None or result.get("fingerprint") == identity
    return result if same and result.get("status") == "finished" else None


def _clean(folder: Path, identity: str, force: bool) -> None:
    """Leaves only what continues this very run: another config's remains, and a result to be repeated, go.

    A forced run that was stopped has no result yet, so it continues too.
    """
    mark = folder / ".fingerprint"
    repeat = force and (folder / "result.json").is_file()
    if repeat or not mark.is_file() or mark.read_text() != identity:
        if not force and finished(folder) is not None:
            raise UsageError(f"{folder} holds a finished run of another config; choose another folder, or force=true")
        for name in ("checkpoints", "metrics.jsonl", "artifact.safetensors"):
            path = folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    (folder / "result.json").unlink(missing_ok=True)
    mark.write_text(identity)


def _train_and_measure(
    blueprint: Blueprint, folder: Path, started: float, listeners: tuple[Any, ...], stop: Stop, progress: Progress
) -> dict[str, Any]:
    CompileClock.start()
    compiling, config = CompileClock.seconds, blueprint.config
    parts = blueprint.parts(None)
    initial = initial_state(blueprint, parts, config["seed"])
    teacher, frozen = None, {}
    if blueprint.needs_teacher:
        teacher = prepare(blueprint, _features(blueprint, initial), stop, progress)
        variables = jax.tree.map(jnp.copy, (initial.params["student"], initial.model_state["student"]))
        target, arrays = blueprint.scheme.target(teacher.target, teacher.arrays, blueprint.student, variables)
        parts, frozen = blueprint.parts(target), {"teacher": arrays}
    strategy = choose_strategy(blueprint, initial)
    prepared, compiled = time.perf_counter(), CompileClock.seconds
    select = None if config["report"] == "last" else blueprint.task.primary
    setup = training(
        blueprint, blueprint.method(), parts, frozen, initial, config["seed"], folder,
        listeners=listeners, select=select, stop=stop, progress=progress,
    )  # fmt: skip
    fitted = fit(setup)
    trained, compiled_train = time.perf_counter(), CompileClock.seconds
    measured = _measure(blueprint, fitted, teacher, folder)
    ended = time.perf_counter()
    return {
        **measured,
        "report": config["report"],
        "epoch": fitted.epoch,
        "steps": int(fitted.state.step),
        "examples_per_second": fitted.examples / fitted.seconds if fitted.seconds else None,
        "time_s": {
            "total": ended - started,
            "teacher": prepared - started - (compiled - compiling),
            "compile": CompileClock.seconds - compiling,
            "train": trained - prepared - (compiled_train - compiled),
            "evaluate": ended - trained - (CompileClock.seconds - compiled_train),
        },
        "peak_memory_bytes": peak_memory(),
        "strategy": {"name": strategy[0], "reason": strategy[1], "resident": setup.resident},
        "teacher": teacher.record if teacher else None,
        "data": _describe(blueprint),
        "environment": environment(),
    }


def _features(blueprint: Blueprint, initial: Any) -> frozenset[str]:
    """The teacher's features that any stage reads."""
    sample = sample_of(blueprint.dataset.train)
    inputs = jax.eval_shape(blueprint.dataset.preprocess, sample["inputs"])
    target, arrays = blueprints.abstract_teacher(blueprint, inputs)
    parts, frozen = blueprint.parts(target), {"teacher": arrays}
    names: set[str] = set()
    for stage in blueprint.method().stages:
        outputs = abstract_outputs(parts, initial, sample, frozen, stage)
        params = {
            term.name: jax.eval_shape(
                lambda term=term, outputs=outputs: term.loss.init(
                    jax.random.key(0), outputs[term.learner], outputs.get(term.teacher)
                )
            )
            for term in stage.terms
        }
        names |= features_read(stage, outputs, params, sample).get("teacher", set())
    return frozenset(names)


def _measure(blueprint: Blueprint, fitted: Fitted, teacher: Teacher | None, folder: Path) -> dict[str, Any]:
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

    reference = teacher.test_logits if teacher else None
    logits = predict(model, dataset.preprocess, variables, dataset.test["inputs"])
    results = {"train": fitted.train_metrics, "test": metrics(logits, dataset.test["label"], reference)}
    if len(dataset.validation["label"]):
        validation = predict(model, dataset.preprocess, variables, dataset.validation["inputs"])
        results["validation"] = metrics(validation, dataset.validation["label"])
    if config["evaluate"]["predictions"]:
        arrays = {"ids": dataset.test["index"], "label": dataset.test["label"], "logits": logits}
        arrays |= {"teacher_logits": reference} if reference is not None else {}
        np.savez(folder / "predictions.npz", **arrays)  # type: ignore[arg-type]
    out = {
        "metrics": results,
        "size": {"parameters": parameters, "nonzero": nonzero, "bytes": size, "sha256": _sha256(path)},
        "latency_ms": {},
    }
    if config["evaluate"]["latency"]:
        out["latency_ms"] = latency(model, dataset.preprocess, variables, dataset.test["inputs"], config["evaluate"]["repeats"])
    return out


def _reload(path: Path, like: tuple[PyTree, PyTree]) -> tuple[PyTree, PyTree]:
    params, state, _ = read_artifact(path)
    return tuple(  # type: ignore[return-value]
        jax.tree.map(jnp.asarray, restore_structure(saved, wanted)) for saved, wanted in zip((params, state), like, strict=True)
    )


def _sha256(path: Path) -> str:
    import hashlib

    return hashlib.sha256(path.read_bytes()).hexdigest()


def _describe(blueprint: Blueprint) -> dict[str, Any]:
    dataset = blueprint.dataset
    sizes = {name: len(getattr(dataset, name)["label"]) for name in ("train", "validation", "test")}
    return {"name": dataset.name, "classes": dataset.classes, **sizes, "checksums": dataset.checksums}


__all__ = ["RunError", "finished", "run"]
