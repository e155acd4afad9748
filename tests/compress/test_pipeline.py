"""Sequences of steps: what they expand to, the stages that follow, and one line for each mistake."""

import copy

import jax
import numpy as np
import pytest

from jdistill import blueprint
from jdistill.compress import Compressor, IntegerWeights, MagnitudePrune, Stored, Training, apply_all, enter, finished
from jdistill.errors import UsageError
from jdistill.pytrees import pytree
from jdistill.registry import build
from tests import tiny

DISTILL, TRAIN, RECOVER = Training("distill"), Training("train"), Training("recover", 5)
PRUNE, ALONE, INT8 = MagnitudePrune(recover_epochs=0), MagnitudePrune(), IntegerWeights()
KERNEL = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
PARAMS = {"fc": {"kernel": KERNEL, "bias": np.ones(4, np.float32)}}


def expanded(*steps):
    return build("compression", {"name": "pipeline", "steps": list(steps)}).steps()


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (["distill", "prune", "recover", "int8"], (DISTILL, PRUNE, RECOVER, INT8)),
        (["distill", "prune", "int8"], (DISTILL, ALONE, INT8)),
        (["prune"], (DISTILL, ALONE)),
        (["prune", "distill", "int8"], (TRAIN, PRUNE, DISTILL, INT8)),
        (["train", "prune", "distill"], (TRAIN, PRUNE, DISTILL)),
        (["distill"], (DISTILL,)),
        ([{"name": "train", "epochs": 2}, {"name": "distill", "epochs": 3}], (Training("train", 2), Training("distill", 3))),
        ([{"name": "prune", "sparsity": 0.9, "recover_epochs": 1}], (DISTILL, MagnitudePrune(sparsity=0.9, recover_epochs=1))),
        (["distill", {"name": "prune", "recover_epochs": 2}, "recover"], (DISTILL, MagnitudePrune(recover_epochs=2), RECOVER)),
    ],
)
def test_what_a_sequence_stands_for(given, wanted):
    assert expanded(*given) == wanted


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (["distill", "prun"], r"unknown step 'prun'; did you mean 'prune'\?"),
        (["distill", "pipeline"], "unknown step 'pipeline'"),
        (["distill", 3], "unknown step 3"),
        (["distill", "int8", "distill"], "must hold distill once, got it 2 times"),
        (["recover", "distill"], "must begin with distill, train or a compression step, got recover"),
        ([{"name": "recover", "epoch": 3}], "unknown key 'steps.recover.epoch'; did you mean 'epochs'"),
        ([{"name": "train", "epochs": 0}], "steps.train.epochs must be positive, got 0"),
        ([{"name": "prune", "sparsity": 2}], "sparsity must be at least 0 and below 1, got 2"),
        ([], r"must be a list such as \[distill, prune, recover, int8\], got \(\)"),
        ("prune", "must be a list such as"),
    ],
)
def test_mistakes_are_one_line(steps, message):
    with pytest.raises(UsageError, match=message) as error:
        build("compression", {"name": "pipeline", "steps": steps})
    assert "\n" not in str(error.value)


def stages(*steps, **changes):
    config = copy.deepcopy(tiny.config(compression="none", loss="kd", **changes))
    config["compression"] = {"name": "pipeline", "steps": list(steps)}
    return blueprint.read(config).method().stages


def test_every_training_has_its_stages_under_the_steps_before_it():
    found = stages("train", "prune", {"name": "distill", "epochs": 4}, "int8", "recover", scheme="two_stage")
    assert [stage.name for stage in found] == ["task", "hint", "distil", "recover1"]
    assert [stage.compressors for stage in found] == [(), (PRUNE,), (PRUNE,), (PRUNE, INT8)]
    assert [term.name for term in found[0].terms] == ["cross_entropy"] and found[3].terms == found[2].terms
    assert [int(stage.optim.epochs) for stage in found[1:]] == [5, 4, 5]


@pytree
class Doubling(Compressor):
    """Stores half of each weight, beside a mark: a form whose decoding can be told from its constraint."""

    def init(self, key, params):
        return {"fc/kernel": np.float32(2)}

    def encode(self, params, state):
        return {"fc": {**params["fc"], "kernel": {"half": params["fc"]["kernel"] / state["fc/kernel"]}}}

    def decode(self, params, state):
        return {"fc": {**params["fc"], "kernel": params["fc"]["kernel"]["half"] * state["fc/kernel"]}}

    def hold(self, name, value, state):
        return None if name in state else value


def test_later_constraints_act_on_the_stored_form_and_earlier_ones_are_baked_in():
    key = jax.random.key(0)
    for steps in ((PRUNE, Doubling()), (Doubling(), PRUNE), (PRUNE, Doubling(), INT8)):
        found = Stored(PARAMS)
        for i in range(len(steps)):
            found = enter(steps[: i + 1], found, key)
        effective = apply_all(steps, found.params, found.states)
        assert set(found.params["fc"]["kernel"]) == {"half"}
        wanted = np.where(np.abs(KERNEL) > np.sort(np.abs(KERNEL).ravel())[11], KERNEL, 0)
        scale = np.abs(wanted).max(axis=0) / 127 if INT8 in steps else 0
        np.testing.assert_allclose(effective["fc"]["kernel"], wanted, atol=scale.max() / 2 + 1e-6 if INT8 in steps else 1e-7)
        assert (np.asarray(effective["fc"]["kernel"]) == 0).sum() == 12
        # what an earlier mask knew of a leaf that is now stored otherwise is gone
        assert set(found.states[0]) == (set() if steps[0] is PRUNE else {"fc/kernel"})


def test_steps_without_training_are_taken_when_the_student_is_written():
    key = jax.random.key(0)
    found = finished((PRUNE, INT8), Stored(PARAMS), key)
    assert len(found.states) == 2
    once = finished((PRUNE, INT8), enter((PRUNE,), Stored(PARAMS), jax.random.fold_in(key, 0)), key)
    jax.tree.map(np.testing.assert_array_equal, found, once)
