"""Teachers: trained once for each content hash of their own config, kept with a manifest, shared by all jobs."""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jdistill import config as configs
from jdistill.blueprint import Blueprint, labels
from jdistill.checkpoint import Checkpoints, restore, save, write_json
from jdistill.compress.artifact import read_artifact, restore_structure
from jdistill.data import Dataset, load_dataset
from jdistill.environment import environment
from jdistill.errors import RunError, UsageError
from jdistill.fit import fit_one
from jdistill.fitting import Member
from jdistill.method import Method, Stage
from jdistill.models.recommend.frozen import tabled
from jdistill.networks import network, optimizer, teacher_data, teacher_network
from jdistill.paths import cache_folder
from jdistill.ranking import teacher_ranking
from jdistill.records import MetricsFile
from jdistill.sampling import Ranking
from jdistill.schemes import Offline
from jdistill.tasks.base import Answer, Sampler
from jdistill.teachers.given import given_logits
from jdistill.teachers.saved import read_manifest, require_fit
from jdistill.teachers.targets import Live, Lookup, Target
from jdistill.teachers.translated import maps_between, with_maps
from jdistill.train import EVAL_CHUNK, Keys, Learner, Parts
from jdistill.training import Progress, Stop, initial_state, never, silent, training
from jdistill.types import Model, Outputs, PyTree

CACHED_OUTPUT_BYTES = 1e9


class Teacher(NamedTuple):
    """A teacher ready to be learned from.

    Attributes:
      target, arrays: the frozen function of a batch, and its arrays.
      variables: the network's `(params, state)`, or None for given logits.
      answer: what it says about the test split, or None where unknown (precomputed training logits).
      record: what `result.json` says of it.
      ranking: of the items of the training set, where losses draw from it.
    """

    target: Target
    arrays: PyTree
    variables: PyTree
    answer: Answer | None
    record: dict[str, Any]
    ranking: Ranking | None = None


def teacher_folder(config: dict[str, Any]) -> Path:
    """Where the teacher of a config is kept."""
    return cache_folder(config["cache"]) / "teachers" / f"{config['teacher']['name']}-{configs.teacher_fingerprint(config)}"


def weights(blueprint: Blueprint, *, stop: Stop = never, progress: Progress = silent) -> tuple[PyTree, dict[str, Any]]:
    """The parameters of the teacher of a run, trained now if need be, and its record: for a student that inherits them."""
    folder = _found(blueprint, stop, progress)
    node, manifest, _, (params, _) = _saved(folder, blueprint.config, blueprint.outputs, blueprint.dataset)
    return params, _record(node, manifest, folder, "none")


def _saved(
    folder: Path, config: dict[str, Any], outputs: int, dataset: Dataset
) -> tuple[dict[str, Any], dict[str, Any], Dataset, tuple[PyTree, PyTree]]:
    """(network node, manifest, the data that the teacher learned, its `(params, state)`) of a folder."""
    own, width = teacher_data(config, outputs, dataset)
    node, manifest = read_manifest(folder)
    require_fit(folder, manifest, width, own.input_shape)
    return node, manifest, own, _load(folder, network("teacher", node, width, own), own, manifest)


def _found(blueprint: Blueprint, stop: Stop, progress: Progress) -> Path:
    """The folder of the teacher, after it has been trained there."""
    given = blueprint.config["teacher"]["checkpoint"]
    folder = Path(given) if given else teacher_folder(blueprint.config)
    if not given and not (folder / "manifest.json").is_file():
        _train_once(blueprint, folder, stop, progress)
    return folder


def prepare(
    blueprint: Blueprint,
    features: frozenset[str],
    *,
    live: bool = False,
    depth: tuple[int, int] = (0, 0),
    stop: Stop = never,
    progress: Progress = silent,
) -> Teacher:
    """The teacher of a run: given, loaded, or trained now (one process trains, others wait for it).

    `features` are the names of teacher features that the losses read; where no augmentation changes them, they and the
    logits are computed once for the whole training set, unless it is to be `live`, for a loss that calls the network. Of
    a recommender's logits the vectors of users and items are, where a user's requests differ in their candidates alone.
    `depth` is how many items of each user and users of each item it ranks, for losses that draw from its ranking.
    """
    config = blueprint.config
    if config["teacher"]["name"] == "logits":
        return _precomputed(configs.option("teacher", config), blueprint)
    folder = _found(blueprint, stop, progress)
    nodes = json.dumps(configs.without({group: config[group] for group in ("data", "task", "teacher")}, ("task.weight",)))
    return _ready(str(folder), _stamp(folder), nodes, blueprint.outputs, features, live, depth)


def _stamp(folder: Path) -> int:
    """Changes when the teacher in a folder is replaced, so that what is kept in memory is not stale."""
    for name in ("manifest.json", "result.json"):
        if (folder / name).is_file():
            return (folder / name).stat().st_mtime_ns
    return 0


# -- training


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    from filelock import FileLock

    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        yield


def _train_once(blueprint: Blueprint, folder: Path, stop: Stop, progress: Progress) -> None:
    config = configs.teaching(blueprint.config)
    alone = blueprint.parallel.alone  # the other processes wait for the lock
    task = configs.option("task", config)
    dataset = load_dataset(config)
    outputs = task.width(dataset)
    blueprint = dataclasses.replace(
        blueprint, config=config, dataset=dataset, task=task, outputs=outputs, parallel=alone, scheme=Offline()
    )
    with _locked(folder):
        if (folder / "manifest.json").is_file():
            return  # another process trained it while this one waited
        shutil.rmtree(folder, ignore_errors=True)
        partial = folder.with_name(f"{folder.name}.partial")
        if not (partial / "manifest.json").is_file():  # written last: a kill may come between it and the new name
            _train(blueprint, partial, stop, progress)
        shutil.rmtree(partial / "checkpoints", ignore_errors=True)
        os.replace(partial, folder)


def _train(blueprint: Blueprint, folder: Path, stop: Stop, progress: Progress) -> None:
    started = time.perf_counter()
    node, dataset = blueprint.config["teacher"], blueprint.dataset
    model = network("teacher", node, blueprint.outputs, dataset)
    optim = optimizer("teacher.optim", node["optim"])
    task = blueprint.task
    stages = (Stage(name="teacher", terms=(labels(task),), optim=optim),)
    learners = (Learner("student", model),)
    parts = Parts(learners, (), dataset.preprocess, dataset.augment, task.observe, sampler=task.sampler(dataset))
    seed = int(node["seed"])
    initial = initial_state(blueprint, parts, seed)
    member = Member(Method(stages=stages), Keys.of(seed), MetricsFile(folder / "metrics.jsonl"), initial)
    checkpoints = Checkpoints(folder / "checkpoints")
    fitted = fit_one(training(blueprint, (member,), parts, {}, checkpoints, stop=stop, progress=progress))
    test = task.metrics(task.answer(model, dataset, fitted.variables, "test"), dataset, "test")
    save(folder / "checkpoint", fitted.variables)
    leaves = jax.tree.leaves(fitted.variables[0])
    config = {group: blueprint.config[group] for group in ("teacher", "data", "task")}
    write_json(
        folder / "manifest.json",
        {
            "hash": configs.teacher_fingerprint(blueprint.config),
            "config": config,
            "outputs": blueprint.outputs,
            "input_shape": dataset.input_shape,
            "primary": task.primary,
            "metrics": {"train": fitted.train_metrics, "test": test},
            "parameters": sum(leaf.size for leaf in leaves),
            "bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(fitted.variables)),
            "checksum": checksum(fitted.variables),
            "time_s": time.perf_counter() - started,
            "data": {"name": dataset.name, "checksums": dataset.checksums},
            "environment": environment(),
        },
    )


def checksum(tree: PyTree) -> str:
    """SHA-256 of the leaves' bytes in order."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()


# -- loading


@functools.lru_cache(maxsize=16)
def _ready(
    folder: str, stamp: int, nodes: str, outputs: int, features: frozenset[str], live: bool, depth: tuple[int, int]
) -> Teacher:
    config = json.loads(nodes)
    dataset, task = load_dataset(config), configs.option("task", config)
    node, manifest, own, variables = _saved(Path(folder), config, outputs, dataset)
    model = teacher_network(config, outputs, dataset)
    if own is not dataset and (maps := maps_between(dataset, own)) is not None:
        variables = with_maps(variables, maps)
    target, arrays = _target(model, variables, dataset, features, task.sampler(dataset), live)
    record = _record(node, manifest, Path(folder), "live" if arrays is variables else "cached")
    test = task.answer(model, dataset, variables, "test")
    ranking = teacher_ranking(model, dataset, variables, *depth) if any(depth) else None
    return Teacher(target, arrays, variables, test, record, ranking)


def _record(node: dict[str, Any], manifest: dict[str, Any], folder: Path, outputs: str) -> dict[str, Any]:
    """What `result.json` says of a teacher."""
    return {
        "name": node["name"],
        "hash": manifest["hash"],
        "folder": str(folder),
        "metrics": manifest["metrics"],
        "parameters": manifest["parameters"],
        "bytes": manifest.get("bytes") or manifest["size"]["bytes"],
        "outputs": outputs,
    }


def _load(folder: Path, model: Model, dataset: Dataset, manifest: dict[str, Any]) -> tuple[PyTree, PyTree]:
    like = jax.eval_shape(lambda: model.init(jax.random.key(0), dataset.example))
    if not (folder / "manifest.json").is_file():
        path = folder / "artifact.safetensors"
        if hashlib.sha256(path.read_bytes()).hexdigest() != manifest["size"]["sha256"]:
            raise RunError(f"{path} differs from the checksum in the run's result.json; run it again with force=true")
        params, state, _ = read_artifact(path)
        if any(name.startswith("#") for name in params):
            raise UsageError(
                f"teacher.checkpoint {folder} holds a student with rounded activations, which cannot be a teacher; give a run "
                "without compression.activations"
            )
        try:
            return restore_structure(params, like[0]), restore_structure(state, like[1])
        except KeyError as error:
            raise UsageError(
                f"teacher.checkpoint {folder} holds a network that its loss changed (loss=simkd does), which cannot be a "
                "teacher; give another run, or leave teacher.checkpoint out"
            ) from error
    variables = restore(folder / "checkpoint", like)
    if checksum(variables) != manifest["checksum"]:
        raise RunError(f"the teacher in {folder} differs from its manifest's checksum; delete that folder to train it anew")
    return variables


def _target(
    model: Model, variables: Any, dataset: Dataset, features: frozenset[str], sampler: Sampler | None, live: bool
) -> tuple[Target, PyTree]:
    """What can be computed once and fits, else the network itself: see `prepare`."""
    if live or dataset.augment is not None:
        return Live(model), variables
    if sampler is not None:
        requests = sampler.everyone(dataset.tables)
        tables = None if requests is None else tabled(model, variables, requests, features, CACHED_OUTPUT_BYTES)
        model, variables = tables or (model, variables)
        return Live(model), variables
    inputs = dataset.train["inputs"]

    def some(variables: Any, raw: Any) -> Outputs:
        out = model.apply(*variables, dataset.preprocess(raw), train=False)[0]
        # Features that nothing reads keep their names, empty: a loss's default layer must not change with what is kept.
        kept = {name: f if name in features else f.reshape(f.shape[0], -1)[:, :0] for name, f in out.features.items()}
        return Outputs(out.logits, kept)

    shapes = jax.eval_shape(some, variables, jax.ShapeDtypeStruct((EVAL_CHUNK, *inputs.shape[1:]), inputs.dtype))
    total = sum(leaf.size * 4 for leaf in jax.tree.leaves(shapes)) / EVAL_CHUNK * len(inputs)
    if total > CACHED_OUTPUT_BYTES:
        return Live(model), variables
    forward = jax.jit(some)
    chunks = []
    for start in range(0, len(inputs), EVAL_CHUNK):
        chunk = inputs[start : start + EVAL_CHUNK]
        padded = np.concatenate([chunk, np.repeat(chunk[:1], EVAL_CHUNK - len(chunk), axis=0)])
        rows = len(chunk)
        chunks.append(jax.tree.map(lambda a, rows=rows: np.asarray(a)[:rows], forward(variables, padded)))
    return Lookup(), jax.tree.map(lambda *parts: jnp.asarray(np.concatenate(parts)), *chunks)


def _precomputed(path: Path, blueprint: Blueprint) -> Teacher:
    """A teacher that is a file of logits."""
    rows = given_logits(path, blueprint.dataset, blueprint.outputs)
    record = {
        "name": "logits",
        "hash": hashlib.sha256(rows.tobytes()).hexdigest()[:12],
        "folder": str(path),
        "metrics": {"train": blueprint.task.metrics(rows, blueprint.dataset, "train")},
        "parameters": None,
        "bytes": None,
        "outputs": "given",
    }
    return Teacher(Lookup(), Outputs(jnp.asarray(rows), {}), None, None, record)
