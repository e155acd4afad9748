"""Views of the shop: the same history as interactions, tables or graded lists."""

import dataclasses
import functools
import inspect
import typing
from typing import Any

import numpy as np

from jdistill.data.base import Dataset
from jdistill.data.files import check_root
from jdistill.data.interactions.log import Interactions, without_duplicates
from jdistill.data.interactions.protocol import SPLITS, Protocol
from jdistill.data.search.lists import Queries, Rows
from jdistill.data.shop.tables import AFTERWARDS, TABLES, Table
from jdistill.data.shop.world import DAYS, DOMAINS, RATES, World, build_world
from jdistill.data.tables.build import Splitting, build_table
from jdistill.errors import UsageError, unknown
from jdistill.pytrees import require_nonnegative, require_one_of
from jdistill.registry import register

VIEWS = ("interactions", *TABLES, "search")
CHEAP = ("word_match", "same_category", "log_price", "log_popularity")
"""Columns of `search` that a fast first stage has."""
SLOW = ("semantic_match", "review", "click_rate")
"""Columns of `search` that it has not."""
PRIVILEGED = {"conversions": AFTERWARDS, "search": SLOW}
LEAST = {"users": 10, "items": 50, "queries": 20}
GRADES = (0.5, 0.75, 0.92)
"""Quantiles of the noisy utility from which on the grade is 1, 2, 3."""
_SHORTEST, _LONGEST = 5, 30
_CHECKSUMS = {"synthetic_shop": "generated"}

_PROTOCOL = tuple(f.name for f in dataclasses.fields(Protocol))
_SPLITTING = tuple(f.name for f in dataclasses.fields(Splitting))
_QUERIES = tuple(f.name for f in dataclasses.fields(Queries))
_WORLD = ("users", "items", "queries", "events", "noise", "seed", "domain")
_SHARED = ("root", "view", *_WORLD)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shop:
    """The keys of `synthetic_shop`, checked, and what they describe."""

    root: str | None = None
    view: str = "interactions"
    users: int = 1000
    items: int = 400
    queries: int = 150
    events: float = 20.0
    noise: float = 1.0
    seed: int = 0
    domain: str = "main"
    days: tuple[float, ...] = (0.0, 1.0)
    feedback: str = "click"
    encoding: str = "one_hot"
    privileged: tuple[str, ...] = ()
    split: str | None = None
    validation: float = 0.1
    split_seed: int = 0
    limit: int | None = None
    folds: int | None = None
    fold: int = 0
    list_size: int | None = None
    history: int = 0
    test: float = 0.1
    validation_users: float = 0.0
    min_interactions: int = 1
    core: int = 0
    candidates: int = 0
    cold_users: float = 0.0
    cold_items: float = 0.0
    unseen: str = "keep"

    def __post_init__(self) -> None:
        check_root(self.root)
        require_one_of(VIEWS, view=self.view)
        require_one_of(DOMAINS, domain=self.domain)
        require_one_of(("click", "purchase"), feedback=self.feedback)
        require_nonnegative(noise=self.noise, seed=self.seed)
        for name, least in LEAST.items():
            if getattr(self, name) < least:
                raise UsageError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not 2 <= self.events < float("inf"):
            raise UsageError(f"events must be at least 2 clicks a user, got {self.events}")
        if len(self.days) != 2 or not 0 <= self.days[0] < self.days[1] <= 1:
            raise UsageError(f"days must be two rising fractions of the time line, such as [0, 0.5], got {list(self.days)}")
        self._check_read()
        for name in self.privileged:
            if name not in PRIVILEGED[self.view]:
                raise UsageError(f"privileged: {unknown(f'column of view={self.view}', name, PRIVILEGED[self.view])}")

    def _check_read(self) -> None:
        """Raises `UsageError` for a key that was set and that the view does not read."""
        for field in dataclasses.fields(self):
            if getattr(self, field.name) != field.default and field.name not in _read(self.view):
                readers = ", ".join(view for view in VIEWS if field.name in _read(view))
                raise UsageError(f"{field.name} means nothing to view={self.view}; leave it out (it is for {readers})")

    @functools.cached_property
    def world(self) -> World:
        return build_world(**self._keys(_WORLD))

    @functools.cached_property
    def rows(self) -> np.ndarray:
        """[N] bool: the rows of the log within `days`."""
        time = self.world.log.time / DAYS
        return (time >= self.days[0]) & ((time < self.days[1]) | (self.days[1] == 1))

    @functools.cached_property
    def protocol(self) -> Protocol:
        """Of the interactions."""
        split = "leave_last_out" if self.split is None else self.split
        require_one_of(SPLITS, split=split)
        return Protocol(**self._keys(_PROTOCOL) | {"split": split})

    @functools.cached_property
    def log(self) -> Interactions:
        """The interactions that are split."""
        return self.protocol.cleaned(interactions(self.world, self.rows, self.feedback))

    @functools.cached_property
    def table(self) -> Table:
        """Of a view that is a table."""
        told = {"privileged": self.privileged} if self.privileged else {}
        return TABLES[self.view](self.world, self.rows, self.encoding, **told)

    @functools.cached_property
    def lists(self) -> tuple[Rows, np.ndarray]:
        """Of the search, with the utility of each row."""
        rng = np.random.default_rng([self.seed, 1 + len(DOMAINS) + DOMAINS.index(self.domain)])
        return search(self.world, rng, self.noise, self.privileged)

    @functools.cached_property
    def dataset(self) -> Dataset:
        if self.view == "interactions":
            return self.protocol.dataset("synthetic_shop", self.log, _CHECKSUMS)
        if self.view == "search":
            queries = Queries(**self._keys(_QUERIES))
            told = tuple(range(len(CHEAP), len(CHEAP) + len(self.privileged)))
            return queries("synthetic_shop", self.lists[0], _CHECKSUMS, privileged=told)
        given = {"split": self.split or "random", "folds": 5 if self.folds is None else self.folds}
        splitting = Splitting(**self._keys(_SPLITTING) | given)
        table = self.table
        return build_table(
            "synthetic_shop", table.frame, table.features, splitting, label=table.label, kind=table.kind,
            checksums=_CHECKSUMS, group=table.group, time="time" if "time" in table.frame else None,
        )  # fmt: skip

    def _keys(self, names: tuple[str, ...]) -> dict[str, Any]:
        return {name: getattr(self, name) for name in names}


@functools.cache
def _read(view: str) -> frozenset[str]:
    """The keys that a view reads."""
    if view == "interactions":
        return frozenset((*_SHARED, "days", "feedback", *_PROTOCOL))
    if view == "search":
        return frozenset((*_SHARED, "privileged", *_QUERIES))
    own = ("privileged",) if view in PRIVILEGED else ()
    without = {"prices": {"days", "split"}}.get(view, set())
    return frozenset({*_SHARED, "days", "encoding", *own, *_SPLITTING} - without)


def interactions(world: World, rows: np.ndarray, feedback: str) -> Interactions:
    """The clicks or purchases among `rows` [N] bool, each user and item once, where the last was.

    All users and items of the shop keep their numbers. Their features are one-hot bands and categories, and numbers of
    mean 0 and std 1.
    """
    log, users, items = world.log, world.users, world.items
    row = np.flatnonzero(rows & (log.click if feedback == "click" else log.purchase))
    everything = Interactions(
        log.user[row].astype(np.int32), log.item[row].astype(np.int32), np.ones(len(row), np.float32), log.time[row],
        np.arange(len(users.age)), np.arange(len(items.brand)),
        _features((users.age, users.region, users.budget), (np.log1p(users.account_days),)),
        _features((items.category, items.brand), (items.log_price, items.review, *items.words.T)),
    )  # fmt: skip
    return without_duplicates(everything)


def _features(categories: tuple[np.ndarray, ...], numbers: tuple[np.ndarray, ...]) -> np.ndarray:
    parts = [np.eye(codes.max() + 1)[codes] for codes in categories]
    parts += [((n - n.mean()) / max(float(n.std()), 1e-9))[:, None] for n in numbers]
    return np.concatenate(parts, axis=1).astype(np.float32)


def search(world: World, rng: np.random.Generator, noise: float, privileged: tuple[str, ...]) -> tuple[Rows, np.ndarray]:
    """Lists of 5 to 30 items for every query, near and far ones, and the utility [N] behind their grades."""
    items, queries = world.items, world.queries
    near = 0.5 * world.exposure + rng.gumbel(size=world.exposure.shape)
    order = np.argsort(-near, axis=1)[:, :_LONGEST]
    length = rng.integers(_SHORTEST, _LONGEST + 1, len(order))
    kept = np.arange(_LONGEST) < length[:, None]
    query, item = np.repeat(np.arange(len(order)), length), order[kept]
    same = (queries.category[query] == items.category[item]).astype(float)
    words = world.match[query, item] - same
    semantic = (queries.style[query] * items.style[item]).sum(axis=1)
    utility = 1.0 * same + 1.0 * words + 2.0 * semantic + 0.5 * items.quality[item]
    perceived = utility + 0.4 * noise * rng.standard_normal(len(query))
    grade = np.searchsorted(np.quantile(perceived, GRADES), perceived, side="right")
    shows, clicks = np.zeros_like(world.match), np.zeros_like(world.match)
    np.add.at(shows, (world.log.query, world.log.item), 1)
    np.add.at(clicks, (world.log.query, world.log.item), world.log.click)
    columns = {
        "word_match": words + 0.2 * noise * rng.standard_normal(len(query)),
        "same_category": same,
        "log_price": items.log_price[item],
        "log_popularity": np.log(items.popularity[item]),
        "semantic_match": semantic + 0.1 * noise * rng.standard_normal(len(query)),
        "review": items.review[item],
        "click_rate": ((clicks + 10 * RATES["click"]) / (shows + 10))[query, item],
    }  # fmt: skip
    names = (*CHEAP, *(name for name in SLOW if name in privileged))
    return Rows(query, np.stack([columns[name] for name in names], axis=1).astype(np.float32), grade), utility


def synthetic_shop(**keys: Any) -> Dataset:
    """A generated shop whose true probabilities are known: users, items, queries, clicks, carts and purchases.

    In a session a user asks a query and is shown 10 items. 20 % of what is shown is clicked, 40 % of that put into the cart,
    50 % of that bought; 3 % of the carts are fraud, 7 % of the purchases late. All views are of one history, and
    `jdistill.data.shop.best_possible` says what the true probabilities reach.

    Args:
      root: not used; must be a directory where given.
      view: interactions (task=recommend); tables: clicks, conversions (purchases of what is clicked), delay and risk
        (task=click), behaviour (none, click, cart or purchase; task=classification), ratings and prices (the logarithm of
        the price; task=regression); search (graded lists; task=ranking).
      users, items, queries: how many; at least 10, 50 and 20.
      events: mean clicks of a user, at least 2.
      noise: scales what blurs words, reviews, prices, ratings and grades; 0: nothing does.
      seed: of the shop.
      domain: main, or second: another catalogue; the first half of the users are the same people, by the same numbers.
      days: the part of the time line that is seen, as fractions from and to (not: search, prices).
      feedback: of interactions: click, or purchase.
      encoding: of categories of tables: one_hot (users and items themselves are then left out), or index (one column of
        0 .. n - 1, for networks with embeddings).
      privileged: columns that only a teacher may read, and that are there only where named: dwell_time (the logarithm of
        seconds), scroll_depth, added_to_cart of conversions; semantic_match, review, click_rate of search.
      split: interactions: leave_last_out (the default), leave_one_out, ratio, ratio_last or temporal; tables: random (the
        default), or time: the last 20 % are the test split.
      validation: fraction of the rows or queries outside the test split that becomes the validation split; of
        interactions only for ratio, ratio_last and temporal.
      split_seed: of the split, and of what is drawn with it.
      limit: of tables and search: train on at most so many rows or queries.
      folds, fold: of tables and search: the test split is part `fold` of `folds`.
      list_size: of search: training lists keep at most so many items.
      history, test, validation_users, min_interactions, core, candidates, cold_users, cold_items, unseen: of interactions,
        as in `interactions`.

    Returns:
      A `Dataset` of interactions with features of users and items; of float32 [N, D] with labels and, where they have
      users, `group`; or of lists.

    Raises:
      UsageError: a wrong value, or a key that the view does not read.
    """
    return Shop(**keys).dataset


# Its keys are the fields of `Shop`, which has their defaults too.
synthetic_shop.__signature__ = inspect.signature(Shop)  # type: ignore[attr-defined]
synthetic_shop.__annotations__ = typing.get_type_hints(Shop.__init__) | {"return": Dataset}
register("data", "synthetic_shop")(synthetic_shop)
