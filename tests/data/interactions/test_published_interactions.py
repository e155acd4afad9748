"""The published files of interactions, found through JDISTILL_DATA; skipped where they are not."""

import hashlib
import json
import zipfile

import numpy as np
import pandas as pd
import pytest

import jdistill.data  # noqa: F401 (its options)
from jdistill.data.interactions import files
from jdistill.data.interactions.movielens import VERSIONS, _archive
from jdistill.errors import UsageError
from jdistill.registry import build
from tests.realdata import require_files


def load(name, **keys):
    return build("data", {"name": name, "download": False, **keys} if name != "retailrocket" else {"name": name, **keys})


def pairs(dataset, split):
    found = getattr(dataset, split)
    if split == "train":
        return set(map(tuple, found["inputs"].tolist()))
    return {(u, i) for u, items in zip(found["inputs"][:, 0].tolist(), found["label"].tolist()) for i in items if i >= 0}


@pytest.mark.parametrize(("split", "folder"), [("topology", "citeulike-t"), ("derrd", "citeulike-derrd")])
def test_citeulike_published_splits_are_the_files_row_by_row(split, folder):
    root = require_files(f"{folder}/train.csv", f"{folder}/valid.csv", f"{folder}/test.csv")
    dataset = load("citeulike", split=split, history=3)
    tables = {part: pd.read_csv(root / folder / f"{part}.csv").to_numpy() for part in ("train", "valid", "test")}
    np.testing.assert_array_equal(dataset.train["inputs"], tables["train"])
    assert (dataset.train["label"] == 1).all()
    for part, held in (("valid", dataset.validation), ("test", dataset.test)):
        rows = tables[part][np.argsort(tables[part][:, 0])]
        np.testing.assert_array_equal(np.stack([held["inputs"][:, 0], held["label"][:, 0]], 1), rows)
        assert held["label"].shape == (5219, 1)
    assert (dataset.schema.users, dataset.classes, len(dataset.train["inputs"])) == (5220, 25182, 115142)
    train = pd.DataFrame(tables["train"]).groupby(0)[1].apply(list)
    for request in dataset.test["inputs"][:50]:  # the split is random: only training items are known
        assert [i for i in request[1:] if i < 25182] == train[request[0]][-3:]
    assert dataset.side.edges.shape == (115142, 2) and dataset.tables["sequence"].shape == (5220, 4)


def test_citeulike_numbers_users_and_items_alike_in_every_split():
    require_files("citeulike-t/users.dat", "citeulike-t/train.csv", "citeulike-derrd/train.csv")
    unions = []
    for split in ("topology", "derrd", "leave_one_out", "ratio"):
        dataset = load("citeulike", split=split)
        parts = [pairs(dataset, part) for part in ("train", "validation", "test")]
        assert not parts[0] & parts[1] and not parts[0] & parts[2] and not parts[1] & parts[2]
        unions.append(set.union(*parts))
        if split not in ("topology", "derrd"):
            assert (dataset.schema.users, dataset.classes) == (5219, 25181)
    assert all(union == unions[0] for union in unions) and len(unions[0]) == 125580


def test_citeulike_of_unkd_has_validation_and_test_users():
    require_files("citeulike-t/users.dat")
    dataset = load("citeulike", split="ratio", test=0.1, validation_users=0.2)
    assert (len(dataset.validation["inputs"]), len(dataset.test["inputs"])) == (1043, 4176)
    counts = np.bincount(np.array(sorted(pairs(dataset, "test") | pairs(dataset, "validation")))[:, 0])
    whole = counts + np.bincount(dataset.train["inputs"][:, 0])
    np.testing.assert_array_equal(counts, np.ceil(0.1 * whole))


def test_derrd_candidates_were_never_met():
    require_files("citeulike-derrd/train.csv")
    dataset = load("citeulike", split="derrd", candidates=499)
    met = np.array(sorted(set.union(*(pairs(dataset, part) for part in ("train", "validation", "test")))))
    codes = met[:, 0] * 25182 + met[:, 1]
    candidates = dataset.test["candidates"]
    assert candidates.shape == (5219, 499) and (np.diff(np.sort(candidates, 1), axis=1) > 0).all()
    assert not np.isin(dataset.test["inputs"][:, :1].astype(np.int64) * 25182 + candidates, codes).any()


def test_citeulike_missing_and_altered_files_are_one_line(tmp_path):
    with pytest.raises(UsageError, match=r"train.csv is missing; split=topology is published as pickles at https://github"):
        load("citeulike", root=str(tmp_path))
    folder = tmp_path / "citeulike-t"
    folder.mkdir()
    (folder / "users.dat").write_text("5 1 2 3 4 5\n3 1 2\n")
    with pytest.raises(UsageError, match="truncated or altered"):
        load("citeulike", root=str(tmp_path), split="ratio")
    with pytest.raises(UsageError, match=r"users.dat line 2 does not hold as many items as it announces"):
        load("citeulike", root=str(tmp_path), split="ratio", verify=False)
    with pytest.raises(UsageError, match=r"split must be one of topology, derrd, .* did you mean 'topology'"):
        load("citeulike", split="topologie")


def test_movielens_small_against_its_files():
    root = require_files("ml-latest-small/ratings.csv", "ml-latest-small/movies.csv")
    ratings, movies = (pd.read_csv(root / "ml-latest-small" / f"{name}.csv") for name in ("ratings", "movies"))
    dataset = load("movielens", split="leave_last_out", history=5)
    assert (dataset.schema.users, dataset.classes, len(movies)) == (610, 9724, 9742)
    assert len(dataset.train["inputs"]) + 2 * 610 == len(ratings) == 100836
    names = dataset.side.item_names
    ordered = ratings.sort_values("timestamp", kind="stable").groupby("userId").movieId.apply(list)
    for request, label in zip(dataset.test["inputs"][:100], dataset.test["label"]):
        seen = ordered[dataset.side.user_names[request[0]]]
        assert names[request[1:]].tolist() == seen[-6:-1] and names[label].tolist() == seen[-1:]
    first = dataset.train["index"][:5]
    np.testing.assert_array_equal(dataset.train["label"][:5], ratings.rating[first])
    genres = sorted({g for row in movies.genres for g in row.split("|")} - {"(no genres listed)"})
    listed = movies.set_index("movieId").genres
    expected = [[g in listed[movie].split("|") for g in genres] for movie in names[:200]]
    np.testing.assert_array_equal(dataset.side.item_features[:200], np.array(expected, np.float32))
    implicit = load("movielens", threshold=4, min_interactions=5)
    assert implicit.side.item_features.shape == (implicit.classes, len(genres)) and (implicit.train["label"] == 1).all()


ML = {
    "1m": ("ratings.dat", "1::20::5::978300760\n1::10::3::978302109\n1::30::4::978301968\n",
           "movies.dat", "10::Bug's Life, A (1998)::Animation|Comedy\n20::Up\u0085 (1990)::Drama\n30::Any (1990)::Comedy\n"),
    "100k": ("u.data", "1\t20\t5\t978300760\n1\t10\t3\t978302109\n1\t30\t4\t978301968\n",
             "u.item", "".join(f"{n}|Any (1990)|01-Jan-1990||http://x|{flags}\n" for n, flags in (
                 (10, "0|0|0|1|0|1|0|0|0|0|0|0|0|0|0|0|0|0|0"), (20, "0|0|0|0|0|0|0|0|1|0|0|0|0|0|0|0|0|0|0"),
                 (30, "0|0|0|0|0|1|0|0|0|0|0|0|0|0|0|0|0|0|0")))),
}  # fmt: skip


@pytest.mark.parametrize("version", ML)
def test_movielens_other_layouts_from_a_folder_or_the_archive(tmp_path, version, monkeypatch):
    ratings, text, movies, titles = ML[version]
    folder, archive = tmp_path / f"ml-{version}", tmp_path / f"ml-{version}.zip"
    with pytest.raises(UsageError, match=rf"{ratings} is missing; put https://files.grouplens.org/.*ml-{version}.zip into"):
        load("movielens", root=str(tmp_path), version=version)
    with zipfile.ZipFile(archive, "w") as out:
        out.writestr(f"ml-{version}/{ratings}", text)
        out.writestr(f"ml-{version}/{movies}", titles.encode("latin-1"))
    with pytest.raises(UsageError, match=rf"ml-{version}.zip has md5 .*, expected"):
        load("movielens", root=str(tmp_path), version=version)
    assert not folder.exists()
    md5 = hashlib.md5(archive.read_bytes()).hexdigest()
    monkeypatch.setitem(VERSIONS, version, (_archive(version, md5, ratings, movies), 3))
    dataset = load("movielens", root=str(tmp_path), version=version, history=1)
    assert (folder / ratings).is_file() and archive.is_file()
    assert dataset.side.item_names.tolist() == [20, 10, 30] and dataset.train["label"].tolist() == [5]
    assert dataset.test["inputs"].tolist() == [[0, 2]] and dataset.test["label"].tolist() == [[1]]
    by_name = dict(zip([20, 10, 30], dataset.side.item_features.astype(int).tolist()))
    drama, bug, other = (np.flatnonzero(by_name[n]).tolist() for n in (20, 10, 30))
    assert (len(drama), len(bug), len(other)) == (1, 2, 1) and other[0] in bug and drama[0] not in bug
    monkeypatch.setitem(VERSIONS, version, (_archive(version, md5, ratings, movies), 4))
    with pytest.raises(UsageError, match="has 3 ratings, expected 4"):
        load("movielens", root=str(tmp_path), version=version)


def test_a_broken_archive_is_one_line(tmp_path):
    (tmp_path / "a.zip").write_text("no zip")
    with pytest.raises(UsageError, match=r"a.zip is not the whole archive"):
        files.fetch_zip(files.Archive("a", "https://x/a.zip", "", ("b",)), str(tmp_path), download=False)


@pytest.mark.parametrize(
    ("category", "users", "items", "actions"), [("Beauty", 22363, 12101, 198502), ("Toys_and_Games", 19412, 11924, 167597)]
)
def test_amazon_sequences(category, users, items, actions):
    root = require_files(f"amazon-5core/{category}.txt")
    dataset = load("amazon", category=category)
    assert (dataset.schema.users, dataset.classes, dataset.schema.history) == (users, items, 50)
    assert len(dataset.train["inputs"]) + 2 * users == actions
    lines = [[int(n) for n in line.split()] for line in (root / f"amazon-5core/{category}.txt").read_text().splitlines()]
    names = np.append(dataset.side.item_names, 0)
    for user in (*range(100), users - 1):
        sequence = lines[user][1:]
        for split, end in ((dataset.validation, -2), (dataset.test, -1)):
            assert names[split["inputs"][user, 1:]].tolist() == ([0] * 50 + sequence[:end])[-50:]
            assert names[split["label"][user]].tolist() == [sequence[end]]
        assert names[dataset.tables["sequence"][user]].tolist() == ([0] * 51 + sequence[:-2])[-51:]
    with pytest.raises(UsageError, match="split must be one of"):
        load("amazon", split="temporal")
    with pytest.raises(UsageError, match="did you mean 'Beauty'"):
        load("amazon", category="beauty")


def test_beauty_attributes_are_multi_hot():
    root = require_files("amazon-5core/Beauty.txt", "amazon-5core/Beauty_item2attributes.json")
    dataset = load("amazon")
    table = json.loads((root / "amazon-5core/Beauty_item2attributes.json").read_text())
    features = dataset.side.item_features
    assert features.shape == (12101, 637) and set(np.unique(features)) == {0, 1}
    for n in range(0, 12101, 500):
        assert sorted(table[str(dataset.side.item_names[n])]) == (np.flatnonzero(features[n]) + 1).tolist()


def test_retailrocket_events_and_weights():
    root = require_files(*(f"retailrocket/{name}_ecommerce.dat" for name in ("view", "add_to_cart", "purchase")))
    everything = {"split": "ratio", "validation": 0.0, "test": 0.0}
    views = load("retailrocket", events=["view"], **everything)
    assert (len(views.train["inputs"]), views.schema.users, views.classes) == (78371, 3423, 8878)
    dataset = load("retailrocket", weights=[1, 10, 100], **everything)
    assert (dataset.schema.users, dataset.classes) == (3431, 8885)
    expected = {}
    names = {"view": 1, "add_to_cart": 10, "purchase": 100}
    for name, weight in names.items():
        for line in (root / f"retailrocket/{name}_ecommerce.dat").read_text().splitlines()[1:]:
            user, item, _ = map(int, line.split("\t"))
            expected[user, item] = expected.get((user, item), 0) + weight
    user, item = dataset.side.user_names, dataset.side.item_names
    found = {(user[u], item[i]): v for (u, i), v in zip(dataset.train["inputs"], dataset.train["label"])}
    assert found == expected and sum(int(v) // 100 for v in found.values()) == 5088
    for keys, line in (
        ({"events": ["buy"]}, "events must be one of view, addtocart, transaction, got 'buy'"),
        ({"events": []}, "events must be one or more different words"),
        ({"weights": [1]}, "weights must be 3 numbers"),
        ({"split": "temporal"}, "split must be one of leave_one_out, ratio, got 'temporal'"),
    ):
        with pytest.raises(UsageError, match=line):
            load("retailrocket", **keys)
