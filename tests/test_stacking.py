"""Trees with a leading axis of members: what is put in comes out, bit for bit."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdistill import stacking
from jdistill.pytrees import as_leaves
from tests import tiny
from tests.tiny import assert_same_bits


def tree(seed):
    random = np.random.default_rng(seed)
    return {
        "float": jnp.asarray(random.normal(size=(3, 2)), jnp.float32),
        "half": jnp.asarray(random.normal(size=4), jnp.bfloat16),
        "int": jnp.asarray(seed, jnp.int32),
        "bool": jnp.asarray([seed % 2 == 0, True]),
        "key": jax.random.key(seed),
        "pair": (np.float32(seed / 3), None, jnp.zeros((0, 5))),
    }


def plain(tree):
    """Key data in place of keys."""
    is_key = lambda leaf: jnp.issubdtype(getattr(leaf, "dtype", np.dtype(float)), jax.dtypes.prng_key)  # noqa: E731
    return jax.tree.map(lambda leaf: jax.random.key_data(leaf) if is_key(leaf) else leaf, tree)


TREES = [tree(seed) for seed in range(5)]


def test_a_stack_holds_its_members():
    stacked = stacking.stack(TREES)
    for i, one in enumerate(TREES):
        assert_same_bits(plain(stacking.member(stacked, i)), plain(one))
    assert all(leaf.shape[0] == 5 for leaf in jax.tree.leaves(stacked))
    assert stacked["float"].shape == (5, 3, 2) and stacked["float"].dtype == jnp.float32
    assert stacked["half"].dtype == jnp.bfloat16 and stacked["bool"].dtype == jnp.bool_


def test_stacked_keys_draw_what_the_members_draw():
    keys = stacking.stack([one["key"] for one in TREES])
    drawn = jax.vmap(lambda key: jax.random.normal(key, (3,)))(keys)
    assert_same_bits(list(drawn), [jax.random.normal(one["key"], (3,)) for one in TREES])


def test_stacking_keeps_float64():
    with jax.enable_x64(True):
        stacked = stacking.stack([{"a": jnp.asarray(1 / 3, jnp.float64)}, {"a": jnp.asarray(2 / 3, jnp.float64)}])
        assert stacked["a"].dtype == jnp.float64 and stacked["a"].tolist() == [1 / 3, 2 / 3]


def test_one_member_has_an_axis_too():
    assert stacking.stack(TREES[:1])["float"].shape == (1, 3, 2)


@pytest.mark.parametrize("rows", [[0], [4, 1], [2, 2, 0], np.array([3, 1], np.int64), []])
def test_some_members_in_any_order(rows):
    found = stacking.members(stacking.stack(TREES), rows)
    assert all(leaf.shape[0] == len(rows) for leaf in jax.tree.leaves(found))
    for place, row in enumerate(rows):
        assert_same_bits(plain(stacking.member(found, place)), plain(TREES[row]))


def test_shapes_of_a_wider_population():
    one = jax.eval_shape(lambda: TREES[0])
    wide = stacking.widened(one, 7)
    expected = stacking.members(stacking.stack(TREES), [0] * 7)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), wide) == jax.tree.map(lambda a: (a.shape, a.dtype), expected)


def test_where_takes_whole_members():
    def numbers(seeds):
        return stacking.stack([{k: v for k, v in tree(seed).items() if k not in ("key",)} for seed in seeds])

    old, new, mask = numbers(range(4)), numbers(range(10, 14)), np.array([True, False, False, True])
    found = stacking.where(mask, new, old)
    for i, chosen in enumerate(mask):
        assert_same_bits(stacking.member(found, i), stacking.member(new if chosen else old, i))


def test_a_method_and_its_numbers():
    """What members differ in: temperatures, rates."""
    made = [tuple(as_leaves(s) for s in tiny.method(distil=tiny.kd(temperature=t), lr=t / 100).stages) for t in (1, 2.5, 4.0)]
    stacked = stacking.stack(made)
    assert np.allclose(stacked[0].optim.lr, [0.01, 0.025, 0.04]) and stacked[0].optim.kind == "adam"
    again = [stacking.member(stacked, i) for i in range(3)]
    assert jax.tree.structure(again[1]) == jax.tree.structure(made[1])
    assert [float(stage.terms[1].loss.temperature) for (stage,) in again] == [1, 2.5, 4.0]
    assert dataclasses.is_dataclass(stacked[0])


def test_trees_of_two_structures_are_refused():
    with pytest.raises(ValueError, match=r"[Mm]ismatch|structure|arity|Dict key"):
        stacking.stack([{"a": 1.0}, {"b": 1.0}])
