"""Losses that compare derivatives with respect to the inputs: of the cross-entropy, and of the logits.

They call the two networks on the batch's inputs and differentiate them there. The derivative is that of the sum over the
batch, so row i is that of example i alone, save where a network itself couples the examples: with BatchNorm in batch mode
it holds the effect of input i on the other examples too. Training the student on them differentiates it twice; a network
whose activations are piecewise linear (ReLU) serves, since the first derivative still depends on the parameters.
"""

import jax
import jax.numpy as jnp
from jax import Array

from jdistill.errors import UsageError
from jdistill.losses import _layers
from jdistill.losses.base import Loss, loss
from jdistill.losses.features import Attention
from jdistill.losses.logits import as_classes, require_same_width
from jdistill.pytrees import pytree, require_one_of, require_positive, static
from jdistill.types import Batch, Context, Network, Outputs, PyTree


class _OnInputs(Loss):
    """A loss on derivatives with respect to the inputs: a subclass writes `values`."""

    calls_networks = True

    def init(self, key: Array, student: Outputs, teacher: Outputs | None) -> PyTree:
        """`{}`, after checking that there is a teacher."""
        del key, student
        _layers.require_teacher(teacher)
        return {}

    def evaluate(self, params: PyTree, state: PyTree, context: Context) -> tuple[Array, PyTree]:
        """Values [B] and the state as it came."""
        del params
        _layers.require_teacher(context.teacher)
        if context.teacher_network is None:
            raise UsageError(
                "teacher must be a network for this loss, which calls it, got a table of outputs; "
                "keep the network itself at hand in training, or use loss=kd"
            )
        inputs = context.batch["inputs"]
        found = getattr(inputs, "dtype", "a request")  # which is a dict
        if isinstance(found, str) or not jnp.issubdtype(found, jnp.floating):
            raise UsageError(f"inputs must be floats for a loss on derivatives, got {found}; use loss=kd")
        return self.values(context.student_network, context.teacher_network, context.batch, context.key), state

    def values(self, student: Network, teacher: Network, batch: Batch, key: Array) -> Array:
        """Values [B] of the two networks on the batch's inputs."""
        raise NotImplementedError


@loss("input_gradient")
@pytree
class InputGradient(_OnInputs):
    """Gradient-based attention transfer: the student's cross-entropy reacts to the inputs as the teacher's does.

    J [B, D] = derivative of an example's cross-entropy with its label with respect to its inputs, flattened. Value [B] =
    1/2 ||J_s - J_t||_2^2 ("half_sum"), 1/2 ||J_s - J_t||_2 ("half_norm"), or mean over D of (J_s - J_t)^2 ("mean"), in
    float32 or wider: Zagoruyko & Komodakis 2017, https://arxiv.org/abs/1612.03928, section 3.2. The paper prints the
    loss without the square but the derivative with it, beta (J_s - J_t) times that of J_s; the derivative is what trains,
    so "half_sum" is the default and "half_norm" the loss as printed. The weight is the paper's beta; the default of 1 is
    not a published value. J is that of one example's cross-entropy: where one differentiates the batch's mean, as frameworks
    often do, it is B times smaller. Czarnecki et al. 2017, https://arxiv.org/abs/1706.04859, match derivatives of outputs
    instead (loss=jacobian). One logit (K = 1) is taken as the two classes (0, z). The networks may differ in their number
    of logits, as long as both have the labels' classes.

    Attributes:
      reduction: "half_sum", "half_norm" or "mean", over the inputs.

    Raises:
      UsageError: another reduction; in `evaluate`, inputs that are not floats, or a teacher that is only a table.
    """

    reduction: str = static(default="half_sum")

    def __post_init__(self) -> None:
        require_one_of(("half_sum", "half_norm", "mean"), reduction=self.reduction)

    def values(self, student: Network, teacher: Network, batch: Batch, key: Array) -> Array:
        del key
        j_s, j_t = (_layers.rows(j) for j in _gradients(student, teacher, batch))
        squares = (j_s - j_t) ** 2
        if self.reduction == "mean":
            return squares.mean(axis=1)
        total = squares.sum(axis=1)
        return (_layers.safe_sqrt(total) if self.reduction == "half_norm" else total) / 2


@loss("jacobian")
@pytree
class JacobianMatching(_OnInputs):
    """Jacobian matching, or Sobolev training: the student's logits react to the inputs as the teacher's do.

    With g [B, D] the derivative of v . z, a combination v [K] of an example's logits (the teacher's greatest: "top"; the
    label's: "label"; random ones: "random"; or each of all: "full"), with respect to its inputs, flattened, the value [B]
    is ||g_s - g_t||_2^2 ("sum") or its mean over D ("mean"), in float32 or wider. Of the forms:

    "top": the teacher's greatest logit, g scaled to unit length: Srinivas & Fleuret 2018,
    https://arxiv.org/abs/1803.00443, equation 10 as public reimplementations have it. With "sum" the value is at most 4,
    and it does not see the logits' scale.

    "label": the label's logit, g scaled to unit length. With reduction="mean" it equals AberHu `Sobolev`. An example
    whose label is none of the classes counts 0.

    "random": the mean over `projections` vectors v drawn uniformly from the unit sphere of R^K, anew for each example and
    step: Czarnecki et al. 2017, https://arxiv.org/abs/1706.04859, figure 1b (stochastic Sobolev training), for one
    derivative and with the squared difference for the distance that the paper leaves open. Its expectation is "full" / K
    where nothing is normalised. It draws from the step's key and the row's index, so a row's vectors do not depend on its
    place in the batch.

    "full": the sum over all K logits, the squared Frobenius norm of the Jacobians' difference; K times the work and memory,
    for few classes.

    Only derivatives are compared: the papers train on the outputs as well, which is another term's part. One logit
    (K = 1) is compared as it is, its "top" and "label" being that logit. The default weight of 1 is not a published value.

    Attributes:
      form: "top", "label", "random" or "full".
      normalisation: "unit" scales each g to unit length (0 where it is below 1e-12), "none" does not; "auto" is "unit"
        for "top" and "label", else "none".
      reduction: "sum" or "mean", over the inputs.
      projections: "random": number of vectors v.

    Raises:
      UsageError: a bad option; in `init`, student and teacher of different numbers of logits; in `evaluate`, inputs that
        are not floats, or a teacher that is only a table.
    """

    form: str = static(default="top")
    normalisation: str = static(default="auto")
    reduction: str = static(default="sum")
    projections: int = static(default=1)

    def __post_init__(self) -> None:
        require_one_of(("top", "label", "random", "full"), form=self.form)
        require_one_of(("auto", "unit", "none"), normalisation=self.normalisation)
        require_one_of(("sum", "mean"), reduction=self.reduction)
        require_positive(projections=self.projections)

    def init(self, key: Array, student: Outputs, teacher: Outputs | None) -> PyTree:
        """`{}`, after checking that both networks have as many logits."""
        del key
        require_same_width(student.logits.shape[-1], _layers.require_teacher(teacher).logits.shape[-1])
        return {}

    def values(self, student: Network, teacher: Network, batch: Batch, key: Array) -> Array:
        def logits(network: Network, inputs: Array) -> Array:
            return _layers.at_least_float32(network.outputs(inputs).logits)

        z_t, pull_t = jax.vjp(lambda x: logits(teacher, x), batch["inputs"])
        z_s, pull_s = jax.vjp(lambda x: logits(student, x), batch["inputs"])
        directions = jax.lax.stop_gradient(self._directions(z_t, batch, key))

        def difference(v: Array) -> Array:
            g_t, g_s = _layers.rows(pull_t(v.astype(z_t.dtype))[0]), _layers.rows(pull_s(v.astype(z_s.dtype))[0])
            squares = (self._normalised(g_s) - jax.lax.stop_gradient(self._normalised(g_t))) ** 2
            return squares.sum(axis=1) if self.reduction == "sum" else squares.mean(axis=1)

        values = jax.vmap(difference)(directions)
        return values.mean(axis=0) if self.form == "random" else values.sum(axis=0)

    def _directions(self, z_t: Array, batch: Batch, key: Array) -> Array:
        """The combinations v of the logits z_t [B, K]: [P, B, K]."""
        classes = z_t.shape[-1]
        if self.form == "full":
            return jnp.broadcast_to(jnp.eye(classes, dtype=z_t.dtype)[:, None], (classes, *z_t.shape))
        if self.form == "random":
            keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(batch["index"])
            draws = jax.vmap(lambda k: jax.random.normal(k, (self.projections, classes), z_t.dtype), out_axes=1)(keys)
            return _layers.unit(draws)
        if classes == 1:
            return jnp.ones_like(z_t)[None]
        chosen = z_t.argmax(axis=-1) if self.form == "top" else batch["label"]
        return jax.nn.one_hot(chosen, classes, dtype=z_t.dtype)[None]

    def _normalised(self, g: Array) -> Array:
        automatic = "unit" if self.form in ("top", "label") else "none"
        kind = automatic if self.normalisation == "auto" else self.normalisation
        return _layers.unit(g) if kind == "unit" else g


@loss("gradient_attention", weight=1000.0)
@pytree
class GradientAttention(_OnInputs):
    """Attention transfer on the inputs: the student's cross-entropy is sensitive where the teacher's is.

    J = derivative of an example's cross-entropy with its label with respect to its inputs. Of images [B, H, W, C] it
    becomes the vector a = normalise(flatten(mean_c |J|^power)) of H W numbers; of other inputs a = normalise(|J|^power),
    a number for each input. Value [B] = mean over positions of (a_s - a_t)^2 ("mse"), or ||a_s - a_t||_2 ("l2"), in float32
    or wider; it sees neither signs nor scale, unlike `input_gradient`. It is the map of loss=attention, equation 2 of
    Zagoruyko & Komodakis 2017, https://arxiv.org/abs/1612.03928, taken of their section 3.2's gradients, which they
    compare unnormalised: no published code computes it. The default weight is `attention`'s of 1000, which goes with
    "mse"; give "l2" a weight near 1. One logit (K = 1) is taken as the two classes (0, z).

    Attributes:
      power: exponent > 0 of the derivatives.
      distance: "mse" or "l2".

    Raises:
      UsageError: a bad option; in `evaluate`, inputs that are not floats, or a teacher that is only a table.
    """

    power: float = 2.0
    distance: str = static(default="mse")

    def __post_init__(self) -> None:
        require_positive(power=self.power)
        require_one_of(("mse", "l2"), distance=self.distance)

    def values(self, student: Network, teacher: Network, batch: Batch, key: Array) -> Array:
        del key
        maps = map(_as_map, _gradients(student, teacher, batch))
        return Attention(power=self.power, distance=self.distance).of_pair(*maps)


def _gradients(student: Network, teacher: Network, batch: Batch) -> tuple[Array, Array]:
    """The derivatives [B, ...] of the two networks' cross-entropies with respect to the inputs, float32 or wider."""

    def gradient(network: Network) -> Array:
        def total(inputs: Array) -> Array:
            return _cross_entropy(network.outputs(inputs).logits, batch["label"]).sum()

        return _layers.at_least_float32(jax.grad(total)(batch["inputs"]))

    return gradient(student), jax.lax.stop_gradient(gradient(teacher))


def _cross_entropy(logits: Array, label: Array) -> Array:
    """[B] of logits [B, K] and labels [B]: log(1 + sum over the other classes c of exp(z_c - z_label)).

    In this form the derivative of a confident network is accurate: p - 1 at the label is not rounded to 0 or 6e-8.
    """
    z = _layers.at_least_float32(as_classes(logits))
    margins = z - jnp.take_along_axis(z, label[:, None], axis=-1)
    others = jnp.arange(z.shape[-1]) != label[:, None]
    return jax.nn.softplus(jax.nn.logsumexp(margins, axis=-1, where=others))


def _as_map(gradient: Array) -> Array:
    """[B, H, W, C] as it is and other inputs as [B, D, 1, 1], scaled so that an example's largest number is 1.

    The scale cancels in the normalised map, so it needs no derivative of its own; without it the powers of a confident
    network's derivatives, all near 0, would vanish. Below 1e-20 they are taken as 0.
    """
    images = gradient if gradient.ndim == 4 else gradient.reshape(gradient.shape[0], -1, 1, 1)
    largest = jax.lax.stop_gradient(jnp.abs(images).max(axis=(1, 2, 3), keepdims=True))
    there = largest > 1e-20
    return jnp.where(there, images, 0) / jnp.where(there, largest, 1)
