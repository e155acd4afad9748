"""Terms, stages and schemes as data."""

import jax
import numpy as np
import pytest

from jdistill.errors import UsageError
from jdistill.losses import KD
from jdistill.method import Method, Offline, Residual, Stage, Term, TwoStage
from jdistill.optim import Optimizer
from jdistill.pytrees import as_leaves, structure_key
from jdistill.registry import build, options
from jdistill.teachers.targets import Difference, Live
from tests import tiny

OPTIM = Optimizer(epochs=7)


def test_offline_is_one_stage_of_all_terms():
    (stage,) = Offline().stages(tiny.TASK, tiny.kd(), OPTIM)
    assert (stage.name, stage.terms, stage.optim, stage.trains) == ("distil", (tiny.TASK, tiny.kd()), OPTIM, ("student",))
    (plain,) = Offline().stages(tiny.TASK, None, OPTIM)
    assert (plain.name, plain.terms) == ("train", (tiny.TASK,))


def test_two_stages_hint_first_then_task_and_soft_logits():
    scheme = TwoStage(init_epochs=3, temperature=2.5, kd_weight=0.4)
    hint = Term(name="hint", teacher="teacher", loss=KD(), weight=9.0)
    first, second = scheme.stages(tiny.TASK, hint, OPTIM)
    assert (first.terms, first.optim.epochs, first.optim.lr) == ((hint,), 3, OPTIM.lr)
    assert second.terms == (tiny.TASK, Term(name="kd", teacher="teacher", loss=KD(temperature=2.5), weight=0.4))
    assert second.optim == OPTIM
    assert TwoStage(kd_weight=0.0).stages(tiny.TASK, hint, OPTIM)[1].terms == (tiny.TASK,)


def test_residual_target_is_teacher_minus_initial_student():
    teacher, initial = tiny.frozen()["teacher"], tiny.STUDENT.init(jax.random.key(1), tiny.data()["inputs"])
    target, arrays = Residual().target(Live(tiny.TEACHER), teacher, tiny.STUDENT, initial)
    assert isinstance(target, Difference) and hash(target) == hash(Difference(Live(tiny.TEACHER), Live(tiny.STUDENT)))
    batch = tiny.batch()
    expected = [Live(m)(v, batch) for m, v in ((tiny.TEACHER, teacher), (tiny.STUDENT, initial))]
    found = target(arrays, batch)
    np.testing.assert_array_equal(found.logits, expected[0].logits - expected[1].logits)
    assert found.features.keys() == expected[0].features.keys()
    assert not Residual().target_is_teacher and Offline().target_is_teacher and TwoStage().target_is_teacher
    assert Residual().stages(tiny.TASK, tiny.kd(), OPTIM) == Offline().stages(tiny.TASK, tiny.kd(), OPTIM)
    assert Offline().target(Live(tiny.TEACHER), teacher, tiny.STUDENT, initial) == (Live(tiny.TEACHER), teacher)


@pytest.mark.parametrize("scheme", [TwoStage(), Residual()])
def test_schemes_that_need_a_loss_say_so(scheme):
    with pytest.raises(UsageError, match=r"^scheme=(two_stage|residual) needs a distillation loss.*; use loss="):
        scheme.stages(tiny.TASK, None, OPTIM)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Term(name="t", loss=KD(), weight=-0.1),
        lambda: Term(name="t", loss=KD(), weight=float("nan")),
        lambda: TwoStage(init_epochs=0),
        lambda: TwoStage(temperature=0.0),
        lambda: TwoStage(kd_weight=-1.0),
    ],
)
def test_bad_numbers_are_refused(make):
    with pytest.raises(UsageError, match=r"^(weight|init_epochs|temperature|kd_weight) must be "):
        make()


def test_registered_schemes():
    assert list(options("scheme")) == ["offline", "residual", "two_stage"]
    assert build("scheme", {"name": "two_stage", "kd_weight": 2.0}) == TwoStage(kd_weight=2.0)


def test_numbers_do_not_change_the_structure_of_a_method_and_everything_else_does():
    def key(scheme=None, distil=None, **optim):
        return structure_key(as_leaves(tiny.method(scheme=scheme, distil=distil, **optim)))

    base = key(milestones=(1.0, 2.0))
    same = [
        key(milestones=(2.0, 2.5)), key(milestones=(1.0, 2.0), lr=1.0, epochs=9, momentum=0.5),
        key(distil=tiny.kd(weight=2.0, temperature=9.0), milestones=(1.0, 2.0)),
    ]  # fmt: skip
    other = [
        key(), key(TwoStage()), key(batch_size=4, milestones=(1.0, 2.0)), key(kind="sgd", milestones=(1.0, 2.0)),
        key(distil=Term(name="kd2", teacher="teacher", loss=KD()), milestones=(1.0, 2.0)),
        key(distil=Term(name="kd", teacher="other", loss=KD()), milestones=(1.0, 2.0)),
    ]  # fmt: skip
    assert key(weight_decay=0.1) == key(weight_decay=0.2) != key(weight_decay=0)  # none is left out of the program
    assert all(k == base for k in same) and all(k != base for k in other) and len(set(other)) == len(other)


def test_with_epochs_changes_only_the_length():
    stage = Stage(name="s", terms=(tiny.TASK,), optim=OPTIM)
    assert stage.with_epochs(2) == Stage(name="s", terms=(tiny.TASK,), optim=Optimizer(epochs=2))
    assert stage.optim.epochs == 7 and jax.tree.leaves(Method(stages=(stage,))) == jax.tree.leaves(stage)
