"""The check of every export: its outputs beside those of the JAX network, on real test inputs, at each batch size."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from jdistill.export.model import Deployable
from jdistill.export.runtimes import Runner
from jdistill.ranking import Ranked, excluded_from
from jdistill.tasks.base import Answer

ROWS = 256
"""Test rows that are compared at each batch size, or as many as a larger batch takes."""
LARGEST, OF_OUTPUT = 1e-4, 1e-6
"""Of float32 the largest difference allowed: the first, or the second times the largest output where that is more."""
RMS = 0.2
"""Of int8 the largest relative RMS: rounding gives 0.005 to 0.05, a wrong kernel or range 0.3 and more."""


def verdict(deployable: Deployable, runner: Runner, batch: int) -> dict[str, Any]:
    """How far an exported model is from JAX at a batch size.

    `largest` absolute difference; `rms`, the root mean square of the differences over the standard deviation of JAX's
    outputs; `limit` and what it is `by`; `passed`, false for NaN. `rows` were compared.
    """
    raw = deployable.blueprint.dataset.test["inputs"][: max(ROWS, batch)]
    wanted = np.concatenate([deployable.reference(raw[i : i + ROWS]) for i in range(0, len(raw), ROWS)])
    found = np.concatenate(list(outputs(runner, raw, batch)))
    difference = found.astype(np.float64) - wanted
    largest = float(np.abs(difference).max())
    rms = float(np.sqrt((difference**2).mean()) / max(float(wanted.std()), 1e-12))
    by, limit = (
        ("rms", RMS) if runner.card["int8"] != "none" else ("largest", max(LARGEST, OF_OUTPUT * float(np.abs(wanted).max())))
    )
    passed = (rms if by == "rms" else largest) <= limit
    return {"batch": batch, "rows": len(raw), "largest": largest, "rms": rms, "limit": limit, "by": by, "passed": bool(passed)}


def outputs(runner: Runner, raw: np.ndarray, batch: int) -> Iterator[np.ndarray]:
    """Logits [batch, K] of raw rows, `batch` at a time; the last ones filled up with repeated rows, which are cut off."""
    for start in range(0, len(raw), batch):
        part = raw[start : start + batch]
        yield runner(*runner.inputs(np.resize(part, (batch, *part.shape[1:]))))[: len(part)]


def metric(deployable: Deployable, runner: Runner, batch: int) -> dict[str, Any]:
    """The task's primary metric on the test split: of the JAX network and of the exported model, computed alike."""
    blueprint = deployable.blueprint
    task, dataset = blueprint.task, blueprint.dataset
    raw = dataset.test["inputs"]
    exported = _answer(deployable, lambda: outputs(runner, raw, batch))
    parts = (raw[i : i + ROWS] for i in range(0, len(raw), ROWS))
    own = _answer(deployable, lambda: (deployable.reference(part) for part in parts))
    values = [task.metrics(answer, dataset, "test")[task.primary] for answer in (own, exported)]
    return {"name": task.primary, "jax": values[0], "exported": values[1], "difference": values[1] - values[0]}


def _answer(deployable: Deployable, scores: Callable[[], Iterator[np.ndarray]]) -> Answer:
    """What logits in parts say about the test split; of a recommender the best items of each row."""
    if not deployable.is_recommender:
        return np.concatenate(list(scores())).astype(np.float32)
    size, start, found = max(deployable.blueprint.task.cutoffs), 0, []  # type: ignore[attr-defined]
    for part in scores():
        found.append(_best(deployable, part, start, size))
        start += len(part)
    return Ranked(*(np.concatenate([one[i] for one in found]) for i in (0, 1)))


def _best(deployable: Deployable, scores: np.ndarray, start: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """(items, scores) [B, size] of the test rows from `start` on, as `jdistill.ranking` has them."""
    dataset = deployable.blueprint.dataset
    rows = slice(start, start + len(scores))
    if "candidates" in dataset.test:
        own = np.concatenate([dataset.test["candidates"][rows], dataset.test["label"][rows, :1]], axis=1)
        scores = np.take_along_axis(scores, own, axis=1)
    else:
        own, excluded = np.broadcast_to(np.arange(scores.shape[1]), scores.shape), excluded_from(dataset, "test")
        scores = np.array(scores)
        for row, (first, last) in enumerate(zip(excluded.start[start:], excluded.start[start + 1 :], strict=False)):
            if row < len(scores):
                scores[row, excluded.values[first:last]] = -np.inf
    order = np.argsort(-scores, axis=1, kind="stable")[:, :size]
    best = np.take_along_axis(scores, order, axis=1)
    return np.where(np.isfinite(best), np.take_along_axis(own, order, axis=1), -1), best
