"""Several teachers, gates, and chains of assistants, whose stages learn from what the last made."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdistill.errors import UsageError
from jdistill.fit import fit_one as fit
from jdistill.losses import KD, CrossEntropy
from jdistill.method import Gate, Method
from jdistill.models import MLP
from jdistill.modules import from_linen
from jdistill.pytrees import as_leaves
from jdistill.registry import build
from jdistill.schedules import Schedule
from jdistill.schemes import Assistant, MultiTeacher
from jdistill.teachers.targets import Live
from jdistill.train import forward_pass, references
from jdistill.types import Outputs
from tests import tiny
from tests.reference.losses import softmax
from tests.schemes.common import begin, step_once
from tests.tiny import assert_same_bits

THREE = ({"seed": 0}, {"seed": 1}, {"seed": 2})
NAMES = ("teacher", "teacher2", "teacher3")


def several(scheme: MultiTeacher):
    """Parts and arrays with a network of its own for each teacher."""
    parts = tiny.parts()._replace(targets=tuple((name, Live(tiny.TEACHER)) for name in scheme.frozen()))
    frozen = {name: tiny.frozen(seed=20 + i)["teacher"] for i, name in enumerate(scheme.frozen())}
    return parts, frozen


def test_the_layout():
    scheme = MultiTeacher(teachers=THREE)
    assert scheme.frozen() == dict(zip(NAMES, THREE, strict=True)) and scheme.trained() == {}
    (stage,) = scheme.stages(tiny.setting())
    assert [(t.name, t.learner, t.teacher) for t in stage.terms] == [
        ("cross_entropy", "student", None), ("kd", "student", "teacher"),
        ("kd_from_teacher2", "student", "teacher2"), ("kd_from_teacher3", "student", "teacher3"),
    ]  # fmt: skip
    np.testing.assert_allclose([t.weight for t in stage.terms[1:]], [0.7 / 3] * 3)
    (weighted,) = MultiTeacher(teachers=THREE, weights=(1.0, 0.0, 2.5)).stages(tiny.setting())
    assert [(t.teacher, t.weight) for t in weighted.terms[1:]] == [("teacher", 0.7), ("teacher3", 0.7 * 2.5)]
    (gated,) = MultiTeacher(teachers=THREE, gate="confidence").stages(tiny.setting())
    assert [t.weight for t in gated.terms[1:]] == [0.7] * 3 and all(t.gate == Gate(among=NAMES) for t in gated.terms[1:])
    assert gated.terms[0].gate is None


def test_a_loss_of_labels_is_one_term_and_a_schedule_is_scaled():
    alone = dataclasses.replace(tiny.TASK, name="smooth", loss=CrossEntropy(label_smoothing=0.1))
    (stage,) = MultiTeacher().stages(tiny.setting(alone))
    assert [(t.name, t.weight) for t in stage.terms] == [("cross_entropy", 1.0), ("smooth", 1.0)]
    (stage,) = MultiTeacher(weights=(1.0, 3.0)).stages(
        tiny.setting(tiny.kd(weight=Schedule(kind="linear", start=0.5, end=2.0)))
    )
    assert [(t.weight.start, t.weight.end) for t in stage.terms[1:]] == [(0.5, 2.0), (1.5, 6.0)]
    (stage,) = MultiTeacher().stages(tiny.setting(loss=False))
    assert stage.terms == (tiny.TASK,) and stage.name == "train"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teachers": [{}]}, "scheme.teachers must be at least two; use scheme=offline for one"),
        ({"teachers": []}, "scheme.teachers must be a list of changes such as"),
        ({"teachers": 3}, "scheme.teachers must be a list of changes such as"),
        ({"teachers": [1, 2]}, "scheme.teachers must be a list of changes such as"),
        ({"weights": [1.0]}, "scheme.weights must be one a teacher, got 1 for 2 teachers"),
        ({"weights": [1.0, -2.0]}, "scheme.weights[1] must be at least 0, got -2.0"),
        ({"gate": "entropy"}, "scheme.gate must be one of none, confidence, learned, got 'entropy'"),
    ],
)
def test_bad_options(changes, message):
    with pytest.raises(UsageError) as error:
        build("scheme", {"name": "multi_teacher", **changes})
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_the_mean_of_kd_terms_has_the_gradient_of_one_towards_the_mean_probabilities():
    temperature = 3.0
    with jax.enable_x64(True):
        parts, frozen = several(MultiTeacher(teachers=THREE))
        stage = tiny.as_float64(MultiTeacher(teachers=THREE).stages(tiny.setting(tiny.kd(1.0, temperature)))[0])
        stage = dataclasses.replace(stage, terms=stage.terms[1:])
        frozen = tiny.as_float64(frozen)
        state, batch = begin(parts, stage, frozen, np.float64), tiny.batch(dtype=np.float64)
        referred = references(parts, stage, frozen, batch)
        p = np.mean([[softmax(row / temperature) for row in np.asarray(out.logits)] for out in referred.values()], 0)
        mean = Outputs(jnp.asarray(temperature * np.log(p)), {})

        def total(student):
            params = {**state.params, "student": student}
            return forward_pass(parts, stage, params, state.model_state, frozen, referred, batch, jax.random.key(0)).total

        def towards_mean(student):
            outputs, _ = tiny.STUDENT.apply(student, {}, batch["inputs"])
            return KD(temperature=temperature)({}, outputs, mean, batch).mean()

        student = state.params["student"]
        tiny.assert_close(jax.grad(total)(student), jax.grad(towards_mean)(student), rtol=1e-9, atol=1e-12)
        # The values differ by the spread of the teachers, which no student can change.
        assert float(total(student)) > float(towards_mean(student)) > 0


def test_weights_multiply_their_own_teachers_term():
    parts, frozen = several(MultiTeacher(teachers=THREE))
    losses = {}
    for weights in ((0.0, 1.0, 0.0), (0.0, 2.0, 0.0), (0.0, 0.0, 1.0), (0.0, 2.0, 1.0)):
        stage = as_leaves(MultiTeacher(teachers=THREE, weights=weights).stages(tiny.setting(tiny.kd(1.0)))[0])
        state = begin(parts, stage, frozen)
        _, metrics = step_once(parts, stage, state, frozen)
        losses[weights] = float(metrics["loss"] - metrics["cross_entropy"])
    second, twice, third, both = losses.values()
    np.testing.assert_allclose([twice, both], [2 * second, twice + third], rtol=1e-4)
    assert abs(second - third) > 1e-3


def numpy_gate(logits: list[np.ndarray], label: np.ndarray) -> np.ndarray:
    """CA-MKD, equation 3, in loops: [teachers, B]."""
    teachers, out = len(logits), np.zeros((len(logits), len(label)))
    for b, y in enumerate(label):
        errors = [-np.log(softmax(z[b])[y]) for z in logits]
        for k in range(teachers):
            out[k, b] = (1 - np.exp(errors[k]) / sum(np.exp(e) for e in errors)) / (teachers - 1)
    return out


@pytest.mark.parametrize("teachers", [2, 3, 5])
def test_the_gate_is_equation_3_and_adds_up_to_one(teachers):
    random = np.random.default_rng(teachers)
    logits, label = [2 * random.normal(size=(6, 4)) for _ in range(teachers)], random.integers(0, 4, 6)
    names = tuple(f"t{i}" for i in range(teachers))
    with jax.enable_x64(True):
        known = {name: Outputs(jnp.asarray(z), {}) for name, z in zip(names, logits, strict=True)}
        found = np.stack([Gate(among=names)(known, name, {"label": jnp.asarray(label)}) for name in names])
    np.testing.assert_allclose(found, numpy_gate(logits, label), rtol=1e-10)
    np.testing.assert_allclose(found.sum(0), 1, rtol=1e-12)
    surest = np.argmax([[softmax(z[b])[y] for b, y in enumerate(label)] for z in logits], 0)
    np.testing.assert_array_equal(found.argmax(0), surest)


def test_gates_are_finite_at_extreme_teachers():
    names = ("a", "b")
    known = {"a": Outputs(jnp.asarray([[1e4, -1e4]]), {}), "b": Outputs(jnp.asarray([[-1e4, 1e4]]), {})}
    batch = {"label": jnp.asarray([0])}
    assert [float(Gate(among=names)(known, name, batch)[0]) for name in names] == [1.0, 0.0]


def test_a_gated_term_is_the_weighted_mean():
    scheme = MultiTeacher(teachers=THREE, gate="confidence")
    parts, frozen = several(scheme)
    stage = as_leaves(scheme.stages(tiny.setting(tiny.kd(1.0)))[0])
    state, batch = begin(parts, stage, frozen), tiny.batch()
    _, metrics = step_once(parts, stage, state, frozen)
    logits = {name: np.asarray(tiny.TEACHER.apply(*frozen[name], batch["inputs"])[0].logits, np.float64) for name in NAMES}
    z = tiny.STUDENT.apply(state.params["student"], {}, batch["inputs"])[0]
    gates = numpy_gate(list(logits.values()), batch["label"])
    for k, (name, term) in enumerate(zip(NAMES, ("kd", "kd_from_teacher2", "kd_from_teacher3"), strict=True)):
        values = KD(temperature=3.0)({}, z, Outputs(jnp.asarray(logits[name], jnp.float32), {}), batch)
        np.testing.assert_allclose(metrics[term], (gates[k] * np.asarray(values)).sum(), rtol=1e-4)


# -- assistants


def test_a_chain_has_a_stage_for_each_member():
    scheme = Assistant(assistants=({"widths": [8]}, {"widths": [7]}))
    assert scheme.trained() == {"assistant1": ("student", {"widths": [8]}), "assistant2": ("student", {"widths": [7]})}
    assert scheme.frozen() == {"teacher": {}}
    stages = scheme.stages(tiny.setting())
    assert [(s.name, s.trains, [(t.name, t.teacher) for t in s.terms]) for s in stages] == [
        ("assistant1", ("assistant1",), [("cross_entropy_assistant1", None), ("kd_assistant1", "teacher")]),
        ("assistant2", ("assistant2",), [("cross_entropy_assistant2", None), ("kd_assistant2_from_assistant1", "assistant1")]),
        ("student", ("student",), [("cross_entropy", None), ("kd_from_assistant2", "assistant2")]),
    ]
    with pytest.raises(UsageError, match=r"^scheme\.assistants must be a list of changes"):
        build("scheme", {"name": "assistant", "assistants": {}})


MIDDLE = from_linen(MLP(outputs=tiny.CLASSES, widths=(8,), dropout=0.5))


def test_each_stage_learns_from_the_network_that_the_stage_before_trained(tmp_path):
    """Bit for bit, in evaluation mode (the assistant has dropout), and no longer changed."""
    scheme = Assistant(assistants=({},))
    parts = tiny.parts(scheme=scheme, assistant1=MIDDLE)
    whole = tiny.method(scheme=scheme, epochs=2)
    fresh = tiny.setup(tmp_path / "0", whole, parts=parts).members[0].initial
    first = fit(tiny.setup(tmp_path / "a", Method(stages=whole.stages[:1]), parts=parts, checkpoints=None)).state
    assert_same_bits(first.params["student"], fresh.params["student"])  # not trained yet
    assert np.any(first.params["assistant1"]["fc"]["kernel"] != fresh.params["assistant1"]["fc"]["kernel"])
    last = fit(tiny.setup(tmp_path / "b", whole, parts=parts, checkpoints=None)).state
    assert_same_bits(last.params["assistant1"], first.params["assistant1"])

    # The second stage alone, towards that network as an ordinary frozen teacher.
    stage = as_leaves(whole.stages[1])
    frozen = {"teacher": tiny.frozen()["teacher"], "assistant1": (first.params["assistant1"], first.model_state["assistant1"])}
    single = tiny.parts()._replace(targets=(("assistant1", Live(MIDDLE)),))
    alone, learned = begin(single, stage, frozen), begin(parts, stage, frozen)
    learned = dataclasses.replace(learned, params={**learned.params, "assistant1": first.params["assistant1"]})
    expected, _ = step_once(single, stage, alone, frozen)
    found, _ = step_once(parts, stage, learned, frozen)
    tiny.assert_close(found.params["student"], expected.params["student"], rtol=1e-6)
