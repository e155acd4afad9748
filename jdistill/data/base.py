"""The data contract: `Split`, `Preprocess` and `Dataset`."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jdistill.data.augment import Augment
from jdistill.errors import UsageError

Split = dict[str, np.ndarray]
"""Arrays of one length. `inputs` [N, ...] (uint8 images [N, H, W, C] or float32 [N, D]), `label` [N] int32 and `index` [N]
int32: the row in the publisher's training (or test) file. Sets published as one file have one numbering for all splits.

Interactions: in training `inputs` [N, 2] int32 (user, item) and `label` [N] float32 (the rating or count); in the others
`inputs` [M, 1 + L] int32 (user, then the last L items met before, the oldest first, filled on the left with the number of
items) and `label` [M, R] int32 (the items that followed, filled with -1), and `candidates` [M, C] int32 where only those
and the first relevant item are ranked.
Lists (queries): `inputs` [Q, K, D] float32, `grades` [Q, K] int32 (-1 where a list is filled up), `label` [Q] int32 the
place of the best."""


@dataclasses.dataclass(frozen=True)
class Schema:
    """What the columns and numbers of the inputs mean.

    Attributes:
      users, items: of interactions; 0 for other data.
      history: L, the number of items met before that a request brings along.
      fields: of tables, for each column the number of its categories, 0 for a number; () where all are numbers.
    """

    users: int = 0
    items: int = 0
    history: int = 0
    fields: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class Side:
    """What is known beside the rows, for networks that read it: hashed by identity.

    Attributes:
      edges: [N, 2] int32, the training pairs (user, item), each once.
      user_features, item_features: [users, F], [items, F] float32, or None.
      user_names, item_names: the publisher's ids, [users] and [items], by which two catalogues are compared, or None.
    """

    edges: np.ndarray
    user_features: np.ndarray | None = None
    item_features: np.ndarray | None = None
    user_names: np.ndarray | None = None
    item_names: np.ndarray | None = None


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


@dataclasses.dataclass(frozen=True)
class Requests:
    """Rows [B, 1 + L] int32 (user, history) as requests: `user` [B] and, where L = `history` > 0, `history` [B, L]."""

    history: int = 0

    def __call__(self, inputs: Array) -> dict[str, Array]:
        user = inputs[:, 0]
        return {"user": user, "history": inputs[:, 1:]} if self.history else {"user": user}


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
      schema: what the columns mean.
      privileged: columns that only a teacher may read.
      side: what is known beside the rows, or None.
      tables: arrays that training batches are drawn with: of interactions `sequence` [users, L + 1] int32, the last items
        of each user in training, the oldest first, filled on the left with the number of items.
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
    schema: Schema = Schema()
    privileged: tuple[int, ...] = ()
    side: Side | None = None
    tables: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)

    @property
    def preprocess(self) -> Any:
        """The function from raw to normalised inputs; of interactions, from rows to requests for the whole catalogue."""
        if self.schema.items:
            return Requests(self.schema.history)
        return Preprocess(self.mean, self.std, self.scale)

    @property
    def input_shape(self) -> list[int]:
        """The shape of one raw input, as a deployed network is given it."""
        return list(self.test["inputs"].shape[1:])

    @property
    def example(self) -> Any:
        """Shapes and dtypes of two such inputs, preprocessed."""
        raw = jax.ShapeDtypeStruct((2, *self.input_shape), self.test["inputs"].dtype)
        return jax.eval_shape(self.preprocess, raw)
