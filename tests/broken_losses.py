"""Losses that break one promise each, with the property that finds it and what it says; and sound ones."""

import jax
import jax.numpy as jnp
import numpy as np

from jdistill import sampling
from jdistill.errors import UsageError
from jdistill.losses import Loss
from jdistill.pytrees import pytree, static


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
