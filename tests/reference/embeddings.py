"""Compressed embedding tables and shared weights in plain NumPy, with loops over ids, buckets and clusters."""

import numpy as np


def bucket(i: int, buckets: int) -> int:
    x = (i + 1) * 2654435761 % 2**32
    return (x ^ (x >> 16)) % buckets


def hashed(table: np.ndarray, buckets: int) -> np.ndarray:
    """The mean of the rows that share each bucket."""
    rows: list[list[np.ndarray]] = [[] for _ in range(buckets)]
    for i, row in enumerate(table):
        rows[bucket(i, buckets)].append(row.astype(float))
    return np.array([np.mean(own, axis=0) if own else np.zeros(table.shape[1]) for own in rows])


def sums(table: np.ndarray, m: int) -> np.ndarray:
    """The least-squares fit Q[i div m] + R[i mod m] to the rows, by the normal equations' pseudo-inverse."""
    n = len(table)
    design = np.zeros((n, -(-n // m) + m))
    for i in range(n):
        design[i, i // m] = design[i, -(-n // m) + i % m] = 1
    return design @ np.linalg.lstsq(design, table.astype(float), rcond=None)[0]


def products(table: np.ndarray, m: int) -> np.ndarray:
    """The least-squares fit Q[i div m] * R[i mod m] of a table whose rows m divides: the best matrix of rank 1, by column."""
    n, width = table.shape
    found = np.zeros((n, width))
    for k in range(width):
        u, s, v = np.linalg.svd(table[:, k].reshape(n // m, m).astype(float))
        found[:, k] = (s[0] * np.outer(u[:, 0], v[0])).ravel()
    return found


def lloyd(points: np.ndarray, centroids: np.ndarray, iterations: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes [n] and the means [k, w] of what has each, after some iterations; an empty cluster stays, and ends as 0."""
    points, centroids = points.astype(float), centroids.astype(float)

    def codes() -> np.ndarray:
        return np.array([min(range(len(centroids)), key=lambda c: ((p - centroids[c]) ** 2).sum()) for p in points])

    for _ in range(iterations):
        own = codes()
        centroids = np.array([points[own == c].mean(0) if (own == c).any() else centroids[c] for c in range(len(centroids))])
    own = codes()
    return own, np.array([points[own == c].mean(0) if (own == c).any() else 0 * centroids[c] for c in range(len(centroids))])


def row_int8(table: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """FBGEMM's integers, scales and offsets, in float32."""
    found = []
    for row in table:
        low, extent = row.min(), row.max() - row.min()
        found.append((np.rint((row - low) * (np.float32(255) / (extent + np.float32(1e-8)))), extent / np.float32(255), low))
    return tuple(np.array(part) for part in zip(*found, strict=True))  # type: ignore[return-value]


def row_int4(table: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """FBGEMM's integers, and scales and offsets that float16 holds."""
    found = []
    for row in table:
        low = np.float32(np.float16(row.min()))
        scale = np.float32(np.float16((row.max() - low) / np.float32(15))) or np.float32(1)
        found.append((np.clip(np.rint((row - low) * (np.float32(1) / scale)), 0, 15), scale, low))
    return tuple(np.array(part) for part in zip(*found, strict=True))  # type: ignore[return-value]
