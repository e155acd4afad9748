"""A frozen recommender as tables: its logits and features for every kind of request, what is kept, what stays a network."""

import jax
import numpy as np
import pytest

from jdistill.models.recommend.frozen import tabled
from tests.marks import slow_but
from tests.models.recommend import shop

FACTORED = ["cdae", "gru4rec", "lightgcn", "sasrec", "two_tower"]
HISTORIES = np.random.default_rng(1).integers(0, shop.ITEMS + 1, (shop.USERS, shop.LENGTH)).astype(np.int32)
HISTORIES[2] = shop.ITEMS  # of a user who met nothing
EVERYONE = {"user": np.arange(shop.USERS, dtype=np.int32), "history": HISTORIES}
MUCH = 1e9


def trained(name, **fields):
    model = shop.network(name, dim=4, **fields)
    return model, shop.started(model, scale=0.5)


def of(user, items=None):
    return shop.request(items, user=user, history=HISTORIES[user])


def same(found, expected):
    assert found.features.keys() == expected.features.keys()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, expected)


@pytest.mark.parametrize("name", FACTORED)
@pytest.mark.parametrize("items", [shop.PAIRS, shop.SHARED, None], ids=["own", "shared", "catalogue"])
def test_it_says_what_the_network_says(name, items):
    model, variables = trained(name)
    names = jax.eval_shape(lambda: model.apply(*variables, of(shop.USER, items))[0]).features
    table, held = tabled(model, variables, EVERYONE, names, MUCH)
    expected, found = (shop.run(m, *v, of(shop.USER, items)) for m, v in ((model, variables), (table, held)))
    same(found, expected)


@pytest.mark.parametrize("name", slow_but(["sasrec", "gru4rec"], FACTORED))
def test_where_every_position_asks(name):
    model, variables = trained(name)

    def asking(user, items=None):
        return shop.request(items, user=np.repeat(user, shop.LENGTH), history=HISTORIES[user])

    everyone = asking(np.arange(shop.USERS))
    names = jax.eval_shape(lambda: model.apply(*variables, everyone)[0]).features
    table, held = tabled(model, variables, everyone, names, MUCH)
    items = np.random.default_rng(2).integers(0, shop.ITEMS, (3 * shop.LENGTH, 2)).astype(np.int32)
    for given in (items, None):
        found, expected = (
            shop.run(m, *v, asking(np.array([5, 0, 5]), given)) for m, v in ((model, variables), (table, held))
        )
        same(found, expected)


def test_users_in_several_chunks(monkeypatch):
    model, variables = trained("sasrec")
    whole = tabled(model, variables, EVERYONE, (), MUCH)[1][0]["user"]["user"]
    monkeypatch.setattr("jdistill.models.recommend.frozen.ROWS", 3 * shop.LENGTH)
    parts = tabled(model, variables, EVERYONE, (), MUCH)[1][0]["user"]["user"]
    np.testing.assert_allclose(parts, whole, rtol=1e-5, atol=1e-6)


def test_a_temperature_and_a_bias_are_in_the_logits():
    for name, fields in (("two_tower", {"temperature": 0.25, "normalised": True}), ("gru4rec", {})):
        model, variables = trained(name, **fields)
        table, held = tabled(model, variables, EVERYONE, (), MUCH)
        found, expected = (shop.run(m, *v, of(shop.USER)).logits for m, v in ((table, held), (model, variables)))
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    changed = jax.tree.map(lambda leaf: leaf, variables)
    changed[0]["bias"] = changed[0]["bias"] + 1
    table, held = tabled(model, changed, EVERYONE, (), MUCH)
    np.testing.assert_allclose(shop.run(table, *held, of(shop.USER)).logits, expected + 1, rtol=1e-5, atol=1e-5)


def test_features_that_nothing_reads_keep_their_names_alone():
    model, variables = trained("sasrec", layers=2)
    table, held = tabled(model, variables, EVERYONE, {"layer2", "item"}, MUCH)
    features = shop.run(table, *held, of(shop.USER, shop.PAIRS)).features
    assert {name: value.shape for name, value in features.items()} == {
        "layer1": (4, 0), "layer2": (4, 4), "user": (4, 4), "embedding": (4, 4), "item": (4, 2, 4),
    }  # fmt: skip


def test_a_network_that_only_looks_up_or_is_no_product_or_is_too_large_stays():
    for name in ("bpr", "neumf"):
        assert tabled(*trained(name), EVERYONE, (), MUCH) is None
    model, variables = trained("sasrec")
    bytes_ = 4 * (shop.USERS * 4 + shop.ITEMS * 4)
    assert tabled(model, variables, EVERYONE, (), bytes_ - 1) is None and tabled(model, variables, EVERYONE, (), bytes_)


def test_one_program_serves_every_teacher_of_a_kind():
    first, second = (tabled(*trained("sasrec"), EVERYONE, (), MUCH)[0] for _ in range(2))
    assert first is second
