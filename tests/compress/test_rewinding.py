"""Lottery tickets: whose mask it is, what the weights go back to, and how rounds follow one another."""

import json

import jax
import numpy as np
import pytest

from jdistill.compress import Training, apply_all
from jdistill.compress.artifact import read_artifact
from jdistill.compress.base import Stored, enter
from jdistill.compress.rewinding import Ticket
from jdistill.errors import UsageError
from jdistill.fit import fit_one
from jdistill.method import Method, Stage
from jdistill.registry import build
from jdistill.run import run
from jdistill.stages import init_state
from jdistill.train import Keys
from tests import tiny
from tests.reference import pruning as reference
from tests.tiny import assert_close, assert_same_bits

KEY = jax.random.key(0)
RANDOM = np.random.default_rng(0)


def drawn():
    return {"fc1": {"kernel": RANDOM.normal(size=(10, 5)).astype(np.float32), "bias": RANDOM.normal(size=5).astype(np.float32)}}


def steps(**changes):
    return build("compression", {"name": "lottery", **changes}).steps()


def test_rounds_prune_as_large_a_share_each():
    assert steps() == (Ticket(sparsity=0.5, recover_epochs=0), Training("recover", None))
    *_, last = found = steps(sparsity=0.875, rounds=3, recover_epochs=4, scope="global", only="fc*")
    assert [type(step) for step in found] == [Ticket, Training] * 3 and last == Training("recover", 4)
    np.testing.assert_allclose([step.sparsity for step in found[::2]], [0.5, 0.75, 0.875], rtol=1e-12)
    assert {(step.scope, step.only, step.rewinds, step.needs_training) for step in found[::2]} == {
        ("global", "fc*", True, True)
    }
    followed = steps(rounds=2, recover_epochs=0)  # as a pipeline gives it, where training follows
    assert [type(step) for step in followed] == [Ticket, Training, Ticket] and followed[1] == Training("recover", None)


def test_the_mask_is_the_trained_students_and_the_weights_are_the_first():
    first, trained = drawn(), drawn()
    ticket = Ticket(sparsity=0.6)
    stored = enter((ticket,), Stored(trained), KEY, first)
    mask = reference.without_smallest(np.abs(trained["fc1"]["kernel"]), 30)
    assert_same_bits(stored.params, first)
    acting = apply_all((ticket,), stored.params, stored.states)
    np.testing.assert_array_equal(acting["fc1"]["kernel"], first["fc1"]["kernel"] * mask)
    np.testing.assert_array_equal(acting["fc1"]["bias"], first["fc1"]["bias"])


def test_a_later_round_prunes_what_an_earlier_one_left():
    first, tickets = drawn(), tuple(step for step in steps(sparsity=0.9, rounds=3) if isinstance(step, Ticket))
    stored, gone = Stored(drawn()), np.zeros((10, 5), bool)
    for number in range(1, 4):
        stored = enter(tickets[:number], stored, KEY, first)
        kernel = np.asarray(apply_all(tickets[:number], stored.params, stored.states)["fc1"]["kernel"])
        assert np.all(kernel[gone] == 0)
        gone = kernel == 0
        assert gone.sum() == round((1 - 0.1 ** (number / 3)) * 50)
        np.testing.assert_array_equal(kernel[~gone], first["fc1"]["kernel"][~gone])
        stored = stored._replace(params=drawn())  # trained to something else


def test_training_begins_at_the_first_values_again(tmp_path):
    own, data = tiny.parts(tiny.CONVOLUTIONAL, augment=tiny.AUGMENT), tiny.data()
    ticket = Ticket(sparsity=0.5)
    still = tiny.optimizer(lr=1e-30, epochs=1)
    stages = (
        Stage(name="task", terms=(tiny.TASK,), optim=tiny.optimizer(epochs=2)),
        Stage(name="recover1", terms=(tiny.TASK,), optim=still, compressors=(ticket,)),
    )
    begun = init_state(own, Keys.of(0).init, {n: a[:1] for n, a in data.items()})
    first = jax.tree.map(np.array, begun.params["student"])
    fitted = fit_one(tiny.setup(tmp_path, Method(stages=stages), parts=own, checkpoints=None))
    trained = fit_one(tiny.setup(tmp_path, Method(stages=stages[:1]), parts=own, checkpoints=None)).variables[0]
    assert_close(fitted.variables[0], first, rtol=0, atol=1e-20)
    for name, mask in fitted.states[0].items():
        module, leaf = name.split("/")
        w = np.abs(np.asarray(trained[module][leaf]))
        np.testing.assert_array_equal(mask, reference.without_smallest(w, round(0.5 * w.size)))


def small(*sequence, **compression):
    given = tiny.config(
        ("data.examples", 100), ("optim.epochs", 3), ("optim.batch_size", 8), ("evaluate.latency", False), loss="none",
        compression="pipeline" if sequence else "lottery",
    )  # fmt: skip
    given["compression"] |= {"steps": list(sequence)} if sequence else compression
    return given


CASES = {
    "alone": ((), {"sparsity": 0.75, "rounds": 2}, [3, 3, 3], 0.75),
    "in a sequence": (
        ("distill", "nm_prune", {"name": "recover", "epochs": 1}, {"name": "lottery", "sparsity": 0.6}, "int8"),
        {},
        [3, 1, 1],
        0.6,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_deployed_has_the_sparsity(name, tmp_path):
    sequence, compression, epochs, sparsity = CASES[name]
    run(small(*sequence, **compression), tmp_path / "run", choices={})
    rows = [json.loads(line)["stage"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [rows.count(stage) for stage in dict.fromkeys(rows)] == epochs
    params, _, about = read_artifact(tmp_path / "run" / "artifact.safetensors")
    kernels = np.concatenate([layer["kernel"].ravel() for layer in params.values()])
    assert sparsity - 0.01 <= (kernels == 0).mean() <= sparsity + 0.04 and about["forms"] == []


def test_bad_numbers_and_no_training_are_one_line(tmp_path):
    for key, value in (("sparsity", 1.0), ("rounds", 0), ("recover_epochs", -1), ("scope", "all")):
        with pytest.raises(UsageError, match=rf"^compression\.{key} must be"):
            build("compression", {"name": "lottery", key: value})
    with pytest.raises(UsageError, match=r"^recover_epochs=0 leaves Ticket without training to act in"):
        run(small(recover_epochs=0), tmp_path / "run", choices={})
