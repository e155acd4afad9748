"""The networks of a run, from its config: student, frozen teachers, and what a scheme trains beside them."""

import functools
import inspect
from typing import Any, NamedTuple

import jax
import numpy as np

from jdistill import config as configs
from jdistill.data import Dataset
from jdistill.errors import UsageError, unknown
from jdistill.losses import Loss
from jdistill.modules import as_model
from jdistill.optim import Optimizer
from jdistill.registry import build, options
from jdistill.schemes import Scheme
from jdistill.teachers.saved import saved_teacher_node
from jdistill.train import Learner
from jdistill.types import Model


class Frozen(NamedTuple):
    """A frozen teacher: the run's config with this one's node as `teacher`, and its network (None for given logits)."""

    config: dict[str, Any]
    model: Model | None


def network(group: str, node: dict[str, Any], outputs: int, dataset: Dataset) -> Model:
    """The network that a `teacher` or `student` node describes; a student never reads privileged columns.

    Raises:
      UsageError: a wrong option, or a network that cannot read such data.
    """
    name = str(node.get("name"))
    given = {"outputs": outputs, "schema": dataset.schema, "side": dataset.side}
    if name in options(group):
        taken = inspect.signature(options(group)[name].target).parameters
        _require_reader(group, name, "schema" in taken, dataset)
        given = {key: value for key, value in given.items() if key in taken}
    model = as_model(build(group, node, **given))
    return without_columns(model, dataset.privileged) if group == "student" and dataset.privileged else model


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

    return Model(init, apply, model.head)


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
    configs.teaching({**config, "teacher": node})
    if node["checkpoint"]:
        node = saved_teacher_node(node, outputs, dataset.input_shape)
    return network("teacher", node, outputs, dataset)
