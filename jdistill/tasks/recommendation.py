"""Recommendation: which items a user will want next, out of the whole catalogue."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jdistill import stacking
from jdistill.data import Dataset
from jdistill.data.base import Schema
from jdistill.errors import UsageError
from jdistill.metrics import kendall_of_tops, overlap_at_k, ranking_metrics
from jdistill.pytrees import pytree, require_nonnegative, require_one_of, require_positive, static
from jdistill.ranking import Ranked, met_in_training, popularity, rank_split
from jdistill.registry import register
from jdistill.sampling import Known, unobserved
from jdistill.tasks.base import Answer, ByObjective, Sampler
from jdistill.types import Batch, Model, Outputs, PyTree

OBJECTIVES = ("bpr", "sampled_softmax", "pointwise_bce")


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Rows (user, item) to requests: the item, then `negatives` items that the user has not met, drawn uniformly.

    The history, where the data have one, is the user's whole training history: of an autoencoder the row's item too.
    """

    schema: Schema
    negatives: int

    def __call__(self, key: Array, batch: Batch, tables: Mapping[str, Any]) -> Batch:
        user, item = batch["inputs"][:, 0], batch["inputs"][:, 1]
        drawn = unobserved(key, tables["known"], user, self.negatives)
        inputs = {"user": user, "items": jnp.concatenate([item[:, None], drawn], axis=1)}
        if self.schema.history:
            inputs["history"] = tables["sequence"][user, 1:]
        return {**batch, "inputs": inputs, "label": jnp.zeros_like(user)}

    def shapes(self, batch: Batch) -> Batch:
        rows, history = batch["inputs"].shape[0], self.schema.history
        inputs = {"user": _ids(rows), "items": _ids(rows, 1 + self.negatives)}
        return {**batch, "inputs": inputs | ({"history": _ids(rows, history)} if history else {}), "label": _ids(rows)}

    def everyone(self, tables: Mapping[str, Any]) -> dict[str, Any]:
        user = np.arange(self.schema.users, dtype=np.int32)
        return {"user": user} | ({"history": tables["sequence"][:, 1:]} if self.schema.history else {})


@dataclasses.dataclass(frozen=True)
class Sequences:
    """Rows (user, L + 1 items in order) to requests: each position asks for the item after it, against `negatives`.

    Adds `valid` [S L] bool: false where the position is filled up; so the first item, before which there is none, is never
    asked for.
    """

    schema: Schema
    negatives: int

    def __call__(self, key: Array, batch: Batch, tables: Mapping[str, Any]) -> Batch:
        items, length = batch["inputs"][:, 1:], self.schema.history
        user = jnp.repeat(batch["inputs"][:, 0], length)
        positive = items[:, 1:].reshape(-1)
        drawn = unobserved(key, tables["known"], user, self.negatives)
        valid = items[:, :-1].reshape(-1) < self.schema.items
        positive = jnp.where(valid, positive, 0)
        inputs = {"user": user, "history": items[:, :-1], "items": jnp.concatenate([positive[:, None], drawn], axis=1)}
        rest = {name: jnp.repeat(value, length, axis=0) for name, value in batch.items() if name not in ("inputs", "label")}
        return {**rest, "inputs": inputs, "label": jnp.zeros_like(user), "valid": valid}

    def shapes(self, batch: Batch) -> Batch:
        count, length = batch["inputs"].shape[0], self.schema.history
        rows = count * length
        inputs = {"user": _ids(rows), "history": _ids(count, length), "items": _ids(rows, 1 + self.negatives)}
        rest = {
            name: jax.ShapeDtypeStruct((value.shape[0] * length, *value.shape[1:]), value.dtype)
            for name, value in batch.items() if name not in ("inputs", "label")
        }  # fmt: skip
        return {**rest, "inputs": inputs, "label": _ids(rows), "valid": jax.ShapeDtypeStruct((rows,), bool)}

    def everyone(self, tables: Mapping[str, Any]) -> dict[str, Any]:
        user = np.repeat(np.arange(self.schema.users, dtype=np.int32), self.schema.history)
        return {"user": user, "history": tables["sequence"][:, :-1]}


def _ids(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, np.int32)


@register("task", "recommend", schedules=True)
@pytree
class Recommend(ByObjective):
    """The items a user will want, by implicit feedback: top-N recommendation.

    A network is measured by its ranking of the whole catalogue, without what the user has met in training (for the
    test split: nor in validation); where the data bring `candidates`, by that of those alone, as a paper had it. Metrics
    are those of `jdistill.metrics.ranking`; with a teacher `teacher_overlap_at_k`, the fraction of its first k items that
    are among the student's, and `teacher_kendall`, both for the largest cutoff.

    Attributes:
      weight: of the loss on the interactions, beside `loss.weight` of the distillation loss.
      objective: the loss on a positive and its negatives: bpr, sampled_softmax or pointwise_bce.
      negatives: items drawn for each positive, anew each time.
      reduction: `mean` of the losses over a batch, or their `sum`, as several papers have it (with weight decay that is
        another optimum). It holds for the distillation loss too.
      cutoffs: the k of the metrics.
      select: the metric that epochs and methods are chosen by, such as ndcg_at_10; the first cutoff's NDCG if empty.
      groups: popularity groups that recall is reported for.
    """

    weight: float = 1.0
    objective: str = static(default="bpr")
    negatives: int = static(default=1)
    reduction: str = static(default="mean")
    cutoffs: tuple[int, ...] = static(default=(10, 20, 50))
    select: str = static(default="")
    groups: int = static(default=2)

    observed: ClassVar[tuple[str, ...]] = ("ordered",)

    def __post_init__(self) -> None:
        require_nonnegative(weight=self.weight)
        self.check(OBJECTIVES)
        require_one_of(("mean", "sum"), reduction=self.reduction)
        require_positive(negatives=self.negatives, groups=self.groups)
        if self.select:
            require_one_of(tuple(self._names()), select=self.select)

    def _names(self) -> dict[str, float]:
        """The metrics of any data, by their names."""
        none = np.full((1, max(self.cutoffs)), -1)
        return ranking_metrics(none, none, self.cutoffs, popularity=np.ones(1), groups=self.groups)

    @property
    def primary(self) -> str:  # type: ignore[override]
        return self.select or f"ndcg_at_{self.cutoffs[0]}"

    def width(self, dataset: Dataset) -> int:
        if not dataset.schema.items:
            raise UsageError(
                f"task={_NAMES[type(self)]} needs data of users and items, such as data=citeulike; data={dataset.name} has none"
            )
        ranked = dataset.test["candidates"].shape[1] + 1 if "candidates" in dataset.test else dataset.schema.items
        if ranked < min(max(self.cutoffs), dataset.schema.items):
            raise UsageError(
                f"task.cutoffs must be at most {ranked}, the candidates of data={dataset.name} and the relevant item, "
                f"got {max(self.cutoffs)}"
            )
        return dataset.schema.items

    def sampler(self, dataset: Dataset) -> Sampler:
        return Pairs(dataset.schema, self.negatives)

    def tables(self, dataset: Dataset) -> dict[str, Any]:
        schema = dataset.schema
        known = Known(np.int32(schema.items), met_in_training(dataset), popularity(dataset))
        tables: dict[str, Any] = {"known": known}
        return tables | ({"sequence": dataset.tables["sequence"]} if schema.history else {})

    @staticmethod
    def observe(outputs: Outputs, batch: Batch) -> dict[str, Array]:
        """The fraction of the negatives that are scored below the positive; of sequences, where there is a positive."""
        logits, valid = outputs.logits, batch.get("valid")
        ordered = (logits[:, :1] > logits[:, 1:]).mean(-1, dtype=jnp.float32)
        if valid is not None:  # scaled, as the mean is taken over all positions
            ordered = jnp.where(valid, ordered, 0) * (valid.size / jnp.maximum(valid.sum(), 1))
        return {"ordered": ordered}

    def answer(self, model: Model, dataset: Dataset, variables: tuple[PyTree, PyTree], split: str) -> Ranked:
        return rank_split(model, dataset, variables, split, max(self.cutoffs))

    def answers(self, model: Model, dataset: Dataset, variables: tuple[PyTree, PyTree], split: str) -> Callable[[int], Ranked]:
        """Each network of the population ranks alone: all their scores at once would not fit."""
        return lambda row: self.answer(model, dataset, jax.tree.map(jnp.asarray, stacking.member(variables, row)), split)

    def metrics(self, answer: Answer, dataset: Dataset, split: str, reference: Answer | None = None) -> dict[str, float]:
        rows = getattr(dataset, split)
        relevant = rows["label"][:, :1] if "candidates" in rows else rows["label"]  # the others are not ranked
        found = ranking_metrics(
            answer.items, relevant, self.cutoffs, popularity=popularity(dataset), groups=self.groups, users=dataset.schema.users
        )
        if reference is not None:
            depth = min(max(self.cutoffs), answer.items.shape[1])
            found[f"teacher_overlap_at_{depth}"] = float(overlap_at_k(answer.items, reference.items, depth))
            found["teacher_kendall"] = float(kendall_of_tops(answer.items, reference.items, depth))
        return found

    def arrays(self, answer: Answer) -> dict[str, np.ndarray]:
        return {"items": answer.items, "scores": answer.scores}


@functools.lru_cache(maxsize=8)
def _sequences(dataset: Dataset) -> dict[str, np.ndarray]:
    """`NextItem.rows`, made once: each job of a sweep asks for them, and arrays on the device are known by identity."""
    sequence = dataset.tables["sequence"]
    users = np.flatnonzero((sequence < dataset.schema.items).sum(1) > 1).astype(np.int32)
    inputs = np.concatenate([users[:, None], sequence[users]], axis=1).astype(np.int32)
    return {"inputs": inputs, "label": np.zeros(len(users), np.int32)}


@register("task", "next_item", objective="pointwise_bce", schedules=True)
@pytree
class NextItem(Recommend):
    """The item after each of a user's items in order: `recommend`, trained on every position of the sequences at once."""

    where: ClassVar[str | None] = "valid"

    def width(self, dataset: Dataset) -> int:
        items = super().width(dataset)
        if not dataset.schema.history:
            raise UsageError("task=next_item needs data with histories, got data.history=0; set data.history=50")
        return items

    def rows(self, dataset: Dataset) -> dict[str, np.ndarray]:
        """One row a user with at least two items: the user, then the sequence."""
        return _sequences(dataset)

    def sampler(self, dataset: Dataset) -> Sampler:
        return Sequences(dataset.schema, self.negatives)


_NAMES = {Recommend: "recommend", NextItem: "next_item"}
