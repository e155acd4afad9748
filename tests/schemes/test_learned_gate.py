"""Teachers whose shares of each example are learned, against loops of NumPy, and which gradients reach the gate."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdistill.errors import UsageError
from jdistill.losses import KD, FactorTransfer, HoldsGate, SoftBCE
from jdistill.method import LearnedGate
from jdistill.models import MLP
from jdistill.modules import from_linen
from jdistill.pytrees import as_leaves
from jdistill.registry import build
from jdistill.schemes import MultiTeacher
from jdistill.schemes.base import preparing
from jdistill.stages import init_state
from jdistill.teachers.targets import Live
from jdistill.train import forward_pass, references
from jdistill.types import Outputs
from tests import tiny
from tests.schemes.common import begin, step_once

NAMES = ("teacher", "teacher2", "teacher3")
TERMS = ("kd", "kd_from_teacher2", "kd_from_teacher3")
SCHEME = MultiTeacher(teachers=({"seed": 0}, {"seed": 1}, {"seed": 2}), gate="learned")


def several():
    """Parts and arrays with a network of another width for each teacher."""
    models = [from_linen(MLP(outputs=tiny.CLASSES, widths=(width,))) for width in (9, 7, 5)]
    inputs = tiny.batch()["inputs"]
    frozen = {name: model.init(jax.random.key(i), inputs) for i, (name, model) in enumerate(zip(NAMES, models, strict=True))}
    targets = tuple((name, Live(model)) for name, model in zip(NAMES, models, strict=True))
    return tiny.parts()._replace(targets=targets), frozen


def stage_of(term=None):
    return as_leaves(SCHEME.stages(tiny.setting(term or tiny.kd(1.0)))[0])


def numpy_shares(logits, weight, bias):
    """softmax_j(w_j . z + b_j), in loops: [teachers, B]."""
    out = np.zeros((len(logits), len(logits[0])))
    for b in range(len(logits[0])):
        said = [z for teacher in logits for z in teacher[b]]
        scores = [bias[j] + sum(w * z for w, z in zip(weight[:, j], said, strict=True)) for j in range(len(logits))]
        total = sum(np.exp(score) for score in scores)
        for j, score in enumerate(scores):
            out[j, b] = np.exp(score) / total
    return out


def some_gate(teachers, classes, seed=0):
    random = np.random.default_rng(seed)
    return {"weight": random.normal(size=(teachers * classes, teachers)), "bias": random.normal(size=teachers)}


@pytest.mark.parametrize(("teachers", "classes"), [(2, 1), (3, 1), (3, 4)])
def test_the_shares_are_a_softmax_of_all_teachers_logits(teachers, classes):
    random = np.random.default_rng(teachers)
    logits, gate = [2 * random.normal(size=(6, classes)) for _ in range(teachers)], some_gate(teachers, classes)
    with jax.enable_x64(True):
        known = {name: Outputs(jnp.asarray(z), {}) for name, z in zip(NAMES, logits, strict=False)}
        learned = LearnedGate(among=NAMES[:teachers], holder="kd")
        held = {"kd": {"of": {}, "gate": jax.tree.map(jnp.asarray, gate)}, "other": {}}
        found = np.stack([learned(known, name, {}, held) for name in NAMES[:teachers]])
    np.testing.assert_allclose(found, numpy_shares(logits, **gate), rtol=1e-10)
    np.testing.assert_allclose(found.sum(0), 1, rtol=1e-12)
    assert found.std(1).min() > 1e-3  # of each example


def test_the_layout_and_what_does_not_fit():
    (stage,) = SCHEME.stages(tiny.setting())
    task, first, *others = stage.terms
    assert task.gate is None and [t.name for t in (first, *others)] == list(TERMS)
    assert all(t.gate == LearnedGate(among=NAMES, holder="kd") and t.weight == 0.7 for t in (first, *others))
    assert first.loss == HoldsGate(of=tiny.kd().loss, teachers=3) and all(t.loss == tiny.kd().loss for t in others)
    assert stage.read() >= set(NAMES)
    with pytest.raises(UsageError, match=r"^scheme\.weights are learned with gate=learned; leave them out"):
        build("scheme", {"name": "multi_teacher", "gate": "learned", "weights": [1.0, 2.0]})


def test_a_loss_of_labels_and_a_weight_of_nothing_need_no_gate():
    alone = dataclasses.replace(tiny.TASK, name="smooth")
    (stage,) = SCHEME.stages(tiny.setting(alone))
    assert all(t.gate is None for t in stage.terms)
    (stage,) = SCHEME.stages(tiny.setting(tiny.kd(0.0)))
    assert stage.terms == (tiny.TASK,)


def test_it_begins_as_the_mean_of_the_terms():
    parts, frozen = several()
    stage, plain = stage_of(), as_leaves(dataclasses.replace(SCHEME, gate="none").stages(tiny.setting(tiny.kd(1.0)))[0])
    gated, mean = begin(parts, stage, frozen), begin(parts, plain, frozen)
    np.testing.assert_array_equal(gated.params["loss"]["kd"]["gate"]["weight"], np.zeros((9, 3)))
    new, metrics = step_once(parts, stage, gated, frozen)
    expected, of_mean = step_once(parts, plain, mean, frozen)
    np.testing.assert_allclose(metrics["loss"], of_mean["loss"], rtol=1e-6)
    tiny.assert_close(new.params["student"], expected.params["student"], rtol=1e-4, atol=1e-7)
    assert np.abs(new.params["loss"]["kd"]["gate"]["weight"]).max() > 1e-4


@pytest.mark.parametrize("loss", [KD(temperature=3.0), SoftBCE(temperature=2.0)])
def test_the_gate_learns_from_the_gated_terms_alone_and_the_student_from_shares_held_fixed(loss):
    with jax.enable_x64(True):
        parts, frozen = several()
        stage = tiny.as_float64(SCHEME.stages(tiny.setting(dataclasses.replace(tiny.kd(0.7), loss=loss)))[0])
        frozen = tiny.as_float64(frozen)
        state, batch = begin(parts, stage, frozen, np.float64), tiny.batch(dtype=np.float64)
        gate = jax.tree.map(jnp.asarray, some_gate(3, tiny.CLASSES))
        params = {**state.params, "loss": {**state.params["loss"], "kd": {"of": {}, "gate": gate}}}
        referred = references(parts, stage, frozen, batch)

        def total(params, frozen):
            known = references(parts, stage, frozen, batch)
            return forward_pass(parts, stage, params, state.model_state, frozen, known, batch, jax.random.key(0)).total

        of_params, of_teachers = jax.grad(total, (0, 1))(params, frozen)
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(of_teachers))
        logits = [np.asarray(referred[name].logits) for name in NAMES]
        shares = numpy_shares(logits, **jax.tree.map(np.asarray, gate))

        def values(student):
            out, _ = tiny.STUDENT.apply(student, {}, batch["inputs"])
            return out, [loss({}, out, Outputs(jnp.asarray(z), {}), batch) for z in logits]

        # d (sum_k a_k L_k) / d score_j = a_j (L_j - sum_k a_k L_k)
        each = np.stack([np.asarray(v) for v in values(params["student"])[1]])
        size, of_scores = each.shape[1], 0.7 * shares * (each - (shares * each).sum(0)) / each.shape[1]
        said = np.concatenate(logits, axis=1)
        found = of_params["loss"]["kd"]["gate"]
        np.testing.assert_allclose(found["bias"], of_scores.sum(1), rtol=1e-8, atol=1e-12)
        np.testing.assert_allclose(found["weight"], said.T @ of_scores.T, rtol=1e-8, atol=1e-12)

        def with_fixed_shares(student):
            out, lost = values(student)
            task = tiny.TASK.loss({}, out, None, batch).mean()
            return task + 0.7 * sum((a * one).sum() / size for a, one in zip(shares, lost, strict=True))

        tiny.assert_close(of_params["student"], jax.grad(with_fixed_shares)(params["student"]), rtol=1e-8, atol=1e-12)


def test_shares_move_to_the_teacher_whose_term_is_smallest():
    parts, frozen = several()
    student, inputs = init_state(parts, jax.random.key(0), tiny.data()).params["student"], tiny.batch()["inputs"]
    parts = parts._replace(targets=(*parts.targets[:1], ("teacher2", Live(tiny.STUDENT)), *parts.targets[2:]))
    frozen = {**frozen, "teacher2": (student, {})}  # the student's own start: nothing to learn from it
    stage = stage_of()
    state = begin(parts, stage, frozen)
    state = dataclasses.replace(state, params={**state.params, "student": student})
    for _ in range(20):
        state, _ = step_once(parts, stage, state, frozen)
    known = {n: target(frozen[n], {"inputs": inputs}) for n, target in parts.targets}
    gate = stage.terms[1].gate
    second, *rest = (np.asarray(gate(known, n, {}, state.params["loss"])).mean() for n in ("teacher2", "teacher", "teacher3"))
    assert second > max(rest) + 0.02


def test_a_loss_with_parameters_and_a_preparation_keeps_both():
    term = dataclasses.replace(tiny.kd(), loss=FactorTransfer(), name="ft")
    (stage,) = SCHEME.stages(tiny.setting(term))
    second = stage.terms[2]
    (prepare,) = preparing(stage, [])
    assert all(t.gate is None for t in prepare.terms) and isinstance(prepare.terms[0].loss, HoldsGate)
    assert [t.name for t in prepare.terms] == [t.name for t in stage.terms[1:]]
    out = Outputs(jax.ShapeDtypeStruct((8, 3), np.float32), {"embedding": jax.ShapeDtypeStruct((8, 6), np.float32)})
    hint = build("loss", {"name": "hint"})
    held = HoldsGate(of=hint, teachers=2).init(jax.random.key(0), out, out)
    tiny.assert_same_bits(held["of"], hint.init(jax.random.key(0), out, out))
    assert held["gate"]["weight"].shape == (6, 2) and second.loss == FactorTransfer()
