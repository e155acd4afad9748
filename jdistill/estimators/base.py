"""Students that are not networks: fitted by scikit-learn to soft labels, kept as arrays, applied by a pure function.

So their artifact, bytes, latency and metrics are made by what makes a network's.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from jdistill.errors import UsageError
from jdistill.types import Model, Outputs, PyTree

FLOOR = 1e-6
"""The least probability of which a logarithm is taken."""


class Estimator:
    """What every estimator is: a frozen dataclass whose fields are keys of the config.

    Subclasses are decorated `@register("student", "name")` above `@dataclasses.dataclass(frozen=True)`. For two classes
    they keep one logit, that of the second ("yes"); `model` makes two of it, (0, z), where two are asked for.
    """

    def fit(self, inputs: np.ndarray, targets: np.ndarray, seed: int) -> PyTree:
        """What is deployed: nested dicts of arrays.

        Args:
          inputs: [N, D] float32, preprocessed by the very program that preprocesses what the model is given: a value
            that differs in its last bit may fall on the other side of a threshold.
          targets: [N, C] float64, probabilities that sum to 1 (soft, or 0 and 1), C >= 2; or [N], values to predict.
          seed: of what scikit-learn draws.

        Raises:
          UsageError: inputs or targets of another shape.
        """
        raise NotImplementedError

    def model(self, outputs: int) -> Model:
        """The function from arrays and preprocessed inputs to `Outputs(logits [B, outputs], {})`.

        Its `init` gives the structure of what `fit` gives, with arrays of no meaning in other shapes. Equal estimators
        give the same functions. `outputs` is C, or 1 for two classes or a value.
        """
        raise NotImplementedError


def rows(inputs: Any) -> Any:
    """[N, D] of inputs [N, D] or images [N, H, W, C].

    Raises:
      UsageError: inputs of another kind.
    """
    if isinstance(inputs, dict) or inputs.ndim not in (2, 4):
        found = "requests" if isinstance(inputs, dict) else f"inputs of shape {tuple(inputs.shape)}"
        raise UsageError(f"trees and linear_svm read tables [B, D] or images, got {found}; choose a network as student")
    return inputs.reshape(inputs.shape[0], -1)


def prepared(inputs: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`(inputs [N, D] float32, targets [N, C] or [N] float64)`, checked.

    Raises:
      UsageError: no rows, not as many targets as inputs, or probabilities that are none.
    """
    x, y = np.ascontiguousarray(rows(inputs), np.float32), np.asarray(targets, np.float64)
    if not len(x) or len(x) != len(y) or y.ndim not in (1, 2) or (y.ndim == 2 and y.shape[1] < 2):
        raise UsageError(f"an estimator is fitted to targets [N] or [N, C >= 2], got {y.shape} for inputs {x.shape}")
    if y.ndim == 2 and not (np.all(y >= 0) and np.allclose(y.sum(1), 1, atol=1e-4)):
        raise UsageError("an estimator is fitted to probabilities at least 0 that sum to 1, got others")
    return x, y


def log_odds(probabilities: np.ndarray) -> np.ndarray:
    """Logits float64 of [N, C] probabilities, clipped at 1e-6: [N, 1] of two, [N, C] logarithms of more."""
    logs = np.log(np.maximum(probabilities, FLOOR))
    return logs[:, 1:] - logs[:, :1] if probabilities.shape[1] == 2 else logs


def as_outputs(values: Array, outputs: int) -> Outputs:
    """`Outputs` of values [B, outputs], or of the one logit [B, 1] of two classes: (0, z) where `outputs` is 2."""
    if values.shape[1] == 1 and outputs == 2:
        values = jnp.concatenate([jnp.zeros_like(values), values], axis=1)
    return Outputs(values, {})
