"""The keys that all interaction data share, and the decorator that gives them to a loader."""

import dataclasses
import inspect
import typing
from collections.abc import Callable

from jdistill.data.base import Dataset
from jdistill.data.interactions import splits
from jdistill.data.interactions.build import UNSEEN, build_interactions
from jdistill.data.interactions.log import Interactions, active, core
from jdistill.data.interactions.splits import Rows
from jdistill.errors import UsageError
from jdistill.pytrees import require_fraction, require_nonnegative, require_one_of
from jdistill.registry import register

SPLITS = ("leave_one_out", "leave_last_out", "ratio", "ratio_last", "temporal")
BY_TIME = ("leave_last_out", "ratio_last", "temporal")

KEYS = """  split: leave_one_out: one random test and one random validation item of each user; leave_last_out: the last item
        and the one before; ratio: random fractions of each user's items; ratio_last: the last fractions; temporal: two
        cuts in time, the same for all users. Users of fewer than 3 interactions stay whole in training (not: temporal).
      validation, test: fractions, for ratio, ratio_last and temporal; a user's are rounded up.
      validation_users: for ratio: this fraction of the users validates with their test items, the others test, and
        `validation` is not read (0: each user does both).
      split_seed: of the split, of cold_users and cold_items and of the candidates.
      history: how many items met before a request brings along, the last ones.
      min_interactions: leave out users of fewer interactions.
      core: leave out users and items of fewer interactions, again and again until none is left (the k-core; 0: do not).
      candidates: rank the first relevant item against so many random items that the user never met, drawn once; 0: rank
        all items.
      cold_users: fraction of the users that nothing is trained on; their items are request history, the test split is
        theirs.
      cold_items: fraction of the items that training never sees; the test split holds them only.
      unseen: held-out items without a training row are kept as relevant items (keep), left out (drop) or refused (error).
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Protocol:
    """The keys of `KEYS`; checked here, before any file is read.

    Raises:
      UsageError: a value that cannot be.
    """

    split: str = "leave_one_out"
    validation: float = 0.1
    test: float = 0.1
    validation_users: float = 0.0
    split_seed: int = 0
    history: int = 0
    min_interactions: int = 1
    core: int = 0
    candidates: int = 0
    cold_users: float = 0.0
    cold_items: float = 0.0
    unseen: str = "keep"

    def __post_init__(self) -> None:
        fractions = ("validation", "test", "validation_users", "cold_users", "cold_items")
        counts = ("split_seed", "history", "min_interactions", "core", "candidates")
        require_fraction(**{name: getattr(self, name) for name in fractions})
        require_nonnegative(**{name: getattr(self, name) for name in counts})
        require_one_of(UNSEEN, unseen=self.unseen)
        if self.validation_users and self.split != "ratio":
            raise UsageError(f"validation_users is for split=ratio only, and split is {self.split}")
        if self.cold_users and not self.history:
            raise UsageError("cold_users are known by their history alone, and history is 0; set history, such as history=50")
        if self.cold_items and self.unseen != "keep":
            raise UsageError(f"cold_items have no training row, which unseen={self.unseen} does not keep; set unseen=keep")

    def cleaned(self, log: Interactions) -> Interactions:
        """The log after `core` and `min_interactions`."""
        log = core(log, self.core) if self.core > 1 else log
        return active(log, self.min_interactions) if self.min_interactions > 1 else log

    def rows(self, log: Interactions) -> Rows:
        """The split that `split` names."""
        if log.time is None and self.split in BY_TIME:
            raise UsageError(f"split={self.split} needs times and these data have none; choose split=leave_one_out or ratio")
        seed = None if self.split in BY_TIME else self.split_seed
        if self.split.startswith("leave"):
            return splits.leave_one_out(log, seed)
        if self.split == "temporal":
            return splits.temporal(log, self.validation, self.test)
        if self.validation_users:
            return splits.ratio_by_users(log, self.validation_users, self.test, self.split_seed)
        return splits.ratio(log, self.validation, self.test, seed)

    def dataset(self, name: str, log: Interactions, checksums: dict[str, str], rows: Rows | None = None) -> Dataset:
        """The `Dataset` of a log: cleaned and split, or with the rows that its publisher has split."""
        if rows is None:
            log = self.cleaned(log)
            rows = self.rows(log)
        if self.cold_users:
            rows = splits.cold_users(log, rows, self.cold_users, self.split_seed)
        if self.cold_items:
            rows = splits.cold_items(log, rows, self.cold_items, self.split_seed)
        return build_interactions(
            name, log, rows, history=self.history, checksums=checksums, by_time=self.split in BY_TIME,
            candidates=self.candidates, unseen=self.unseen, seed=self.split_seed,
        )  # fmt: skip


class Loaded(typing.NamedTuple):
    """What a loader read: the log, the checksums, and the rows where the publisher has split them."""

    log: Interactions
    checksums: dict[str, str]
    rows: Rows | None = None


def interaction_data(
    name: str, *, more_splits: tuple[str, ...] = (), no_splits: tuple[str, ...] = (), **defaults: object
) -> Callable[[Callable[..., Loaded]], Callable[..., Dataset]]:
    """Registers `data=<name>`: a function of its own keys, which reads a log, with the keys of `Protocol` added.

    The line `{keys}` in the docstring's Args becomes their description.

    Args:
      name: the option's name.
      more_splits: splits of the publisher that the function itself knows; it then takes `split`.
      no_splits: splits that mean nothing for these data.
      **defaults: other defaults than `Protocol`'s.
    """
    allowed = (*more_splits, *(word for word in SPLITS if word not in no_splits))

    def decorate(load: Callable[..., Loaded]) -> Callable[..., Dataset]:
        own = inspect.signature(load).parameters
        shared: dict[str, typing.Any] = {f.name: defaults.get(f.name, f.default) for f in dataclasses.fields(Protocol)}

        def dataset(**keys: typing.Any) -> Dataset:
            signature.bind(**keys)
            keys = shared | keys
            require_one_of(allowed, split=keys["split"])
            protocol = Protocol(**{k: keys[k] for k in shared})
            return protocol.dataset(name, *load(**{k: v for k, v in keys.items() if k in own}))

        hints = typing.get_type_hints(Protocol)
        parameters = [p for p in own.values() if p.name not in shared]
        parameters += [
            inspect.Parameter(k, inspect.Parameter.KEYWORD_ONLY, default=v, annotation=hints[k]) for k, v in shared.items()
        ]
        signature = inspect.Signature([p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters])
        dataset.__signature__ = signature  # type: ignore[attr-defined]
        dataset.__annotations__ = {p.name: p.annotation for p in parameters} | {"return": Dataset}
        dataset.__name__, dataset.__qualname__, dataset.__module__ = load.__name__, load.__qualname__, load.__module__
        dataset.__doc__ = (load.__doc__ or "").replace("  {keys}\n", KEYS)
        return register("data", name)(dataset)

    return decorate
