"""Losses on the embeddings of a batch's users and items: experts (DE), a hint, and topologies (FTD, HTD).

Their sums go over the unique users and the unique items of a batch; values [B] have the published sum as their sum.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jdistill.errors import UsageError
from jdistill.losses import _experts, _layers
from jdistill.losses._groups import within_groups
from jdistill.losses.base import Loss, loss
from jdistill.pytrees import pytree, require_fraction, require_positive, static
from jdistill.sampling import first_occurrence
from jdistill.types import Batch, Context, Outputs, PyTree


class Entities(NamedTuple):
    """Users or items of a batch.

    Attributes:
      student, teacher: [N, D_s] and [N, D_t], what the networks score them by; float32 or wider.
      counted: [N] bool, whether an entry is the first of its id.
    """

    student: Array
    teacher: Array
    counted: Array


def entities(ids: Array, student: Array, teacher: Array, valid: Array) -> Entities:
    """The entities `ids` [B, ...] with features [B, ..., D] of the two networks; those of rows that are not `valid` [B] do not
    count.
    """
    f_s, f_t = (_layers.at_least_float32(f).reshape(-1, f.shape[-1]) for f in (student, teacher))
    valid = jnp.broadcast_to(valid.reshape(-1, *[1] * (ids.ndim - 1)), ids.shape).reshape(-1)
    return Entities(f_s, f_t, first_occurrence(jnp.where(valid, ids.reshape(-1), -1)) & valid)


def valid_rows(batch: Batch) -> Array:
    """[B] bool: rows that ask for something, where the batch says so in `valid`."""
    return batch["valid"] if "valid" in batch else jnp.ones(batch["inputs"]["user"].shape, bool)


class EntityLoss(Loss):
    """Base of the losses on the features `user` [B, D] and `item` [B, K, D] of requests with candidates of their own."""

    per_example = False
    reads_requests = True

    def init(self, key: Array, student: Outputs, teacher: Outputs | None) -> PyTree:
        """`{}`, after checking that both networks have the two features."""
        del key
        self.features(student, teacher)
        return {}

    def features(self, student: Outputs, teacher: Outputs | None) -> tuple[Array, Array, Array, Array]:
        """The student's `user` and `item`, and the teacher's.

        Raises:
          UsageError: a network without them, or items that are not a positive and negatives of each row.
        """
        found = []
        for network, outputs in (("student", student), ("teacher", _layers.require_teacher(teacher))):
            for name, axes in (("user", 2), ("item", 3)):
                if name not in outputs.features or outputs.features[name].ndim != axes:
                    raise UsageError(
                        f"this loss needs the features user [B, D] and item [B, K, D] of the {network}, which has "
                        f"{_layers.listing(outputs)}; use recommenders of embeddings, with task=recommend or next_item"
                    )
                found.append(outputs.features[name])
            if found[-1].shape[1] < 2:
                raise UsageError("this loss needs a positive and at least one negative item in each row; set task.negatives=1")
        return tuple(found)  # type: ignore[return-value]


def expert_errors(params: PyTree, key: Array, found: Entities, temperature: float | Array) -> Array:
    """||t - sum_m z_m E_m(s)||^2 [N], z drawn, 0 of entities that do not count; see `DistillationExperts`."""
    z = _experts.draw(params, key, found.teacher, temperature)
    made = _experts.mixture(params, found.student, z, temperature)
    return jnp.where(found.counted, ((found.teacher - made) ** 2).sum(axis=-1), 0)


@loss("de", weight=0.01)
@pytree
class DistillationExperts(EntityLoss):
    """Distillation experts (DE): experts rebuild the teacher's embedding of a user or an item from the student's.

    With alpha = softmax(linear layer of t), z = softmax((log(alpha + 1e-10) + g) / tau), g of Gumbel noise, and experts E_m of
    two linear layers with a ReLU between, e(s, t) = ||t - sum_m z_m E_m(s)||^2. The sum of value [B] = e over the unique
    users + 1/2 (e over the unique positive items + e over the unique negative items), in float32 or wider: Kang et al. 2020
    (DE-RRD), https://arxiv.org/abs/2012.04357, section 4.1, which prints the norm where the authors' code squares it. It
    equals the authors' code for the same g; users have selection and experts of their own, items others. Set
    task.reduction=sum to weigh the sums as there. There the weight is 0.01, the default, M is 30, H is (D_s + D_t) // 2, or
    D_s // 2 where both are equal, and tau falls from 1 to 1e-10 by equal factors: give `temperature` the schedule
    {name: annealing}.

    One expert always has z = 1. `entity_hint` is this loss with one expert, which is what is meant here by FitNets' hint
    (Romero et al. 2015, https://arxiv.org/abs/1412.6550) on users and items.

    Attributes:
      experts: M >= 1.
      temperature: tau > 0.

    Raises:
      UsageError: a number out of its range; in `init`, networks without the features `user` and `item`.
    """

    zero_at_teacher = False

    experts: int = static(default=30)
    temperature: float = 1.0

    def __post_init__(self) -> None:
        require_positive(experts=self.experts, temperature=self.temperature)

    def init(self, key: Array, student: Outputs, teacher: Outputs | None) -> PyTree:
        """`users` and `items`, each as `_experts.init_experts` makes them."""
        user_s, item_s, user_t, item_t = self.features(student, teacher)
        of_users, of_items = jax.random.split(key)
        return {
            "users": _experts.init_experts(of_users, user_s, user_t, self.experts, _narrowing(user_s, user_t)),
            "items": _experts.init_experts(of_items, item_s, item_t, self.experts, _narrowing(item_s, item_t)),
        }

    def evaluate(self, params: PyTree, state: PyTree, context: Context) -> tuple[Array, PyTree]:
        user_s, item_s, user_t, item_t = self.features(context.student, context.teacher)
        user, items = context.batch["inputs"]["user"], context.batch["inputs"]["items"]
        valid = valid_rows(context.batch)
        found = (
            ("users", 1.0, entities(user, user_s, user_t, valid)),
            ("items", 0.5, entities(items[:, 0], item_s[:, 0], item_t[:, 0], valid)),
            ("items", 0.5, entities(items[:, 1:], item_s[:, 1:], item_t[:, 1:], valid)),
        )
        values = jnp.zeros(user.shape, found[0][2].student.dtype)
        for i, (which, factor, one) in enumerate(found):
            errors = expert_errors(params[which], jax.random.fold_in(context.key, i), one, self.temperature)
            values = values + factor * errors.reshape(*user.shape, -1).sum(axis=1)
        return values, state


loss("entity_hint", experts=1, weight=0.01)(DistillationExperts)


def _narrowing(f_s: Array, f_t: Array) -> int:
    """Width of an expert's hidden layer: between the two widths, or half of them where they are equal; at least 1."""
    d_s, d_t = f_s.shape[-1], f_t.shape[-1]
    return max(1, d_s // 2 if d_s == d_t else (d_s + d_t) // 2)


class TopologyLoss(EntityLoss):
    """Base of the losses on how the users and items of a batch lie to one another, positive and negative items together."""

    def init(self, key: Array, student: Outputs, teacher: Outputs | None) -> PyTree:
        """`{}`, after checking that users and items of a network can be compared."""
        del key
        user_s, item_s, user_t, item_t = self.features(student, teacher)
        for network, user, item in (("student", user_s, item_s), ("teacher", user_t, item_t)):
            if user.shape[-1] != item.shape[-1]:
                raise UsageError(
                    f"this loss compares users with items, whose features are of unlike widths in the {network}: "
                    f"{user.shape[-1]} and {item.shape[-1]}; use loss=de, or networks that score by inner products"
                )
        return {}

    def both(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> tuple[Entities, Entities]:
        """The users of a batch, and its items."""
        user_s, item_s, user_t, item_t = self.features(student, teacher)
        asked, valid = batch["inputs"], valid_rows(batch)
        return entities(asked["user"], user_s, user_t, valid), entities(asked["items"], item_s, item_t, valid)


def _shared_out(total: Array, batch: Batch) -> Array:
    """Values [B], equal for the valid rows and 0 for others, that add up to `total` []."""
    valid = valid_rows(batch)
    return jnp.where(valid, total / jnp.maximum(valid.sum(), 1), 0)


def _directions(found: Entities) -> tuple[Array, Array]:
    """The student's and the teacher's rows brought to length 1; those that do not count are 0."""
    s, t = (jnp.where(found.counted[:, None], _layers.unit(f), 0) for f in (found.student, found.teacher))
    return s, t


@loss("ftd", weight=1e-3)
@pytree
class FullTopology(TopologyLoss):
    """Full topology distillation (FTD): the cosine of every two users or items of a batch is the teacher's.

    With E the unique users and the unique items (positive and negative together) of the batch, the sum of value [B] =
    sum_{i, j in E} (cos(t_i, t_j) - cos(s_i, s_j))^2, over ordered pairs, in float32 or wider: Kang et al. 2021,
    https://arxiv.org/abs/2106.08700. It equals the authors' code, `FTD.get_TD_loss`, whose weight is 1e-3, the default, beside
    a BPR loss summed over the batch: set task.reduction=sum. Rows have equal shares of the sum. An embedding of zeros has
    the cosine 0 with all.

    With the directions of E as the rows of T and S the sum is ||T'T||^2 + ||S'S||^2 - 2 ||T'S||^2 (Frobenius), so that no
    matrix of all pairs is formed; its rounding error is of the order of 1e-6 of the first two terms.

    Raises:
      UsageError: in `init`, networks without the features `user` and `item`, or these of unlike widths.
    """

    def __call__(self, params: PyTree, student: Outputs, teacher: Outputs | None, batch: Batch) -> Array:
        del params
        users, items = map(_directions, self.both(student, teacher, batch))
        s, t = (jnp.concatenate(pair) for pair in zip(users, items, strict=True))
        return _shared_out(_overlap(t, t) + _overlap(s, s) - 2 * _overlap(t, s), batch)


def _overlap(x: Array, y: Array) -> Array:
    """||x'y||_F^2 of [N, D] and [N, D'], which is the sum over pairs of rows of (x_i . x_j) (y_i . y_j)."""
    return (_layers.gram(x.T, y.T) ** 2).sum()


@loss("htd", weight=1e-3)
@pytree
class HierarchicalTopology(TopologyLoss):
    """Hierarchical topology distillation (HTD): cosines within groups, and of groups with all, are the teacher's.

    A selection network as in `de` puts each user in one of G groups, and each item in one of G others: the group of the
    largest alpha. With E the unique users and the unique items (positive and negative together) of the batch and P the means
    of the groups that are not empty, the sum of value [B] = alpha (entities + groups) + (1 - alpha) assignment, in float32
    or wider: Kang et al. 2021, https://arxiv.org/abs/2106.08700, with Group(P, e).

    entities = sum of (cos(t_i, t_j) - cos(s_i, s_j))^2 over ordered pairs of E in one group whose cos(t_i, t_j) > 0;
    groups = sum over P and E of (cos(p_t, t_i) - cos(p_s, s_i))^2, without a gradient through p_s; assignment = the
    errors of `de`, with G experts, over the unique users and the unique items. It equals the authors' code, `HTD` with
    choice='second', for the same noise: there pairs with cos(t_i, t_j) <= 0 are left out and an entity meets the mean of
    its own group too, where the paper prints neither. There G is 30, alpha 0.5 and the weight 1e-3, the defaults, beside
    a BPR loss summed over the batch: set task.reduction=sum; tau falls from 1 to 1e-10 by equal factors: give
    `temperature` the schedule {name: annealing}. Rows have equal shares of the sum.

    On a GPU or TPU it forms matrices of all pairs of users, and of all pairs of items: B^2 (1 + K^2) numbers.

    Attributes:
      groups: G >= 1.
      alpha: share of the topologies, in [0, 1); the rest is the assignment's.
      temperature: tau > 0.

    Raises:
      UsageError: a number out of its range; in `init`, networks without the features `user` and `item`, or these of unlike
        widths.
    """

    zero_at_teacher = False

    groups: int = static(default=30)
    alpha: float = 0.5
    temperature: float = 1.0

    def __post_init__(self) -> None:
        require_positive(groups=self.groups, temperature=self.temperature)
        require_fraction(alpha=self.alpha)

    def init(self, key: Array, student: Outputs, teacher: Outputs | None) -> PyTree:
        """`users` and `items`, each as `_experts.init_experts` makes them, with hidden layers of (D_s + D_t) // 2."""
        super().init(key, student, teacher)
        user_s, item_s, user_t, item_t = self.features(student, teacher)
        hidden = (user_s.shape[-1] + user_t.shape[-1]) // 2
        of_users, of_items = jax.random.split(key)
        return {
            "users": _experts.init_experts(of_users, user_s, user_t, self.groups, hidden),
            "items": _experts.init_experts(of_items, item_s, item_t, self.groups, hidden),
        }

    def evaluate(self, params: PyTree, state: PyTree, context: Context) -> tuple[Array, PyTree]:
        both = dict(zip(("users", "items"), self.both(context.student, context.teacher, context.batch), strict=True))
        topology, assignment, lying, means = jnp.zeros(()), jnp.zeros(()), [], []
        for i, (which, found) in enumerate(both.items()):
            key, directions = jax.random.fold_in(context.key, i), _directions(found)
            assignment = assignment + expert_errors(params[which], key, found, self.temperature).sum()
            group = jnp.argmax(_experts.shares(params[which], found.teacher), axis=-1)
            topology = topology + within_groups(*directions, group)
            members = jax.nn.one_hot(jnp.where(found.counted, group, -1), self.groups, dtype=found.teacher.dtype)
            means.append(_means(members, found))
            lying.append(directions)
        (p_s, p_t), (s, t) = (tuple(map(jnp.concatenate, zip(*pairs, strict=True))) for pairs in (means, lying))
        topology = topology + ((_layers.gram(p_t, t) - _layers.gram(p_s, s)) ** 2).sum()
        total = self.alpha * topology + (1 - self.alpha) * assignment
        return _shared_out(total, context.batch), state


def _means(members: Array, found: Entities) -> tuple[Array, Array]:
    """Directions of the groups' means [G, D_s] and [G, D_t], without gradient, 0 of empty groups; `members` is [N, G]."""
    size = jnp.maximum(members.sum(axis=0)[:, None], 1)
    s, t = (_layers.unit(_layers.gram(members.T, jax.lax.stop_gradient(f).T) / size) for f in (found.student, found.teacher))
    return s, t
