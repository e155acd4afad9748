"""What a loss is tried on: two tiny smooth networks, a batch of four examples, and the context made of them."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jdistill.losses.base import Loss
from jdistill.method import Term
from jdistill.passes import _on_drawn
from jdistill.sampling import Known
from jdistill.testing.requests import Shop, draw_requests, interactions, known_with, recommender, shop_for
from jdistill.types import Batch, Context, Model, Network, Outputs, PyTree

SIZE, ROWS = 4, 12
"""Examples of a batch, and rows of the training set they come from."""


class Weights(NamedTuple):
    """A network's parameters, and a number that multiplies all its outputs (how a network gives extreme ones)."""

    params: PyTree
    scale: Array


class Arrays(NamedTuple):
    """What the networks give, as `Weights` or as the `Outputs` themselves, the batch, and of requests what is known."""

    student: Outputs | Weights
    teacher: Outputs | Weights
    batch: Batch
    known: Known | None = None


def small(shop: Shop | None, classes: int, maps: bool = True, width: int = 3) -> Model:
    """A `tiny` network, or a `recommender` of a shop, where `maps` stands for its embeddings."""
    return tiny(classes, maps, width) if shop is None else recommender(shop, width, maps)


@functools.cache
def tiny(classes: int, maps: bool = True, width: int = 3) -> Model:
    """Three layers of linear and tanh on images [B, 6, 6, 2], of `width` channels and up, then a linear layer `fc`.

    Of maps, which shrink from layer to layer (`stage1`, ..., 6x6 to 2x2, then their mean), or of flat features (`hidden1`).
    """
    widths = (2 if maps else 72, width, width + 1, width + 2)

    def init(key: Array, inputs: Any) -> tuple[PyTree, PyTree]:
        dtype = jnp.promote_types(inputs.dtype, jnp.float32)

        def linear(i: int, width: int, units: int) -> PyTree:
            kernel, bias = jax.random.split(jax.random.fold_in(key, i))
            spread = (2 / width) ** 0.5
            return {
                "kernel": spread * jax.random.normal(kernel, (width, units), dtype),
                "bias": jax.random.normal(bias, (units,), dtype),
            }

        layers = {f"layer{i}": linear(i, *widths[i - 1 : i + 1]) for i in (1, 2, 3)}
        return {**layers, "fc": linear(4, widths[-1], classes)}, {}

    def apply(params: PyTree, state: PyTree, inputs: Array, *, key: Any = None, train: bool = False) -> tuple[Outputs, PyTree]:
        del key, train
        features, x, kind = {}, inputs if maps else inputs.reshape(inputs.shape[0], -1), "stage" if maps else "hidden"
        for i in (1, 2, 3):
            x = x[:, ::2, ::2] if maps and i > 1 else x
            features[f"{kind}{i}_pre"] = x = x @ params[f"layer{i}"]["kernel"] + params[f"layer{i}"]["bias"]
            features[f"{kind}{i}"] = x = jnp.tanh(x)
        features["embedding"] = embedding = 2 * (x.mean(axis=(1, 2)) if maps else x)
        return Outputs(head(params, embedding), features), state

    def head(params: PyTree, embedding: Array) -> Array:
        return embedding @ params["fc"]["kernel"] + params["fc"]["bias"]

    return Model(init, apply, head)


@dataclasses.dataclass(frozen=True)
class Problem:
    """A loss with its parameters and state, two networks, and arrays to try it on.

    Attributes:
      loss: the loss.
      teacher_given: whether the context has a teacher.
      models: student and teacher; the loss has adapted the student.
      states: what the two networks remember.
      dtype: of the networks' outputs.
      params, state: the loss's own, as it initialises them.
      arrays: a first batch, with weights or tables of outputs.
      weights: the same with weights.
      initial: outputs of the student as it was initialised, or None.
    """

    loss: Loss
    teacher_given: bool
    models: tuple[Model, Model]
    states: tuple[PyTree, PyTree]
    dtype: Any
    params: PyTree
    state: PyTree
    arrays: Arrays
    weights: Arrays
    initial: Outputs | None

    def evaluate(self, params: PyTree, state: PyTree, arrays: Arrays, seen: set[str] | None = None) -> tuple[Array, PyTree]:
        """Values and next state of the loss."""
        return self.loss.evaluate(params, state, self.context(arrays, seen))

    def context(self, arrays: Arrays, seen: set[str] | None = None) -> Context:
        """A context as training makes it: nothing differentiates the teacher. `seen` collects what is read of it."""
        student, student_network = self._network(0, arrays.student, arrays.batch)
        teacher, teacher_network = self._network(1, jax.lax.stop_gradient(arrays.teacher), arrays.batch)
        given = self.teacher_given
        context = Context(
            student, teacher if given else None, arrays.batch, jax.random.key(7), student_network,
            teacher_network if given else None, self.initial, arrays.known,
        )  # fmt: skip
        if self.loss.drawn:
            context = _on_drawn(Term(name="loss", loss=self.loss), context)
        return context if seen is None else _watched(context, seen)

    def outputs(self, which: int, weights: Weights, inputs: Array) -> Outputs:
        """The outputs of the student (0) or the teacher (1)."""
        return _outputs(self.models[which], self.dtype)(weights, self.states[which], inputs)

    def as_tables(self, arrays: Arrays) -> Arrays:
        """The same arrays with the networks' outputs in place of their weights."""
        assert isinstance(arrays.student, Weights) and isinstance(arrays.teacher, Weights)
        inputs = arrays.batch["inputs"]
        return arrays._replace(student=self.outputs(0, arrays.student, inputs), teacher=self.outputs(1, arrays.teacher, inputs))

    def _network(self, which: int, given: Any, batch: Batch) -> tuple[Outputs, Network]:
        model, state = self.models[which], self.states[which]
        if isinstance(given, Outputs):  # found not to be called
            return given, Network(lambda inputs: given, lambda embedding: given.logits)
        outputs = functools.partial(self.outputs, which, given)
        head = model.network(given.params, state).head
        return outputs(batch["inputs"]), Network(outputs, lambda e: head(e).astype(self.dtype))


def draw_batch(seed: int, classes: int, dtype: Any = jnp.float32, shop: Shop | None = None) -> Batch:
    """`SIZE` rows of the training set, which has labels of every class; `seed` 0 and 1 share the last row and nothing else."""
    if shop is not None:
        return draw_requests(seed, classes, shop)
    random = np.random.RandomState(seed)
    inputs = random.randn(SIZE, 6, 6, 2)
    inputs[-1] = np.random.RandomState(99).randn(6, 6, 2)
    index = np.array([[1, 9, 3, 5], [6, 2, 10, 5]][seed], np.int32)
    return {"inputs": jnp.asarray(inputs, dtype), "label": labels(classes)[index], "index": jnp.asarray(index)}


def labels(classes: int, shop: Shop | None = None) -> Array:
    """Of the training rows: [ROWS] int32; of a shop the interactions' values, [N] float32."""
    if shop is not None:
        return jnp.asarray(interactions(shop).train["label"])
    return jnp.arange(ROWS, dtype=jnp.int32) % max(classes, 2)


def make_problem(
    loss: Loss,
    *,
    classes: int = 3,
    dtype: Any = jnp.float32,
    wide: Any = jnp.float32,
    teacher_given: bool = True,
    initial_given: bool = True,
    models: tuple[Model, ...] | None = None,
    requests: bool | None = None,
) -> Problem:
    """The loss between two networks of `classes` logits whose outputs come in `dtype`; parameters in `wide`.

    With `requests` (None: where the loss says that it needs them) the networks are recommenders, and `classes` is the
    number of candidates.

    Raises:
      UsageError: the loss refuses these networks.
    """
    shop = shop_for(loss) if asks(loss, requests) else None
    batch = draw_batch(0, classes, wide, shop)
    one = jnp.ones((), wide)
    student, teacher = models or (small(shop, classes), small(shop, classes))
    known = None if shop is None else known_with(shop, teacher if teacher_given else None)
    student = loss.adapt(student, teacher if teacher_given else None)
    key = jax.random.key(3)
    params_t, state_t = _initialised(teacher, 0, wide, shop)
    params_s, state_s = _initialised(student, 1, wide, shop)
    state_s = loss.adopt(state_s, (params_t, state_t))
    arrays = Arrays(Weights(params_s, one), Weights(params_t, one), batch, known)
    problem = Problem(loss, teacher_given, (student, teacher), (state_s, state_t), dtype, {}, {}, arrays, arrays, None)
    if initial_given:
        initial = problem.outputs(0, Weights(_initialised(student, 2, wide, shop)[0], one), batch["inputs"])
        problem = dataclasses.replace(problem, initial=initial)
    tables = jax.eval_shape(problem.as_tables, arrays)
    pair = tables.student, tables.teacher if teacher_given else None
    params = loss.init(key, *pair)
    state = loss.init_state(jax.random.fold_in(key, 0), *pair, labels(classes, shop))
    return dataclasses.replace(problem, params=params, state=state)


def asks(loss: Loss, requests: bool | None = None) -> bool:
    """`requests`, or where that is None whether the loss says that it needs requests, or draws items for users."""
    return bool(loss.reads_requests or loss.drawn) if requests is None else requests


@functools.lru_cache(maxsize=64)
def _initialised(model: Model, seed: int, wide: Any, shop: Shop | None) -> tuple[PyTree, PyTree]:
    """Kept, as the compiling takes longer than all that a loss does with it."""
    made = jax.jit(model.init)(jax.random.key(seed), draw_batch(0, 2, wide, shop)["inputs"])
    return jax.tree.map(lambda leaf: leaf.astype(wide), made)


@functools.lru_cache(maxsize=64)
def _outputs(model: Model, dtype: Any) -> Callable[[Weights, PyTree, Array], Outputs]:
    @jax.jit
    def outputs(weights: Weights, state: PyTree, inputs: Array) -> Outputs:
        out = model.apply(weights.params, state, inputs)[0]
        return jax.tree.map(lambda x: (weights.scale * x).astype(dtype), out)

    return outputs


def read_by(problem: Problem) -> set[str]:
    """What the loss reads of its context: of "student.logits", "teacher.features", "initial.logits", "teacher_network", ..."""
    seen: set[str] = set()
    jax.eval_shape(
        lambda params, state, arrays: problem.evaluate(params, state, arrays, seen),
        problem.params, problem.state, problem.arrays,
    )  # fmt: skip
    return seen


class _Watched(Outputs):
    """Outputs that note in `seen` when their fields are read; one class, so that trees of them agree."""

    name, seen = "", frozenset[str]()

    @property
    def logits(self) -> Array:  # type: ignore[override]
        self._note("logits")
        return self[0]

    @property
    def features(self) -> dict[str, Array]:  # type: ignore[override]
        self._note("features")
        return self[1]

    def _note(self, field: str) -> None:
        if isinstance(self.seen, set):
            self.seen.add(f"{self.name}.{field}")


def _watched(context: Context, seen: set[str]) -> Context:
    """The context whose outputs and networks note in `seen` when they are read and called."""

    def outputs(given: Outputs | None, name: str) -> Any:
        if given is None:
            return None
        made = _Watched(*given)
        made.name, made.seen = name, seen  # type: ignore[assignment]
        return made

    def network(given: Network | None, name: str) -> Any:
        def called(function: Any) -> Any:
            @functools.wraps(function)
            def call(x: Any) -> Any:
                seen.add(name)
                return function(x)

            return call

        return None if given is None else Network(*map(called, given))

    return context._replace(
        **{name: outputs(getattr(context, name), name) for name in ("student", "teacher", "initial")},
        **{name: network(getattr(context, name), name) for name in ("student_network", "teacher_network")},
    )
