"""Classification: what the labels mean, the loss on them, and the metrics."""

from collections.abc import Sequence
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jax import Array

from jdistill.data import Dataset
from jdistill.errors import UsageError
from jdistill.losses import CrossEntropy, Loss
from jdistill.losses.logits import as_classes
from jdistill.metrics import binary_metrics
from jdistill.pytrees import pytree, require_fraction, require_nonnegative, require_one_of, static
from jdistill.registry import register
from jdistill.tasks.base import Answer, Task, require_rows
from jdistill.types import Batch, Outputs


@register("task", "classification", schedules=True)
@pytree
class Classification(Task):
    """One of K classes, by cross-entropy.

    Attributes:
      weight: of the cross-entropy with the labels, beside `loss.weight` of the distillation loss.
      label_smoothing: in [0, 1).
      outputs: `softmax`, one logit a class; `sigmoid`, one logit for a yes/no label.
    """

    weight: float = 1.0
    label_smoothing: float = 0.0
    outputs: str = static(default="softmax")

    def __post_init__(self) -> None:
        require_nonnegative(weight=self.weight)
        require_fraction(label_smoothing=self.label_smoothing)
        require_one_of(("softmax", "sigmoid"), outputs=self.outputs)

    primary: ClassVar[str] = "accuracy"
    observed: ClassVar[tuple[str, ...]] = ("accuracy",)
    term: ClassVar[str] = "cross_entropy"

    def loss(self) -> Loss:
        return CrossEntropy(label_smoothing=self.label_smoothing)

    def width(self, dataset: Dataset) -> int:
        require_rows("classification", dataset)
        classes = dataset.classes
        if classes < 2:
            raise UsageError(f"task=classification needs data of classes; data={dataset.name} has numbers: task=regression")
        if self.outputs == "sigmoid":
            if classes != 2:
                raise UsageError(f"task.outputs=sigmoid needs data of 2 classes, this has {classes}; use softmax")
            return 1
        return classes

    @staticmethod
    def observe(outputs: Outputs, batch: Batch) -> dict[str, Array]:
        return hits(outputs, batch)

    def metrics(self, answer: Answer, dataset: Dataset, split: str, reference: Answer | None = None) -> dict[str, float]:
        return metrics(answer, getattr(dataset, split)["label"], reference)

    def combine(self, answers: Sequence[Answer]) -> Answer | None:
        """The logarithm of the mean probabilities."""
        if len(answers) < 2:
            return answers[0] if answers else None
        log_p = np.stack([log_probabilities(logits) for logits in answers])
        mean = np.logaddexp.reduce(log_p, axis=0) - np.log(len(answers))
        return mean if answers[0].shape[1] > 1 else mean[:, 1:] - mean[:, :1]


register("task", "binary", outputs="sigmoid", schedules=True)(Classification)


@register("task", "click", schedules=True)
@pytree
class Click(Classification):
    """Yes or no, where the ranking of the probabilities counts: clicks, conversions, risk. One logit.

    Metrics are those of `jdistill.metrics.binary`; `grouped_auc` where the data name a group.
    """

    outputs: str = static(default="sigmoid")

    primary: ClassVar[str] = "auc"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_one_of(("sigmoid",), outputs=self.outputs)

    def width(self, dataset: Dataset) -> int:
        require_rows("click", dataset)
        classes = dataset.classes
        if classes != 2:
            found, task = (f"{classes} classes", "classification") if classes > 2 else ("numbers", "regression")
            raise UsageError(f"task=click needs labels of yes or no (2 classes); data={dataset.name} has {found}: task={task}")
        return 1

    def metrics(self, answer: Answer, dataset: Dataset, split: str, reference: Answer | None = None) -> dict[str, float]:
        rows = getattr(dataset, split)
        found = binary_metrics(answer[:, 0], rows["label"], rows.get("group"))
        if reference is not None:
            agreed = metrics(answer, rows["label"], reference)
            found |= {name: agreed[name] for name in ("teacher_agreement", "teacher_kl")}
        return found


def hits(outputs: Outputs, batch: Batch) -> dict[str, Array]:
    """`accuracy` of each example of a training batch: [B] of 0.0 and 1.0."""
    return {"accuracy": (jnp.argmax(as_classes(outputs.logits), -1) == batch["label"]).astype(jnp.float32)}


def metrics(logits: np.ndarray, label: np.ndarray, teacher: np.ndarray | None = None) -> dict[str, float]:
    """Metrics of logits [N, K] against labels [N] and, where given, the teacher's logits on the same rows.

    `accuracy`, `cross_entropy` (nats), `calibration_error` (ECE, 15 equal bins of confidence; Guo et al. 2017);
    `teacher_agreement` (fraction of equal predictions), `teacher_kl` (mean KL(teacher || student), T = 1, nats).
    """
    log_p = log_probabilities(logits)
    predicted, p = log_p.argmax(-1), np.exp(log_p)
    out = {
        "accuracy": float((predicted == label).mean()),
        "cross_entropy": float(-log_p[np.arange(len(label)), label].mean()),
        "calibration_error": _calibration_error(p.max(-1), predicted == label),
    }
    if teacher is not None:
        log_t = log_probabilities(teacher)
        out["teacher_agreement"] = float((predicted == log_t.argmax(-1)).mean())
        out["teacher_kl"] = float((np.exp(log_t) * (log_t - log_p)).sum(-1).mean())
    return out


def as_two(logits: np.ndarray) -> np.ndarray:
    """Logits [N, K >= 2]; K = 1 becomes the two classes (0, z)."""
    return logits if logits.shape[1] > 1 else np.concatenate([np.zeros_like(logits), logits], axis=1)


def log_probabilities(logits: np.ndarray) -> np.ndarray:
    """log softmax [N, K >= 2] float64 of logits [N, K]; K = 1 becomes the two classes (0, z)."""
    z = as_two(np.asarray(logits, np.float64))
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def _calibration_error(confidence: np.ndarray, correct: np.ndarray, bins: int = 15) -> float:
    which = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = [
        abs(correct[which == b].mean() - confidence[which == b].mean()) * (which == b).mean()
        for b in range(bins)
        if (which == b).any()
    ]
    return float(sum(gaps))
