"""A linear support vector machine as a student."""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np

from jdistill.data.base import Schema
from jdistill.errors import UsageError
from jdistill.estimators.base import FLOOR, Estimator, as_outputs, prepared, rows
from jdistill.models.base import positive_integer
from jdistill.models.tabular._encode import columns, entries, table_rows
from jdistill.pytrees import require_positive
from jdistill.registry import register
from jdistill.types import Model, PyTree


@register("student", "linear_svm")
@dataclasses.dataclass(frozen=True)
class LinearSVM(Estimator):
    """A linear support vector machine on soft labels (scikit-learn's LinearSVC: squared hinge, one class against the rest).

    Each class is separated from the others on two copies of every row, weighted by the class's probability and by what is
    left of 1. Two classes need one such separation. Categorical columns are read one-hot. Logits are decision values
    w x + b as they are, without Platt's scaling: their order and sign mean what a classifier's do, probabilities made of
    them are not calibrated.

    Attributes:
      schema: what the columns are.
      c: the weight of the hinge losses, summed over rows, against half of |w|^2; > 0.
      max_iter: the most iterations of the solver.

    Raises:
      UsageError: a `c` that is not positive, a `max_iter` that is not a positive integer; from `fit`, values to predict.
    """

    schema: Schema
    c: float = 1.0
    max_iter: int = 1000

    def __post_init__(self) -> None:
        require_positive(c=self.c)
        positive_integer(max_iter=self.max_iter)

    def fit(self, inputs: np.ndarray, targets: np.ndarray, seed: int) -> PyTree:
        """See `Estimator.fit`; nothing is drawn. A solver that stops early says so by a warning."""
        from scipy.sparse import vstack
        from sklearn.svm import LinearSVC

        del seed
        x, y = prepared(inputs, targets)
        if y.ndim == 1:
            raise UsageError("student=linear_svm tells classes apart, this task predicts values; use tree or gbt")
        one_hot = _sparse(x, self.schema.fields)
        both, label = vstack([one_hot, one_hot]).tocsr(), np.repeat([1, 0], len(x))
        wanted = y[:, 1:] if y.shape[1] == 2 else y
        kernel, bias = np.zeros((one_hot.shape[1], wanted.shape[1])), np.zeros(wanted.shape[1])
        for i, column in enumerate(np.clip(wanted, FLOOR, 1 - FLOOR).T):
            one = LinearSVC(C=self.c, dual=False, max_iter=self.max_iter)
            one.fit(both, label, sample_weight=np.concatenate([column, 1 - column]))
            kernel[:, i], bias[i] = one.coef_[0], one.intercept_[0]
        return {"fc": {"kernel": kernel.astype(np.float32), "bias": bias.astype(np.float32)}}

    def model(self, outputs: int) -> Model:
        return _model(self.schema.fields, outputs)


def _sparse(x: np.ndarray, fields: tuple[int, ...]):
    """One-hot columns [N, table rows] as a sparse matrix."""
    from scipy.sparse import csr_matrix

    row, value = (np.asarray(a).ravel() for a in entries(jnp.asarray(x), fields))
    starts = np.arange(0, row.size + 1, x.shape[1])
    return csr_matrix((value.astype(np.float64), row, starts), (len(x), table_rows(fields or (0,) * x.shape[1])))


@functools.lru_cache(maxsize=64)
def _model(fields: tuple[int, ...], outputs: int) -> Model:
    def init(key, inputs):
        del key
        shape = table_rows(columns(rows(jnp.zeros(inputs.shape)), fields)), 1 if outputs == 2 else outputs
        return {"fc": {"kernel": jnp.zeros(shape), "bias": jnp.zeros(shape[1:])}}, {}

    def apply(params, state, inputs, *, key=None, train=False):
        del key, train
        kernel, bias = params["fc"]["kernel"], params["fc"]["bias"]
        row, value = entries(rows(inputs), fields)
        values = jnp.einsum("bd,bdc->bc", value, kernel[row]) if any(fields) else value @ kernel
        return as_outputs(values + bias, outputs), state

    return Model(init, apply)
