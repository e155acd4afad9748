"""A student that is its own teacher: generations, heads on its layers, the average of its steps."""

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdistill.blueprint import abstract
from jdistill.compress.artifact import read_artifact
from jdistill.errors import UsageError
from jdistill.fit import fit_one as fit
from jdistill.losses import KD, CrossEntropy, Hint
from jdistill.method import Average, Term
from jdistill.models import MLP
from jdistill.modules import from_linen
from jdistill.pytrees import as_leaves
from jdistill.registry import build
from jdistill.run import run
from jdistill.schemes import Self
from jdistill.schemes.own import head_layers, head_model
from jdistill.train import forward_pass, trained
from jdistill.types import Outputs
from tests import tiny
from tests.schemes.common import begin, step_once
from tests.tiny import assert_same_bits

DEEP = from_linen(MLP(outputs=tiny.CLASSES, widths=(7, 6, 5)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"form": "twin"}, "scheme.form must be one of born_again, heads, average, got 'twin'"),
        ({"generations": 0}, "scheme.generations must be positive, got 0"),
        ({"decay": 1.0}, "scheme.decay must be at least 0 and below 1, got 1.0"),
    ],
)
def test_bad_options(changes, message):
    with pytest.raises(UsageError) as error:
        build("scheme", {"name": "self", **changes})
    assert str(error.value) == message


# -- generations


def test_each_generation_learns_from_the_one_before():
    scheme = Self(generations=2)
    assert scheme.frozen() == {} and list(scheme.trained()) == ["generation0", "generation1"]
    assert [(s.name, s.trains, [(t.name, t.teacher) for t in s.terms]) for s in scheme.stages(tiny.setting())] == [
        ("generation0", ("generation0",), [("cross_entropy_generation0", None)]),
        (
            "generation1", ("generation1",),
            [("cross_entropy_generation1", None), ("kd_generation1_from_generation0", "generation0")],
        ),
        ("student", ("student",), [("cross_entropy", None), ("kd_from_generation1", "generation1")]),
    ]  # fmt: skip


def test_generations_begin_at_other_weights_and_are_trained_one_after_the_other(tmp_path):
    scheme = Self(generations=2)
    names = ("student", "generation0", "generation1")
    parts, own = tiny.parts(tiny.DROPPING, teacher=None, scheme=scheme), tiny.method(scheme=scheme, epochs=2)
    states = []
    for last in range(4):
        made = tiny.setup(tmp_path / f"{last}", parts=parts, own=own, frozen={}, checkpoints=None)
        method = dataclasses.replace(own, stages=own.stages[:last])
        states.append(fit(tiny.with_member(made, method=method)).state.params if last else made.members[0].initial.params)
    kernels = {np.asarray(states[0][name]["fc"]["kernel"]).tobytes() for name in names}
    assert len(kernels) == 3
    for moved, (before, after) in zip(("generation0", "generation1", "student"), itertools.pairwise(states), strict=True):
        for name in names:
            same = np.array_equal(before[name]["fc"]["kernel"], after[name]["fc"]["kernel"])
            assert same == (name != moved)
    rows = [json.loads(line) for line in (tmp_path / "3" / "metrics.jsonl").read_text().splitlines()]
    assert [row["stage"] for row in rows] == ["generation0"] * 2 + ["generation1"] * 2 + ["student"] * 2


# -- heads


def heads(student=DEEP, distil=None, **optim):
    scheme = Self(form="heads")
    parts = tiny.parts(student, teacher=None, scheme=scheme)
    stage = as_leaves(scheme.stages(tiny.setting(distil, student, **optim))[0])
    return parts, stage, begin(parts, stage, {})


def test_heads_stand_on_every_hidden_layer_but_the_last():
    parts, stage, state = heads()
    assert [(learner.name, learner.reads) for learner in parts.learners] == [
        ("student", None), ("head_hidden1", "student"), ("head_hidden2", "student"),
    ]  # fmt: skip
    assert stage.trains == ("student", "head_hidden1", "head_hidden2")
    assert [(t.name, t.learner, t.teacher) for t in stage.terms] == [
        ("cross_entropy", "student", None),
        ("cross_entropy_head_hidden1", "head_hidden1", None), ("kd_head_hidden1_from_student", "head_hidden1", "student"),
        ("cross_entropy_head_hidden2", "head_hidden2", None), ("kd_head_hidden2_from_student", "head_hidden2", "student"),
    ]  # fmt: skip
    shapes = jax.tree.map(np.shape, state.params["head_hidden2"])
    assert shapes == {"hidden": {"kernel": (6, 5), "bias": (5,)}, "fc": {"kernel": (5, tiny.CLASSES), "bias": (tiny.CLASSES,)}}
    assert parts == heads()[0]  # equal heads are one object: their programs are shared
    smooth = Term(name="smooth", loss=CrossEntropy(label_smoothing=0.1))
    own = Self(form="heads").stages(tiny.setting(smooth, DEEP))[0].terms
    assert [t.name for t in own if t.name.startswith("smooth")] == ["smooth_head_hidden1", "smooth_head_hidden2", "smooth"]


def test_a_head_is_pooling_and_two_linear_layers():
    features = {
        "stage1": jnp.asarray(np.random.default_rng(0).normal(size=(4, 3, 3, 2)), jnp.float32),
        "embedding": jnp.ones((4, 5)),
    }
    model = head_model("stage1", 3)
    params, state = model.init(jax.random.key(0), features)
    out, after = model.apply(params, state, features, train=True)
    p = jax.tree.map(np.asarray, params)
    hidden = np.maximum(np.asarray(features["stage1"]).mean((1, 2)) @ p["hidden"]["kernel"] + p["hidden"]["bias"], 0)
    np.testing.assert_allclose(out.logits, hidden @ p["fc"]["kernel"] + p["fc"]["bias"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(out.features["embedding"], hidden, rtol=1e-5, atol=1e-6)
    assert after == {} and set(out.features) == set(features)
    assert head_model("stage1", 3) is model
    np.testing.assert_allclose(model.head(params, out.features["embedding"]), out.logits, rtol=1e-5)


def test_heads_and_body_learn_from_the_heads_terms_and_the_deepest_logits_do_not():
    parts, stage, state = heads()
    batch = tiny.batch()

    def total(moved, terms):
        some = dataclasses.replace(stage, terms=tuple(t for t in stage.terms if t.name in terms))
        params = {**state.params, **moved}
        return forward_pass(parts, some, params, state.model_state, {}, {}, batch, jax.random.key(0)).total

    gradient = jax.grad(total)(trained(stage, state.params), ("kd_head_hidden2_from_student",))
    norms = {name: float(sum(jnp.abs(leaf).sum() for leaf in jax.tree.leaves(tree))) for name, tree in gradient.items()}
    body = {name: float(jnp.abs(layer["kernel"]).sum()) for name, layer in gradient["student"].items()}
    assert norms["head_hidden2"] > 1e-3 and norms["head_hidden1"] == 0
    assert body["fc1"] > 1e-5 and body["fc2"] > 1e-5 and body["fc3"] == body["fc"] == 0
    z_t = DEEP.apply(state.params["student"], {}, batch["inputs"])[0]

    def by_hand(params):
        features = DEEP.apply(params["student"], {}, batch["inputs"])[0].features
        out = head_model("hidden2", tiny.CLASSES).apply(params["head_hidden2"], {}, features)[0]
        return 0.7 * KD(temperature=3.0)({}, out, Outputs(z_t.logits, {}), batch).mean()

    expected = jax.grad(by_hand)({name: state.params[name] for name in ("student", "head_hidden2")})
    tiny.assert_close({name: gradient[name] for name in expected}, expected, rtol=1e-4, atol=1e-6)
    new, _ = step_once(parts, stage, state, {})
    for name in stage.trains:
        assert np.any(new.params[name]["fc"]["kernel"] != state.params[name]["fc"]["kernel"])


def test_a_feature_loss_lies_between_embeddings():
    hint = Term(
        name="hint", teacher="teacher", loss=Hint(student_layer="embedding", teacher_layer="embedding", regressor="none")
    )
    parts, stage, state = heads(distil=hint)
    _, metrics = step_once(parts, stage, state, {})
    assert float(metrics["hint_head_hidden1_from_student"]) > 1e-3


def test_networks_of_one_layer_have_no_head():
    with pytest.raises(
        UsageError, match=r"^scheme\.form=heads needs a student of at least two stages or hidden layers, such as"
    ):
        head_layers(abstract(tiny.STUDENT, tiny.data()["inputs"]))


def test_heads_are_left_out_of_the_artifact(tmp_path):
    small = (("data.examples", 100), ("optim.epochs", 2), ("optim.batch_size", 8), ("evaluate.latency", False))
    given = tiny.config(*small, ("student.widths", [6, 5]), ("scheme.form", "heads"), scheme="self", teacher="none")
    result = run(given, tmp_path / "run", choices={})
    params, _, about = read_artifact(tmp_path / "run" / "artifact.safetensors")
    assert set(params) == {"fc1", "fc2", "fc"} and about["student"]["name"] == "mlp"
    assert result["teacher"] is None and result["metrics"]["train"]["cross_entropy_head_hidden1"] > 0


# -- average


def test_the_average_is_a_loop_over_the_recorded_students():
    scheme = Self(form="average", decay=0.6)
    (stage,) = scheme.stages(tiny.setting())
    assert stage.averages == (Average(name="average", decay=0.6),) and stage.trains == ("student",)
    assert [(t.name, t.teacher) for t in stage.terms] == [("cross_entropy", None), ("kd_from_average", "average")]
    with jax.enable_x64(True):
        parts = tiny.parts(teacher=None, scheme=scheme)
        stage = tiny.as_float64(stage)
        state = begin(parts, stage, {}, np.float64)
        expected = jax.tree.map(np.array, state.params["average"])
        assert np.any(expected["fc"]["kernel"] != state.params["student"]["fc"]["kernel"])
        decays = []
        for step in range(16):
            state, _ = step_once(parts, stage, state, {}, **tiny.batch(seed=step, dtype=np.float64))
            decay = min(0.6, float(np.float32(1 + step) / np.float32(10 + step)))  # the rise is in float32
            expected = jax.tree.map(lambda a, s, d=decay: d * a + (1 - d) * np.asarray(s), expected, state.params["student"])
            tiny.assert_close(state.params["average"], expected, rtol=1e-10, atol=1e-13)
            decays.append(decay)
        assert decays[0] < 0.11 < 0.6 == decays[-1]


def test_the_average_teaches_and_is_taught_nothing():
    scheme = Self(form="average", decay=0.5)
    parts, stage = tiny.parts(tiny.DROPPING, teacher=None, scheme=scheme), as_leaves(scheme.stages(tiny.setting())[0])
    state, batch = begin(parts, stage, {}), tiny.batch()
    assert set(trained(stage, state.params)) == {"student", "loss"}

    def total(average):
        params = {**state.params, "average": average}
        return forward_pass(parts, stage, params, state.model_state, {}, {}, batch, jax.random.key(0)).total

    assert not any(np.any(leaf) for leaf in jax.tree.leaves(jax.grad(total)(state.params["average"])))
    other = jax.tree.map(lambda leaf: 2 * leaf, state.params["average"])
    assert float(total(other)) != float(total(state.params["average"]))


def test_running_statistics_are_averaged_too():
    network = tiny.CONVOLUTIONAL
    scheme = Self(form="average", decay=0.0)
    parts, stage = tiny.parts(network, teacher=None, scheme=scheme), as_leaves(scheme.stages(tiny.setting(None, network))[0])
    state = begin(parts, stage, {})
    before = jax.tree.map(np.array, state.model_state["student"])
    new, _ = step_once(parts, stage, state, {})
    assert_same_bits(new.params["average"], new.params["student"])
    assert_same_bits(new.model_state["average"], new.model_state["student"])
    assert np.any(new.model_state["student"]["batch_stats"]["norm1"]["mean"] != before["batch_stats"]["norm1"]["mean"])
