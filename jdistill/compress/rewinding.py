"""Lottery tickets: the mask of a trained student, on the weights that it began with."""

from jdistill.compress.base import Compressor, Training
from jdistill.compress.pipeline import Pipeline
from jdistill.compress.prune import MagnitudePrune
from jdistill.pytrees import pytree, require_fraction, require_nonnegative, require_positive
from jdistill.registry import register


@pytree
class Ticket(MagnitudePrune):
    """A magnitude mask of the trained student, whose weights and running statistics then go back to their first values."""

    rewinds = True

    @property
    def needs_training(self) -> bool:  # type: ignore[override]
        return True


@register("compression", "lottery")
def lottery(
    sparsity: float = 0.5, scope: str = "layer", rounds: int = 1, only: str = "", recover_epochs: int | None = None
) -> Pipeline:
    """Lottery tickets: the magnitude mask of the trained student, its weights as at first, trained again under the mask.

    Frankle and Carbin 2019, https://arxiv.org/abs/1803.03635, section 1; with `rounds` K iteratively: each prunes as large a
    share of what is left, so that the sparsity after round k is 1 - (1 - sparsity)^(k / K), and begins at the first weights.

    Attributes:
      sparsity: fraction of weights set to zero in the end, in [0, 1).
      scope: `layer` prunes each weight leaf to `sparsity`, `global` all of them together by one threshold.
      rounds: how often it is pruned, rewound and trained, at least 1.
      only: names of the leaves to prune, as patterns with commas between; empty for all weights. All leaves are rewound.
      recover_epochs: epochs of training after each rewind, by the terms and optimizer of the stage before; null takes the
        epochs of that stage too, so that a ticket is trained as long as the student was.
    """
    require_fraction(sparsity=sparsity)
    require_positive(rounds=rounds)
    require_nonnegative(recover_epochs=recover_epochs)
    sequence: list[Compressor | Training] = []
    for done in range(1, rounds + 1):
        share = 1 - (1 - sparsity) ** (done / rounds)
        sequence.append(Ticket(sparsity=share, scope=scope, only=only, recover_epochs=0))
        if recover_epochs != 0 or done < rounds:  # 0: a training stage of the sequence follows the last round
            sequence.append(Training("recover", recover_epochs or None))
    return Pipeline(tuple(sequence))
