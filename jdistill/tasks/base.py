"""The contract of tasks: what the data's labels mean, the loss on them, how a network is measured."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Protocol

import numpy as np
from jax import Array

from jdistill.data import Dataset
from jdistill.errors import UsageError
from jdistill.losses import Loss
from jdistill.pytrees import require_one_of, require_positive
from jdistill.registry import build
from jdistill.train import predict
from jdistill.types import Batch, Model, Outputs, PyTree

Answer = Any
"""What a network says about a split, on the host; for most tasks logits [N, K] float32."""


class Sampler(Protocol):
    """Makes training batches of rows on device, where more goes into a batch than the rows hold (hashable)."""

    def __call__(self, key: Array, batch: Batch, tables: Mapping[str, Any]) -> Batch:
        """The batch with prepared `inputs` and `label` of raw rows."""

    def shapes(self, batch: Batch) -> Batch:
        """Shapes and dtypes of that, for an abstract batch."""

    def everyone(self, tables: Mapping[str, Any]) -> dict[str, Any] | None:
        """The training requests of all users in their order, without candidates, from host arrays.

        None where a user's requests differ in more than their candidates.
        """


class Task:
    """What a task is. Subclasses are frozen pytree dataclasses registered in group `task`.

    Attributes:
      term: the name of the term on the labels in records.
      primary: the metric by which epochs and methods are chosen: larger is better.
      observed: names that `observe` gives.
      where: name of a boolean array of the batch; examples for which it is false do not count. None: all count.
      reduction: how a loss's values become a term: `mean` over the batch, or `sum`.
      weight: of the loss on the labels, beside that of the distillation loss.
    """

    primary: ClassVar[str]
    observed: ClassVar[tuple[str, ...]] = ()
    term: ClassVar[str] = "task"
    where: ClassVar[str | None] = None
    reduction: str = "mean"
    weight: Any

    def loss(self) -> Loss:
        """The loss on the labels."""
        raise NotImplementedError

    def width(self, dataset: Dataset) -> int:
        """Number of logits for a data set; raises `UsageError` for data that the task is not for."""
        raise NotImplementedError

    def rows(self, dataset: Dataset) -> dict[str, np.ndarray]:
        """The training arrays [N, ...] that batches are taken from."""
        return {name: array for name, array in dataset.train.items() if name != "index"}

    def sampler(self, dataset: Dataset) -> Sampler | None:
        """What makes batches of rows, or None where rows are batches."""
        del dataset
        return None

    def tables(self, dataset: Dataset) -> dict[str, Any]:
        """Arrays the sampler and the losses draw from."""
        del dataset
        return {}

    @staticmethod
    def observe(outputs: Outputs, batch: Batch) -> dict[str, Array]:
        """Metrics of each example of a training batch: {name: [B]}."""
        del outputs, batch
        return {}

    def answer(self, model: Model, dataset: Dataset, variables: tuple[PyTree, PyTree], split: str) -> Answer:
        """What a network says about a split."""
        return predict(model, dataset.preprocess, variables, getattr(dataset, split)["inputs"])

    def answers(self, model: Model, dataset: Dataset, variables: tuple[PyTree, PyTree], split: str) -> Callable[[int], Answer]:
        """What each network of a population, stacked in `variables`, says about a split: row -> answer."""
        logits = predict(model, dataset.preprocess, variables, getattr(dataset, split)["inputs"], stacked=True)
        return lambda row: logits[row]

    def metrics(self, answer: Answer, dataset: Dataset, split: str, reference: Answer | None = None) -> dict[str, float]:
        """Metrics of a split and, where the teacher's answer is given, of the agreement with it."""
        raise NotImplementedError

    def combine(self, answers: Sequence[Answer]) -> Answer | None:
        """What several teachers say together, or None where that has no meaning."""
        return answers[0] if len(answers) == 1 else None

    def arrays(self, answer: Answer) -> dict[str, np.ndarray]:
        """An answer as arrays to be written."""
        return {"logits": answer}


class ByObjective(Task):
    """What ranking tasks share: an objective that names a registered loss, and the k at which metrics are cut off."""

    objective: str
    cutoffs: tuple[int, ...]

    @property
    def term(self) -> str:  # type: ignore[override]
        """As `Task.term`."""
        return self.objective

    def loss(self) -> Loss:
        """As `Task.loss`."""
        return build("loss", {"name": self.objective})

    def check(self, objectives: tuple[str, ...]) -> None:
        """Raises `UsageError` for an unknown objective, no cutoff, or one that is not positive."""
        require_one_of(objectives, objective=self.objective)
        if not self.cutoffs:
            raise UsageError("cutoffs must name at least one k, such as [10], got []")
        require_positive(**{f"cutoffs[{i}]": k for i, k in enumerate(self.cutoffs)})


def require_rows(task: str, dataset: Dataset) -> None:
    """Raises `UsageError` where the data are interactions or lists, which have tasks of their own."""
    if dataset.schema.items:
        raise UsageError(f"task={task} needs rows with a label; data={dataset.name} holds users and items: task=recommend")
    if "grades" in dataset.train:
        raise UsageError(f"task={task} needs rows with a label; data={dataset.name} holds lists with grades: task=ranking")
