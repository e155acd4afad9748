"""What the true probabilities of the shop reach: the bound for every network."""

from typing import Any

import numpy as np

from jdistill.data.base import Split
from jdistill.data.shop.views import Shop
from jdistill.data.shop.world import SHOWN, World
from jdistill.metrics import binary_metrics, list_metrics, ranking_metrics, regression_metrics

CUTOFFS = (10, 20, 50)
_CHUNK = 1 << 23


def best_possible(view: str = "interactions", *, teacher: bool = False, **keys: Any) -> dict[str, float]:
    """Metrics, on the test split, of the true probabilities: no network is better but by chance.

    Tables: the true probability or mean of each label. Search: the utility that grades are cut from. Interactions: items by
    the rate at which the user meets them at that time; where requests bring a history along, at which the user does within
    the session, whose query is known to the shop only: more than a history tells. These rates take the mean position on the
    page and an approximation of `World.shown`; that a user met an item before they do not know.

    Args:
      view: and `keys`: as `synthetic_shop` takes them.
      teacher: of conversions: with what the privileged columns tell.

    Returns:
      What the task of the view measures: `auc`, `accuracy`, `rmse`, `ndcg_at_10`, ...

    Raises:
      UsageError: as `synthetic_shop`.
    """
    shop = Shop(view=view, **keys)
    split = shop.dataset.test
    if view == "interactions":
        return _recommendation(shop, split)
    if view == "search":
        rows, utility = shop.lists
        scores = np.full(split["grades"].shape, -np.inf)
        scores[split["grades"] >= 0] = utility[np.isin(rows.query, split["index"])]
        return list_metrics(scores, split["grades"], (10, 5, 1))
    table = shop.table
    truth = (table.told if teacher and table.told is not None else table.truth)[split["index"]]
    if table.kind == "regression":
        return regression_metrics(truth, split["label"])
    if table.kind == "classes":
        own = truth[np.arange(len(truth)), split["label"]]
        return {"accuracy": float((truth.argmax(axis=1) == split["label"]).mean()), "cross_entropy": float(-np.log(own).mean())}
    with np.errstate(divide="ignore"):
        return binary_metrics(np.log(truth) - np.log1p(-truth), split["label"], split.get("group"))


def _recommendation(shop: Shop, split: Split) -> dict[str, float]:
    data, log, world = shop.dataset, shop.log, shop.world
    assert log.time is not None
    order = np.argsort(world.log.time)
    row = order[np.searchsorted(world.log.time[order], log.time[split["index"]])]
    item = log.item_names
    scores = _rates(world, row, item, shop.feedback == "purchase", bool(shop.history))
    if "candidates" in split:
        chosen = np.concatenate([split["candidates"], split["label"][:, :1]], axis=1)
        scores = np.take_along_axis(scores, chosen, axis=1)
    else:
        chosen = np.broadcast_to(np.arange(len(item)), scores.shape)
        held, column = np.nonzero(data.validation["label"] >= 0)
        met = np.zeros((log.users, len(item)), bool)
        met[tuple(data.train["inputs"].T)] = True
        met[data.validation["inputs"][held, 0], data.validation["label"][held, column]] = True
        scores = np.where(met[split["inputs"][:, 0]], -np.inf, scores)
    best = np.argsort(-scores, axis=1, kind="stable")[:, : max(CUTOFFS)]
    top = np.where(np.take_along_axis(scores, best, axis=1) > -np.inf, np.take_along_axis(chosen, best, axis=1), -1)
    popularity = np.bincount(data.train["inputs"][:, 1], minlength=len(item))
    return ranking_metrics(top.astype(np.int32), split["label"], CUTOFFS, popularity=popularity)


def _rates(world: World, row: np.ndarray, item: np.ndarray, purchase: bool, session: bool) -> np.ndarray:
    """[M, I']: the rate at which the user of each `row` [M] of the log clicks (or buys) `item` [I'] at that time."""
    log, shown, match = world.log, world.shown()[:, item], world.match[:, item]
    chunk = max(1, _CHUNK // (len(match) * len(item)))
    rates = []
    for start in range(0, len(row), chunk):
        at = row[start : start + chunk]
        asked = np.eye(len(match))[log.query[at]] if session else world.asked(log.user[at], log.time[at])
        user = log.user[at][:, None, None]
        click, cart, buy = world.chances(user, item[None, None], match[None], (SHOWN - 1) / 2)
        rates.append(np.einsum("bq,qi,bqi->bi", asked, shown, click * cart * buy if purchase else click, optimize=True))
    return np.concatenate(rates) if rates else np.zeros((0, len(item)))
