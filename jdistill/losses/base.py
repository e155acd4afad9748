"""The loss contract and its decorator."""

from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

from jax import Array

from jdistill.registry import register
from jdistill.types import Batch, Outputs, PyTree

L = TypeVar("L", bound="type[Loss]")


class Loss:
    """What every loss is: a frozen pytree dataclass, called with the outputs of two networks.

    Subclasses are decorated `@loss("name")` above `@pytree`. Numeric fields are leaves; names and switches are `static()`.

    Class attributes:
      needs_teacher: False for losses that read labels only.
      per_example: False where a value depends on the other examples of the batch (relational losses).
    """

    needs_teacher: ClassVar[bool] = True
    per_example: ClassVar[bool] = True

    def init(self, key: Array, student: Outputs, teacher: Outputs | None) -> PyTree:
        """Parameters the loss trains together with the student (a regressor); `{}` for most.

        `student` and `teacher` are abstract (`jax.ShapeDtypeStruct` leaves, batch axis first). Names of features are
        checked here: raises `UsageError` where one does not exist.
        """
        del key, student, teacher
        return {}

    def __call__(self, params: PyTree, student: Outputs, teacher: Outputs | None, batch: Batch) -> Array:
        """Values [B] float; the caller takes the mean over the batch and multiplies by the term's weight."""
        raise NotImplementedError


def loss(name: str, **defaults: Any) -> Callable[[L], L]:
    """Registers a loss class: `loss=name` works, with the class's fields and `weight` as typed keys.

    `weight` (default 1.0, at least 0) multiplies the term in the objective; it is not a field of the class.
    """
    weight = defaults.pop("weight", 1.0)
    return register("loss", name, extra={"weight": (float, weight)}, **defaults)
