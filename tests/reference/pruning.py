"""Pruning masks by loops, and the masks that torch gives for the same numbers."""

import math

import numpy as np

SHAPES = {"fc1": (24, 9), "conv": (3, 3, 8, 5), "fc": (12, 7)}

# torch 2.13 on `golden_weights()` in torch's layout (linear [out, in], convolution [out, in, kh, kw]); mask bits in the layout
# of SHAPES, as hexadecimal. `l1_unstructured` and `global_unstructured` of torch.nn.utils.prune by amount;
# torch.ao.pruning.WeightNormSparsifier(1.0, (1, 4), 4 - n) on [out, in], the convolution's as [out kh kw, in].
LAYER = {
    0.1: {
        "fc1": "fe5bffdffffffd7ffafeffff5ffffffbfbfffddfefffefef7ffdbf",
        "conv": "6fbffffffffeebfb7fff7fffe4ffffffffffb7fdff7ffffeffffbffadbbfefffffff7eebfffffffbeffefbbf77",
        "fc": "fffffffd7ffff2ff7eff70",
    },
    0.5: {
        "fc1": "be189bccccf3a40328c8ded44fdfd9512018f9ce6faa85664f242a",
        "conv": "28823d07c3e881a373cd0db9c0d9febb03c8a0585b785f6a733a31aa49b1447a7eee2ea23fe577ea0538bb9814",
        "fc": "dfc642ad3c38520b7ad450",
    },
    0.9: {
        "fc1": "980008804030000100000400484a40010000810040000100020000",
        "conv": "20000400000081830008000000010280000800000a000008021210000001404a20040200004100a00010089010",
        "fc": "0804008120001000005000",
    },
}
GLOBAL = {
    0.1: {
        "fc1": "ff7bffdffffffd7ffafeffff5ffffffffbfffddfefffefef7ffdbf",
        "conv": "6fbffffffffeebfb7fff7dffe4ffffffffffb7fdff7ffffefffe3ffadbbfefffffff7eebfffffffbeffefbbf77",
        "fc": "fffffffd7ffff2ff7eff70",
    },
    0.5: {
        "fc1": "be189bccccf3a40b2ad8ded54fdfd959a918f9ce6fabc56e4f252a",
        "conv": "28823d07c3e8818373cd0d39c0d9febb03c8a0585b785f6a733a31aa49b1447a7eee2e223fc577ea0538bb9814",
        "fc": "db0442a93438520b7a5050",
    },
    0.9: {
        "fc1": "980008804030000100000400484a40010000810040000100020000",
        "conv": "20000404000081830008000000010280000800000a000008021210000001404a20040200004120a00010089010",
        "fc": "0804000120001000001000",
    },
}
N_OF_4 = {
    2: {
        "fc1": "9c48daccdcf3842b6ac2dec04fcf59594b18f90ee9a8476c47ac2a",
        "conv": "2e8bae07c3e883e353690cf8e0d93e9b03ebb059da686e78233a3b2a49ab44fa6a2e2e007fe177a2057cbbb930",
        "fc": "df5482a97d1692437ad250",
    },
    1: {
        "fc1": "9c00c88800f3040120809e00484b58510000c90849800760460400",
        "conv": "20838c04c028818302090c9040013699008aa0401a280648203811024901444820060e00364122a00510399100",
        "fc": "c84400a921101241405050",
    },
}


def golden_weights() -> dict[str, np.ndarray]:
    random = np.random.RandomState(0)
    return {name: random.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}


def golden_masks(table: dict[str, str]) -> dict[str, np.ndarray]:
    masks = {}
    for name, shape in SHAPES.items():
        bits = np.unpackbits(np.frombuffer(bytes.fromhex(table[name]), np.uint8), count=math.prod(shape))
        masks[name] = bits.reshape(shape).astype(np.float32)
    return masks


def without_smallest(scores: np.ndarray, count: int) -> np.ndarray:
    """1 for all but the `count` smallest scores, the earlier of equal ones first."""
    flat = np.asarray(scores).ravel()
    mask = np.ones(flat.size, np.float32)
    mask[sorted(range(flat.size), key=lambda i: (flat[i], i))[:count]] = 0
    return mask.reshape(np.shape(scores))


def n_of_m(w: np.ndarray, n: int, m: int) -> np.ndarray:
    """Of every `m` consecutive entries of the second-last axis the `n` of largest magnitude stay."""
    mask = np.zeros(w.shape, np.float32)
    for index in np.ndindex(*w.shape[:-2]):
        for column in range(w.shape[-1]):
            for start in range(0, w.shape[-2], m):
                rows = sorted(range(start, start + m), key=lambda row, c=column, i=index: abs(w[(*i, row, c)]))
                for row in rows[m - n :]:
                    mask[(*index, row, column)] = 1
    return mask


def cubic(step: int, ramp: float, end: float, start: float = 0.0) -> float:
    """Zhu and Gupta's sparsity after `step` steps of a ramp of `ramp` steps."""
    t = min(max(step / ramp, 0.0), 1.0)
    return end + (start - end) * (1 - t) ** 3


def soft_threshold(w: np.ndarray, s: float) -> np.ndarray:
    threshold = 1 / (1 + math.exp(-s))
    out = np.zeros(w.shape)
    for index in np.ndindex(*w.shape):
        out[index] = math.copysign(max(abs(float(w[index])) - threshold, 0.0), w[index])
    return out
