"""Ranking the whole catalogue: against a plain sort of each user's scores, whatever the chunks, exclusions and ties."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdistill import ranking
from jdistill.data.base import Dataset, Schema, Side
from jdistill.ranking import excluded_from, met_in_training, rank, rank_split, teacher_ranking
from jdistill.sampling import as_lists
from jdistill.types import Model, Outputs

USERS, ITEMS, LENGTH = 9, 17, 4
COLD, SATED = 7, 8
"""A user without training rows, and one that has met all items but two."""


def _init(key, inputs):
    del inputs
    return {"scores": jax.random.normal(key, (USERS, ITEMS))}, {}


def _apply(params, state, inputs, *, key=None, train=False):
    del key, train
    own, items = params["scores"][inputs["user"]], inputs.get("items")
    if items is not None:
        own = own[:, items] if items.ndim == 1 else jnp.take_along_axis(own, items, axis=1)
    return Outputs(own, {}), state


TABLE = Model(_init, _apply)
"""A network whose parameters are the scores themselves."""


def scores(seed=0, *, ties=False):
    values = np.random.default_rng(seed).normal(size=(USERS, ITEMS))
    return (np.round(values) + 0.0 if ties else values).astype(np.float32)  # + 0.0: -0.0 sorts below 0.0


def variables(values):
    return {"scores": jnp.asarray(values)}, {}


def met_sets():
    rng = np.random.default_rng(1)
    met = [set(rng.choice(ITEMS, rng.integers(1, 6), replace=False).tolist()) for _ in range(USERS)]
    met[COLD], met[SATED] = set(), set(range(ITEMS)) - {3, 11}
    return met


def dataset(history=0):
    """Users of whom some have validation items; the cold one asks with a history instead."""
    rng, met = np.random.default_rng(2), met_sets()
    pairs = [(u, i) for u in range(USERS) for i in met[u]]
    pairs += pairs[:4]  # met twice
    sequence = np.full((USERS, history + 1), ITEMS, np.int32)
    past = np.full((USERS, history), ITEMS, np.int32)
    if history:
        for u in range(USERS):
            last = list(rng.permutation(sorted(met[u])))[-history:]
            past[u, history - len(last) :] = last
            sequence[u, 1 + history - len(last) :] = last
        past[COLD, -2:] = (5, 12)
    users = np.array([0, 1, 2, 4, 5, COLD, SATED], np.int32)

    def requests(users, label):
        inputs = np.concatenate([users[:, None], past[users]], axis=1).astype(np.int32)
        return {"inputs": inputs, "label": label, "index": np.arange(len(users), dtype=np.int32)}

    def fresh(user):
        return rng.permutation(sorted(set(range(ITEMS)) - met[user] - {5, 12}))[:2]

    validation = np.full((3, 2), -1, np.int32)
    for row, user in enumerate((1, 4, 5)):
        validation[row, : 1 + row % 2] = fresh(user)[: 1 + row % 2]
    test = np.array([fresh(user)[-1:] for user in users], np.int32)
    return Dataset(
        "small", {"inputs": np.array(pairs, np.int32), "label": np.ones(len(pairs), np.float32)},
        requests(np.array([1, 4, 5], np.int32), validation), requests(users, test), ITEMS, (0.0,), (1.0,), 1.0, None, {},
        schema=Schema(USERS, ITEMS, history), side=Side(np.unique(np.array(pairs, np.int32), axis=0)),
        tables={"sequence": sequence},
    )  # fmt: skip


def sorted_list(values, forbidden, size):
    """The best items of one user by falling score, ties by number, filled with -1."""
    order = sorted((i for i in range(ITEMS) if i not in forbidden), key=lambda i: (-values[i], i))[:size]
    return order + [-1] * (size - len(order))


def expected_exclusions(data, split):
    rows, met = getattr(data, split), met_sets()
    held = {}
    if split == "test":
        for row, label in zip(data.validation["inputs"], data.validation["label"], strict=True):
            held[row[0]] = {i for i in label.tolist() if i >= 0}
    found = []
    for user, *past in rows["inputs"].tolist():
        found.append(met[user] | held.get(user, set()) | (set(past) - {ITEMS} if not met[user] else set()))
    return found


@pytest.fixture(params=["whole", "chunks of items", "chunks of users", "both"])
def chunked(request, monkeypatch):
    """Chunks that divide neither the items nor the rows; programs compiled for other chunks are others."""
    if request.param in ("chunks of items", "both"):
        monkeypatch.setattr(ranking, "CATALOGUE", 5)
    if request.param in ("chunks of users", "both"):
        monkeypatch.setattr(ranking, "SCORES", 3 * (5 if request.param == "both" else ITEMS))


@pytest.mark.parametrize("history", [0, LENGTH])
@pytest.mark.parametrize("split", ["validation", "test"])
@pytest.mark.parametrize("size", [1, 4, ITEMS, ITEMS + 5])
def test_a_split_is_sorted_without_what_is_excluded(split, size, history, chunked):
    data, values = dataset(history), scores()
    found = rank_split(TABLE, data, variables(values), split, size)
    users, size = getattr(data, split)["inputs"][:, 0], min(size, ITEMS)
    expected = [sorted_list(values[u], bad, size) for u, bad in zip(users, expected_exclusions(data, split), strict=True)]
    np.testing.assert_array_equal(found.items, expected)
    assert found.items.dtype == np.int32 and found.scores.dtype == np.float32
    there = found.items >= 0
    np.testing.assert_array_equal(found.scores[there], np.take_along_axis(values[users], np.maximum(found.items, 0), 1)[there])
    assert np.all(found.scores[~there] == -np.inf)


@pytest.mark.parametrize("size", [6, ITEMS])
def test_ties_go_to_the_lower_number_whatever_the_chunks(size, chunked):
    data, values = dataset(), scores(ties=True)
    assert all(len(set(row)) < 9 for row in values.tolist())
    found = rank_split(TABLE, data, variables(values), "test", size).items
    users = data.test["inputs"][:, 0]
    expected = [sorted_list(values[u], bad, size) for u, bad in zip(users, expected_exclusions(data, "test"), strict=True)]
    np.testing.assert_array_equal(found, expected)


def test_what_is_excluded_from_each_split():
    data = dataset(LENGTH)
    for split in ("validation", "test"):
        lists = excluded_from(data, split)
        found = [set(lists.values[a:b].tolist()) for a, b in zip(lists.start[:-1], lists.start[1:], strict=True)]
        assert found == expected_exclusions(data, split)
    validation = {(row[0], i) for row, label in zip(data.validation["inputs"], data.validation["label"], strict=True)
                  for i in label.tolist() if i >= 0}  # fmt: skip
    shown = rank_split(TABLE, data, variables(scores()), "test", ITEMS).items
    listed = {(u, i) for u, top in zip(data.test["inputs"][:, 0], shown, strict=True) for i in top.tolist()}
    assert validation and not validation & listed
    held_back = rank_split(TABLE, data, variables(scores()), "validation", ITEMS).items
    assert validation <= {(u, i) for u, top in zip(data.validation["inputs"][:, 0], held_back, strict=True) for i in top}


def test_a_user_with_few_items_left_gets_a_short_list():
    data = dataset()
    found = rank_split(TABLE, data, variables(scores()), "test", 5).items
    row = found[data.test["inputs"][:, 0] == SATED][0]
    assert set(row[:2]) == {3, 11} and row[2:].tolist() == [-1, -1, -1]


def test_no_rows_no_lists():
    data, empty = dataset(), as_lists(np.zeros(0, np.int32), np.zeros(0, np.int32), 0)
    found = rank(TABLE, data, variables(scores()), np.zeros((0, 1), np.int32), empty, 3)
    assert found.items.shape == found.scores.shape == (0, 3)


@pytest.mark.parametrize("rows", [1, 1023, 1024, 1025])
def test_many_requests_of_few_users(rows):
    data, values = dataset(), scores()
    user = np.random.default_rng(3).integers(0, USERS, (rows, 1)).astype(np.int32)
    bad = np.random.default_rng(4).integers(0, ITEMS, (rows, 2)).astype(np.int32)
    found = rank(TABLE, data, variables(values), user, as_lists(np.repeat(np.arange(rows), 2), bad.ravel(), rows), 3)
    expected = [sorted_list(values[u], set(b), 3) for (u,), b in zip(user.tolist(), bad.tolist(), strict=True)]
    np.testing.assert_array_equal(found.items, expected)


def with_candidates(data, count=6, seed=5):
    """As published protocols have it: only some items and the first relevant one are ranked."""
    rng, split = np.random.default_rng(seed), data.test
    drawn = [rng.choice(sorted(set(range(ITEMS)) - set(row.tolist())), count, replace=False) for row in split["label"]]
    return dataclasses.replace(data, test={**split, "candidates": np.array(drawn, np.int32)})


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("size", [1, 4, 20])
def test_candidates_are_ranked_alone_and_ties_count_against_the_positive(ties, size):
    data, values = with_candidates(dataset()), scores(ties=ties)
    found = rank_split(TABLE, data, variables(values), "test", size)
    rows = zip(data.test["inputs"][:, 0], data.test["candidates"].tolist(), data.test["label"][:, 0].tolist(), strict=True)
    expected = []
    for user, items, positive in rows:
        places = {item: place for place, item in enumerate([*items, positive])}
        expected.append(sorted(places, key=lambda i, u=user, p=places: (-values[u, i], p[i]))[:size])
    np.testing.assert_array_equal(found.items, expected)
    np.testing.assert_array_equal(found.scores, values[data.test["inputs"][:, :1], found.items])


def test_a_constant_score_ranks_the_positive_last():
    data = with_candidates(dataset())
    found = rank_split(TABLE, data, variables(np.zeros((USERS, ITEMS), np.float32)), "test", 7).items
    np.testing.assert_array_equal(found[:, -1], data.test["label"][:, 0])


# -- a teacher's ranking


@pytest.mark.parametrize("depth", [1, 5, ITEMS])
@pytest.mark.parametrize("history", [0, LENGTH])
def test_a_teacher_ranks_what_each_user_has_not_met(depth, history, chunked):
    data, values, met = dataset(history), scores(6), met_sets()
    found = teacher_ranking(TABLE, data, variables(values), depth)
    assert found.items.shape == found.scores.shape == (USERS, depth) and found.users is None
    for user in range(USERS):
        best = [i for i in sorted_list(values[user], met[user], depth) if i >= 0]
        own = np.asarray(found.items[user])
        np.testing.assert_array_equal(own[: len(best)], best)
        np.testing.assert_array_equal(found.scores[user, : len(best)], values[user, best])
        assert np.all(own[len(best) :] == best[-1])  # a short list goes on with its last item, never with a met one
        start, end = np.asarray(found.excluded.start[user : user + 2])
        assert np.asarray(found.excluded.values[start:end]).tolist() == sorted(met[user] | set(best))


@pytest.mark.parametrize("users", [1, 4, USERS])
def test_a_teacher_ranks_the_users_of_each_item(users, chunked):
    data, values, met = dataset(), scores(7), met_sets()
    found = np.asarray(teacher_ranking(TABLE, data, variables(values), 2, users).users)
    assert found.shape == (ITEMS, users) and found.dtype == np.int32
    for item in range(ITEMS):
        order = sorted((u for u in range(USERS) if item not in met[u]), key=lambda u, i=item: (-values[u, i], u))[:users]
        assert found[item, : len(order)].tolist() == order
        assert len(set(found[item].tolist())) == users


def test_what_was_met_is_counted_once():
    lists = met_in_training(dataset())
    assert [set(lists.values[a:b]) for a, b in zip(lists.start[:-1], lists.start[1:], strict=True)] == met_sets()
    assert len(lists.values) == sum(map(len, met_sets()))
