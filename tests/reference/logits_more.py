"""Further losses on logits [B, K] in plain NumPy and loops over examples and classes, from their formulas."""

import math

import numpy as np

from tests.reference.losses import softmax


def _pairs(zs: np.ndarray, zt: np.ndarray, temperature: float = 1.0) -> list[tuple[np.ndarray, np.ndarray]]:
    """Of each example, the student's and the teacher's probabilities."""
    return [(softmax(s / temperature), softmax(t / temperature)) for s, t in zip(zs, zt, strict=True)]


def _kl(p: np.ndarray, q: np.ndarray) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def reverse_kl(zs: np.ndarray, zt: np.ndarray, temperature: float) -> np.ndarray:
    return np.array([temperature**2 * _kl(ps, pt) for ps, pt in _pairs(zs, zt, temperature)])


def js(zs: np.ndarray, zt: np.ndarray, temperature: float) -> np.ndarray:
    pairs = _pairs(zs, zt, temperature)
    return np.array([temperature**2 * (_kl(pt, (ps + pt) / 2) + _kl(ps, (ps + pt) / 2)) / 2 for ps, pt in pairs])


def skew_kl(zs: np.ndarray, zt: np.ndarray, alpha: float, temperature: float) -> np.ndarray:
    pairs = _pairs(zs, zt, temperature)
    return np.array([temperature**2 * _kl(pt, alpha * pt + (1 - alpha) * ps) for ps, pt in pairs])


def total_variation(zs: np.ndarray, zt: np.ndarray) -> np.ndarray:
    """The most by which the two differ in the probability of any set of classes."""
    return np.array([sum(max(a - b, 0) for a, b in zip(ps, pt, strict=True)) for ps, pt in _pairs(zs, zt)])


def bce_soft(zs: np.ndarray, zt: np.ndarray, temperature: float) -> np.ndarray:
    """Summed over the logits."""
    values = []
    for s_row, t_row in zip(zs, zt, strict=True):
        value = 0.0
        for s, t in zip(s_row, t_row, strict=True):
            p, q = (1 / (1 + math.exp(-z / temperature)) for z in (s, t))
            value -= q * math.log(p) + (1 - q) * math.log(1 - p)
        values.append(value)
    return np.array(values)


def dkd(zs: np.ndarray, zt: np.ndarray, y: np.ndarray, alpha: float, beta: float, temperature: float) -> np.ndarray:
    values = []
    for (ps, pt), label in zip(_pairs(zs, zt, temperature), y, strict=True):
        target = _kl(np.array([pt[label], 1 - pt[label]]), np.array([ps[label], 1 - ps[label]]))
        ns, nt = (np.delete(p, label) / (1 - p[label]) for p in (ps, pt))
        values.append(temperature**2 * (alpha * target + beta * _kl(nt, ns)))
    return np.array(values)


def nkd(zs: np.ndarray, zt: np.ndarray, y: np.ndarray, gamma: float, temperature: float) -> np.ndarray:
    values = []
    for s, t, label in zip(zs, zt, y, strict=True):
        ns, nt = (softmax(np.delete(z, label) / temperature) for z in (s, t))
        rest = -sum(b * math.log(a) for a, b in zip(ns, nt, strict=True))
        values.append(-softmax(t)[label] * math.log(softmax(s)[label]) + gamma * temperature**2 * rest)
    return np.array(values)


def _pearson(x: np.ndarray, y: np.ndarray) -> float:
    x, y = x - x.mean(), y - y.mean()
    return (x @ y) / (np.linalg.norm(x) * np.linalg.norm(y) + 1e-8)


def dist(zs: np.ndarray, zt: np.ndarray, beta: float, gamma: float, temperature: float) -> np.ndarray:
    pairs = _pairs(zs, zt, temperature)
    columns = [np.stack(p).T for p in zip(*pairs, strict=True)]
    intra = np.mean([1 - _pearson(s, t) for s, t in zip(*columns, strict=True)])
    return np.array([temperature**2 * (beta * (1 - _pearson(ps, pt)) + gamma * intra) for ps, pt in pairs])


def standardise(z: np.ndarray, epsilon: float = 1e-7, ddof: int = 1) -> np.ndarray:
    return np.stack([(row - row.mean()) / (epsilon + row.std(ddof=ddof)) for row in z])


def mlkd_parts(zs: np.ndarray, zt: np.ndarray, temperature: float) -> tuple[np.ndarray, np.ndarray, float]:
    """KD [B], likeness of examples [B] and of classes (one number) at one temperature."""
    pairs = _pairs(zs, zt, temperature)
    ps, pt = (np.stack(p) for p in zip(*pairs, strict=True))
    kd = np.array([temperature**2 * _kl(t, s) for s, t in pairs])
    examples = np.array([sum((s @ other_s - t @ other_t) ** 2 for other_s, other_t in pairs) for s, t in pairs])
    classes = 0.0
    for i in range(zs.shape[1]):
        for j in range(zs.shape[1]):
            classes += (ps[:, i] @ ps[:, j] - pt[:, i] @ pt[:, j]) ** 2 / zs.shape[1]
    return kd, examples, classes
