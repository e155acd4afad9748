"""Low-rank factors of weights."""

from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jax import Array

from jdistill.compress.base import chosen_weights
from jdistill.compress.forms import FLOAT, WeightForm
from jdistill.pytrees import pytree, require_fraction, require_nonnegative, require_positive, static
from jdistill.registry import register
from jdistill.types import PyTree


@register("compression", "low_rank")
@pytree
class LowRank(WeightForm):
    """Each chosen weight W as two factors U V, by truncated singular value decomposition; training goes on in them.

    A kernel or table [..., in, out] is taken as a matrix [... in, out]; U is [..., in, r] and V [r, out], so that U V is the
    best approximation of rank r in the Frobenius norm (Eckart and Young 1936), each factor with the square roots of the
    singular values. Weights that r (... in + out) numbers do not make smaller stay as they are. Later steps act on the factors.
    The network goes on computing with W: the file is smaller, its running time and memory are not.

    Attributes:
      rank: r of all chosen weights; 0 takes `share`.
      share: r as a fraction of min(... in, out) of each, in (0, 1), rounded, at least 1.
      only: patterns of weights' names, such as `fc1/*,item`; empty for all weights.
      recover_epochs: epochs of further training in the factors.
    """

    option: ClassVar[str] = "low_rank"
    advice: ClassVar[str] = "set a smaller rank or share"

    rank: int = static(default=0)
    share: float = static(default=0.25)
    only: str = static(default="")
    recover_epochs: int = static(default=5)

    def __post_init__(self) -> None:
        require_nonnegative(rank=self.rank, recover_epochs=self.recover_epochs)
        require_positive(share=self.share)
        require_fraction(share=self.share)

    def candidates(self, params: PyTree) -> dict[str, Array]:
        return chosen_weights(params, self.only)

    def bits(self, name: str, shape: tuple[int, ...]) -> int:
        del name
        rows, columns = int(np.prod(shape[:-1])), shape[-1]
        return FLOAT * self._rank(shape) * (rows + columns)

    def shorter(self, weight: Array, state: Array) -> PyTree:
        del state
        rank = self._rank(weight.shape)
        u, s, v = jnp.linalg.svd(weight.reshape(-1, weight.shape[-1]), full_matrices=False)
        root = jnp.sqrt(s[:rank])
        return {"u": (u[:, :rank] * root).reshape(*weight.shape[:-1], rank), "v": root[:, None] * v[:rank]}

    def full(self, stored: PyTree, state: Array) -> Array:
        del state
        return jnp.matmul(stored["u"], stored["v"])

    def _rank(self, shape: tuple[int, ...]) -> int:
        return self.rank or max(1, round(self.share * min(int(np.prod(shape[:-1])), shape[-1])))
