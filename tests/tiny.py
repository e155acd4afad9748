"""A problem of a few hundred numbers, for tests of everything that trains."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

import jdistill.options  # noqa: F401 (registers every option)
from jdistill.blueprint import abstract
from jdistill.checkpoint import Checkpoints
from jdistill.compress import Compressor
from jdistill.config import SCHEMAS, TrainConfig
from jdistill.data.augment import Augment
from jdistill.fitting import CheckpointPolicy, Member, Setup, sample_of
from jdistill.losses import KD, CrossEntropy
from jdistill.method import Method, Stage, Term
from jdistill.models import MLP
from jdistill.models.layers import BatchNorm
from jdistill.modules import from_linen
from jdistill.optim import Optimizer
from jdistill.records import MetricsFile
from jdistill.registry import options
from jdistill.schemes import Offline, Scheme, Setting
from jdistill.stages import init_state
from jdistill.tasks.classification import Classification, hits, metrics
from jdistill.teachers.targets import Live
from jdistill.train import Keys, Learner, Parts, predict
from jdistill.types import Model

EXAMPLES, CLASSES = 44, 3
AUGMENT = Augment(ops=("crop", "flip"), crop_padding=1)
STUDENT = from_linen(MLP(outputs=CLASSES, widths=(6,)))
DROPPING = from_linen(MLP(outputs=CLASSES, widths=(6,), dropout=0.3))
TEACHER = from_linen(MLP(outputs=CLASSES, widths=(9, 6)))


class Convolutional(nn.Module):
    """Two convolutions with BatchNorm (and dropout), a linear layer, the head."""

    outputs: int = CLASSES

    @nn.compact
    def __call__(self, inputs, train=False):
        x = nn.relu(BatchNorm(name="norm1")(nn.Conv(6, (3, 3), name="conv1")(inputs), train))
        x = nn.relu(nn.Conv(5, (2, 2), name="conv2")(x)).mean((1, 2))
        x = nn.Dropout(0.3, deterministic=not train)(x)
        x = nn.relu(nn.Dense(7, name="fc1")(x))
        return nn.Dense(self.outputs, name="fc")(x), {"embedding": x}


CONVOLUTIONAL = from_linen(Convolutional())
TASK = Term(name="cross_entropy", loss=CrossEntropy())


def identity(inputs):
    return inputs


def data(examples: int = EXAMPLES, seed: int = 0, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """Images [N, 4, 4, 1] whose mean rises with the label."""
    random = np.random.default_rng(seed)
    label = random.integers(0, CLASSES, examples).astype(np.int32)
    inputs = random.normal(size=(examples, 4, 4, 1)) + 0.3 * label[:, None, None, None]
    return {"inputs": inputs.astype(dtype), "label": label}


def batch(size: int = 8, seed: int = 0, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    return {**data(size, seed, dtype), "index": np.arange(size, dtype=np.int32)}


def kd(weight: Any = 0.7, temperature: Any = 3.0) -> Term:
    return Term(name="kd", teacher="teacher", loss=KD(temperature=temperature), weight=weight)


def optimizer(**changes: Any) -> Optimizer:
    return Optimizer(**{"lr": 0.02, "epochs": 3, "batch_size": 8, **changes})


def learners(student: Model = STUDENT, scheme: Scheme | None = None, **others: Model) -> tuple[Learner, ...]:
    """The student, and what `scheme` trains beside it: networks of the student's form, save those in `others`."""
    if scheme is None:
        return (Learner("student", student),)
    names = ("student", *scheme.trained())
    made = tuple(Learner(name, others.get(name, student)) for name in names)
    return (*made, *scheme.branches(abstract(student, data()["inputs"]), CLASSES))


def parts(
    student: Model = STUDENT, teacher: Model | None = TEACHER, augment: Any = None, observe: Any = hits,
    scheme: Scheme | None = None, **others: Model,
) -> Parts:  # fmt: skip
    targets = () if teacher is None else (("teacher", Live(teacher)),)
    return Parts(learners(student, scheme, **others), targets, identity, augment, observe)


def frozen(teacher: Model = TEACHER, seed: int = 99) -> dict[str, Any]:
    return {"teacher": teacher.init(jax.random.key(seed), data()["inputs"])}


def setting(distil: Term | None = None, student: Model = STUDENT, *, loss: bool = True, **optim: Any) -> Setting:
    """What a scheme lays out, with `kd()` unless `distil` is another term, or none with `loss=False`."""
    return Setting(TASK, (distil or kd()) if loss else None, optimizer(**optim), CLASSES, abstract(student, data()["inputs"]))


def method(
    *, scheme: Scheme | None = None, distil: Term | None = None, compressor: Compressor | None = None,
    student: Model = STUDENT, **optim: Any,
):  # fmt: skip
    """The stages of `scheme`, and one of recovery where the compressor has one."""
    stages = (scheme or Offline()).stages(setting(distil, student, **optim))
    if compressor is not None:
        recover = Stage(name="recover1", terms=stages[-1].terms, optim=stages[-1].optim, compressors=(compressor,))
        stages = (*stages, recover.with_epochs(compressor.recover_epochs))
    return Method(stages=stages)


def setup(folder: Any, own: Method | None = None, *, seed: int = 0, every_steps: int = 0, **changes: Any) -> Setup:
    """A `Setup` in `folder` with dropout, augmentation, a live teacher and validation; a fresh initial state each time."""
    made = changes.pop("parts", None) or parts(DROPPING, augment=AUGMENT)
    train, held = changes.pop("data", None) or data(), data(30, seed=1)
    keys = Keys.of(seed)
    member = Member(own or method(), keys, MetricsFile(folder / "metrics.jsonl"), init_state(made, keys.init, sample_of(train)))

    def evaluate(params, state):
        stacked = given["stacked"]
        logits = predict(made.learners[0].model, identity, (params, state), held["inputs"], stacked)
        return lambda row: metrics(logits[row] if stacked else logits, held["label"])

    given = {
        "parts": made, "members": (member,), "data": train, "frozen": frozen(), "strategy": "block", "stacked": False,
        "resident": True, "checkpoints": Checkpoints(folder / "checkpoints"), "observed": Classification.observed,
        "evaluate": evaluate, "policy": CheckpointPolicy(every_steps=every_steps, every_seconds=0),
    }  # fmt: skip
    given |= changes
    return Setup(**given)


def with_member(made: Setup, **changes: Any) -> Setup:
    """`made` with changes to its only member: `method`, `keys`, `metrics`, `initial`."""
    (member,) = made.members
    return dataclasses.replace(made, members=(member._replace(**changes),))


class StopAfter:
    """True at the `calls`-th question and from then on."""

    def __init__(self, calls):
        self.left = calls

    def __call__(self):
        self.left -= 1
        return self.left <= 0


CHOICES = {
    "data": "synthetic", "task": "classification", "teacher": "mlp", "student": "mlp", "loss": "kd", "scheme": "offline",
    "compression": "none", "optim": "adam", "parallel": "single", "tracker": "jsonl",
}  # fmt: skip


def node(group, name):
    fields = options(group)[name].fields.items()
    return {"name": name, **{key: list(v) if isinstance(v, tuple) else v for key, (_, v) in fields}}


def config(*overrides, **choices):
    """The default config with other options, then `a.b=value` pairs, as Hydra would compose it."""
    out = {field.name: getattr(TrainConfig(), field.name) for field in dataclasses.fields(TrainConfig)}
    out |= {group: dict(vars(out[group])) for group in SCHEMAS}
    out |= {group: node(group, name) for group, name in {**CHOICES, **choices}.items()}
    out["teacher"]["optim"] = node("optim", "adam")
    for key, value in overrides:
        *parents, last = key.split(".")
        target = out
        for parent in parents:
            target = target[parent]
        target[last] = value
    return out


def as_float64(tree: Any) -> Any:
    """Every floating leaf in float64 (under `jax.enable_x64`)."""

    def widen(leaf):
        floating = jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
        return jnp.asarray(leaf, jnp.float64) if floating else jnp.asarray(leaf)

    return jax.tree.map(widen, tree)


def assert_same_bits(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        assert x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes()


def assert_close(a: Any, b: Any, **tolerance: float) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)
