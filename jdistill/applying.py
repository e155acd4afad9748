"""How a step applies a network: in which precision, and on which share of the batch it is tracing."""

import contextlib
import functools
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from jdistill.errors import UsageError
from jdistill.types import Model, Outputs, PyTree

PRECISIONS = ("float32", "bfloat16")


class Share(NamedTuple):
    """One of `total` equal, consecutive shares of a batch.

    Attributes:
      number: which one, from 0; may be traced.
      total: how many there are.
      axis: name of the mapped axis along which the neighbouring shares are computed at the same time, or None.
    """

    number: Any
    total: int
    axis: str | None = None

    def of(self, array: Array) -> Array:
        """The share [B / total, ...] of an array [B, ...]."""
        size = array.shape[0] // self.total
        return jax.lax.dynamic_slice_in_dim(array, self.number * size, size)


_share: ContextVar[Share | None] = ContextVar("share", default=None)
_linen: ContextVar[list[bool]] = ContextVar("linen")


def batch_axis() -> str | None:
    """The mapped axis that holds the rest of the batch of the network being traced, for layers that need all of it."""
    share = _share.get()
    return None if share is None else share.axis


@contextlib.contextmanager
def _tracing(share: Share) -> Iterator[list[bool]]:
    """Sets what layers see; gives a list that is not empty once a Linen module has been called."""
    seen: list[bool] = []
    tokens = _share.set(share), _linen.set(seen)
    try:
        with nn.intercept_methods(_as_of_whole_batch):
            yield seen
    finally:
        _share.reset(tokens[0])
        _linen.reset(tokens[1])


def _as_of_whole_batch(call: Any, arguments: tuple[Any, ...], named: dict[str, Any], context: Any) -> Any:
    """Dropout and Flax's BatchNorm as they act on the whole batch; every other layer as it is."""
    share, module = _share.get(), context.module
    _linen.get().append(True)
    if share is None or context.method_name != "__call__" or not arguments:
        return call(*arguments, **named)
    inputs, *rest = arguments
    if isinstance(module, nn.Dropout):
        ones = jnp.ones((inputs.shape[0] * share.total, *inputs.shape[1:]), inputs.dtype)
        return inputs * share.of(call(ones, *rest, **named))
    if isinstance(module, nn.BatchNorm) and share.axis is not None:
        whole = call(jax.lax.all_gather(inputs, share.axis, tiled=True), *rest, **named)
        size = inputs.shape[0]
        return jax.lax.dynamic_slice_in_dim(whole, jax.lax.axis_index(share.axis) * size, size)
    return call(*arguments, **named)


def sharing(model: Model, share: Share | None) -> Model:
    """`model`, whose `apply` is given a share of the batch: Linen's Dropout takes that share of the whole batch's mask.

    Where other shares are on a mapped axis, BatchNorm takes the statistics of all of them.

    Raises (when it is trained):
      UsageError: the network is not Linen's, so that its layers cannot be told of their share.
    """
    if share is None:
        return model

    def apply(*arguments: Any, **mode: Any) -> tuple[Outputs, PyTree]:
        with _tracing(share) as seen:
            found = model.apply(*arguments, **mode)
        if mode.get("train") and not seen:
            raise UsageError(
                "parallel=pmap and parallel.microbatches train networks of Flax Linen only, got another kind; use parallel=data"
            )
        return found

    return model._replace(apply=apply)


@functools.lru_cache(maxsize=256)
def computing(model: Model, precision: str) -> Model:
    """`model`, which computes in `precision`: parameters and inputs are rounded to it where they are used.

    What it is given and gives stays as it was: parameters and running statistics keep their dtype, outputs are float32.
    """
    if precision == "float32":
        return model
    low = jnp.dtype(precision)

    def apply(params: PyTree, state: PyTree, inputs: PyTree, **mode: Any) -> tuple[Outputs, PyTree]:
        outputs, new = model.apply(_cast(params, low), state, _cast(inputs, low), **mode)
        return _cast(outputs, jnp.dtype(jnp.float32)), jax.tree.map(lambda leaf, old: leaf.astype(old.dtype), new, state)

    return model._replace(apply=apply)


def _cast(tree: PyTree, dtype: Any) -> PyTree:
    """Floating leaves in `dtype`, all others as they are."""
    return jax.tree.map(lambda leaf: leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, tree)


__all__ = ["PRECISIONS", "Share", "batch_axis", "computing", "sharing"]
