"""A config as checked objects, before anything is trained: every usage error is found here."""

import dataclasses
import functools
import json
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jdistill import config as configs
from jdistill import distributed, rows, schedules
from jdistill.compress.base import Compressor, Stored, Subject, Training, entered
from jdistill.compress.pipeline import ordered
from jdistill.data import Dataset, load_dataset
from jdistill.errors import UsageError
from jdistill.estimators import Estimator
from jdistill.fitting import CheckpointPolicy, sample_of, steps_per_epoch
from jdistill.losses import Loss
from jdistill.losses.logits import ClassLogitsLoss
from jdistill.method import Method, Rows, Stage, Term
from jdistill.networks import Frozen, built, frozen_networks, has_network, optimizer, trained_networks
from jdistill.optim import Optimizer
from jdistill.parallel import Layout
from jdistill.pytrees import Carried, as_leaves, require_nonnegative, structure_key
from jdistill.ranking import met_in_training
from jdistill.records import Tracker
from jdistill.registry import number
from jdistill.sampling import Lists, Ranking
from jdistill.schemes import Scheme, Setting
from jdistill.schemes.base import preparing
from jdistill.stages import abstract, calibration_rows, enter_stage, features_read, init_state, leave_stage, prepared
from jdistill.tasks import Regression, Task
from jdistill.teachers.given import given_logits
from jdistill.teachers.targets import Live, Lookup, Target
from jdistill.train import Learner, Parts, TrainState
from jdistill.types import Model, Outputs


@dataclasses.dataclass(frozen=True)
class Blueprint:
    """Everything a run's config describes."""

    config: dict[str, Any]
    dataset: Dataset
    task: Task
    outputs: int
    student: Model
    teachers: dict[str, Frozen]
    learners: tuple[Learner, ...]
    loss: Loss
    weight: Any
    scheme: Scheme
    sequence: tuple[Compressor | Training, ...]
    optim: Optimizer
    parallel: Layout
    tracker: Tracker
    policy: CheckpointPolicy
    estimator: Estimator | None = None

    @property
    def inputs(self) -> Any:
        """Shape and dtype of the inputs that networks are given for two rows of the training set."""
        return prepared(self.parts({}), sample_of(self.arrays()))["inputs"]

    @property
    def setting(self) -> Setting:
        """What the scheme lays out."""
        name = self.config["loss"]["name"]
        teacher = "teacher" if self.loss.needs_teacher else None
        return Setting(
            task=labels(self.task, self.task.weight),
            distil=None
            if name == "none"
            else Term(
                name=name,
                teacher=teacher,
                loss=self.loss,
                weight=self.weight,
                where=self.task.where,
                reduction=self.task.reduction,
            ),
            optim=self.optim,
            classes=self.dataset.classes,
            student=abstract(self.student, self.inputs),
        )

    def resized(self, node: dict[str, Any]) -> Model:
        """The student's network with another config node: what became of it under compression."""
        given = self.outputs, self.dataset, self.loss, self.scheme, self.teachers, self.sequence
        return self.student if node == self.config["student"] else _student(node, *given)[0]

    def method(self) -> Method:
        """The stages of the student's training: the scheme's, what their losses prepare, and each compressor's recovery."""
        return self._method

    @functools.cached_property
    def _method(self) -> Method:
        stages: list[Stage] = []
        acting: tuple[Compressor, ...] = ()  # of these, the schedules of all that a stage has seen are over
        for step in self.sequence:
            if isinstance(step, Training):
                made = self._trained(step, stages, acting)
                stages += made
                acting = schedules.at_end(acting)
                continue
            acting = (*acting, step)
            if step.recover_epochs:
                stages += self._trained(Training("recover", step.recover_epochs), stages, acting)
                acting = schedules.at_end(acting)
        return Method(stages=tuple(stages))

    def _trained(self, training: Training, before: list[Stage], acting: tuple[Compressor, ...]) -> list[Stage]:
        """The stages of a part of the sequence, under the compressors `acting`."""
        if training.kind == "recover":
            number = sum(stage.name.startswith("recover") for stage in before) + 1
            last = dataclasses.replace(before[-1], name=f"recover{number}", compressors=acting, starts=(), tuning=None)
            return [last.with_epochs(training.epochs or int(last.optim.epochs))]
        keep, omit = self.config["transfer"]["keep"], self.config["transfer"]["omit"]
        transfer = Rows(None if keep is None else tuple(keep), tuple(omit))
        wanted: tuple[Stage, ...] = (Stage(name="task", terms=(self.setting.task,), optim=self.optim),)
        if training.kind == "distill":
            wanted = self.scheme.stages(self.setting)
        if training.epochs is not None:  # a scheme's earlier stages have lengths of their own
            wanted = (*wanted[:-1], wanted[-1].with_epochs(training.epochs))
        stages: list[Stage] = []
        for stage in wanted:
            stage = dataclasses.replace(stage, compressors=acting)
            if transfer != Rows():
                stage = dataclasses.replace(stage, rows=transfer.within(stage.rows))
            stages += [*preparing(stage, [*before, *stages]), stage]
        return stages

    @property
    def compressors(self) -> tuple[Compressor, ...]:
        """The compression steps in order, without the training between them."""
        return tuple(step for step in self.sequence if not isinstance(step, Training))

    def parts(self, targets: dict[str, Target]) -> Parts:
        """The program's parts for a student that learns from `targets`."""
        learners = (Learner("student", self.student), *self.learners)
        preprocess, augment, parallel = self.dataset.preprocess, self.dataset.augment, self.parallel
        frozen = tuple(targets.items())
        return Parts(
            learners, frozen, preprocess, augment, self.task.observe, parallel.precision, parallel.microbatches,
            sampler=self.task.sampler(self.dataset),
        )  # fmt: skip

    def arrays(self) -> dict[str, Any]:
        """The arrays [N, ...] that batches are taken from: inputs, labels, and what the scheme adds."""
        rows = self.task.rows(self.dataset)
        return {**rows, **self.scheme.arrays(rows["label"])}

    def depth(self) -> tuple[int, int]:
        """How many items of each user and users of each item the losses want the teachers to rank."""
        schema = self.dataset.schema
        wanted = [term.loss.ranking for stage in self.method().stages for term in stage.terms]
        return tuple(min(most, max((w[i] for w in wanted), default=0)) for i, most in enumerate((schema.items, schema.users)))  # type: ignore[return-value]

    def group(self) -> tuple[Any, ...]:
        """Runs with equal groups run in one compiled program."""
        return self._group

    @functools.cached_property
    def _group(self) -> tuple[Any, ...]:
        data = configs.without(self.config, configs.OPERATIONAL)["data"]
        teachers = tuple((name, configs.teacher_fingerprint(frozen.config)) for name, frozen in self.teachers.items())
        if self.config["transfer"]["inherit"]:
            teachers += (("inherited", configs.teacher_fingerprint(self.config)),)
        method = structure_key(jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), self.method()))
        return self.student, self.learners, teachers, json.dumps(data, sort_keys=True), method

    def population(self) -> tuple[Any, ...]:
        """Runs with equal populations can be trained as one: same program, same data, same steps, same evaluations."""
        config = self.config
        same = {name: config[name] for name in ("parallel", "report", "checkpoint")}
        every = {name: config["evaluate"][name] for name in ("every", "on", "patience", "latency", "repeats")}
        epochs = tuple(int(stage.optim.epochs) for stage in self.method().stages)
        arrays = {k: v.tobytes() for k, v in self.scheme.arrays(self.dataset.train["label"]).items()}
        return self.group(), epochs, json.dumps({**same, **every}, sort_keys=True), tuple(sorted(arrays.items()))


def labels(task: Task, weight: Any = 1.0) -> Term:
    """The term of a task's loss on the labels."""
    return Term(name=task.term, loss=task.loss(), weight=weight, where=task.where, reduction=task.reduction)


def read(config: dict[str, Any]) -> Blueprint:
    """Builds and checks everything a config describes.

    Raises:
      UsageError: one line naming the key, what was found, what is expected.
    """
    configs.check_root(config)
    task = configs.option("task", config)
    loss = configs.option("loss", {"loss": {k: v for k, v in config["loss"].items() if k != "weight"}})
    weight = number("loss.weight", config["loss"].get("weight", 1.0))
    require_nonnegative(**{"loss.weight": weight})
    dataset = load_dataset(config)
    outputs = task.width(dataset)
    optim = optimizer("optim", config["optim"])
    try:
        policy = CheckpointPolicy(**config["checkpoint"])
    except UsageError as error:
        raise UsageError(f"checkpoint.{error}") from error
    scheme = configs.option("scheme", config)
    teachers = frozen_networks(config, loss, scheme, outputs, dataset)
    sequence = ordered(configs.option("compression", config).steps())
    student, estimator = _student(config["student"], outputs, dataset, loss, scheme, teachers, sequence)
    blueprint = Blueprint(
        config=config,
        dataset=dataset,
        task=task,
        outputs=outputs,
        student=student,
        teachers=teachers,
        learners=trained_networks(config, scheme, outputs, dataset),
        loss=loss,
        weight=weight,
        scheme=scheme,
        sequence=sequence,
        optim=optim,
        parallel=configs.option("parallel", config),
        tracker=configs.option("tracker", config),
        policy=policy,
        estimator=estimator,
    )
    branches = scheme.branches(abstract(student, blueprint.inputs), outputs)
    blueprint = dataclasses.replace(blueprint, learners=(*blueprint.learners, *branches))
    check(blueprint)
    return blueprint


def _student(
    node: dict[str, Any], outputs: int, dataset: Dataset, loss: Loss, scheme: Scheme, teachers: dict[str, Frozen],
    sequence: tuple[Compressor | Training, ...],
) -> tuple[Model, Estimator | None]:  # fmt: skip
    """The network of a student's node as its loss and its compressors need it, and what fits it where it is none."""
    only = next(iter(teachers.values())).model if len(teachers) == 1 and not scheme.trained() else None
    student, estimator = built("student", node, outputs, dataset)
    student = loss.adapt(student, only)
    for step in sequence:
        student = step.adapt(student) if isinstance(step, Compressor) else student
    return student, estimator


def check(blueprint: Blueprint) -> None:
    """Traces networks and losses on shapes, so that what does not fit is found before anything is trained."""
    if blueprint.estimator is not None:
        from jdistill.estimators.training import require_fittable

        require_fittable(blueprint)
    dataset = blueprint.dataset
    distributed.require_joined(blueprint.parallel.distributed)
    blueprint.parallel.check_batch(blueprint.optim.batch_size)
    if blueprint.task.reduction == "sum" and blueprint.parallel.microbatches > 1:
        raise UsageError("parallel.microbatches takes means over parts of a batch; task.reduction=sum needs microbatches=1")
    if blueprint.config["report"] == "best_val" and not len(dataset.validation["label"]):
        raise UsageError("report=best_val needs validation data, got data.validation=0; set data.validation=0.1 or report=last")
    if blueprint.config["transfer"]["inherit"] and not has_network(blueprint.config["teacher"]):
        name = blueprint.config["teacher"]["name"]
        raise UsageError(f"transfer.inherit=true needs a teacher network, got teacher={name}; choose one")
    if isinstance(blueprint.task, Regression) and isinstance(blueprint.loss, ClassLogitsLoss):
        name = blueprint.config["loss"]["name"]
        raise UsageError(f"loss={name} compares probabilities, and task=regression predicts a number; use loss=logit_mse")
    for frozen in blueprint.teachers.values():
        _check_teaching(blueprint, frozen)
        if frozen.model is None:
            if dataset.schema.items:
                raise UsageError("teacher=logits holds logits of rows; requests to a recommender differ in every step")
            given_logits(configs.option("teacher", frozen.config), dataset, blueprint.outputs)
    if dataset.schema.items and blueprint.scheme.groups(blueprint.outputs):
        name = blueprint.config["scheme"]["name"]
        raise UsageError(f"scheme={name} divides classes, which data of users and items have none of; use scheme=offline")
    features_wanted(blueprint)
    if blueprint.optim.rows:
        for stage in blueprint.method().stages:
            rows.require(blueprint.parts({}), stage)


def _check_teaching(blueprint: Blueprint, frozen: Frozen) -> None:
    """Raises `UsageError` where a teacher that is still to be trained has fewer examples than a batch takes."""
    if frozen.model is None or frozen.config["teacher"]["checkpoint"]:
        return
    changed = configs.teaching(frozen.config)
    rows = configs.option("task", changed).rows(load_dataset(changed))
    stage = Stage(name="teacher", terms=(), optim=optimizer("teacher.optim", frozen.config["teacher"]["optim"]))
    try:
        steps_per_epoch(stage, len(rows["label"]))
    except UsageError as error:
        raise UsageError(f"teacher.{error}".replace(" optim.drop_last", " teacher.optim.drop_last")) from error


def features_wanted(blueprint: Blueprint) -> dict[str, frozenset[str]]:
    """Which features of each frozen network any stage reads; traced on shapes, once for configs of one structure.

    Raises:
      UsageError: a layer does not exist, or shapes do not fit.
    """
    try:
        group = blueprint.group()
    except UsageError as error:
        own = str(error).split(" ")[0] in blueprint.config["scheme"]
        raise UsageError(f"scheme.{error}" if own else str(error)) from error
    return _checked(Carried(blueprint), (group, structure_key(blueprint.compressors)))


@functools.lru_cache(maxsize=512)
def _checked(carried: Carried, group: tuple[Any, ...]) -> dict[str, frozenset[str]]:
    del group
    blueprint = carried.value
    label = blueprint.arrays()["label"]
    for stage in blueprint.method().stages:
        steps_per_epoch(stage, len(label) if stage.rows is None else len(stage.rows.select(label)))
    try:
        return _trace(blueprint)
    except UsageError as error:
        if str(error).startswith("compression"):
            raise
        own = str(error).split(" ")[0] in blueprint.config["loss"]
        raise UsageError(f"loss.{error}" if own else f"loss={blueprint.config['loss']['name']}: {error}") from error


def _trace(blueprint: Blueprint) -> dict[str, frozenset[str]]:
    """Traces every stage on shapes; the features that each frozen network must give."""
    sample, key = sample_of(blueprint.arrays()), jax.random.key(0)
    label: Any = blueprint.arrays()["label"]
    targets, frozen = abstract_targets(blueprint)
    parts = blueprint.parts(targets)
    state = jax.eval_shape(lambda: init_state(parts, key, sample))
    names: dict[str, set[str]] = {}
    before: Stage | None = None
    for stage in map(as_leaves, blueprint.method().stages):

        def enter(state, frozen, before=before, stage=stage):
            state = state if before is None else leave_stage(before, state)
            return enter_stage(parts, stage, state, key, sample, frozen, label)

        state = jax.eval_shape(enter, state, frozen)
        for name, read in features_read(parts, stage, state, frozen, sample).items():
            names.setdefault(name, set()).update(read)
        before = stage
    if blueprint.estimator is None:
        jax.eval_shape(partial(_last_steps, blueprint), state)
    return {name: frozenset(read) for name, read in names.items()}


def _last_steps(blueprint: Blueprint, state: TrainState) -> Stored:
    """The student after the steps that nothing is trained under: traced, for what they refuse."""
    rows = partial(calibration_rows, blueprint.parts({}), None, sample_of(blueprint.arrays()))
    subject = Subject(blueprint.student, blueprint.inputs, state.model_state["student"], rows)
    student = Stored(state.params["student"], state.compressor_state)
    return entered(blueprint.compressors, student, jax.random.key(0), subject)


def _abstract_tables(blueprint: Blueprint) -> dict[str, Any]:
    """The tables that losses draw from, with rankings of the depth they want."""
    tables, (depth, users) = blueprint.task.tables(blueprint.dataset), blueprint.depth()
    schema = blueprint.dataset.schema

    def ints(*shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, np.int32)

    if depth or users:
        length = len(met_in_training(blueprint.dataset).values) + schema.users * depth
        scores = jax.ShapeDtypeStruct((schema.users, depth), np.float32)
        excluded = Lists(start=ints(schema.users + 1), values=ints(length), halvings=1)
        ranking = Ranking(ints(schema.users, depth), scores, excluded, ints(schema.items, users) if users else None)
        tables = {**tables, "rankings": dict.fromkeys(blueprint.teachers, ranking)}
    return tables


def abstract_targets(blueprint: Blueprint) -> tuple[dict[str, Target], dict[str, Any]]:
    """The frozen networks as targets, and their arrays as shapes."""
    targets: dict[str, Target] = {}
    arrays: dict[str, Any] = {}
    rows, inputs = len(blueprint.dataset.train["label"]), blueprint.inputs
    if blueprint.task.sampler(blueprint.dataset) is not None:
        arrays["tables"] = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), _abstract_tables(blueprint))
    for name, frozen in blueprint.teachers.items():
        if frozen.model is None:  # precomputed logits
            targets[name] = Lookup()
            arrays[name] = jax.eval_shape(lambda: Outputs(jnp.zeros((rows, blueprint.outputs), jnp.float32), {}))
        else:
            targets[name] = Live(frozen.model)
            arrays[name] = jax.eval_shape(lambda model=frozen.model: model.init(jax.random.key(0), inputs))
    if blueprint.loss.reads_initial:
        targets["initial"] = Live(blueprint.student)
        arrays["initial"] = jax.eval_shape(lambda: blueprint.student.init(jax.random.key(0), inputs))
    return targets, arrays
