"""The conformance kit: losses broken on purpose fail the property they break, and no other."""

import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdistill import sampling
from jdistill.errors import UsageError
from jdistill.losses import KD, Hint, Loss
from jdistill.pytrees import pytree, static
from jdistill.testing import PROPERTIES, Check, assert_conforms, check_loss
from jdistill.testing.derivatives import hold_stopped, slopes
from jdistill.testing.schemes import Refused, train_under
from jdistill.types import Outputs
from tests.e2e.helpers import call
from tests.marks import slow_but


def needs(teacher):
    if teacher is None:
        raise UsageError("this loss needs a teacher")
    return teacher


@pytree
class Sound(Loss):
    """The squared difference of the logits, `scale` times: keeps every promise."""

    scale: float = 0.5

    def init(self, key, student, teacher):
        needs(teacher)
        return {}

    def squares(self, student, teacher):
        wide = jnp.promote_types(student.logits.dtype, jnp.float32)
        return (student.logits.astype(wide) - needs(teacher).logits.astype(wide)) ** 2

    def __call__(self, params, student, teacher, batch):
        return self.scale * self.squares(student, teacher).mean(axis=-1)


@pytree
class Scalar(Sound):
    def __call__(self, params, student, teacher, batch):
        return super().__call__(params, student, teacher, batch).mean()


@pytree
class LowPrecision(Sound):
    def __call__(self, params, student, teacher, batch):
        return self.scale * ((student.logits - teacher.logits) ** 2).mean(axis=-1)


@pytree
class RootAtZero(Sound):
    """The derivative of the root is infinite where the student is the teacher."""

    def __call__(self, params, student, teacher, batch):
        return jnp.sqrt(self.scale * self.squares(student, teacher).mean(axis=-1))


@pytree
class Overflowing(Sound):
    def __call__(self, params, student, teacher, batch):
        return jnp.expm1(super().__call__(params, student, teacher, batch))


@jax.custom_jvp
def wrong_square(x):
    return x**2


wrong_square.defjvp(lambda x, t: (wrong_square(x[0]), 3 * x[0] * t[0]))


@pytree
class WrongGradient(Sound):
    def __call__(self, params, student, teacher, batch):
        return self.scale * wrong_square(jnp.sqrt(1 + self.squares(student, teacher))).mean(axis=-1) - self.scale


@pytree
class NotZero(Sound):
    def __call__(self, params, student, teacher, batch):
        return super().__call__(params, student, teacher, batch) + 1


@pytree
class ZeroAfterAll(Sound):
    zero_at_teacher = False


@pytree
class Moody(Loss):
    """Its random numbers come from NumPy, so a compiled program repeats the first ones for ever."""

    def init(self, key, student, teacher):
        needs(teacher)
        return {}

    def __call__(self, params, student, teacher, batch):
        return np.random.rand() * Sound().squares(student, teacher).mean(axis=-1)


@pytree
class Baked(Sound):
    scale: float = static(default=0.5)


@pytree
class Branching(Sound):
    def __call__(self, params, student, teacher, batch):
        return (self.scale if self.scale > 0.1 else 0.1) * self.squares(student, teacher).mean(axis=-1)


@pytree
class Counting(Sound):
    """Mixes the numbers of a group when it sees several at once."""

    @staticmethod
    @jax.custom_batching.custom_vmap
    def first(scale):
        return scale

    def __call__(self, params, student, teacher, batch):
        return Counting.first(self.scale) * self.squares(student, teacher).mean(axis=-1)


Counting.first.def_vmap(lambda size, batched, scale: (jnp.broadcast_to(scale[0], scale.shape), True))


@pytree
class Leaking(Sound):
    def __call__(self, params, student, teacher, batch):
        squares = self.squares(student, teacher)
        return self.scale * squares.mean(axis=-1) / (1 + squares.mean())


@pytree
class NotRelational(Sound):
    per_example = False


@pytree
class Unguarded(Sound):
    def init(self, key, student, teacher):
        return {}


@pytree
class SecretlyTaught(Sound):
    needs_teacher = False


@pytree
class Calling(Sound):
    def evaluate(self, params, state, context):
        return self({}, context.student, context.teacher_network.outputs(context.batch["inputs"]), context.batch), state


@pytree
class CallsNothing(Sound):
    calls_networks = True


@pytree
class Remembering(Sound):
    def evaluate(self, params, state, context):
        shift = context.initial.logits.astype(jnp.float32)
        student = context.student._replace(logits=context.student.logits + (shift - shift).astype(context.student.logits.dtype))
        return self({}, student, context.teacher, context.batch), state


@pytree
class Growing(Sound):
    def init_state(self, key, student, teacher, label):
        return {"mean": jnp.zeros(())}

    def evaluate(self, params, state, context):
        values, _ = super().evaluate(params, state, context)
        return values, {**state, "last": jnp.zeros(())}


@pytree
class Crashing(Sound):
    """Reads a stage without asking whether there is one."""

    def __call__(self, params, student, teacher, batch):
        return super().__call__(params, student, teacher, batch) + 0 * student.features["stage1"].mean(dtype=jnp.float32)


BROKEN = {
    Scalar: ("shapes", r"values are float32\[\] for outputs in float32, expected float32\[4\]: one an example"),
    LowPrecision: ("shapes", r"values are bfloat16\[4\] for outputs in bfloat16, expected float32\[4\]"),
    RootAtZero: ("finite", r"gradients.*logits at student = teacher, float32, K = 3; expected finite numbers"),
    Overflowing: ("finite", r"(state|values|gradients).* at both large"),
    WrongGradient: ("gradients", r"the slope along the student is .*, expected .* by finite differences"),
    NotZero: ("zero_at_teacher", r"zero_at_teacher = True, but values reach 1 at the teacher's outputs, expected 0"),
    ZeroAfterAll: ("zero_at_teacher", r"zero_at_teacher = False, but values are 0 .*; declare True"),
    Moody: ("jit", r"two calls with the same key differ by .*; draw random numbers from context.key"),
    Baked: ("no_recompile", r"scale is a number but static"),
    Branching: ("no_recompile", r"TracerBoolConversionError"),
    Counting: ("vmap", r"values under vmap differ from a loop's by"),
    Leaking: ("per_example", r"per_example = True, but a value moves by .* with the other examples, expected 0"),
    NotRelational: ("per_example", r"per_example = False, but a value does not move .*; declare True"),
    Unguarded: ("needs_teacher", r"init accepts that there is no teacher, expected a UsageError"),
    SecretlyTaught: ("needs_teacher", r"needs_teacher = False, but it cannot be evaluated without one; declare True"),
    Calling: ("declared", r"calls_networks = False, but it does; declare calls_networks = True"),
    CallsNothing: ("declared", r"calls_networks = True, but it does not; declare calls_networks = False"),
    Remembering: ("declared", r"reads_initial = False, but it does; declare reads_initial = True"),
    Growing: ("state", r"the next state's \['last'\] is float32\[\], expected absent as before"),
    Crashing: ("networks", r"networks without maps: KeyError: 'stage1'; expected values, or a UsageError from init"),
}


UNTRAINABLE = {Branching, SecretlyTaught, Remembering}
"""What cannot be traced in a training either, so that no scheme runs."""


@pytree
class Drawing(Loss):
    """Each of the teacher's best items above one that it does not rank; keeps every promise."""

    zero_at_teacher = False
    reads_requests = True

    scale: float = 0.5
    top: int = static(default=3)

    drawn = property(lambda self: 2 * self.top)
    ranking = property(lambda self: (self.top, 0))

    def draw(self, key, known, user):
        others = sampling.uninteresting(key, known, user, self.top)
        return jnp.concatenate([known.ranking.items[user, : self.top], others], axis=1)

    def __call__(self, params, student, teacher, batch):
        best, others = jnp.split(student.logits.astype(jnp.promote_types(student.logits.dtype, jnp.float32)), 2, axis=1)
        return self.scale * jax.nn.softplus(others - best).mean(axis=-1)


@pytree
class DrawsTooFew(Drawing):
    def draw(self, key, known, user):
        return super().draw(key, known, user)[:, 1:]


@pytree
class DrawsBeyond(Drawing):
    def draw(self, key, known, user):
        return super().draw(key, known, user) + known.items


@pytree
class DrawsUndeclared(Drawing):
    reads_requests = False


@pytree
class DrawsByBranch(Drawing):
    """A number that is a leaf decides in Python what is drawn."""

    def draw(self, key, known, user):
        return super().draw(key if self.scale > 0.1 else jax.random.fold_in(key, 1), known, user)


@pytree
class AsksUndeclared(Sound):
    def __call__(self, params, student, teacher, batch):
        return super().__call__(params, student, teacher, batch) * (batch["inputs"]["user"] >= 0)


@pytree
class AsksNothing(Sound):
    reads_requests = True


@pytree
class CountsOnce(Drawing):
    """A user that stands in an earlier row counts 0, which is undeclared."""

    def __call__(self, params, student, teacher, batch):
        first = sampling.first_occurrence(batch["inputs"]["user"])
        return jnp.where(first, super().__call__(params, student, teacher, batch), 0)


BROKEN_ON_REQUESTS = {
    DrawsTooFew: ("shapes", r"draw gives int32\[4, 5\], expected int32\[4, 6\]: `drawn` items a row"),
    DrawsBeyond: ("shapes", r"draw gives \d+ to \d+, expected numbers of the 40 items"),
    DrawsUndeclared: ("declared", r"reads_requests = False, but it does; declare reads_requests = True"),
    DrawsByBranch: ("no_recompile", r"TracerBoolConversionError"),
    AsksUndeclared: ("declared", r"reads_requests = False, but it does; declare reads_requests = True"),
    AsksNothing: ("declared", r"reads_requests = True, but it does not; declare reads_requests = False"),
    CountsOnce: ("per_example", r"per_example = True, but a value moves by .* with the other examples, expected 0"),
}
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
        "import jax; from jdistill.testing import check_loss; from tests.test_testing import Moody\n"
        "print(len(jax.devices()))\n"
        "for loss in ('kd', 'sp', 'mgd', Moody): print(*check_loss(loss, only=['sharded']))\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    *sound, moody = done.stdout.splitlines() or [done.stderr]
    assert sound == ["2", *["ok   sharded          2 devices = one"] * 3]
    assert moody.startswith("FAIL sharded          values on 2 devices differ from one's by")
