"""The publishers' tables, found through JDISTILL_DATA: their known numbers, and what a classifier makes of them."""

import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from jdistill.data import credit_default, movielens_ratings, online_shoppers, retailrocket_behaviour
from jdistill.data.tables import behaviour
from jdistill.data.tables.behaviour import EVENTS, RETAILROCKET, counted, strongest
from jdistill.data.tables.credit_default import CREDIT_DEFAULT
from jdistill.data.tables.online_shoppers import FILE, ONLINE_SHOPPERS
from jdistill.data.tables.ratings import MOVIELENS_RATINGS, film_features
from jdistill.errors import UsageError
from tests.realdata import require_files


def require(source):
    """The folder with the files of a source; skips the test where they are not."""
    folder = source.folders[0]
    return require_files(*(f"{folder}/{name}" for name in source.sha256)) / folder


def parts(data):
    return data.train, data.validation, data.test


def auc(data, columns=slice(None)):
    """Of a logistic regression on the given columns."""
    inputs, test = (np.asarray(data.preprocess(split["inputs"]))[:, columns] for split in (data.train, data.test))
    scores = LogisticRegression(max_iter=200, tol=1e-3).fit(inputs, data.train["label"]).predict_proba(test)
    return roc_auc_score(data.test["label"], scores[:, 1] if data.classes == 2 else scores, multi_class="ovr")


def test_online_shoppers():
    folder = require(ONLINE_SHOPPERS)
    data = online_shoppers(privileged=("PageValues", "BounceRates", "ExitRates"), download=False)
    assert [len(s["label"]) for s in parts(data)] == [8878, 986, 2466]
    assert sum(s["label"].sum() for s in parts(data)) == 1908
    assert data.checksums == ONLINE_SHOPPERS.sha256 and data.classes == 2 and data.privileged == (6, 7, 8)
    table = pd.read_csv(folder / FILE)
    for split in parts(data):
        rows = table.iloc[split["index"]]
        np.testing.assert_array_equal(split["label"], rows["Revenue"])
        np.testing.assert_array_equal(split["inputs"][:, 8], rows["PageValues"].astype(np.float32))
    student = auc(data, [i for i in range(len(data.mean)) if i not in data.privileged])
    assert 0.65 < student < 0.75 and auc(data) > 0.87, "what a teacher knows in advance must help"
    index = online_shoppers(encoding="index", download=False)
    assert index.schema.fields[:10] == (0,) * 10 and index.schema.fields[10] == 11, "ten months and the unknown one"
    with pytest.raises(UsageError, match=r"privileged has 'PageValue', no column of .*; did you mean 'PageValues'"):
        online_shoppers(privileged=("PageValue",), download=False)


def test_credit_default():
    require(CREDIT_DEFAULT)
    data = credit_default()
    assert [len(s["label"]) for s in parts(data)] == [21600, 2400, 6000]
    assert [int(s["label"].sum()) for s in parts(data)] == [4778, 531, 1327], "6,636 in all, stratified"
    assert data.train["inputs"].shape[1] == 20 + 2 + 7 + 4
    assert auc(data) > 0.72


def test_credit_default_that_is_missing_or_altered(tmp_path):
    with pytest.raises(UsageError, match=r"default_of_credit_card_clients\.csv is missing; https://archive\.ics\.uci\.edu"):
        credit_default(root=str(tmp_path))
    (tmp_path / "credit-default").mkdir()
    (tmp_path / "credit-default" / "default_of_credit_card_clients.csv").write_text("ID,LIMIT_BAL\n1,2\n")
    with pytest.raises(UsageError, match="is truncated or altered"):
        credit_default(root=str(tmp_path))
    with pytest.raises(UsageError, match="label has 'dpnm', no column of credit_default"):
        credit_default(root=str(tmp_path), verify=False)


@pytest.mark.parametrize("split", ["random", "time"])
def test_movielens_ratings(split):
    folder = require(MOVIELENS_RATINGS)
    data = movielens_ratings(split=split)
    assert sum(len(s["label"]) for s in parts(data)) == 100_836 and len(data.test["label"]) == 20_167
    assert data.classes == 1 and data.train["label"].dtype == np.float32
    table = pd.read_csv(folder / "ratings.csv")
    films = pd.read_csv(folder / "movies.csv").set_index("movieId")
    times = [table["timestamp"].to_numpy()[s["index"]] for s in parts(data)]
    assert (times[0].max() <= times[1].min() and times[1].max() <= times[2].min()) == (split == "time")
    for split_ in parts(data):
        rows = table.iloc[split_["index"]]
        np.testing.assert_array_equal(split_["label"], rows["rating"])
        count = films["genres"].loc[rows["movieId"]].str.replace("(no genres listed)", "").str.split("|").str.len()
        none = films["genres"].loc[rows["movieId"]].eq("(no genres listed)")
        np.testing.assert_array_equal(split_["inputs"][:, 1:20].sum(axis=1), np.where(none, 0, count))
    trained = table.iloc[data.train["index"]]
    assert data.schema.fields == (0,) * 20 + (trained["userId"].nunique() + 1, trained["movieId"].nunique() + 1)
    unseen = ~table["movieId"].iloc[data.test["index"]].isin(trained["movieId"]).to_numpy()
    np.testing.assert_array_equal(data.test["inputs"][:, -1] == 0, unseen)
    assert unseen.any()


def test_years_are_those_of_the_titles():
    films = pd.DataFrame({
        "movieId": [1, 2, 3, 4], "title": ["Heat (1995)", "Babylon 5", "Note (2006\N{EN DASH}2007)", "2001 (a film) (1968) "],
        "genres": ["Action|Crime", "(no genres listed)", "Crime", "Sci-Fi"],
    })  # fmt: skip
    features = film_features(films)
    np.testing.assert_array_equal(features["year"], np.array([1995, np.nan, 2006, 1968], np.float32))
    assert features.columns.tolist() == ["movieId", "year", "Action", "Crime", "Sci-Fi"]
    assert features[["Action", "Crime", "Sci-Fi"]].to_numpy().tolist() == [[1, 1, 0], [0, 0, 0], [0, 1, 0], [0, 0, 1]]


EVENT_TABLES = [
    pd.DataFrame(rows, columns=["visitorid", "itemid", "event"])
    for rows in ([(1, 1, 1), (1, 2, 1), (2, 1, 1)], [(1, 1, 1), (3, 1, 1)], [(1, 1, 1)])
]


def test_the_strongest_event_of_a_pair():
    pairs = strongest(EVENT_TABLES)
    assert pairs[["visitorid", "itemid", "event"]].to_numpy().tolist() == [[1, 1, 2], [1, 2, 0], [2, 1, 0], [3, 1, 1]]
    assert pairs[list(EVENTS)].to_numpy().tolist() == [[1, 1, 1], [1, 0, 0], [1, 0, 0], [0, 1, 0]]


def random_pairs(seed=0, visitors=30, items=20):
    rng = np.random.default_rng(seed)
    cells = rng.permutation(visitors * items)[:300]
    tables = [pd.DataFrame({"visitorid": c // items, "itemid": c % items, "event": 1}) for c in (cells, cells[:90], cells[:40])]
    return strongest(tables)


def test_counts_are_those_of_the_pairs_set_aside_by_a_loop():
    pairs = random_pairs()
    rows = counted(pairs, 0.4)
    assert len(rows) == 180
    kept = set(zip(rows["visitorid"], rows["itemid"]))
    past = [p for p in pairs.itertuples() if (p.visitorid, p.itemid) not in kept]
    for row in rows.itertuples():
        for event in EVENTS:
            assert getattr(row, f"visitor_{event}") == sum(getattr(p, event) for p in past if p.visitorid == row.visitorid)
            assert getattr(row, f"item_{event}") == sum(getattr(p, event) for p in past if p.itemid == row.itemid)
    share = rows["event"].value_counts(normalize=True) - pairs["event"].value_counts(normalize=True)
    assert share.abs().max() < 0.01, "set aside by class"


def test_events_of_pairs_that_are_predicted_enter_no_input():
    pairs = random_pairs()
    rows = counted(pairs, 0.5)
    predicted = set(zip(rows["visitorid"], rows["itemid"]))
    kept = np.array([pair in predicted for pair in zip(pairs["visitorid"], pairs["itemid"])])
    other = pairs.copy()
    other.loc[kept, list(EVENTS)] = 1 - other.loc[kept, list(EVENTS)]
    again = counted(other, 0.5)
    pd.testing.assert_frame_equal(rows, again)
    assert (other.loc[kept, "view"] == 0).all()


def test_retailrocket_behaviour():
    require(RETAILROCKET)
    data = retailrocket_behaviour()
    labels = np.concatenate([s["label"] for s in parts(data)])
    assert len(labels) == 39_797 and data.classes == 3
    assert np.abs(np.bincount(labels) * 2 - [70_195, 4_312, 5_088]).max() <= 2
    assert 0.75 < auc(data) < 0.88, "better than chance, and no leak"
    more = retailrocket_behaviour(history=0.9)
    assert more.train["inputs"][:, 0].mean() > data.train["inputs"][:, 0].mean()
    with pytest.raises(UsageError, match=r"history must be above 0 and below 1, got 1\.0"):
        behaviour.retailrocket_behaviour(history=1.0)
