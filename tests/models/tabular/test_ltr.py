"""Networks that rank lists: what is filled changes nothing, order carries over, values, sizes, features."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdistill.errors import UsageError
from jdistill.models.tabular import LtrMLP, ltr_linear
from jdistill.modules import from_linen
from jdistill.registry import build

CONTEXTS = ("none", "mean", "attention")
EACH = pytest.mark.parametrize("context", CONTEXTS)
RNG = np.random.default_rng(0)
DOCUMENT = np.array([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]], bool)
LISTS = np.concatenate([RNG.normal(size=(3, 4, 5)), DOCUMENT[..., None]], -1).astype(np.float32)


@functools.cache
def made(context):
    """`(model, params)`, every parameter random, so that none hides another."""
    model = from_linen(LtrMLP(outputs=4, widths=(6, 3), context=context, dim=4, heads=2))
    shapes, state = jax.eval_shape(model.init, jax.random.key(0), LISTS)
    assert state == {}
    rng = np.random.default_rng(0)
    return model, jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32) / 2, shapes)


@functools.cache
def applying(model):
    return jax.jit(lambda params, x: model.apply(params, {}, x)[0])


def outputs(model, params, x):
    return applying(model)(params, jnp.asarray(x))


@EACH
@pytest.mark.parametrize("content", [pytest.param(0.0, marks=pytest.mark.slow), 7.0, np.nan])
def test_filled_places_change_nothing(context, content):
    model, params = made(context)
    found = outputs(model, params, LISTS)
    x = LISTS.copy()
    x[~DOCUMENT, :-1] = content
    x = np.concatenate([x, np.full((3, 2, 6), content, np.float32)], 1)  # and a longer list
    x[:, 4:, -1] = 0
    more = outputs(model, params, x)
    np.testing.assert_allclose(more.logits[:, :4], found.logits, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(more.features["embedding"], found.features["embedding"], rtol=1e-5, atol=1e-6)
    assert (np.asarray(more.logits)[~np.pad(DOCUMENT, [(0, 0), (0, 2)])] == -1e9).all()
    p = np.asarray(jax.nn.softmax(more.logits))
    assert (p[:, :4][~DOCUMENT] == 0).all() and (p[:, 4:] == 0).all()
    gradient = jax.grad(lambda p: jnp.sum(jax.nn.log_softmax(model.apply(p, {}, x)[0].logits)[:, 0]))(params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


@EACH
def test_another_order_gives_the_same_scores(context):
    model, params = made(context)
    order = np.array([2, 0, 3, 1])
    found, turned = outputs(model, params, LISTS), outputs(model, params, LISTS[:, order])
    np.testing.assert_allclose(turned.logits, found.logits[:, order], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(turned.features["embedding"], found.features["embedding"], rtol=1e-5, atol=1e-6)


@EACH
def test_documents_see_one_another_where_asked(context):
    model, params = made(context)
    x = LISTS.copy()
    x[0, 1, 0] += 2  # another document of the same list
    changed = ~np.isclose(outputs(model, params, x).logits, outputs(model, params, LISTS).logits, rtol=0, atol=1e-6)
    assert changed[0, 1] and not changed[1:].any()
    assert changed[0, [0, 2, 3]].all() == (context != "none")


@pytest.mark.parametrize("context", ["none", "mean"])
def test_values_are_those_of_plain_numpy(context):
    model, params = made(context)
    found = outputs(model, params, LISTS)
    for b, k in np.argwhere(DOCUMENT):
        x = LISTS[b, k, :-1]
        if context == "mean":
            x = np.concatenate([x, np.mean([LISTS[b, j, :-1] for j in range(4) if DOCUMENT[b, j]], axis=0)])
        for i in (1, 2):
            x = np.maximum(x @ params[f"fc{i}"]["kernel"] + params[f"fc{i}"]["bias"], 0)
            np.testing.assert_allclose(found.features[f"hidden{i}"][b, k], x, rtol=1e-4, atol=1e-5)
        score = x @ params["fc"]["kernel"][:, 0] + params["fc"]["bias"][0]
        np.testing.assert_allclose(found.logits[b, k], score, rtol=1e-4, atol=1e-5)


def test_attention_is_that_of_plain_numpy():
    model, params = made("attention")
    a = params["attention"]
    for b in range(3):
        x = LISTS[b, DOCUMENT[b], :-1]
        q, k, v = (np.einsum("kd,dhe->hke", x, a[n]["kernel"]) + a[n]["bias"][:, None] for n in ("query", "key", "value"))
        weight = np.asarray(jax.nn.softmax(np.einsum("hqe,hke->hqk", q, k) / np.sqrt(2)))
        mixed = np.einsum("hqk,hke,heo->qo", weight, v, a["out"]["kernel"]) + a["out"]["bias"]
        y = np.concatenate([x, mixed], 1)
        for i in (1, 2):
            y = np.maximum(y @ params[f"fc{i}"]["kernel"] + params[f"fc{i}"]["bias"], 0)
        logits = (y @ params["fc"]["kernel"] + params["fc"]["bias"])[:, 0]
        np.testing.assert_allclose(outputs(model, params, LISTS).logits[b, DOCUMENT[b]], logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("context", "inputs", "extra"), [("none", 5, 0), ("mean", 10, 0), ("attention", 9, 3 * (5 * 4 + 4) + 4 * 4 + 4)]
)
def test_sizes_in_closed_form(context, inputs, extra):
    count = sum(leaf.size for leaf in jax.tree.leaves(made(context)[1]))
    assert count == extra + inputs * 6 + 6 + 6 * 3 + 3 + 3 + 1


@EACH
def test_features_and_head(context):
    model, params = made(context)
    found = outputs(model, params, LISTS)
    assert {name: value.shape for name, value in found.features.items()} == {
        "hidden1": (3, 4, 6), "hidden1_pre": (3, 4, 6), "hidden2": (3, 4, 3), "hidden2_pre": (3, 4, 3), "embedding": (3, 3),
    }  # fmt: skip
    assert all(not np.asarray(v)[~DOCUMENT].any() for n, v in found.features.items() if n != "embedding")
    mean = [np.mean(np.asarray(found.logits)[b, DOCUMENT[b]]) for b in range(3)]
    np.testing.assert_allclose(model.head(params, found.features["embedding"])[:, 0], mean, rtol=1e-4, atol=1e-6)


@EACH
def test_a_list_without_documents_is_harmless(context):
    model, params = made(context)
    x = np.zeros((2, 4, 6), np.float32)
    found = outputs(model, params, x)
    assert (np.asarray(found.logits) == -1e9).all() and not np.asarray(found.features["embedding"]).any()


@EACH
def test_jit_and_vmap(context):
    model, params = made(context)
    found = outputs(model, params, LISTS)
    np.testing.assert_allclose(model.apply(params, {}, LISTS)[0].logits, found.logits, rtol=1e-5, atol=1e-6)
    both = jax.vmap(lambda p: model.apply(p, {}, LISTS)[0].logits)(jax.tree.map(lambda a: jnp.stack([a, a]), params))
    np.testing.assert_allclose(both[1], found.logits, rtol=1e-5, atol=1e-6)


def test_linear_ranker():
    network = build("student", {"name": "ltr_linear"}, outputs=4)
    assert network == ltr_linear(4) == build("teacher", {"name": "ltr_linear"}, outputs=9).clone(outputs=4)
    (logits, features), variables = network.init_with_output(jax.random.key(0), LISTS)
    fc = variables["params"]["fc"]
    own = (LISTS[..., :-1] @ fc["kernel"] + fc["bias"])[..., 0]
    np.testing.assert_allclose(logits[DOCUMENT], own[DOCUMENT], rtol=1e-5, atol=1e-6)
    assert set(variables["params"]) == {"fc"} and features["embedding"].shape == (3, 5)


def test_refused():
    with pytest.raises(UsageError, match=r"student.heads must divide dim=6, got 4"):
        build("student", {"name": "ltr_mlp", "dim": 6}, outputs=4)
    with pytest.raises(UsageError, match=r"student.context must be one of none, mean, attention, got 'men'"):
        build("student", {"name": "ltr_mlp", "context": "men"}, outputs=4)
    with pytest.raises(UsageError, match=r"read lists \[B, K, features \+ 1\], got inputs of shape \(3, 6\)"):
        LtrMLP(outputs=4).init(jax.random.key(0), jnp.zeros((3, 6)))
