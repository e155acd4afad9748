"""How far two networks (a teacher and a student) rank alike: shared items and Kendall's rank correlation."""

import numpy as np

from jdistill.metrics.ranking import mean, places

CHUNK = 1 << 17  # scores compared at once: about 1 MB for each array in work


def overlap_at_k(top_a: np.ndarray, top_b: np.ndarray, k: int) -> float:
    """Mean over rows of the fraction of items that the first k of two lists share, in [0, 1].

    `top_a`, `top_b` [M, N] int32, the best first, no item twice, filled with -1. Where lists are shorter than k, the
    fraction is of the longer one; rows where both are empty are left out, NaN where that leaves none.
    """
    a, b = top_a[:, :k], top_b[:, :k]
    shared = (places(a, b) >= 0).sum(1)
    length = np.maximum((a >= 0).sum(1), (b >= 0).sum(1))
    return mean(np.where(length > 0, shared / np.maximum(length, 1), np.nan))


def kendall(scores_a: np.ndarray, scores_b: np.ndarray, mask: np.ndarray | None = None) -> float:
    """Mean over rows of Kendall's tau-b (Kendall 1945) of two scorings [M, K], in [-1, 1].

    A row's tau-b is (concordant - discordant) / sqrt(pairs untied in a * pairs untied in b). Rows in which either scoring
    ties all are left out; NaN where that leaves none. `mask` [M, K] bool: the entries that count, all where None.
    O(M K^2) time; the memory beside the inputs is a few MB (and a few times K).
    """
    mask = np.ones(np.shape(scores_a), bool) if mask is None else np.asarray(mask)
    rows = max(1, CHUNK // max(1, mask.shape[1]))
    taus = [
        _tau_b(np.asarray(scores_a[i : i + rows]), np.asarray(scores_b[i : i + rows]), mask[i : i + rows])
        for i in range(0, len(mask), rows)
    ]
    return mean(np.concatenate([np.zeros(0), *taus]))


def kendall_of_tops(top_a: np.ndarray, top_b: np.ndarray, k: int) -> float:
    """`kendall` of the first k of two lists, over the union of their items.

    An item that a list lacks ranks behind all that are in it, tied with the others it lacks. Lists as in `overlap_at_k`.
    """
    a, b = top_a[:, :k], top_b[:, :k]
    in_a, in_b = places(b, a), places(a, b)
    behind = max(a.shape[1], b.shape[1])
    rank_a = np.concatenate([np.broadcast_to(np.arange(a.shape[1]), a.shape), np.where(in_a < 0, behind, in_a)], axis=1)
    rank_b = np.concatenate([np.where(in_b < 0, behind, in_b), np.broadcast_to(np.arange(b.shape[1]), b.shape)], axis=1)
    once = np.concatenate([a >= 0, (b >= 0) & (in_a < 0)], axis=1)
    return kendall(rank_a, rank_b, once)


def _tau_b(a: np.ndarray, b: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """[M] float64, NaN where undefined; each pair of columns is met once, by its distance."""
    balance, untied_a, untied_b = np.zeros((3, len(a)), np.int64)
    for d in range(1, a.shape[1]):
        both = (mask[:, d:] & mask[:, :-d]).view(np.int8)
        sign_a, sign_b = _sign(a, d) * both, _sign(b, d) * both
        balance += (sign_a * sign_b).sum(1, dtype=np.int64)
        untied_a += (sign_a != 0).sum(1)
        untied_b += (sign_b != 0).sum(1)
    pairs = np.sqrt(untied_a.astype(np.float64) * untied_b)
    return np.where(pairs > 0, balance / np.maximum(pairs, 1), np.nan)


def _sign(scores: np.ndarray, d: int) -> np.ndarray:
    """int8 sign of the score minus that of d columns before; by comparison, so that infinities are equal to themselves."""
    later, earlier = scores[:, d:], scores[:, :-d]
    return (later > earlier).view(np.int8) - (later < earlier).view(np.int8)
