"""A shop that never was: users, items, queries and what they do, drawn from probabilities that are kept.

Everything is a function of the keys and the seed. The latent vectors of users, items and queries lie in one space of tastes,
which both domains share; so are the people of the first half of the users, and what words mean.
"""

import dataclasses
from typing import NamedTuple

import numpy as np
from scipy.optimize import brentq
from scipy.special import expit, ndtr

DIM = 16
CATEGORIES, BRANDS, WORDS, REGIONS, AGES, BUDGETS = 20, 12, 8, 6, 5, 5
SHOWN = 10
"""Items on a page: each session shows one."""
DAYS = 100.0
"""Length of the time line."""
RATES = {"click": 0.2, "cart": 0.4, "buy": 0.5, "risk": 0.03, "delay": 0.07}
"""Mean probabilities: of a click on what is shown, a cart given a click, a purchase given a cart, a risk given a cart, a
delay given a purchase. The intercepts are solved for these."""
DOMAINS = ("main", "second")
_CHUNK = 1 << 22


class Users(NamedTuple):
    """Of each user: `age`, `region`, `budget` (bands and places, int; low budgets mind prices), `account_days`, `activity`
    (relative number of sessions), the price `sensitivity`, and the latent `taste` [U, DIM]."""

    age: np.ndarray
    region: np.ndarray
    budget: np.ndarray
    account_days: np.ndarray
    activity: np.ndarray
    sensitivity: np.ndarray
    taste: np.ndarray


class Items(NamedTuple):
    """Of each item: `category`, `brand` (int), `log_price` and its mean `log_price_mean` given the other attributes, `weight`
    (kg), the latent `quality` and `review`, a noisy view of it, `popularity` (sums to 1), `words` [I, WORDS] 0 or 1, and the
    latent `style` [I, DIM] of length 1."""

    category: np.ndarray
    brand: np.ndarray
    log_price: np.ndarray
    log_price_mean: np.ndarray
    weight: np.ndarray
    quality: np.ndarray
    review: np.ndarray
    popularity: np.ndarray
    words: np.ndarray
    style: np.ndarray


class Queries(NamedTuple):
    """Of each query: `category`, its two `words` [Q, WORDS], the latent `style` [Q, DIM] of length 1, `appeal` (log odds of
    being asked) and `trend`, by how much that grows along the time line."""

    category: np.ndarray
    words: np.ndarray
    style: np.ndarray
    appeal: np.ndarray
    trend: np.ndarray


class Log(NamedTuple):
    """What happened, a row for each item shown, in the order of sessions.

    Attributes:
      user, query, item: [N] int.
      time: [N] days, all different.
      position: [N] 0 .. SHOWN - 1.
      p_click, p_cart, p_buy: [N] the true probabilities: of a click, of a cart given it, of a purchase given that.
      click, cart, purchase: [N] bool.
      log_dwell: [N] logarithm of the seconds on the item's page; of clicks, like `depth`.
      depth: [N] logit of the scrolled share of the page.
    """

    user: np.ndarray
    query: np.ndarray
    item: np.ndarray
    time: np.ndarray
    position: np.ndarray
    p_click: np.ndarray
    p_cart: np.ndarray
    p_buy: np.ndarray
    click: np.ndarray
    cart: np.ndarray
    purchase: np.ndarray
    log_dwell: np.ndarray
    depth: np.ndarray


class Labelled(NamedTuple):
    """Examples of their own: `row` [N] of the log, `columns` name -> [N], the `label` [N] and `truth` [N], its mean."""

    row: np.ndarray
    columns: dict[str, np.ndarray]
    label: np.ndarray
    truth: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class World:
    """A shop with its history.

    Attributes:
      users, items, queries, log: see there.
      match: [Q, I], in [0, 2]: 1 for the category, and the share of the query's words that the item has.
      exposure: [Q, I], how near an item comes to being shown for a query: log weights.
      intercepts: of clicks, carts and purchases.
      ratings: stars (1 to 5) that some of the clicked items get; `truth` is their mean.
      checkouts: every cart goes there; the label is a fraud.
      orders: the purchases; the label is a late delivery.
    """

    users: Users
    items: Items
    queries: Queries
    log: Log
    match: np.ndarray
    exposure: np.ndarray
    intercepts: tuple[float, float, float]
    ratings: Labelled
    checkouts: Labelled
    orders: Labelled

    def chances(
        self, user: np.ndarray, item: np.ndarray, match: np.ndarray, position: np.ndarray | float
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """True probabilities of click, cart given click and purchase given cart; arguments of one shape, or that broadcast."""
        scores = _scores(self.users, self.items, user, item, match, position)
        click, cart, buy = (expit(a + score) for a, score in zip(self.intercepts, scores, strict=True))
        return click, cart, buy

    def asked(self, user: np.ndarray, time: np.ndarray) -> np.ndarray:
        """[N, Q]: the probability that a session of `user` [N] at `time` [N] (days) is of each query."""
        logits = _query_logits(self.users, self.queries, user, time)
        p = np.exp(logits - logits.max(axis=1, keepdims=True))
        return p / p.sum(axis=1, keepdims=True)

    def shown(self) -> np.ndarray:
        """[Q, I]: the probability that the page of a query has an item.

        Pages are drawn without replacement, by weights w; the probabilities are 1 - exp(-w t), with t such that they sum to
        `SHOWN`: an approximation, close where there are many items.
        """
        weight = np.exp(self.exposure - self.exposure.max(axis=1, keepdims=True))
        return np.stack([_included(row) for row in weight])


def build_world(
    *, users: int = 1000, items: int = 400, queries: int = 150, events: float = 20.0, noise: float = 1.0, seed: int = 0,
    domain: str = "main",
) -> World:  # fmt: skip
    """The shop of these keys; see `synthetic_shop`."""
    common, place = np.random.default_rng([seed, 0]), DOMAINS.index(domain)
    lexicon = common.standard_normal((WORDS, DIM))
    people = _users(common, users, place)
    rng = np.random.default_rng([seed, 1 + place])
    centres = _unit(rng.standard_normal((CATEGORIES, DIM)))
    catalogue = _items(rng, items, centres, lexicon, noise)
    asked = _queries(rng, queries, centres, lexicon)
    match = (asked.category[:, None] == catalogue.category).astype(float) + asked.words @ catalogue.words.T / 2
    same = asked.category[:, None] == catalogue.category
    exposure = np.log(catalogue.popularity) + 4.0 * same + 1.0 * (match - same)
    user, query, time = _sessions(rng, people, asked, events)
    item = _pages(rng, exposure, query)
    log, intercepts = _happenings(rng, people, catalogue, match, (user, query, time, item))
    return World(
        people, catalogue, asked, log, match, exposure, intercepts,
        ratings=_ratings(rng, people, catalogue, log, noise),
        checkouts=_checkouts(rng, people, catalogue, log),
        orders=_orders(rng, people, catalogue, log),
    )  # fmt: skip


def _included(weight: np.ndarray) -> np.ndarray:
    """1 - exp(-w t) [I] that sum to `SHOWN`; the largest weight is 1."""
    return -np.expm1(-weight * brentq(lambda t: -np.expm1(-weight * t).sum() - SHOWN, 0.0, 1e12))


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def _users(rng: np.random.Generator, users: int, place: int) -> Users:
    """The second shop has the first half of the main shop's users, and others."""
    people = 2 * users
    age, region = rng.integers(0, AGES, people), rng.integers(0, REGIONS, people)
    fashion = rng.standard_normal((AGES, DIM))
    taste = 0.5 * fashion[age] + np.sqrt(0.75) * rng.standard_normal((people, DIM))
    mind = rng.standard_normal(people)
    everyone = Users(
        age, region,
        budget=np.clip(np.floor(BUDGETS * ndtr(-(mind + 0.5 * rng.standard_normal(people)))), 0, BUDGETS - 1).astype(int),
        account_days=np.exp(rng.normal(5.5, 1.0, people)).round(),
        activity=np.exp(rng.normal(0.0, 0.5, people)),
        sensitivity=np.maximum(0.8 + 0.4 * mind, 0.0),
        taste=taste,
    )  # fmt: skip
    new = np.arange(users) + users * place
    who = np.where(np.arange(users) < users // 2, np.arange(users), new)
    return Users(*(array[who] for array in everyone))


def _items(rng: np.random.Generator, items: int, centres: np.ndarray, lexicon: np.ndarray, noise: float) -> Items:
    """Popularity falls with the rank as Zipf's law has it, with the exponent 0.8."""
    category, brand = rng.permutation(np.arange(items) % CATEGORIES), rng.integers(0, BRANDS, items)
    style = _unit(0.75 * centres[category] + 0.66 * _unit(rng.standard_normal((items, DIM))))
    words = (style @ lexicon.T + 0.3 * noise * rng.standard_normal((items, WORDS)) > 0.3).astype(float)
    quality = rng.standard_normal(items)
    weight = np.exp(rng.normal(0.0, 0.8, items) + rng.normal(0.0, 0.5, CATEGORIES)[category])
    mean = 3.0 + rng.normal(0, 0.6, CATEGORIES)[category] + rng.normal(0, 0.3, BRANDS)[brand]
    mean = mean + 0.25 * quality + 0.2 * np.log(weight) + words @ rng.normal(0, 0.15, WORDS)
    popularity = (1.0 + rng.permutation(items)) ** -0.8
    return Items(
        category, brand,
        log_price=mean + 0.25 * noise * rng.standard_normal(items),
        log_price_mean=mean,
        weight=weight,
        quality=quality,
        review=quality + 0.3 * noise * rng.standard_normal(items),
        popularity=popularity / popularity.sum(),
        words=words,
        style=style,
    )  # fmt: skip


def _queries(rng: np.random.Generator, queries: int, centres: np.ndarray, lexicon: np.ndarray) -> Queries:
    category = rng.permutation(np.arange(queries) % CATEGORIES)
    style = _unit(0.75 * centres[category] + 0.66 * _unit(rng.standard_normal((queries, DIM))))
    best = np.argsort(style @ lexicon.T, axis=1)[:, -2:]
    words = np.zeros((queries, WORDS))
    np.put_along_axis(words, best, 1.0, axis=1)
    return Queries(category, words, style, appeal=rng.normal(0, 0.7, queries), trend=rng.normal(0, 1.0, queries))


def _query_logits(users: Users, queries: Queries, user: np.ndarray, time: np.ndarray) -> np.ndarray:
    trend = queries.trend * (time[:, None] / DAYS - 0.5)
    return 2.0 * users.taste[user] @ queries.style.T + queries.appeal + trend


def _sessions(
    rng: np.random.Generator, users: Users, queries: Queries, events: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Users, queries and times [S]: as many as give `events` clicks a user on average, each user at least one."""
    count = len(users.age)
    total = max(count, round(count * events / (SHOWN * RATES["click"])))
    each = 1 + rng.multinomial(total - count, users.activity / users.activity.sum())
    user = np.repeat(np.arange(count), each)
    time = rng.uniform(0, DAYS, total)
    order = np.argsort(time)
    user, time = user[order], time[order]
    chunk = max(1, _CHUNK // len(queries.category))
    query = [
        (_query_logits(users, queries, user[s], time[s]) + rng.gumbel(size=(len(user[s]), len(queries.category)))).argmax(1)
        for s in (slice(start, start + chunk) for start in range(0, total, chunk))
    ]
    return user, np.concatenate(query), time


def _pages(rng: np.random.Generator, exposure: np.ndarray, query: np.ndarray) -> np.ndarray:
    """[S, SHOWN] items drawn without replacement, the largest of log weight + Gumbel noise first."""
    chunk = max(1, _CHUNK // exposure.shape[1])
    pages = []
    for start in range(0, len(query), chunk):
        noisy = exposure[query[start : start + chunk]]
        noisy = noisy + rng.gumbel(size=noisy.shape)
        best = np.argpartition(noisy, -SHOWN, axis=1)[:, -SHOWN:]
        order = np.argsort(-np.take_along_axis(noisy, best, axis=1), axis=1)
        pages.append(np.take_along_axis(best, order, axis=1))
    return np.concatenate(pages)


def _scores(
    users: Users, items: Items, user: np.ndarray, item: np.ndarray, match: np.ndarray, position: np.ndarray | float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Log odds of click, cart and purchase, up to the intercepts."""
    affinity = (users.taste[user] * items.style[item]).sum(axis=-1)
    dear = users.sensitivity[user] * (items.log_price[item] - 3.0)
    quality = items.quality[item]
    click = 1.0 * affinity + 0.8 * match + 0.5 * quality - 0.9 * dear - 0.15 * position
    return click, 0.6 * affinity + 0.6 * quality - 0.5 * dear, 0.4 * quality - 0.8 * dear


def _intercept(scores: np.ndarray, rate: float) -> float:
    """What to add to log odds so that their mean probability is `rate`."""
    return float(brentq(lambda a: expit(a + scores).mean() - rate, -60.0, 60.0))


def _happenings(
    rng: np.random.Generator, users: Users, items: Items, match: np.ndarray,
    sessions: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray],
) -> tuple[Log, tuple[float, float, float]]:  # fmt: skip
    """Clicks, carts, purchases, dwell times and scrolled depths of all that is shown."""
    user, query, time, pages = sessions
    user, query = (np.repeat(array, SHOWN) for array in (user, query))
    item, position = pages.reshape(-1), np.tile(np.arange(SHOWN), len(pages))
    when = (time[:, None] + np.sort(rng.uniform(0, 0.01, pages.shape), axis=1)).reshape(-1)
    scores = _scores(users, items, user, item, match[query, item], position)
    intercepts, p, happened, so_far = [], [], [], np.ones(len(user), bool)
    for score, name in zip(scores, ("click", "cart", "buy"), strict=True):
        intercepts.append(_intercept(score[so_far], RATES[name]))
        p.append(expit(intercepts[-1] + score))
        so_far = so_far & (rng.random(len(user)) < p[-1])
        happened.append(so_far)
    log_dwell, depth = (rng.normal(mean, std) for mean, std in afterwards(happened[1], happened[2]).values())
    (p_click, p_cart, p_buy), (click, cart, purchase) = p, happened
    log = Log(user, query, item, when, position, p_click, p_cart, p_buy, click, cart, purchase, log_dwell, depth)
    return log, (intercepts[0], intercepts[1], intercepts[2])


def afterwards(cart: np.ndarray, purchase: np.ndarray) -> dict[str, tuple[np.ndarray, float]]:
    """Mean and standard deviation of `log_dwell` and `depth`, normal given what came of a click."""
    return {"log_dwell": (3.0 + 0.7 * cart + 0.7 * purchase, 0.8), "depth": (0.5 * cart + 0.5 * purchase, 1.0)}


def _ratings(rng: np.random.Generator, users: Users, items: Items, log: Log, noise: float) -> Labelled:
    """Half of the clicked items get 1 to 5 stars: a normal number, rounded."""
    row = np.flatnonzero(log.click & (rng.random(len(log.user)) < 0.5))
    user, item = log.user[row], log.item[row]
    affinity = (users.taste[user] * items.style[item]).sum(axis=-1)
    mean, std = 2.8 + 0.6 * affinity + 0.6 * items.quality[item], 0.7 * noise
    stars = np.clip(np.rint(mean + std * rng.standard_normal(len(row))), 1, 5)
    above = ndtr((mean[:, None] - np.arange(1.5, 5.0)) / max(std, 1e-9))
    return Labelled(row, {}, stars, 1 + above.sum(axis=1))


def _labelled(
    rng: np.random.Generator, row: np.ndarray, columns: dict[str, np.ndarray], score: np.ndarray, rate: float
) -> Labelled:
    """Yes/no labels of the given log odds, at a mean probability of `rate`."""
    truth = expit(_intercept(score, rate) + score) if len(row) else score
    return Labelled(row, columns, rng.random(len(row)) < truth, truth)


def _checkouts(rng: np.random.Generator, users: Users, items: Items, log: Log) -> Labelled:
    """Fraud: dear baskets, new devices, young accounts, and other addresses, which count double at night."""
    row = np.flatnonzero(log.cart)
    quantity, hour = 1 + rng.poisson(0.5, len(row)), rng.integers(0, 24, len(row))
    device, address = rng.random(len(row)) < 0.2, rng.random(len(row)) < 0.1
    amount, days = quantity * np.exp(items.log_price[log.item[row]]), users.account_days[log.user[row]]
    score = 0.8 * np.log(amount) + 1.0 * device - 0.7 * np.log1p(days) + 1.2 * address * (1 + (hour < 6))
    columns = {"amount": amount, "quantity": quantity, "hour": hour, "new_device": device, "other_address": address}
    return _labelled(rng, row, columns, score, RATES["risk"])


def _orders(rng: np.random.Generator, users: Users, items: Items, log: Log) -> Labelled:
    """Late deliveries: by region, weight and the load of the warehouse, and by both of these together."""
    row = np.flatnonzero(log.purchase)
    load = np.clip(0.5 + 0.3 * np.sin(8 * np.pi * log.time[row] / DAYS) + 0.1 * rng.standard_normal(len(row)), 0, 1)
    express, heavy = rng.random(len(row)) < 0.3, np.log(items.weight[log.item[row]])
    region = np.linspace(-0.8, 0.8, REGIONS)[users.region[log.user[row]]]
    score = region + 0.8 * heavy + 3.0 * load + 1.0 * heavy * load - 1.0 * express
    return _labelled(rng, row, {"warehouse_load": load, "express": express}, score, RATES["delay"])
