"""The compressor contract: pure functions on parameters, and what `compression=` builds from them."""

import re
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array

from jdistill.pytrees import pytree
from jdistill.registry import register
from jdistill.types import PyTree

WEIGHT = re.compile(r"(^|/)(kernel|embedding|table|user|item|met|position)$")


class Quantized(NamedTuple):
    """A leaf as integers: `values` int8 and `scale` float32 that broadcasts against it; the weight is their product."""

    values: np.ndarray
    scale: np.ndarray


class Compressor:
    """One step of compression. Subclasses are frozen pytree dataclasses registered in group `compression`."""

    recover_epochs: int = 0
    """Epochs of training after this step, under its constraint; 0 for none."""

    def init(self, params: PyTree) -> PyTree:
        """The step's state (masks, scales) for trained `params`; jit-able."""
        del params
        return {}

    def apply(self, params: PyTree, state: PyTree) -> PyTree:
        """The effective parameters, differentiable with respect to `params`."""
        del state
        return params

    def finalize(self, name: str, value: np.ndarray | Quantized) -> np.ndarray | Quantized:
        """How the effective leaf called `name` (path joined by `/`) is stored in the artifact."""
        del name
        return value


@register("compression", "none")
@pytree
class NoCompression:
    """The trained parameters as they are, float32."""

    def steps(self) -> tuple[Compressor, ...]:
        return ()


def is_weight(path: tuple[Any, ...], leaf: Array) -> bool:
    """Whether a leaf is a weight matrix, convolution kernel or embedding table (not a bias, not a BatchNorm scale)."""
    return leaf.ndim >= 2 and bool(WEIGHT.search(leaf_name(path)))


def leaf_name(path: tuple[Any, ...]) -> str:
    """`a/b/kernel` for a tree path."""
    return "/".join(str(getattr(entry, "key", getattr(entry, "idx", getattr(entry, "name", entry)))) for entry in path)


def map_weights(function: Any, params: PyTree, *rest: PyTree) -> PyTree:
    """Maps `function(leaf, *rest_leaves)` over weight leaves; other leaves of `params` stay."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf, *others: function(leaf, *others) if is_weight(path, leaf) else leaf, params, *rest
    )


def apply_all(compressors: tuple[Compressor, ...], params: PyTree, states: tuple[PyTree, ...]) -> PyTree:
    """Effective parameters under a sequence of compressors."""
    for compressor, state in zip(compressors, states, strict=True):
        params = compressor.apply(params, state)
    return params
