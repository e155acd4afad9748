"""Losses on the logits: cross-entropy, knowledge distillation, logit regression, and none."""

from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import Array

from jdistill.errors import UsageError
from jdistill.losses._layers import at_least_float32, require_teacher
from jdistill.losses.base import Loss, loss
from jdistill.pytrees import pytree, require_fraction, require_one_of, require_positive, static
from jdistill.types import Batch, Outputs, PyTree


def as_classes(logits: Array) -> Array:
    """Logits [B, K] of K >= 2 classes: a single logit z of "yes" [B, 1] becomes the two logits (0, z).

    softmax((0, z)) = (1 - sigmoid(z), sigmoid(z)), so losses over classes hold for a sigmoid output too.
    """
    if logits.shape[-1] != 1:
        return logits
    return jnp.concatenate([jnp.zeros_like(logits), logits], axis=-1)


def _log_probabilities(logits: Array, temperature: float | Array = 1.0) -> Array:
    """log softmax(logits / temperature) [B, K >= 2], finite for finite logits."""
    return jax.nn.log_softmax(at_least_float32(as_classes(logits)) / temperature, axis=-1)


def require_same_width(student: int, teacher: int) -> None:
    """Raises `UsageError` where two networks have different numbers of logits."""
    if student != teacher:
        raise UsageError(
            f"student and teacher must have as many logits as each other, got {student} and {teacher}; "
            "give both networks the same classes, or use a loss on features (loss=hint, loss=attention)"
        )


class ClassLogitsLoss(Loss):
    """Base of the losses that compare the logits [B, K >= 2] of two networks: a subclass writes `value` only.

    One logit (K = 1) is taken as the two classes (0, z); logits come in float32 or wider.

    Class attributes:
      least_classes: `init` refuses networks of fewer classes.
    """

    least_classes: ClassVar[int] = 2

    def init(self, key: Array, student: Outputs, teacher: Outputs | None) -> PyTree:
        """`{}`, after checking that both networks have as many classes, and enough of them."""
        del key
        k_s, k_t = (jax.eval_shape(as_classes, out.logits).shape[-1] for out in (student, require_teacher(teacher)))
        require_same_width(k_s, k_t)
        if k_s < self.least_classes:
            raise UsageError(f"this loss needs at least {self.least_classes} classes, got {k_s}; use loss=kd")
        return {}

    def __call__(self, params: PyTree, student: Outputs, teacher: Outputs | None, batch: Batch) -> Array:
        del params
        z_s, z_t = (at_least_float32(as_classes(out.logits)) for out in (student, require_teacher(teacher)))
        return self.value(z_s, z_t, batch)

    def value(self, z_s: Array, z_t: Array, batch: Batch) -> Array:
        """Values [B] of the student's and the teacher's logits [B, K]."""
        raise NotImplementedError


class SameLogitsLoss(Loss):
    """Base of the losses that compare the logits [B, K >= 1] of two networks as they are: one logit stays one logit."""

    def init(self, key: Array, student: Outputs, teacher: Outputs | None) -> PyTree:
        """`{}`, after checking that both networks have as many logits."""
        del key
        require_same_width(student.logits.shape[-1], require_teacher(teacher).logits.shape[-1])
        return {}


@loss("cross_entropy")
@pytree
class CrossEntropy(Loss):
    """Cross-entropy with the labels.

    Value [B] = -sum_c q_c log softmax(z)_c with q = (1 - label_smoothing) onehot(label) + label_smoothing / K, in
    float32 or wider. One logit (K = 1) is taken as the two classes (0, z), labels 0 and 1. A label outside the classes
    gives NaN.

    Attributes:
      label_smoothing: in [0, 1); Szegedy et al. 2016, https://arxiv.org/abs/1512.00567, section 7.

    Raises:
      UsageError: label_smoothing outside [0, 1).
    """

    zero_at_teacher = False
    needs_teacher = False

    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        require_fraction(label_smoothing=self.label_smoothing)

    def __call__(self, params: PyTree, student: Outputs, teacher: Outputs | None, batch: Batch) -> Array:
        del params, teacher
        log_p = _log_probabilities(student.logits)
        of_label = jnp.take_along_axis(log_p, batch["label"][:, None], axis=-1)[:, 0]
        return -(1 - self.label_smoothing) * of_label - self.label_smoothing * log_p.mean(axis=-1)


@loss("kd")
@pytree
class KD(ClassLogitsLoss):
    """Knowledge distillation: KL divergence from the teacher's softened probabilities to the student's.

    Value [B] = T^2 sum_c p_t (log p_t - log p_s), p = softmax(z / T), in float32 or wider: Hinton et al. 2015,
    https://arxiv.org/abs/1503.02531, section 2, in the KL form (cross-entropy less the teacher's entropy: the same
    gradient, and 0 where the student is the teacher). T^2 keeps the gradient's size when T changes. The mean over the
    batch equals RepDistiller, mdistiller, AberHu and mmrazor (`batchmean`); torchdistill leaves T^2 out where it is given
    no alpha. One logit (K = 1) is taken as the two classes (0, z): the Bernoulli KL.

    Attributes:
      temperature: T > 0.

    Raises:
      UsageError: temperature not positive; in `init`, student and teacher of different numbers of classes.
    """

    temperature: float = 4.0

    def __post_init__(self) -> None:
        require_positive(temperature=self.temperature)

    def value(self, z_s: Array, z_t: Array, batch: Batch) -> Array:
        del batch
        log_ps, log_pt = (jax.nn.log_softmax(z / self.temperature) for z in (z_s, z_t))
        return self.temperature**2 * jnp.sum(jnp.exp(log_pt) * (log_pt - log_ps), axis=-1)


@loss("logit_mse")
@pytree
class LogitMSE(SameLogitsLoss):
    """Squared difference of the logits.

    Value [B] = mean_c (z_s - z_t)^2 ("mean"), or 1/2 sum_c (z_s - z_t)^2 ("half_sum"), in float32 or wider: Ba & Caruana
    2014, https://arxiv.org/abs/1312.6184, equation 1, which prints the second. "mean" is what public code such as
    AberHu computes.

    Attributes:
      reduction: "mean" or "half_sum", over the classes.

    Raises:
      UsageError: another reduction; in `init`, student and teacher of different numbers of logits.
    """

    reduction: str = static(default="mean")

    def __post_init__(self) -> None:
        require_one_of(("mean", "half_sum"), reduction=self.reduction)

    def __call__(self, params: PyTree, student: Outputs, teacher: Outputs | None, batch: Batch) -> Array:
        del params, batch
        squares = (at_least_float32(student.logits) - at_least_float32(require_teacher(teacher).logits)) ** 2
        return squares.mean(axis=-1) if self.reduction == "mean" else squares.sum(axis=-1) / 2


@loss("none")
@pytree
class NoDistillation(Loss):
    """Nothing: values [B] of zero, for the plain student every method is compared with."""

    needs_teacher = False

    def __call__(self, params: PyTree, student: Outputs, teacher: Outputs | None, batch: Batch) -> Array:
        del params, teacher, batch
        return jnp.zeros(student.logits.shape[0], jnp.promote_types(student.logits.dtype, jnp.float32))
