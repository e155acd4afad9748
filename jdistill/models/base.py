"""How a network class becomes an option of the groups `teacher` and `student`, and the checks its fields share."""

from collections.abc import Callable
from typing import Any, TypeVar

from jdistill.errors import UsageError
from jdistill.registry import register

M = TypeVar("M", bound=Callable[..., Any])

TEACHER_KEYS: dict[str, tuple[Any, Any]] = {
    "checkpoint": (str | None, None),
    "seed": (int, 0),
    "optim": (Any, None),
    "data": (Any, None),
    "task": (Any, None),
}
"""What a teacher's config holds besides the fields of its network: where its weights come from.

`data` is what of the group `data` is otherwise for its training: {augment: [crop], crop_padding: 2}; `task` likewise:
{name: next_item}.
"""


def model(name: str, *, teacher: dict[str, Any] | None = None, student: dict[str, Any] | None = None) -> Callable[[M], M]:
    """Registers a network class (or function) as `teacher=name` and as `student=name`.

    The target takes `outputs` (given by the program: number of classes) and fields that all have defaults, and
    builds a Linen module `(inputs, train) -> (logits [B, K], features)`.

    Args:
      name: the word after `teacher=` and `student=`.
      teacher: other defaults than the class's, for the teacher group.
      student: the same for the student group.
    """

    def decorate(target: M) -> M:
        register("teacher", name, extra=TEACHER_KEYS, **(teacher or {}))(target)
        return register("student", name, **(student or {}))(target)

    return decorate


def positive_integers(length: int | None = None, *, even: bool = False, **fields: Any) -> None:
    """Raises `UsageError` for a sequence with an entry that is not an (even) integer > 0, or of another length."""
    for name, values in fields.items():
        sequence = isinstance(values, list | tuple)
        if sequence and length in (None, len(values)) and all(is_positive(v) and not (even and v % 2) for v in values):
            continue
        found = list(values) if sequence else values
        count = "" if length is None else f"{length} "
        raise UsageError(f"{name} must be {count}positive {'even ' if even else ''}integers, got {found!r}")


def positive_integer(**fields: Any) -> None:
    """Raises `UsageError` for a value that is not an integer > 0."""
    for name, value in fields.items():
        if not is_positive(value):
            raise UsageError(f"{name} must be a positive integer, got {value!r}")


def blocks_of_depth(depth: Any, rest: int) -> int:
    """The n of `depth = 6 n + rest`, the residual blocks a stage has; raises `UsageError` where there is none."""
    if not is_positive(depth) or depth <= rest or (depth - rest) % 6:
        examples = ", ".join(str(6 * n + rest) for n in (1, 2, 3))
        raise UsageError(f"depth must be 6n+{rest} ({examples}, ...), got {depth!r}")
    return (depth - rest) // 6


def is_positive(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
