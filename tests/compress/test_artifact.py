"""The deployed file: exact, as small as it says, and never silently wrong."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jdistill.compress import IntegerWeights, MagnitudePrune, Quantized, Stored, apply_all, finished
from jdistill.compress.artifact import count_nonzero, read_artifact, restore_structure, write_artifact
from jdistill.errors import RunError
from jdistill.models import MLP
from jdistill.modules import from_linen, from_nnx
from tests.tiny import assert_same_bits

PARAMS = jax.tree.map(np.asarray, from_linen(MLP(outputs=10, widths=(40, 30))).init(jax.random.key(0), jnp.zeros((1, 64)))[0])
PARAMS["fc1"]["bias"] = np.zeros(40, np.float32)  # all zero: stored by its mask alone
STATE = {"batch_stats": {"norm": {"mean": np.arange(3.0, dtype=np.float32), "count": np.float32(4)}}}
PRUNE, INT8 = MagnitudePrune(sparsity=0.5), IntegerWeights()


def stored(*compressors):
    return finished(compressors, Stored(PARAMS), jax.random.key(1))


def effective(*compressors):
    found = stored(*compressors)
    return jax.tree.map(np.asarray, apply_all(compressors, found.params, found.states))


def write(path, *compressors, about=None):
    return write_artifact(path, compressors, stored(*compressors), STATE, about or {})


CASES = {"dense": (), "pruned": (PRUNE,), "int8": (INT8,), "pruned int8": (PRUNE, INT8)}


@pytest.mark.parametrize("compressors", CASES.values(), ids=CASES)
def test_what_is_read_is_what_was_effective(compressors, tmp_path):
    path, about = tmp_path / "a.safetensors", {"student": {"name": "mlp"}, "preprocess": {"mean": [0.5]}}
    assert write(path, *compressors, about=about) == os.stat(path).st_size
    params, state, found = read_artifact(path)
    assert_same_bits(state, STATE)
    wanted = effective(*compressors)
    if INT8 in compressors:  # the scale is taken again from the rounded weights: its last bit may differ
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=3e-7, atol=0), params, wanted)
    else:
        assert_same_bits(params, jax.tree.map(lambda leaf: leaf + 0, wanted))  # -0.0 is stored as 0.0
    assert count_nonzero(params) == count_nonzero(wanted)
    assert {k: found[k] for k in about} == about
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_integers_in_the_file_are_the_compressors(tmp_path):
    from safetensors.numpy import load_file

    write_artifact(tmp_path / "a", (INT8,), stored(INT8), {}, {})
    found, expected = load_file(tmp_path / "a"), INT8.finalize("fc2/kernel", effective(INT8)["fc2"]["kernel"], {})
    np.testing.assert_array_equal(found["params/fc2/kernel"], expected.values)
    np.testing.assert_allclose(found["params/fc2/kernel#scale"], expected.scale, rtol=3e-7)
    expected = expected._replace(scale=found["params/fc2/kernel#scale"])
    params = read_artifact(tmp_path / "a")[0]
    np.testing.assert_array_equal(params["fc2"]["kernel"], expected.values.astype(np.float32) * expected.scale)


def test_sizes(tmp_path):
    size = {name: write(tmp_path / "a", *compressors) for name, compressors in CASES.items()}
    weights = sum(PARAMS[layer]["kernel"].size for layer in PARAMS)
    header = size["dense"] - 4 * weights
    assert 0 < header < 2500
    assert (
        abs(size["dense"] - size["pruned"] - (2 * weights - weights / 8)) < 1000
    )  # half the floats gone, a bit each for which
    assert abs(size["dense"] - size["int8"] - 3 * weights) < 1000
    assert size["pruned int8"] < size["int8"] < size["pruned"] < size["dense"]


def test_the_same_network_gives_the_same_bytes(tmp_path):
    for name in "ab":
        write(tmp_path / name, PRUNE, INT8)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_scalars_and_other_types_keep_shape_and_type(tmp_path):
    params = {"s": np.float32(2), "z": np.float32(0), "i": np.arange(3, dtype=np.int32), "b": np.zeros((0, 2), np.float32)}
    write_artifact(tmp_path / "a", (), Stored(params), {}, {})
    assert_same_bits(read_artifact(tmp_path / "a")[0], params)


def test_an_nnx_network_comes_back(tmp_path):
    model = from_nnx(build_nnx)
    params, state = model.init(jax.random.key(0), jnp.zeros((1, 6)))
    write_artifact(tmp_path / "a", (), Stored(params), state, {})
    read = read_artifact(tmp_path / "a")
    again = [restore_structure(saved, like) for saved, like in zip(read[:2], (params, state), strict=True)]
    assert_same_bits(again, [params, state])
    inputs = np.ones((2, 6), np.float32)
    assert_same_bits(model.apply(*again, inputs)[0].logits, model.apply(params, state, inputs)[0].logits)


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(6, 6, rngs=rngs) for _ in range(2)])
        self.norm = nnx.BatchNorm(6, rngs=rngs)

    def __call__(self, inputs, rngs=None):
        for layer in self.layers:
            inputs = layer(inputs)
        return self.norm(inputs), {}


def build_nnx(rngs):
    return NnxNet(rngs)


@pytest.mark.parametrize("keep", [0.0, 0.05, 0.5, 0.999])
@pytest.mark.parametrize("compressors", CASES.values(), ids=CASES)
def test_a_truncated_file_is_an_error_of_one_line(compressors, keep, tmp_path):
    path = tmp_path / "a.safetensors"
    os.truncate(path, int(write(path, *compressors) * keep))
    with pytest.raises(RunError, match=r"^artifact .*a\.safetensors cannot be read \(") as error:
        read_artifact(path)
    assert "\n" not in str(error.value)


def test_one_altered_byte_anywhere_is_an_error(tmp_path):
    path = tmp_path / "a.safetensors"
    write(path, PRUNE, INT8, about={"preprocess": {"mean": [0.5]}})
    content = path.read_bytes()
    stop = 8 + int.from_bytes(content[:8], "little")
    mask = stop + tensor_offset(content[8:stop], "params/fc2/kernel#mask")
    mean = content.index(b"0.5")
    for place in (0, 9, mean + 2, stop - 1, mask, *range(stop, len(content), 97), len(content) - 1):
        path.write_bytes(content[:place] + bytes([content[place] ^ 0x01]) + content[place + 1 :])
        with pytest.raises(RunError, match="cannot be read") as error:
            read_artifact(path)
        assert "\n" not in str(error.value)


def tensor_offset(header, name):
    import json

    return json.loads(header)[name]["data_offsets"][0]


def test_foreign_and_missing_files_are_errors(tmp_path):
    from safetensors.numpy import save_file

    save_file({"x": np.zeros(3, np.float32)}, tmp_path / "foreign")
    (tmp_path / "text").write_text("not a network")
    for name in ("foreign", "text", "missing"):
        with pytest.raises(RunError, match=f"artifact .*{name} cannot be read"):
            read_artifact(tmp_path / name)


RANGES = [((-7, 7), 4), ((0, 1), 1), ((-1, 1), 2), ((-127, 127), 8), ((5, 5), 1), ((-3, 4), 3)]


@pytest.mark.parametrize(("values", "bits"), RANGES)
def test_integers_take_as_many_bits_as_their_range_needs(values, bits, tmp_path):
    """What a form holds, such as codes, and quantized leaves."""
    low, high = values
    integers = np.random.default_rng(0).integers(low, high + 1, size=(61, 33)).astype(np.int8)
    integers[0, :2] = values
    kernel = 0.1 * integers.astype(np.float32)

    class Rounded(IntegerWeights):
        def finalize(self, name, value, state):
            return Quantized(integers, np.full((1, 1), 0.1, np.float16), np.full((1, 1), 0.25, np.float32))

    size = write_artifact(tmp_path / "a", (Rounded(),), Stored({"kernel": kernel}, ({},)), {}, {})
    header = 8 + int.from_bytes((tmp_path / "a").read_bytes()[:8], "little")
    zeros = np.mean(integers == 0)
    full = integers.size * bits / 8
    assert size - header <= min(full, (1 + (1 - zeros) * bits) * integers.size / 8) + 8 + 6
    found = read_artifact(tmp_path / "a")[0]["kernel"]
    np.testing.assert_array_equal(found, integers.astype(np.float32) * np.float32(np.float16(0.1)) + np.float32(0.25))
