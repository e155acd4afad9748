"""The losses on several maps, written again from their formulas in plain loops; maps are [B, H, W, C], values [B]."""

import math

import numpy as np

from tests.reference.inputs import channels_last
from tests.reference.losses import adaptive_average_pool


def golden_lists() -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The maps of FSP after the first, of the same draws as `golden_inputs`: [8, 4, 4, 6] and [8, 2, 2, 6] each."""
    random = np.random.RandomState(0)
    for shape in ((8, 10), (8, 10)):
        random.randn(*shape)
    random.randint(0, 10, 8)
    for size in (4, 4, 4, 4, 8):
        random.randn(8, 6, size, size)
    for width in (6, 9):
        random.randn(8, width)
    maps = [channels_last(np.maximum(random.randn(8, 6, size, size), 0)) for size in (4, 2, 4, 2)]
    return maps[:2], maps[2:]


def to_smaller(a: np.ndarray, b: np.ndarray) -> list[np.ndarray]:
    size = [min(m, n) for m, n in zip(a.shape[1:3], b.shape[1:3], strict=True)]
    return [adaptive_average_pool(f, *size) for f in (a, b)]


def nst(fs: np.ndarray, ft: np.ndarray) -> np.ndarray:
    """Of one layer."""

    def channels(f: np.ndarray) -> list[np.ndarray]:
        columns = [f[:, :, c].reshape(-1) for c in range(f.shape[2])]
        return [x / max(math.sqrt(sum(x**2)), 1e-12) for x in columns]

    def kernel(xs: list[np.ndarray], ys: list[np.ndarray]) -> float:
        return sum(sum(x * y) ** 2 for x in xs for y in ys) / (len(xs) * len(ys))

    values = []
    for s, t in zip(*to_smaller(fs, ft), strict=True):
        s, t = channels(s), channels(t)
        values.append(kernel(t, t) + kernel(s, s) - 2 * kernel(s, t))
    return np.array(values)


def flow(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    first, second = to_smaller(first, second)
    b, height, width, c = first.shape
    out = np.zeros((b, c, second.shape[3]))
    for i in range(height):
        for j in range(width):
            for k in range(c):
                out[:, k] += first[:, i, j, k, None] * second[:, i, j] / (height * width)
    return out


def fsp(students: list[np.ndarray], teachers: list[np.ndarray]) -> np.ndarray:
    total = np.zeros(len(students[0]))
    for i in range(len(students) - 1):
        difference = flow(*students[i : i + 2]) - flow(*teachers[i : i + 2])
        total += [np.mean(d**2) for d in difference]
    return total


def vid(fs: np.ndarray, ft: np.ndarray, params: dict, epsilon: float) -> np.ndarray:
    """Of one layer, with its parameters."""
    x, t = to_smaller(fs, ft)
    for i in (1, 2, 3):
        x = x @ np.asarray(params[f"kernel{i}"])
        x = np.maximum(x, 0) if i < 3 else x
    values = []
    for mean, target in zip(x, t, strict=True):
        total = 0.0
        for c, a in enumerate(np.asarray(params["variance"])):
            variance = math.log(1 + math.exp(a)) + epsilon
            total += sum(0.5 * ((m - y) ** 2 / variance + math.log(variance)) for m, y in zip(
                mean[:, :, c].reshape(-1), target[:, :, c].reshape(-1), strict=True
            ))  # fmt: skip
        values.append(total / target.size)
    return np.array(values)
