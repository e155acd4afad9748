"""Teachers of another catalogue: requests and answers in the student's numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdistill.data.base import Dataset, Schema, Side
from jdistill.errors import UsageError
from jdistill.ranking import as_lists, rank, teacher_ranking
from jdistill.teachers.translated import maps_between, translated, with_maps
from tests.models.recommend.shop import network

LENGTH = 4
PEOPLE = [f"u{n}" for n in range(6)]
GOODS = [f"i{n}" for n in range(9)]


def catalogue(people, goods, name="shop", *, names=True, seed=0):
    """Data of so many people and goods, whose names are the publisher's ids."""
    schema, rng = Schema(len(people), len(goods), LENGTH), np.random.default_rng(seed)
    edges = np.array([(u, i) for u in range(len(people)) for i in rng.permutation(len(goods))[:2]], np.int32)
    edges = edges.reshape(-1, 2)
    sequence = np.full((len(people), LENGTH + 1), len(goods), np.int32)
    for user in range(len(people)):
        met = edges[edges[:, 0] == user, 1]
        sequence[user, LENGTH + 1 - len(met) :] = met
    given = {"user_names": np.array(people), "item_names": np.array(goods)} if names else {}
    split = {"inputs": np.concatenate([np.arange(len(people))[:, None], sequence[:, 1:]], 1).astype(np.int32)}
    split |= {"label": np.zeros((len(people), 1), np.int32), "index": np.arange(len(people), dtype=np.int32)}
    return Dataset(
        name, {"inputs": edges, "label": np.ones(len(edges), np.float32)}, split, split, len(goods), (0.0,), (1.0,), 1.0, None,
        {}, schema=schema, side=Side(edges, **given), tables={"sequence": sequence},
    )  # fmt: skip


def teacher_of(other, name="bpr", seed=0):
    model = network(name, other.schema, other.side, group="teacher", dim=4, **({"heads": 1} if name == "sasrec" else {}))
    params, state = model.init(jax.random.key(seed), other.preprocess(jnp.asarray(other.test["inputs"])))
    rng = np.random.default_rng(seed)
    return model, (jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), params), state)


def scores(model, variables, data, inputs=None, items=None):
    request = data.preprocess(jnp.asarray(data.test["inputs"] if inputs is None else inputs))
    return model.apply(*variables, {**request, **({} if items is None else {"items": jnp.asarray(items)})})[0]


def through(own, other, name="bpr"):
    """The teacher of `other` in the numbers of `own`."""
    model, variables = teacher_of(other, name)
    return translated(model, own.schema.users, own.schema.items), with_maps(variables, maps_between(own, other))


def in_words(data, row):
    """A raw request with names for numbers."""
    user, *history = row.tolist()
    return [PEOPLE[user], *(None if i == data.schema.items else GOODS[i] for i in history)]


def in_numbers(data, words):
    places = {name: n for n, name in enumerate(data.side.item_names.tolist())}
    people = data.side.user_names.tolist()
    return [people.index(words[0]), *(data.schema.items if w is None else places[w] for w in words[1:])]


@pytest.fixture(scope="module")
def own():
    return catalogue(PEOPLE, GOODS)


def permuted(own, extra_people=(), extra_goods=(), seed=1):
    rng = np.random.default_rng(seed)
    return catalogue([*rng.permutation([*PEOPLE, *extra_people])], [*rng.permutation([*GOODS, *extra_goods])], "other")


@pytest.mark.parametrize("extra", [0, 7], ids=["permuted", "bigger"])
@pytest.mark.parametrize("name", ["bpr", pytest.param("sasrec", marks=pytest.mark.slow), "gru4rec"])
def test_another_numbering_gives_the_same_scores(name, extra, own):
    """Also of a bigger catalogue: its other items are not shown."""
    other = permuted(own, [f"v{n}" for n in range(extra)], [f"j{n}" for n in range(extra)])
    model, variables = teacher_of(other, name)
    asked = np.array([in_numbers(other, in_words(own, row)) for row in own.test["inputs"]], np.int32)
    place = np.array([other.side.item_names.tolist().index(item) for item in GOODS])
    expected = scores(model, variables, other, asked)
    found = scores(*through(own, other, name), own)
    np.testing.assert_allclose(found.logits, np.asarray(expected.logits)[:, place], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.features["user"], expected.features["user"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.features["item"], np.asarray(expected.features["item"])[place], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "items", [np.array([3, 8, 3, 0]), np.array([[0, 5], [1, 2], [8, 8], [4, 3], [6, 7], [7, 0]])], ids=["C", "BK"]
)
def test_candidates_are_translated(items, own):
    other = permuted(own, ["v"], ["j", "k"])
    model, variables = through(own, other)
    whole = np.asarray(scores(model, variables, own).logits)
    found = scores(model, variables, own, items=items.astype(np.int32)).logits
    expected = whole[:, items] if items.ndim == 1 else np.take_along_axis(whole, items, axis=1)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_items_unknown_to_the_teacher_are_lowest(own):
    other = catalogue(PEOPLE, [*GOODS[:3], "else", *GOODS[5:]])  # it lacks i3 and i4
    model, variables = teacher_of(other)
    found = np.asarray(scores(*through(own, other), own).logits)
    lacking, rest = [3, 4], np.delete(found, [3, 4], axis=1)
    asked = np.concatenate([np.arange(6)[:, None], np.full((6, LENGTH), 8)], axis=1).astype(np.int32)  # histories: not read
    np.testing.assert_allclose(rest, np.delete(scores(model, variables, other, asked).logits, 3, axis=1), rtol=1e-5)
    np.testing.assert_array_equal(found[:, lacking], np.repeat(rest.min(1, keepdims=True), 2, axis=1))
    only = scores(*through(own, other), own, items=np.array([[3, 4]] * 6, np.int32)).logits
    assert not np.any(only)  # nothing known to be below of


def test_users_and_histories_unknown_to_the_teacher_get_zeros(own):
    other = catalogue([*PEOPLE[1:], "somebody"], GOODS)  # it lacks u0
    inputs = own.test["inputs"][:2].copy()
    inputs[:, 1:] = own.schema.items
    out = scores(*through(own, other), own, inputs)
    assert not np.any(out.logits[0]) and not np.any(out.features["user"][0]) and not np.any(out.features["embedding"][0])
    assert np.all(np.asarray(out.logits[1]) != 0) and np.any(out.features["user"][1])


def test_a_network_of_users_knows_none_by_a_history(own):
    """It would speak for another user."""
    other = catalogue([*PEOPLE[1:], "somebody"], GOODS)
    out = scores(*through(own, other, "bpr"), own)
    assert (own.test["inputs"][0, 1:] < own.schema.items).any()
    assert not np.any(out.logits[0]) and not np.any(out.features["user"][0]) and np.all(np.asarray(out.logits[1:]) != 0)


def test_a_history_speaks_for_an_unknown_user(own):
    other = catalogue([*PEOPLE[1:], "somebody"], GOODS)
    model, variables = through(own, other, "sasrec")
    out = scores(model, variables, own, own.test["inputs"][:1])
    assert np.any(out.logits)
    inner, raw = teacher_of(other, "sasrec")
    asked = np.concatenate([[0], own.test["inputs"][0, 1:]])[None].astype(np.int32)  # whoever asks: it reads histories alone
    np.testing.assert_allclose(out.logits, scores(inner, raw, other, asked).logits, rtol=1e-5)


def test_an_item_of_a_history_that_the_teacher_lacks_is_left_open(own):
    other = catalogue(PEOPLE, GOODS[1:], "other")  # it lacks i0
    model, variables = through(own, other, "sasrec")
    with_it, without = (np.array([[0, 9, i, 4, 5]], np.int32) for i in (0, 9))
    np.testing.assert_array_equal(scores(model, variables, own, with_it).logits, scores(model, variables, own, without).logits)


def test_every_position_of_a_sequence_is_asked(own):
    """In training a history asks from each of its positions."""
    other = permuted(own)
    model, variables = through(own, other, "gru4rec")
    history = own.tables["sequence"][:3, 1:]
    request = {"user": jnp.repeat(jnp.arange(3), LENGTH), "history": jnp.asarray(history)}
    out = model.apply(*variables, {**request, "items": jnp.tile(jnp.array([1, 2]), (3 * LENGTH, 1))})[0]
    assert out.logits.shape == (3 * LENGTH, 2)
    last = scores(model, variables, own, np.concatenate([np.arange(3)[:, None], history], 1).astype(np.int32)).logits
    np.testing.assert_allclose(out.logits[LENGTH - 1 :: LENGTH], np.asarray(last)[:, [1, 2]], rtol=1e-5)


def test_jit_and_the_state(own):
    other = permuted(own)
    model, variables = through(own, other)
    request = own.preprocess(jnp.asarray(own.test["inputs"]))
    plain, state = model.apply(*variables, request)
    jitted = jax.jit(lambda v, r: model.apply(*v, r)[0])(variables, request)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), plain, jitted)
    assert jax.tree.structure(state) == jax.tree.structure(variables[1])
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), request))
    assert jax.tree.map(lambda a: (a.shape, a.dtype), shapes) == jax.tree.map(lambda a: (a.shape, a.dtype), variables)
    assert translated(teacher_of(other)[0], 6, 9) is model  # so that compiled programs are shared


def test_rankings_of_a_translated_teacher(own):
    other = permuted(own, ["v"], ["j", "k"])
    model, variables = through(own, other)
    values = np.asarray(scores(model, variables, own).logits)
    nothing = as_lists(np.zeros(0, np.int32), np.zeros(0, np.int32), 6)
    found = rank(model, own, variables, own.test["inputs"], nothing, 9).items
    np.testing.assert_array_equal(found, np.argsort(-values, axis=1, kind="stable"))
    ranking = teacher_ranking(model, own, variables, 3, 2)
    for user in range(6):
        met = set(own.side.edges[own.side.edges[:, 0] == user, 1].tolist())
        best = [i for i in np.argsort(-values[user], kind="stable").tolist() if i not in met][:3]
        assert ranking.items[user].tolist() == best
    assert ranking.users.shape == (9, 2)


# -- maps


def test_maps(own):
    other = catalogue([*PEOPLE[1:], "somebody"], ["i8", "new", *GOODS[:7]])
    maps = maps_between(own, other)
    assert maps["user"].tolist() == [-1, 0, 1, 2, 3, 4]
    assert maps["item"].tolist() == [2, 3, 4, 5, 6, 7, 8, -1, 0, 9]
    assert maps["user"].dtype == maps["item"].dtype == np.int32


def test_equal_catalogues_need_no_map(own):
    assert maps_between(own, catalogue(PEOPLE, GOODS, "again", seed=5)) is None
    assert maps_between(catalogue(PEOPLE, GOODS, names=False), catalogue(PEOPLE, GOODS, names=False)) is None


def test_other_schemas_need_maps_even_where_all_is_known(own):
    bigger = catalogue([*PEOPLE, "v"], [*GOODS, "j"])
    maps = maps_between(own, bigger)
    assert maps["item"].tolist() == [*range(9), 10] and maps["user"].tolist() == list(range(6))


def test_nothing_in_common_is_refused(own):
    other = catalogue([f"x{n}" for n in range(6)], [f"y{n}" for n in range(9)], "elsewhere")
    with pytest.raises(UsageError, match=r"^teacher.data: elsewhere has neither a user nor an item of shop"):
        maps_between(own, other)
    assert maps_between(own, catalogue(PEOPLE[:1], ["y"], "some users")) is not None
    assert maps_between(own, catalogue(["x"], GOODS[:1], "some items")) is not None


def test_without_names_numbers_are_compared(own):
    nameless = catalogue(PEOPLE[:4], GOODS[:5], names=False)
    maps = maps_between(own, nameless)
    assert maps["user"].tolist() == [0, 1, 2, 3, -1, -1]
    assert maps["item"].tolist() == [0, 1, 2, 3, 4, -1, -1, -1, -1, 5]
