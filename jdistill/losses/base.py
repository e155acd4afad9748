"""The loss contract and its decorator."""

from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

from jax import Array

from jdistill import schedules  # noqa: F401 (its options: a schedule may stand for a number)
from jdistill.errors import UsageError
from jdistill.registry import register
from jdistill.sampling import Known
from jdistill.types import Batch, Context, Model, Outputs, PyTree

L = TypeVar("L", bound=Callable[..., Any])


def require_teacher(teacher: Outputs | None) -> Outputs:
    """`teacher`; raises `UsageError` where there is none."""
    if teacher is None:
        raise UsageError("this loss needs a teacher and there is none; set teacher=..., or use loss=none")
    return teacher


class Loss:
    """What every loss is: a frozen pytree dataclass, called with the outputs of two networks.

    Subclasses are decorated `@loss("name")` above `@pytree`. Numeric fields are leaves; names and switches are `static()`.
    Most write `__call__` alone. One that keeps a state (a memory bank), draws random numbers or calls the networks
    writes `evaluate` instead.

    Class attributes, what a loss declares (`jdistill check-loss NAME` tests it):
      needs_teacher: False for losses that read labels only.
      per_example: False where a value depends on the other examples of the batch (relational losses).
      zero_at_teacher: whether the value is 0 where the student's outputs are the teacher's.
      calls_networks: whether `evaluate` calls `context.teacher_network`; a table of outputs is then not enough.
      reads_initial: whether `evaluate` reads `context.initial`.
      reads_requests: whether it needs a batch of requests to a recommender (users and candidate items).
    """

    needs_teacher: ClassVar[bool] = True
    per_example: ClassVar[bool] = True
    zero_at_teacher: ClassVar[bool] = True
    calls_networks: ClassVar[bool] = False
    reads_initial: ClassVar[bool] = False
    reads_requests: ClassVar[bool] = False

    def init(self, key: Array, student: Outputs, teacher: Outputs | None) -> PyTree:
        """Parameters the loss trains together with the student (a regressor); `{}` for most.

        `student` and `teacher` are abstract (`jax.ShapeDtypeStruct` leaves, batch axis first). Names of features are
        checked here: raises `UsageError` where one does not exist.
        """
        del key, student
        if self.needs_teacher:
            require_teacher(teacher)
        return {}

    def init_state(self, key: Array, student: Outputs, teacher: Outputs | None, label: Array) -> PyTree:
        """What the loss remembers from step to step without training it (a memory bank); `{}` for most.

        `student` and `teacher` are abstract, as in `init`; `label` [N] int32 holds the labels of the training rows.
        """
        del key, student, teacher, label
        return {}

    def __call__(self, params: PyTree, student: Outputs, teacher: Outputs | None, batch: Batch) -> Array:
        """Values [B] float; the caller takes the mean over the batch and multiplies by the term's weight."""
        raise NotImplementedError

    def evaluate(self, params: PyTree, state: PyTree, context: Context) -> tuple[Array, PyTree]:
        """Values [B] and the next state."""
        return self(params, context.student, context.teacher, context.batch), state

    @property
    def drawn(self) -> int:
        """How many candidate items a row of the batch gets for this loss alone; its `logits` [B, drawn] are theirs.

        0 for most: the loss then reads the candidates of the task, [B, K], of which the first is the positive.
        """
        return 0

    @property
    def ranking(self) -> tuple[int, int]:
        """How many items of each user, and users of each item, the teacher must have ranked for `draw` and `evaluate`."""
        return 0, 0

    def draw(self, key: Array, known: Known, user: Array) -> Array:
        """The items [B, drawn] int32 for `user` [B] int32."""
        raise NotImplementedError

    def lookup(self, known: Known) -> PyTree:
        """What `draw` reads off `known` alike in every step, so that training makes it once: `known.lookup`; None for most.

        It may depend on static fields only. `draw` asks for it by `looked_up`.
        """
        del known
        return None

    def looked_up(self, known: Known) -> PyTree:
        """`known.lookup`, made now where training has not made it."""
        return self.lookup(known) if known.lookup is None else known.lookup

    def adapt(self, student: Model, teacher: Model | None) -> Model:
        """The network that is trained and deployed: the student, unless the loss builds something of the two (SimKD).

        `teacher` is None where there is not exactly one frozen teacher network.
        """
        del teacher
        return student

    def adopt(self, state: PyTree, teacher: PyTree) -> PyTree:
        """The adapted network's initial state, given the teacher's `(params, state)`."""
        del teacher
        return state

    def hold(self, old: PyTree, new: PyTree) -> PyTree:
        """The loss's parameters after a step, `new` by the optimizer: a place to keep some as they were."""
        del old
        return new

    def preparation(self) -> "tuple[Loss, int] | None":
        """A loss to train alone first, on the same parameters, with its number of epochs (FT's paraphraser); else None."""
        return None


def loss(name: str, **defaults: Any) -> Callable[[L], L]:
    """Registers a loss class (or a function that makes a loss): `loss=name` works, its fields and `weight` as typed keys.

    `weight` (default 1.0, at least 0) multiplies the term in the objective; it is not a field of the class.
    """
    weight = defaults.pop("weight", 1.0)
    return register("loss", name, extra={"weight": (float, weight)}, schedules=True, **defaults)
