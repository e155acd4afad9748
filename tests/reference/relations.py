"""The losses on relations, written again from their formulas in plain loops: one number a batch, as they are published."""

import math
from typing import NamedTuple

import numpy as np


class Pooled(NamedTuple):
    """Of the same draws as `golden_inputs`: pooled features [8, 6] and [8, 9], and embeddings [8, 5] of two networks."""

    ps: np.ndarray
    pt: np.ndarray
    es: np.ndarray
    et: np.ndarray


def golden_pooled() -> Pooled:
    """The draws in their order; those that `golden_inputs` gives, and the maps of FSP, are drawn and dropped."""
    random = np.random.RandomState(0)
    for shape in ((8, 10), (8, 10)):
        random.randn(*shape)
    random.randint(0, 10, 8)
    for size in (4, 4, 4, 4, 8):
        random.randn(8, 6, size, size)
    ps, pt = random.randn(8, 6), random.randn(8, 9)
    for size in (4, 2, 4, 2):
        random.randn(8, 6, size, size)
    return Pooled(ps, pt, random.randn(8, 5), random.randn(8, 5))


def dot(x: np.ndarray, y: np.ndarray) -> float:
    return sum(float(a) * float(b) for a, b in zip(x, y, strict=True))


def norm(x: np.ndarray) -> float:
    return math.sqrt(dot(x, x))


def rows(f: np.ndarray) -> list[np.ndarray]:
    return [x.reshape(-1) for x in f]


def similarity_preserving(fs: np.ndarray, ft: np.ndarray) -> float:
    total, count = 0.0, len(fs)
    for i in range(count):
        g_s, g_t = (np.array([dot(f[i], other) for other in f]) for f in (rows(fs), rows(ft)))
        total += sum((a - b) ** 2 for a, b in zip(g_s / norm(g_s), g_t / norm(g_t), strict=True))
    return total / count**2


def correlation_rbf(fs: np.ndarray, ft: np.ndarray, gamma: float, order: int) -> float:
    total, count = 0.0, len(fs)
    for i in range(count):
        for j in range(count):
            k_s, k_t = (
                sum(
                    math.exp(-2 * gamma) * (2 * gamma * dot(f[i], f[j]) / norm(f[i]) / norm(f[j])) ** p / math.factorial(p)
                    for p in range(order + 1)
                )
                for f in (rows(fs), rows(ft))
            )
            total += (k_s - k_t) ** 2
    return total / count**2


def correlation_neighbours(es: np.ndarray, et: np.ndarray) -> float:
    """Of embeddings [B, E]."""
    total = 0.0
    for i in range(len(es) - 1):
        total += dot(np.abs(es[i] - et[i]), np.abs(es[i + 1] - et[i + 1]))
    return total / (len(es) - 1)


def huber(x: float) -> float:
    return x**2 / 2 if abs(x) < 1 else abs(x) - 0.5


def rkd_distance(fs: np.ndarray, ft: np.ndarray) -> float:
    count = len(fs)
    normalised = []
    for f in (rows(fs), rows(ft)):
        d = [[norm(f[i] - f[j]) if i != j else 0.0 for j in range(count)] for i in range(count)]
        mean = sum(map(sum, d)) / (count * (count - 1))
        normalised.append([[x / mean for x in row] for row in d])
    return sum(huber(normalised[0][i][j] - normalised[1][i][j]) for i in range(count) for j in range(count)) / count**2


def rkd_angle(fs: np.ndarray, ft: np.ndarray) -> float:
    def cosine(f: list[np.ndarray], i: int, j: int, k: int) -> float:
        if i in (j, k):
            return 0.0
        return dot(f[j] - f[i], f[k] - f[i]) / norm(f[j] - f[i]) / norm(f[k] - f[i])

    s, t, count = rows(fs), rows(ft), len(fs)
    every = range(count)
    return sum(huber(cosine(s, i, j, k) - cosine(t, i, j, k)) for i in every for j in every for k in every) / count**3


def unit_rows(f: np.ndarray) -> np.ndarray:
    return np.array([x / norm(x) for x in rows(f)])


def pkt(fs: np.ndarray, ft: np.ndarray, epsilon: float) -> float:
    total, count = 0.0, len(fs)
    for i in range(count):
        p = []
        for f in (rows(fs), rows(ft)):
            x = [v / (norm(v) + epsilon) for v in f]
            s = [(dot(x[i], other) + 1) / 2 for other in x]
            p.append([v / sum(s) for v in s])
        total += sum(t * math.log((t + epsilon) / (s + epsilon)) for s, t in zip(*p, strict=True))
    return total / count**2
