"""The networks of a run, from its config: student, frozen teachers, and what a scheme trains beside them."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jdistill import config as configs
from jdistill.data import Dataset, load_dataset
from jdistill.errors import UsageError, unknown
from jdistill.estimators import Estimator
from jdistill.losses import Loss
from jdistill.modules import as_model
from jdistill.optim import Optimizer
from jdistill.registry import build, options, parameters
from jdistill.schemes import Scheme
from jdistill.teachers.saved import saved_teacher_node
from jdistill.teachers.translated import maps_between, translated
from jdistill.train import Learner
from jdistill.types import Model, PyTree


class Frozen(NamedTuple):
    """A frozen teacher: the run's config with this one's node as `teacher`, and its network (None for given logits)."""

    config: dict[str, Any]
    model: Model | None


def network(group: str, node: dict[str, Any], outputs: int, dataset: Dataset) -> Model:
    """The network that a `teacher` or `student` node describes; a student never reads privileged columns.

    Raises:
      UsageError: a wrong option, or a network that cannot read such data.
    """
    return built(group, node, outputs, dataset)[0]


def built(group: str, node: dict[str, Any], outputs: int, dataset: Dataset) -> tuple[Model, Estimator | None]:
    """`network`, and what fits it where a student is no network."""
    name, schema, known = str(node.get("name")), dataset.schema, options(group)
    if group == "student" and schema.fields:
        schema = dataclasses.replace(schema, fields=tuple(schema.fields[i] for i in columns_kept(dataset)))
    given = {"outputs": outputs, "schema": schema, "side": dataset.side}
    if name in known:  # the option takes those of the data's properties that it names
        taken = parameters(known[name].target)
        _require_reader(group, name, "schema" in taken, dataset)
        given = {key: value for key, value in given.items() if key in taken}
    made = build(group, node, **given)
    estimator = made if isinstance(made, Estimator) else None
    model = as_model(made) if estimator is None else estimator.model(outputs)
    if group == "student" and dataset.privileged:
        model = without_columns(model, dataset.privileged)
    return model, estimator


def columns_kept(dataset: Dataset) -> np.ndarray:
    """The columns that a student reads."""
    return np.setdiff1d(np.arange(dataset.input_shape[-1]), dataset.privileged)


def _require_reader(group: str, name: str, reads_schema: bool, dataset: Dataset) -> None:
    if dataset.schema.items and not reads_schema:
        raise UsageError(f"{group}={name} cannot score items for users; choose a recommender, such as {group}=bpr")
    if any(dataset.schema.fields) and not reads_schema:
        raise UsageError(
            f"{group}={name} cannot read categories (data={dataset.name}); set data.encoding=one_hot, or {group}=wide_mlp"
        )


@functools.lru_cache(maxsize=64)
def without_columns(model: Model, columns: tuple[int, ...]) -> Model:
    """`model` on inputs [..., D] without some of the columns."""

    def rest(inputs: Any) -> Any:
        if isinstance(inputs, jax.ShapeDtypeStruct):
            return jax.eval_shape(rest, inputs)
        kept = np.setdiff1d(np.arange(inputs.shape[-1]), columns)
        return inputs[..., kept]

    def init(key: Any, inputs: Any) -> Any:
        return model.init(key, rest(inputs))

    def apply(params: Any, state: Any, inputs: Any, **mode: Any) -> Any:
        return model.apply(params, state, rest(inputs), **mode)

    widths = model.widths
    if widths is not None:
        resized = widths.resized
        widths = widths._replace(resized=lambda sizes: without_columns(resized(sizes), columns))
    return Model(init, apply, model.head, widths=widths)


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


def variant(config: dict[str, Any], group: str, changes: dict[str, Any]) -> dict[str, Any]:
    """The node of `group` with `changes`; another `name` starts from that option's defaults, with the same recipe."""
    base = config[group]
    name = changes.get("name", base["name"])
    if name != base["name"]:
        if name not in options(group):
            raise unknown(group, str(name), options(group))
        defaults = {key: default for key, (_, default) in options(group)[name].fields.items()}
        kept = {key: base[key] for key in ("optim", "seed") if key in base}
        base = {"name": name} | {k: list(v) if isinstance(v, tuple) else v for k, v in defaults.items()} | kept
    if isinstance(changes.get("optim"), dict):
        changes = changes | {"optim": base["optim"] | changes["optim"]}
    return base | changes


def trained_networks(config: dict[str, Any], scheme: Scheme, outputs: int, dataset: Dataset) -> tuple[Learner, ...]:
    """The further networks that a scheme trains."""
    made = []
    for name, (group, changes) in scheme.trained().items():
        if group == "teacher" and not has_network(config["teacher"]):
            raise UsageError(
                f"scheme={config['scheme']['name']} trains a teacher, got teacher={config['teacher']['name']}; choose a network"
            )
        try:
            made.append(Learner(name, network(group, variant(config, group, changes), outputs, dataset)))
        except UsageError as error:
            raise _about(config, name, changes, error) from error
    return tuple(made)


def frozen_networks(config: dict[str, Any], loss: Loss, scheme: Scheme, outputs: int, dataset: Dataset) -> dict[str, Frozen]:
    """The frozen teachers of a scheme, where the loss needs one."""
    found = {}
    for name, changes in scheme.frozen().items():
        try:
            node = variant(config, "teacher", changes)
            model = _teacher(node, config, loss, outputs, dataset)
        except UsageError as error:
            raise _about(config, name, changes, error) from error
        if loss.needs_teacher:
            found[name] = Frozen({**config, "teacher": node}, model)
    return found


def _about(config: dict[str, Any], name: str, changes: dict[str, Any], error: UsageError) -> UsageError:
    """`error`, with the network it is about where the scheme has changed it."""
    return UsageError(f"network {name} of scheme={config['scheme']['name']}: {error}") if changes else error


def _teacher(node: dict[str, Any], config: dict[str, Any], loss: Loss, outputs: int, dataset: Dataset) -> Model | None:
    if not has_network(node):
        configs.option("teacher", {"teacher": node})
        if node["name"] == "none" and loss.needs_teacher:
            raise UsageError(f"loss={config['loss']['name']} needs a teacher, got teacher=none; choose one, or loss=none")
        if loss.calls_networks:
            raise UsageError(f"loss={config['loss']['name']} needs a teacher network, got teacher={node['name']}")
        return None
    if not loss.needs_teacher:
        return None
    optimizer("teacher.optim", node["optim"])
    return teacher_network({**config, "teacher": node}, outputs, dataset)


def inherited(own: PyTree, other: PyTree) -> tuple[PyTree, list[str]]:
    """`own` parameters with those leaves of `other` that have the same path and shape, and the paths.

    Raises:
      UsageError: there is none.
    """
    given = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in jax.tree.leaves_with_path(other)}
    taken: list[str] = []

    def choose(path: Any, leaf: Any) -> Any:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if name not in given or given[name].shape != leaf.shape:
            return leaf
        taken.append(name)
        return jnp.array(given[name], leaf.dtype)

    out = jax.tree.map_with_path(choose, own)
    if not taken:
        raise UsageError(
            "transfer.inherit=true, but no parameter of the student has the name and shape of one of the teacher's"
        )
    return out, taken


def teacher_network(config: dict[str, Any], outputs: int, dataset: Dataset) -> Model:
    """The network of the group `teacher` for requests in `dataset`'s numbers, also where it learned other data's.

    Raises:
      UsageError: a wrong option, a saved teacher that does not fit, or a catalogue that has nothing in common.
    """
    own, width = teacher_data(config, outputs, dataset)
    node = config["teacher"]
    if node["checkpoint"]:
        node = saved_teacher_node(node, width, own.input_shape)
    model = network("teacher", node, width, own)
    if own is dataset or maps_between(dataset, own) is None:
        return model
    return translated(model, dataset.schema.users, dataset.schema.items)


def teacher_data(config: dict[str, Any], outputs: int, dataset: Dataset) -> tuple[Dataset, int]:
    """The data that numbers the teacher's users and items, and its number of logits; of other tasks the run's own."""
    changed = configs.teaching(config)
    if not dataset.schema.items or changed["data"] == config["data"]:
        return dataset, outputs
    own = load_dataset(changed)
    return own, configs.option("task", changed).width(own)
