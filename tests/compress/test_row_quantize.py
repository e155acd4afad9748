"""Row-wise integers against torch and NumPy, their gradients, and the file."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdistill.compress import Stored, finished
from jdistill.compress.artifact import write_artifact
from jdistill.compress.row_quantize import RowInt4, RowInt8, half
from jdistill.errors import UsageError
from jdistill.registry import build
from tests.reference import embeddings as reference

RANDOM = np.random.default_rng(2)
TABLES = {
    "user": RANDOM.normal(size=(37, 8)).astype(np.float32),
    "item": RANDOM.normal(size=(48, 8)).astype(np.float32),
    "fc1": {"kernel": RANDOM.normal(size=(8, 8)).astype(np.float32)},
    "bias": np.ones(48, np.float32),
}
KEY = jax.random.key(0)

# torch 2.13: torch.ops.quantized.embedding_bag_byte_prepack, .._byte_unpack, .._4bit_prepack, .._4bit_unpack of `rows()`.
BYTE = """
    217 109 155 255 225 0 153 65  0 0 0 0 0 0 0 0  0 0 0 0 0 0 0 0  255 0 103 87 205 200 110 125  87 0 130 170 255 253 127 133
    46 20 0 255 83 88 32 173"""
BYTE_UNPACKED = """
    1.7613226e-01 3.9833248e-02 9.7886533e-02 2.2408932e-01 1.8622848e-01 -9.7727790e-02 9.5362477e-02 -1.5695978e-02
    2.5e-01 2.5e-01 2.5e-01 2.5e-01 2.5e-01 2.5e-01 2.5e-01 2.5e-01 0 0 0 0 0 0 0 0
    5.0022697 4.9985456 5.0000501 4.9998164 5.0015397 5.0014663 5.0001521 5.0003710
    -8.8524894e-06 -1.9807963e-05 -3.4377153e-06 1.5992840e-06 1.2302908e-05 1.2051058e-05 -3.8154903e-06 -3.0599404e-06
    -1.0465678e+01 -1.4194431e+01 -1.7062702e+01 1.9507755e+01 -5.1593766 -4.4423089 -1.2473469e+01 7.7478433"""
NIBBLES = """
    109 249 13 73  0 0 0 0  0 0 0 0  15 0 170 33  5 168 255 135  19 240 85 162"""
NIBBLES_UNPACKED = """
    1.81182861e-01 3.10058594e-02 9.53674316e-02 2.24090576e-01 1.81182861e-01 -9.77172852e-02 9.53674316e-02 -1.19018555e-02
    0.25 0.25 0.25 0.25 0.25 0.25 0.25 0.25 0 0 0 0 0 0 0 0
    5.00226927 5 5 5 5.00151253 5.00151253 5.00015116 5.00030231
    -9.05990601e-06 -1.97887421e-05 -2.62260437e-06 1.66893005e-06 1.23977661e-05 1.23977661e-05 -4.76837158e-06 -2.62260437e-06
    -9.75 -14.625 -17.0625 19.5 -4.875 -4.875 -12.1875 7.3125"""


def rows():
    """Plain, constant, zero, far from zero, too small for a normal float16 scale, and large."""
    x = (np.random.RandomState(0).randn(6, 8) * 0.1).astype(np.float32)
    x[1], x[2], x[3] = 0.25, 0, 5 + x[3] * 0.01
    x[4] *= 1e-4
    x[5] *= 100
    return x


def numbers(text, dtype):
    return np.array(text.split(), dtype).reshape(6, -1)


def test_row_integers_are_torchs():
    packed = numbers(NIBBLES, np.uint8)
    nibbles = np.stack([packed & 15, packed >> 4], axis=-1).reshape(6, 8)
    for own, ints, values in ((RowInt8(), numbers(BYTE, np.uint8), BYTE_UNPACKED), (RowInt4(), nibbles, NIBBLES_UNPACKED)):
        stored = own.finalize("item", rows(), {})
        wanted = numbers(values, np.float32)
        np.testing.assert_array_equal(stored.values, ints)
        found = jax.jit(own.constrain)({"item": rows()}, {})["item"]
        again = stored.values.astype(np.float32) * stored.scale.astype(np.float32) + stored.offset.astype(np.float32)
        for given in (found, again):  # to 2.4e-7 of the row's largest weight
            assert np.all(np.abs(given - wanted) <= 2.4e-7 * np.abs(wanted).max(1, keepdims=True))
        assert stored.scale.shape == stored.offset.shape == (6, 1)
        assert stored.scale.dtype == stored.offset.dtype == (np.float32 if own.option == "row_int8" else np.float16)


@pytest.mark.parametrize(("own", "named"), [(RowInt8(), "row_int8"), (RowInt4(), "row_int4")])
def test_row_integers_are_numpys(own, named):
    table = (RANDOM.normal(size=(200, 16)) * 10.0 ** RANDOM.integers(-3, 2, size=(200, 1))).astype(np.float32)
    q, scale, offset = getattr(reference, named)(table)
    found = jax.jit(own.integers)(table)
    assert np.mean(found[0] != q) < 2e-3 and np.abs(found[0] - q).max() <= 1  # a tie may go either way
    np.testing.assert_allclose(np.ravel(found[1]), scale, rtol=2e-7)
    np.testing.assert_array_equal(np.ravel(found[2]), offset)


def test_float16_is_numpys():
    x = np.concatenate([RANDOM.normal(size=3000) * 10.0 ** RANDOM.integers(-9, 5, size=3000), [0, 2.0**-14, 2.0**-24, 3e-8]])
    x = x.astype(np.float32)
    np.testing.assert_array_equal(jax.jit(half)(x), x.astype(np.float16).astype(np.float32))


@pytest.mark.parametrize("own", [RowInt8(), RowInt4()])
def test_rounding_is_straight_through_and_rounds_once(own):
    goal = RANDOM.normal(size=(48, 8)).astype(np.float32)
    grads = jax.grad(lambda p: jnp.sum(own.constrain(p, {})["item"] * goal))(TABLES)
    np.testing.assert_array_equal(grads["item"], goal)
    once = own.constrain(TABLES, own.init(KEY, TABLES))
    assert np.all(once["fc1"]["kernel"] == TABLES["fc1"]["kernel"]) and np.any(once["item"] != TABLES["item"])
    np.testing.assert_allclose(own.constrain(once, {})["item"], once["item"], atol=1e-6)
    assert own.finalize("fc1/kernel", TABLES["fc1"]["kernel"], {}) is TABLES["fc1"]["kernel"]


@pytest.mark.parametrize(("own", "each"), [(RowInt8(), 64 + 8), (RowInt4(), 32 + 4)])
def test_the_file_holds_the_bytes_of_fbgemm(own, each, tmp_path):
    table = RANDOM.normal(size=(500, 64)).astype(np.float32)
    size = write_artifact(tmp_path / "a", (own,), finished((own,), Stored({"item": jnp.asarray(table)}), KEY), {}, {})
    assert 0 < size - 500 * each < 900  # names, types, checksum


@pytest.mark.parametrize("own", [RowInt8(), RowInt4()])
def test_what_cannot_be_done_is_one_line(own):
    with pytest.raises(UsageError, match=r"found no table user, item, met, table or embedding \(matrices: fc1/kernel\); name"):
        own.init(KEY, {"fc1": TABLES["fc1"], "bias": TABLES["bias"]})
    with pytest.raises(UsageError, match=r"only='nobody' names no table \(matrices: .*\)$"):
        type(own)(only="nobody").init(KEY, TABLES)
    with pytest.raises(UsageError, match=r"^compression\.recover_epochs must be"):
        build("compression", {"name": own.option, "recover_epochs": -1})
