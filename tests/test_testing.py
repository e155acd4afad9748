"""The conformance kit: losses broken on purpose fail the property they break, and no other."""

import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdistill.errors import UsageError
from jdistill.losses import KD, Hint
from jdistill.pytrees import pytree
from jdistill.testing import PROPERTIES, Check, assert_conforms, check_loss
from jdistill.testing.derivatives import hold_stopped, slopes
from jdistill.testing.schemes import Refused, train_under
from jdistill.types import Outputs
from tests.broken_losses import BROKEN, BROKEN_ON_REQUESTS, UNTRAINABLE, Drawing, NotZero, Sound
from tests.e2e.helpers import call
from tests.marks import slow_but

QUICK_TO_TRY = ("shapes", "state", "per_example", "no_recompile", "declared", "networks")


def failed(checks):
    return {check.name: check.detail for check in checks if not check.passed}


ONE_EACH = (
    "Scalar", "RootAtZero", "WrongGradient", "NotZero", "Moody", "Baked", "Counting", "Leaking", "Unguarded", "Calling",
    "Growing", "Crashing",
)  # fmt: skip
"""A broken loss for each property."""


@pytest.mark.parametrize("loss", slow_but(ONE_EACH, {loss.__name__: loss for loss in BROKEN}))
def test_a_broken_loss_fails_what_it_breaks(loss):
    name, message = BROKEN[loss]
    found = failed(check_loss(loss))
    assert set(found) == ({name, "schemes"} if loss in UNTRAINABLE else {name})
    assert re.search(message, found[name]) and "\n" not in found[name]


@pytest.mark.parametrize("loss", BROKEN_ON_REQUESTS, ids=lambda loss: loss.__name__)
def test_a_broken_loss_on_requests_fails_what_it_breaks(loss):
    name, message = BROKEN_ON_REQUESTS[loss]
    found = failed(check_loss(loss, only=QUICK_TO_TRY))
    assert set(found) == {name}
    assert re.search(message, found[name]) and "\n" not in found[name]


@pytest.mark.slow
def test_a_sound_loss_on_requests_passes():
    checks = check_loss(Drawing, scale=2.0)
    assert [check.name for check in checks] == list(PROPERTIES) and not failed(checks)
    assert {check.name for check in checks if check.skipped} <= {"sharded"}
    details = {check.name: check.detail for check in checks}
    assert details["declared"].endswith("reads_requests = True")
    assert re.match(r"\d+ settings of all schemes, traced; on requests refused under .*online", details["schemes"])


def test_a_loss_whose_draws_always_fail_is_not_taken_for_one_that_schemes_refuse():
    @pytree
    class Refusing(Drawing):
        def draw(self, key, known, user):
            raise UsageError("no")

    with pytest.raises(UsageError, match="no"):
        train_under({"name": "offline"}, Refusing())
    with pytest.raises(Refused, match="draws from the ranking of a frozen teacher"):
        train_under({"name": "online"}, Refusing())


def test_a_sound_loss_passes_and_every_property_is_reported():
    checks = check_loss(Sound, scale=2.0)
    assert [check.name for check in checks] == list(PROPERTIES) and not failed(checks)
    skipped = {check.name for check in checks if check.skipped}
    assert skipped <= {"sharded", "schemes"}
    assert str(Check("jit", False, "why")) == "FAIL jit              why"


def test_what_a_class_denies_is_asked_of_its_default_settings_alone():
    found = check_loss(Hint(regressor="none"), only=["zero_at_teacher", "per_example"])
    assert not failed(found) and [check.name for check in found] == ["zero_at_teacher", "per_example"]


def test_assert_conforms():
    assert_conforms(KD(temperature=2.0), only=["shapes", "jit"])
    with pytest.raises(AssertionError, match=r"does not conform:\nFAIL zero_at_teacher  zero_at_teacher = True, but"):
        assert_conforms(NotZero, only=["zero_at_teacher", "shapes"])


@pytest.mark.parametrize(
    ("loss", "options", "message"),
    [
        ("kdd", {}, "unknown loss 'kdd'; did you mean 'kd'?"),
        ("kd", {"temprature": 2.0}, "did you mean 'temperature'?"),
        ("kd", {"only": ["shape"]}, "unknown property 'shape'; did you mean 'shapes'?"),
        (KD(), {"temperature": 2.0}, "without further options"),
        (dict, {}, "loss must be a name"),
    ],
)
def test_wrong_requests(loss, options, message):
    with pytest.raises(UsageError) as error:
        check_loss(loss, **options)
    assert message in str(error.value)


def test_what_is_stopped_is_held_fixed():
    """By hand: d/dx of stop(x^2) x is x^2, not 3 x^2; inside jit too."""
    with jax.enable_x64(True):
        x = jnp.array([1.5, -0.5])

        def function(x):
            return (jax.lax.stop_gradient(x**2) * x + jax.jit(lambda y: jax.lax.stop_gradient(y) * y)(x)).sum()

        held = hold_stopped(function, x)
        gradient = jax.grad(function)(x)
        np.testing.assert_allclose(gradient, x**2 + x)
        assert np.isclose(held(x), function(x), rtol=1e-14)
        assert np.isclose(*slopes(held, gradient, x, seed=0), rtol=1e-8)
        assert not np.isclose(*slopes(function, gradient, x, seed=0), rtol=1e-2)
        assert hold_stopped(lambda x: (x**2).sum(), x) is None


def test_outputs_of_the_networks_agree_with_calling_them():
    from jdistill.testing.problem import make_problem

    problem = make_problem(Sound())
    context = problem.context(problem.arrays)
    for outputs, network in ((context.student, context.student_network), (context.teacher, context.teacher_network)):
        called = network.outputs(context.batch["inputs"])
        assert isinstance(called, Outputs)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), outputs, called)
        np.testing.assert_allclose(network.head(outputs.features["embedding"]), outputs.logits, rtol=1e-5, atol=1e-6)


def test_command(tmp_path, monkeypatch):
    done = call("check-loss", "logit_mse", "loss.reduction=half_sum", "only=shapes,declared")
    assert done.code == 0 and done.err == ""
    assert done.out.splitlines()[0] == "ok   shapes           values [B], float32" and len(done.out.splitlines()) == 2
    wrong = call("check-loss", "kdd")
    assert wrong.code == 2 and wrong.error_lines == [line for line in wrong.err.splitlines() if "did you mean 'kd'" in line]
    assert call("check-loss").code == 2 and call("check-loss", "kd", "--all").code == 2
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_broken.py").write_text(
        "from jdistill.losses import Loss, loss\nfrom jdistill.pytrees import pytree\n\n\n"
        "@loss('my_broken')\n@pytree\nclass Broken(Loss):\n    '''Broken.'''\n\n"
        "    def __call__(self, params, student, teacher, batch):\n        return student.logits.mean()\n"
    )
    command = [sys.executable, "-m", "jdistill", "check-loss", "my_broken", "plugins=[my_broken]"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""}, check=False)
    assert done.returncode == 1 and done.stderr == ""
    assert done.stdout.startswith("FAIL shapes           values are float32[] for outputs in float32, expected float32[4]")


@pytest.mark.slow
def test_a_batch_over_two_devices():
    """The command makes two devices of the CPU. A loss that draws its own numbers gives others in the second program."""
    code = (
        "from jdistill.checking import _two_devices; _two_devices()\n"
        "import jax; from jdistill.testing import check_loss; from tests.broken_losses import Moody\n"
        "print(len(jax.devices()))\n"
        "for loss in ('kd', 'sp', 'mgd', Moody): print(*check_loss(loss, only=['sharded']))\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    *sound, moody = done.stdout.splitlines() or [done.stderr]
    assert sound == ["2", *["ok   sharded          2 devices = one"] * 3]
    assert moody.startswith("FAIL sharded          values on 2 devices differ from one's by")
