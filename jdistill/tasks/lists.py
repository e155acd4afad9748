"""Search ranking: the documents of a query in the order of their grades."""

from typing import ClassVar

import jax.numpy as jnp
from jax import Array

from jdistill.data import Dataset
from jdistill.errors import UsageError
from jdistill.metrics import kendall, list_metrics
from jdistill.pytrees import pytree, require_nonnegative, static
from jdistill.registry import register
from jdistill.tasks.base import Answer, ByObjective
from jdistill.types import Batch, Outputs

OBJECTIVES = ("list_softmax", "list_mle", "pairwise_logistic")


@register("task", "ranking", schedules=True)
@pytree
class ListRanking(ByObjective):
    """Documents of a query by graded relevance; the logits [Q, K] are the scores of the documents.

    Metrics are those of `jdistill.metrics.lists`: `ndcg_at_k`, `mrr`, `map`; with a teacher `teacher_kendall`, the mean
    rank correlation of the scores within a list.

    Attributes:
      weight: of the loss on the grades, beside `loss.weight` of the distillation loss.
      objective: the loss on the grades: list_softmax, list_mle or pairwise_logistic.
      cutoffs: the k of `ndcg_at_k`; the first is what epochs and methods are chosen by.
    """

    weight: float = 1.0
    objective: str = static(default="list_softmax")
    cutoffs: tuple[int, ...] = static(default=(10, 5, 1))

    observed: ClassVar[tuple[str, ...]] = ("best_first",)

    def __post_init__(self) -> None:
        require_nonnegative(weight=self.weight)
        self.check(OBJECTIVES)

    @property
    def primary(self) -> str:  # type: ignore[override]
        return f"ndcg_at_{self.cutoffs[0]}"

    def width(self, dataset: Dataset) -> int:
        if "grades" not in dataset.train:
            raise UsageError(
                f"task=ranking needs lists of documents with grades, such as data=icecat; data={dataset.name} has none"
            )
        return dataset.classes

    @staticmethod
    def observe(outputs: Outputs, batch: Batch) -> dict[str, Array]:
        """Whether the document scored highest has the highest grade of its list."""
        grades = batch["grades"]
        chosen = jnp.take_along_axis(grades, jnp.argmax(outputs.logits, -1)[:, None], axis=1)[:, 0]
        return {"best_first": (chosen == grades.max(-1)).astype(jnp.float32)}

    def metrics(self, answer: Answer, dataset: Dataset, split: str, reference: Answer | None = None) -> dict[str, float]:
        grades = getattr(dataset, split)["grades"]
        found = list_metrics(answer, grades, self.cutoffs)
        if reference is not None:
            found["teacher_kendall"] = float(kendall(answer, reference, grades >= 0))
        return found
