"""Structured pruning of a multilayer perceptron, written again in loops."""

import math

import numpy as np


def norms(kernels: list[np.ndarray], order: int) -> list[float]:
    """Of each unit, the last axis of every kernel, the norm of all weights that produce it."""
    found = []
    for unit in range(kernels[0].shape[-1]):
        together = [abs(float(w)) for kernel in kernels for w in kernel[..., unit].ravel()]
        found.append(math.fsum(w**order for w in together) ** (1 / order))
    return found


def kept(kernels: list[np.ndarray], order: int, sparsity: float) -> list[int]:
    """The units that stay: all but the `round(sparsity * n)` of smallest norm."""
    found = norms(kernels, order)
    ranked = sorted(range(len(found)), key=lambda i: (found[i], i))
    return sorted(ranked[round(sparsity * len(found)) :])


def perceptron(params: dict, x: np.ndarray, units: dict[str, list[int]]) -> np.ndarray:
    """Logits of a network with ReLU in which only some `units` of each hidden layer (`fc1`, ...) are computed."""
    x, read = x.reshape(len(x), -1), range(x[0].size)
    for layer, chosen in units.items():
        kernel, bias = params[layer]["kernel"], params[layer]["bias"]
        out = np.zeros((len(x), kernel.shape[1]))
        for j in chosen:
            out[:, j] = np.maximum(sum(x[:, i] * kernel[i, j] for i in read) + bias[j], 0)
        x, read = out, chosen
    return sum(x[:, [i]] * params["fc"]["kernel"][i] for i in read) + params["fc"]["bias"]
