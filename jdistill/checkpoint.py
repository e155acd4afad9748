"""Saving and restoring pytrees of arrays: Orbax inside, atomic, leaf for leaf the same bits."""

import errno
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jdistill.errors import RunError

T = TypeVar("T")

SPARE_BYTES = 1_000_000
"""What a file system must have free beside a checkpoint's arrays: its index, results, journals."""


def save(path: Path, tree: Any) -> None:
    """Writes the leaves of `tree` to folder `path`, which appears whole or not at all. An existing one is replaced.

    Raises:
      RunError: it cannot be written, as on a full disk.
    """
    leaves = {f"{i:05d}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(tree))}
    path.parent.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(path.parent).free < sum(leaf.nbytes for leaf in leaves.values()) + SPARE_BYTES:
        raise RunError(f"checkpoint {path} cannot be written ({os.strerror(errno.ENOSPC)})")  # TensorStore prints tracebacks
    try:
        with _checkpointer() as checkpointer:
            checkpointer.save(path.absolute(), leaves, force=True)
    except Exception as error:  # TensorStore says of a full disk what XLA says of memory: RESOURCE_EXHAUSTED
        for begun in path.parent.glob(f"{path.name}.orbax*"):
            shutil.rmtree(begun, ignore_errors=True)
        system = re.search(r"([^:]+) \[os_error_code", str(error))
        reason = system[1].strip() if system else getattr(error, "strerror", None) or first_line(error)[:200]
        raise RunError(f"checkpoint {path} cannot be written ({reason})") from error


def _checkpointer() -> Any:
    """Orbax's, which of several processes waits for no other: each reads and writes by itself."""
    import orbax.checkpoint as ocp

    if jax.process_count() == 1:
        return ocp.PyTreeCheckpointer()
    own = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=own, active_processes={own}, barrier_sync_key_prefix=f"process{own}"
    )
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
    return ocp.Checkpointer(handler, multiprocessing_options=alone)


def restore(path: Path, like: T) -> T:
    """The tree saved at `path`, in the structure of `like` (abstract leaves do); NumPy leaves of `like` stay NumPy's.

    Raises:
      RunError: the folder is damaged, or holds other shapes than `like`.
    """
    import orbax.checkpoint as ocp

    expected, treedef = jax.tree.flatten(like)
    try:
        with _checkpointer() as checkpointer:
            saved = checkpointer.restore(
                path.absolute(),
                restore_args={f"{i:05d}": ocp.RestoreArgs(restore_type=np.ndarray) for i in range(len(expected))},
            )
    except Exception as error:
        raise RunError(f"checkpoint {path} cannot be read ({first_line(error)}); delete that folder") from error
    leaves = [saved[name] for name in sorted(saved)]
    found = [(np.shape(leaf), np.asarray(leaf).dtype) for leaf in leaves]
    wanted = [(np.shape(leaf), np.dtype(leaf.dtype)) for leaf in expected]
    if found != wanted:
        raise RunError(
            f"checkpoint {path} holds {len(found)} arrays of other shapes than this config needs; delete that folder"
        )
    pairs = zip(leaves, expected, strict=True)  # JAX would make 32 bits of NumPy's 64
    kept = [leaf if isinstance(wish, np.ndarray | np.generic) else jnp.asarray(leaf) for leaf, wish in pairs]
    return jax.tree.unflatten(treedef, kept)


class Checkpoints:
    """The checkpoints of one fit, folders `STAGE-STEP`, of a population `STAGE-STEP-ROWS`.

    The newest counts, older ones go once a newer one is whole.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def save(self, stage: int, step: int, tree: Any, rows: int | None = None) -> None:
        """Writes the checkpoint of `step`, then deletes all others and what a killed save left behind."""
        name = f"{stage}-{step}" + ("" if rows is None else f"-{rows}")
        save(self.folder / name, tree)
        for entry in self.folder.iterdir():
            if entry.name != name:
                shutil.rmtree(entry, ignore_errors=True)

    def latest(self) -> tuple[int, int, Path] | None:
        """(stage, rows of a population or 0, folder) of the newest checkpoint, or None."""
        found = [
            (tuple(int(n or 0) for n in match.groups()), entry)
            for entry in self.folder.glob("*")
            if (match := re.fullmatch(r"(\d+)-(\d+)(?:-(\d+))?", entry.name))
        ]
        if not found:
            return None
        (stage, _, rows), path = max(found)
        return stage, rows, path

    def clear(self) -> None:
        """Deletes all checkpoints: the run is finished, or starts anew."""
        shutil.rmtree(self.folder, ignore_errors=True)


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Calls `write(temporary)` and moves the finished file to `path`: readers see the old file or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Writes JSON atomically; NaN and infinity, which JSON lacks, become null."""
    text = json.dumps(finite(value), indent=1, allow_nan=False) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text))


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or its type's name."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def finite(value: Any) -> Any:
    """Nested dicts and lists with None for numbers that JSON lacks, and Python's numbers for NumPy's."""
    if isinstance(value, dict):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not np.isfinite(value) else value
