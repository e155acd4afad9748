"""The parameters of a gate over several teachers, beside those of a loss."""

import jax.numpy as jnp
from jax import Array

from jdistill.losses.base import Loss, require_teacher
from jdistill.losses.wrappers import Wrapper
from jdistill.pytrees import pytree, static
from jdistill.types import Context, Outputs, PyTree


@pytree
class HoldsGate(Wrapper):
    """`of` as it is, with the parameters of a `LearnedGate` among its own: "weight" [M K, M] and "bias" [M], of zeros.

    Attributes:
      of: the loss.
      teachers: M, at least 2; each has K logits.
    """

    of: Loss
    teachers: int = static()

    def init(self, key: Array, student: Outputs, teacher: Outputs | None) -> PyTree:
        said = self.teachers * require_teacher(teacher).logits.shape[-1]
        gate = {"weight": jnp.zeros((said, self.teachers)), "bias": jnp.zeros(self.teachers)}
        return {"of": self.of.init(key, student, teacher), "gate": gate}

    def evaluate(self, params: PyTree, state: PyTree, context: Context) -> tuple[Array, PyTree]:
        return self.of.evaluate(params["of"], state, context)

    def hold(self, old: PyTree, new: PyTree) -> PyTree:
        return {"of": self.of.hold(old["of"], new["of"]), "gate": new["gate"]}
