"""Views of `data=synthetic_shop`: contracts, truth, agreement with one another, wrong keys."""

import time

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from jdistill.data import synthetic_shop
from jdistill.data.shop import best_possible
from jdistill.data.shop.views import CHEAP, SLOW, VIEWS, Shop
from jdistill.data.shop.world import DAYS
from jdistill.errors import UsageError
from jdistill.registry import build

SMALL = {"users": 200, "items": 120, "queries": 60}
CLASSES = {"clicks": 2, "conversions": 2, "delay": 2, "risk": 2, "behaviour": 4, "ratings": 1, "prices": 1}
TOLD = ("dwell_time", "scroll_depth", "added_to_cart")


def splits(data):
    return data.train, data.validation, data.test


@pytest.mark.parametrize("view", VIEWS)
def test_same_keys_same_arrays(view):
    a, b = (build("data", {"name": "synthetic_shop", "view": view, **SMALL}) for _ in range(2))
    for left, right in zip(splits(a), splits(b), strict=True):
        assert list(left) == list(right)
        for key in left:
            np.testing.assert_array_equal(left[key], right[key])
    other = synthetic_shop(view=view, **SMALL, seed=1)
    assert other.train["inputs"].shape != a.train["inputs"].shape or (other.train["inputs"] != a.train["inputs"]).any()


def test_defaults_are_generated_in_seconds():
    start = time.process_time()
    synthetic_shop()
    assert time.process_time() - start < 5


@pytest.mark.parametrize("encoding", ["index", "one_hot"])
@pytest.mark.parametrize("view", CLASSES)
def test_tables_keep_their_contract(view, encoding):
    data = synthetic_shop(view=view, encoding=encoding, **SMALL)
    assert data.classes == CLASSES[view] and data.privileged == () and data.checksums == {"synthetic_shop": "generated"}
    seen = [split["index"] for split in splits(data)]
    assert len(np.unique(np.concatenate(seen))) == sum(map(len, seen))
    for split in splits(data):
        assert split["inputs"].dtype == np.float32 and np.isfinite(split["inputs"]).all()
        assert split["label"].dtype == (np.int32 if data.classes > 1 else np.float32)
        assert split["inputs"].shape[1] == len(data.schema.fields) == len(data.mean)
        for column, count in enumerate(data.schema.fields):
            if count:
                assert set(np.unique(split["inputs"][:, column])) <= set(range(count))
    numbers = [column for column, count in enumerate(data.schema.fields) if not count]
    scaled = (data.train["inputs"] - np.array(data.mean)) / np.array(data.std)
    assert encoding == "one_hot" or np.allclose(scaled[:, numbers].mean(axis=0), 0, atol=1e-3)
    assert ("group" in data.train) == (view in ("clicks", "conversions", "behaviour", "ratings"))


@pytest.mark.parametrize("view", ["delay", "risk"])
def test_rare_labels_are_rare(view):
    label = synthetic_shop(view=view).train["label"]
    low, high = {"risk": (0.02, 0.04), "delay": (0.05, 0.09)}[view]
    assert low < label.mean() < high


def test_interactions_keep_their_contract():
    data = synthetic_shop(history=6, **SMALL)
    assert (data.schema.users, data.schema.items, data.classes) == (200, 120, 120)
    assert data.side.user_features.shape[0] == 200 and data.side.item_features.shape[0] == 120
    assert len(np.unique(data.train["inputs"], axis=0)) == len(data.train["inputs"]) == len(data.side.edges)
    assert data.test["inputs"].shape[1] == 7 and data.test["label"].shape[1] == 1 and data.tables["sequence"].shape == (200, 7)


def test_last_click_is_tested_on_and_histories_are_what_came_before():
    shop = Shop(history=6, **SMALL)
    data, log = shop.dataset, shop.log
    for request, label, index in zip(data.test["inputs"], data.test["label"], data.test["index"], strict=True):
        rows = np.flatnonzero(log.user == request[0])
        rows = rows[np.argsort(log.time[rows])]
        assert rows[-1] == index and log.item[index] == label[0]
        wanted = log.item[rows[:-1]][-6:].tolist()
        assert request[1:].tolist() == [120] * (6 - len(wanted)) + wanted


def test_lists_keep_their_contract():
    data = synthetic_shop(view="search", privileged=SLOW)
    assert data.privileged == (4, 5, 6) and data.classes == 30 and data.train["inputs"].shape[2] == len(CHEAP) + len(SLOW) + 1
    for split in splits(data):
        length = (split["grades"] >= 0).sum(axis=1)
        assert length.min() >= 5 and length.max() <= 30 and set(np.unique(split["grades"])) == {-1, 0, 1, 2, 3}
        np.testing.assert_array_equal(split["inputs"][:, :, -1], split["grades"] >= 0)


def test_views_tell_of_one_history():
    clicks, behaviour, conversions, bought, log = (
        Shop(view="clicks", **SMALL), Shop(view="behaviour", **SMALL), Shop(view="conversions", **SMALL),
        Shop(feedback="purchase", **SMALL), Shop(**SMALL),
    )  # fmt: skip
    event = behaviour.table.frame["event"]
    np.testing.assert_array_equal(clicks.table.frame["click"], event >= 1)
    clicked = clicks.table.frame[clicks.table.frame["click"]]
    np.testing.assert_array_equal(clicked[["user", "item"]], conversions.table.frame[["user", "item"]])
    np.testing.assert_array_equal(conversions.table.frame["purchase"], event[event >= 1] == 3)
    assert {*map(tuple, clicked[["user", "item"]].to_numpy())} == {*zip(log.log.user, log.log.item, strict=True)}
    sold = conversions.table.frame.query("purchase")
    assert {*map(tuple, sold[["user", "item"]].to_numpy())} == {*zip(bought.log.user, bought.log.item, strict=True)}


def test_days_cut_one_time_line_in_two():
    whole, past, present = (Shop(days=days, **SMALL) for days in ((0, 1), (0, 0.5), (0.5, 1)))
    assert past.log.time.max() < DAYS / 2 <= present.log.time.min()
    assert (past.rows ^ present.rows).all() and whole.rows.all() and not (past.rows & present.rows).any()
    assert past.dataset.schema == present.dataset.schema == whole.dataset.schema


def test_columns_known_afterwards_are_there_only_where_named():
    plain, told = (synthetic_shop(view="conversions", privileged=names) for names in ((), TOLD))
    assert plain.privileged == () and len(told.privileged) == 3
    assert told.train["inputs"].shape[1] == plain.train["inputs"].shape[1] + 3
    kept = np.setdiff1d(np.arange(told.train["inputs"].shape[1]), told.privileged)
    np.testing.assert_array_equal(told.train["inputs"][:, kept], plain.train["inputs"])
    inputs, label = plain.train["inputs"], plain.train["label"]
    cart = told.train["inputs"][:, told.privileged[-1]]
    assert cart[label == 1].all()  # what is bought was in the cart: no plain column may say so
    assert all(abs(np.corrcoef(column, cart)[0, 1]) < 0.5 for column in inputs.T if column.std() > 0)
    cheap = synthetic_shop(view="search")
    assert cheap.privileged == () and cheap.train["inputs"].shape[2] == len(CHEAP) + 1


def test_privileged_columns_tell_more():
    student = best_possible("conversions")
    teacher = [best_possible("conversions", teacher=True, privileged=TOLD[:n])["auc"] for n in (1, 2, 3)]
    assert student["auc"] < teacher[0] < teacher[1] < teacher[2] < 1
    assert best_possible("conversions", privileged=TOLD) == student


def test_what_the_truth_with_privileged_columns_says_happens():
    shop = Shop(view="conversions", privileged=TOLD[:2])
    truth, bought = shop.table.told, shop.table.frame["purchase"].to_numpy()
    for part in np.array_split(np.argsort(truth), 10):
        spread = np.sqrt((truth[part] * (1 - truth[part])).sum()) / len(part)
        assert abs(bought[part].mean() - truth[part].mean()) < 4 * spread + 1e-3


@pytest.mark.parametrize(
    ("view", "metric", "low", "high"),
    [
        ("interactions", "ndcg_at_10", 0.2, 0.4), ("clicks", "auc", 0.78, 0.86), ("conversions", "auc", 0.68, 0.78),
        ("delay", "auc", 0.78, 0.92), ("risk", "auc", 0.74, 0.9), ("behaviour", "accuracy", 0.79, 0.83),
        ("ratings", "rmse", 0.6, 0.75), ("prices", "rmse", 0.2, 0.3), ("search", "ndcg_at_10", 0.9, 0.995),
    ],
)  # fmt: skip
def test_best_possible_metrics(view, metric, low, high):
    assert low < best_possible(view)[metric] < high


@pytest.mark.parametrize(
    "keys", [{"history": 5}, {"feedback": "purchase"}, {"domain": "second"}, {"candidates": 50}, {"core": 3}]
)
def test_best_possible_recommendation_beats_popularity(keys):
    best = best_possible(**keys, **SMALL)["ndcg_at_10"]
    data = synthetic_shop(**keys, **SMALL)
    met = np.zeros((data.schema.users, data.classes), bool)
    met[tuple(data.train["inputs"].T)] = True
    met[data.validation["inputs"][:, 0], data.validation["label"][:, 0]] = True
    popular = np.where(met, -1, np.bincount(data.train["inputs"][:, 1], minlength=data.classes))[data.test["inputs"][:, 0]]
    own = data.test["label"][:, :1]
    shown = data.test["candidates"] if "candidates" in data.test else np.broadcast_to(np.arange(data.classes), popular.shape)
    above = (np.take_along_axis(popular, shown, axis=1) > np.take_along_axis(popular, own, axis=1)).sum(axis=1)
    assert best > np.where(above < 10, 1 / np.log2(above + 2), 0).mean() + 0.02


def test_a_logistic_regression_reaches_most_of_the_best_auc():
    data, best = synthetic_shop(view="clicks"), best_possible("clicks")["auc"]
    train, test = ((split["inputs"] - np.array(data.mean)) / np.array(data.std) for split in (data.train, data.test))
    fitted = LogisticRegression(max_iter=100).fit(train, data.train["label"])
    found = roc_auc_score(data.test["label"], fitted.decision_function(test))
    assert 0.5 + 0.7 * (best - 0.5) < found < best
    truth = Shop(view="clicks").table.truth[data.test["index"]]
    assert roc_auc_score(data.test["label"], truth) == pytest.approx(best)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"view": "click"}, "view must be one of .*did you mean 'clicks'"),
        ({"domain": "secnd"}, "domain must be one of main, second.*did you mean 'second'"),
        ({"users": 3}, "users must be at least 10, got 3"),
        ({"items": 5}, "items must be at least 50, got 5"),
        ({"events": 0.5}, "events must be at least 2"),
        ({"noise": -1.0}, "noise must be at least 0"),
        ({"days": (0.5, 0.2)}, "days must be two rising fractions"),
        ({"view": "clicks", "history": 5}, "history means nothing to view=clicks; leave it out .it is for interactions"),
        ({"view": "interactions", "encoding": "index"}, "encoding means nothing to view=interactions"),
        ({"view": "conversions", "privileged": ("dwel_time",)}, "did you mean 'dwell_time'"),
        ({"view": "clicks", "privileged": ("dwell_time",)}, "privileged means nothing to view=clicks"),
        ({"view": "clicks", "split": "leave_one_out"}, "split must be one of random, time"),
        ({"split": "random"}, "split must be one of leave_one_out"),
        ({"feedback": "clik"}, "feedback must be one of .*did you mean 'click'"),
        ({"root": "/nowhere"}, "root '/nowhere' is not a directory"),
    ],
)  # fmt: skip
def test_wrong_keys_are_one_line(keys, message):
    with pytest.raises(UsageError, match=message) as caught:
        synthetic_shop(**keys)
    assert "\n" not in str(caught.value)
