"""Losses on lists written again in plain NumPy, one list and one pair at a time; a place of None or -1e9 is filled."""

import math

import numpy as np

FILLED = -1e9


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def documents(*columns: np.ndarray) -> list[tuple[float, ...]]:
    """Of one list, the tuples of its documents: neither a logit of -1e9 nor a grade of -1."""
    return [row for row in zip(*map(np.ndarray.tolist, columns), strict=True) if all(x != FILLED and x != -1 for x in row)]


def bpr(z: np.ndarray) -> np.ndarray:
    values = []
    for row in z:
        negatives = [s for s in row[1:] if s != FILLED and row[0] != FILLED]
        values.append(sum(-math.log(sigmoid(row[0] - s)) for s in negatives))
    return np.array(values)


def sampled_softmax(z: np.ndarray) -> np.ndarray:
    values = []
    for row in z:
        total = sum(math.exp(s) for s in row if s != FILLED)
        values.append(0.0 if row[0] == FILLED else -math.log(math.exp(row[0]) / total))
    return np.array(values)


def pointwise_bce(z: np.ndarray, mean: bool = False) -> np.ndarray:
    values = []
    for row in z:
        terms = [-math.log(1 - sigmoid(s)) for s in row[1:] if s != FILLED]
        terms = [0.0] if row[0] == FILLED else [-math.log(sigmoid(row[0])), *terms]
        values.append(sum(terms) / (len(terms) if mean else 1))
    return np.array(values)


def listwise_softmax(z: np.ndarray, target: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """-sum softmax(target / T) log softmax(z / T)."""
    values = []
    for pair in zip(z, target, strict=True):
        there = [(s / temperature, y / temperature) for s, y in documents(*pair)]
        of_z, of_y = (sum(math.exp(x[i]) for x in there) for i in (0, 1))
        values.append(-sum(math.exp(y) / of_y * math.log(math.exp(s) / of_z) for s, y in there))
    return np.array(values)


def plackett_luce(logits: list[float], top: int | None = None) -> float:
    """-log probability of drawing them in this order."""
    top = len(logits) if top is None else min(top, len(logits))
    return -sum(math.log(math.exp(logits[k]) / sum(math.exp(s) for s in logits[k:])) for k in range(top))


def list_mle(z: np.ndarray, by: np.ndarray, top: int | None = None) -> np.ndarray:
    values = []
    for pair in zip(z, by, strict=True):
        ordered = sorted(documents(*pair), key=lambda document: -document[1])  # stable
        values.append(plackett_luce([s for s, _ in ordered], top))
    return np.array(values)


def pairs(there: list[tuple[float, ...]], column: int) -> list[tuple[tuple[float, ...], tuple[float, ...]]]:
    return [(a, b) for a in there for b in there if a[column] > b[column]]


def pairwise_logistic(z: np.ndarray, by: np.ndarray, mean: bool = False) -> np.ndarray:
    values = []
    for row in zip(z, by, strict=True):
        terms = [-math.log(sigmoid(a[0] - b[0])) for a, b in pairs(documents(*row), 1)]
        values.append(sum(terms) / (max(len(terms), 1) if mean else 1))
    return np.array(values)


def margin_mse(zs: np.ndarray, zt: np.ndarray, grades: np.ndarray, every: bool = False) -> np.ndarray:
    values = []
    for row in zip(zs, zt, grades, strict=True):
        there = documents(*row)
        chosen = [(a, b) for i, a in enumerate(there) for b in there[i + 1 :]] if every else pairs(there, 2)
        terms = [((a[0] - b[0]) - (a[1] - b[1])) ** 2 for a, b in chosen]
        values.append(sum(terms) / max(len(terms), 1))
    return np.array(values)


def rank_distil(zs: np.ndarray, zt: np.ndarray, noise: np.ndarray, top: int | None, temperature: float) -> np.ndarray:
    """`noise` is [samples, B, K]."""
    values = []
    for i, (s, t) in enumerate(zip(zs, zt, strict=True)):
        samples = []
        for drawn in noise[:, i]:
            there = [(a / temperature, b / temperature + g) for a, b, g in zip(s, t, drawn, strict=True) if a != FILLED]
            samples.append(plackett_luce([a for a, _ in sorted(there, key=lambda pair: -pair[1])], top))
        values.append(np.mean(samples))
    return np.array(values)
