"""Search: metrics of queries whose documents have grades.

Everywhere `logits` [Q, K] are the scores and `grades` [Q, K] int the grades 0, 1, ... of the documents of each query, -1
in places without one, whose logits are not read. Among equal logits the lower grades come first, so that a network cannot
gain by ties; NaN ranks last. Metrics of each query are [Q] float64 in [0, 1], NaN for a query in which no document has a
grade above 0; means leave such queries out.
"""

from collections.abc import Sequence

import numpy as np

from jdistill.metrics.ranking import check_cutoffs, mean


def ndcg_at_k(logits: np.ndarray, grades: np.ndarray, k: int) -> np.ndarray:
    """DCG of the first k, gain 2^grade - 1 and discount 1 / log2(rank + 1), over that of the best order (Burges 2005)."""
    return _ndcg(_ranked(logits, grades), k)


def mrr(logits: np.ndarray, grades: np.ndarray) -> np.ndarray:
    """1 / rank of the first document with a grade of 1 or more."""
    return _mrr(_ranked(logits, grades))


def average_precision(logits: np.ndarray, grades: np.ndarray) -> np.ndarray:
    """The mean of precision@rank over the documents with a grade of 1 or more."""
    return _average_precision(_ranked(logits, grades))


def list_metrics(logits: np.ndarray, grades: np.ndarray, cutoffs: Sequence[int]) -> dict[str, float]:
    """Means over queries: `ndcg_at_k` at each cutoff k, `mrr` and `map` over the whole list.

    Raises `UsageError` for cutoffs that are not whole numbers from 1 on.
    """
    check_cutoffs(cutoffs)
    ranked = _ranked(logits, grades)
    out = {f"ndcg_at_{k}": mean(_ndcg(ranked, k)) for k in cutoffs}
    return out | {"mrr": mean(_mrr(ranked)), "map": mean(_average_precision(ranked))}


def _ranked(logits: np.ndarray, grades: np.ndarray) -> np.ndarray:
    """Grades [Q, K] in the order of the logits, -1 behind all others."""
    order = np.lexsort((grades, -np.asarray(logits, np.float64), grades < 0), axis=-1)
    return np.take_along_axis(np.asarray(grades), order, axis=1)


def _ndcg(ranked: np.ndarray, k: int) -> np.ndarray:
    best = -np.sort(-ranked, axis=1)
    discount = 1 / np.log2(np.arange(2, min(k, ranked.shape[1]) + 2))
    found, ideal = (np.exp2(np.maximum(grades[:, :k], 0).astype(np.float64)) - 1 for grades in (ranked, best))
    return _where_relevant(ranked, found @ discount, ideal @ discount)


def _mrr(ranked: np.ndarray) -> np.ndarray:
    reciprocal = 1 / np.arange(1, ranked.shape[1] + 1)
    return _where_relevant(ranked, np.max((ranked > 0) * reciprocal, axis=1, initial=0), np.ones(len(ranked)))


def _average_precision(ranked: np.ndarray) -> np.ndarray:
    relevant = ranked > 0
    precision = np.cumsum(relevant, axis=1) / np.arange(1, ranked.shape[1] + 1)
    return _where_relevant(ranked, (precision * relevant).sum(1), relevant.sum(1))


def _where_relevant(ranked: np.ndarray, value: np.ndarray, ideal: np.ndarray) -> np.ndarray:
    known = (ranked > 0).any(1)
    return np.where(known, value / np.where(known, ideal, 1), np.nan)
