"""What a learner is compared with: frozen functions `(arrays, batch) -> Outputs`, equal when built from equal parts."""

import dataclasses
from typing import Protocol

import jax
from jax import Array

from jdistill.types import Batch, Model, Outputs, PyTree


class Target(Protocol):
    """A hashable function; its arrays are an argument, so that another teacher of the same shape is no new program."""

    def __call__(self, arrays: PyTree, batch: Batch) -> Outputs: ...


@dataclasses.dataclass(frozen=True)
class Live:
    """Runs a network in evaluation mode on the batch; `arrays` is its `(params, state)`."""

    model: Model

    def __call__(self, arrays: PyTree, batch: Batch) -> Outputs:
        return self.model.apply(*arrays, batch["inputs"], train=False)[0]


@dataclasses.dataclass(frozen=True)
class Lookup:
    """Reads rows `batch["index"]` of outputs computed before; `arrays` is `Outputs` of arrays [N, ...]."""

    def __call__(self, arrays: PyTree, batch: Batch) -> Outputs:
        return jax.tree.map(lambda rows: rows[batch["index"]], arrays)


@dataclasses.dataclass(frozen=True)
class Difference:
    """Logits of `first` minus those of `second`; the features are `first`'s. `arrays` is a pair."""

    first: Target
    second: Target

    def __call__(self, arrays: PyTree, batch: Batch) -> Outputs:
        minuend, subtrahend = self.first(arrays[0], batch), self.second(arrays[1], batch)
        return Outputs(minuend.logits - subtrahend.logits, minuend.features)


class ReadFeatures(dict[str, Array]):
    """A dict that remembers which names were read, to learn what a loss needs before anything is computed."""

    def __init__(self, features: dict[str, Array]):
        super().__init__(features)
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> Array:
        self.read.add(name)
        return super().__getitem__(name)
