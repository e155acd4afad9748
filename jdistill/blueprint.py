"""A config as checked objects, before anything is trained: every usage error is found here."""

import dataclasses
import functools
import json
from typing import Any

import jax
import jax.numpy as jnp

from jdistill import config as configs
from jdistill.compress.base import Compressor
from jdistill.data import Dataset
from jdistill.errors import UsageError
from jdistill.fit import CheckpointPolicy, sample_of, steps_per_epoch
from jdistill.losses import Loss
from jdistill.method import Method, Scheme, Term
from jdistill.modules import as_model
from jdistill.optim import Optimizer
from jdistill.pytrees import as_leaves, structure_key
from jdistill.records import Tracker
from jdistill.registry import build
from jdistill.tasks.classification import Classification, hits
from jdistill.teachers.given import given_logits
from jdistill.teachers.saved import saved_teacher_node
from jdistill.teachers.targets import Live, Lookup, Target
from jdistill.train import Parts, enter_stage, init_state
from jdistill.types import Model, Outputs


@dataclasses.dataclass(frozen=True)
class Blueprint:
    """Everything a run's config describes."""

    config: dict[str, Any]
    dataset: Dataset
    task: Classification
    outputs: int
    student: Model
    teacher: Model | None
    loss: Loss
    weight: float
    scheme: Scheme
    compressors: tuple[Compressor, ...]
    optim: Optimizer
    parallel: configs.Single
    tracker: Tracker
    policy: CheckpointPolicy

    @property
    def needs_teacher(self) -> bool:
        return self.loss.needs_teacher

    @property
    def task_term(self) -> Term:
        return Term(name="cross_entropy", loss=self.task.loss(), weight=self.task.weight)

    def method(self) -> Method:
        """The stages of the student's training: the scheme's, then one for each compressor that recovers."""
        name = self.config["loss"]["name"]
        teacher = "teacher" if self.loss.needs_teacher else None
        distil = None if name == "none" else Term(name=name, teacher=teacher, loss=self.loss, weight=self.weight)
        stages = self.scheme.stages(self.task_term, distil, self.optim)
        for i, compressor in enumerate(self.compressors, start=1):
            if compressor.recover_epochs:
                recover = dataclasses.replace(stages[-1], name=f"recover{i}", compressors=self.compressors[:i])
                stages = (*stages, recover.with_epochs(compressor.recover_epochs))
        return Method(stages=stages)

    def parts(self, target: Target | None) -> Parts:
        """The program's parts for a student that learns from `target`."""
        targets = (("teacher", target),) if target is not None else ()
        return Parts((("student", self.student),), targets, self.dataset.preprocess, self.dataset.augment, hits)

    def group(self) -> tuple[Any, ...]:
        """Runs with equal groups run in one compiled program."""
        data = configs.without(self.config, configs.OPERATIONAL)["data"]
        teacher = configs.teacher_fingerprint(self.config) if self.needs_teacher else None
        return self.student, teacher, json.dumps(data, sort_keys=True), structure_key(as_leaves(self.method()))


@functools.lru_cache(maxsize=8)
def _dataset(node: str) -> Dataset:
    return build("data", json.loads(node))


def load_dataset(config: dict[str, Any]) -> Dataset:
    """The data set of a config, read once a process."""
    return _dataset(json.dumps(config["data"]))


def network(group: str, node: dict[str, Any], outputs: int) -> Model:
    """The network that a `teacher` or `student` node describes."""
    return as_model(build(group, node, outputs=outputs))


def has_network(node: dict[str, Any]) -> bool:
    """Whether a teacher node describes a network (and not logits or no teacher)."""
    return node["name"] not in ("none", "logits")


def optimizer(prefix: str, node: Any) -> Optimizer:
    """The optimizer of a config node."""
    if not isinstance(node, dict):
        raise UsageError(f"{prefix} must be one of the options of group optim, got {node!r}")
    try:
        return build("optim", node)
    except UsageError as error:
        raise UsageError(str(error).replace("optim.", f"{prefix}.", 1)) from error


def read(config: dict[str, Any]) -> Blueprint:
    """Builds and checks everything a config describes.

    Raises:
      UsageError: one line naming the key, what was found, what is expected.
    """
    configs.check_root(config)
    task = configs.option("task", config)
    loss_node = {k: v for k, v in config["loss"].items() if k != "weight"}
    loss = configs.option("loss", {"loss": loss_node})
    weight = _nonnegative("loss.weight", config["loss"].get("weight", 1.0))
    dataset = load_dataset(config)
    try:
        outputs = task.width(dataset.classes)
    except ValueError as error:
        raise UsageError(str(error)) from error
    optim = optimizer("optim", config["optim"])
    try:
        policy = CheckpointPolicy(**config["checkpoint"])
    except UsageError as error:
        raise UsageError(f"checkpoint.{error}") from error
    blueprint = Blueprint(
        config=config,
        dataset=dataset,
        task=task,
        outputs=outputs,
        student=network("student", config["student"], outputs),
        teacher=_teacher(config, loss, outputs, dataset),
        loss=loss,
        weight=weight,
        scheme=configs.option("scheme", config),
        compressors=configs.option("compression", config).steps(),
        optim=optim,
        parallel=configs.option("parallel", config),
        tracker=configs.option("tracker", config),
        policy=policy,
    )
    check(blueprint)
    return blueprint


def _nonnegative(key: str, value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < float("inf"):
        raise UsageError(f"{key} must be at least 0, got {value!r}")
    return float(value)


def _teacher(config: dict[str, Any], loss: Loss, outputs: int, dataset: Dataset) -> Model | None:
    node = config["teacher"]
    if node["name"] == "none":
        configs.option("teacher", config)
        if loss.needs_teacher:
            raise UsageError(f"loss={config['loss']['name']} needs a teacher, got teacher=none; choose one, or loss=none")
        return None
    if node["name"] == "logits":
        configs.option("teacher", config)
        return None
    if not loss.needs_teacher:
        return None
    optimizer("teacher.optim", node["optim"])
    if node["checkpoint"]:
        node = saved_teacher_node(node, outputs, list(dataset.train["inputs"].shape[1:]))
    return network("teacher", node, outputs)


def check(blueprint: Blueprint) -> None:
    """Traces networks and losses on shapes, so that what does not fit is found before anything is trained."""
    dataset = blueprint.dataset
    if blueprint.config["report"] == "best_val" and not len(dataset.validation["label"]):
        raise UsageError("report=best_val needs validation data, got data.validation=0; set data.validation=0.1 or report=last")
    if blueprint.needs_teacher and blueprint.config["teacher"]["name"] == "logits":
        given_logits(configs.option("teacher", blueprint.config), dataset, blueprint.outputs)
    _check_shapes(
        _ByIdentity(blueprint),
        json.dumps(configs.without(blueprint.config, ("seed", *configs.OPERATIONAL)), sort_keys=True),
    )


@dataclasses.dataclass(frozen=True)
class _ByIdentity:
    """Carries a blueprint through a cache that is keyed by the config's text alone."""

    blueprint: Blueprint = dataclasses.field(compare=False)


@functools.lru_cache(maxsize=512)
def _check_shapes(carrier: _ByIdentity, text: str) -> None:
    del text
    blueprint = carrier.blueprint
    sample = sample_of(blueprint.dataset.train)
    inputs = jax.eval_shape(blueprint.dataset.preprocess, sample["inputs"])
    method = blueprint.method()
    for stage in method.stages:
        steps_per_epoch(stage, len(blueprint.dataset.train["label"]))
    target, arrays = abstract_teacher(blueprint, inputs)
    parts = blueprint.parts(target)
    frozen = {} if target is None else {"teacher": arrays}
    key = jax.random.key(0)
    state = jax.eval_shape(lambda: init_state(parts, key, sample))
    if target is not None and not blueprint.scheme.target_is_teacher:
        initial = (state.params["student"], state.model_state["student"])
        target, arrays = blueprint.scheme.target(target, arrays, blueprint.student, initial)
        parts, frozen = blueprint.parts(target), {"teacher": arrays}
    try:
        for stage in method.stages:
            leaves = as_leaves(stage)
            state = jax.eval_shape(lambda s, leaves=leaves: enter_stage(parts, leaves, s, key, sample, frozen), state)
    except UsageError as error:
        own = str(error).split(" ")[0] in {field.name for field in dataclasses.fields(type(blueprint.loss))}  # type: ignore[arg-type]
        raise UsageError(f"loss.{error}" if own else f"loss={blueprint.config['loss']['name']}: {error}") from error


def abstract_teacher(blueprint: Blueprint, inputs: Any) -> tuple[Target | None, Any]:
    """The teacher's target and its arrays as shapes."""
    if not blueprint.needs_teacher:
        return None, None
    if blueprint.teacher is None:  # precomputed logits
        rows = len(blueprint.dataset.train["label"])
        return Lookup(), jax.eval_shape(lambda: Outputs(jnp.zeros((rows, blueprint.outputs), jnp.float32), {}))
    model = blueprint.teacher
    return Live(model), jax.eval_shape(lambda: model.init(jax.random.key(0), inputs))
