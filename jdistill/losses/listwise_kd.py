"""Distillation on lists of candidates or documents [B, K]: margins, the list's softmax, orders drawn from the teacher."""

import jax
import jax.numpy as jnp
from jax import Array

from jdistill.losses._layers import require_teacher
from jdistill.losses.base import Loss, loss
from jdistill.losses.listwise import LOWEST, better, grades_of, ordered, places, plackett_luce, require_list
from jdistill.losses.logits import require_same_width
from jdistill.pytrees import pytree, require_one_of, require_positive, static
from jdistill.types import Batch, Context, Outputs, PyTree


class PairedLists(Loss):
    """Base of the losses that compare two networks' logits of the same lists, of two places or more."""

    def init(self, key: Array, student: Outputs, teacher: Outputs | None) -> PyTree:
        """`{}`, after checking that both networks rank the same list."""
        del key
        require_same_width(student.logits.shape[-1], require_teacher(teacher).logits.shape[-1])
        require_list(student)
        return {}


def _both(student: Outputs, teacher: Outputs | None) -> tuple[Array, Array, Array]:
    """The two networks' logits [B, K], 0 at filled places, and the places that both fill with a candidate."""
    (z_s, in_s), (z_t, in_t) = (places(out.logits) for out in (student, require_teacher(teacher)))
    return z_s, z_t, in_s & in_t


@loss("margin_mse")
@pytree
class MarginMSE(PairedLists):
    """Margin-MSE: the margin by which the student puts one candidate above another is the teacher's.

    With d = s - t of the student's and the teacher's logits, value [B] = the mean over pairs (i, j) of (d_i - d_j)^2, which is
    ((s_i - s_j) - (t_i - t_j))^2, logits [B, K], in float32 or wider; 0 where a list has no pair: Hofstätter et al. 2020,
    https://arxiv.org/abs/2010.02666. "graded" pairs are those in which i has the higher grade; a batch without `grades`
    has grade 1 at the column `label`, 0 elsewhere, so in a request the pairs are the positive with each negative, as
    published (with one negative a row, the batch's mean is the published mean). "all" takes every two candidates. Margins
    are signed and not scaled. Filled places (grade -1, or logits up to -1e8) count nothing. "graded" takes K^2 numbers a
    list that has grades, K of others.

    Attributes:
      pairs: "graded" or "all".

    Raises:
      UsageError: another kind of pairs; in `init`, one logit, or student and teacher of different numbers of logits.
    """

    pairs: str = static(default="graded")

    def __post_init__(self) -> None:
        require_one_of(("graded", "all"), pairs=self.pairs)

    def __call__(self, params: PyTree, student: Outputs, teacher: Outputs | None, batch: Batch) -> Array:
        del params
        z_s, z_t, there = _both(student, teacher)
        grades = grades_of(batch, z_s)
        there, d = there & (grades >= 0), z_s - z_t
        if self.pairs == "graded":
            d_i, grades_i, there_i = d, grades, there
            if "grades" not in batch:  # one place alone is above others
                label = batch["label"][:, None]
                d_i, grades_i, there_i = (jnp.take_along_axis(x, label, axis=1) for x in (d, grades, there))
            pairs = better(grades_i, there_i, grades, there)
            squares = jnp.where(pairs, (d_i[:, :, None] - d[:, None, :]) ** 2, 0)
            return squares.sum(axis=(1, 2)) / jnp.maximum(pairs.sum(axis=(1, 2)), 1)
        # Over all pairs i < j the squares add up to n sum_i (d_i - mean)^2, and there are n (n - 1) / 2 pairs.
        n = there.sum(axis=-1, keepdims=True)
        mean = jnp.where(there, d, 0).sum(axis=-1, keepdims=True) / jnp.maximum(n, 1)
        return 2 * jnp.where(there, (d - mean) ** 2, 0).sum(axis=-1) / jnp.maximum(n[:, 0] - 1, 1)


@loss("listwise_kd")
@pytree
class ListwiseKD(PairedLists):
    """Listwise distillation: cross-entropy between the teacher's and the student's softmax over a list.

    Value [B] = -sum_k softmax(t / T)_k log softmax(s / T)_k over the candidates, times T^2 with `t2`, logits [B, K], in
    float32 or wider: ListNet's loss, Cao et al. 2007, "Learning to Rank: From Pairwise Approach to Listwise Approach" (ICML),
    with the teacher's logits for grades. At student = teacher it is the teacher's entropy, not 0: the gradient is that
    of `kd`, divided by T^2 without `t2`. Filled places (logits up to -1e8) count nothing.

    Attributes:
      temperature: T > 0.
      t2: whether the value is multiplied by T^2, so that the gradient keeps its size when T changes.

    Raises:
      UsageError: temperature not positive; in `init`, one logit, or student and teacher of different numbers of logits.
    """

    zero_at_teacher = False

    temperature: float = 1.0
    t2: bool = static(default=False)

    def __post_init__(self) -> None:
        require_positive(temperature=self.temperature)

    def __call__(self, params: PyTree, student: Outputs, teacher: Outputs | None, batch: Batch) -> Array:
        del params, batch
        z_s, z_t, there = _both(student, teacher)
        log_ps, log_pt = (jax.nn.log_softmax(jnp.where(there, z / self.temperature, LOWEST)) for z in (z_s, z_t))
        values = -jnp.where(there, jnp.exp(log_pt) * jnp.where(there, log_ps, 0), 0).sum(axis=-1)
        return self.temperature**2 * values if self.t2 else values


@loss("rank_distil")
@pytree
class RankDistil(PairedLists):
    """RankDistil, the coupled form: the likelihood of orders drawn from the teacher's Plackett-Luce model.

    With orders pi drawn from the teacher, the places sorted by t / T + Gumbel noise, value [B] = the mean over `samples` of
    -sum_k [s_pi(k) / T - log sum_{j >= k} exp(s_pi(j) / T)], k = 1 .. top, logits [B, K], in float32 or wider: Reddi et al.
    2021, "RankDistil: Knowledge Distillation for Ranking" (AISTATS). It equals TensorFlow Ranking's code,
    `CoupledRankDistilLoss`, at T = 1, the default there and here, for the same drawn orders (its temperature divides the
    student's logits alone). One order, the teacher's own, is `list_mle`. Filled places (logits up to -1e8) count
    nothing.

    Attributes:
      samples: orders drawn for each list in each step, at least 1.
      top: how many places count, from the first on; None for all.
      temperature: T > 0.

    Raises:
      UsageError: a number out of its range; in `init`, one logit, or student and teacher of different numbers of logits.
    """

    zero_at_teacher = False

    samples: int = static(default=8)
    top: int | None = static(default=None)
    temperature: float = 1.0

    def __post_init__(self) -> None:
        require_positive(samples=self.samples, top=self.top, temperature=self.temperature)

    def evaluate(self, params: PyTree, state: PyTree, context: Context) -> tuple[Array, PyTree]:
        del params
        z_s, z_t, there = _both(context.student, context.teacher)
        shape = (self.samples, *z_t.shape)
        noisy = z_t / self.temperature + jax.random.gumbel(context.key, shape, z_t.dtype)
        z, there = (jnp.broadcast_to(x, shape) for x in (z_s / self.temperature, there))
        there, z = ordered(noisy, there, z)
        return plackett_luce(z, there, self.top).mean(axis=0), state
