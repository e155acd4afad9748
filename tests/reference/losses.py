"""The losses written again in plain NumPy, one example at a time, from their formulas; maps are [B, H, W, C]."""

import math

import numpy as np


def softmax(z: np.ndarray) -> np.ndarray:
    """Of one vector."""
    e = np.exp(z - z.max())
    return e / e.sum()


def two_classes(z: np.ndarray) -> np.ndarray:
    """[B, 1] logits of "yes" -> [B, 2] logits with the same probabilities."""
    return np.concatenate([np.zeros_like(z), z], axis=1)


def cross_entropy(z: np.ndarray, y: np.ndarray, smoothing: float = 0.0) -> np.ndarray:
    values = []
    for logits, label in zip(z, y, strict=True):
        q = np.full(len(logits), smoothing / len(logits))
        q[label] += 1 - smoothing
        values.append(-(q * np.log(softmax(logits))).sum())
    return np.array(values)


def kd(zs: np.ndarray, zt: np.ndarray, temperature: float) -> np.ndarray:
    values = []
    for s, t in zip(zs, zt, strict=True):
        ps, pt = softmax(s / temperature), softmax(t / temperature)
        values.append(temperature**2 * sum(q * math.log(q / p) for p, q in zip(ps, pt, strict=True)))
    return np.array(values)


def bernoulli_kl(zs: np.ndarray, zt: np.ndarray, temperature: float) -> np.ndarray:
    values = []
    for s, t in zip(zs[:, 0], zt[:, 0], strict=True):
        p, q = (1 / (1 + math.exp(-z / temperature)) for z in (s, t))
        values.append(temperature**2 * (q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p))))
    return np.array(values)


def logit_mse(zs: np.ndarray, zt: np.ndarray) -> np.ndarray:
    return np.array([np.mean((s - t) ** 2) for s, t in zip(zs, zt, strict=True)])


def adaptive_average_pool(maps: np.ndarray, height: int, width: int) -> np.ndarray:
    """By loops, with torch's cells: floor(i H / n) to ceil((i + 1) H / n)."""
    b, h, w, c = maps.shape
    out = np.zeros((b, height, width, c))
    for i in range(height):
        for j in range(width):
            rows = slice(math.floor(i * h / height), math.ceil((i + 1) * h / height))
            columns = slice(math.floor(j * w / width), math.ceil((j + 1) * w / width))
            out[:, i, j] = maps[:, rows, columns].mean(axis=(1, 2))
    return out


def attention_map(maps: np.ndarray, power: float) -> np.ndarray:
    vectors = [(np.abs(m) ** power).mean(axis=-1).reshape(-1) for m in maps]
    return np.array([v / max(np.linalg.norm(v), 1e-12) for v in vectors])


def attention(fs: np.ndarray, ft: np.ndarray, power: float = 2.0, distance: str = "mse") -> np.ndarray:
    """Of one layer."""
    size = [min(a, b) for a, b in zip(fs.shape[1:3], ft.shape[1:3], strict=True)]
    a_s, a_t = (attention_map(adaptive_average_pool(f, *size), power) for f in (fs, ft))
    return np.array([np.mean(d**2) if distance == "mse" else np.linalg.norm(d) for d in a_s - a_t])


def convolve(x: np.ndarray, kernel: np.ndarray, stride: int, padding: int) -> np.ndarray:
    """torch's `Conv2d`: x [B, H, W, C], kernel [kh, kw, C, D]."""
    x = np.pad(x, [(0, 0), (padding, padding), (padding, padding), (0, 0)])
    kh, kw = kernel.shape[:2]
    height, width = (x.shape[1] - kh) // stride + 1, (x.shape[2] - kw) // stride + 1
    out = np.zeros((x.shape[0], height, width, kernel.shape[3]))
    for i in range(height):
        for j in range(width):
            patch = x[:, i * stride : i * stride + kh, j * stride : j * stride + kw]
            out[:, i, j] = np.einsum("bhwc,hwcd->bd", patch, kernel)
    return out


def convolve_transposed(x: np.ndarray, kernel: np.ndarray, stride: int = 2, padding: int = 1) -> np.ndarray:
    """torch's `ConvTranspose2d`: every input pixel adds its kernel to the output, then the padding is cut off."""
    b, h, w, _ = x.shape
    kh, kw = kernel.shape[:2]
    out = np.zeros((b, (h - 1) * stride + kh, (w - 1) * stride + kw, kernel.shape[3]))
    for i in range(h):
        for j in range(w):
            out[:, i * stride : i * stride + kh, j * stride : j * stride + kw] += np.einsum(
                "bc,hwcd->bhwd", x[:, i, j], kernel
            )
    return out[:, padding:-padding, padding:-padding]


def batch_norm_relu(x: np.ndarray, scale: np.ndarray, offset: np.ndarray, epsilon: float = 1e-5) -> np.ndarray:
    mean, variance = x.mean(axis=(0, 1, 2)), x.var(axis=(0, 1, 2))
    return np.maximum((x - mean) / np.sqrt(variance + epsilon) * scale + offset, 0)


def hint(predicted: np.ndarray, ft: np.ndarray) -> np.ndarray:
    return np.array([np.mean((p - t) ** 2) for p, t in zip(predicted, ft, strict=True)])
