"""Draws on device: uniform over exactly what may be drawn, against plain sets."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chisquare

from jdistill import sampling
from jdistill.sampling import Known, Lists, Ranking, absent, as_lists, nth_absent
from tests.reference import ranked as reference

ITEMS = 11
MET = [set(), {0}, {ITEMS - 1}, {0, 1, 2, ITEMS - 1}, {3, 4, 8}, set(range(ITEMS)) - {6}, set(range(ITEMS))]
FULL = len(MET) - 1


def lists(sets=MET):
    """The sets as `Lists` on device, from pairs in no order, some twice."""
    pairs = np.array([(u, i) for u, own in enumerate(sets) for i in own], np.int32).reshape(-1, 2)
    pairs = np.random.default_rng(0).permutation(np.concatenate([pairs, pairs[: len(pairs) // 2]]))
    return jax.tree.map(jnp.asarray, as_lists(pairs[:, 0], pairs[:, 1], len(sets)))


def known(ranked=None, best_users=None):
    """Of the sets, with the items `ranked` of each user as a teacher's ranking."""
    popularity = np.bincount([i for own in MET for i in own], minlength=ITEMS).astype(np.int32)
    ranking = None
    if ranked is not None:
        both = lists([own | set(top) for own, top in zip(MET, ranked, strict=True)])
        users = None if best_users is None else jnp.asarray(best_users)
        ranking = Ranking(jnp.asarray(ranked), jnp.zeros(np.shape(ranked)), both, users)
    return Known(jnp.int32(ITEMS), lists(), jnp.asarray(popularity), ranking)


def assert_uniform(drawn, allowed):
    """Exactly the allowed numbers occur, equally often (a chi-squared test, whose draws are fixed)."""
    values, counts = np.unique(np.asarray(drawn), return_counts=True)
    assert values.tolist() == sorted(allowed)
    if len(allowed) > 1:
        assert chisquare(counts).pvalue > 1e-3, counts


def test_lists_are_rising_and_hold_each_pair_once():
    found = lists()
    assert found.start.dtype == found.values.dtype == np.int32
    start, values = np.asarray(found.start).tolist(), np.asarray(found.values).tolist()
    assert [values[a:b] for a, b in itertools.pairwise(start)] == [sorted(own) for own in MET]


def test_lists_of_no_pairs():
    found = as_lists(np.zeros(0, np.int32), np.zeros(0, np.int32), 3)
    assert found.start.tolist() == [0, 0, 0, 0] and len(found.values) == 0
    np.testing.assert_array_equal(nth_absent(jax.tree.map(jnp.asarray, found), jnp.arange(3), jnp.arange(3)), [0, 1, 2])


def test_lists_of_large_numbers():
    user, item = np.array([70_000, 70_000, 1], np.int32), np.array([2_000_000_000, 5, 2_000_000_000], np.int32)
    found = as_lists(user, item, 70_001)
    assert found.values.tolist() == [2_000_000_000, 5, 2_000_000_000] and found.start[[1, 2, -2, -1]].tolist() == [0, 1, 1, 3]


@pytest.mark.parametrize("jit", [False, True])
def test_the_nth_absent_number(jit):
    call = jax.jit(nth_absent) if jit else nth_absent
    for user, own in enumerate(MET[:FULL]):
        free = [i for i in range(ITEMS) if i not in own]
        found = call(lists(), jnp.full((2, len(free)), user), jnp.stack([jnp.arange(len(free))] * 2))
        np.testing.assert_array_equal(found, [free, free])


def test_the_nth_absent_number_of_random_lists():
    rng = np.random.default_rng(1)
    sets = [set(rng.choice(300, rng.integers(0, 299), replace=False).tolist()) for _ in range(40)]
    user = rng.integers(0, 40, 500)
    n = np.array([rng.integers(0, 300 - len(sets[u])) for u in user])
    expected = [[i for i in range(300) if i not in sets[u]][k] for u, k in zip(user, n, strict=True)]
    np.testing.assert_array_equal(jax.jit(nth_absent)(lists(sets), jnp.asarray(user), jnp.asarray(n)), expected)


@pytest.mark.parametrize("user", range(FULL))
def test_unobserved_items_are_uniform_over_what_was_not_met(user):
    draw = jax.jit(lambda key: sampling.unobserved(key, known(), jnp.full((64,), user), 40))
    drawn = draw(jax.random.key(user))
    assert drawn.shape == (64, 40) and drawn.dtype == np.int32
    assert_uniform(drawn, set(range(ITEMS)) - MET[user])


def test_rows_of_a_batch_are_drawn_apart():
    user = jnp.array([4, 0, 4, 5])
    drawn = np.asarray(sampling.unobserved(jax.random.key(0), known(), user, 30))
    assert not np.array_equal(drawn[0], drawn[2]) and set(drawn[3]) == {6}
    assert not (set(drawn[0]) | set(drawn[2])) & MET[4]


def test_who_met_everything_gets_the_last_item():
    assert np.all(np.asarray(absent(jax.random.key(0), lists(), ITEMS, jnp.array([FULL]), 50)) == ITEMS - 1)


RANKED = np.array([[9, 2], [10, 5], [0, 3], [4, 5], [1, 0], [6, 6], [0, 0]], np.int32)


@pytest.mark.parametrize("user", range(5))
def test_uninteresting_items_are_neither_met_nor_ranked(user):
    drawn = jax.jit(lambda key: sampling.uninteresting(key, known(RANKED), jnp.full((64,), user), 40))(jax.random.key(user))
    assert_uniform(drawn, set(range(ITEMS)) - MET[user] - set(RANKED[user].tolist()))


@pytest.mark.parametrize("temperature", [0.5, 3.0, 1e4])
def test_positions_are_drawn_by_rank_without_replacement(temperature):
    """The first of a sequence of draws without replacement has p ~ exp(-position / T); all draws are rising and differ."""
    depth, rows = 6, 20000
    one = np.asarray(sampling.top_positions(jax.random.key(0), rows, depth, 1, temperature))[:, 0]
    p = np.exp(-np.arange(depth) / temperature)
    expected = rows * p / p.sum()
    enough = expected > 5
    counts = np.bincount(one, minlength=depth)
    assert chisquare(counts[enough], expected[enough] * counts[enough].sum() / expected[enough].sum()).pvalue > 1e-3
    several = np.asarray(sampling.top_positions(jax.random.key(1), 50, depth, 4, temperature))
    assert np.all(np.diff(several, axis=1) > 0) and several.min() >= 0 and several.max() < depth
    assert sampling.top_positions(jax.random.key(2), 3, depth, depth, temperature).tolist() == [list(range(depth))] * 3


def test_pairs_without_replacement_have_the_probabilities_of_successive_draws():
    p, rows = np.array([0.5, 0.3, 0.2]), 30000
    drawn = np.asarray(sampling.without_replacement(jax.random.key(0), jnp.log(jnp.tile(p, (rows, 1))), 2))
    counts = {(a, b): int(((drawn[:, 0] == a) & (drawn[:, 1] == b)).sum()) for a in range(3) for b in range(3) if a != b}
    expected = {(a, b): rows * p[a] * p[b] / (1 - p[a]) for a, b in counts}
    assert sum(counts.values()) == rows
    assert chisquare(list(counts.values()), list(expected.values())).pvalue > 1e-3


def test_interesting_items_are_in_the_teachers_order():
    rng = np.random.default_rng(2)
    ranked = np.array([rng.permutation(ITEMS)[:7] for _ in MET], np.int32)
    user = jnp.array([3, 3, 0, 6])
    found = np.asarray(jax.jit(lambda key: sampling.interesting(key, known(ranked), user, 4, 2.0))(jax.random.key(3)))
    for row, own in zip(found.tolist(), np.asarray(user), strict=True):
        places = [ranked[own].tolist().index(item) for item in row]
        assert places == sorted(set(places))


def test_users_who_are_not_interested():
    users = len(MET)
    best = np.tile(np.array([[0]], np.int32), (ITEMS, 1))
    call = jax.jit(lambda key, item: sampling.uninterested(key, known(RANKED, best), item, 30))
    for item in (6, 9, 2):
        fit = {u for u in range(users) if item not in MET[u]} - {0}
        drawn = np.asarray(call(jax.random.key(item), jnp.full((200,), item)))
        assert fit <= set(drawn.ravel().tolist())
        if 2 * len(fit) > users:  # few of the rows have too few draws that qualify
            assert np.isin(drawn, list(fit)).mean() > 0.95


def test_whether_a_list_holds_a_number():
    user, value = (a.ravel() for a in np.mgrid[: len(MET), :ITEMS])
    expected = [v in MET[u] for u, v in zip(user, value, strict=True)]
    for call in (sampling.contains, jax.jit(sampling.contains)):
        np.testing.assert_array_equal(call(lists(), jnp.asarray(user), jnp.asarray(value)), expected)
    empty = Lists(start=jnp.zeros(3, jnp.int32), values=jnp.zeros(0, jnp.int32), halvings=0)
    assert not np.any(sampling.contains(empty, jnp.array([0, 1]), jnp.array([0, 0])))


@pytest.mark.parametrize("ids", [[3, 1, 3, 3, 0, 1], [5], [2, 2, 2], [4, 3, 2]])
def test_the_first_of_each_value(ids):
    expected = [ids.index(i) == place for place, i in enumerate(ids)]
    assert jax.jit(sampling.first_occurrence)(jnp.array(ids)).tolist() == expected


@pytest.mark.parametrize("groups", [1, 2, 3, 5])
def test_popularity_groups_where_a_product_would_overflow(groups):
    popularity = np.random.default_rng(3).integers(0, 50_000_000, 60).astype(np.int32)
    assert groups == 1 or int(popularity.sum()) * groups > 2**31 - 1 > int(popularity.sum())
    found = np.asarray(jax.jit(sampling.popularity_groups, static_argnums=1)(jnp.asarray(popularity), groups))
    assert found.tolist() == reference.popularity_groups(popularity, groups).tolist()


@pytest.mark.parametrize("temperature", [1.0, 20.0])
def test_ranked_pairs_differ_and_fall_off_with_rank(temperature):
    count, pairs = jnp.array([30, 30, 7, 2, 1]), 6000
    better, worse = (np.asarray(a) for a in sampling.ranked_pairs(jax.random.key(0), count, pairs, temperature))
    assert better.shape == worse.shape == (5, pairs) and better.min() >= 0
    assert np.all(worse < np.asarray(count)[:, None]) and np.all(better <= worse) and (better[:3] == worse[:3]).mean() < 0.01
    assert (better[3] == worse[3]).mean() < 0.02 and np.all(better[4] == 0)
    p = np.exp(-np.arange(30) / temperature)
    p /= p.sum()
    pair = p[:, None] * p[None, :] * (1 - np.eye(30))
    pair /= pair.sum()
    marginal = pair.sum(0)  # of either of the two
    counts = np.bincount(np.concatenate([better[0], worse[0]]), minlength=30)
    enough = marginal * 2 * pairs > 10
    gap = np.abs(counts[enough] / (2 * pairs) - marginal[enough])
    assert np.all(gap < 5 * np.sqrt(marginal[enough] / (2 * pairs)))
