"""Losses on items drawn from a teacher's ranking: RD, RRD, IR-RRD and DE-RRD."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jdistill import sampling
from jdistill.errors import UsageError
from jdistill.losses._layers import at_least_float32
from jdistill.losses.base import Loss, loss
from jdistill.losses.wrappers import Sum, described
from jdistill.pytrees import pytree, require_nonnegative, require_positive, static
from jdistill.sampling import Known
from jdistill.types import Batch, Context, Outputs, PyTree


class RankedLoss(Loss):
    """Base of the losses that draw items from a teacher's ranking, or from those that a user has not met."""

    zero_at_teacher = False
    reads_requests = True


def best_items(known: Known, depth: int, drawn: int, field: str) -> Array:
    """The teacher's best items [U, depth] int32 of each user, fewer where it ranks fewer.

    Raises:
      UsageError: they are fewer than `drawn`, which `field` asks for.
    """
    assert known.ranking is not None
    return _enough(known.ranking.items[:, :depth], drawn, field, "items")


def best_users(known: Known, depth: int, drawn: int, field: str) -> Array:
    """As `best_items`, of each item the users [I, depth]."""
    assert known.ranking is not None and known.ranking.users is not None
    return _enough(known.ranking.users[:, :depth], drawn, field, "users")


def _enough(ranked: Array, drawn: int, field: str, what: str) -> Array:
    if ranked.shape[1] < drawn:
        raise UsageError(f"{field} must be at most {ranked.shape[1]}, the number of {what} that the teacher ranks, got {drawn}")
    return ranked


def once_per_user(values: Array, batch: Batch) -> Array:
    """`values` [B], 0 where a row's user stood in an earlier row: their sum is the sum over the batch's users."""
    return jnp.where(sampling.first_occurrence(batch["inputs"]["user"]), values, 0)


@loss("rd")
@pytree
class RankingDistillation(RankedLoss):
    """Ranking distillation: the teacher's best unobserved items are positives, weighted by their rank.

    With s_r the student's logit of the teacher's item of rank r = 1 .. K among those that the user has not met, value [B] =
    -sum_r w_r log sigmoid(s_r), in float32 or wider: Tang & Wang 2018, https://arxiv.org/abs/1809.07428. During the first
    `warmup_steps` steps w_r = exp(-r / sharpness), divided by the sum over r. Afterwards that times
    max(0, tanh(mu (rank_r - (r - 1)))), where rank_r = floor((items - 1) n_r / S) is how the student ranks the item: n_r of
    the S items drawn uniformly from those not met have a greater logit. No gradient goes through the weights, which
    `normalise` divides by their sum (all zero: 0). A value is of a training row, a user with an item, so a user counts once
    for each item; the mean over the batch is published. The authors' code has floor(items n_r / S), does not divide
    (normalise=false), and warms up for 10 epochs of 50.

    Attributes:
      top: K, at least 1.
      sharpness: lambda > 0, in ranks.
      mu: > 0.
      warmup_steps: steps before the student's ranks count, at least 0; a number of epochs times the batches of one.
      samples: S, at least 1.
      normalise: whether the hybrid weights of a row add up to 1.

    Raises:
      UsageError: a bad option; when drawing, more items than the teacher ranks.
    """

    top: int = static(default=10)
    sharpness: float = 1.0
    mu: float = 0.1
    warmup_steps: float = 0.0
    samples: int = static(default=100)
    normalise: bool = static(default=True)

    def __post_init__(self) -> None:
        require_positive(top=self.top, sharpness=self.sharpness, mu=self.mu, samples=self.samples)
        require_nonnegative(warmup_steps=self.warmup_steps)

    @property
    def drawn(self) -> int:
        return self.top + self.samples

    @property
    def ranking(self) -> tuple[int, int]:
        return self.top, 0

    def draw(self, key: Array, known: Known, user: Array) -> Array:
        """The teacher's `top` items in order, then `samples` that the user has not met: [B, drawn] int32."""
        best = best_items(known, self.top, self.top, "top")[user]
        return jnp.concatenate([best, sampling.unobserved(key, known, user, self.samples)], axis=1)

    def init_state(self, key: Array, student: Outputs, teacher: Outputs | None, label: Array) -> PyTree:
        """`step` [] int32, the number of steps made."""
        del key, student, teacher, label
        return {"step": jnp.zeros((), jnp.int32)}

    def evaluate(self, params: PyTree, state: PyTree, context: Context) -> tuple[Array, PyTree]:
        """Values [B], and the state a step later."""
        del params
        assert context.known is not None
        logits = at_least_float32(context.student.logits)
        s = logits[:, : self.top]
        weight = self._weights(jax.lax.stop_gradient(logits), context.known.items, state["step"] >= self.warmup_steps)
        return -(weight * jax.nn.log_sigmoid(s)).sum(axis=1), {"step": state["step"] + 1}

    def _weights(self, logits: Array, items: int | Array, warm: Array) -> Array:
        """[B, K]."""
        column = jnp.arange(self.top)
        position = jax.nn.softmax(-(column + 1) / self.sharpness).astype(logits.dtype)
        s, others = logits[:, : self.top], logits[:, self.top :]
        above = (others[:, None, :] > s[:, :, None]).sum(axis=-1)
        rank = jnp.floor((items - 1.0) * above / self.samples)
        hybrid = position * jnp.maximum(jnp.tanh(self.mu * (rank - column)), 0).astype(logits.dtype)
        if self.normalise:
            total = hybrid.sum(axis=1, keepdims=True)
            hybrid = hybrid / jnp.where(total > 0, total, 1)
        return jnp.where(warm, hybrid, position)


def relaxed_ranking(interesting: Array, uninteresting: Array) -> Array:
    """-log probability [...] of the order of logits [..., K], all of them above the logits [..., L], whose order is free."""
    tail = jax.lax.cumlogsumexp(interesting, axis=interesting.ndim - 1, reverse=True)
    rest = jax.nn.logsumexp(uninteresting, axis=-1, keepdims=True)
    return (jnp.logaddexp(tail, rest) - interesting).sum(axis=-1)


@loss("rrd", weight=1e-3)
@pytree
class RelaxedRanking(RankedLoss):
    """Relaxed ranking distillation (RRD): interesting items in the teacher's order, all above uninteresting ones.

    With s_1 .. s_K the student's logits of interesting items in the teacher's order and n_1 .. n_L those of uninteresting
    ones, value [B] = -sum_k (s_k - log(sum_{j >= k} exp s_j + sum_l exp n_l)), in float32 or wider: Kang et al. 2020
    (DE-RRD), https://arxiv.org/abs/2012.04357. The interesting ones are drawn without replacement from the teacher's best
    `top` that the user has not met, p ~ exp(-rank / T); the uninteresting ones uniformly, with replacement, from the rest.
    With sampled=false the teacher's best K are taken, which gained considerably according to a later note of the authors.

    A user that stands in several rows of the batch counts in the first, 0 in the others: the batch's sum is the authors'
    code's (task.reduction=sum; weight 1e-3, the default). That code draws once an epoch, here each step draws.

    Attributes:
      interesting: K, at least 1.
      uninteresting: L, at least 1.
      temperature: T > 0, in ranks.
      top: how many ranked items the interesting ones are drawn from, at least K.
      sampled: whether they are drawn.

    Raises:
      UsageError: a bad option; when drawing, more items than the teacher ranks.
    """

    per_example = False

    interesting: int = static(default=40)
    uninteresting: int = static(default=40)
    temperature: float = 10.0
    top: int = static(default=500)
    sampled: bool = static(default=True)

    def __post_init__(self) -> None:
        require_positive(interesting=self.interesting, uninteresting=self.uninteresting, temperature=self.temperature)
        require_positive(top=self.top)
        if isinstance(self.top, int) and self.top < self.interesting:
            raise UsageError(f"top must be at least interesting={self.interesting}, got {self.top}")

    @property
    def drawn(self) -> int:
        return self.interesting + self.uninteresting

    @property
    def ranking(self) -> tuple[int, int]:
        return self.top, 0

    def draw(self, key: Array, known: Known, user: Array) -> Array:
        """The interesting items in the teacher's order, then the uninteresting ones: [B, drawn] int32."""
        above, below = jax.random.split(key)
        best = best_items(known, self.top, self.interesting, "interesting")
        if best.shape[1] >= known.popularity.shape[0]:
            raise UsageError(f"top must be below {known.popularity.shape[0]}, the number of items, got {self.top}")
        places = jnp.arange(self.interesting)[None]
        if self.sampled:
            places = sampling.top_positions(above, len(user), best.shape[1], self.interesting, self.temperature)
        others = sampling.uninteresting(below, known, user, self.uninteresting)
        return jnp.concatenate([best[user[:, None], places], others], axis=1)

    def __call__(self, params: PyTree, student: Outputs, teacher: Outputs | None, batch: Batch) -> Array:
        del params, teacher
        logits = at_least_float32(student.logits)
        values = relaxed_ranking(logits[:, : self.interesting], logits[:, self.interesting :])
        return once_per_user(values, batch)


@loss("ir_rrd", weight=1e-3)
@pytree
class ItemRegularisedRanking(RelaxedRanking):
    """RRD with its item side (IR-RRD): `rrd`, and for items the same loss on the users that the teacher ranks highest.

    With R(i) the value of `rrd` whose interesting users of item i are drawn from the teacher's best `user_top` that have
    not met it and whose uninteresting ones from the others, value [B] = `rrd` + (item_weight / B) sum_i R(i), in float32 or
    wider: Kang et al. 2021, "Item-side Ranking Regularized Distillation for Recommender System". i runs over the different
    items that a draw of `rrd` for the batch's users gives, as in the authors' code, or over `item_sample` of them, with the
    sum multiplied by how many there are for each one taken: the same on average, at a small part of the cost. The batch's
    sum is then the authors' (task.reduction=sum; weight 1e-3, the default, for users and half of that for items).

    Uninteresting users are drawn with replacement (see `sampling.uninterested` for where users are few). As a part of
    `sum`, the items are those of another draw than the one whose logits `rrd` reads.

    Attributes:
      interesting, uninteresting, temperature, top, sampled: of `rrd`.
      item_weight: at least 0, relative to `rrd`.
      interesting_users, uninteresting_users: K and L of the item side, at least 1.
      user_temperature: T > 0, in ranks.
      user_top: how many ranked users the interesting ones are drawn from, at least their number.
      item_sample: how many items at most, or 0 for all.

    Raises:
      UsageError: a bad option; when drawing, more than the teacher ranks; in `evaluate`, a student that reads histories.
    """

    item_weight: float = 0.5
    interesting_users: int = static(default=20)
    uninteresting_users: int = static(default=20)
    user_temperature: float = 10.0
    user_top: int = static(default=500)
    item_sample: int = static(default=1024)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_nonnegative(item_weight=self.item_weight, item_sample=self.item_sample)
        require_positive(interesting_users=self.interesting_users, uninteresting_users=self.uninteresting_users)
        require_positive(user_temperature=self.user_temperature, user_top=self.user_top)
        if isinstance(self.user_top, int) and self.user_top < self.interesting_users:
            raise UsageError(f"user_top must be at least interesting_users={self.interesting_users}, got {self.user_top}")

    @property
    def ranking(self) -> tuple[int, int]:
        return self.top, self.user_top

    def evaluate(self, params: PyTree, state: PyTree, context: Context) -> tuple[Array, PyTree]:
        """Values [B]; asks the student for the logits of the drawn users and items."""
        inputs = context.batch["inputs"]
        if "history" in inputs:
            raise UsageError("ir_rrd asks for other users than the batch's, whose histories are not at hand; use loss=rrd")
        values = self(params, context.student, context.teacher, context.batch)
        item, count = self._items(context)
        users = self._users(jax.random.fold_in(context.key, 1), context, item)
        pairs = {"user": users.reshape(-1), "items": jnp.repeat(item, users.shape[1])[:, None]}
        logits = at_least_float32(context.student_network.outputs(pairs).logits).reshape(users.shape)
        of_items = relaxed_ranking(logits[:, : self.interesting_users], logits[:, self.interesting_users :])
        return values + self.item_weight * (count * of_items).sum() / values.shape[0], state

    def _items(self, context: Context) -> tuple[Array, Array]:
        """Different items [n] of a draw, and for how many each counts [n] float: 0 where there are fewer than n."""
        known, user = context.known, context.batch["inputs"]["user"]
        assert known is not None
        drawn = self.draw(jax.random.fold_in(context.key, 0), known, user)  # what a term that is no part of a sum drew
        first = jnp.broadcast_to(sampling.first_occurrence(user)[:, None], drawn.shape)
        there = jnp.zeros(known.popularity.shape, bool).at[drawn].max(first)
        n = min(there.shape[0], drawn.size, self.item_sample or there.shape[0])
        choice = jax.random.fold_in(context.key, 2)
        score, item = jax.lax.top_k(jnp.where(there, jax.random.uniform(choice, there.shape), -1), n)
        taken = score >= 0
        return item.astype(jnp.int32), taken * (there.sum() / jnp.maximum(taken.sum(), 1))

    def _users(self, key: Array, context: Context, item: Array) -> Array:
        """[n, interesting_users + uninteresting_users] int32, the interesting ones first, in the teacher's order."""
        known = context.known
        assert known is not None
        best = best_users(known, self.user_top, self.interesting_users, "interesting_users")
        above, below = jax.random.split(key)
        places = sampling.top_positions(above, len(item), best.shape[1], self.interesting_users, self.user_temperature)
        others = sampling.uninterested(below, known, item, self.uninteresting_users)
        return jnp.concatenate([best[item[:, None], places], others], axis=1)


@pytree
class ExpertsAndRanking(Sum):
    """DE-RRD: distillation experts (`de`) and relaxed ranking (`rrd`) at once.

    Value [B] = `de` + ranking_weight `rrd`, in float32 or wider: Kang et al. 2020 (DE-RRD),
    https://arxiv.org/abs/2012.04357. The default weights 0.01 and ranking_weight 0.1 are the authors' code's 0.01 of DE and
    0.001 of RRD (task.reduction=sum), which has the two in separate scripts.
    """


@loss("de_rrd", weight=0.01)
def de_rrd(de: Any = None, rrd: Any = None, ranking_weight: float = 0.1) -> ExpertsAndRanking:
    """DE-RRD: distillation experts and relaxed ranking at once; `de` and `rrd` are dicts of those losses' options."""
    parts = {"de": de, "rrd": rrd}
    for name, node in parts.items():
        if not isinstance(node, dict | None):
            raise UsageError(f"{name} must be a dict of options such as {{temperature: 5}}, got {node!r}")
    losses = tuple(described(name, {"name": name, **(node or {})}) for name, node in parts.items())
    require_nonnegative(ranking_weight=ranking_weight)
    return ExpertsAndRanking(losses=losses, weights=(1.0, ranking_weight), names=tuple(parts))
