"""Frozen dataclasses as pytrees: numbers are leaves, structure is static, so a sweep of numbers is one program."""

import dataclasses
import math
import numbers
import typing
from collections.abc import Iterable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from jdistill.errors import UsageError, did_you_mean

T = TypeVar("T")


def static(**kwargs: Any) -> Any:
    """A dataclass field that belongs to the structure: changing it makes another compiled program."""
    return dataclasses.field(metadata={"static": True}, **kwargs)


@typing.dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(static, dataclasses.field))
def pytree(cls: type[T]) -> type[T]:
    """Makes `cls` a frozen, keyword-only dataclass whose fields are pytree children, save those made by `static()`.

    `__post_init__` runs again whenever JAX unflattens, with tracers and placeholders: check real numbers only
    (the `require_*` functions here do).

    Not `jax.tree_util.register_dataclass`: it leaves the class out when it compares structures (jax 0.10), so two losses
    with equal static fields and as many numbers could be given one another's compiled program.
    """
    cls = dataclasses.dataclass(frozen=True, kw_only=True)(cls)
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    structure = tuple(f.name for f in fields if f.metadata.get("static"))
    leaves = tuple(f.name for f in fields if not f.metadata.get("static"))

    def flatten(tree: T) -> tuple[tuple[Any, ...], Any]:
        return tuple(getattr(tree, name) for name in leaves), (cls, tuple(getattr(tree, name) for name in structure))

    def flatten_with_keys(tree: T) -> tuple[tuple[Any, ...], Any]:
        children, aux = flatten(tree)
        return tuple(zip(map(jax.tree_util.GetAttrKey, leaves), children, strict=True)), aux

    def unflatten(aux: Any, children: Any) -> T:
        return cls(**dict(zip(structure, aux[1], strict=True)), **dict(zip(leaves, children, strict=True)))

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    return cls


def _require(condition: Any, expected: str, fields: dict[str, Any]) -> None:
    for name, given in fields.items():
        for value in given.endpoints() if hasattr(given, "endpoints") else (given,):  # a schedule lies between its ends
            if not isinstance(value, numbers.Real):
                continue
            if isinstance(value, bool) or not math.isfinite(value) or not condition(value):
                raise UsageError(f"{name} must be {expected}, got {value!r}")


def require_positive(**fields: Any) -> None:
    """Raises `UsageError` for a real number that is not > 0; tracers and arrays pass."""
    _require(lambda v: v > 0, "positive", fields)


def require_nonnegative(**fields: Any) -> None:
    """Raises `UsageError` for a real number that is not >= 0."""
    _require(lambda v: v >= 0, "at least 0", fields)


def require_fraction(**fields: Any) -> None:
    """Raises `UsageError` for a real number outside [0, 1)."""
    _require(lambda v: 0 <= v < 1, "at least 0 and below 1", fields)


def require_one_of(options: Iterable[str], **fields: Any) -> None:
    """Raises `UsageError` for a string that is not one of `options`."""
    options = list(options)
    for name, value in fields.items():
        if isinstance(value, str) and value not in options:
            raise UsageError(f"{name} must be one of {', '.join(options)}, got {value!r}{did_you_mean(value, options)}")


def as_leaves(tree: T) -> T:
    """Every number leaf as a strong-typed float32 array, so that another value is never another trace."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), tree)


@dataclasses.dataclass(frozen=True)
class Carried:
    """Carries a value through a cache that is keyed by the other arguments alone."""

    value: Any = dataclasses.field(compare=False)


def structure_key(tree: Any) -> tuple:
    """Hashable: two trees with equal keys run in one compiled program."""
    leaves, treedef = jax.tree.flatten(tree)
    return treedef, tuple((jnp.shape(leaf), jnp.result_type(leaf).name) for leaf in leaves)
