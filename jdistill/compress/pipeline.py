"""Sequences of compression steps, with training between them."""

from typing import Any, NamedTuple

from jdistill.compress.base import Compressor, Training
from jdistill.errors import UsageError, did_you_mean
from jdistill.pytrees import require_positive
from jdistill.registry import build, check_keys, options, register

TRAININGS = ("distill", "train", "recover")


class Pipeline(NamedTuple):
    """A sequence of steps and of training between them."""

    sequence: tuple[Compressor | Training, ...]

    def steps(self) -> tuple[Compressor | Training, ...]:
        return self.sequence


@register("compression", "pipeline")
def pipeline(steps: tuple[Any, ...] = ("distill", "prune", "recover", "int8")) -> Pipeline:
    """Any sequence of steps, with training between them: [distill, {name: prune, sparsity: 0.9}, recover, int8].

    `distill` trains as the scheme says, `train` on the task alone, `recover` as the training before it; `{name: recover,
    epochs: 5}` says how long. All other steps are options of this group; each is in force from there on, in training too,
    and recovers as it does alone (`recover_epochs`), save where training follows it anyway. A sequence without `distill`
    begins with it, and one that begins with a compression step is trained on the task first: there would be nothing to
    compress.

    Attributes:
      steps: the sequence.

    Raises:
      UsageError: an unknown step or key, more than one `distill`.
    """
    if not isinstance(steps, tuple | list) or not steps:
        raise UsageError(f"steps must be a list such as [distill, prune, recover, int8], got {steps!r}")
    followed = [*(_name(entry) in TRAININGS for entry in steps[1:]), False]
    return Pipeline(ordered([step for entry, last in zip(steps, followed, strict=True) for step in _read(entry, last)]))


def _name(entry: Any) -> str:
    return str(entry.get("name") if isinstance(entry, dict) else entry)


def _read(entry: Any, followed: bool) -> tuple[Compressor | Training, ...]:
    """The steps of an entry; `followed` by training, it does not recover by itself."""
    node = dict(entry) if isinstance(entry, dict) else {"name": entry}
    name = _name(entry)
    if name in TRAININGS:
        check_keys(f"steps.{name}", node, {"name", "epochs"})
        epochs = node.get("epochs", 5 if name == "recover" else None)
        if epochs is not None:
            require_positive(**{f"steps.{name}.epochs": epochs})
        return (Training(name, epochs if epochs is None else int(epochs)),)
    known = [option for option in options("compression") if option not in ("none", "pipeline")]
    if name not in known:
        every = [*TRAININGS, *known]
        raise UsageError(f"steps: unknown step {entry!r}{did_you_mean(name, every)} (known: {', '.join(every)})")
    if followed and "recover_epochs" in options("compression")[name].fields:
        node.setdefault("recover_epochs", 0)
    try:
        return build("compression", node).steps()
    except UsageError as error:
        raise UsageError(f"steps: {str(error).removeprefix('compression.')}") from error


def ordered(steps: "list[Compressor | Training] | tuple[Compressor | Training, ...]") -> tuple[Compressor | Training, ...]:
    """`steps` with the training that they leave out."""
    distilling = [step for step in steps if isinstance(step, Training) and step.kind == "distill"]
    if len(distilling) > 1:
        raise UsageError(f"steps must hold distill once, got it {len(distilling)} times; use recover")
    first: list[Compressor | Training] = []
    if not distilling:
        first = [Training("distill")]
    elif not isinstance(steps[0], Training):
        first = [Training("train")]
    elif steps[0].kind == "recover":
        raise UsageError("steps must begin with distill, train or a compression step, got recover; there is nothing to recover")
    sequence = (*first, *steps)
    for i, step in enumerate(sequence):
        later = any(isinstance(other, Training) or other.recover_epochs for other in sequence[i + 1 :])
        if isinstance(step, Compressor) and step.needs_training and not step.recover_epochs and not later:
            raise UsageError(
                f"recover_epochs=0 leaves {type(step).__name__} without training to act in; set recover_epochs, or let "
                "training follow: compression.steps=[..., recover]"
            )
    return sequence
