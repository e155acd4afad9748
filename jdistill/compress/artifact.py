"""The deployed form of a network: one safetensors file. Its bytes are what a table reports, and what is evaluated.

Each leaf is stored by whichever of these is smallest and exact: float32 or int8 (with float32 scales) values in full, or,
where many are zero, one bit a value saying which are not (`#mask`) and those alone.
"""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jdistill.checkpoint import first_line, write_atomically
from jdistill.compress.base import Compressor, Quantized, leaf_name
from jdistill.errors import RunError
from jdistill.types import PyTree


def write_artifact(
    path: Path, compressors: tuple[Compressor, ...], params: PyTree, state: PyTree, about: dict[str, Any]
) -> int:
    """Writes effective `params` and running statistics `state`; returns the bytes of the file.

    `about` (JSON) travels in the file's header: what builds the network, and preprocessing constants.
    """
    from safetensors.numpy import save_file

    tensors: dict[str, np.ndarray] = {}
    shapes: dict[str, list[int]] = {}
    for path_, leaf in jax.tree_util.tree_leaves_with_path({"params": params, "state": state}):
        name = leaf_name(path_)
        value: np.ndarray | Quantized = np.asarray(leaf)
        for compressor in compressors:
            if name.startswith("params/"):
                value = compressor.finalize(name, value)
        if isinstance(value, Quantized):
            tensors[f"{name}#scale"] = value.scale
            value = value.values
        dense = np.asarray(value, order="C")
        kept = dense[dense != 0]
        if (dense.size + 7) // 8 + kept.nbytes < dense.nbytes:
            shapes[name] = list(dense.shape)
            tensors[f"{name}#mask"] = np.packbits(dense.ravel() != 0)
            tensors[name] = kept
        else:
            tensors[name] = dense
    metadata = {"jdistill": json.dumps({**about, "sparse": shapes}, sort_keys=True, separators=(",", ":"))}
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata))
    return path.stat().st_size


def read_artifact(path: Path) -> tuple[PyTree, PyTree, dict[str, Any]]:
    """`(params, state, about)` of an artifact, as nested dicts of dense float arrays.

    Raises:
      RunError: the file is missing or damaged.
    """
    from safetensors import safe_open

    tree: dict[str, Any] = {"params": {}, "state": {}}
    try:
        with safe_open(path, "numpy") as file:
            about = json.loads(file.metadata()["jdistill"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        for name in tensors:
            if "#" not in name:
                *parents, last = name.split("/")
                node = tree
                for parent in parents:
                    node = node.setdefault(parent, {})
                node[last] = _dense(name, tensors, about["sparse"])
    except Exception as error:
        raise RunError(f"artifact {path} cannot be read ({first_line(error)})") from error
    return tree["params"], tree["state"], about


def _dense(name: str, tensors: dict[str, np.ndarray], sparse: dict[str, list[int]]) -> np.ndarray:
    """The stored leaf `name`, in full and as floats."""
    value = tensors[name]
    if name in sparse:
        shape = tuple(sparse[name])
        mask = np.unpackbits(tensors[f"{name}#mask"], count=int(np.prod(shape))).astype(bool)
        if mask.sum() != value.size:
            raise ValueError(f"{name} holds {value.size} values, its mask {mask.sum()}")
        dense = np.zeros(mask.shape, value.dtype)
        dense[mask] = value
        value = dense.reshape(shape)
    if f"{name}#scale" in tensors:
        value = value.astype(np.float32) * tensors[f"{name}#scale"]
    return value


def restore_structure(tree: PyTree, like: PyTree) -> PyTree:
    """`tree` (nested dicts by path) in the structure of `like`, for networks whose parameters are not plain dicts."""
    flat = {leaf_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    paths, treedef = jax.tree_util.tree_flatten_with_path(like)
    return jax.tree.unflatten(treedef, [flat[leaf_name(path)] for path, _ in paths])


def count_nonzero(params: PyTree) -> tuple[int, int]:
    """(parameters, non-zero parameters)."""
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(params)]
    return sum(leaf.size for leaf in leaves), sum(int(np.count_nonzero(leaf)) for leaf in leaves)
