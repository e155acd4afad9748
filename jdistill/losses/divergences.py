"""Divergences between two networks' class probabilities: reverse, skew and Jensen-Shannon KL, total variation, BCE."""

import jax
import jax.numpy as jnp
from jax import Array

from jdistill.losses._layers import at_least_float32, require_teacher
from jdistill.losses.base import loss
from jdistill.losses.logits import ClassLogitsLoss, SameLogitsLoss
from jdistill.pytrees import pytree, require_fraction, require_one_of, require_positive, static
from jdistill.types import Batch, Outputs, PyTree


def _log_mixture(difference: Array, alpha: float | Array) -> Array:
    """log(alpha + (1 - alpha) e^d) for alpha in [0, 1): 0 and accurate at d = 0, finite for every finite d."""
    near = jnp.abs(difference) < 1
    close = jnp.log1p((1 - alpha) * jnp.expm1(jnp.where(near, difference, 0)))
    far = jnp.logaddexp(jnp.log(alpha), jnp.log1p(-jnp.asarray(alpha)) + difference)
    return jnp.where(near, close, far)


@loss("reverse_kl")
@pytree
class ReverseKL(ClassLogitsLoss):
    """KL divergence from the student's probabilities to the teacher's, which seeks the teacher's modes.

    Value [B] = T^2 sum_c p_s (log p_s - log p_t), p = softmax(z / T), logits [B, K], in float32 or wider; the batch's
    mean is the published mean. Gu et al. 2024 (MiniLLM), https://arxiv.org/abs/2306.08543, section 2.1, of one output
    instead of a sequence. At T = 1, the default, it equals `reverse_kl` of DistiLLM's code with every output counted;
    T^2 is KD's convention. One logit (K = 1) is taken as the two classes (0, z).

    Attributes:
      temperature: T > 0.

    Raises:
      UsageError: temperature not positive; in `init`, student and teacher of different numbers of classes.
    """

    temperature: float = 1.0

    def __post_init__(self) -> None:
        require_positive(temperature=self.temperature)

    def value(self, z_s: Array, z_t: Array, batch: Batch) -> Array:
        del batch
        log_ps, log_pt = (jax.nn.log_softmax(z / self.temperature) for z in (z_s, z_t))
        return self.temperature**2 * jnp.sum(jnp.exp(log_ps) * (log_ps - log_pt), axis=-1)


@loss("js")
@pytree
class JensenShannon(ClassLogitsLoss):
    """Jensen-Shannon divergence: the mean KL divergence of teacher and student from their average.

    Value [B] = T^2 / 2 sum_c [p_t log(p_t / m) + p_s log(p_s / m)], m = (p_s + p_t) / 2, p = softmax(z / T), logits
    [B, K], in float32 or wider: symmetric, at most T^2 log 2. The mean over the batch is the published mean. Agarwal
    et al. 2024 (GKD), https://arxiv.org/abs/2306.13649, section 2, at beta = 1/2. At T = 1, the default, it equals
    `js_distance` of DistiLLM's code with lam = 1/2 and every output counted; T^2 is KD's convention. One logit (K = 1)
    is taken as the two classes (0, z).

    Attributes:
      temperature: T > 0.

    Raises:
      UsageError: temperature not positive; in `init`, student and teacher of different numbers of classes.
    """

    temperature: float = 1.0

    def __post_init__(self) -> None:
        require_positive(temperature=self.temperature)

    def value(self, z_s: Array, z_t: Array, batch: Batch) -> Array:
        del batch
        log_ps, log_pt = (jax.nn.log_softmax(z / self.temperature) for z in (z_s, z_t))
        of_teacher = jnp.exp(log_pt) * _log_mixture(log_ps - log_pt, 0.5)
        of_student = jnp.exp(log_ps) * _log_mixture(log_pt - log_ps, 0.5)
        return -(self.temperature**2) / 2 * jnp.sum(of_teacher + of_student, axis=-1)


@loss("skew_kl")
@pytree
class SkewKL(ClassLogitsLoss):
    """KL divergence from the teacher's probabilities to a mixture of the teacher's and the student's.

    Value [B] = T^2 sum_c p_t (log p_t - log(alpha p_t + (1 - alpha) p_s)), p = softmax(z / T), logits [B, K], in
    float32 or wider; alpha = 0 is `kd`, and the value is at most -T^2 log alpha. The mean over the batch is the
    published mean. Ko et al. 2024 (DistiLLM), https://arxiv.org/abs/2402.03898, section 3.1. The authors' code,
    `skewed_forward_kl`, leaves out the teacher's entropy: the same gradient at T = 1, the default, and 0 here where
    the student is the teacher; T^2 is KD's convention. One logit (K = 1) is taken as the two classes (0, z).

    Attributes:
      alpha: the teacher's share of the mixture, in [0, 1); the paper takes 0.1.
      temperature: T > 0.

    Raises:
      UsageError: a number out of its range; in `init`, student and teacher of different numbers of classes.
    """

    alpha: float = 0.1
    temperature: float = 1.0

    def __post_init__(self) -> None:
        require_fraction(alpha=self.alpha)
        require_positive(temperature=self.temperature)

    def value(self, z_s: Array, z_t: Array, batch: Batch) -> Array:
        del batch
        log_ps, log_pt = (jax.nn.log_softmax(z / self.temperature) for z in (z_s, z_t))
        terms = jnp.exp(log_pt) * _log_mixture(log_ps - log_pt, self.alpha)
        return -(self.temperature**2) * jnp.sum(terms, axis=-1)


@loss("total_variation")
@pytree
class TotalVariation(ClassLogitsLoss):
    """Total variation distance of the teacher's and the student's probabilities.

    Value [B] = 1/2 sum_c |p_s - p_t|, p = softmax(z), logits [B, K], in float32 or wider: in [0, 1]. The mean over the
    batch is the published mean. Wen et al. 2023 (f-distill), https://arxiv.org/abs/2307.15190, of one output instead
    of a sequence; equals `tv_distance` of DistiLLM's code with every output counted. Where the student is sure and
    wrong its gradient vanishes, as a softmax does. One logit (K = 1) is taken as the two classes (0, z).

    Raises:
      UsageError: in `init`, student and teacher of different numbers of classes.
    """

    def value(self, z_s: Array, z_t: Array, batch: Batch) -> Array:
        del batch
        return jnp.abs(jax.nn.softmax(z_s) - jax.nn.softmax(z_t)).sum(axis=-1) / 2


@loss("bce_soft")
@pytree
class SoftBCE(SameLogitsLoss):
    """Binary cross-entropy of each logit with the teacher's probability of it: for sigmoid and multi-label outputs.

    Value [B] = mean_c ("mean") or sum_c ("sum") of -q log p - (1 - q) log(1 - p), q = sigmoid(z_t / T),
    p = sigmoid(z_s / T), logits [B, K >= 1], in float32 or wider; no factor T^2. At student = teacher it is the
    teacher's entropy, not 0. Zhu et al. 2020, https://arxiv.org/abs/2011.04106, the soft-label loss (K = 1). At T = 1,
    the default, its mean equals torch's `binary_cross_entropy_with_logits` with targets sigmoid(z_t). One logit stays
    one logit.

    Attributes:
      temperature: T > 0.
      reduction: "mean" or "sum", over the logits.

    Raises:
      UsageError: a bad option; in `init`, student and teacher of different numbers of logits.
    """

    zero_at_teacher = False

    temperature: float = 1.0
    reduction: str = static(default="mean")

    def __post_init__(self) -> None:
        require_positive(temperature=self.temperature)
        require_one_of(("mean", "sum"), reduction=self.reduction)

    def __call__(self, params: PyTree, student: Outputs, teacher: Outputs | None, batch: Batch) -> Array:
        del params, batch
        z_s, z_t = (at_least_float32(out.logits) / self.temperature for out in (student, require_teacher(teacher)))
        q = jax.nn.sigmoid(z_t)
        values = -q * jax.nn.log_sigmoid(z_s) - (1 - q) * jax.nn.log_sigmoid(-z_s)
        return values.mean(axis=-1) if self.reduction == "mean" else values.sum(axis=-1)
