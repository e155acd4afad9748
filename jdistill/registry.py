"""Named options of the config groups: one decorator makes a class or function a typed Hydra option.

`@register("loss", "kd")` on a class reads its signature and stores an option whose keys, types and defaults are
the parameters of that signature. Parameters without a default are given by the program, not by the config.
"""

import contextlib
import dataclasses
import functools
import inspect
import types
import typing
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from jdistill.errors import UsageError, did_you_mean, unknown

F = TypeVar("F", bound=Callable[..., Any])


@dataclasses.dataclass(frozen=True)
class Option:
    """One registered option: `group` and `name`, what it builds, its keys; `numbers` are the keys that take a schedule.

    `provider` is the plug-in that registered it, empty for jdistill's own.
    """

    group: str
    name: str
    target: Callable[..., Any]
    fields: dict[str, tuple[Any, Any]]
    numbers: frozenset[str] = frozenset()
    provider: str = ""

    @property
    def summary(self) -> str:
        return (inspect.getdoc(self.target) or "").partition("\n")[0]


_options: dict[tuple[str, str], Option] = {}
_provider = ""

PYTREES = ("loss", "scheme", "compression", "optim")
"""Groups whose classes enter compiled programs: each must be a pytree."""


def register(
    group: str,
    name: str,
    *,
    extra: dict[str, tuple[Any, Any]] | None = None,
    schedules: bool = False,
    **defaults: Any,
) -> Callable[[F], F]:
    """Registers a class or function as option `name` of config group `group`.

    Args:
      group: a config group, such as `loss`, `teacher`, `student`, `data`, `compression`, `optim`, `scheme`.
      name: the word after `group=` on the command line.
      extra: further keys of the option, `{name: (type, default)}`, that the target itself does not take.
      schedules: whether keys of type float, other than static fields, take a schedule as well as a number.
      **defaults: other defaults than the signature's, for this option.

    Raises:
      UsageError: the name is taken by another target, or a class that must be a pytree cannot be one.
    """

    def decorate(target: F) -> F:
        taken = _options.get((group, name))
        if taken is not None and _path(taken.target) != _path(target):
            owner = f" ({taken.provider})" if taken.provider else ""
            raise UsageError(f"{group}={name} is taken by {_path(taken.target)}{owner}; {_path(target)} needs another name")
        if group in PYTREES and inspect.isclass(target):
            _check_pytree(group, name, target, defaults)
        fields = {**_signature(target, defaults), **(extra or {})}
        numbers = frozenset(k for k, (kind, _) in fields.items() if schedules and kind is float and not _is_static(target, k))
        fields = {k: (Any if k in numbers else kind, default) for k, (kind, default) in fields.items()}
        _options[group, name] = Option(group, name, target, fields, numbers, _provider)
        ConfigStore.instance().store(group=group, name=name, node=_node(name, target, fields), provider="jdistill")
        return target

    return decorate


@contextlib.contextmanager
def provided_by(provider: str) -> Iterator[None]:
    """What is registered inside belongs to `provider`; an exception inside takes it all back."""
    global _provider
    before, outer = {key: (option, _nodes(key[0])[f"{key[1]}.yaml"]) for key, option in _options.items()}, _provider
    _provider = provider
    try:
        yield
    except BaseException:
        for group, name in set(_options) - set(before):
            del _options[group, name], _nodes(group)[f"{name}.yaml"]
        for (group, name), (option, node) in before.items():
            _options[group, name] = option
            _nodes(group)[f"{name}.yaml"] = node
        raise
    finally:
        _provider = outer


def provided(provider: str, package: str) -> list[Option]:
    """The options of a plug-in; where its `package` had been imported before, those of that package."""
    every = list(_options.values())
    own = [option for option in every if option.provider == provider]
    return own or [option for option in every if option.target.__module__.partition(".")[0] == package]


def options(group: str) -> dict[str, Option]:
    """All options of a group by name, in the order of their names."""
    return dict(sorted((name, option) for (g, name), option in _options.items() if g == group))


def build(group: str, config: dict[str, Any], **given: Any) -> Any:
    """Builds what a group's config describes; `config["name"]` names the option.

    Args:
      group: the config group, also the prefix of keys in error messages.
      config: plain containers; keys it lacks have the option's defaults, keys the target does not take are left out.
      **given: parameters the program supplies (those without a default in the signature).

    Raises:
      UsageError: an unknown option or key, or a value the target refuses; the message begins with the key.
    """
    name = str(config.get("name"))
    if (group, name) not in _options:
        raise unknown(group, name, options(group))
    option = _options[group, name]
    check_keys(group, config, {"name", *option.fields})
    accepted = parameters(option.target)
    complete = {**{k: default for k, (_, default) in option.fields.items()}, **config}
    arguments = {k: _frozen(v) for k, v in complete.items() if k in accepted and k != "name"}
    arguments |= {k: number(f"{group}.{k}", complete[k]) for k in option.numbers & set(arguments)}
    try:
        return option.target(**arguments, **given)
    except UsageError as error:
        prefix = f"{group}." if _starts_with_key(str(error), option.fields) else f"{group}={name}: "
        raise UsageError(f"{prefix}{error}") from error
    except (TypeError, ValueError) as error:
        raise UsageError(f"{group}={name}: {error}") from error


@functools.lru_cache(maxsize=1024)
def parameters(target: Callable[..., Any]) -> frozenset[str]:
    """The names of what a class or function takes."""
    return frozenset(inspect.signature(target).parameters)


def number(key: str, value: Any) -> Any:
    """What a config says a number is: a float, or the schedule that `{name: linear, start: 0, end: 1}` describes.

    Raises:
      UsageError: neither of the two; the message begins with `key`.
    """
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, dict) and "name" in value:
        try:
            return build("schedule", value)
        except UsageError as error:
            raise UsageError(f"{key}: {error}") from error
    raise UsageError(f"{key} must be a number, or a schedule such as {{name: linear, start: 0, end: 1}}, got {value!r}")


def check_keys(where: str, found: typing.Iterable[str], known: typing.Iterable[str]) -> None:
    """Raises `UsageError` naming the first key of `found` that is not among `known`, with the nearest known one."""
    known = set(known)
    for key in found:
        if key not in known:
            dotted = f"{where}.{key}" if where else key
            raise UsageError(f"unknown key '{dotted}'{did_you_mean(key, known)} (known: {', '.join(sorted(known))})")


def _starts_with_key(message: str, fields: typing.Iterable[str]) -> bool:
    return any(message.startswith((f"{field} ", f"{field}[", f"{field}.")) for field in fields)


def _frozen(value: Any) -> Any:
    """Lists as tuples all the way down: static fields must be hashable."""
    if isinstance(value, list | tuple):
        return tuple(_frozen(v) for v in value)
    if isinstance(value, dict):
        return {k: _frozen(v) for k, v in value.items()}
    return value


def _nodes(group: str) -> dict[str, Any]:
    """Hydra's nodes of a group, by `name.yaml`."""
    folder = ConfigStore.instance().repo
    for part in group.split("/"):
        folder = folder[part]
    return folder


def _check_pytree(group: str, name: str, target: type, defaults: dict[str, Any]) -> None:
    import jax

    where = f"{group}={name}: {_path(target)}"
    if jax.tree_util.all_leaves([object.__new__(target)]):
        raise UsageError(f"{where} is no pytree; write @pytree directly above the class, below the line that registers it")
    hints = typing.get_type_hints(target)
    for field in dataclasses.fields(target):
        if field.name not in defaults and field.default is field.default_factory is dataclasses.MISSING:
            raise UsageError(f"{where}.{field.name} has no default; every key of an option needs one")
        if group == "loss" and not field.metadata.get("static") and _never_traced(hints[field.name]):
            kind = getattr(hints[field.name], "__name__", hints[field.name])
            raise UsageError(
                f"{where}.{field.name} is {kind}, but JAX traces this field as a float; annotate float, or write"
                f" {field.name}: {kind} = static(default=...)"
            )


def _never_traced(hint: Any) -> bool:
    """Whether no value of this type can be a number that JAX traces: int, bool, str and containers of them."""
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return float not in arguments and any(map(_never_traced, arguments))
    return hint in (int, bool, str) or (typing.get_origin(hint) in (tuple, list) and any(map(_never_traced, arguments)))


def _is_static(target: Any, name: str) -> bool:
    field = getattr(target, "__dataclass_fields__", {}).get(name)
    return field is not None and bool(field.metadata.get("static"))


def _path(target: Callable[..., Any]) -> str:
    return f"{target.__module__}.{target.__qualname__}"


def _signature(target: Callable[..., Any], defaults: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    hints = typing.get_type_hints(target.__init__ if inspect.isclass(target) else target)
    if inspect.isclass(target):
        hints = {**typing.get_type_hints(target), **hints}
    fields = {}
    for name, parameter in inspect.signature(target).parameters.items():
        default = defaults.get(name, parameter.default)
        if default is inspect.Parameter.empty or name in ("parent", "name") or parameter.kind is parameter.VAR_KEYWORD:
            continue  # given by the program (or Flax's own)
        fields[name] = (_config_type(hints.get(name, Any)), default)
    if missing := set(defaults) - set(fields):
        raise TypeError(f"{_path(target)} has no parameter {', '.join(sorted(missing))}")
    return fields


def _config_type(hint: Any) -> Any:
    """The nearest type OmegaConf can check: tuples become lists, what it cannot express becomes Any."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint in (int, float, bool, str, Any):
        return hint
    if origin is tuple:
        return list[_config_type(arguments[0])] if arguments else list[Any]  # type: ignore[misc]
    if origin is list:
        return list[_config_type(arguments[0])]  # type: ignore[misc]
    if type(None) in arguments and len(arguments) == 2:
        inner = _config_type(next(a for a in arguments if a is not type(None)))
        return inner | None if inner is not Any else Any
    return Any


def _node(name: str, target: Callable[..., Any], fields: dict[str, tuple[Any, Any]]) -> Any:
    def field(default: Any) -> Any:
        if isinstance(default, tuple | list):
            return dataclasses.field(default_factory=lambda: list(default))
        if isinstance(default, dict):
            return dataclasses.field(default_factory=lambda: dict(default))
        return dataclasses.field(default=MISSING if default is ... else default)

    columns = [("name", str, field(name)), *((key, kind, field(default)) for key, (kind, default) in fields.items())]
    return dataclasses.make_dataclass(f"{name}_{target.__name__}", columns)
