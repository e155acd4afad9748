"""Compression of recommenders' embedding tables: hashed, composed and product-quantized rows, fewer rows, fewer dimensions.

All of these make the file smaller and train what is stored. The network itself goes on computing with whole tables: they are
built in memory from what is stored, so the memory and the time of a running network are those of the uncompressed one.
Tables are leaves [rows, D] called `user`, `item`, `met`, `table` or `embedding`; low-rank tables are
`low_rank` with `only=user,item`. For a survey of such methods see Li et al. 2024, https://arxiv.org/abs/2408.02304.
"""

import re
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import Array

from jdistill.compress.base import weights
from jdistill.compress.forms import FLOAT, WeightForm, kmeans, means
from jdistill.errors import UsageError, did_you_mean
from jdistill.pytrees import pytree, require_fraction, require_nonnegative, require_one_of, require_positive, static
from jdistill.registry import register
from jdistill.types import PyTree

TABLE = re.compile(r"(^|/)(user|item|met|table|embedding)$")
MULTIPLIER = 2654435761
"""The prime next to 2^32 / golden ratio, Knuth's multiplier (The Art of Computer Programming, volume 3, section 6.4)."""
SWEEPS = 20


def tables(params: PyTree, only: str, named: re.Pattern[str] = TABLE) -> dict[str, Array]:
    """The embedding tables that `only` names, or all: weights [rows, D] by name."""
    matrices = {name: weight for name, weight in weights(params, only).items() if weight.ndim == 2}
    return {name: weight for name, weight in matrices.items() if only or named.search(name)}


def no_table(option: str, params: PyTree, only: str) -> UsageError:
    """The error for options that choose no table."""
    matrices = [name for name, weight in weights(params).items() if weight.ndim == 2]
    known = f"(matrices: {', '.join(matrices) or 'none'})"
    if only:
        return UsageError(f"compression={option}: only={only!r} names no table {known}{did_you_mean(only, matrices)}")
    return UsageError(f"compression={option} found no table user, item, met, table or embedding {known}; name others in only")


class TableForm(WeightForm):
    """A form of embedding tables. The subclasses have a field `only`."""

    only: str

    def candidates(self, params: PyTree) -> dict[str, Array]:
        found = tables(params, self.only)
        if not found:
            raise no_table(self.option, params, self.only)
        return found


@pytree
class HashedForm(TableForm):
    """A form of tables in which ids share `rows` rows, or `share` of them; stored arrays do not tell how many there were."""

    advice: ClassVar[str] = "set fewer rows or a smaller share"

    rows: int = static(default=0)
    share: float = static(default=0.25)
    only: str = static(default="")
    recover_epochs: int = static(default=5)

    def __post_init__(self) -> None:
        require_nonnegative(rows=self.rows, recover_epochs=self.recover_epochs)
        require_positive(share=self.share)
        require_fraction(share=self.share)

    def begin(self, key: Array, weight: Array) -> Array:
        """[rows] zeros, a bit each in the file: shapes are what a compiled program knows."""
        del key
        return jnp.zeros(len(weight), jnp.uint8)


def count(whole: int, number: int, share: float) -> int:
    """`number`, or where it is 0 `share` of `whole`, rounded, at least 1."""
    return number or max(1, round(share * whole))


def bucket(ids: int, buckets: int) -> Array:
    """The bucket of each of the ids 0 to `ids` - 1: [ids] int32.

    h(i) = (x xor x >> 16) mod `buckets` with x = 2654435761 (i + 1) mod 2^32.
    """
    x = (jnp.arange(ids, dtype=jnp.uint32) + 1) * jnp.uint32(MULTIPLIER)
    return ((x ^ (x >> 16)) % jnp.uint32(buckets)).astype(jnp.int32)


@register("compression", "hash_embedding")
@pytree
class HashEmbedding(HashedForm):
    """Embedding tables by the hashing trick (Weinberger et al. 2009): row i of n is row h(i) of a table with m rows.

    h is the fixed hash of `bucket`, so that the file holds the m rows, and one bit for each id. Each starts as the mean of the
    trained rows that share it, which is the least-squares choice. (https://arxiv.org/abs/0902.2206)

    Attributes:
      rows: m for all tables; 0 takes `share`.
      share: m as a fraction of n, in (0, 1).
      only: patterns of names; empty for all tables.
      recover_epochs: epochs of further training of the m rows.
    """

    option: ClassVar[str] = "hash_embedding"

    def bits(self, name: str, shape: tuple[int, ...]) -> int:
        del name
        return FLOAT * count(shape[0], self.rows, self.share) * shape[1] + shape[0]

    def shorter(self, weight: Array, state: Array) -> PyTree:
        del state
        buckets = count(len(weight), self.rows, self.share)
        return {"buckets": means(weight, bucket(len(weight), buckets), buckets)[0]}

    def full(self, stored: PyTree, state: Array) -> Array:
        return stored["buckets"][bucket(len(state), len(stored["buckets"]))]


@register("compression", "qr_embedding")
@pytree
class QREmbedding(HashedForm):
    """Quotient-remainder embeddings (Shi et al. 2020): row i of n is Q[i div m] * R[i mod m], or their sum.

    Stored are R [m, D] and Q [ceil(n / m), D]. They start as the least-squares fit to the trained table: by alternating
    least squares, 20 sweeps, for `multiply` from the first singular vectors, column by column, of the table as [n / m, m] with
    zeros for the ids it lacks; where m divides n that is the fit already. (https://arxiv.org/abs/1909.02107)

    Attributes:
      rows: m for all tables; 0 takes `share`.
      share: m as a fraction of n, in (0, 1).
      operation: `multiply` or `add`, element by element.
      only: patterns of names; empty for all tables.
      recover_epochs: epochs of further training of Q and R.
    """

    option: ClassVar[str] = "qr_embedding"

    operation: str = static(default="multiply")

    def __post_init__(self) -> None:
        super().__post_init__()
        require_one_of(("multiply", "add"), operation=self.operation)

    def bits(self, name: str, shape: tuple[int, ...]) -> int:
        del name
        m = count(shape[0], self.rows, self.share)
        return FLOAT * (m + -(-shape[0] // m)) * shape[1] + shape[0]

    def shorter(self, weight: Array, state: Array) -> PyTree:
        del state
        n, width = weight.shape
        m = count(n, self.rows, self.share)
        quotients = -(-n // m)
        grid = jnp.pad(weight, ((0, quotients * m - n), (0, 0))).reshape(quotients, m, width)
        there = (jnp.arange(quotients * m) < n).reshape(quotients, m, 1).astype(weight.dtype)
        fit = _factor if self.operation == "multiply" else _summand

        def sweep(_: Array, pair: tuple[Array, Array]) -> tuple[Array, Array]:
            q, _r = pair
            r = fit(grid, there, q[:, None], 0)
            return fit(grid, there, r[None], 1), r

        begun = jnp.zeros((quotients, width), weight.dtype)
        if self.operation == "multiply":
            u, s, _v = jnp.linalg.svd(grid.transpose(2, 0, 1), full_matrices=False)
            begun = u[:, :, 0].T * jnp.sqrt(s[:, 0])
        quotient, remainder = jax.lax.fori_loop(0, SWEEPS, sweep, (begun, jnp.zeros((m, width), weight.dtype)))
        return {"quotient": quotient, "remainder": remainder}

    def full(self, stored: PyTree, state: Array) -> Array:
        q, r = stored["quotient"][:, None], stored["remainder"][None]
        whole = q * r if self.operation == "multiply" else q + r
        return whole.reshape(-1, whole.shape[-1])[: len(state)]


def _factor(grid: Array, there: Array, other: Array, axis: int) -> Array:
    """The least-squares x of `grid` = x * `other` along `axis`, over entries that are `there`."""
    square = jnp.sum(there * other**2, axis=axis)
    return jnp.sum(there * grid * other, axis=axis) / jnp.where(square > 0, square, 1)


def _summand(grid: Array, there: Array, other: Array, axis: int) -> Array:
    """The least-squares x of `grid` = x + `other` along `axis`, over entries that are `there`."""
    return jnp.sum(there * (grid - other), axis=axis) / jnp.sum(there, axis=axis)


@register("compression", "pq_embedding")
@pytree
class PQEmbedding(TableForm):
    """Product quantization (Jegou et al. 2011): each row is cut into S parts, and each part is one of k centroids.

    The parts of all rows are clustered by k-means in each of the S subspaces (25 iterations from rows drawn at random). The
    codes [rows, S] are fixed from there on, the codebooks [S, k, D / S] start as the means of what they stand for and are
    trained. The file holds ceil(log2 k) bits for each code. (https://doi.org/10.1109/TPAMI.2010.57)

    Attributes:
      subspaces: S, divides D; 0 takes D / 2, pairs of numbers.
      centroids: k, 2 to 256.
      only: patterns of names; empty for all tables.
      recover_epochs: epochs of further training of the codebooks.
    """

    option: ClassVar[str] = "pq_embedding"
    advice: ClassVar[str] = "set fewer centroids or subspaces"

    subspaces: int = static(default=0)
    centroids: int = static(default=256)
    only: str = static(default="")
    recover_epochs: int = static(default=5)

    def __post_init__(self) -> None:
        require_nonnegative(subspaces=self.subspaces, recover_epochs=self.recover_epochs)
        if not 2 <= self.centroids <= 256:
            raise UsageError(f"centroids must be from 2 to 256, got {self.centroids!r}")

    def candidates(self, params: PyTree) -> dict[str, Array]:
        found = super().candidates(params)
        for name, weight in found.items():
            width = weight.shape[1]
            if self.subspaces == 0 and width % 2:
                found_odd = f"subspaces=0 takes pairs of numbers, and a row of {name} has {width}"
                raise UsageError(f"compression={self.option}: {found_odd}; set subspaces to a divisor")
            if width % self._subspaces(width):
                divisors = ", ".join(str(s) for s in range(1, width + 1) if width % s == 0)
                raise UsageError(
                    f"compression={self.option}: subspaces must divide the {width} numbers of a row of {name}, "
                    f"as {divisors} do, got {self.subspaces}"
                )
        return found

    def bits(self, name: str, shape: tuple[int, ...]) -> int:
        del name
        rows, width = shape
        return rows * self._subspaces(width) * (self.centroids - 1).bit_length() + FLOAT * self.centroids * width

    def begin(self, key: Array, weight: Array) -> Array:
        """Codes [rows, S]."""
        parts = self._parts(weight)
        keys = jax.random.split(key, len(parts))
        return jax.lax.map(lambda one: kmeans(one[0], one[1], self.centroids), (keys, parts)).T.astype(jnp.uint8)

    def shorter(self, weight: Array, state: Array) -> PyTree:
        codes = state.T.astype(jnp.int32)
        return {"codebooks": jax.vmap(lambda part, own: means(part, own, self.centroids)[0])(self._parts(weight), codes)}

    def full(self, stored: PyTree, state: Array) -> Array:
        subspaces = jnp.arange(state.shape[1])
        return stored["codebooks"][subspaces, state.astype(jnp.int32)].reshape(len(state), -1)

    def _parts(self, weight: Array) -> Array:
        """[S, rows, D / S]."""
        return weight.reshape(len(weight), self._subspaces(weight.shape[1]), -1).swapaxes(0, 1)

    def _subspaces(self, width: int) -> int:
        return self.subspaces or width // 2


@pytree
class KeptForm(TableForm):
    """A form of tables that keeps a share of their rows or dimensions; a step's state says which."""

    advice: ClassVar[str] = "set a smaller share"

    share: float = static(default=0.5)
    only: str = static(default="")
    recover_epochs: int = static(default=5)

    def __post_init__(self) -> None:
        require_nonnegative(recover_epochs=self.recover_epochs)
        require_positive(share=self.share)
        require_fraction(share=self.share)

    def _own(self, kept: Array) -> Array:
        return jnp.flatnonzero(kept, size=count(len(kept), 0, self.share))


@register("compression", "embedding_rows")
@pytree
class EmbeddingRows(KeptForm):
    """Tables without the rows of least Euclidean norm; all ids of these share one row, at first their mean.

    Under weight decay or from a small start, rows that training seldom met are the shortest, so that it is mostly rare ids
    that lose their own row. The file holds the rows and one bit for each id.

    Attributes:
      share: the fraction of rows that ids keep for themselves, in (0, 1).
      only: patterns of names; empty for all tables.
      recover_epochs: epochs of further training.
    """

    option: ClassVar[str] = "embedding_rows"

    def bits(self, name: str, shape: tuple[int, ...]) -> int:
        del name
        return FLOAT * (count(shape[0], 0, self.share) + 1) * shape[1] + shape[0]

    def begin(self, key: Array, weight: Array) -> Array:
        """[rows]: 1 for those that stay."""
        del key
        return largest(jnp.sum(weight**2, axis=1), count(len(weight), 0, self.share))

    def shorter(self, weight: Array, state: Array) -> Array:
        shared = jnp.sum(jnp.where(state[:, None] == 0, weight, 0), axis=0) / jnp.maximum(jnp.sum(state == 0), 1)
        return jnp.concatenate([shared[None], weight[self._own(state)]])

    def full(self, stored: Array, state: Array) -> Array:
        return stored[jnp.where(state == 1, jnp.cumsum(state.astype(jnp.int32)), 0)]

    def hold(self, name: str, value: PyTree, state: PyTree) -> PyTree | None:
        """Masks [rows, D] lose these rows too; the shared row keeps what any of its ids keep."""
        if name not in state:
            return value
        kept = state[name]

        def cut(held: Array) -> Array:
            if held.ndim != 2 or len(held) != len(kept):
                return held
            others = jnp.where(kept[:, None] == 0, held, jnp.zeros_like(held))
            return jnp.concatenate([jnp.max(others, axis=0, keepdims=True), held[self._own(kept)]])

        return jax.tree.map(cut, value)


@register("compression", "embedding_dims")
@pytree
class EmbeddingDims(KeptForm):
    """Tables without the dimensions of least energy, the same ones in all tables of one width D.

    The energy of dimension k is the product over these tables of the sums of squares of column k. With users U and items I
    that is the sum over all pairs of (U_uk I_ik)^2, what k contributes to the scores u . i. The network gets zeros there.

    Attributes:
      share: the fraction of dimensions that stay, in (0, 1).
      only: patterns of names; empty for all tables.
      recover_epochs: epochs of further training.
    """

    option: ClassVar[str] = "embedding_dims"

    def bits(self, name: str, shape: tuple[int, ...]) -> int:
        del name
        return FLOAT * count(shape[1], 0, self.share) * shape[0] + shape[1]

    def init(self, key: Array, params: PyTree) -> PyTree:
        """By name of a table [D]: 1 for the dimensions that stay."""
        del key
        found = self.worthwhile(self.candidates(params))
        energy: dict[int, Array] = {}
        for weight in found.values():
            width = weight.shape[1]
            energy[width] = energy.get(width, jnp.zeros(width)) + jnp.log(jnp.sum(weight**2, axis=0))
        kept = {width: largest(total, count(width, 0, self.share)) for width, total in energy.items()}
        return {name: kept[weight.shape[1]] for name, weight in found.items()}

    def shorter(self, weight: Array, state: Array) -> Array:
        return weight[:, self._own(state)]

    def full(self, stored: Array, state: Array) -> Array:
        place = jnp.maximum(jnp.cumsum(state.astype(jnp.int32)) - 1, 0)
        return jnp.where(state == 1, stored[:, place], 0)

    def hold(self, name: str, value: PyTree, state: PyTree) -> PyTree | None:
        """Masks [rows, D] lose these dimensions too."""
        if name not in state:
            return value
        kept = state[name]
        return jax.tree.map(
            lambda held: held[:, self._own(kept)] if held.ndim == 2 and held.shape[1] == len(kept) else held, value
        )


def largest(scores: Array, number: int) -> Array:
    """1 for the `number` largest of `scores` [n], the earlier of equal ones; 0 elsewhere: [n] uint8."""
    rank = jnp.argsort(jnp.argsort(-scores, stable=True), stable=True)
    return (rank < number).astype(jnp.uint8)
