"""A teacher that is a file of logits, computed by any framework."""

import functools
import zipfile
import zlib
from pathlib import Path

import numpy as np

from jdistill.checkpoint import first_line
from jdistill.data import Dataset
from jdistill.errors import UsageError


def given_logits(path: Path, dataset: Dataset, outputs: int) -> np.ndarray:
    """The logits [N, outputs] float32 of an .npz file with `ids` and `logits`, in the order of the training split.

    Raises:
      UsageError: not such a file, or training examples without logits; nothing pickled is ever loaded.
    """
    ids, logits = _checked(str(path), path.stat().st_mtime_ns, outputs)
    order = np.argsort(ids, kind="stable")
    repeated = np.diff(ids[order]) == 0
    if repeated.any():
        raise UsageError(f"teacher.path {path}: id {ids[order][1:][repeated][0]} occurs more than once")
    wanted = dataset.train["index"]
    place = np.clip(np.searchsorted(ids[order], wanted), 0, max(len(ids) - 1, 0))
    absent = wanted[ids[order][place] != wanted] if len(ids) else wanted
    if len(absent):
        raise UsageError(
            f"teacher.path {path}: {len(absent)} of {len(wanted)} training examples have no logits, first id {absent[0]};"
            " ids are row numbers of the publisher's training file"
        )
    rows = np.asarray(logits[order][place], np.float32)
    if not np.isfinite(rows).all():
        raise UsageError(f"teacher.path {path}: logits of id {wanted[~np.isfinite(rows).all(1)][0]} are not finite numbers")
    return rows


@functools.lru_cache(maxsize=4)
def _checked(path: str, stamp: int, outputs: int) -> tuple[np.ndarray, np.ndarray]:
    """(ids, logits) of the file as it was at `stamp`, of the right shapes and types."""
    del stamp
    try:
        with zipfile.ZipFile(path):
            pass
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise UsageError(f"teacher.path {path} is not a readable .npz file ({first_line(error)})") from error
    if missing := {"ids", "logits"} - set(arrays):
        raise UsageError(
            f"teacher.path {path} lacks {' and '.join(sorted(missing))}; it holds {', '.join(sorted(arrays)) or 'nothing'}"
        )
    ids, logits = arrays["ids"], arrays["logits"]
    if ids.ndim != 1 or logits.shape != (len(ids), outputs):
        raise UsageError(
            f"teacher.path {path}: expected ids [N] and logits [N, {outputs}], found {ids.shape} and {logits.shape}"
        )
    if ids.dtype.kind not in "iu" or logits.dtype.kind not in "fiu":
        raise UsageError(f"teacher.path {path}: expected integer ids and real logits, found {ids.dtype} and {logits.dtype}")
    return ids, logits
