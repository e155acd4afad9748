"""A number: a rating, a price."""

from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jax import Array

from jdistill.data import Dataset
from jdistill.errors import UsageError
from jdistill.losses import Loss
from jdistill.metrics import regression_metrics
from jdistill.pytrees import pytree, require_nonnegative
from jdistill.registry import build, register
from jdistill.tasks.base import Answer, Task, require_rows
from jdistill.types import Batch, Outputs


@register("task", "regression", schedules=True)
@pytree
class Regression(Task):
    """A number, by its squared error; the one logit is the prediction.

    Metrics: `rmse`, `mae`, `r2` (1 - squared error / variance); with a teacher `teacher_rmse`, the root mean squared
    difference from its predictions.

    Attributes:
      weight: of the error, beside `loss.weight` of the distillation loss.
    """

    weight: float = 1.0

    primary: ClassVar[str] = "r2"
    observed: ClassVar[tuple[str, ...]] = ("squared_error",)
    term: ClassVar[str] = "mse"

    def __post_init__(self) -> None:
        require_nonnegative(weight=self.weight)

    def loss(self) -> Loss:
        return build("loss", {"name": "mse"})

    def width(self, dataset: Dataset) -> int:
        require_rows("regression", dataset)
        if dataset.train["label"].dtype.kind != "f":
            raise UsageError(f"task=regression needs numbers as labels; data={dataset.name} has classes: task=classification")
        return 1

    @staticmethod
    def observe(outputs: Outputs, batch: Batch) -> dict[str, Array]:
        return {"squared_error": jnp.square(outputs.logits[:, 0] - batch["label"])}

    def metrics(self, answer: Answer, dataset: Dataset, split: str, reference: Answer | None = None) -> dict[str, float]:
        found = regression_metrics(answer[:, 0], getattr(dataset, split)["label"])
        if reference is not None:
            found["teacher_rmse"] = float(np.sqrt(np.mean(np.square(answer[:, 0] - reference[:, 0]))))
        return found

    def combine(self, answers: "list[Answer]") -> Answer | None:  # type: ignore[override]
        """Their mean."""
        return np.mean(answers, axis=0) if answers else None
