"""Losses on the scores of unobserved items: collaborative (CD), unbiased (UnKD) and bidirectional distillation (BD)."""

import jax
import jax.numpy as jnp
from jax import Array

from jdistill import sampling
from jdistill.errors import UsageError
from jdistill.losses._layers import at_least_float32, require_teacher
from jdistill.losses.base import loss
from jdistill.losses.ranked import RankedLoss, best_items
from jdistill.pytrees import pytree, require_one_of, require_positive, static
from jdistill.sampling import Known
from jdistill.types import Batch, Context, Outputs, PyTree


def soft_binary(probability: Array, logit: Array) -> Array:
    """Cross-entropy of a probability of "yes" and a logit of it, elementwise."""
    return -probability * jax.nn.log_sigmoid(logit) - (1 - probability) * jax.nn.log_sigmoid(-logit)


def rank_of(scores: Array) -> Array:
    """The rank [B, N] int32 of each of scores [B, N] in its row, 0 for the greatest; ties by column."""
    return jnp.argsort(jnp.argsort(-scores, axis=1, stable=True), axis=1, stable=True).astype(jnp.int32)


@loss("cd")
@pytree
class CollaborativeDistillation(RankedLoss):
    """Collaborative distillation: the teacher's probabilities of unobserved items, drawn by their rank.

    With S a set of n items that the user has not met and q = sigmoid((t + shift) / temperature) of the teacher's logit t,
    value [B] = -sum_{i in S} (q_i log sigmoid(s_i) + (1 - q_i) log sigmoid(-s_i)), in float32 or wider: Lee et al. 2019,
    "Collaborative Distillation for Top-N Recommendation" (ICDM). Items are drawn without replacement with p ~ exp(-gamma pi)
    or, form="linear", p ~ 1 - pi, where pi = rank / number ranked, ranks from 0. guidance="teacher" ranks by the teacher, its
    best `pool` items; "student" ranks by the student as it is, `pool` items drawn uniformly (with replacement) from
    those not met. The paper ranks all unobserved items: so does the teacher's form where `pool` is the number of items. It
    draws by the teacher once; here each step draws. A value is of a training row, a user with an item; the paper adds up over
    users. UnKD's code of CD takes the mean over S (weight 1 / n here), T1 = 2, T2 = 0, and draws otherwise. No default of
    gamma is published; the value is not 0 where the student is the teacher.

    Attributes:
      samples: n, at least 1.
      guidance: "teacher" or "student".
      form: "exponential" or "linear".
      gamma: > 0.
      temperature: T1 > 0.
      shift: T2, any number.
      pool: how many items S is drawn from, at least n; with guidance="student" each step scores them all.

    Raises:
      UsageError: a bad option; when drawing, more items than the teacher ranks.
    """

    samples: int = static(default=50)
    guidance: str = static(default="teacher")
    form: str = static(default="exponential")
    gamma: float = 10.0
    temperature: float = 2.0
    shift: float = 0.0
    pool: int = static(default=500)

    def __post_init__(self) -> None:
        require_positive(samples=self.samples, gamma=self.gamma, temperature=self.temperature, pool=self.pool)
        require_one_of(("teacher", "student"), guidance=self.guidance)
        require_one_of(("exponential", "linear"), form=self.form)
        _require_pool(self.pool, self.samples)

    @property
    def drawn(self) -> int:
        return self.samples if self.guidance == "teacher" else self.pool

    @property
    def ranking(self) -> tuple[int, int]:
        return (self.pool, 0) if self.guidance == "teacher" else (0, 0)

    def draw(self, key: Array, known: Known, user: Array) -> Array:
        """S, or the pool that the student ranks: [B, drawn] int32."""
        if self.guidance == "student":
            return sampling.unobserved(key, known, user, self.pool)
        best = best_items(known, self.pool, self.samples, "samples")
        return best[user[:, None], self._places(key, len(user), best.shape[1])]

    def evaluate(self, params: PyTree, state: PyTree, context: Context) -> tuple[Array, PyTree]:
        """Values [B]."""
        del params
        s, t = (at_least_float32(out.logits) for out in (context.student, require_teacher(context.teacher)))
        if self.guidance == "student":
            order = jnp.argsort(-jax.lax.stop_gradient(s), axis=1, stable=True)
            chosen = jnp.take_along_axis(order, self._places(context.key, *s.shape), axis=1)
            s, t = (jnp.take_along_axis(x, chosen, axis=1) for x in (s, t))
        return soft_binary(jax.nn.sigmoid((t + self.shift) / self.temperature), s).sum(axis=1), state

    def _places(self, key: Array, rows: int, ranked: int) -> Array:
        """Ranks [rows, samples] int32 of what is drawn from `ranked` items, from 0."""
        pi = jnp.arange(ranked) / ranked
        log_p = -self.gamma * pi if self.form == "exponential" else jnp.log1p(-pi)
        return sampling.without_replacement(key, jnp.broadcast_to(log_p, (rows, ranked)), self.samples)


def _require_pool(pool: int, samples: int) -> None:
    if isinstance(pool, int) and isinstance(samples, int) and pool < samples:
        raise UsageError(f"pool must be at least samples={samples}, got {pool}")


@loss("unkd")
@pytree
class UnbiasedDistillation(RankedLoss):
    """Unbiased distillation (UnKD): pairs in the teacher's order, of items that are about equally popular.

    Items are sorted by training popularity and cut into `groups` of equal total popularity. For each user and group `pairs`
    pairs of different items are drawn from those of the group in the teacher's ranking, both with p ~ exp(-rank / T), ranks
    within the group from 0, the best `top`. With s_+ and s_- the student's logits of the better and of the worse of a pair,
    value [B] = the mean over all pairs of -log sigmoid(s_+ - s_-), in float32 or wider: Chen et al. 2023, "Unbiased
    Knowledge Distillation for Recommendation" (WSDM). A value is of a training row, a user with an item, as in the authors'
    code, where sample_num=30 gives each of split_group=4 groups 8 pairs (its lamda=0). That code draws pairs once an epoch;
    it adds 1e-10 to the probability.

    The ranking holds the teacher's best `depth` items over all groups, so a group's ranks end where it does: with T = 20,
    a rank beyond 100 has a probability of 0.7 %. A group of which fewer than two are ranked gives pairs of one item, which
    teach nothing.

    Attributes:
      groups: at least 1.
      pairs: of each group, at least 1.
      temperature: T > 0, in ranks.
      top: how many of a group are drawn from, at least 2.
      depth: how many items of each user the teacher ranks, at least 2; as many as there are is exact.

    Raises:
      UsageError: a bad option; when drawing, a teacher that ranks fewer than 2 items.
    """

    groups: int = static(default=4)
    pairs: int = static(default=8)
    temperature: float = 20.0
    top: int = static(default=1000)
    depth: int = static(default=2000)

    def __post_init__(self) -> None:
        require_positive(groups=self.groups, pairs=self.pairs, temperature=self.temperature)
        for field in ("top", "depth"):
            if isinstance(getattr(self, field), int) and getattr(self, field) < 2:
                raise UsageError(f"{field} must be at least 2, got {getattr(self, field)}")

    @property
    def drawn(self) -> int:
        return 2 * self.groups * self.pairs

    @property
    def ranking(self) -> tuple[int, int]:
        return self.depth, 0

    def draw(self, key: Array, known: Known, user: Array) -> Array:
        """The better items of the pairs, group by group, then the worse ones: [B, drawn] int32."""
        ordered, size = self.looked_up(known)
        start, better, worse = jnp.cumsum(size, axis=1) - size, [], []
        for g in range(self.groups):
            count = jnp.minimum(size[user, g], self.top)
            rank = sampling.ranked_pairs(jax.random.fold_in(key, g), count, self.pairs, self.temperature)
            place = start[user, g, None] + jnp.concatenate(rank, axis=1)
            items = ordered[user[:, None], jnp.minimum(place, ordered.shape[1] - 1)]
            better.append(items[:, : self.pairs])
            worse.append(items[:, self.pairs :])
        return jnp.concatenate(better + worse, axis=1)

    def lookup(self, known: Known) -> PyTree:
        """Each user's ranked items [U, depth] int32 group by group, each group in the teacher's order; sizes [U, groups]."""
        best = best_items(known, self.depth, 2, "groups")
        group = sampling.popularity_groups(known.popularity, self.groups)[best]
        ordered = jnp.take_along_axis(best, jnp.argsort(group, axis=1, stable=True), axis=1)
        return ordered, jax.nn.one_hot(group, self.groups, dtype=jnp.int32).sum(axis=1)

    def __call__(self, params: PyTree, student: Outputs, teacher: Outputs | None, batch: Batch) -> Array:
        del params, teacher, batch
        better, worse = jnp.split(at_least_float32(student.logits), 2, axis=1)
        return -jax.nn.log_sigmoid(better - worse).mean(axis=1)


@loss("bd", weight=0.5)
@pytree
class BidirectionalDistillation(RankedLoss):
    """Bidirectional distillation: each of two networks learns from the other the items that it ranks lower than the other.

    With d_i how many places lower the learner ranks item i than the other network, value [B] = sum over n items of
    -(q_i log sigmoid(s_i) + (1 - q_i) log sigmoid(-s_i)), where q = sigmoid(t / T), s is the learner's and t the other's
    logit, in float32 or wider: Kweon et al. 2021, https://arxiv.org/abs/2106.02870. For scheme=online, where both networks
    learn. Items that the user has not met are drawn with replacement: form="tanh" with p ~ tanh(max(epsilon d, 0)), by
    which the authors' code trains the smaller network, form="exp" with p ~ exp(epsilon d), by which it trains the larger.
    Where tanh has nothing to draw (all ranks equal), the value is 0.

    The ranks are those within `pool` items, drawn uniformly (with replacement) from those not met, at this step; d is scaled
    by items / pool, so that the published epsilon holds. The authors' code ranks all items every 10 epochs and draws 5 for
    each of a user's training items: here each row, a user with an item, draws `samples`, and the batch's sum is theirs
    (task.reduction=sum; weight 0.5, the default). It counts ranks from the bottom, the worst being 1, in the same formulas,
    which turns the sign of d: ranks="bottom".

    Attributes:
      form: "tanh" or "exp".
      epsilon: > 0.
      temperature: T > 0, of the other network alone.
      samples: n, at least 1.
      pool: how many items are ranked, at least n.
      ranks: "top" or "bottom".

    Raises:
      UsageError: a bad option.
    """

    zero_at_teacher = property(lambda self: self.form == "tanh")  # type: ignore[assignment]

    form: str = static(default="tanh")
    epsilon: float = 1e-4
    temperature: float = 2.0
    samples: int = static(default=5)
    pool: int = static(default=100)
    ranks: str = static(default="top")

    def __post_init__(self) -> None:
        require_positive(epsilon=self.epsilon, temperature=self.temperature, samples=self.samples, pool=self.pool)
        require_one_of(("tanh", "exp"), form=self.form)
        require_one_of(("top", "bottom"), ranks=self.ranks)
        _require_pool(self.pool, self.samples)

    @property
    def drawn(self) -> int:
        return self.pool

    def draw(self, key: Array, known: Known, user: Array) -> Array:
        """The pool: [B, drawn] int32."""
        return sampling.unobserved(key, known, user, self.pool)

    def evaluate(self, params: PyTree, state: PyTree, context: Context) -> tuple[Array, PyTree]:
        """Values [B]."""
        del params
        assert context.known is not None
        s, t = (at_least_float32(out.logits) for out in (context.student, require_teacher(context.teacher)))
        log_p, some = self._log_weights(jax.lax.stop_gradient(s), jax.lax.stop_gradient(t), context.known.items)
        places = jax.random.categorical(context.key, log_p[:, None], shape=(len(s), self.samples))
        s, t = (jnp.take_along_axis(x, places, axis=1) for x in (s, t))
        values = soft_binary(jax.nn.sigmoid(t / self.temperature), s).sum(axis=1)
        return jnp.where(some, values, 0), state

    def _log_weights(self, s: Array, t: Array, items: int | Array) -> tuple[Array, Array]:
        """log p [B, pool] up to a constant, and whether [B] there is any item to draw."""
        lower = (rank_of(s) - rank_of(t)) * (items / self.pool) * (1 if self.ranks == "top" else -1)
        if self.form == "exp":
            return self.epsilon * lower, jnp.ones(len(s), bool)
        weight = jnp.tanh(jnp.maximum(self.epsilon * lower, 0))
        return jnp.log(weight), (weight > 0).any(axis=1)
