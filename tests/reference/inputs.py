"""The inputs at which the published implementations' losses were evaluated: NumPy `RandomState(0)`, float64.

Feature maps are drawn as [B, C, H, W], as torch has them; `channels_last` turns them round.
"""

from typing import NamedTuple

import numpy as np


class Inputs(NamedTuple):
    """Logits [8, 10], labels [8], and feature maps [8, 6, H, W] of a student (s) and a teacher (t)."""

    zs: np.ndarray
    zt: np.ndarray
    y: np.ndarray
    fs: np.ndarray
    ft: np.ndarray
    ft8: np.ndarray


def golden_inputs() -> Inputs:
    """The draws in their order; `fsp`, `ftp` (signed maps) are drawn between `ft` and `ft8` and read by no test yet."""
    random = np.random.RandomState(0)

    def maps(size: int) -> np.ndarray:
        return random.randn(8, 6, size, size)

    zs, zt = random.randn(8, 10) * 3, random.randn(8, 10) * 3
    y = random.randint(0, 10, 8)
    fs, ft = np.maximum(maps(4), 0), np.maximum(maps(4), 0)
    _fsp, _ftp = maps(4), maps(4)
    ft8 = np.maximum(maps(8), 0)
    return Inputs(zs, zt, y, fs, ft, ft8)


def channels_last(maps: np.ndarray) -> np.ndarray:
    """[B, C, H, W] -> [B, H, W, C]."""
    return np.moveaxis(maps, 1, -1)
