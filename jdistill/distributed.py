"""Several processes that train one run together, each with its own devices (`jax.distributed`).

All compute the same numbers on the host; a compiled step divides the batch over the devices of all. Only the main
process, number 0, writes the run's folder; the others work in a copy that is deleted.
"""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jdistill.errors import RunError, UsageError
from jdistill.types import PyTree

COPIED = ("result.json", ".fingerprint", "metrics.jsonl", "checkpoints")
"""What a run continues from."""

_started: Any = None


def parse(value: Any) -> tuple[str, int, int] | str | None:
    """What `parallel.distributed` says.

    Raises:
      UsageError: it is not `[host:port, processes, this process]`, `auto` or null.
    """
    if value is None or value == "auto":
        return value
    given = list(value) if isinstance(value, list | tuple) else [value]
    whole = [type(n) is int for n in given[1:]] == [True, True]
    if not (whole and isinstance(given[0], str) and ":" in given[0] and 0 <= given[2] < given[1]):
        raise UsageError(
            f"distributed must be [HOST:PORT, PROCESSES, THIS_PROCESS] such as [10.0.0.1:9911,2,0], or auto, got {value!r}"
        )
    return given[0], given[1], given[2]


def start(value: Any) -> None:
    """Joins the other processes, once; must come before JAX is used. `value` is the config's `parallel.distributed`.

    Raises:
      UsageError: as `parse`, or another value than this process was started with.
      RunError: JAX was used before, or the others cannot be reached.
    """
    global _started
    try:
        wanted = parse(value)
    except UsageError as error:
        raise UsageError(f"parallel.{error}") from error
    if wanted is None or wanted == _started:
        return
    if _started is not None:
        raise UsageError(f"parallel.distributed is {wanted!r}, but this process was started with {_started!r}")
    try:
        jax.distributed.initialize(*(() if isinstance(wanted, str) else wanted))
    except (RuntimeError, ValueError) as error:
        raise RunError(f"parallel.distributed: {' '.join(str(error).split())}") from error
    _started = wanted


def require_joined(value: Any) -> None:
    """Raises `UsageError` where a config names processes that nothing has joined: only a run of its own does."""
    if value is not None and _started is None:
        raise UsageError("parallel.distributed joins the processes of one run; leave it out of a multirun (-m)")


def is_main() -> bool:
    """Whether this process writes the run's folder."""
    return jax.process_index() == 0


@contextlib.contextmanager
def run_folder(folder: Path) -> Iterator[Path]:
    """The folder in which this process carries the run out: `folder` for the main one, for others a copy of their own.

    All processes must come here; the main one holds the folder's lock, so that what is copied does not change.
    """
    if jax.process_count() == 1:
        yield folder
        return
    with contextlib.ExitStack() as stack:
        _barrier("locked")
        own = folder
        if not is_main():
            own = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="jdistill-")))
            for name in COPIED:
                if (folder / name).is_dir():
                    shutil.copytree(folder / name, own / name)
                elif (folder / name).is_file():
                    shutil.copy(folder / name, own / name)
        _barrier("copied")
        yield own
        _barrier("ended")


def _barrier(name: str) -> None:
    from jax.experimental import multihost_utils

    multihost_utils.sync_global_devices(name)


def largest(value: int) -> int:
    """The largest `value` of all processes, in all of them."""
    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    return int(np.max(multihost_utils.process_allgather(np.int32(value))))


def put(tree: PyTree, place: jax.sharding.Sharding) -> PyTree:
    """`tree`, which is equal in all processes, on the devices of `place`."""
    return jax.tree.map(lambda leaf: _put(leaf, place), tree)


def _put(leaf: Any, place: jax.sharding.Sharding) -> Any:
    if jax.process_count() == 1 or (isinstance(leaf, jax.Array) and not leaf.is_fully_addressable):
        # may_alias: the programs delete what they are given, which may be another's buffer
        return jax.device_put(leaf, place, may_alias=False)
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(_put(jax.random.key_data(leaf), place))
    host = np.asarray(leaf)
    return jax.make_array_from_callback(host.shape, place, lambda index: host[index])


def local(tree: PyTree) -> PyTree:
    """`tree` as arrays of this process alone; as it is where there is one process."""
    if jax.process_count() == 1:
        return tree
    return jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), tree)


__all__ = ["is_main", "largest", "local", "parse", "put", "require_joined", "run_folder", "start"]
