"""Augmentation against NumPy, its distributions, and its promises as a compiled function."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdistill.data import Augment, Preprocess
from jdistill.data.augment import random_crop, random_cutout, random_flip
from jdistill.errors import UsageError

KEY = jax.random.key(7)


def unique_pixels(batch, height, width, channels=1):
    """Images whose every value is another number above 0, so that a shift can be read off."""
    count = height * width * channels
    one = np.arange(1, count + 1, dtype=np.float32).reshape(height, width, channels)
    return np.tile(one, (batch, 1, 1, 1))


def shifts(images, cropped, padding):
    """(dy, dx) of each crop, by comparison with every crop NumPy can cut."""
    _, height, width, _ = images.shape
    padded = np.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    found = np.full((len(images), 2), -1)
    for dy in range(2 * padding + 1):
        for dx in range(2 * padding + 1):
            same = (padded[:, dy : dy + height, dx : dx + width] == cropped).all(axis=(1, 2, 3))
            found[same] = dy, dx
    return found


def test_crop_cuts_uniformly_out_of_the_zero_padded_image():
    images = unique_pixels(5000, 6, 5, 2)
    found = shifts(images, np.asarray(random_crop(KEY, images, 2)), 2)
    assert (found >= 0).all(), "a result is no crop of the padded image"
    counts = np.bincount(found[:, 0] * 5 + found[:, 1], minlength=25)
    chi2 = ((counts - 200) ** 2 / 200).sum()
    assert chi2 < 51.2  # 24 degrees of freedom, p = 0.001


def test_crop_keeps_dtype_and_padding_0_is_identity():
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), np.uint8)
    assert random_crop(KEY, images, 4).dtype == jnp.uint8
    np.testing.assert_array_equal(random_crop(KEY, images, 0), images)


def test_flip_mirrors_half_of_the_images_left_to_right():
    images = unique_pixels(4000, 3, 4, 2)
    flipped = np.asarray(random_flip(KEY, images))
    mirrored = (flipped == images[:, :, ::-1]).all(axis=(1, 2, 3))
    untouched = (flipped == images).all(axis=(1, 2, 3))
    assert (mirrored ^ untouched).all()
    assert abs(mirrored.mean() - 0.5) < 4 * 0.5 / np.sqrt(4000)


@pytest.mark.parametrize("size", [1, 3, 4])
def test_cutout_is_one_square_with_a_uniform_centre_clipped_at_the_border(size):
    images = np.ones((6000, 6, 5, 3), np.float32)
    cut = np.asarray(random_cutout(KEY, images, size, fill=jnp.array([0.0, 7.0, -1.0])))
    mask = cut[..., 0] == 0
    assert set(np.unique(cut)) == {-1.0, 0.0, 1.0, 7.0}
    np.testing.assert_array_equal(cut[mask], np.tile([0.0, 7.0, -1.0], (mask.sum(), 1)))
    np.testing.assert_array_equal(cut[~mask], 1.0)
    expected = {}
    for y in range(6):
        for x in range(5):
            square = np.zeros((6, 5), bool)
            top, left = y - size // 2, x - size // 2
            square[max(top, 0) : top + size, max(left, 0) : left + size] = True
            expected[square.tobytes()] = expected.get(square.tobytes(), 0) + 6000 / 30
    found = {}
    for one in mask:
        found[one.tobytes()] = found.get(one.tobytes(), 0) + 1
    assert set(found) == set(expected)
    chi2 = sum((found[key] - count) ** 2 / count for key, count in expected.items())
    assert chi2 < 58.3  # at most 29 degrees of freedom, p = 0.001


def test_every_example_has_its_own_randomness_and_every_key_another():
    images = unique_pixels(64, 8, 8)
    augment = Augment(("crop", "flip"), crop_padding=2)
    once = np.asarray(augment(KEY, images))
    assert len({one.tobytes() for one in once}) > 20  # of 50 equally likely results
    np.testing.assert_array_equal(once, augment(KEY, images))
    assert (once != np.asarray(augment(jax.random.key(8), images))).any()


def test_flip_and_crop_are_drawn_independently():
    images = unique_pixels(4000, 4, 4)
    flip_only = np.asarray(Augment(("flip", "crop"), crop_padding=0)(KEY, images))
    flipped = (flip_only != images).any(axis=(1, 2, 3))
    both = np.asarray(Augment(("flip", "crop"), crop_padding=1)(KEY, images))
    before = np.where(flipped[:, None, None, None], images[:, :, ::-1], images)
    offset = shifts(before, both, 1)
    assert (offset >= 0).all()
    assert np.abs(np.corrcoef(np.column_stack([flipped, offset]).T) - np.eye(3)).max() < 4 / np.sqrt(4000)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_jit_equals_eager_and_order_is_the_order_given(dtype):
    images = np.random.default_rng(1).integers(1, 256, (16, 32, 32, 3)).astype(dtype)
    augment = Augment(("crop", "flip", "cutout"))
    eager, compiled = augment(KEY, images), jax.jit(augment)(KEY, images)
    np.testing.assert_array_equal(eager, compiled)
    assert eager.dtype == jnp.float32 and eager.shape == images.shape
    assert (np.asarray(eager) == 0).all(axis=-1).sum(axis=(1, 2)).min() >= 64  # at least a quarter of a 16 x 16 square
    stages = random_crop(jax.random.fold_in(KEY, 0), jnp.asarray(images, jnp.float32), 4)
    stages = random_flip(jax.random.fold_in(KEY, 1), stages)
    np.testing.assert_array_equal(eager, random_cutout(jax.random.fold_in(KEY, 2), stages, 16))


def test_cutout_of_the_mean_pixel_is_zero_after_normalisation():
    mean, std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    images = np.full((8, 32, 32, 3), 255, np.uint8)
    augment = Augment(("cutout",), fill=tuple(255 * m for m in mean))
    out = np.asarray(Preprocess(mean, std, 255.0)(augment(KEY, images)))
    white = (1 - np.array(mean)) / np.array(std)
    cut = np.abs(out) < 1e-6
    assert cut.any() and np.allclose(np.where(cut, white, out), white, rtol=1e-5)


def test_preprocess_against_numpy_in_float64():
    raw = np.random.default_rng(2).integers(0, 256, (4, 5, 5, 3), np.uint8)
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    expected = (raw.astype(np.float64) / 255 - np.array(mean)) / np.array(std)
    out = jax.jit(Preprocess(mean, std, 255.0))(raw)
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)


def test_equal_objects_share_one_compiled_program():
    traces = []

    def prepared(preprocess, augment, key, raw):
        traces.append(1)
        return preprocess(augment(key, raw))

    compiled = jax.jit(prepared, static_argnums=(0, 1))
    raw = np.zeros((2, 8, 8, 1), np.uint8)
    for _ in range(2):
        compiled(Preprocess((0.5,), (0.2,), 255.0), Augment(["flip"]), KEY, raw)
    assert len(traces) == 1
    assert Augment(("flip",)) != Augment(("flip", "crop")) and Augment(("crop",), 2) != Augment(("crop",), 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ops": ("crop", "flop")}, "augment must be one of crop, flip, cutout, got 'flop'; did you mean 'flip'"),
        ({"ops": "crop"}, "augment must be a list"),
        ({"ops": ("crop",), "crop_padding": -1}, "crop_padding must be at least 0, got -1"),
        ({"ops": ("cutout",), "cutout_size": 0}, "cutout_size must be positive, got 0"),
    ],
)
def test_wrong_augmentation_is_a_usage_error(arguments, message):
    with pytest.raises(UsageError, match=message):
        Augment(**arguments)


@pytest.mark.parametrize("arguments", [((0.0,), (0.0,), 1.0), ((0.0, 1.0), (1.0,), 1.0), ((0.0,), (1.0,), 0.0)])
def test_wrong_preprocessing_is_a_usage_error(arguments):
    with pytest.raises(UsageError, match="preprocessing"):
        Preprocess(*arguments)
