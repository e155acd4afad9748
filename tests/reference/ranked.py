"""Losses on a teacher's ranking in plain NumPy, with loops over rows, users, items and ranks."""

import math
from typing import NamedTuple

import numpy as np

from jdistill.sampling import Known, Ranking, as_lists


class World(NamedTuple):
    """Users and items small enough to count: scores [U, I] of two networks, what users met, and what is known of it."""

    student: np.ndarray
    teacher: np.ndarray
    met: np.ndarray
    known: Known


def world(users: int = 12, items: int = 40, depth: int = 20, user_depth: int = 6, seed: int = 0) -> World:
    """Host arrays; each user met about a sixth of the items, the first items more often."""
    rs = np.random.RandomState(seed)
    student, teacher = rs.randn(users, items).astype(np.float32), rs.randn(users, items).astype(np.float32)
    met = rs.rand(users, items) < np.linspace(0.4, 0.02, items)
    lists = as_lists(*np.nonzero(met), users)
    hidden = np.where(met, -np.inf, teacher)
    best = np.argsort(-hidden, axis=1)[:, :depth].astype(np.int32)
    held = met.copy()
    np.put_along_axis(held, best, True, axis=1)
    best_users = np.argsort(-hidden.T, axis=1)[:, :user_depth].astype(np.int32)
    scores = np.take_along_axis(teacher, best, axis=1)
    ranking = Ranking(best, scores, as_lists(*np.nonzero(held), users), best_users)
    return World(student, teacher, met, Known(items, lists, met.sum(axis=0).astype(np.int32), ranking))


def chi_square(counts: np.ndarray, probabilities: np.ndarray) -> float:
    """Pearson's statistic over its degrees of freedom: about 1, with a spread of sqrt(2 / degrees), where they agree."""
    there = probabilities > 0
    assert counts[~there].sum() == 0
    expected = counts.sum() * probabilities[there]
    return float(((counts[there] - expected) ** 2 / expected).sum() / max(there.sum() - 1, 1))


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


def rd(logits: np.ndarray, top: int, items: int, sharpness: float, mu: float, warm: bool, normalise: bool) -> np.ndarray:
    values = []
    for row in logits:
        best, others = row[:top], row[top:]
        position = [math.exp(-(r + 1) / sharpness) for r in range(top)]
        weights = [w / sum(position) for w in position]
        if warm:
            for r in range(top):
                above = sum(1 for other in others if other > best[r])
                rank = (items - 1) * above // len(others)
                weights[r] *= max(0.0, math.tanh(mu * (rank - r)))
            if normalise and sum(weights) > 0:
                weights = [w / sum(weights) for w in weights]
        values.append(-sum(w * log_sigmoid(s) for w, s in zip(weights, best, strict=True)))
    return np.array(values)


def relaxed_ranking(above: np.ndarray, below: np.ndarray) -> float:
    """Of one list."""
    value = 0.0
    for k in range(len(above)):
        value -= above[k] - math.log(sum(math.exp(s) for s in above[k:]) + sum(math.exp(s) for s in below))
    return value


def rrd(logits: np.ndarray, user: np.ndarray, interesting: int) -> np.ndarray:
    values, seen = [], set()
    for row, u in zip(logits, user.tolist(), strict=True):
        values.append(0.0 if u in seen else relaxed_ranking(row[:interesting], row[interesting:]))
        seen.add(u)
    return np.array(values)


def soft_binary(q: float, s: float) -> float:
    return -q * log_sigmoid(s) - (1 - q) * log_sigmoid(-s)


def cd(zs: np.ndarray, zt: np.ndarray, temperature: float, shift: float) -> np.ndarray:
    return np.array(
        [
            sum(soft_binary(1 / (1 + math.exp(-(t + shift) / temperature)), s) for s, t in zip(*rows, strict=True))
            for rows in zip(zs, zt, strict=True)
        ]
    )


def unkd(logits: np.ndarray) -> np.ndarray:
    half = logits.shape[1] // 2
    return np.array([-np.mean([log_sigmoid(row[i] - row[half + i]) for i in range(half)]) for row in logits])


def popularity_groups(popularity: np.ndarray, groups: int) -> np.ndarray:
    total, made, before = int(popularity.sum()), np.zeros(len(popularity), int), 0
    for item in sorted(range(len(popularity)), key=lambda i: (-popularity[i], i)):
        made[item] = before * groups // total if before < total else groups - 1
        before += int(popularity[item])
    return made


def bd_probabilities(s: np.ndarray, t: np.ndarray, items: int, form: str, epsilon: float, bottom: bool) -> np.ndarray:
    """Of one pool."""
    weights = []
    for i in range(len(s)):
        rank_s = sum(1 for j in range(len(s)) if s[j] > s[i])
        rank_t = sum(1 for j in range(len(t)) if t[j] > t[i])
        lower = (rank_s - rank_t) * items / len(s) * (-1 if bottom else 1)
        weights.append(math.exp(epsilon * lower) if form == "exp" else math.tanh(max(epsilon * lower, 0.0)))
    return np.array(weights) / sum(weights)
