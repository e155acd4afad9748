"""The root config, the identity of a run, and the objects a config describes."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore

from jdistill.errors import UsageError, unknown
from jdistill.plugins import load_plugins
from jdistill.pytrees import require_nonnegative, require_one_of, require_positive
from jdistill.registry import build, check_keys, options, register

GROUPS = ("data", "task", "teacher", "student", "loss", "scheme", "compression", "optim", "parallel", "tracker")

# Keys that change where or how a run is carried out, never its result.
OPERATIONAL = (
    "force", "tracker", "cache", "checkpoint", "data.root", "data.download", "data.verify", "fail_fast", "plugins",
    "parallel.distributed",
)  # fmt: skip

FORMAT = 2  # raised when the same config would give another result than before


@dataclasses.dataclass
class CheckpointConfig:
    every_steps: int = 0
    every_epochs: int = 0
    every_seconds: float = 60.0


@dataclasses.dataclass
class EvaluateConfig:
    """How a run is measured.

    Attributes:
      every: epochs between validations while training.
      on: the split of those: validation, or test for the learning curves that some papers show; nothing may then be chosen
        by them.
      latency: time the artifact; `repeats` timed calls at each batch size.
      patience: epochs of the last stage without a better validation metric, after which training ends; 0 for never.
      predictions: write `predictions.npz`: `ids`, `label`, `logits` and (with a teacher) `teacher_logits` of the test split.
    """

    every: int = 1
    on: str = "validation"
    patience: int = 0
    latency: bool = True
    repeats: int = 100
    predictions: bool = False


@dataclasses.dataclass
class TransferConfig:
    """What the student gets of data and teacher.

    Attributes:
      keep, omit: the classes whose training examples the student sees, or does not (a frozen teacher has seen all).
      inherit: the student starts with those of the teacher's parameters that have the name and shape of its own: a shared
        encoder, also where the teacher learned another catalogue (`teacher.data`).
    """

    keep: list[int] | None = None
    omit: list[int] = dataclasses.field(default_factory=list)
    inherit: bool = False


@dataclasses.dataclass
class TrainConfig:
    """Root keys of `conf/train.yaml`; the groups hold what their options define."""

    seed: int = 0
    report: str = "last"
    force: bool = False
    fail_fast: bool = False
    cache: str = ""
    plugins: list[str] = dataclasses.field(default_factory=list)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    evaluate: EvaluateConfig = dataclasses.field(default_factory=EvaluateConfig)
    transfer: TransferConfig = dataclasses.field(default_factory=TransferConfig)
    data: Any = None
    task: Any = None
    teacher: Any = None
    student: Any = None
    loss: Any = None
    scheme: Any = None
    compression: Any = None
    optim: Any = None
    parallel: Any = None
    tracker: Any = None


SCHEMAS = {"checkpoint": CheckpointConfig, "evaluate": EvaluateConfig, "transfer": TransferConfig}

ConfigStore.instance().store(name="train_schema", node=TrainConfig, provider="jdistill")


WITHOUT_NETWORK: dict[str, tuple[Any, Any]] = {
    "optim": (Any, None),
    "checkpoint": (str | None, None),
    "seed": (int, 0),
    "data": (Any, None),
    "task": (Any, None),
}


@register("teacher", "none", extra=WITHOUT_NETWORK)
def no_teacher() -> None:
    """No teacher: for losses that read labels only."""


@register("teacher", "logits", extra=WITHOUT_NETWORK)
def logits_teacher(path: str | None = None) -> Path:
    """Precomputed logits of any framework: `path` is an .npz with `ids` [N] int and `logits` [N, K] of the training set."""
    if path is None:
        raise UsageError("path is missing: teacher=logits needs teacher.path=FILE.npz with arrays 'ids' and 'logits'")
    if not Path(path).is_file():
        raise UsageError(f"path '{path}' does not exist; give an .npz file with arrays 'ids' and 'logits'")
    return Path(path)


def check_root(config: dict[str, Any]) -> None:
    """Raises `UsageError` for unknown root keys and bad root values."""
    fields = {field.name: field for field in dataclasses.fields(TrainConfig)}
    check_keys("", config, fields)
    if missing := [name for name in fields if name not in config and name not in ("plugins", *SCHEMAS, *GROUPS)]:
        raise UsageError(f"{missing[0]} must have a value; leave ~{missing[0]} out")
    load_plugins(_modules(config.get("plugins")))
    for group in (*SCHEMAS, *GROUPS):
        if not isinstance(node := config.get(group), dict):
            raise UsageError(f"{group} must be one of its options, got {node!r}")
        if group in GROUPS and node.get("name") not in options(group):
            raise unknown(group, str(node.get("name")), options(group))
    for group, schema in SCHEMAS.items():
        check_keys(group, config[group], [field.name for field in dataclasses.fields(schema)])
    require_one_of(("last", "best_val", "best_test"), report=config["report"])
    if not isinstance(config["seed"], int):
        raise UsageError(f"seed must be an integer, got {config['seed']!r}")
    if config["evaluate"]["on"] == "test" and (config["report"] == "best_val" or config["evaluate"]["patience"]):
        raise UsageError(
            "evaluate.on=test shows curves only: set report=last and evaluate.patience=0, or evaluate.on=validation"
        )
    try:
        require_positive(every=config["evaluate"]["every"], repeats=config["evaluate"]["repeats"])
        require_nonnegative(patience=config["evaluate"]["patience"])
        require_one_of(("validation", "test"), on=config["evaluate"]["on"])
    except UsageError as error:
        raise UsageError(f"evaluate.{error}") from error


def _modules(value: Any) -> list[str]:
    if value is None:  # a config from before there were plug-ins
        return []
    if not isinstance(value, list | tuple) or not all(isinstance(name, str) for name in value):
        raise UsageError(f"plugins must be a list such as [my_module], got {value!r}")
    return list(value)


def option(group: str, config: dict[str, Any], **given: Any) -> Any:
    """What `config[group]` describes; raises `UsageError` naming the key."""
    node = config[group]
    if not isinstance(node, dict):
        raise UsageError(f"{group} must be one of its options, got {node!r}")
    return build(group, node, **given)


def digest(value: Any) -> str:
    """12 hex digits of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:12]


def without(config: dict[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    """`config` without the dotted `keys`; nothing in it is changed, what is unchanged is shared."""
    out = dict(config)
    for key in keys:
        *parents, last = key.split(".")
        node: Any = out
        for parent in parents:
            if isinstance(node, dict) and isinstance(node.get(parent), dict):
                node[parent] = dict(node[parent])  # only what changes is copied
                node = node[parent]
            else:
                node = None
        if isinstance(node, dict):
            node.pop(last, None)
    return out


def fingerprint(config: dict[str, Any]) -> str:
    """The identity of a run: a hash of its config without the keys that cannot change its result.

    A teacher that is a file or folder counts by its content, wherever it lies.
    """
    own = without(config, OPERATIONAL)
    teacher = own.get("teacher")
    if isinstance(teacher, dict):
        own["teacher"] = teacher | {key: _content(teacher[key]) for key in ("path", "checkpoint") if teacher.get(key)}
    own |= {group: _floats(own[group]) for group in ("loss", "task", "scheme") if group in own}
    return digest({"format": FORMAT, **own})


class _Varies:
    """Stands for a value that differs between the members of a population: whatever is done with it raises."""

    def __init__(self, key: str):
        self.key = key

    def refuse(self, *_: Any) -> Any:
        raise RuntimeError(f"'{self.key}' differs between the members of this population; read it from each member's config")

    __hash__ = object.__hash__
    __eq__ = __str__ = __repr__ = __int__ = __float__ = __bool__ = __index__ = refuse  # type: ignore[assignment]


class _Shared(dict[str, Any]):
    """A dict that raises where a value differs between members."""

    def __getitem__(self, key: str) -> Any:
        value = super().__getitem__(key)
        return value.refuse() if isinstance(value, _Varies) else value

    def get(self, key: str, default: Any = None) -> Any:
        return self[key] if key in self else default  # noqa: SIM401 (that is this function)


def shared(configs: Sequence[dict[str, Any]], prefix: str = "") -> dict[str, Any]:
    """What the configs of a population have in common. To read a key in which they differ raises `RuntimeError`."""
    out = _Shared()
    for key in configs[0]:
        values: list[Any] = [config.get(key) for config in configs]
        if all(isinstance(value, dict) for value in values):
            out[key] = shared(values, f"{prefix}{key}.")
        else:
            out[key] = values[0] if all(value == values[0] for value in values) else _Varies(f"{prefix}{key}")
    return out


def _floats(value: Any) -> Any:
    """4 as 4.0 all the way down: `loss.temperature=4` and `=4.0` are one run."""
    if isinstance(value, dict):
        return {key: _floats(v) for key, v in value.items()}
    if isinstance(value, list):
        return [_floats(v) for v in value]
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _content(given: str) -> str:
    """SHA-256 of a file, or of the record (with its checksums) of a teacher's or run's folder; its name where absent."""
    for path in (Path(given), Path(given) / "manifest.json", Path(given) / "result.json"):
        if path.is_file():
            return hashlib.sha256(path.read_bytes()).hexdigest()
    return given


def teaching(config: dict[str, Any]) -> dict[str, Any]:
    """The config with the data that the teacher is trained on: `data` with the changes of `teacher.data`."""
    changes = config["teacher"].get("data") or {}
    if not isinstance(changes, dict):
        raise UsageError(f"teacher.data must be changes to data such as {{augment: [crop]}}, got {changes!r}")
    check_keys("teacher.data", changes, config["data"])
    return {**config, "data": config["data"] | changes, "task": _teaching_task(config)}


def _teaching_task(config: dict[str, Any]) -> dict[str, Any]:
    changes = config["teacher"].get("task") or {}
    if not isinstance(changes, dict):
        raise UsageError(f"teacher.task must be changes to task such as {{name: next_item}}, got {changes!r}")
    name = changes.get("name", config["task"]["name"])
    if name not in options("task"):
        raise unknown("task", str(name), options("task"))
    fields = options("task")[name].fields
    check_keys("teacher.task", changes, {"name", *fields})
    same = {key: value for key, value in config["task"].items() if key in fields}
    own = same if name == config["task"]["name"] else {k: v for k, v in same.items() if k in ("cutoffs", "select", "groups")}
    defaults = {key: list(v) if isinstance(v, tuple) else v for key, (_, v) in fields.items()}
    return {"name": name} | defaults | own | changes


def teacher_fingerprint(config: dict[str, Any]) -> str:
    """The identity of a teacher: its network, its own recipe and seed, the data and the meaning of the labels."""
    own = without(teaching(config), (*OPERATIONAL, "teacher.checkpoint", "teacher.data", "teacher.task", "task.weight"))
    return digest({"format": FORMAT, **{group: own[group] for group in ("teacher", "data", "task")}})
