"""Networks and data for benchmarks that call the compiled programs themselves, without a config."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jdistill.data import digits, mnist
from jdistill.data.base import Preprocess
from jdistill.errors import UsageError
from jdistill.losses import CrossEntropy
from jdistill.method import Method, Stage, Term
from jdistill.models import MLP, LeNet
from jdistill.modules import from_linen
from jdistill.optim import Optimizer
from jdistill.pytrees import as_leaves
from jdistill.stages import enter_stage, init_state
from jdistill.tasks.classification import hits
from jdistill.train import Keys, Learner, Parts, TrainState

CLASSES = 10
NETWORKS: dict[str, tuple[nn.Module, int]] = {
    "digits": (MLP(outputs=CLASSES, widths=(32,)), 64),
    "mnist": (MLP(outputs=CLASSES, widths=(64,)), 128),
    "lenet": (LeNet(outputs=CLASSES), 64),
}
"""Name -> network and batch size: MLP 64-32-10 on digits, MLP 784-64-10 and LeNet-5 on MNIST."""


class Problem(NamedTuple):
    """A network, what it is trained on, and by what method: cross-entropy and Adam at 1e-3.

    Attributes:
      module: the network.
      parts, method: for `jdistill.train.programs`.
      data: `inputs` uint8 and `label` int32, on the host.
      batch: examples a step.
      what: what the data are.
    """

    module: nn.Module
    parts: Parts
    method: Method
    data: dict[str, Any]
    batch: int
    what: str

    @property
    def stage(self) -> Stage:
        """The only stage, its numbers as leaves."""
        return as_leaves(self.method.stages[0])

    @property
    def sample(self) -> dict[str, Any]:
        """Shapes of two rows."""
        shapes = {name: jax.ShapeDtypeStruct((2, *array.shape[1:]), array.dtype) for name, array in self.data.items()}
        return {**shapes, "index": jax.ShapeDtypeStruct((2,), jnp.int32)}

    def initial(self, seed: int) -> TrainState:
        """The network as a seed initialises it."""
        return init_state(self.parts, Keys.of(seed).init, self.sample)

    def entered(self, seed: int) -> TrainState:
        """The state with which training begins."""
        key = Keys.of(seed).init
        return enter_stage(self.parts, self.stage, self.initial(seed), key, self.sample, {}, self.data["label"])


def problem(name: str, epochs: int = 1, examples: int | None = None) -> Problem:
    """One of `NETWORKS` on the first `examples`; random arrays stand in for MNIST where $JDISTILL_DATA has none."""
    module, batch = NETWORKS[name]
    what = "digits" if name == "digits" else "MNIST"
    try:
        dataset = digits(validation=0.0) if name == "digits" else mnist(validation=0.0, download=False)
        data = {key: dataset.train[key] for key in ("inputs", "label")}
        preprocess = dataset.preprocess
    except UsageError as error:
        random, what = np.random.default_rng(0), f"random arrays ({error})"
        data = {
            "inputs": random.integers(0, 256, (60_000, 28, 28, 1), np.uint8),
            "label": random.integers(0, CLASSES, 60_000, np.int32),
        }
        preprocess = Preprocess((0.1307,), (0.3081,), 255.0)
    parts = Parts((Learner("student", from_linen(module)),), (), preprocess, None, hits)
    terms = (Term(name="cross_entropy", loss=CrossEntropy()),)
    stage = Stage(name="train", terms=terms, optim=Optimizer(batch_size=batch, epochs=epochs))
    data = {key: array[:examples] for key, array in data.items()}
    return Problem(module, parts, Method(stages=(stage,)), data, batch, what)
