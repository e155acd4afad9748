"""Tables of the shop: one row per example, with the true probability or mean of each label."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.special import expit

from jdistill.data.shop.world import WORDS, Log, World, afterwards
from jdistill.data.tables.columns import Features

AFTERWARDS = ("dwell_time", "scroll_depth", "added_to_cart")
"""Columns of `conversions` that are known only once the visit is over."""
_USER = ("age", "region", "budget")


class Table(NamedTuple):
    """A table and its truth.

    Attributes:
      frame: columns by name, with the label, and `user` and `time` where there are such.
      label: the name of its column.
      kind: of the label, as `build_table` has it.
      features: the columns that are read.
      group: the column that groups the examples, or None.
      truth: [N] the true probability of yes, or the mean of a number; [N, C] of C classes.
      told: `truth` given the privileged columns too, or None where there are none.
    """

    frame: pd.DataFrame
    label: str
    kind: str
    features: Features
    group: str | None
    truth: np.ndarray
    told: np.ndarray | None = None


def _shown(world: World, row: np.ndarray) -> dict[str, np.ndarray]:
    """What a shop knows when it shows an item."""
    log, users, items = world.log, world.users, world.items
    user, item, query = log.user[row], log.item[row], log.query[row]
    columns = {
        "time": log.time[row], "position": log.position[row], "log_price": items.log_price[item],
        "review": items.review[item], "match": world.match[query, item], "user": user, "item": item,
        "category": items.category[item], "brand": items.brand[item], "query_category": world.queries.category[query],
    }  # fmt: skip
    return columns | {name: getattr(users, name)[user] for name in _USER}


def _shown_features(encoding: str, privileged: tuple[str, ...] = ()) -> Features:
    """Those columns as inputs. In one-hot form users and items, which have too many values for it, are left out."""
    ids = ("user", "item") if encoding == "index" else ()
    told = tuple(name for name in AFTERWARDS if name in privileged)
    return Features(
        numbers=("position", "log_price", "review", "match", *told),
        categories=(*ids, "category", "brand", "query_category", *_USER),
        privileged=told,
        encoding=encoding,
    )


def _clicks(world: World, rows: np.ndarray, encoding: str) -> Table:
    row = np.flatnonzero(rows)
    frame = pd.DataFrame(_shown(world, row) | {"click": world.log.click[row]})
    return Table(frame, "click", "binary", _shown_features(encoding), "user", world.log.p_click[row])


def _conversions(world: World, rows: np.ndarray, encoding: str, privileged: tuple[str, ...] = ()) -> Table:
    log = world.log
    row = np.flatnonzero(rows & log.click)
    told = {
        "dwell_time": log.log_dwell[row], "scroll_depth": expit(log.depth[row]), "added_to_cart": log.cart[row].astype(float)
    }  # fmt: skip
    frame = pd.DataFrame(_shown(world, row) | told | {"purchase": log.purchase[row]})
    p_cart, p_buy = log.p_cart[row], log.p_buy[row]
    return Table(
        frame, "purchase", "binary", _shown_features(encoding, privileged), "user", p_cart * p_buy,
        _told(log, row, privileged) if privileged else None,
    )  # fmt: skip


def _told(log: Log, row: np.ndarray, privileged: tuple[str, ...]) -> np.ndarray:
    """[N] the probability of a purchase given the columns known afterwards, by Bayes' rule."""
    p_cart, p_buy = log.p_cart[row], log.p_buy[row]
    prior = np.stack([1 - p_cart, p_cart * (1 - p_buy), p_cart * p_buy])  # nothing, a cart alone, a purchase
    cart, purchase = np.array([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0]]).T[:, :, None]
    density = afterwards(cart, purchase)
    for name, column, found in (("dwell_time", "log_dwell", log.log_dwell), ("scroll_depth", "depth", log.depth)):
        if name in privileged:
            mean, std = density[column]
            prior = prior * np.exp(-0.5 * ((found[row] - mean) / std) ** 2)
    if "added_to_cart" in privileged:
        prior = prior * (cart == log.cart[row])
    return prior[2] / prior.sum(axis=0)


def _ratings(world: World, rows: np.ndarray, encoding: str) -> Table:
    of = rows[world.ratings.row]
    row = world.ratings.row[of]
    frame = pd.DataFrame(_shown(world, row) | {"stars": world.ratings.label[of]})
    features = dataclasses.replace(_shown_features(encoding), numbers=("log_price", "review", "match"))
    return Table(frame, "stars", "regression", features, "user", world.ratings.truth[of])


def _prices(world: World, rows: np.ndarray, encoding: str) -> Table:
    items = world.items
    words = {f"word_{n}": items.words[:, n] for n in range(WORDS)}
    columns = {"category": items.category, "brand": items.brand, "review": items.review, "log_weight": np.log(items.weight)}
    frame = pd.DataFrame(columns | words | {"log_price": items.log_price})
    features = Features(numbers=("review", "log_weight", *words), categories=("category", "brand"), encoding=encoding)
    return Table(frame, "log_price", "regression", features, None, items.log_price_mean)


def _behaviour(world: World, rows: np.ndarray, encoding: str) -> Table:
    log = world.log
    row = np.flatnonzero(rows)
    event = (log.click.astype(int) + log.cart + log.purchase)[row]  # none, click, cart, purchase
    click, cart, buy = log.p_click[row], log.p_cart[row], log.p_buy[row]
    truth = np.stack([1 - click, click * (1 - cart), click * cart * (1 - buy), click * cart * buy], axis=1)
    frame = pd.DataFrame(_shown(world, row) | {"event": event})
    return Table(frame, "event", "classes", _shown_features(encoding), "user", truth)


def _delay(world: World, rows: np.ndarray, encoding: str) -> Table:
    orders, log = world.orders, world.log
    of = rows[orders.row]
    user, item = log.user[orders.row[of]], log.item[orders.row[of]]
    columns = {name: column[of] for name, column in orders.columns.items()}
    columns |= {"log_weight": np.log(world.items.weight[item]), "category": world.items.category[item]}
    columns |= {"user": user, "time": log.time[orders.row[of]], "region": world.users.region[user], "late": orders.label[of]}
    features = Features(
        numbers=("warehouse_load", "express", "log_weight"), categories=("category", "region"), encoding=encoding
    )  # fmt: skip
    return Table(pd.DataFrame(columns), "late", "binary", features, None, orders.truth[of])


def _risk(world: World, rows: np.ndarray, encoding: str) -> Table:
    checkouts, log = world.checkouts, world.log
    of = rows[checkouts.row]
    user, item = log.user[checkouts.row[of]], log.item[checkouts.row[of]]
    columns = {name: column[of] for name, column in checkouts.columns.items()}
    columns |= {"account_days": world.users.account_days[user], "region": world.users.region[user], "user": user}
    columns |= {"category": world.items.category[item], "time": log.time[checkouts.row[of]], "fraud": checkouts.label[of]}
    features = Features(
        numbers=("amount", "quantity", "new_device", "other_address", "account_days", "hour"),
        categories=("category", "region"),
        encoding=encoding,
        log1p=("amount", "account_days"),
    )
    return Table(pd.DataFrame(columns), "fraud", "binary", features, None, checkouts.truth[of])


TABLES: dict[str, Callable[..., Table]] = {
    "clicks": _clicks, "conversions": _conversions, "ratings": _ratings, "prices": _prices, "behaviour": _behaviour,
    "delay": _delay, "risk": _risk,
}  # fmt: skip
"""View -> `(world, rows of the log [N] bool, encoding)` to its table; `conversions` takes `privileged` too."""
