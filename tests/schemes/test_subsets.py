"""Few labels, and classes one group after another."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from jdistill.errors import UsageError
from jdistill.fit import fit_one as fit
from jdistill.losses import KD, CrossEntropy
from jdistill.losses.wrappers import OnClasses
from jdistill.method import Method, Rows
from jdistill.pytrees import as_leaves
from jdistill.registry import build
from jdistill.run import run
from jdistill.schemes import Continual, Semi
from jdistill.types import Context, Outputs
from tests import tiny
from tests.schemes.common import begin, step_once
from tests.tiny import assert_same_bits

# -- few labels


@pytest.mark.parametrize("labelled", [0.1, 0.5, 1.0])
def test_as_many_of_each_class_are_labelled(labelled):
    label = np.random.default_rng(0).permutation(np.repeat([0, 1, 2, 7], [50, 20, 10, 1]))
    mask = Semi(labelled=labelled).arrays(label)["labelled"]
    assert mask.dtype == bool and mask.shape == label.shape
    found = {value: int(mask[label == value].sum()) for value in (0, 1, 2, 7)}
    assert found == {0: round(50 * labelled), 1: round(20 * labelled), 2: round(10 * labelled), 7: 1}


def test_which_are_labelled_is_drawn_by_the_seed():
    label = np.arange(200) % 4
    first, again, other = (Semi(seed=seed).arrays(label)["labelled"] for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.any(first != other) and first.sum() == other.sum() == 20


@pytest.mark.parametrize(("labelled", "message"), [(0.0, "positive"), (1.5, "at most 1, got 1.5"), (-1.0, "positive")])
def test_bad_fractions(labelled, message):
    with pytest.raises(UsageError, match=rf"^scheme\.labelled must be {message}"):
        build("scheme", {"name": "semi", "labelled": labelled})


def test_only_labelled_rows_contribute_to_the_task():
    (stage,) = Semi().stages(tiny.setting(kind="sgd"))
    assert [(t.name, t.where) for t in stage.terms] == [("cross_entropy", "labelled"), ("kd", None)]
    parts, stage, frozen = tiny.parts(), as_leaves(stage), tiny.frozen()
    mask = np.array([True, False, False, True, False, True, False, False])
    state = begin(parts, stage, frozen, labelled=np.zeros(tiny.EXAMPLES, bool))
    batch = tiny.batch()
    new, metrics = step_once(parts, stage, state, frozen, labelled=mask)
    logits = tiny.STUDENT.apply(state.params["student"], {}, batch["inputs"])[0]
    values = np.asarray(CrossEntropy()({}, logits, None, batch))
    np.testing.assert_allclose(metrics["cross_entropy"] / 8, sum(values[i] for i in (0, 3, 5)) / 3, rtol=1e-5)

    def with_label(row):
        label = np.array(batch["label"])
        label[row] = (label[row] + 1) % tiny.CLASSES
        return step_once(parts, stage, state, frozen, labelled=mask, label=label)[0].params

    assert_same_bits(with_label(1), new.params)  # what no label is known of
    assert np.any(with_label(3)["student"]["fc"]["kernel"] != new.params["student"]["fc"]["kernel"])


def test_a_batch_without_labels_teaches_by_the_teacher_alone():
    parts, frozen = tiny.parts(), tiny.frozen()
    stage = as_leaves(Semi().stages(tiny.setting())[0])
    state = begin(parts, stage, frozen, labelled=np.zeros(tiny.EXAMPLES, bool))
    new, metrics = step_once(parts, stage, state, frozen, labelled=np.zeros(8, bool))
    alone = dataclasses.replace(stage, terms=stage.terms[1:])
    expected, _ = step_once(parts, alone, begin(parts, alone, frozen), frozen)
    assert float(metrics["cross_entropy"]) == 0
    tiny.assert_close(new.params["student"], expected.params["student"], rtol=1e-6)


# -- classes one group after another

OLD = (0, 2)


def test_stages_rows_and_groups():
    scheme = Continual(old=OLD, heads="all")
    assert scheme.frozen() == {} and scheme.trained() == {"old": ("student", {})}
    first, second = scheme.stages(tiny.setting())
    assert (first.name, first.trains, first.rows, first.starts) == ("old", ("old",), Rows(keep=OLD), ())
    assert [(t.name, t.learner, t.teacher) for t in first.terms] == [("cross_entropy_old", "old", None)]
    assert (second.name, second.trains, second.rows) == ("new", ("student",), Rows(omit=OLD))
    assert second.starts == (("student", "old"),)
    assert [(t.name, t.teacher) for t in second.terms] == [("cross_entropy", None), ("kd_from_old", "old")]
    assert second.terms[1].loss == OnClasses(of=KD(temperature=3.0), classes=OLD)
    assert scheme.groups(3) == {"old": OLD, "new": (1,)} and Continual().groups(5) == {"old": (0, 1), "new": (2, 3, 4)}
    plain = scheme.stages(tiny.setting(loss=False))
    assert [t.name for t in plain[1].terms] == ["cross_entropy"]


@pytest.mark.parametrize("old", [(0, 1, 2), (3,), (-1,), (0, 5)])
def test_bad_groups(old):
    with pytest.raises(UsageError, match=r"^old must be some but not all of the 3 classes 0 to 2, got \["):
        Continual(old=old, heads="all").stages(tiny.setting())


def test_labels_are_learned_among_the_logits_of_their_group():
    setting = tiny.setting()._replace(classes=4)
    first, second = Continual(old=(0, 3)).stages(setting)
    assert first.terms[0].loss == OnClasses(of=CrossEntropy(), classes=(0, 3))
    assert second.terms[0].loss == OnClasses(of=CrossEntropy(), classes=(1, 2))
    with pytest.raises(UsageError, match=r"^old must leave two classes in each group, got \[0, 1, 2\] and \[3\]; or heads=all"):
        Continual(old=(0, 1, 2)).stages(setting)
    logits, label = np.random.RandomState(0).randn(6, 4).astype(np.float32), np.array([0, 3, 3, 0, 3, 0], np.int32)
    context = Context(student=Outputs(logits, {}), teacher=None, batch={"label": label}, key=None, student_network=None)
    values, _ = first.terms[0].loss.evaluate({}, {}, context)
    pair = logits[:, [0, 3]]
    expected = np.log(np.exp(pair).sum(1)) - pair[np.arange(6), (label == 3).astype(int)]
    np.testing.assert_allclose(values, expected, rtol=1e-5)


@pytest.mark.parametrize("of", [KD(temperature=2.0), CrossEntropy()])
def test_a_loss_on_some_classes_sees_no_other_logit(of):
    student, teacher = (
        model.apply(*model.init(jax.random.key(seed), tiny.data()["inputs"]), tiny.batch()["inputs"])[0]
        for seed, model in enumerate((tiny.STUDENT, tiny.TEACHER))
    )
    loss, key = OnClasses(of=of, classes=OLD), jax.random.key(0)
    context = Context(student=student, teacher=teacher, batch=tiny.batch(), key=key, student_network=None)

    def values(logits):
        return loss.evaluate({}, {}, context._replace(student=student._replace(logits=logits)))[0]

    gradient = np.asarray(jax.grad(lambda logits: values(logits).sum())(student.logits))
    assert np.all(gradient[:, 1] == 0) and np.any(gradient[:, OLD] != 0)
    z, t = (np.asarray(out.logits, np.float64)[:, OLD] for out in (student, teacher))
    if isinstance(of, KD):
        p, q = (np.exp(x / 2) / np.exp(x / 2).sum(1, keepdims=True) for x in (t, z))
        expected = 4 * (p * np.log(p / q)).sum(1)
    else:  # the label is the teacher's answer among them
        expected = [np.log(np.exp(row).sum()) - row[answer] for row, answer in zip(z, t.argmax(1), strict=True)]
    np.testing.assert_allclose(values(student.logits), expected, rtol=1e-4)


def test_the_student_begins_as_the_old_network_and_neither_sees_the_others_classes(tmp_path):
    scheme = Continual(old=OLD, heads="all")
    own, parts, data = tiny.method(scheme=scheme, epochs=2), tiny.parts(teacher=None, scheme=scheme), tiny.data()
    whole = fit(tiny.setup(tmp_path / "whole", own, parts=parts, frozen={}, checkpoints=None)).state
    first = fit(tiny.setup(tmp_path / "first", Method(stages=own.stages[:1]), parts=parts, frozen={}, checkpoints=None)).state
    assert_same_bits(whole.params["old"], first.params["old"])  # frozen in the second stage
    assert np.any(whole.params["student"]["fc"]["kernel"] != whole.params["old"]["fc"]["kernel"])
    steps = [json.loads(line)["step"] for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    olds = int(np.isin(data["label"], OLD).sum())
    per_epoch = (olds // 8, (tiny.EXAMPLES - olds) // 8)
    assert steps == list(np.cumsum([per_epoch[0]] * 2 + [per_epoch[1]] * 2))

    def changed(rows, name):
        """Whether another picture at `rows` changes the network `name`."""
        inputs = np.array(data["inputs"])
        inputs[rows] += 1
        again = tiny.setup(tmp_path / "again", own, parts=parts, frozen={}, checkpoints=None, data={**data, "inputs": inputs})
        again = fit(again).state.params[name]
        return bool(np.any(again["fc"]["kernel"] != whole.params[name]["fc"]["kernel"]))

    new_rows, old_rows = np.flatnonzero(data["label"] == 1), np.flatnonzero(data["label"] != 1)
    assert (changed(new_rows, "old"), changed(old_rows, "old"), changed(new_rows, "student")) == (False, True, True)
    stage = as_leaves(own.stages[1])
    entered = begin(parts, stage, {})
    assert_same_bits(entered.params["student"], entered.params["old"])
    assert entered.params["student"]["fc"]["kernel"] is not entered.params["old"]["fc"]["kernel"]


def test_accuracy_is_reported_on_each_group_and_distillation_keeps_the_old_ones_apart(tmp_path):
    """Labels alone forget which of the old classes is which; among all classes only the new ones are answered."""
    small = (("data.examples", 400), ("data.classes", 4), ("data.separation", 3.0), ("evaluate.latency", False))
    shape = (("optim.batch_size", 16), ("optim.epochs", 12), ("optim.lr", 0.02), ("evaluate.predictions", True))
    among = {}
    for loss, extra in {"none": (), "kd": (("loss.temperature", 2.0),)}.items():
        own = (("scheme.old", [0, 3]), ("scheme.heads", "all"))
        given = tiny.config(*small, *shape, *extra, *own, loss=loss, scheme="continual", teacher="none")
        found = run(given, tmp_path / loss, choices={})["metrics"]["test"]
        with np.load(tmp_path / loss / "predictions.npz") as file:
            label, logits = file["label"], file["logits"]
        old, right = np.isin(label, (0, 3)), logits.argmax(1) == label
        assert (found["accuracy_old"], found["accuracy_new"]) == pytest.approx((right[old].mean(), right[~old].mean()))
        among[loss] = (np.array([0, 3])[logits[old][:, [0, 3]].argmax(1)] == label[old]).mean()
        assert found["accuracy_within_old"] == pytest.approx(among[loss]) and found["accuracy_within_new"] > 0.8
    assert among["kd"] > among["none"] + 0.05
