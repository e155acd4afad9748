"""The definitions in plain loops over lists, one user or query at a time."""

import math


def items_of(row):
    return [int(i) for i in row if i >= 0]


def ranking(top, relevant, k):
    """Metrics of one user, or None where nothing is relevant."""
    wanted, shown = set(items_of(relevant)), items_of(top)[:k]
    if not wanted:
        return None
    ranks = [rank for rank, item in enumerate(shown, 1) if item in wanted]
    best = min(k, len(wanted))
    return {
        "hit_rate": 1.0 if ranks else 0.0,
        "recall": len(ranks) / len(wanted),
        "precision": len(ranks) / k,
        "ndcg": sum(1 / math.log2(r + 1) for r in ranks) / sum(1 / math.log2(r + 1) for r in range(1, best + 1)),
        "mrr": 1 / ranks[0] if ranks else 0.0,
        "map": sum((n + 1) / r for n, r in enumerate(ranks)) / best,
    }


def query(logits, grades, k):
    """NDCG@k, MRR and average precision of one query, ties pessimistic, or None where no grade is above 0."""
    documents = sorted((-z, g) for z, g in zip(logits.tolist(), grades.tolist(), strict=True) if g >= 0)
    order = [g for _, g in documents]
    if not any(order):
        return None

    def dcg(ordered):
        return sum((2**g - 1) / math.log2(rank + 1) for rank, g in enumerate(ordered[:k], 1))

    ranks = [rank for rank, g in enumerate(order, 1) if g > 0]
    precision = [(n + 1) / rank for n, rank in enumerate(ranks)]
    return {"ndcg": dcg(order) / dcg(sorted(order)[::-1]), "mrr": 1 / ranks[0], "map": sum(precision) / len(ranks)}


def auc(logits, label):
    """All pairs of a yes and a no; None where there is none."""
    pairs = [(p, n) for p, yes in zip(logits, label) if yes for n, other in zip(logits, label) if not other]
    return sum((p > n) + 0.5 * (p == n) for p, n in pairs) / len(pairs) if pairs else None


def calibration_error(probability, label, bins=15):
    total = 0.0
    for b in range(bins):
        inside = [
            (p, y) for p, y in zip(probability, label) if b / bins <= p < (b + 1) / bins or (b == bins - 1 and p == 1)
        ]
        if inside:
            gap = sum(y for _, y in inside) / len(inside) - sum(p for p, _ in inside) / len(inside)
            total += abs(gap) * len(inside) / len(probability)
    return total


def ranks_over_union(a, b, k):
    """Ranks in both lists of the items in the first k of either."""
    a, b = items_of(a)[:k], items_of(b)[:k]
    union = sorted(set(a) | set(b))
    return [[ordered.index(i) if i in ordered else len(union) for i in union] for ordered in (a, b)]
