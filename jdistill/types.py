"""The contracts everything else is written against."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jax import Array

from jdistill.errors import UsageError
from jdistill.sampling import Known

PyTree = Any

Batch = dict[str, Any]
"""`inputs` [B, ...] float32 (preprocessed), `label` [B] int32, `index` [B] int32 (row in the training set).

Requests to a recommender have as `inputs` a dict:
`user` [B] int32; `history` [S, L] int32, the items a user met, the oldest first, filled on the left with the number of
items, with B = S, or B = S L where each position asks with what was met up to it (row s L + p); `items` [B, K] int32, the
candidates of each row, or [C] int32, candidates that all rows share, or absent: the whole catalogue. `label` is then
0, the column of the positive among the task's candidates.
"""


class Outputs(NamedTuple):
    """What a network gives for a batch.

    Attributes:
      logits: [B, K] float: K classes or K candidate items ([B, C] or [B, items] where a request names no candidates of
        its own); K = 1 for a yes/no label (the logit of "yes").
      features: name -> [B, ...]: every named activation. Under jit those that nothing reads cost nothing.
        Networks of stages name them `stage1`, `stage2`, ... (after the activation) and `stage1_pre`, ... (before it);
        images are [B, H, W, C]. `embedding` [B, D] is what the last linear layer reads. Networks whose stages end
        without an activation say in their docstring what they hand on. Recommenders give `user` [B, D] (also as
        `embedding`) and `item` [B, K, D] (or [C, D], [items, D]), what the candidates' scores are computed from.
    """

    logits: Array
    features: dict[str, Array]


class Network(NamedTuple):
    """A network with its parameters of this step, for losses that call it. A teacher's gives no gradient to its own.

    Attributes:
      outputs: preprocessed inputs [B, ...] -> `Outputs`, with the step's dropout mask and BatchNorm mode.
      head: embedding [B, D] -> logits [B, K]; raises `UsageError` where the network has no known last layer.
    """

    outputs: Callable[[Any], Outputs]
    head: Callable[[Array], Array]


Rows = tuple[tuple[tuple[str, ...], str], ...]
"""Of each table of embeddings the path of the parameter [rows, ...] and the name of its ids in a request, `user` or `items`."""

USERS_AND_ITEMS: Rows = ((("user",), "user"), (("item",), "items"))


class Tables(NamedTuple):
    """The embedding tables of a recommender that the ids of a request index, and that it reads in no other way.

    Attributes:
      ids: the tables, with what indexes their rows.
      sized: `(users, items) -> Model`, the network with tables of so many rows.
    """

    ids: Rows
    sized: "Callable[[int, int], Model]"


class Factors(NamedTuple):
    """How a recommender's logits follow from its features: (user . item + bias of the item) / temperature.

    All features but `item` are of the request's user and history, whatever its candidates.

    Attributes:
      bias: the name of the parameter [items] added to the scores, or None.
      temperature: > 0.
    """

    bias: str | None = None
    temperature: float = 1.0


class Widths(NamedTuple):
    """The widths of a network of which units can be removed: neurons, channels, heads.

    Attributes:
      sizes: (name, units) of each, a name being the network's config key, with an index where that is a list: `widths.0`.
      streams: the names of those that residual connections add to, so that many layers share their units.
      indexed: the names of those whose config lists which units there are, not how many; along an axis of an array the
        numbers of such a unit are neighbours, those of any other lie as far apart as there are units.
      changed: name -> the units [kept] that stay, counted from 0, to the config keys of the network that has these alone.
      resized: name -> another number of units, to that `Model`.
    """

    sizes: tuple[tuple[str, int], ...]
    streams: frozenset[str]
    indexed: frozenset[str]
    changed: Callable[[dict[str, Sequence[int]]], dict[str, Any]]
    resized: "Callable[[dict[str, int]], Model]"


class Model(NamedTuple):
    """A network as a pair of pure functions.

    Attributes:
      init: `(key, inputs) -> (params, state)`; `inputs` may be abstract in all but shape and dtype.
      apply: `(params, state, inputs, *, key=None, train=False) -> (Outputs, state)`. `state` holds running
        statistics; it is returned unchanged when `train` is False. `key` feeds dropout.
      head: `(params, embedding [B, D]) -> logits [B, K]`, the last linear layer alone, or None where it is not known.
      tables: what `optim.rows` updates by rows, or None for a network that has no such tables.
      widths: what of it `compression=structured` can remove, or None for a network that declares nothing.
      factors: of a recommender whose scores are inner products of vectors that it computes; None for other networks, and
        for one that only looks its vectors up.
    """

    init: Callable[..., tuple[PyTree, PyTree]]
    apply: Callable[..., tuple[Outputs, PyTree]]
    head: Callable[[PyTree, Array], Array] | None = None
    tables: Tables | None = None
    widths: Widths | None = None
    factors: Factors | None = None

    def network(self, params: PyTree, state: PyTree, **mode: Any) -> Network:
        """The network with its arrays, in the mode that `apply` takes (`train`, `key`)."""

        def head(embedding: Array) -> Array:
            if self.head is None:
                raise UsageError("this network has no known last layer, which is needed here; see jdistill list models")
            return self.head(params, embedding)

        return Network(lambda inputs: self.apply(params, state, inputs, **mode)[0], head)


class Context(NamedTuple):
    """All that a loss may look at in a step.

    Attributes:
      student: outputs of the learner.
      teacher: outputs of the teacher, without gradient; None for a loss that needs none.
      batch: the batch.
      key: the term's own random key of this step.
      student_network, teacher_network: the networks themselves; the teacher's is None where there is only a table of
        its outputs (a loss that calls it declares `calls_networks`).
      initial: outputs of the student as it was initialised, for a loss that declares `reads_initial`; else None.
      known: what the data and the term's teacher tell of users and items; None where the batch has no requests.
    """

    student: Outputs
    teacher: Outputs | None
    batch: Batch
    key: Array
    student_network: Network
    teacher_network: Network | None = None
    initial: Outputs | None = None
    known: Known | None = None
