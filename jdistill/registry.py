"""Named options of the config groups: one decorator makes a class or function a typed Hydra option.

`@register("loss", "kd")` on a class reads its signature and stores an option whose keys, types and defaults are
the parameters of that signature. Parameters without a default are given by the program, not by the config.
"""

import dataclasses
import inspect
import typing
from collections.abc import Callable
from typing import Any, TypeVar

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from jdistill.errors import UsageError, did_you_mean, unknown

F = TypeVar("F", bound=Callable[..., Any])


@dataclasses.dataclass(frozen=True)
class Option:
    """One registered option: `group` and `name`, what it builds, and its first docstring line."""

    group: str
    name: str
    target: Callable[..., Any]
    fields: dict[str, tuple[Any, Any]]

    @property
    def summary(self) -> str:
        return (inspect.getdoc(self.target) or "").partition("\n")[0]


_options: dict[tuple[str, str], Option] = {}


def register(group: str, name: str, *, extra: dict[str, tuple[Any, Any]] | None = None, **defaults: Any) -> Callable[[F], F]:
    """Registers a class or function as option `name` of config group `group`.

    Args:
      group: a config group, such as `loss`, `teacher`, `student`, `data`, `compression`, `optim`, `scheme`.
      name: the word after `group=` on the command line.
      extra: further keys of the option, `{name: (type, default)}`, that the target itself does not take.
      **defaults: other defaults than the signature's, for this option.

    Raises:
      UsageError: the name is taken by another target.
    """

    def decorate(target: F) -> F:
        taken = _options.get((group, name))
        if taken is not None and _path(taken.target) != _path(target):
            raise UsageError(f"{group}={name} is taken by {_path(taken.target)}; {_path(target)} needs another name")
        fields = {**_signature(target, defaults), **(extra or {})}
        _options[group, name] = Option(group, name, target, fields)
        ConfigStore.instance().store(group=group, name=name, node=_node(name, target, fields), provider="jdistill")
        return target

    return decorate


def options(group: str) -> dict[str, Option]:
    """All options of a group by name, in the order of their names."""
    return {name: option for (g, name), option in sorted(_options.items()) if g == group}


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
    accepted = inspect.signature(option.target).parameters
    complete = {**{k: default for k, (_, default) in option.fields.items()}, **config}
    arguments = {k: _frozen(v) for k, v in complete.items() if k in accepted and k != "name"}
    try:
        return option.target(**arguments, **given)
    except UsageError as error:
        prefix = f"{group}." if _starts_with_key(str(error), option.fields) else f"{group}={name}: "
        raise UsageError(f"{prefix}{error}") from error
    except (TypeError, ValueError) as error:
        raise UsageError(f"{group}={name}: {error}") from error


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
