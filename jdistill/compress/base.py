"""The compressor contract: pure functions on parameters, and how a sequence of steps acts together.

A student's parameters have a stored form, which is trained and shipped, and an effective form, which its network computes
with. Without compression both are the same. Each step may hold the stored leaves under a constraint (a mask, a rounding),
and may store leaves in another form (two factors for a matrix, codes and a codebook, fewer channels). Effective parameters
are the stored ones under all constraints, decoded from the latest form to the first.
"""

import fnmatch
import re
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array

from jdistill import schedules
from jdistill.errors import UsageError, did_you_mean
from jdistill.pytrees import pytree
from jdistill.registry import register
from jdistill.types import Model, PyTree

WEIGHT = re.compile(r"(^|/)(kernel|embedding|table|user|item|met|position)(/|$)")


class Quantized(NamedTuple):
    """A leaf as integers: the weight is `values * scale + offset`.

    Attributes:
      values: integers; the file takes as many bits for each as their range needs: 4 for -7 to 7, 1 for 0 and 1.
      scale: float32 or float16, broadcasts against `values`.
      offset: like `scale`, or None for 0.
      group: 0 where `scale` broadcasts. Otherwise `scale` is [groups, outputs], each row for so many consecutive inputs (all
        axes but the last, taken as one; the last group may be smaller).
    """

    values: np.ndarray
    scale: np.ndarray
    offset: np.ndarray | None = None
    group: int = 0


class Subject(NamedTuple):
    """The student that a step acts on, beside its parameters.

    Attributes:
      model: its network.
      inputs: what the network's `init` takes; shapes are enough.
      running: its running statistics.
      rows: `(n) -> n preprocessed training inputs`, evenly spaced, or fewer where there are fewer.
    """

    model: Model
    inputs: PyTree
    running: PyTree
    rows: Callable[[int], PyTree]


class Compressor:
    """One step of compression. Subclasses are frozen pytree dataclasses registered in group `compression`.

    Everything here is pure, and works under jit and vmap. A step's state is a dict by leaf name (`fc1/kernel`) of what it
    holds about that leaf: arrays, or trees of arrays.
    """

    recover_epochs: int = 0
    """Epochs of training after this step, under its constraint; 0 for none."""

    rewinds = False
    """Whether the student is trained again from its first values after this step."""

    needs_training = False
    """Whether it takes effect only in training that follows: a ramp, trained scores, weights that are taken back."""

    reads_network = False
    """Whether `init` and `shrink` take `model`, the student's network, and `init` its `inputs` (shapes are enough)."""

    calibration: int = 0
    """How many training inputs `calibrate` is given; 0 for a step that needs none."""

    def steps(self) -> "tuple[Compressor | Training, ...]":
        """What `compression=` this option stands for: itself alone, save for pipelines."""
        return (self,)

    def adapt(self, model: Model) -> Model:
        """The student's network as this step needs it, before anything is trained; itself for most."""
        return model

    def init(self, key: Array, params: PyTree) -> PyTree:
        """The step's state (masks, codes, scales) for trained `params` in their stored form; jit-able.

        Raises:
          UsageError: nothing here can be compressed so, in one line.
        """
        del key, params
        return {}

    def calibrate(self, model: Model, variables: tuple[PyTree, PyTree], inputs: PyTree, state: PyTree) -> PyTree:
        """The step's state with what it takes from data; pure, works on shapes (`jax.eval_shape`) too, never called under jit.

        Args:
          model: the student as `adapt` made it.
          variables: effective parameters under all steps so far, and running statistics.
          inputs: [calibration, ...] preprocessed training inputs.

        Raises:
          RunError: the data tell nothing (a layer whose inputs never change), in one line.
        """
        del model, variables, inputs
        return state

    def encode(self, params: PyTree, state: PyTree) -> PyTree:
        """The stored form of `params`; of those of them that this step stores otherwise."""
        del state
        return params

    def constrain(self, params: PyTree, state: PyTree) -> PyTree:
        """Stored `params` under the step's constraint, differentiable with respect to them."""
        del state
        return params

    def project(self, params: PyTree, state: PyTree) -> PyTree:
        """Stored `params` after a step of the optimizer, of a constraint that must remember what it took (what it pruned)."""
        del state
        return params

    def decode(self, params: PyTree, state: PyTree) -> PyTree:
        """What `encode` was given, from the stored form; differentiable with respect to `params`."""
        del state
        return params

    def hold(self, name: str, value: PyTree, state: PyTree) -> PyTree | None:
        """What an earlier step's `value` about the leaf `name` becomes when this step stores it; None drops it."""
        del name, state
        return value

    def check(self, params: PyTree, state: PyTree) -> None:
        """Raises `RunError`, one line, where constrained `params` (concrete) were damaged: a layer with nothing left."""

    def settle(self, params: PyTree, state: PyTree) -> tuple[PyTree, PyTree]:
        """Constrained stored `params` without what only the step's own training needed (scores, thresholds), and the state.

        Called once the next step takes over, and when the student is written. Such a step needs no decoding afterwards.
        """
        return params, state

    def finalize(self, name: str, value: np.ndarray | Quantized, state: PyTree) -> np.ndarray | Quantized:
        """How the constrained leaf called `name`, as earlier steps left it, is stored in the artifact."""
        del name, state
        return value

    def shrink(self, node: dict[str, Any], running: PyTree, state: PyTree) -> tuple[dict[str, Any], PyTree] | None:
        """Of a step whose stored form is a smaller network: the config node of that student, and its running statistics.

        Such an artifact holds the smaller network alone, which needs no decoding. None for all other steps.
        """
        del node, running, state
        return None


class Training(NamedTuple):
    """A part of a sequence in which the student is trained, under the steps before it.

    Attributes:
      kind: `distill`, the scheme's stages; `train`, the task alone; `recover`, the terms of the stage before.
      epochs: its length; None for that of `optim`.
    """

    kind: str
    epochs: int | None = None


@register("compression", "none")
@pytree
class NoCompression:
    """The trained parameters as they are, float32."""

    def steps(self) -> tuple[Compressor | Training, ...]:
        return ()


def leaf_name(path: tuple[Any, ...]) -> str:
    """`a/b/kernel` for a tree path."""
    return "/".join(str(getattr(entry, "key", getattr(entry, "idx", getattr(entry, "name", entry)))) for entry in path)


def is_weight(path: tuple[Any, ...], leaf: Array) -> bool:
    """Whether a leaf is a weight matrix, convolution kernel or embedding table (not a bias, not a BatchNorm scale)."""
    return leaf.ndim >= 2 and bool(WEIGHT.search(leaf_name(path)))


def weights(params: PyTree, only: str = "") -> dict[str, Array]:
    """The weight leaves of `params` by name; `only` names some by patterns, such as `fc1/*,item`."""
    found = {leaf_name(p): leaf for p, leaf in jax.tree_util.tree_leaves_with_path(params) if is_weight(p, leaf)}
    return {name: leaf for name, leaf in found.items() if chosen(name, only)}


def chosen_weights(params: PyTree, only: str = "") -> dict[str, Array]:
    """`weights`, of which there must be some.

    Raises:
      UsageError: the network has none, or `only` names none.
    """
    found, known = weights(params, only), list(weights(params))
    if not known:
        raise UsageError("this network has no weights (kernels, embeddings) to compress; use compression=none")
    if not found:
        meant = did_you_mean(only, known)
        raise UsageError(f"only={only!r} names no weight of this network (known: {', '.join(known)}){meant}")
    return found


def chosen(name: str, only: str) -> bool:
    """Whether `only`, patterns with commas between, names the leaf; an empty one names all."""
    return not only or any(fnmatch.fnmatchcase(name, pattern.strip()) for pattern in only.split(","))


def map_named(function: Callable[[str, Array], Any], params: PyTree) -> PyTree:
    """Maps `function(name, leaf)` over all leaves."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: function(leaf_name(path), leaf), params)


def _constrained(steps: tuple[Compressor, ...], params: PyTree, states: tuple[PyTree, ...]) -> PyTree:
    for step, state in zip(steps, states, strict=True):
        params = step.constrain(params, state)
    return params


def apply_all(steps: tuple[Compressor, ...], params: PyTree, states: tuple[PyTree, ...]) -> PyTree:
    """Effective parameters of stored ones under a sequence of steps."""
    params = _constrained(steps, params, states)
    for step, state in reversed(list(zip(steps, states, strict=True))):
        params = step.decode(params, state)
    return params


class Stored(NamedTuple):
    """A student in its stored form.

    Attributes:
      params: what is trained.
      states: one of each step so far.
    """

    params: PyTree
    states: tuple[PyTree, ...] = ()


def decodes(step: Compressor) -> bool:
    """Whether a step stores parameters in another form, also once the next step takes over."""
    return type(step).decode is not Compressor.decode and type(step).settle is Compressor.settle


def _settled(steps: tuple[Compressor, ...], params: PyTree, states: tuple[PyTree, ...]) -> tuple[PyTree, tuple[PyTree, ...]]:
    """Constrained `params` and the steps' states with nothing left of what only their own training needed."""
    after = []
    for step, state in zip(steps, states, strict=True):
        params, state = step.settle(params, state)
        after.append(state)
    return params, tuple(after)


def enter(
    steps: tuple[Compressor, ...], stored: Stored, key: Array, first: PyTree = None, subject: Subject | None = None
) -> Stored:
    """The student as the last of `steps` takes it over from those before it.

    What the constraints of the earlier steps allow is all that the step sees, and where training goes on from.

    Args:
      key: the step's randomness.
      first: the student's parameters before any training, for a step that rewinds.
      subject: for steps that read the network or data.
    """
    *before, step = schedules.at_end(tuple(steps))
    params, held = _settled(tuple(before), _constrained(tuple(before), stored.params, stored.states), stored.states)
    seen = {"model": subject.model, "inputs": subject.inputs} if step.reads_network and subject is not None else {}
    try:
        state = jax.jit(partial(step.init, **seen))(key, params)
    except UsageError as error:
        raise UsageError(str(error) if str(error).startswith("compression") else f"compression: {error}") from error
    # What an earlier form holds stays as it is: it is decoded after this one.
    states = tuple(own if decodes(earlier) else _kept(step, own, state) for earlier, own in zip(before, held, strict=True))
    if step.rewinds and first is not None:
        params = first
        for earlier, own in zip(before, held, strict=True):
            params = earlier.encode(params, own)
    return calibrated((*before, step), Stored(step.encode(params, state), (*states, state)), subject)


def calibrated(steps: tuple[Compressor, ...], stored: Stored, subject: Subject | None) -> Stored:
    """The student with what its steps take from data, for the parameters that it has now."""
    if subject is None or not any(step.calibration for step in steps):
        return stored
    variables = apply_all(steps, stored.params, stored.states), subject.running
    states = tuple(
        step.calibrate(subject.model, variables, subject.rows(step.calibration), state) if step.calibration else state
        for step, state in zip(steps, stored.states, strict=True)
    )
    return stored._replace(states=states)


def _kept(step: Compressor, earlier: PyTree, state: PyTree) -> PyTree:
    """An earlier step's state, in the stored form of the next one."""
    held = {name: step.hold(name, value, state) for name, value in earlier.items()}
    return {name: value for name, value in held.items() if value is not None}


def entered(steps: tuple[Compressor, ...], stored: Stored, key: Array, subject: Subject | None = None) -> Stored:
    """The student after those of `steps` that no stage has entered yet."""
    for i in range(len(stored.states), len(steps)):
        stored = enter(steps[: i + 1], stored, jax.random.fold_in(key, i), subject=subject)
    return stored


def finished(steps: tuple[Compressor, ...], stored: Stored, key: Array, subject: Subject | None = None) -> Stored:
    """The student after those of `steps` that no stage has entered yet, under all constraints: as it is written.

    Raises:
      RunError: a step left nothing of a layer, or data told it nothing.
    """
    steps, stored = schedules.at_end(tuple(steps)), entered(steps, stored, key, subject)
    params = _constrained(steps, stored.params, stored.states)
    for step, state in zip(steps, stored.states, strict=True):
        step.check(params, state)
    return Stored(*_settled(steps, params, stored.states))
