"""Losses made of other losses: a sum of several, standardised logits, the residual target, some of the classes."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jdistill.errors import UsageError
from jdistill.losses import _layers
from jdistill.losses.base import Loss, loss
from jdistill.losses.logits import as_classes
from jdistill.pytrees import pytree, require_nonnegative, require_positive, static
from jdistill.registry import build, number, options
from jdistill.sampling import Known
from jdistill.types import Context, Model, Network, Outputs, PyTree


class Wrapper(Loss):
    """Base of the losses that change what another loss, `of`, sees; they declare what that loss declares.

    A subclass writes `seen`, where it changes every network's outputs alike, or `see` (both take abstract ones in `init`).
    """

    of: Loss

    # Class attributes of a plain loss; here those of the wrapped one.
    needs_teacher = property(lambda self: self.of.needs_teacher)  # type: ignore[assignment]
    per_example = property(lambda self: self.of.per_example)  # type: ignore[assignment]
    zero_at_teacher = property(lambda self: self.of.zero_at_teacher)  # type: ignore[assignment]
    calls_networks = property(lambda self: self.of.calls_networks)  # type: ignore[assignment]
    reads_initial = property(lambda self: self.of.reads_initial)  # type: ignore[assignment]
    reads_requests = property(lambda self: self.of.reads_requests)  # type: ignore[assignment]
    drawn = property(lambda self: self.of.drawn)  # type: ignore[assignment]
    ranking = property(lambda self: self.of.ranking)  # type: ignore[assignment]

    def draw(self, key: Array, known: Known, user: Array) -> Array:
        return self.of.draw(key, known, user)

    def lookup(self, known: Known) -> PyTree:
        return self.of.lookup(known)

    def seen(self, outputs: Outputs) -> Outputs:
        """What `of` sees of a network."""
        return outputs

    def see(self, student: Outputs, teacher: Outputs | None, initial: Outputs | None) -> tuple[Any, Any, Any]:
        """The three as `of` sees them."""
        return tuple(None if out is None else self.seen(out) for out in (student, teacher, initial))  # type: ignore[return-value]

    def init(self, key: Array, student: Outputs, teacher: Outputs | None) -> PyTree:
        return self.of.init(key, *jax.eval_shape(lambda s, t: self.see(s, t, s)[:2], student, teacher))

    def init_state(self, key: Array, student: Outputs, teacher: Outputs | None, label: Array) -> PyTree:
        student, teacher = jax.eval_shape(lambda s, t: self.see(s, t, s)[:2], student, teacher)
        return self.of.init_state(key, student, teacher, label)

    def evaluate(self, params: PyTree, state: PyTree, context: Context) -> tuple[Array, PyTree]:
        student, teacher, initial = self.see(context.student, context.teacher, context.initial)
        seen = context._replace(
            student=student,
            teacher=teacher,
            initial=initial,
            student_network=self._network(context.student_network),
            teacher_network=None if context.teacher_network is None else self._network(context.teacher_network),
        )
        return self.of.evaluate(params, state, seen)

    def adapt(self, student: Model, teacher: Model | None) -> Model:
        return self.of.adapt(student, teacher)

    def adopt(self, state: PyTree, teacher: PyTree) -> PyTree:
        return self.of.adopt(state, teacher)

    def hold(self, old: PyTree, new: PyTree) -> PyTree:
        return self.of.hold(old, new)

    def preparation(self) -> tuple[Loss, int] | None:
        found = self.of.preparation()
        return None if found is None else (dataclasses.replace(self, of=found[0]), found[1])  # type: ignore[type-var]

    def _network(self, network: Network) -> Network:
        return Network(
            outputs=lambda inputs: self.seen(network.outputs(inputs)),
            head=lambda embedding: self.seen(Outputs(network.head(embedding), {})).logits,
        )


def described(field: str, node: Any) -> Loss:
    """The loss that a config's `field` describes: a name, or a dict with `name` and its keys.

    Raises:
      UsageError: neither of the two, or what that loss refuses; the message begins with `field`.
    """
    node = {"name": node} if isinstance(node, str) else node
    if not isinstance(node, dict) or "name" not in node:
        raise UsageError(f"{field} must be a loss such as kd or {{name: kd, temperature: 2}}, got {node!r}")
    if "weight" in node:
        raise UsageError(f"{field}.weight is not used here; set loss.weight")
    try:
        return build("loss", node)
    except UsageError as error:
        raise UsageError(f"{field}: {error}") from error


def standardise(logits: Array, epsilon: float | Array = 1e-7, ddof: int = 1) -> Array:
    """(z - mean) / (epsilon + std) over the classes of logits [B, K]; `ddof=1` is torch's unbiased std."""
    # Less the greatest first: equal logits of 1e4 are then 0, where a rounded mean leaves 1e-3 to be divided by epsilon.
    logits = logits - jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True))
    centred = logits - logits.mean(axis=-1, keepdims=True)
    variance = (centred**2).sum(axis=-1, keepdims=True) / (logits.shape[-1] - ddof)
    spread = variance > 0  # the derivative of the root is infinite at 0
    return centred / (epsilon + jnp.where(spread, jnp.sqrt(jnp.where(spread, variance, 1)), 0))


@pytree
class LogitStd(Wrapper):
    """Logit standardisation of any loss on logits: the student need not copy the teacher's mean and scale.

    Value [B] = `of` after both networks' logits z [B, K] became (z - mean_c z) / (epsilon + std_c z), in float32 or wider:
    Sun et al. 2024, https://arxiv.org/abs/2403.01427, algorithm 1. With kd at T = 2 (the default), and with dkd, the mean
    over the batch equals the authors' code (std with K - 1 in the denominator, torch's default; `jnp.std` has K: `ddof=0`).
    A student of equal logits has a gradient of the order of 1 / epsilon. The scale of the logits is lost, so with two
    classes (and one logit) only the sign is left: refused.

    Attributes:
      of: the loss, a name or {name: kd, temperature: 2}.
      epsilon: > 0, added to the standard deviation; 1e-7 as published.
      ddof: 1 or 0, subtracted from K in the variance's denominator.

    Raises:
      UsageError: a bad option; in `init`, fewer than three classes, or what `of` refuses.
    """

    of: Loss
    epsilon: float = 1e-7
    ddof: int = static(default=1)

    def __post_init__(self) -> None:
        require_positive(epsilon=self.epsilon)
        if self.ddof not in (0, 1):
            raise UsageError(f"ddof must be 0 or 1, got {self.ddof!r}")

    def seen(self, outputs: Outputs) -> Outputs:
        logits = _layers.at_least_float32(as_classes(outputs.logits))
        if logits.shape[-1] < 3:
            raise UsageError(f"this loss needs at least 3 classes, got {logits.shape[-1]}; use loss=kd")
        return outputs._replace(logits=standardise(logits, self.epsilon, self.ddof))


@loss("logit_std")
def logit_std(of: Any = None, epsilon: float = 1e-7, ddof: int = 1) -> LogitStd:
    """Logit standardisation of any loss on logits: the student need not copy the teacher's mean and scale."""
    return LogitStd(of=described("of", of or {"name": "kd", "temperature": 2.0}), epsilon=epsilon, ddof=ddof)


@pytree
class Residual(Wrapper):
    """The residual target: `of` compares the student with the teacher's logits minus those of the student as initialised.

    The student h is trained so that h(x) is near t(x) - h_0(x), with h_0 its own initial function, as one of the source
    documents defines it: value [B] = `of` with the logits z_t - z_0 in place of the teacher's. It amounts to distilling a
    teacher shifted by a random function that the student could represent from the start: as h_0 is small at usual
    initialisations, to plain distillation with a perturbed target. It would be boosting only if h_0 were added back at
    prediction, which that text does not do. Features are the teacher's own.

    Attributes:
      of: a loss on logits, a name or {name: kd, temperature: 2}.

    Raises:
      UsageError: an `of` that calls the networks: the target is known at the batch alone; what `of` refuses.
    """

    reads_initial = True
    zero_at_teacher = False

    of: Loss

    def __post_init__(self) -> None:
        if isinstance(self.of, Loss) and self.of.calls_networks:
            raise UsageError("of must be a loss on the networks' outputs, got one that calls the networks; use logit_mse or kd")
        if isinstance(self.of, Loss) and self.of.drawn:
            raise UsageError("of must be a loss on the task's own candidates, got one that draws others; use logit_mse or kd")

    def see(self, student: Outputs, teacher: Outputs | None, initial: Outputs | None) -> tuple[Any, Any, Any]:
        teacher = _layers.require_teacher(teacher)
        assert initial is not None
        return student, teacher._replace(logits=teacher.logits - jax.lax.stop_gradient(initial.logits)), initial


@loss("residual")
def residual(of: Any = "logit_mse") -> Residual:
    """The residual target: the teacher's logits minus those of the student as initialised, for any loss on logits."""
    return Residual(of=described("of", of))


@pytree
class OnClasses(Wrapper):
    """`of` on the logits of some classes; as label it takes the teacher's answer among them, without a teacher the own.

    The own labels must then be among `classes`.

    Attributes:
      classes: numbers of the classes.
    """

    of: Loss
    classes: tuple[int, ...] = static()

    def seen(self, outputs: Outputs) -> Outputs:
        return outputs._replace(logits=as_classes(outputs.logits)[..., jnp.asarray(self.classes)])

    def evaluate(self, params: PyTree, state: PyTree, context: Context) -> tuple[Array, PyTree]:
        teacher = None if context.teacher is None else self.seen(context.teacher)
        own = context.batch["label"]
        if teacher is None:
            answer = jnp.argmax(own[:, None] == jnp.asarray(self.classes), axis=-1)
        else:
            answer = jnp.argmax(teacher.logits, axis=-1)
        answer = answer.astype(own.dtype)
        return super().evaluate(params, state, context._replace(batch={**context.batch, "label": answer}))


@pytree
class Sum(Loss):
    """Several losses at once: value [B] = sum over them of weight times value.

    Each part that draws candidates sees the logits of its own, each that draws none those of the task (`takes_candidates`).

    Attributes:
      losses: the losses.
      weights: of each, >= 0.
      names: of each, under which it keeps parameters and state.
    """

    losses: tuple[Loss, ...]
    weights: tuple[Any, ...]
    names: tuple[str, ...] = static()

    needs_teacher = property(lambda self: any(one.needs_teacher for one in self.losses))  # type: ignore[assignment]
    per_example = property(lambda self: all(one.per_example for one in self.losses))  # type: ignore[assignment]
    zero_at_teacher = property(lambda self: all(one.zero_at_teacher for one in self.losses))  # type: ignore[assignment]
    calls_networks = property(lambda self: any(one.calls_networks for one in self.losses))  # type: ignore[assignment]
    reads_initial = property(lambda self: any(one.reads_initial for one in self.losses))  # type: ignore[assignment]
    reads_requests = property(lambda self: any(one.reads_requests for one in self.losses))  # type: ignore[assignment]
    drawn = property(lambda self: sum(one.drawn for one in self.losses))  # type: ignore[assignment]

    @property
    def ranking(self) -> tuple[int, int]:
        items, users = zip(*(one.ranking for one in self.losses), strict=True)
        return max(items), max(users)

    def draw(self, key: Array, known: Known, user: Array) -> Array:
        """The items of each part that draws, in the order of the parts."""
        tables = self.looked_up(known)
        items = [
            one.draw(jax.random.fold_in(key, i), known._replace(lookup=tables[i]), user)
            for i, one in enumerate(self.losses)
            if one.drawn
        ]
        return jnp.concatenate(items, axis=1)

    def lookup(self, known: Known) -> PyTree:
        """Those of the parts."""
        return tuple(one.lookup(known) for one in self.losses)

    def __post_init__(self) -> None:
        if isinstance(self.weights, tuple):
            require_nonnegative(**{f"of.{name}.weight": w for name, w in zip(self.names, self.weights, strict=True)})

    def init(self, key: Array, student: Outputs, teacher: Outputs | None) -> PyTree:
        return self._each(lambda one, i: one.init(jax.random.fold_in(key, i), student, teacher))

    def init_state(self, key: Array, student: Outputs, teacher: Outputs | None, label: Array) -> PyTree:
        return self._each(lambda one, i: one.init_state(jax.random.fold_in(key, i), student, teacher, label))

    def evaluate(self, params: PyTree, state: PyTree, context: Context) -> tuple[Array, PyTree]:
        values, states = [], {}
        for i, (name, one) in enumerate(zip(self.names, self.losses, strict=True)):
            own = context._replace(
                key=jax.random.fold_in(context.key, i),
                student=self._columns(i, context.student),
                teacher=None if context.teacher is None else self._columns(i, context.teacher),
            )
            value, states[name] = one.evaluate(params[name], state[name], own)
            values.append(self.weights[i] * value)
        return sum(values[1:], start=values[0]), states

    def adapt(self, student: Model, teacher: Model | None) -> Model:
        for one in self.losses:
            student = one.adapt(student, teacher)
        return student

    def adopt(self, state: PyTree, teacher: PyTree) -> PyTree:
        for one in self.losses:
            state = one.adopt(state, teacher)
        return state

    def hold(self, old: PyTree, new: PyTree) -> PyTree:
        return {name: one.hold(old[name], new[name]) for name, one in zip(self.names, self.losses, strict=True)}

    def preparation(self) -> tuple[Loss, int] | None:
        found = [one.preparation() for one in self.losses]
        if not any(found):
            return None
        losses = tuple(_Idle(of=one) if prior is None else prior[0] for one, prior in zip(self.losses, found, strict=True))
        ones = tuple(1.0 for _ in losses)
        return Sum(losses=losses, weights=ones, names=self.names), max(prior[1] for prior in found if prior)

    def _columns(self, i: int, outputs: Outputs) -> Outputs:
        """What part `i` sees: the logits of the task's candidates, of those that it drew, or of both."""
        if not self.drawn:
            return outputs
        one, logits = self.losses[i], outputs.logits
        candidates = logits.shape[1] - self.drawn
        start = candidates + sum(earlier.drawn for earlier in self.losses[:i])
        columns = logits[:, start : start + one.drawn]
        if takes_candidates(one):
            columns = jnp.concatenate([logits[:, :candidates], columns], axis=1)
        return outputs._replace(logits=columns)

    def _each(self, make: Callable[[Loss, int], PyTree]) -> dict[str, PyTree]:
        return {name: make(one, i) for i, (name, one) in enumerate(zip(self.names, self.losses, strict=True))}


def takes_candidates(one: Loss) -> bool:
    """Whether a loss reads the logits of the task's candidates, which then come before those of the items it draws.

    So do losses that draw nothing, and a `Sum` with a part that draws nothing.
    """
    if isinstance(one, Wrapper):
        return takes_candidates(one.of)
    return any(map(takes_candidates, one.losses)) if isinstance(one, Sum) else not one.drawn


@pytree
class _Idle(Wrapper):
    """The parameters of `of`, and values of zero: what a loss without preparation does while others prepare."""

    of: Loss

    def evaluate(self, params: PyTree, state: PyTree, context: Context) -> tuple[Array, PyTree]:
        del params
        return jnp.zeros(context.student.logits.shape[0]), state

    def hold(self, old: PyTree, new: PyTree) -> PyTree:
        """`old`: weight decay moves parameters without a gradient too."""
        del new
        return old


@loss("sum")
def combined(of: Any = None) -> Sum:
    """Several losses at once, each with its weight; the keys of `of` are names of losses, the values their options.

    `'loss.of={kd: {temperature: 2}, input_gradient: {weight: 10}}'`, as one of the source documents asks for soft labels
    and gradients. A weight that is not given is that loss's default. A second one of a kind gives its `name` as an option:
    `{kd: {}, soft: {name: kd, temperature: 20}}`.
    """
    of = {"kd": {}, "hint": {"weight": 100.0}} if of is None else of
    if not isinstance(of, dict) or not of:
        raise UsageError(f"of must be a dict of losses such as {{kd: {{}}, hint: {{weight: 100}}}}, got {of!r}")
    losses, weights = [], []
    for name, node in of.items():
        if not isinstance(node, dict | None):
            raise UsageError(f"of.{name} must be a dict of options such as {{weight: 2}}, got {node!r}")
        node = {"name": name, **(node or {})}
        given = node.pop("weight", None)
        losses.append(described(f"of.{name}", node))
        default = options("loss")[node["name"]].fields["weight"][1]
        weights.append(number(f"of.{name}.weight", default if given is None else given))
    return Sum(losses=tuple(losses), weights=tuple(weights), names=tuple(of))
