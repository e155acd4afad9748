"""Losses on lists of candidates or documents [B, K]: what a ranker learns from positives, from grades, from an order."""

import jax
import jax.numpy as jnp
from jax import Array

from jdistill.errors import UsageError
from jdistill.losses._layers import at_least_float32, require_teacher
from jdistill.losses.base import Loss, loss
from jdistill.losses.logits import require_same_width
from jdistill.pytrees import pytree, require_one_of, require_positive, static
from jdistill.types import Batch, Outputs, PyTree

FILLED = -1e8
"""Logits up to this one are those of filled places, which no loss here counts."""
LOWEST = -1e30
ORDERS = ("teacher", "grades")


def places(logits: Array) -> tuple[Array, Array]:
    """Logits [B, K] in float32 or wider, 0 at filled places, and which places [B, K] bool hold a candidate."""
    z = at_least_float32(logits)
    there = z > FILLED
    return jnp.where(there, z, 0), there


def grades_of(batch: Batch, like: Array) -> Array:
    """Grades [B, K] of the shape and type of `like`, -1 at filled places.

    Where the batch has no `grades`, 1 at the column `label` and 0 elsewhere: so the positive of a request is column 0.
    """
    if "grades" in batch:
        return batch["grades"].astype(like.dtype)
    return jax.nn.one_hot(batch["label"], like.shape[-1], dtype=like.dtype)


def plackett_luce(logits: Array, there: Array, top: int | None = None) -> Array:
    """-log probability [...] of drawing the first `top` (None: all) of lists [..., K] in the order in which they stand.

    Drawn one after the other without replacement with p ~ exp(logit); filled places (`there` False) must come last.
    """
    z = jnp.where(there, logits, LOWEST)
    terms = jax.lax.cumlogsumexp(z, axis=z.ndim - 1, reverse=True) - z
    return jnp.where(there, terms, 0)[..., :top].sum(axis=-1)


def ordered(scores: Array, there: Array, *others: Array) -> tuple[Array, ...]:
    """`there` and `others` [..., K] by falling `scores`, ties by place, filled places last."""
    order = jnp.argsort(jnp.where(there, -scores, jnp.inf), axis=-1, stable=True)
    return tuple(jnp.take_along_axis(x, order, axis=-1) for x in (there, *others))


class ListLoss(Loss):
    """Base of the losses that need two columns or more of logits, most of them no teacher."""

    needs_teacher = False
    zero_at_teacher = False

    def init(self, key: Array, student: Outputs, teacher: Outputs | None) -> PyTree:
        """`{}`, after checking that there is something to rank, and a teacher of the same list where one is read."""
        del key
        require_list(student)
        if self.needs_teacher:
            require_same_width(student.logits.shape[-1], require_teacher(teacher).logits.shape[-1])
        return {}


def require_list(outputs: Outputs) -> None:
    """Raises `UsageError` where there is one logit only."""
    if outputs.logits.shape[-1] < 2:
        raise UsageError("this loss compares the logits of a list, got one logit; use loss=bce_soft or loss=logit_mse")


@loss("bpr")
@pytree
class BayesianPersonalisedRanking(ListLoss):
    """Bayesian personalised ranking: the positive item above each negative one.

    With the positive's logit s_0 and the negatives' s_k, value [B] = sum_k -log sigmoid(s_0 - s_k), k = 1 .. K - 1, logits
    [B, K], in float32 or wider: Rendle et al. 2009, https://arxiv.org/abs/1205.2618, without its
    regularisation, which belongs to the optimizer. The paper, and the code of DE-RRD and of topology distillation, take
    the batch's sum. Filled places (logits up to -1e8) count nothing; a row whose first place is filled has the value 0.

    Raises:
      UsageError: in `init`, one logit only.
    """

    def __call__(self, params: PyTree, student: Outputs, teacher: Outputs | None, batch: Batch) -> Array:
        del params, teacher, batch
        z, there = places(student.logits)
        terms = jax.nn.softplus(z[:, 1:] - z[:, :1])
        return jnp.where(there[:, 1:] & there[:, :1], terms, 0).sum(axis=-1)


@loss("sampled_softmax")
@pytree
class SampledSoftmax(ListLoss):
    """Cross-entropy of the positive item among the candidates.

    With the positive's logit s_0, value [B] = -s_0 + log sum_k exp s_k, k = 0 .. K - 1, logits [B, K], in float32 or wider:
    the softmax over the positive and drawn negatives, of equal chances, so with no correction of the logits for them:
    Jean et al. 2015, https://arxiv.org/abs/1412.2007. Filled places (logits up to -1e8) count nothing; a row
    whose first place is filled has the value 0.

    Raises:
      UsageError: in `init`, one logit only.
    """

    def __call__(self, params: PyTree, student: Outputs, teacher: Outputs | None, batch: Batch) -> Array:
        del params, teacher, batch
        z, there = places(student.logits)
        total = jax.nn.logsumexp(jnp.where(there, z, LOWEST), axis=-1)
        return jnp.where(there[:, 0], total - z[:, 0], 0)


@loss("pointwise_bce")
@pytree
class PointwiseBCE(ListLoss):
    """Binary cross-entropy of each candidate: 1 for the positive item, 0 for the others.

    With the positive's logit s_0, value [B] = -log sigmoid(s_0) - sum_k log(1 - sigmoid(s_k)), k = 1 .. K - 1, logits [B, K]
    ("sum"), or that divided by the number of candidates ("mean"), in float32 or wider: He et al. 2017 (NeuMF),
    https://arxiv.org/abs/1708.05031, and, with one negative an entry, Kang & McAuley 2018 (SASRec),
    https://arxiv.org/abs/1808.09781. Both sum; SASRec's code takes the mean over the positions that are not
    filled of the sum of the two terms, which is the batch's mean of "sum", and NeuMF's code the mean over positives and
    negatives alike, which is that of "mean". Filled places (logits up to -1e8) count nothing; a row whose first place is
    filled has the value 0.

    Attributes:
      reduction: "sum" or "mean", over the candidates.

    Raises:
      UsageError: another reduction; in `init`, one logit only.
    """

    reduction: str = static(default="sum")

    def __post_init__(self) -> None:
        require_one_of(("sum", "mean"), reduction=self.reduction)

    def __call__(self, params: PyTree, student: Outputs, teacher: Outputs | None, batch: Batch) -> Array:
        del params, teacher, batch
        z, there = places(student.logits)
        counted = there & there[:, :1]
        signs = jnp.where(jnp.arange(z.shape[-1]) == 0, -1, 1)
        total = jnp.where(counted, jax.nn.softplus(signs * z), 0).sum(axis=-1)
        return total if self.reduction == "sum" else total / jnp.maximum(counted.sum(axis=-1), 1)


@loss("mse")
@pytree
class SquaredError(Loss):
    """Squared error of a regression.

    Value [B] = mean_c (z_c - y_c)^2, logits z [B, K], in float32 or wider; the target y is `label`, [B, K] or [B], one for
    all K. The usual case is K = 1. The root of the mean over a split is the RMSE.
    """

    needs_teacher = False
    zero_at_teacher = False

    def __call__(self, params: PyTree, student: Outputs, teacher: Outputs | None, batch: Batch) -> Array:
        del params, teacher
        z, y = at_least_float32(student.logits), batch["label"]
        return ((z - y.reshape(z.shape[0], -1)) ** 2).mean(axis=-1)


@loss("list_softmax")
@pytree
class ListSoftmax(ListLoss):
    """ListNet: cross-entropy between the softmax of the grades and the softmax of the logits.

    With grades y, value [B] = -sum_k softmax(y)_k log softmax(s)_k over the documents of a list, logits [B, K], in float32
    or wider: Cao et al. 2007, "Learning to Rank: From Pairwise Approach to Listwise Approach" (ICML), with the
    probability of the first place alone. Filled places (grade -1, or logits up to -1e8) count nothing. A batch without
    `grades` has grade 1 at the column `label`, 0 elsewhere.

    Raises:
      UsageError: in `init`, one logit only.
    """

    def __call__(self, params: PyTree, student: Outputs, teacher: Outputs | None, batch: Batch) -> Array:
        del params, teacher
        z, there = places(student.logits)
        grades = grades_of(batch, z)
        there = there & (grades >= 0)
        log_p, log_q = (jax.nn.log_softmax(jnp.where(there, x, LOWEST)) for x in (z, grades))
        return -jnp.where(there, jnp.exp(log_q) * jnp.where(there, log_p, 0), 0).sum(axis=-1)


class OrderedLoss(ListLoss):
    """Base of the losses that learn an order, the teacher's or that of the grades."""

    needs_teacher = property(lambda self: self.order == "teacher")  # type: ignore[assignment]

    order: str

    def target(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> tuple[Array, Array, Array]:
        """The student's logits, what to order them by (both 0 at filled places), and which places count: [B, K] each."""
        z, there = places(student.logits)
        if self.order == "teacher":
            by, known = places(require_teacher(teacher).logits)
        else:
            by = grades_of(batch, z)
            known = by >= 0
        return z, by, there & known


@loss("list_mle")
@pytree
class ListMLE(OrderedLoss):
    """ListMLE: the likelihood of an order of the list under the student's Plackett-Luce model.

    With the list ordered by falling grade, or by the teacher's falling logits, ties by place, value [B] =
    -sum_k [s_k - log sum_{j >= k} exp s_j] over k = 1 .. top, logits [B, K], in float32 or wider: Xia et al. 2008, "Listwise
    Approach to Learning to Rank: Theory and Algorithm" (ICML), with top = K. Filled places (grade -1, or logits up to -1e8)
    count nothing. A batch without `grades` has grade 1 at the column `label`, 0 elsewhere.

    Attributes:
      order: "teacher" or "grades"; the second needs no teacher.
      top: how many places count, from the first on; None for all.

    Raises:
      UsageError: a bad option; in `init`, one logit, or a teacher of another number of logits.
    """

    order: str = static(default="teacher")
    top: int | None = static(default=None)

    def __post_init__(self) -> None:
        require_one_of(ORDERS, order=self.order)
        require_positive(top=self.top)

    def __call__(self, params: PyTree, student: Outputs, teacher: Outputs | None, batch: Batch) -> Array:
        del params
        z, by, there = self.target(student, teacher, batch)
        there, z = ordered(by, there, z)
        return plackett_luce(z, there, self.top)


@loss("pairwise_logistic")
@pytree
class PairwiseLogistic(OrderedLoss):
    """RankNet: of each two documents in a list the better one above the other.

    Value [B] = sum ("sum") or mean ("mean") over the pairs (i, j) in which i has the higher grade, or the teacher's higher
    logit, of -log sigmoid(s_i - s_j), logits [B, K], in float32 or wider; 0 where there is no such pair. Burges et al. 2005,
    "Learning to Rank using Gradient Descent" (ICML), with target probability 1. Filled places (grade -1, or logits
    up to -1e8) count nothing. A batch without `grades` has grade 1 at the column `label`, 0 elsewhere: then it is `bpr`.
    Takes K^2 numbers a list.

    Attributes:
      order: "teacher" or "grades"; the second needs no teacher.
      reduction: "sum" or "mean", over the pairs.

    Raises:
      UsageError: a bad option; in `init`, one logit, or a teacher of another number of logits.
    """

    order: str = static(default="teacher")
    reduction: str = static(default="sum")

    def __post_init__(self) -> None:
        require_one_of(ORDERS, order=self.order)
        require_one_of(("sum", "mean"), reduction=self.reduction)

    def __call__(self, params: PyTree, student: Outputs, teacher: Outputs | None, batch: Batch) -> Array:
        del params
        z, by, there = self.target(student, teacher, batch)
        pairs = better(by, there, by, there)
        total = jnp.where(pairs, jax.nn.softplus(z[:, None, :] - z[:, :, None]), 0).sum(axis=(1, 2))
        return total if self.reduction == "sum" else total / jnp.maximum(pairs.sum(axis=(1, 2)), 1)


def better(by_i: Array, there_i: Array, by: Array, there: Array) -> Array:
    """[B, I, K] bool: whether document i of some [B, I] ranks above document j of all [B, K], both being there."""
    return (by_i[:, :, None] > by[:, None, :]) & there_i[:, :, None] & there[:, None, :]
