"""Random image augmentation as pure functions of a key: `crop`, `flip`, `cutout`.

All work on raw pixel values, before normalisation, as torchvision's transforms do (RandomCrop, RandomHorizontalFlip,
then ToTensor and Normalize). Every example of a batch has its own randomness; shapes are static.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from jdistill.errors import UsageError
from jdistill.pytrees import require_nonnegative, require_one_of, require_positive


def random_crop(key: Array, images: Array, padding: int) -> Array:
    """Pads with zeros (black) on all sides and cuts the original size out again, at an offset drawn per image.

    Args:
      key: PRNG key.
      images: [B, H, W, C], any dtype.
      padding: pixels on each side; offsets are uniform over {0, ..., 2 * padding} in both directions.

    Returns:
      [B, H, W, C], dtype of `images`. As torchvision's `RandomCrop(size, padding)`.
    """
    batch, *shape = images.shape
    offsets = jax.random.randint(key, (batch, 2), 0, 2 * padding + 1)
    padded = jnp.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)))

    def cut(image: Array, offset: Array) -> Array:
        return jax.lax.dynamic_slice(image, (offset[0], offset[1], jnp.zeros_like(offset[0])), shape)

    return jax.vmap(cut)(padded, offsets)


def random_flip(key: Array, images: Array) -> Array:
    """Mirrors each image [B, H, W, C] left to right with probability 1/2; dtype of `images`."""
    mirrored = jax.random.bernoulli(key, 0.5, (images.shape[0], 1, 1, 1))
    return jnp.where(mirrored, images[:, :, ::-1], images)


def random_cutout(key: Array, images: Array, size: int, fill: Array | float = 0.0) -> Array:
    """Overwrites one square per image; its centre is uniform over all pixels, so it may reach over the border.

    Source: DeVries and Taylor 2017, arXiv 1708.04552 (size 16 for CIFAR-10, 8 for CIFAR-100).

    Args:
      key: PRNG key.
      images: [B, H, W, C] float.
      size: side of the square in pixels.
      fill: the value written, a number or one per channel.

    Returns:
      [B, H, W, C], dtype of `images`.
    """
    batch, height, width, _ = images.shape
    row_key, column_key = jax.random.split(key)

    def inside(key: Array, length: int) -> Array:
        start = jax.random.randint(key, (batch, 1), 0, length) - size // 2
        position = jnp.arange(length)
        return (start <= position) & (position < start + size)

    square = inside(row_key, height)[:, :, None] & inside(column_key, width)[:, None, :]
    return jnp.where(square[..., None], jnp.asarray(fill, images.dtype), images)


_OPS: dict[str, Callable[["Augment", Array, Array], Array]] = {
    "crop": lambda self, key, images: random_crop(key, images, self.crop_padding),
    "flip": lambda self, key, images: random_flip(key, images),
    "cutout": lambda self, key, images: random_cutout(key, images, self.cutout_size, jnp.array(self.fill)),
}
OPS = tuple(_OPS)
"""Names of the operations."""


@dataclasses.dataclass(frozen=True)
class Augment:
    """A sequence of operations, applied in the order given; equal objects are equal and hash alike.

    Attributes:
      ops: names out of `OPS`.
      crop_padding: see `random_crop`.
      cutout_size: see `random_cutout`.
      fill: what cutout writes, in raw pixel units, one value or one per channel. The loaders give the mean pixel, which
        normalisation maps to 0: what cutout's authors write, who cut after normalising.

    Raises:
      UsageError: an unknown operation or an impossible size.
    """

    ops: tuple[str, ...]
    crop_padding: int = 4
    cutout_size: int = 16
    fill: tuple[float, ...] = (0.0,)

    def __post_init__(self) -> None:
        if isinstance(self.ops, str):
            raise UsageError(f"augment must be a list, such as [crop,flip], got {self.ops!r}")
        for op in self.ops:
            require_one_of(OPS, augment=op)
        require_nonnegative(crop_padding=self.crop_padding)
        require_positive(cutout_size=self.cutout_size)
        object.__setattr__(self, "ops", tuple(self.ops))
        object.__setattr__(self, "fill", tuple(float(value) for value in self.fill))

    def __call__(self, key: Array, inputs: Array) -> Array:
        """Augments raw images [B, H, W, C] (uint8 or float, not yet normalised); gives float32 of the same shape."""
        images = jnp.asarray(inputs, jnp.float32)
        for position, op in enumerate(self.ops):
            images = _OPS[op](self, jax.random.fold_in(key, position), images)
        return images
