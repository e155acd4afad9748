"""Quantization written again in NumPy: loops over channels and groups, float64 scales, integer arithmetic in Python."""

import itertools

import numpy as np

WEIGHTS = np.array(
    [[2.041, -2.556, 0.0418], [-0.568, -0.453, -0.0216], [-2.02, -0.232, -0.0865], [3.323, 0.226, -0.0353],
     [-0.281, -0.668, -0.1055]],
    np.float32,
)  # fmt: skip

INPUTS = np.array([[-0.65, -0.17, 1.66, 0.66], [-1.64, -0.01, -0.62, 0.15], [-1.61, 0.24, 0.24, 1.58]], np.float32)

TORCH_WEIGHTS = {
    (8, "channel"): [
        [2.0408976, -2.556, 0.041535433], [-0.57563776, -0.46289763, -0.021598425], [-2.0147321, -0.24151179, -0.0863937],
        [3.323, 0.22138582, -0.034889765], [-0.28781888, -0.66415745, -0.1055],
    ],
    (8, "tensor"): [
        [2.0408976, -2.5642047, 0.052330706], [-0.57563776, -0.44481102, -0.026165353], [-2.0147321, -0.23548818, -0.07849606],
        [3.323, 0.23548818, -0.026165353], [-0.28781888, -0.68029916, -0.10466141],
    ],
    (4, "channel"): [
        [1.8988571, -2.556, 0.045214284], [-0.47471428, -0.36514285, -0.015071428], [-1.8988571, -0.36514285, -0.09042857],
        [3.323, 0.36514285, -0.030142857], [-0.47471428, -0.7302857, -0.1055],
    ],
    (4, "tensor"): [
        [1.8988571, -2.3735714, 0], [-0.47471428, -0.47471428, 0], [-1.8988571, 0, 0], [3.323, 0, 0],
        [-0.47471428, -0.47471428, 0],
    ],
    (2, "channel"): [[3.323, -2.556, 0], [0, 0, 0], [-3.323, 0, -0.1055], [3.323, 0, 0], [0, 0, -0.1055]],
    (2, "tensor"): [[3.323, -3.323, 0], [0, 0, 0], [-3.323, 0, 0], [3.323, 0, 0], [0, 0, 0]],
}  # fmt: skip
"""`WEIGHTS` by torch 2.13's fake_quantize_per_channel_affine (or per_tensor), scale max|w| / (2^(bits-1) - 1); gradient 1."""

TORCH_INPUTS = {
    "two sides": (
        INPUTS, 1.3, 0.012941176071763039, -1,
        [[-0.84117645, -0.22, 1.6564705, 0.85411763], [-1.6435294, -0.012941176, -0.8023529, 0.19411764],
         [-1.6435294, 0.31058824, 0.31058824, 1.6564705]],
        [[1, 1, 0, 1], [0, 1, 1, 1], [0, 1, 1, 0]],
    ),
    "positive": (
        np.abs(INPUTS) + np.float32(0.5), 1.2, 0.008470587432384491, -128,
        [[0, 0, 1.9905881, 0.7962352], [0, 0, 0, 0.17788234], [0, 0.288, 0.288, 1.8974116]],
        [[0, 0, 1, 1], [0, 0, 0, 1], [0, 1, 1, 1]],
    ),
    "negative": (
        -np.abs(INPUTS) - np.float32(0.5), 1.0, 0.008470587432384491, 127,
        [[-0.6522352, -0.16941175, 0, 0], [-1.643294, -0.008470587, -0.6183529, 0], [-1.6094116, 0, 0, 0]],
        [[1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 0]],
    ),
}  # fmt: skip
"""Calibration data, factor of `INPUTS`, and by torch 2.13 (MinMaxObserver, fake_quantize_per_tensor_affine from -128 to 127)
scale, zero point, rounded inputs, their gradient."""


def groups(w: np.ndarray, granularity: str, size: int) -> list[tuple[int, ...]]:
    """The positions in `w` [..., outputs] that share a scale, as lists of flat indices."""
    flat = np.arange(w.size).reshape(-1, w.shape[-1])
    if granularity == "tensor":
        return [tuple(flat.ravel())]
    length = len(flat) if granularity == "channel" else size
    return [tuple(flat[i : i + length, c]) for c in range(w.shape[-1]) for i in range(0, len(flat), length)]


def symmetric(w: np.ndarray, bits: int, granularity: str = "channel", size: int = 32) -> tuple[np.ndarray, np.ndarray]:
    """Integers, and the scale of each weight."""
    levels = 2 ** (bits - 1) - 1
    q, scale = np.zeros(w.size), np.zeros(w.size)
    for members in map(list, groups(w, granularity, size)):
        own = w.ravel()[members].astype(float)
        scale[members] = (np.abs(own).max() or 1.0) / levels
        q[members] = np.rint(own / scale[members])
    return q.reshape(w.shape), scale.reshape(w.shape)


def binary(w: np.ndarray, granularity: str) -> np.ndarray:
    """XNOR-Net's weights, with zeros left as they are."""
    out = np.zeros(w.size)
    for members in map(list, groups(w, granularity, 0)):
        own = w.ravel()[members].astype(float)
        alpha = sum(abs(x) for x in own) / max(1, sum(x != 0 for x in own))
        out[members] = [alpha * float(np.sign(x)) for x in own]
    return out.reshape(w.shape)


def ternary(w: np.ndarray, granularity: str) -> np.ndarray:
    """TWN, equations 5 and 6 of the paper with delta = 0.7 E|w|."""
    out = np.zeros(w.size)
    for members in map(list, groups(w, granularity, 0)):
        own = w.ravel()[members].astype(float)
        delta = 0.7 * sum(abs(x) for x in own) / len(own)
        large = [abs(x) for x in own if abs(x) > delta]
        alpha = sum(large) / max(1, len(large))
        out[members] = [0 if abs(x) <= delta else alpha if x > 0 else -alpha for x in own]
    return out.reshape(w.shape)


def dense(q: np.ndarray, zero: int, w: np.ndarray) -> np.ndarray:
    """`sum (q - zero) w` [B, outputs] in Python's integers."""
    pairs = itertools.product(range(q.shape[0]), range(w.shape[1]))
    found = [sum((int(a) - zero) * int(b) for a, b in zip(q[i], w[:, j], strict=True)) for i, j in pairs]
    return np.array(found).reshape(q.shape[0], w.shape[1])


def convolution(
    q: np.ndarray, zero: int, w: np.ndarray, stride: int, pads: list[tuple[int, int]], groups: int, dilation: int
) -> np.ndarray:
    """The same of images [B, H, W, C] and kernels [h, w, C / groups, outputs]: padding stands for the real 0."""
    x = np.pad(q.astype(np.int64) - zero, [(0, 0), *pads, (0, 0)])
    high, wide, inner, outputs = w.shape
    rows = (x.shape[1] - (high - 1) * dilation - 1) // stride + 1
    columns = (x.shape[2] - (wide - 1) * dilation - 1) // stride + 1
    out = np.zeros((len(x), rows, columns, outputs), np.int64)
    for b, r, c, o in np.ndindex(*out.shape):
        first = o // (outputs // groups) * inner
        for i, j, k in np.ndindex(high, wide, inner):
            out[b, r, c, o] += x[b, r * stride + i * dilation, c * stride + j * dilation, first + k] * int(w[i, j, k, o])
    return out


def allocate(noise: np.ndarray, sizes: list[int], mean_bits: float) -> list[int]:
    """Bits of each layer: the cheapest step down, one after the other, until the mean is small enough."""
    widths, level = (8, 4, 2), [0] * len(sizes)
    while sum(n * widths[at] for n, at in zip(sizes, level, strict=True)) > mean_bits * sum(sizes) + 1e-6:
        prices = {
            i: (noise[i][at + 1] - noise[i][at]) / (sizes[i] * (widths[at] - widths[at + 1]))
            for i, at in enumerate(level)
            if at < 2
        }
        level[min(prices, key=lambda i: prices[i])] += 1
    return [widths[at] for at in level]
