"""Losses on several maps of the two networks: neuron selectivity, flow between layers, variational information."""

import itertools

import jax
import jax.numpy as jnp
from jax import Array

from jdistill.errors import UsageError
from jdistill.losses import _layers
from jdistill.losses.base import Loss, loss
from jdistill.pytrees import pytree, require_positive, static
from jdistill.types import Batch, Outputs, PyTree


@loss("nst", weight=50.0)
@pytree
class NeuronSelectivity(_layers.PairedMaps):
    """Neuron selectivity transfer: channels of the student fire where channels of the teacher do.

    Of maps [B, H, W, C] the larger is averaged to the smaller one's height and width. Each channel, a vector x of H W
    numbers scaled to unit L2 norm, is a sample; with the polynomial kernel k(x, y) = (x . y)^2, value [B] = sum over
    layers of mean k(t, t') + mean k(s, s') - 2 mean k(s, t), each over all pairs of channels: the squared maximum mean
    discrepancy of Huang & Wang 2017, https://arxiv.org/abs/1707.01219, equations 4 and 7 (d = 2, c = 0), in float32 or
    wider. Numbers of channels may differ. It equals RepDistiller `NSTLoss`, mdistiller and AberHu; TextBrewer's "nst"
    is another loss. RepDistiller's weight is 50, the default.

    Attributes:
      layers: maps both networks have; None takes their common stages (`stage1`, `stage2`, ...).

    Raises:
      UsageError: in `init`, a layer that does not exist or is no map.
    """

    layers: tuple[str, ...] | None = static(default=None)

    def __post_init__(self) -> None:
        _layers.require_names(self.layers)

    def of_pair(self, f_s: Array, f_t: Array) -> Array:
        return _discrepancy(f_s, f_t)


@loss("fsp", weight=50.0)
@pytree
class FlowOfSolution(Loss):
    """Flow of solution procedure: what one layer's channels have to do with the next one's is the teacher's.

    Of two consecutive maps [B, H, W, C] and [B, H', W', C'] of one network the larger is averaged to the smaller one's
    size, then G = mean over positions of f_c f'_c' [B, C, C']. Value [B] = sum over consecutive pairs of the mean over
    C C' of (G_s - G_t)^2, in float32 or wider: Yim et al. 2017, "A Gift from Knowledge Distillation" (CVPR), equations 1
    and 2, with the mean for the paper's sum. Both networks need the same channels in each layer. It equals the sum of
    RepDistiller `FSP`'s pairs (AberHu divides it by 3); torchdistill pools by maxima and sums norms. The paper and
    RepDistiller, whose weight of 50 is the default, train it alone as a first stage.

    Attributes:
      layers: maps both networks have, at least two; None takes `stem`, where both have it, and their common stages.

    Raises:
      UsageError: in `init`, a layer that does not exist or is no map, fewer than two, or channels that differ.
    """

    layers: tuple[str, ...] | None = static(default=None)

    def __post_init__(self) -> None:
        _layers.require_names(self.layers, least=2)

    def init(self, key: Array, student: Outputs, teacher: Outputs | None) -> PyTree:
        """`{}`, after checking that the layers exist, are maps and have equal channels."""
        del key
        teacher = _layers.require_teacher(teacher)
        _layers.require_chain(student, teacher, self._pairs(student, teacher))
        return {}

    def __call__(self, params: PyTree, student: Outputs, teacher: Outputs | None, batch: Batch) -> Array:
        del params, batch
        pairs = list(self._pairs(student, _layers.require_teacher(teacher)).values())
        values = [
            ((_flow(first[0], second[0]) - _flow(first[1], second[1])) ** 2).mean(axis=(1, 2))
            for first, second in itertools.pairwise(pairs)
        ]
        return sum(values[1:], start=values[0])

    def _pairs(self, student: Outputs, teacher: Outputs) -> dict[str, tuple[Array, Array]]:
        names = self.layers
        if names is None:
            candidates = ["stem", *_layers.numbered(student, "stage")]
            names = tuple(name for name in candidates if name in student.features and name in teacher.features)
        return _layers.pairs_of_maps(student, teacher, names)


@loss("vid")
@pytree
class VariationalInformation(Loss):
    """Variational information distillation: a Gaussian centred on what the student predicts explains the teacher's map.

    Of maps [B, H, W, C] the larger is averaged to the smaller one's height and width; mu = three 1x1 convolutions of the
    student's map, C_s -> C_t -> C_t -> C_t, without bias, with ReLU between; variance v_c = log(1 + exp(a_c)) + epsilon
    of each channel, with a learned. Value [B] = sum over layers of mean over elements of
    ((mu - t)^2 / v + log v) / 2, in float32 or wider, below 0 where the fit is good: Ahn et al. 2019,
    https://arxiv.org/abs/1904.05835, equations 5 and 6 without the constant, with a mean for the sum. It equals
    RepDistiller `VIDLoss` (mdistiller's value too, but there a is never trained; AberHu takes epsilon = 1e-6 and divides
    by 3). Weight 1 is RepDistiller's.

    Attributes:
      epsilon: smallest variance, > 0.
      initial_variance: v before training, above epsilon.
      layers: maps both networks have; None takes their common stages (`stage1`, `stage2`, ...).

    Raises:
      UsageError: a bad option; in `init`, a layer that does not exist or is no map.
    """

    zero_at_teacher = False

    epsilon: float = 1e-5
    initial_variance: float = 5.0
    layers: tuple[str, ...] | None = static(default=None)

    def __post_init__(self) -> None:
        require_positive(epsilon=self.epsilon, initial_variance=self.initial_variance)
        _layers.require_names(self.layers)
        values = self.epsilon, self.initial_variance
        if all(isinstance(value, int | float) for value in values) and values[0] >= values[1]:
            raise UsageError(f"initial_variance must be above epsilon={self.epsilon!r}, got {self.initial_variance!r}")

    def init(self, key: Array, student: Outputs, teacher: Outputs | None) -> PyTree:
        """Of each layer `kernel1`, `kernel2`, `kernel3` [C_in, C_out] and `variance` [C_t], which is a."""
        pairs = _layers.pairs_of_maps(student, _layers.require_teacher(teacher), self.layers)
        return {
            name: self._init_layer(jax.random.fold_in(key, i), f_s, f_t) for i, (name, (f_s, f_t)) in enumerate(pairs.items())
        }

    def __call__(self, params: PyTree, student: Outputs, teacher: Outputs | None, batch: Batch) -> Array:
        del batch
        pairs = _layers.pairs_of_maps(student, _layers.require_teacher(teacher), self.layers)
        values = [self._surprise(params[name], f_s, f_t) for name, (f_s, f_t) in pairs.items()]
        return sum(values[1:], start=values[0])

    def _init_layer(self, key: Array, f_s: Array, f_t: Array) -> PyTree:
        c_s, c_t, dtype = f_s.shape[3], f_t.shape[3], jnp.promote_types(f_s.dtype, jnp.float32)
        widths = (c_s, c_t, c_t, c_t)
        kernels = {
            f"kernel{i}": _layers.uniform(jax.random.fold_in(key, i), widths[i - 1 : i + 1], widths[i - 1], dtype)
            for i in (1, 2, 3)
        }
        excess = jnp.asarray(self.initial_variance - self.epsilon, dtype)
        return {**kernels, "variance": jnp.full((c_t,), excess + jnp.log(-jnp.expm1(-excess)), dtype)}

    def _surprise(self, params: PyTree, f_s: Array, f_t: Array) -> Array:
        f_s, f_t = _layers.to_smaller(_layers.at_least_float32(f_s), _layers.at_least_float32(f_t))
        x = f_s.astype(params["kernel1"].dtype)
        for i in (1, 2):
            x = jax.nn.relu(x @ params[f"kernel{i}"])
        error = x @ params["kernel3"] - f_t
        variance = jax.nn.softplus(params["variance"]) + jnp.asarray(self.epsilon, x.dtype)
        return 0.5 * (error**2 / variance + jnp.log(variance)).mean(axis=(1, 2, 3))


def _discrepancy(f_s: Array, f_t: Array) -> Array:
    """Two maps [B, H, W, C] -> [B]."""
    pooled = _layers.to_smaller(_layers.at_least_float32(f_s), _layers.at_least_float32(f_t))
    s, t = (_layers.unit(f.reshape(f.shape[0], -1, f.shape[3]).swapaxes(1, 2)) for f in pooled)
    kernels = [(_layers.gram(x, y) ** 2).mean(axis=(1, 2)) for x, y in ((t, t), (s, s), (s, t))]
    return kernels[0] + kernels[1] - 2 * kernels[2]


def _flow(first: Array, second: Array) -> Array:
    """Two maps [B, H, W, C] and [B, H', W', C'] of one network -> [B, C, C']."""
    first, second = _layers.to_smaller(_layers.at_least_float32(first), _layers.at_least_float32(second))
    products = jnp.einsum("bhwc,bhwd->bcd", first, second, precision=jax.lax.Precision.HIGHEST)
    return products / (first.shape[1] * first.shape[2])
