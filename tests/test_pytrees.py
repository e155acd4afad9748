"""Frozen dataclasses as pytrees, their checks, and what tells programs apart."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdistill import options as _registering  # noqa: F401 - fills the registries
from jdistill.errors import UsageError
from jdistill.pytrees import (
    as_leaves,
    pytree,
    require_fraction,
    require_nonnegative,
    require_one_of,
    require_positive,
    static,
    structure_key,
)
from jdistill.registry import build, options


@pytree
class Thing:
    name: str = static(default="a")
    size: float = 1.0
    parts: tuple[float, ...] = ()

    def __post_init__(self):
        require_positive(size=self.size)


def test_numbers_are_leaves_and_static_fields_are_structure():
    thing = Thing(name="b", size=2.0, parts=(3.0, 4))
    assert jax.tree.leaves(thing) == [2.0, 3.0, 4]
    assert jax.tree.map(lambda x: x * 10, thing) == Thing(name="b", size=20.0, parts=(30.0, 40))
    assert jax.tree.structure(thing) != jax.tree.structure(Thing(name="c", size=2.0, parts=(3.0, 4)))


def test_they_are_frozen_and_keyword_only():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Thing().size = 2.0
    with pytest.raises(TypeError):
        Thing("a")


def test_checks_let_tracers_and_placeholders_through():
    assert float(jax.jit(lambda thing: thing.size - 5)(Thing(size=1.0))) == -4
    assert float(jax.grad(lambda thing: thing.size**2)(Thing(size=3.0)).size) == 6
    assert jax.tree.map(lambda x: -x, as_leaves(Thing())).size == -1  # arrays are not looked into
    stacked = jax.tree.map(lambda *x: jnp.stack(x), as_leaves(Thing()), as_leaves(Thing(size=5.0)))
    np.testing.assert_array_equal(jax.vmap(lambda thing: 2 * thing.size)(stacked), [2, 10])


@pytest.mark.parametrize(
    ("check", "good", "bad"),
    [
        (require_positive, (1, 0.5, np.float32(2), 1e-300), (0, 0.0, -1, math.nan, math.inf, -math.inf, True, np.float32(-1))),
        (require_nonnegative, (0, 0.0, 3), (-1e-9, -1, math.nan, math.inf, False)),
        (require_fraction, (0, 0.0, 0.999), (1, 1.0, -0.1, 2, math.nan, True)),
    ],
)
def test_requirements(check, good, bad):
    check(**{f"field{i}": value for i, value in enumerate(good)})
    check(field=None, other="text")  # types are Hydra's to check
    for value in bad:
        with pytest.raises(UsageError, match=r"^some_field must be .*, got ") as error:
            check(fine=good[0], some_field=value)
        assert repr(value) in str(error.value)


def test_require_one_of_names_the_nearest():
    require_one_of(("layer", "global"), scope="layer")
    with pytest.raises(UsageError, match=r"^scope must be one of layer, global, got 'globl'; did you mean 'global'"):
        require_one_of(iter(("layer", "global")), scope="globl")


def test_as_leaves_makes_every_value_one_type():
    traces = []

    @jax.jit
    def double(thing):
        traces.append(1)
        return thing.size * 2

    for size in (1, 2.0, np.float32(3), jnp.float32(4), np.float64(5)):
        leaf = as_leaves(Thing(size=size)).size
        assert leaf.dtype == jnp.float32 and not leaf.weak_type
        assert float(double(as_leaves(Thing(size=size)))) == 2 * float(size)
    assert len(traces) == 1


def test_structure_key():
    def key(**fields):
        return structure_key(as_leaves(Thing(**fields)))

    assert key(size=1.0) == key(size=7) and hash(key(size=1.0)) == hash(key(size=7))
    assert len({key(), key(name="b"), key(parts=(1.0,)), key(parts=(1.0, 2.0))}) == 4
    assert structure_key(jnp.zeros(3)) != structure_key(jnp.zeros(4))
    assert structure_key(jnp.zeros(3)) != structure_key(jnp.zeros(3, jnp.int32))
    assert structure_key(jax.ShapeDtypeStruct((3,), jnp.float32)) == structure_key(jnp.ones(3))


def test_structures_of_different_classes_differ():
    @pytree
    class One:
        number: float = 1.0

    @pytree
    class Other:
        number: float = 1.0

    assert jax.tree.structure(One()) != jax.tree.structure(Other())
    assert jax.tree.structure(One()) == jax.tree.structure(One(number=2.0))
    structures = [jax.tree.structure(build("loss", {"name": name})) for name in options("loss")]
    assert all(a != b for i, a in enumerate(structures) for b in structures[:i])
