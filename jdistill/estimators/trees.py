"""A decision tree and gradient-boosted trees as students, and the function that applies them."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jdistill.errors import RunError
from jdistill.estimators.base import FLOOR, Estimator, as_outputs, log_odds, prepared, rows
from jdistill.models.base import positive_integer
from jdistill.pytrees import require_one_of, require_positive
from jdistill.registry import register
from jdistill.types import Model, PyTree


class Nodes(NamedTuple):
    """A tree by node: an inner node asks `x[feature] <= threshold` and goes left where so; a leaf has a value [C]."""

    leaf: np.ndarray
    feature: np.ndarray
    threshold: np.ndarray
    left: np.ndarray
    right: np.ndarray
    value: np.ndarray


def not_above(thresholds: np.ndarray) -> np.ndarray:
    """The largest float32 numbers that are not above `thresholds` float64: x <= either is the same for every float32 x."""
    rounded = np.asarray(thresholds, np.float32)
    return np.where(rounded > thresholds, np.nextafter(rounded, np.float32(-np.inf)), rounded).astype(np.float32)


def forest(trees: Sequence[Nodes]) -> dict[str, np.ndarray]:
    """The arrays of T trees, filled up to the most nodes M: `feature`, `threshold`, `left`, `right` [T, M], `value` [T, M, C].

    A leaf's children are itself, so that a walk may be longer than the tree is deep. Whole numbers are unsigned and as
    small as they can be; what is never read is 0.
    """
    most = max(len(tree.leaf) for tree in trees)

    def stack(arrays: list[np.ndarray], dtype: Any) -> np.ndarray:
        return np.stack([np.pad(a, [(0, most - len(a))] + [(0, 0)] * (a.ndim - 1)) for a in arrays]).astype(dtype)

    def smallest(arrays: list[np.ndarray]) -> np.ndarray:
        return stack(arrays, np.min_scalar_type(max(int(a.max()) for a in arrays)))

    own = [np.arange(len(tree.leaf)) for tree in trees]
    return {
        "feature": smallest([np.where(t.leaf, 0, t.feature) for t in trees]),
        "threshold": stack([np.where(t.leaf, 0, not_above(t.threshold)) for t in trees], np.float32),
        "left": smallest([np.where(t.leaf, i, t.left) for t, i in zip(trees, own, strict=True)]),
        "right": smallest([np.where(t.leaf, i, t.right) for t, i in zip(trees, own, strict=True)]),
        "value": stack([np.where(t.leaf[:, None], t.value, 0) for t in trees], np.float32),
    }


def values_of(params: dict[str, Array], x: Array, depth: int) -> Array:
    """[B, T, C]: the value of the leaf that each row of `x` [B, D] reaches in each tree, by `depth` steps from the root."""
    trees = jnp.arange(params["feature"].shape[0])

    def descend(_, node):
        asked = jnp.take_along_axis(x, params["feature"][trees, node].astype(jnp.int32), axis=1)
        goes_left = asked <= params["threshold"][trees, node]
        return jnp.where(goes_left, params["left"][trees, node], params["right"][trees, node]).astype(jnp.int32)

    node = jax.lax.fori_loop(0, depth, descend, jnp.zeros((x.shape[0], trees.size), jnp.int32))
    return params["value"][trees, node]


@functools.lru_cache(maxsize=64)
def _model(depth: int, outputs: int, boosted: bool) -> Model:
    """Applies one tree with a value for each output, or boosted trees, which take turns among the outputs and add up."""

    def init(key, inputs):
        del key, inputs
        width = 1 if outputs == 2 else outputs
        one = np.zeros(1, int)
        node = Nodes(one, one, one, one, one, np.zeros((1, 1 if boosted else width)))
        params = forest([node] * (width if boosted else 1))
        return jax.tree.map(jnp.asarray, params | ({"baseline": np.zeros(width, np.float32)} if boosted else {})), {}

    def apply(params, state, inputs, *, key=None, train=False):
        del key, train
        params = jax.tree.map(jnp.asarray, params)
        values = values_of(params, rows(inputs), depth)
        if not boosted:
            return as_outputs(values[:, 0], outputs), state
        width = params["baseline"].shape[0]
        return as_outputs(values.reshape(len(values), -1, width).sum(1) + params["baseline"], outputs), state

    return Model(init, apply)


@register("student", "tree")
@dataclasses.dataclass(frozen=True)
class Tree(Estimator):
    """One regression tree on all soft probabilities at once, by squared error (scikit-learn's DecisionTreeRegressor).

    A leaf holds the mean of its rows' probabilities; logits are their logarithms, clipped at 1e-6. On labels of 0 and 1
    this is the tree that Gini's impurity grows.

    Attributes:
      max_depth: the most questions asked of a row.
      min_samples_leaf: the fewest training rows in a leaf.

    Raises:
      UsageError: a number that is not a positive integer.
    """

    max_depth: int = 8
    min_samples_leaf: int = 5

    def __post_init__(self) -> None:
        positive_integer(max_depth=self.max_depth, min_samples_leaf=self.min_samples_leaf)

    def fit(self, inputs: np.ndarray, targets: np.ndarray, seed: int) -> PyTree:
        from sklearn.tree import DecisionTreeRegressor

        x, y = prepared(inputs, targets)
        settings = {"max_depth": self.max_depth, "min_samples_leaf": self.min_samples_leaf, "random_state": seed}
        tree = DecisionTreeRegressor(**settings).fit(x, y).tree_
        value = tree.value[:, :, 0] if y.ndim == 1 else log_odds(tree.value[:, :, 0])
        leaf = tree.children_left < 0
        return forest([Nodes(leaf, tree.feature, tree.threshold, tree.children_left, tree.children_right, value)])

    def model(self, outputs: int) -> Model:
        return _model(self.max_depth, outputs, boosted=False)


OBJECTIVES = ("cross_entropy", "logits")
NEGLIGIBLE = 1e-3
"""Copies of a row for classes that are less probable than this are left out."""


@register("student", "gbt")
@dataclasses.dataclass(frozen=True)
class BoostedTrees(Estimator):
    """Gradient-boosted trees on soft labels (scikit-learn's HistGradientBoosting), a tree for each logit in every round.

    `cross_entropy` minimises that with the soft labels: each row is copied for every class (of probability at least
    0.001), weighted by it. `logits` fits the teacher's logits by squared error: the log-odds of two classes, the
    logarithms of more less their mean, clipped at 1e-6; it is quicker for many classes, and not meant for labels of 0 and
    1. Values to predict are fitted by squared error.

    Attributes:
      trees: rounds of boosting.
      max_depth: the most questions that a tree asks of a row.
      learning_rate: what a tree's values are multiplied by.
      min_samples_leaf: the fewest training rows (or copies) in a leaf.
      objective: cross_entropy or logits.

    Raises:
      UsageError: a count that is not a positive integer, a learning rate that is not positive, an unknown objective.
    """

    trees: int = 100
    max_depth: int = 5
    learning_rate: float = 0.1
    min_samples_leaf: int = 20
    objective: str = "cross_entropy"

    def __post_init__(self) -> None:
        positive_integer(trees=self.trees, max_depth=self.max_depth, min_samples_leaf=self.min_samples_leaf)
        require_positive(learning_rate=self.learning_rate)
        require_one_of(OBJECTIVES, objective=self.objective)

    def fit(self, inputs: np.ndarray, targets: np.ndarray, seed: int) -> PyTree:
        """See `Estimator.fit`.

        Raises:
          RunError: this release of scikit-learn keeps its trees otherwise than is known here.
        """
        from threadpoolctl import threadpool_limits

        with threadpool_limits(1, user_api="openmp"):  # the same sums on any machine; its threads starve on busy cores
            return self._fit(inputs, targets, seed)

    def _fit(self, inputs: np.ndarray, targets: np.ndarray, seed: int) -> PyTree:
        from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor

        x, y = prepared(inputs, targets)
        settings = {
            "max_iter": self.trees, "max_depth": self.max_depth, "max_leaf_nodes": None, "early_stopping": False,
            "learning_rate": self.learning_rate, "min_samples_leaf": self.min_samples_leaf, "random_state": seed,
        }  # fmt: skip
        if y.ndim == 2 and self.objective == "cross_entropy":
            copies = HistGradientBoostingClassifier(**settings).fit(*weighted_copies(x, y))
            return _converted([copies], copies.decision_function(x[:256]), x[:256], self.max_depth)
        columns = y[:, None] if y.ndim == 1 else log_odds(y)
        if columns.shape[1] > 1:
            columns = columns - columns.mean(1, keepdims=True)
        each = [HistGradientBoostingRegressor(**settings).fit(x, column) for column in columns.T]
        return _converted(each, np.stack([one.predict(x[:256]) for one in each], axis=1), x[:256], self.max_depth)

    def model(self, outputs: int) -> Model:
        return _model(self.max_depth, outputs, boosted=True)


def weighted_copies(x: np.ndarray, p: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`(inputs, class, weight)` of rows copied for every class of some probability; every class keeps a row at least."""
    p = np.maximum(p, FLOOR)
    row, label = np.nonzero(p >= np.minimum(NEGLIGIBLE, p.max(0)))
    return x[row], label, p[row, label]


def _converted(fitted: list[Any], expected: np.ndarray, x: np.ndarray, depth: int) -> dict[str, np.ndarray]:
    """The arrays of estimators, each for one logit or one for all, checked: at `x` [n, D] they must give `expected`.

    scikit-learn has no public way to the trees of these estimators.
    """
    try:
        rounds = zip(*(one._predictors for one in fitted), strict=True)
        trees = [_nodes(tree.nodes) for together in rounds for predictors in together for tree in predictors]
        baseline = np.concatenate([np.ravel(one._baseline_prediction) for one in fitted])
    except (AttributeError, ValueError, TypeError) as error:
        raise RunError(f"student=gbt cannot read the trees of scikit-learn {_version()} ({error})") from error
    params = forest(trees) | {"baseline": baseline.astype(np.float32)}
    logits = _model(depth, len(baseline), boosted=True).apply(params, {}, jnp.asarray(x))[0].logits
    if not np.allclose(logits, expected.reshape(len(x), -1), rtol=1e-3, atol=1e-3):
        raise RunError(f"student=gbt misreads the trees of scikit-learn {_version()}; use student=tree, or another release")
    return params


def _nodes(nodes: np.ndarray) -> Nodes:
    return Nodes(
        nodes["is_leaf"].astype(bool), nodes["feature_idx"], nodes["num_threshold"],
        nodes["left"], nodes["right"], nodes["value"][:, None],
    )  # fmt: skip


def _version() -> str:
    import sklearn

    return sklearn.__version__
