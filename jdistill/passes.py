"""A forward pass: the networks of a stage on a (share of a) batch, then its losses. Pure; no optimizer here."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh

from jdistill.applying import Share, computing, sharing
from jdistill.errors import UsageError
from jdistill.losses.wrappers import takes_candidates
from jdistill.method import Stage, Term
from jdistill.sampling import Known
from jdistill.teachers.targets import Live, Target
from jdistill.types import Batch, Context, Model, Network, Outputs, PyTree


class Learner(NamedTuple):
    """A network of the run whose parameters are in the state.

    Attributes:
      name: the key of its parameters.
      model: the network.
      reads: None for a network of the inputs; else the name of an earlier learner, whose features are its inputs.
    """

    name: str
    model: Model
    reads: str | None = None


class Parts(NamedTuple):
    """The hashable parts of a program; two runs with equal parts and methods of one structure share what was compiled.

    Attributes:
      learners: what may be trained, the student first.
      targets: (name, function) of what is frozen; `initial` is the student as it was initialised.
      preprocess: raw inputs -> float32 inputs.
      augment: `(key, raw inputs) -> raw inputs`, or None.
      observe: `(Outputs, batch) -> {name: [B]}`, metrics of the first network a stage trains.
      precision: what networks compute in; parameters, statistics, outputs and losses are float32.
      microbatches: equal parts of a batch, one after the other, whose gradients are averaged before the update.
      mesh: devices over whose axis `data` the compiler splits a batch, or None.
      sampler: `tasks.base.Sampler` that makes a batch of rows, or None where rows are inputs; `preprocess` and `augment`
        are then not used in training.
      axis: name of the mapped axis (`jax.pmap`) whose devices each take a share of the batch, or None.
    """

    learners: tuple[Learner, ...]
    targets: tuple[tuple[str, Target], ...]
    preprocess: Callable[[Array], Array]
    augment: Callable[[Array, Array], Array] | None
    observe: Callable[[Outputs, Batch], dict[str, Array]]
    precision: str = "float32"
    microbatches: int = 1
    mesh: Mesh | None = None
    axis: str | None = None
    sampler: Any = None


class Passed(NamedTuple):
    """What a forward pass through the networks and terms of a stage gives.

    Attributes:
      total: [] the objective.
      means: term name -> [] mean of the loss's values.
      outputs: learner name -> outputs.
      model_state: what changed of the state's `model_state`.
    """

    total: Array
    means: dict[str, Array]
    outputs: dict[str, Outputs]
    model_state: dict[str, PyTree]


class Shares(NamedTuple):
    """What of the batch a forward pass is given, and what of that its networks run on; None stands for all of it.

    Attributes:
      micro: the micro-batch.
      device: the mapped device's share of the micro-batch.
    """

    micro: Share | None = None
    device: Share | None = None

    @property
    def networks(self) -> Share | None:
        """What of the whole batch the networks run on."""
        micro, device = self.micro, self.device
        if micro is None or device is None:
            return micro or device
        return Share(micro.number * device.total + device.number, micro.total * device.total, device.axis)

    def split(self, tree: PyTree) -> PyTree:
        """The device's rows."""
        return tree if self.device is None else jax.tree.map(self.device.of, tree)

    def gather(self, tree: PyTree) -> PyTree:
        """All devices' rows, in order; the transpose adds up over devices, which is why gradients are averaged."""
        if self.device is None:
            return tree
        axis = self.device.axis
        return jax.tree.map(lambda leaf: jax.lax.all_gather(leaf, axis, tiled=True), tree)


WHOLE = Shares()
"""One device, one micro-batch."""


def references(parts: Parts, stage: Stage, frozen: PyTree, batch: Batch, shares: Shares = WHOLE) -> dict[str, Outputs]:
    """Outputs of the frozen networks that a stage reads, without gradient."""
    wanted = stage.read() | ({"initial"} if any(term.loss.reads_initial for term in stage.terms) else set())
    own, found = shares.split(batch), {}
    for name, target in parts.targets:
        if name in wanted:
            found[name] = shares.gather(_computing(target, parts.precision)(frozen[name], own))
    return jax.lax.stop_gradient(found)


def _computing(target: Target, precision: str) -> Target:
    return Live(computing(target.model, precision)) if isinstance(target, Live) else target


def forward_pass(
    parts: Parts, stage: Stage, params: PyTree, model_state: PyTree, frozen: PyTree, referred: dict[str, Outputs],
    batch: Batch, key: Array, shares: Shares = WHOLE,
) -> Passed:  # fmt: skip
    """The networks and terms of `stage` on a preprocessed batch; `params` are effective, `referred` the frozen outputs."""
    targets = {name: _computing(target, parts.precision) for name, target in parts.targets}
    outputs, changed, networks = _learners(parts, stage, params, model_state, batch["inputs"], key, shares)

    def network(name: str | None, *, frozen_too: bool) -> Network | None:
        if name in targets:
            return targets[name].network(frozen[name], batch)
        if name is None or name not in networks:
            return None
        learner, model, mode = networks[name]
        held = jax.lax.stop_gradient(params[name]) if frozen_too else params[name]
        made = model.network(held, model_state[name], **mode)
        if learner.reads is None:
            return made
        base = network(learner.reads, frozen_too=frozen_too)
        assert base is not None
        return made._replace(outputs=lambda inputs: made.outputs(base.outputs(inputs).features))

    if shares.micro is not None:  # losses that draw do not draw the same for every micro-batch
        key = jax.random.fold_in(key, shares.micro.number)
    known = {**jax.lax.stop_gradient(outputs), **referred}
    means, loss_state = {}, dict(model_state["loss"])
    for i, term in enumerate(stage.terms):
        student = network(term.learner, frozen_too=False)
        assert student is not None
        context = Context(
            student=outputs[term.learner],
            teacher=known.get(term.teacher or ""),
            batch=batch,
            key=jax.random.fold_in(key, 1000 + i),
            student_network=student,
            teacher_network=network(term.teacher, frozen_too=True),
            initial=referred.get("initial"),
            known=known_to(term, stage, frozen),
        )
        if term.loss.drawn:
            context = _on_drawn(term, context)
        values, loss_state[term.name] = term.loss.evaluate(params["loss"][term.name], loss_state[term.name], context)
        means[term.name] = term.mean(values, known, batch, params["loss"])
    total = sum((term.weight * means[term.name] for term in stage.terms), start=jnp.zeros(()))
    return Passed(total, means, outputs, jax.lax.stop_gradient({**changed, "loss": loss_state}))


def known_to(term: Term, stage: Stage, frozen: PyTree) -> Known | None:
    """What the loss of a term may draw from: the data's tables, and a ranking and a lookup of its own if there are any."""
    tables = frozen.get("tables", {})
    if "known" not in tables:
        return None
    lookup = tables.get("lookups", {}).get((stage.name, term.name))
    return tables["known"]._replace(ranking=tables.get("rankings", {}).get(term.teacher), lookup=lookup)


def with_lookups(frozen: PyTree, stages: Iterable[Stage]) -> PyTree:
    """`frozen` with the lookups of the losses that draw, each made once on the default device."""
    lookups = {}
    for stage in stages:
        for term in stage.terms:
            found = jax.jit(term.loss.lookup)(known_to(term, stage, frozen)) if term.loss.drawn else None
            if jax.tree.leaves(found):
                lookups[stage.name, term.name] = found
    return {**frozen, "tables": {**frozen["tables"], "lookups": lookups}}


def _on_drawn(term: Term, context: Context) -> Context:
    """The context of a loss that draws candidates: logits are of those (behind the task's, for a sum), features as before."""
    batch, known = context.batch, context.known
    if context.teacher is not None and context.teacher_network is None:
        raise UsageError("this loss draws items, which a table of outputs has no logits of; use a teacher network")
    if known is None:
        raise UsageError("this loss draws items for users, which this task has none of; use task=recommend or next_item")
    if term.loss.ranking != (0, 0) and known.ranking is None:
        raise UsageError(
            "this loss draws from the ranking of a frozen teacher, which this scheme has none of; use scheme=offline"
        )
    drawn = term.loss.draw(jax.random.fold_in(context.key, 0), known, batch["inputs"]["user"])
    request = {**batch["inputs"], "items": drawn}

    def of(outputs: Outputs | None, network: Network | None) -> Outputs | None:
        if outputs is None or network is None:
            return outputs
        logits = network.outputs(request).logits
        return outputs._replace(logits=jnp.concatenate([outputs.logits, logits], 1) if takes_candidates(term.loss) else logits)

    student, teacher = of(context.student, context.student_network), of(context.teacher, context.teacher_network)
    assert student is not None
    if teacher is not None:
        teacher = teacher._replace(logits=jax.lax.stop_gradient(teacher.logits))
    return context._replace(student=student, teacher=teacher)


def _learners(
    parts: Parts, stage: Stage, params: PyTree, model_state: PyTree, inputs: Array, key: Array, shares: Shares
) -> tuple[dict[str, Outputs], dict[str, PyTree], dict[str, tuple[Learner, Model, dict[str, Any]]]]:
    """Of each learner that a stage needs: outputs of the whole (micro-)batch, next state, and how to call it once more."""
    outputs: dict[str, Outputs] = {}
    own: dict[str, Outputs] = {}
    changed, networks = {}, {}
    needed, own_inputs = _needed(parts, stage), shares.split(inputs)
    for i, learner in enumerate(parts.learners, start=1):
        if learner.name not in needed:
            continue
        name, tuned = learner.name, stage.tuning is not None and learner.name == "student"
        mode = {"key": jax.random.fold_in(key, i), "train": name in stage.trains and not tuned}
        source = own_inputs if learner.reads is None else own[learner.reads].features
        model = computing(learner.model, parts.precision)
        own[name], changed[name] = sharing(model, shares.networks).apply(params[name], model_state[name], source, **mode)
        outputs[name] = shares.gather(own[name])
        networks[name] = learner, sharing(model, shares.micro), mode
    return outputs, changed, networks


def _needed(parts: Parts, stage: Stage) -> set[str]:
    """The learners that a stage must run."""
    needed = stage.read()
    for learner in reversed(parts.learners):
        if learner.name in needed and learner.reads:
            needed.add(learner.reads)
    return needed
