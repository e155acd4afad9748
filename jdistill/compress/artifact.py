"""The deployed form of a network: one safetensors file. Its bytes are what a table reports, and what is evaluated.

Each leaf is stored by whichever of these is smallest and exact: its values in full (integers with float scales), integers
in as few bits as their range needs (`packed`), or, where many are zero, one bit a value saying which are not (`#mask`) and
those alone. The header holds a SHA-256 of all of it.
"""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jdistill.checkpoint import first_line, write_atomically
from jdistill.compress.base import Compressor, Quantized, Stored, decodes, leaf_name
from jdistill.errors import RunError
from jdistill.registry import build, options
from jdistill.schedules import at_end
from jdistill.types import Model, PyTree

Tensors = dict[str, np.ndarray]


def write_artifact(
    path: Path,
    steps: tuple[Compressor, ...],
    stored: Stored,
    running: PyTree,
    about: dict[str, Any],
    model: Model | None = None,
) -> int:
    """Writes a student (see `compress.base.finished`) and its running statistics; returns the bytes of the file.

    `about` (JSON) travels in the file's header: what builds the network (`student`), and preprocessing constants. A student
    that became a smaller network is described as that.
    """
    from safetensors.numpy import save_file

    forms: list[dict[str, Any]] = []
    tensors: Tensors = {}
    steps = at_end(tuple(steps))
    for step, state in zip(steps, stored.states, strict=True):
        seen = {"model": model} if step.reads_network else {}
        smaller = step.shrink(about.get("student", {}), running, state, **seen)
        if smaller is not None:
            node, running = smaller
            about = {**about, "student": node}
        elif decodes(step):
            tensors |= _form_tensors(len(forms), state)
            forms.append(_described(step))
    notes: dict[str, Any] = {"sparse": {}, "packed": {}, "grouped": {}}
    for entry, leaf in jax.tree_util.tree_leaves_with_path({"params": stored.params, "state": running}):
        name = leaf_name(entry)
        value: np.ndarray | Quantized = np.asarray(leaf)
        if name.startswith("params/"):
            own = name.removeprefix("params/")
            for step, state in zip(steps, stored.states, strict=True):
                value = step.finalize(own, value, state)
        if isinstance(value, Quantized):
            tensors[f"{name}#scale"] = np.asarray(value.scale)
            if value.offset is not None:
                tensors[f"{name}#offset"] = np.asarray(value.offset)
            if value.group:
                notes["grouped"][name] = value.group
            value = value.values
        tensors[name] = np.asarray(value, order="C")
    for name in [name for name in tensors if "#" not in name or name.startswith("form")]:
        _smallest(name, tensors, notes)
    header = {**about, "forms": forms, **notes}
    header["sha256"] = _digest(tensors, header)
    metadata = {"jdistill": json.dumps(header, sort_keys=True, separators=(",", ":"))}
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata))
    return path.stat().st_size


def read_artifact(path: Path) -> tuple[PyTree, PyTree, dict[str, Any]]:
    """`(params, state, about)` of an artifact: effective parameters, as nested dicts of dense float arrays.

    Raises:
      RunError: the file is missing or damaged.
    """
    stored, running, steps, about = read_stored(path)
    params = stored.params
    for step, state in reversed(list(zip(steps, stored.states, strict=True))):
        params = jax.tree.map(np.asarray, step.decode(params, state))
    return params, running, about


def read_stored(path: Path) -> tuple[Stored, PyTree, tuple[Compressor, ...], dict[str, Any]]:
    """The student as it is stored, its running statistics, the steps whose forms it has, and what the header says.

    Raises:
      RunError: the file is missing or damaged.
    """
    from safetensors import safe_open

    tree: dict[str, Any] = {"params": {}, "state": {}}
    try:
        with safe_open(path, "numpy") as file:
            about = json.loads(file.metadata()["jdistill"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        if about.pop("sha256", None) != _digest(tensors, about):
            raise ValueError("it was changed after it was written")
        states: list[PyTree] = [{} for _ in about["forms"]]
        for name in tensors:
            if name.startswith("form") and not name.endswith("#mask"):
                number, leaf, *rest = name.removeprefix("form").split("#")
                _put(states[int(number)], [leaf, *rest], _dense(name, tensors, about))
            elif "#" not in name:
                _put(tree, name.split("/"), _dense(name, tensors, about))
        steps = tuple(build("compression", node) for node in about["forms"])
    except Exception as error:
        raise RunError(f"artifact {path} cannot be read ({first_line(error)})") from error
    return Stored(tree["params"], tuple(states)), tree["state"], steps, about


def _digest(tensors: Tensors, header: dict[str, Any]) -> str:
    """SHA-256 of all tensors, their names, types and shapes, and the header."""
    found = hashlib.sha256(json.dumps(header, sort_keys=True, separators=(",", ":")).encode())
    for name, array in sorted(tensors.items()):
        found.update(f"{name} {array.dtype} {array.shape}".encode())
        found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()


def _described(step: Compressor) -> dict[str, Any]:
    """The config node that builds `step`."""
    found = {field.name: getattr(step, field.name) for field in dataclasses.fields(step)}  # type: ignore[arg-type]
    plain = {name: value.item() if hasattr(value, "item") else value for name, value in found.items()}
    for name, option in options("compression").items():
        if option.target is type(step):
            return {"name": name, **plain}
    raise TypeError(f"{type(step).__name__} is not registered in group compression, so that no file can name it")


def _form_tensors(number: int, state: PyTree) -> Tensors:
    """What a step holds, by `form0#leaf#part`."""
    found = {}
    for name, value in state.items():
        for path, array in jax.tree_util.tree_leaves_with_path(value):
            parts = [str(getattr(entry, "key", getattr(entry, "idx", entry))) for entry in path]
            found["#".join([f"form{number}", name, *parts])] = np.asarray(array)
    return found


def _put(tree: dict[str, Any], path: list[str], value: np.ndarray) -> None:
    *parents, last = path
    for parent in parents:
        tree = tree.setdefault(parent, {})
    tree[last] = value


def _smallest(name: str, tensors: Tensors, notes: dict[str, Any]) -> None:
    """Replaces a tensor by its smallest exact form, and notes which."""
    dense = tensors[name]
    kept = dense[dense != 0]
    if (dense.size + 7) // 8 + _packed_bytes(kept) < _packed_bytes(dense):
        notes["sparse"][name] = list(dense.shape)
        tensors[f"{name}#mask"] = np.packbits(dense.ravel() != 0)
        tensors[name] = dense = kept
    if _packed_bytes(dense) < dense.nbytes:
        low, bits = _range(dense)
        notes["packed"][name] = {"low": low, "bits": bits, "shape": list(dense.shape), "dtype": str(dense.dtype)}
        shifted = (dense.ravel().astype(np.int64) - low).astype(np.uint32)
        tensors[name] = np.packbits((shifted[:, None] >> np.arange(bits, dtype=np.uint32)) & 1)


def _range(integers: np.ndarray) -> tuple[int, int]:
    """The smallest integer, and the bits that the others need above it; at least 1."""
    if not integers.size:
        return 0, 1
    low, high = int(integers.min()), int(integers.max())
    return low, max(1, (high - low).bit_length())


def _packed_bytes(array: np.ndarray) -> int:
    if array.dtype.kind not in "iu" or _range(array)[1] > 16:
        return array.nbytes
    return (array.size * _range(array)[1] + 7) // 8


def _dense(name: str, tensors: Tensors, about: dict[str, Any]) -> np.ndarray:
    """The stored tensor `name`, in full; a quantized one as floats."""
    value = tensors[name]
    if name in about["packed"]:
        note = about["packed"][name]
        count, bits = int(np.prod(note["shape"])), note["bits"]
        found = np.unpackbits(value, count=count * bits).reshape(count, bits).astype(np.int64)
        value = ((found << np.arange(bits)).sum(axis=1) + note["low"]).astype(note["dtype"]).reshape(note["shape"])
    if name in about["sparse"]:
        shape = tuple(about["sparse"][name])
        mask = np.unpackbits(tensors[f"{name}#mask"], count=int(np.prod(shape))).astype(bool)
        if mask.sum() != value.size:
            raise ValueError(f"{name} holds {value.size} values, its mask {mask.sum()}")
        dense = np.zeros(mask.shape, value.dtype)
        dense[mask] = value
        value = dense.reshape(shape)
    if f"{name}#scale" in tensors:
        scale = tensors[f"{name}#scale"].astype(np.float32)
        if name in about["grouped"]:
            scale = np.repeat(scale, about["grouped"][name], axis=0)[: value.size // scale.shape[-1]].reshape(value.shape)
        value = value.astype(np.float32) * scale
    if f"{name}#offset" in tensors:
        value = value + tensors[f"{name}#offset"].astype(np.float32)
    return value


def restore_structure(tree: PyTree, like: PyTree) -> PyTree:
    """`tree` (nested dicts by path) in the structure of `like`, for networks whose parameters are not plain dicts.

    Entries beside the network's own, such as the ranges of activations, have names that begin with `#`; they stay.
    """
    flat = {leaf_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    paths, treedef = jax.tree_util.tree_flatten_with_path(like)
    found = jax.tree.unflatten(treedef, [flat[leaf_name(path)] for path, _ in paths])
    beside = {name: own for name, own in tree.items() if name.startswith("#")}
    return {**found, **beside} if beside else found


def count_nonzero(params: PyTree) -> tuple[int, int]:
    """(parameters, non-zero parameters) of a network; entries beside its own do not count."""
    if isinstance(params, dict):
        params = {name: own for name, own in params.items() if not str(name).startswith("#")}
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(params)]
    return sum(leaf.size for leaf in leaves), sum(int(np.count_nonzero(leaf)) for leaf in leaves)
