"""Bits by layer against a loop in NumPy, and what the file holds of them."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jdistill.options  # noqa: F401 (registers every option)
from jdistill.compress import Stored, apply_all, enter, finished
from jdistill.compress.artifact import read_artifact, write_artifact
from jdistill.compress.sensitivity import MixedPrecision, allocate
from jdistill.errors import UsageError
from jdistill.pytrees import as_leaves
from jdistill.registry import build
from tests.marks import slow_but
from tests.reference import quantization as reference

RANDOM = np.random.default_rng(2)
PARAMS = {
    "a": {"kernel": RANDOM.normal(size=(40, 6)).astype(np.float32), "bias": RANDOM.normal(size=6).astype(np.float32)},
    "b": {"kernel": RANDOM.choice([-1.0, 0, 1], size=(20, 6)).astype(np.float32)},  # two bits are enough
    "c": {"kernel": RANDOM.standard_t(2, size=(3, 3, 4, 5)).astype(np.float32)},  # heavy tails: few bits are bad
    "d": {"kernel": RANDOM.uniform(-1, 1, size=(10, 4)).astype(np.float32)},
}
SIZES = {f"{name}/kernel": leaves["kernel"].size for name, leaves in PARAMS.items()}
KEY = jax.random.key(0)


def bits(params=PARAMS, **options):
    own = MixedPrecision(**options)
    return {name: int(value) for name, value in jax.jit(MixedPrecision.init)(as_leaves(own), KEY, params).items()}


def noise(w, **options):
    """|w - rounded w|^2 / |w|^2 with 8, 4 and 2 bits."""
    found = []
    for width in (8, 4, 2):
        q, scale = reference.symmetric(w, width, **options)
        found.append(float(np.sum((w - q * scale) ** 2) / np.sum(w.astype(float) ** 2)))
    return found


@pytest.mark.parametrize("mean_bits", [2, 2.5, 3.3, 4, 5, 6.5, 8])
def test_bits_are_the_references(mean_bits):
    found = bits(mean_bits=mean_bits)
    expected = reference.allocate(np.array([noise(PARAMS[n]["kernel"]) for n in "abcd"]), list(SIZES.values()), mean_bits)
    assert list(found.values()) == expected and list(found) == list(SIZES)
    assert sum(SIZES[name] * width for name, width in found.items()) <= mean_bits * sum(SIZES.values()) + 1e-4


def test_sensitive_layers_keep_their_bits():
    found = bits(mean_bits=4.5)
    assert found["b/kernel"] == 2 and found["c/kernel"] == max(found.values())
    assert set(bits(mean_bits=8).values()) == {8} and set(bits(mean_bits=2).values()) == {2}


def test_the_greedy_choice_is_close_to_the_best():
    """Of all choices within the bound, none has less than half its noise."""
    table, sizes = np.array([noise(PARAMS[n]["kernel"]) for n in "abcd"]), np.array(list(SIZES.values()))
    widths = (8, 4, 2)
    for mean_bits in (3, 4, 5, 6):
        level = [widths.index(int(width)) for width in allocate(jnp.array(table), jnp.array(sizes, float), float(mean_bits))]
        best = min(
            sum(table[i, at] for i, at in enumerate(choice))
            for choice in itertools.product(range(3), repeat=4)
            if sum(n * widths[at] for n, at in zip(sizes, choice, strict=True)) <= mean_bits * sizes.sum()
        )
        assert sum(table[i, at] for i, at in enumerate(level)) <= 2 * best + 1e-9


def test_vmap_is_a_loop():
    members = [PARAMS, jax.tree.map(lambda leaf: np.sign(leaf) * leaf**2, PARAMS)]
    own = MixedPrecision(mean_bits=4.5)
    together = jax.vmap(own.init, in_axes=(None, 0))(KEY, jax.tree.map(lambda *leaves: np.stack(leaves), *members))
    for i, params in enumerate(members):
        assert {name: int(value[i]) for name, value in together.items()} == bits(params, mean_bits=4.5)


@pytest.mark.parametrize("granularity", slow_but(["group"], ("channel", "tensor", "group")))
def test_values_gradients_and_the_file(granularity, tmp_path):
    from safetensors.numpy import load_file

    own = MixedPrecision(mean_bits=4.5, granularity=granularity, group_size=16)
    entered = enter((own,), Stored(PARAMS), KEY)
    widths = {name: int(value) for name, value in entered.states[0].items()}
    effective = jax.jit(own.constrain)(PARAMS, entered.states[0])
    for name in "abcd":
        q, scale = reference.symmetric(PARAMS[name]["kernel"], widths[f"{name}/kernel"], granularity, 16)
        steps = np.abs(np.asarray(effective[name]["kernel"]) / scale - q)  # none but ties may go the other way
        assert np.mean(steps > 1e-3) < 0.02 and steps.max() < 1.001
    grads = jax.grad(lambda p: sum(leaf.sum() for leaf in jax.tree.leaves(own.constrain(p, entered.states[0]))))(PARAMS)
    jax.tree.map(lambda grad: np.testing.assert_array_equal(grad, 1), grads)
    stored = finished((own,), entered, KEY)
    write_artifact(tmp_path / "a", (own,), stored, {}, {})
    wanted = apply_all((own,), stored.params, stored.states)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), read_artifact(tmp_path / "a")[0], wanted)
    tensors = load_file(tmp_path / "a")
    integers = sum(a.nbytes for name, a in tensors.items() if "kernel" in name and not name.endswith("#scale"))
    assert integers <= 4.5 * sum(SIZES.values()) / 8 + len(SIZES)


def test_only_some_leaves_count():
    found = bits(only="a/*,c/*", mean_bits=6)
    assert set(found) == {"a/kernel", "c/kernel"}
    assert 6 * (SIZES["a/kernel"] + SIZES["c/kernel"]) >= sum(SIZES[name] * width for name, width in found.items())


def test_a_leaf_without_bits_is_left_alone():
    own = MixedPrecision()
    assert own.constrain(PARAMS, {})["a"]["kernel"] is PARAMS["a"]["kernel"]
    assert own.finalize("a/kernel", PARAMS["a"]["kernel"], {}) is PARAMS["a"]["kernel"]


def test_options():
    assert build("compression", {"name": "mixed_precision"}).steps() == (MixedPrecision(mean_bits=4.0, recover_epochs=5),)
    for value, found in ((1.5, "1.5"), (9.0, "9.0")):
        with pytest.raises(UsageError, match=rf"^compression\.mean_bits must be from 2 to 8, got {found}"):
            build("compression", {"name": "mixed_precision", "mean_bits": value})
    with pytest.raises(UsageError, match=r"^this network has no weights"):
        MixedPrecision().init(KEY, {"fc": {"bias": np.zeros(3, np.float32)}})
