"""The world behind `data=synthetic_shop`: what it draws has the probabilities that it keeps."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from jdistill.data.shop.world import DAYS, RATES, SHOWN, build_world


@pytest.fixture(scope="module")
def world():
    return build_world()


def test_same_keys_same_world_and_another_seed_another(world):
    again, other = build_world(), build_world(seed=1)
    for name in world.log._fields:
        np.testing.assert_array_equal(getattr(world.log, name), getattr(again.log, name))
    np.testing.assert_array_equal(world.orders.label, again.orders.label)
    assert not np.array_equal(world.log.item[:1000], other.log.item[:1000])


def test_sizes_and_order(world):
    log = world.log
    assert len(log.user) == 100_000 and np.bincount(log.user, minlength=1000).min() >= SHOWN
    assert abs(log.click.sum() / 1000 - 20) < 0.6
    assert len(np.unique(log.time)) == len(log.time) and log.time.min() >= 0 and log.time.max() < DAYS + 0.1
    assert not (log.cart & ~log.click).any() and not (log.purchase & ~log.cart).any()
    pages = log.item.reshape(-1, SHOWN)
    assert all(len(set(page)) == SHOWN for page in pages[:500].tolist())


def test_popularity_is_long_tailed(world):
    shows = np.sort(np.bincount(world.log.item, minlength=400))[::-1]
    assert shows[:40].sum() > 0.25 * shows.sum() and shows[-200:].sum() < 0.3 * shows.sum()


@pytest.mark.parametrize("name", ["click", "cart", "buy", "risk", "delay"])
def test_events_happen_as_often_as_their_probabilities_say(world, name):
    log = world.log
    p, happened = {
        "click": (log.p_click, log.click),
        "cart": (log.p_cart[log.click], log.cart[log.click]),
        "buy": (log.p_buy[log.cart], log.purchase[log.cart]),
        "risk": (world.checkouts.truth, world.checkouts.label),
        "delay": (world.orders.truth, world.orders.label),
    }[name]
    assert p.mean() == pytest.approx(RATES[name], abs=1e-6)
    for part in np.array_split(np.argsort(p), 10):
        spread = np.sqrt((p[part] * (1 - p[part])).sum()) / len(part)
        assert abs(happened[part].mean() - p[part].mean()) < 4 * spread + 1e-3
    best = roc_auc_score(happened, p)
    assert best > (0.65 if name in ("cart", "buy") else 0.7)  # those two are steps of a conversion, no view of their own
    rng = np.random.default_rng(0)
    assert all(roc_auc_score(happened, rng.permutation(p)) < best - 0.1 for _ in range(5))


def test_probabilities_follow_from_a_loop_over_the_definition(world):
    users, items, log = world.users, world.items, world.log
    for n in range(0, 100_000, 9973):
        u, i = log.user[n], log.item[n]
        words = world.queries.words[log.query[n]]
        match = float(world.queries.category[log.query[n]] == items.category[i]) + (words * items.words[i]).sum() / words.sum()
        score = sum(a * b for a, b in zip(users.taste[u], items.style[i], strict=True)) + 0.8 * match + 0.5 * items.quality[i]
        score -= 0.9 * users.sensitivity[u] * (items.log_price[i] - 3) + 0.15 * log.position[n]
        assert log.p_click[n] == pytest.approx(1 / (1 + np.exp(-score - world.intercepts[0])))
        click, cart, buy = world.chances(u, i, np.float64(match), log.position[n])
        assert (click, cart, buy) == pytest.approx((log.p_click[n], log.p_cart[n], log.p_buy[n]))


def test_pages_and_queries_are_drawn_as_stated(world):
    log = world.log
    shown = world.shown()
    np.testing.assert_allclose(shown.sum(axis=1), SHOWN)
    query = np.bincount(log.query).argmax()
    pages = (log.query == query).sum() / SHOWN
    found = np.bincount(log.item[log.query == query], minlength=400) / pages
    assert np.abs(found - shown[query]).max() < 0.12 and np.corrcoef(found, shown[query])[0, 1] > 0.97
    session = slice(None, None, SHOWN)
    p = world.asked(log.user[session], log.time[session])
    spread = np.sqrt((p * (1 - p)).sum(axis=0))
    asked = np.bincount(log.query[session], minlength=150)
    assert (np.abs(asked - p.sum(axis=0)) < 5 * spread).all()


def test_stars_are_whole_and_scatter_about_their_mean(world):
    stars, mean = world.ratings.label, world.ratings.truth
    assert set(np.unique(stars)) == {1, 2, 3, 4, 5}
    for part in np.array_split(np.argsort(mean), 8):
        assert abs(stars[part].mean() - mean[part].mean()) < 4 * stars[part].std() / np.sqrt(len(part))


def test_second_shop_shares_half_of_the_people_and_no_item(world):
    second = build_world(domain="second")
    np.testing.assert_array_equal(world.users.taste[:500], second.users.taste[:500])
    assert not np.isclose(world.users.taste[500:], second.users.taste[500:]).any(axis=1).any()
    assert not np.isclose(world.items.style[:, 0], second.items.style[:, 0]).any()


def test_without_noise_prices_follow_from_attributes():
    calm = build_world(users=50, noise=0.0)
    np.testing.assert_array_equal(calm.items.log_price, calm.items.log_price_mean)
    np.testing.assert_array_equal(calm.ratings.label, calm.ratings.truth)
