"""The data contract: `Split`, `Preprocess` and `Dataset`."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jax import Array

from jdistill.data.augment import Augment
from jdistill.errors import UsageError

Split = dict[str, np.ndarray]
"""`inputs` [N, ...] (uint8 images [N, H, W, C] or float32 [N, D]), `label` [N] int32 and `index` [N] int32: the row in
the publisher's training (or test) file. Sets published as one file have one numbering for all their splits."""


@dataclasses.dataclass(frozen=True)
class Preprocess:
    """`(inputs / scale - mean) / std` in float32; equal constants make equal, equally hashed objects.

    Attributes:
      mean, std: one value per channel or feature (the last axis), or one for all; after the division by `scale`.
      scale: the largest raw value, such as 255.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    scale: float = 1.0

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std) or min(self.std, default=0) <= 0 or self.scale <= 0:
            raise UsageError(f"preprocessing needs as many means as positive stds and a positive scale, got {self}")

    def __call__(self, inputs: Array) -> Array:
        """Raw inputs [..., C] of any dtype to normalised float32 of the same shape."""
        raw = jnp.asarray(inputs, jnp.float32)
        return (raw / self.scale - jnp.array(self.mean, jnp.float32)) / jnp.array(self.std, jnp.float32)


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """A data set in memory.

    Training inputs are `preprocess(augment(key, raw))`, evaluation inputs `preprocess(raw)`. Both functions are
    hashable values: data sets prepared alike share compiled programs.

    Attributes:
      name: the option's name.
      train, validation, test: see `Split`; a validation split of no rows keeps its shapes.
      classes: the number of classes; labels are 0 .. classes - 1.
      mean, std, scale: see `Preprocess`.
      augment: on raw inputs, or None for none.
      checksums: file name -> SHA-256 of the bytes read, or `"generated"`.
    """

    name: str
    train: Split
    validation: Split
    test: Split
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    scale: float
    augment: Augment | None
    checksums: dict[str, str]

    @property
    def preprocess(self) -> Preprocess:
        """The function from raw to normalised inputs."""
        return Preprocess(self.mean, self.std, self.scale)
