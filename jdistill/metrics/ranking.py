"""Top-N recommendation: metrics of lists of recommended items against the items that were relevant.

Everywhere `top` [M, N] int32 holds the recommended items of each user, the best first, no item twice, filled with -1;
`relevant` [M, R] int32 the relevant items in any order, filled with -1 (an item named twice counts once). Metrics of each
user are [M] float64 in [0, 1], NaN for a user without relevant items; means leave such users out.
"""

from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np

from jdistill import sampling
from jdistill.errors import UsageError


def places(items: np.ndarray, among: np.ndarray) -> np.ndarray:
    """[M, N] int: the column of row m of `among` [M, R] that holds `items[m, n]`; -1 where none does or the item is -1.

    The first column where several hold it. One sort of all rows together: O((M R + M N) log(M R)).
    """
    width = int(max(items.max(initial=0), among.max(initial=0))) + 1
    row, column = np.nonzero(among >= 0)
    keys = row * width + among[row, column]
    order = np.argsort(keys, kind="stable")
    wanted = np.arange(len(items))[:, None] * width + items
    if not len(keys):
        return np.full(items.shape, -1)
    at = order[np.minimum(np.searchsorted(keys[order], wanted), len(keys) - 1)]
    return np.where((items >= 0) & (keys[at] == wanted), column[at], -1)


def hit_rate_at_k(top: np.ndarray, relevant: np.ndarray, k: int) -> np.ndarray:
    """1 where any of the first k is relevant, else 0."""
    return _per_user(_hit_rate, *_hits(top, relevant), k)


def recall_at_k(top: np.ndarray, relevant: np.ndarray, k: int) -> np.ndarray:
    """The fraction of the relevant items that are among the first k."""
    return _per_user(_recall, *_hits(top, relevant), k)


def precision_at_k(top: np.ndarray, relevant: np.ndarray, k: int) -> np.ndarray:
    """The relevant among the first k, divided by k (also where a list is shorter)."""
    return _per_user(_precision, *_hits(top, relevant), k)


def ndcg_at_k(top: np.ndarray, relevant: np.ndarray, k: int) -> np.ndarray:
    """DCG of the first k, gain 1 and discount 1 / log2(rank + 1), over that of min(k, relevant) hits at the top."""
    return _per_user(_ndcg, *_hits(top, relevant), k)


def mrr_at_k(top: np.ndarray, relevant: np.ndarray, k: int) -> np.ndarray:
    """1 / rank of the first relevant item, 0 where it is not among the first k."""
    return _per_user(_mrr, *_hits(top, relevant), k)


def map_at_k(top: np.ndarray, relevant: np.ndarray, k: int) -> np.ndarray:
    """Average precision: the sum of precision@rank over the hits among the first k, over min(k, relevant)."""
    return _per_user(_map, *_hits(top, relevant), k)


def coverage_at_k(top: np.ndarray, items: int, k: int) -> float:
    """The fraction of the `items` of the catalogue that are among the first k of anybody."""
    seen = np.zeros(items, bool)
    shown = top[:, :k]
    seen[shown[shown >= 0]] = True
    return float(seen.mean())


def novelty_at_k(top: np.ndarray, popularity: np.ndarray, users: int, k: int) -> np.ndarray:
    """Mean self-information in bits of the first k of each user, [M] float64 >= 0; NaN for an empty list.

    -log2 of the probability that a training user has met the item (Zhou et al., PNAS 2010), estimated by
    (popularity + 1) / (users + 2) (Laplace's rule of succession): finite for an item that nobody met, log2(users + 2).
    An item met more often than there are users (repeated interactions) counts as certain, 0 bits.

    Args:
      popularity: [items], training interactions of each item.
      users: the number of users in training.
    """
    bits = -np.log2(np.minimum((np.asarray(popularity, np.float64) + 1) / (users + 2), 1))
    shown = top[:, :k]
    there = shown >= 0
    count = there.sum(1)
    total = np.where(there, bits[np.maximum(shown, 0)], 0).sum(1)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def popularity_groups(popularity: np.ndarray, groups: int) -> np.ndarray:
    """[items] int32: the group of each item, as `sampling.popularity_groups` cuts them; `UsageError` for less than one."""
    if groups < 1:
        raise UsageError(f"items fall into 1 popularity group or more, got {groups}")
    return np.asarray(sampling.popularity_groups(jnp.asarray(popularity, jnp.int32), groups))


def ranking_metrics(
    top: np.ndarray,
    relevant: np.ndarray,
    cutoffs: Sequence[int],
    popularity: np.ndarray | None = None,
    groups: int = 2,
    users: int | None = None,
) -> dict[str, float]:
    """Means over users with relevant items: at each cutoff k `recall_at_k`, `ndcg_at_k`, `hit_rate_at_k`,
    `precision_at_k`, `mrr_at_k`, `map_at_k`.

    With `popularity`, at the largest cutoff k: `coverage_at_k` over all rows; `novelty_at_k` (bits) over all rows, where
    `users` is given; and the recall of each popularity group, of its relevant items alone: `recall_at_k_popular` and
    `recall_at_k_unpopular`, or `recall_at_k_group1` (the most popular), ... where `groups` is not 2. Users without a
    relevant item in a group are left out of that mean. The same with `_all_users` behind counts them as 0, as UnKD's code
    does, to compare with its tables.

    Args:
      top, relevant: see the module.
      cutoffs: each at least 1.
      popularity: [items], training interactions of each item, or None.
      groups: the number of popularity groups, 0 for none.
      users: the number of users in training, for novelty.

    Raises:
      UsageError: a cutoff below 1, none, or one that the lists are too short for.
    """
    check_cutoffs(cutoffs)
    k = max(cutoffs)
    if popularity is not None and top.shape[1] < min(k, len(popularity)):
        raise UsageError(f"cutoff {k} needs lists of the {min(k, len(popularity))} best items, these hold {top.shape[1]}")
    hits, count = _hits(top, relevant)
    out = {f"{name}_at_{c}": mean(_per_user(of, hits, count, c)) for c in cutoffs for name, of in _METRICS.items()}
    if popularity is None:
        return out
    out[f"coverage_at_{k}"] = coverage_at_k(top, len(popularity), k)
    if users is not None:
        out[f"novelty_at_{k}"] = mean(novelty_at_k(top, popularity, users, k))
    if groups:
        out |= _group_recall(top, relevant, popularity_groups(popularity, groups), groups, k)
    return out


def mean(values: np.ndarray) -> float:
    """The mean of those that are not NaN; NaN where there are none."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


def check_cutoffs(cutoffs: Sequence[int]) -> None:
    """Raises `UsageError` unless there are cutoffs and all are whole numbers from 1 on."""
    if not len(cutoffs) or any(int(k) != k or k < 1 for k in cutoffs):
        raise UsageError(f"cutoffs are whole numbers from 1 on, such as [10, 20, 50]; got {list(cutoffs)}")


def _group_recall(top: np.ndarray, relevant: np.ndarray, group: np.ndarray, groups: int, k: int) -> dict[str, float]:
    names = ("popular", "unpopular") if groups == 2 else tuple(f"group{g + 1}" for g in range(groups))
    asked = (relevant >= 0).any(1)
    of = np.where(relevant >= 0, group[np.maximum(relevant, 0)], -1)
    out = {}
    for g, name in enumerate(names):
        recall = recall_at_k(top, np.where(of == g, relevant, -1), k)
        out[f"recall_at_{k}_{name}"] = mean(recall)
        out[f"recall_at_{k}_{name}_all_users"] = mean(np.nan_to_num(recall)[asked])
    return out


def _hits(top: np.ndarray, relevant: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which of `top` are relevant, [M, N] bool, and how many items are relevant, [M] int."""
    first = places(relevant, relevant) == np.arange(relevant.shape[1])
    return places(top, relevant) >= 0, first.sum(1)


Metric = Callable[[np.ndarray, np.ndarray, int], np.ndarray]
"""`(hits [M, up to k] bool, count [M] int >= 1, k)` to [M] float64."""


def _per_user(metric: Metric, hits: np.ndarray, count: np.ndarray, k: int) -> np.ndarray:
    return np.where(count > 0, metric(hits[:, :k], np.maximum(count, 1), k), np.nan)


def _hit_rate(hits: np.ndarray, count: np.ndarray, k: int) -> np.ndarray:
    return np.where(hits.any(1), 1.0, 0.0)


def _recall(hits: np.ndarray, count: np.ndarray, k: int) -> np.ndarray:
    return hits.sum(1) / count


def _precision(hits: np.ndarray, count: np.ndarray, k: int) -> np.ndarray:
    return hits.sum(1) / k


def _ndcg(hits: np.ndarray, count: np.ndarray, k: int) -> np.ndarray:
    discount = 1 / np.log2(np.arange(2, k + 2))
    ideal = np.take(np.cumsum(discount), np.minimum(count, k) - 1)
    return (hits * discount[: hits.shape[1]]).sum(1) / ideal


def _mrr(hits: np.ndarray, count: np.ndarray, k: int) -> np.ndarray:
    return (hits / np.arange(1, hits.shape[1] + 1)).max(1, initial=0)


def _map(hits: np.ndarray, count: np.ndarray, k: int) -> np.ndarray:
    precision = np.cumsum(hits, axis=1) / np.arange(1, hits.shape[1] + 1)
    return (precision * hits).sum(1) / np.minimum(count, k)


_METRICS: dict[str, Metric] = {
    "recall": _recall, "ndcg": _ndcg, "hit_rate": _hit_rate, "precision": _precision, "mrr": _mrr, "map": _map,
}  # fmt: skip
