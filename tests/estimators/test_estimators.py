"""Estimators: what is deployed gives what scikit-learn predicts; soft labels, thresholds, artifacts, refused input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.datasets import load_breast_cancer, load_digits
from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC
from sklearn.tree import DecisionTreeRegressor
from threadpoolctl import threadpool_limits

from jdistill.compress import IntegerWeights, Stored, finished
from jdistill.compress.artifact import read_artifact, restore_structure, write_artifact
from jdistill.data.base import Schema
from jdistill.errors import RunError, UsageError
from jdistill.estimators import BoostedTrees, Estimator, LinearSVM, Tree
from jdistill.estimators.trees import not_above
from jdistill.registry import build
from tests.marks import slow_but

NUMBERS = Schema()


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """OpenMP's threads wait for one another by turning: several on a busy core take tens of times longer."""
    with threadpool_limits(1):
        yield


def data(name):
    """`(inputs [N, D] float32, soft labels [N, C] of a logistic regression, labels [N])`."""
    if name == "random":
        rng = np.random.default_rng(0)
        x, y = rng.normal(size=(300, 5)).astype(np.float32), rng.integers(0, 3, 300)
    else:
        x, y = {"breast_cancer": load_breast_cancer, "digits": load_digits}[name](return_X_y=True)
        x, y = StandardScaler().fit_transform(x).astype(np.float32)[:600], y[:600]
    return x, LogisticRegression(C=0.1, max_iter=500).fit(x, y).predict_proba(x).astype(np.float64), y


def assert_same_bits(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert jax.tree.map(lambda leaf: leaf.dtype, a) == jax.tree.map(lambda leaf: leaf.dtype, b)


def applied(estimator, params, x, outputs, jit=True):
    model = estimator.model(outputs)

    def logits(params, x):
        return model.apply(params, {}, x, train=False)[0].logits

    return np.asarray((jax.jit(logits) if jit else logits)(jax.tree.map(jnp.asarray, params), jnp.asarray(x)))


def logits_of(p):
    """As documented: the log-odds of two classes beside 0, or the logarithms, clipped at 1e-6."""
    logs = np.log(np.clip(p, 1e-6, None))
    return np.stack([0 * logs[:, 0], logs[:, 1] - logs[:, 0]], 1) if p.shape[1] == 2 else logs


NAMES = ("breast_cancer", "digits", "random")


@pytest.mark.parametrize("name", NAMES)
def test_tree_is_scikit_learns(name):
    x, soft, _ = data(name)
    tree = Tree(max_depth=6, min_samples_leaf=3)
    params = tree.fit(x, soft, seed=0)
    reference = DecisionTreeRegressor(max_depth=6, min_samples_leaf=3, random_state=0).fit(x, soft)
    for inputs in (x, np.random.default_rng(1).normal(size=x.shape).astype(np.float32)):
        expected = logits_of(reference.predict(inputs))
        np.testing.assert_allclose(applied(tree, params, inputs, soft.shape[1]), expected, rtol=1e-5, atol=1e-5)
    assert params["feature"].shape == (1, reference.tree_.node_count)


def test_tree_of_values_and_of_one_logit():
    x, soft, _ = data("breast_cancer")
    values = x[:, 0].astype(np.float64) * 3 + 100
    tree = Tree(max_depth=4)
    reference = DecisionTreeRegressor(max_depth=4, min_samples_leaf=5, random_state=0)
    expected = reference.fit(x, values).predict(x)
    np.testing.assert_allclose(applied(tree, tree.fit(x, values, 0), x, 1)[:, 0], expected, rtol=1e-6)
    params = tree.fit(x, soft, 0)
    one, two = applied(tree, params, x, 1), applied(tree, params, x, 2)
    np.testing.assert_array_equal(two, np.concatenate([0 * one, one], 1))
    p = reference.fit(x, soft).predict(x)[:, 1]
    np.testing.assert_allclose(1 / (1 + np.exp(-one[:, 0])), np.clip(p, 1e-6, 1 - 1e-6), rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_boosted_trees_on_logits_are_scikit_learns(name):
    x, soft, _ = data(name)
    gbt = BoostedTrees(trees=12, max_depth=3, min_samples_leaf=5, objective="logits")
    logits = np.log(np.maximum(soft, 1e-6))
    wanted = logits[:, 1:] - logits[:, :1] if soft.shape[1] == 2 else logits - logits.mean(1, keepdims=True)
    settings = {"max_iter": 12, "max_depth": 3, "max_leaf_nodes": None, "min_samples_leaf": 5, "early_stopping": False}
    new = np.random.default_rng(1).normal(size=x.shape).astype(np.float32)
    fitted = [HistGradientBoostingRegressor(**settings).fit(x, column) for column in wanted.T]
    params = gbt.fit(x, soft, seed=0)
    for inputs in (x, new):
        expected = np.stack([one.predict(inputs) for one in fitted], 1)
        found = applied(gbt, params, inputs, soft.shape[1])
        np.testing.assert_allclose(found[:, -expected.shape[1] :], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", slow_but(NAMES[:1], NAMES))
def test_boosted_trees_by_cross_entropy_are_scikit_learns(name):
    x, soft, _ = data(name)
    gbt = BoostedTrees(trees=8, max_depth=3, learning_rate=0.3)
    settings = {"max_iter": 8, "max_depth": 3, "max_leaf_nodes": None, "early_stopping": False, "learning_rate": 0.3}
    copies = [(i, c, p) for i, row in enumerate(soft) for c, p in enumerate(row) if p >= 1e-3]
    rows, classes, weights = (np.array(column) for column in zip(*copies, strict=True))
    reference = HistGradientBoostingClassifier(**settings).fit(x[rows], classes, sample_weight=weights)
    params, k = gbt.fit(x, soft, seed=0), soft.shape[1]
    for inputs in (x, np.random.default_rng(1).normal(size=x.shape).astype(np.float32)):
        expected = reference.predict_proba(inputs)
        found = np.asarray(jax.nn.softmax(applied(gbt, params, inputs, k)))
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert params["feature"].shape[0] == (8 if k == 2 else 8 * k)


def test_boosted_trees_of_values():
    x, _, _ = data("breast_cancer")
    y = x[:, 0] * x[:, 1] + 5.0
    settings = {"max_iter": 20, "max_depth": 5, "max_leaf_nodes": None, "early_stopping": False}
    expected = HistGradientBoostingRegressor(**settings).fit(x, y).predict(x)
    gbt = BoostedTrees(trees=20)
    np.testing.assert_allclose(applied(gbt, gbt.fit(x, y, 0), x, 1)[:, 0], expected, rtol=1e-5, atol=1e-5)


def test_a_class_that_is_never_probable_keeps_its_logit():
    x, soft, _ = data("random")
    soft = np.concatenate([soft, np.zeros((len(x), 1))], 1)
    for estimator in (BoostedTrees(trees=3), Tree(), LinearSVM(schema=NUMBERS)):
        logits = applied(estimator, estimator.fit(x, soft, 0), x, 4)
        assert logits.shape == (300, 4) and np.isfinite(logits).all() and (logits.argmax(1) < 3).all()


@pytest.mark.parametrize("name", NAMES)
def test_linear_svm_is_scikit_learns_on_weighted_copies(name):
    x, soft, _ = data(name)
    n, k = soft.shape
    svm = LinearSVM(schema=NUMBERS, c=0.01)
    classes = np.tile(np.arange(k), n)  # the plain form: every row once for each class
    reference = LinearSVC(C=0.01, dual=False).fit(np.repeat(x, k, axis=0), classes, sample_weight=soft.ravel())
    params = svm.fit(x, soft, 0)
    expected = reference.decision_function(x)
    found = applied(svm, params, x, k)
    if k == 2:
        assert not found[:, 0].any()
        found, expected = found[:, 1:], expected[:, None]
        np.testing.assert_array_equal(applied(svm, params, x, 1), found)
    np.testing.assert_allclose(found, expected, atol=2e-3)  # two runs of a solver that stops at tol=1e-4
    own = x.astype(np.float64) @ params["fc"]["kernel"] + params["fc"]["bias"]
    np.testing.assert_allclose(found, own, rtol=1e-5, atol=1e-5)


def test_linear_svm_reads_categories_one_hot():
    rng = np.random.default_rng(0)
    x = np.stack([rng.integers(0, 4, 200), rng.normal(size=200), rng.integers(0, 2, 200)], 1).astype(np.float32)
    p = 1 / (1 + np.exp(-(np.array([2.0, -2, 2, -2])[x[:, 0].astype(int)] + x[:, 1])))
    soft = np.stack([1 - p, p], 1)
    hot = np.concatenate([np.eye(4)[x[:, 0].astype(int)], x[:, 1:2], np.eye(2)[x[:, 2].astype(int)]], 1)
    svm = LinearSVM(schema=Schema(fields=(4, 0, 2)))
    params = svm.fit(x, soft, 0)
    assert params["fc"]["kernel"].shape == (7, 1)
    own = hot @ params["fc"]["kernel"] + params["fc"]["bias"]
    np.testing.assert_allclose(applied(svm, params, x, 1), own, rtol=1e-5, atol=1e-5)
    ordinal = LinearSVM(schema=NUMBERS)
    right = [((applied(e, e.fit(x, soft, 0), x, 1)[:, 0] > 0) == (p > 0.5)).mean() for e in (svm, ordinal)]
    assert right[0] > 0.95 > right[1] + 0.1


@pytest.mark.parametrize("estimator", [Tree(max_depth=4), BoostedTrees(trees=10), LinearSVM(schema=NUMBERS)], ids=type)
def test_soft_labels_tell_more_than_hard_ones(estimator):
    """Of a known p(x), and one label drawn for each row, the soft labels bring the estimator nearer to p."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1000, 3)).astype(np.float32)
    p = 1 / (1 + np.exp(-(1.5 * x[:, 0] - x[:, 1])))
    soft, hard = np.stack([1 - p, p], 1), np.eye(2)[(rng.uniform(size=1000) < p).astype(int)]
    logits = [applied(estimator, estimator.fit(x, y, 0), x, 1)[:, 0] for y in (soft, hard)]
    correlation = [np.corrcoef(z, np.log(p / (1 - p)))[0, 1] for z in logits]
    assert correlation[0] > correlation[1] + 1e-4, correlation


def test_thresholds_in_float32_decide_as_in_float64():
    rng = np.random.default_rng(0)
    near = np.float32(1) + np.arange(-300, 300, dtype=np.float32) * np.finfo(np.float32).eps
    x = np.stack([rng.permutation(near), rng.normal(size=600).astype(np.float32) * 1e-20], 1)
    for feature in range(2):
        values = np.unique(x[:, feature])
        between = (values[:-1].astype(np.float64) + values[1:]) / 2  # halfway between neighbours: the worst case
        np.testing.assert_array_equal(values[:, None] <= not_above(between), values[:, None] <= between)
        assert (values[:, None] <= between.astype(np.float32)).sum() != (values[:, None] <= between).sum() or feature
    y = rng.normal(size=600)
    tree = Tree(max_depth=12, min_samples_leaf=1)
    expected = DecisionTreeRegressor(max_depth=12, random_state=0).fit(x, y).predict(x)
    np.testing.assert_allclose(applied(tree, tree.fit(x, y, 0), x, 1)[:, 0], expected, rtol=1e-6, atol=1e-6)
    gbt = BoostedTrees(trees=5, min_samples_leaf=1, max_depth=8)
    settings = {"max_iter": 5, "max_depth": 8, "max_leaf_nodes": None, "early_stopping": False, "min_samples_leaf": 1}
    expected = HistGradientBoostingRegressor(**settings).fit(x, y).predict(x)
    np.testing.assert_allclose(applied(gbt, gbt.fit(x, y, 0), x, 1)[:, 0], expected, rtol=1e-5, atol=1e-6)


CASES = {
    "tree": (Tree(max_depth=5), 3),
    "gbt": (BoostedTrees(trees=5), 3),
    "linear_svm": (LinearSVM(schema=NUMBERS), 3),
    "tree of two": (Tree(max_depth=3), 2),
    "gbt of two": (BoostedTrees(trees=5), 2),
    "svm of two": (LinearSVM(schema=NUMBERS), 2),
}


@pytest.mark.parametrize(("estimator", "k"), CASES.values(), ids=CASES)
def test_artifact_holds_all(estimator, k, tmp_path):
    x, soft, _ = data("random")
    soft = soft[:, :k] / soft[:, :k].sum(1, keepdims=True)
    params, model = estimator.fit(x, soft, 0), estimator.model(k)
    size = write_artifact(tmp_path / "a", (), Stored(params), {}, {"student": "x"})
    saved, state, _ = read_artifact(tmp_path / "a")
    like = model.init(jax.random.key(0), jax.ShapeDtypeStruct((2, 5), jnp.float32))
    back = restore_structure(saved, like[0])
    assert_same_bits(back, params)
    assert like[1] == state == {} and size < 20_000
    np.testing.assert_array_equal(applied(estimator, back, x, k), applied(estimator, params, x, k))
    shaped = jax.eval_shape(lambda: model.apply(*model.init(jax.random.key(0), jnp.zeros((2, 5))), jnp.zeros((2, 5)))[0])
    assert shaped.logits.shape == (2, k) and shaped.features == {}


@pytest.mark.parametrize(("estimator", "k"), CASES.values(), ids=CASES)
def test_jit_vmap_and_sameness(estimator, k):
    x, soft, _ = data("random")
    soft = soft[:, :k] / soft[:, :k].sum(1, keepdims=True)
    params = estimator.fit(x, soft, 0)
    assert_same_bits(params, estimator.fit(x, soft, 1))  # nothing is drawn from so few rows
    whole = applied(estimator, params, x, k)
    np.testing.assert_allclose(applied(estimator, params, x, k, jit=False), whole, rtol=1e-6, atol=1e-6)
    model, stacked = estimator.model(k), jax.tree.map(lambda a: jnp.stack([a, a]), params)
    both = jax.vmap(lambda p: model.apply(p, {}, jnp.asarray(x))[0].logits)(stacked)
    np.testing.assert_allclose(both, np.stack([whole, whole]), rtol=1e-6, atol=1e-6)
    assert type(estimator)(**vars(estimator)).model(k) is model


def test_images_are_rows():
    x, soft, _ = data("digits")
    tree, image = Tree(), x.reshape(-1, 8, 8, 1)
    params = tree.fit(image, soft, 0)
    assert_same_bits(params, tree.fit(x, soft, 0))
    np.testing.assert_array_equal(applied(tree, params, image, 10), applied(tree, params, x, 10))


def test_linear_svm_takes_int8_weights(tmp_path):
    x, soft, _ = data("digits")
    svm = LinearSVM(schema=NUMBERS, c=0.01)
    params = svm.fit(x, soft, 0)
    int8, full = (
        write_artifact(tmp_path / str(i), steps, finished(steps, Stored(params), jax.random.key(0)), {}, {})
        for i, steps in enumerate([(IntegerWeights(),), ()])
    )
    found = applied(svm, read_artifact(tmp_path / "0")[0], x, 10)
    assert int8 < 0.5 * full and (found.argmax(1) == applied(svm, params, x, 10).argmax(1)).mean() > 0.98


def test_options():
    assert build("student", {"name": "tree", "max_depth": 3}) == Tree(max_depth=3)
    assert build("student", {"name": "gbt", "trees": 7}) == BoostedTrees(trees=7)
    svm = build("student", {"name": "linear_svm", "c": 0.5}, schema=Schema(fields=(0, 3)))
    assert svm == LinearSVM(schema=Schema(fields=(0, 3)), c=0.5) and isinstance(svm, Estimator)


REFUSED = {
    "tree": ({"max_depth": 0}, "max_depth must be a positive integer, got 0"),
    "gbt": ({"objective": "logit"}, "objective must be one of cross_entropy, logits, got 'logit'; did you mean 'logits'?"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_fields(name):
    fields, message = REFUSED[name]
    with pytest.raises(UsageError) as caught:
        build("student", {"name": name, **fields})
    assert str(caught.value) == f"student.{message}"


def test_refused_data():
    x, soft, _ = data("random")
    with pytest.raises(UsageError, match="linear_svm tells classes apart, this task predicts values"):
        LinearSVM(schema=NUMBERS).fit(x, x[:, 0], 0)
    with pytest.raises(UsageError, match=r"probabilities at least 0 that sum to 1"):
        Tree().fit(x, np.log(soft), 0)
    with pytest.raises(UsageError, match=r"got \(300, 1\) for inputs \(300, 5\)"):
        Tree().fit(x, soft[:, :1], 0)
    with pytest.raises(UsageError, match=r"got inputs of shape \(300, 5, 1\)"):
        Tree().fit(x[:, :, None], soft, 0)
    with pytest.raises(UsageError, match="got requests"):
        Tree().model(2).apply({}, {}, {"user": x})
    with pytest.raises(UsageError, match="the schema describes 2 columns, the inputs have 5"):
        LinearSVM(schema=Schema(fields=(0, 3))).fit(x, soft, 0)


def test_other_trees_of_scikit_learn_are_noticed(monkeypatch):
    x, soft, _ = data("random")
    fit = HistGradientBoostingClassifier.fit

    def with_other(name, value):
        def changed(self, *arguments, **named):
            fit(self, *arguments, **named)
            self.decision = self.decision_function(x[:256])
            self.decision_function = lambda x: self.decision
            setattr(self, name, value(getattr(self, name)))
            return self

        monkeypatch.setattr(HistGradientBoostingClassifier, "fit", changed)
        with pytest.raises(RunError) as caught:
            BoostedTrees(trees=2).fit(x, soft, 0)
        return str(caught.value)

    message = with_other("_baseline_prediction", lambda old: old + 1)
    assert message.startswith("student=gbt misreads the trees of scikit-learn 1.")
    message = with_other("_predictors", lambda old: [[vars(tree) for tree in trees] for trees in old])
    assert message.startswith("student=gbt cannot read the trees of scikit-learn 1.")
