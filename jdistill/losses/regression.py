"""Losses that regress: softened probabilities (MSE), logits (Huber), and targets, as well as the teacher does."""

import jax
import jax.numpy as jnp
from jax import Array

from jdistill.losses._layers import at_least_float32, require_teacher
from jdistill.losses.base import Loss, loss
from jdistill.losses.divergences import ClassLogitsLoss
from jdistill.losses.logits import SameLogitsLoss, as_classes, require_same_width
from jdistill.pytrees import pytree, require_nonnegative, require_one_of, require_positive, static
from jdistill.types import Batch, Outputs, PyTree

ROUNDINGS = 32


@loss("soft_mse", weight=0.5)
@pytree
class SoftMSE(ClassLogitsLoss):
    """Squared difference of the softened probabilities, what KD_Lib calls vanilla distillation.

    Value [B] = T^2 mean_c (p_s - p_t)^2 ("mean"), or the sum ("sum"), p = softmax(z / T), logits [B, K], in float32 or
    wider. "mean", averaged over the batch, equals the distillation part of KD_Lib's `VanillaKD` with its default
    `MSELoss`; its defaults are T = 20 and weight 0.5, beside a cross-entropy of weight 0.5. Its documentation names
    Hinton et al. 2015, https://arxiv.org/abs/1503.02531, whose loss is a cross-entropy: `kd`. For large T the
    gradient of "mean" is 2 / K^2 of `kd`'s, and where the student is sure and wrong it vanishes, as a softmax does. One
    logit (K = 1) is taken as the two classes (0, z).

    Attributes:
      temperature: T > 0.
      reduction: "mean" or "sum", over the classes.

    Raises:
      UsageError: a bad option; in `init`, student and teacher of different numbers of classes.
    """

    temperature: float = 20.0
    reduction: str = static(default="mean")

    def __post_init__(self) -> None:
        require_positive(temperature=self.temperature)
        require_one_of(("mean", "sum"), reduction=self.reduction)

    def value(self, z_s: Array, z_t: Array, batch: Batch) -> Array:
        del batch
        squares = (jax.nn.softmax(z_s / self.temperature) - jax.nn.softmax(z_t / self.temperature)) ** 2
        return self.temperature**2 * (squares.mean(axis=-1) if self.reduction == "mean" else squares.sum(axis=-1))


@loss("huber")
@pytree
class Huber(SameLogitsLoss):
    """Huber loss of the logits: squared for small differences, linear for large ones.

    Value [B] = mean_c ("mean") or sum_c ("sum") of h(z_s - z_t), h(d) = d^2 / 2 where |d| <= delta, else
    delta (|d| - delta / 2), logits [B, K], in float32 or wider. `scale` "huber" is torch's `HuberLoss(delta)`, "smooth_l1"
    divides it by delta, torch's `SmoothL1Loss(beta=delta)`; at delta = 1, the default, both are the smooth L1 of
    Girshick 2015, https://arxiv.org/abs/1504.08083, equation 3. For delta above every difference twice the value is
    `logit_mse`. One logit stays one logit.

    Attributes:
      delta: > 0, where the loss becomes linear.
      reduction: "mean" or "sum", over the logits.
      scale: "huber" or "smooth_l1".

    Raises:
      UsageError: a bad option; in `init`, student and teacher of different numbers of logits.
    """

    delta: float = 1.0
    reduction: str = static(default="mean")
    scale: str = static(default="huber")

    def __post_init__(self) -> None:
        require_positive(delta=self.delta)
        require_one_of(("mean", "sum"), reduction=self.reduction)
        require_one_of(("huber", "smooth_l1"), scale=self.scale)

    def __call__(self, params: PyTree, student: Outputs, teacher: Outputs | None, batch: Batch) -> Array:
        del params, batch
        difference = at_least_float32(student.logits) - at_least_float32(require_teacher(teacher).logits)
        size = jnp.abs(difference)
        values = jnp.where(size <= self.delta, difference**2 / 2, self.delta * (size - self.delta / 2))
        values = values.mean(axis=-1) if self.reduction == "mean" else values.sum(axis=-1)
        return values / self.delta if self.scale == "smooth_l1" else values


@loss("teacher_bounded", weight=0.5)
@pytree
class TeacherBounded(Loss):
    """Teacher-bounded regression: the student's error counts until it is below the teacher's by a margin.

    With a target y and the predictions R_s, R_t, value [B] = e_s where e_s + margin > e_t, else 0, e = ||R - y||^2,
    summed, in float32 or wider: Chen et al. 2017, "Learning Efficient Object Detection Models with Knowledge
    Distillation" (NIPS), equation 4, as its public implementations have it. There R are offsets of boxes and it is added
    to a smooth L1 with weight 0.5, the default. Here the target is made from the label:

    "probability": R = softmax(z) [B, K] and y is one-hot, so e is the Brier score (one logit is taken as the two classes
    (0, z)). "logit": R = z, unscaled; y is one-hot for K >= 2, and for K = 1 the label itself as a number, which is
    regression on whole-numbered targets. Which side of the margin an example is on has no gradient, so the value
    jumps there; a difference e_s - e_t within rounding (relative 32 epsilon) counts as none. With margin 0, the
    default, it is 0 where the student is the teacher; with a margin it is not. A label outside the classes gives NaN.

    Attributes:
      margin: at least 0, in units of e.
      prediction: "probability" or "logit".

    Raises:
      UsageError: a bad option; in `init`, student and teacher of different numbers of predictions.
    """

    margin: float = 0.0
    prediction: str = static(default="probability")

    def __post_init__(self) -> None:
        require_nonnegative(margin=self.margin)
        require_one_of(("probability", "logit"), prediction=self.prediction)

    def init(self, key: Array, student: Outputs, teacher: Outputs | None) -> PyTree:
        """`{}`, after checking that both networks have as many predictions."""
        del key
        require_same_width(*(jax.eval_shape(self._predict, out).shape[-1] for out in (student, require_teacher(teacher))))
        return {}

    def __call__(self, params: PyTree, student: Outputs, teacher: Outputs | None, batch: Batch) -> Array:
        del params
        r_s, r_t = self._predict(student), self._predict(require_teacher(teacher))
        target = _target(batch["label"], r_s)
        # e_s - e_t by its factors, less what may be rounding: one softmax compiled in two ways differs in the last
        # digits, and at student = teacher the value would jump by the whole error.
        both = r_s + r_t - 2 * target
        worse_by = ((r_s - r_t) * both).sum(axis=-1)
        rounding = ROUNDINGS * jnp.finfo(r_s.dtype).eps * ((jnp.abs(r_s) + jnp.abs(r_t)) * jnp.abs(both)).sum(axis=-1)
        return jnp.where(worse_by + self.margin <= rounding, 0, ((r_s - target) ** 2).sum(axis=-1))

    def _predict(self, outputs: Outputs) -> Array:
        logits = at_least_float32(outputs.logits)
        return jax.nn.softmax(as_classes(logits)) if self.prediction == "probability" else logits


def _target(label: Array, predictions: Array) -> Array:
    """[B] -> [B, K]: one-hot, NaN for a label outside the classes; for K = 1 the label as a number."""
    classes = predictions.shape[-1]
    if classes == 1:
        return label[:, None].astype(predictions.dtype)
    known = (label >= 0) & (label < classes)
    return jnp.where(known[:, None], jax.nn.one_hot(label, classes, dtype=predictions.dtype), jnp.nan)
