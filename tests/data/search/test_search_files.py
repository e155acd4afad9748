"""Loaders of published search data: the publisher's files where they are, and small ones in their formats."""

import functools
import zipfile

import numpy as np
import pytest

from jdistill.data import icecat, icecat_price, lambdarank, wands
from jdistill.data.search.features import CHEAP
from jdistill.data.search.icecat import ICECAT
from jdistill.errors import UsageError
from tests import realdata


@functools.cache
def whole(loader, **keys):
    name = loader.__name__.removesuffix("_price")
    realdata.require(name)
    return loader(download=False, **keys)


def splits(dataset):
    return dataset.train, dataset.validation, dataset.test


def documents(dataset):
    return sum(int((split["grades"] >= 0).sum()) for split in splits(dataset))


def test_icecat_has_the_published_counts():
    realdata.require("icecat")
    dataset = whole(icecat, features="text", privileged_features=True)
    assert [len(split["label"]) for split in splits(dataset)] == [97, 11, 27]
    assert documents(dataset) == 3668 and dataset.classes == 60
    grades = np.concatenate([split["grades"][split["grades"] >= 0] for split in splits(dataset)])
    assert np.bincount(grades).tolist() == [1853, 238, 105, 1472]
    width = dataset.test["inputs"].shape[2]
    assert dataset.privileged == tuple(range(5, width - 1)) and len(dataset.mean) == len(dataset.std) == width
    assert all(np.isfinite(split["inputs"]).all() for split in splits(dataset))
    equal = sum(np.ptp(g[g >= 0]) == 0 for split in splits(dataset) for g in split["grades"])
    single = sum((g >= 0).sum() == 1 for split in splits(dataset) for g in split["grades"])
    assert equal == 36 and single == 4
    assert dataset.checksums == ICECAT.sha256


def test_icecat_first_query_is_laptop():
    """Of the first query's 50 products 9 have grade 3; the first of them is product 42 of the list."""
    dataset = whole(icecat, features="text", privileged_features=True)
    split = next(split for split in splits(dataset) if 0 in split["index"])
    grades = split["grades"][split["index"].tolist().index(0)]
    assert (grades >= 0).sum() == 50 and (grades == 3).sum() == 9 and grades.argmax() == 41


def ndcg(scores, grades, k=10):
    """Mean over lists with a relevant document, gains 2^g - 1, in plain loops."""
    values = []
    for own, marks in zip(scores, grades):
        known = marks >= 0
        gains = 2.0 ** marks[known] - 1
        if gains.any():
            discounts = 1 / np.log2(np.arange(2, min(k, len(gains)) + 2))
            ranked, ideal = gains[np.argsort(-own[known], kind="stable")][:k], np.sort(gains)[::-1][:k]
            values.append((ranked * discounts).sum() / (ideal * discounts).sum())
    return float(np.mean(values))


def test_icecat_title_scores_rank_better_than_chance():
    dataset = whole(icecat, features="text", privileged_features=True)
    grades = np.concatenate([split["grades"] for split in splits(dataset)])
    inputs = np.concatenate([split["inputs"] for split in splits(dataset)])
    chance = np.mean([ndcg(np.random.default_rng(s).random(grades.shape), grades) for s in range(5)])
    assert ndcg(inputs[..., CHEAP.index("bm25_title")], grades) > chance + 0.15


def test_icecat_without_verification_is_the_same_and_unknown_products_are_refused(tmp_path):
    root = realdata.require("icecat")
    folder = tmp_path / "icecat"
    folder.mkdir()
    for name in ICECAT.sha256:
        (folder / name).write_bytes((root / "icecat" / name).read_bytes())
    ratings = folder / "Broad_Query_Set_rated.csv"
    ratings.write_text(ratings.read_text().replace("laptop,1229111,0", "laptop,9,0", 1))
    with pytest.raises(UsageError, match=r"Broad_Query_Set_rated\.csv is truncated or altered"):
        icecat(root=str(tmp_path), features="cheap", download=False)
    with pytest.raises(UsageError, match=r"Broad_Query_Set_rated\.csv grades product 9, which no \.json\.zip beside it has"):
        icecat(root=str(tmp_path), features="cheap", download=False, verify=False)
    with zipfile.ZipFile(folder / "1.json.zip", "w") as archive:
        archive.writestr("other.json", "[]")
    with pytest.raises(UsageError, match=r"1\.json\.zip is no zip of 1\.json"):
        icecat(root=str(tmp_path), features="cheap", download=False, verify=False)


def test_icecat_price_is_a_table():
    dataset = whole(icecat_price, components=8)
    assert [len(split["label"]) for split in splits(dataset)] == [13973, 1552, 3881]
    index = np.concatenate([split["index"] for split in splits(dataset)])
    assert sorted(index) == list(range(19406)) and dataset.classes == 1
    brands = dataset.train["inputs"][:, 0]
    assert dataset.schema.fields == (int(brands.max()) + 1, *[0] * 14) and brands.min() == 0
    assert np.bincount(brands.astype(int))[1:].min() >= 10
    assert dataset.train["label"].dtype == np.float32 and dataset.train["inputs"].dtype == np.float32
    assert np.exp(min(split["label"].min() for split in splits(dataset))) == pytest.approx(95, rel=1e-5)
    out = np.asarray(dataset.preprocess(dataset.train["inputs"]))
    np.testing.assert_array_equal(out[:, 0], brands)
    np.testing.assert_allclose(out[:, 1:].mean(axis=0), 0, atol=1e-3)
    # rows and labels belong together: least squares without the brand leaves 0.725 of the test variance, shuffled rows all
    design = [np.column_stack([s["inputs"][:, 1:], np.ones(len(s["label"]))]) for s in (dataset.train, dataset.test)]
    weights = np.linalg.lstsq(design[0], dataset.train["label"], rcond=None)[0]
    assert np.mean((design[1] @ weights - dataset.test["label"]) ** 2) < 0.8 * dataset.test["label"].var()


def libsvm(path):
    """(grade, {number: value}) of each line, in plain loops."""
    for line in path.read_text().splitlines():
        grade, *entries = line.split()
        yield int(grade), {int(n): float(v) for n, v in (entry.split(":") for entry in entries)}


def test_lambdarank_holds_every_line_of_the_files():
    root = realdata.require("lambdarank")
    dataset = whole(lambdarank)
    assert [len(split["label"]) for split in splits(dataset)] == [181, 20, 50]
    assert documents(dataset) == 3005 + 768 and dataset.classes == 27
    assert sorted([*dataset.train["index"], *dataset.validation["index"]]) == list(range(201))
    for name, parts in (("rank.train", (dataset.train, dataset.validation)), ("rank.test", (dataset.test,))):
        lines = libsvm(root / "lambdarank" / name)
        sizes = [int(size) for size in (root / "lambdarank" / f"{name}.query").read_text().split()]
        lists = {q: (i, g) for part in parts for q, i, g in zip(part["index"], part["inputs"], part["grades"])}
        for q, size in enumerate(sizes):
            inputs, grades = lists[q]
            assert (grades >= 0).sum() == size == inputs[:, -1].sum()
            for k in range(size):
                grade, entries = next(lines)
                row = np.zeros(300, np.float32)
                row[np.array(list(entries)) - 1] = list(entries.values())
                np.testing.assert_array_equal(inputs[k, :-1], row)
                assert grades[k] == grade
        assert next(lines, None) is None


def test_missing_files_are_named(tmp_path):
    for loader, first in ((icecat, "1.json.zip"), (lambdarank, "rank.train"), (wands, "query.csv")):
        with pytest.raises(UsageError, match=f"{first} is missing; put https://.*{first} into .*{loader.__name__}"):
            loader(root=str(tmp_path), download=False)


WANDS_FILES = {
    "query.csv": [("query_id", "query", "query_class"), (0, "salon chair", "Chairs"), (1, "coffee table", "Tables"),
                  (2, "never rated", ""), (7, "beds", "Beds"), (8, "null", "")],
    "product.csv": [
        ("product_id", "product_name", "product_class", "category hierarchy", "product_description", "product_features",
         "rating_count", "average_rating", "review_count"),
        (0, "solid wood bed", "Beds", "Furniture / Beds", "good sleep", "width:64.7|color : oak", "15.0", "4.5", "15.0"),
        (5, "styling salon chair", "Chairs", "Furniture / Chairs", "", "material : leather", "", "", ""),
        (6, "round coffee table", "Tables", "Furniture / Tables", "a table", "", "3.0", "2.0", "2.0"),
    ],
    "label.csv": [("id", "query_id", "product_id", "label"), (0, 0, 5, "Exact"), (1, 0, 0, "Irrelevant"), (2, 1, 6, "Exact"),
                  (3, 1, 5, "Partial"), (4, 7, 0, "Exact"), (5, 8, 6, "Irrelevant"), (6, 0, 6, "Partial")],
}  # fmt: skip


def write(folder, **changed):
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in {**WANDS_FILES, **changed}.items():
        (folder / name).write_text("".join("\t".join(map(str, row)) + "\n" for row in rows))
    return {"root": str(folder.parent), "download": False, "validation": 0.3}


def test_wands_reads_its_format(tmp_path):
    dataset = wands(**write(tmp_path / "wands"), features="text", components=2, privileged_features=True)
    assert documents(dataset) == 7 and dataset.classes == 3 and set(dataset.checksums) == set(WANDS_FILES)
    lists = {q: g[g >= 0].tolist() for s in splits(dataset) for q, g in zip(s["index"], s["grades"])}
    assert lists == {0: [2, 0, 1], 1: [2, 1], 2: [2], 3: [0]}  # query 2 of the file has no label, and no list
    chairs = next(s["inputs"][s["index"].tolist().index(0)] for s in splits(dataset) if 0 in s["index"])
    bm25_title = chairs[:, CHEAP.index("bm25_title")]
    assert bm25_title[0] > 0 and bm25_title[1:].tolist() == [0, 0]
    assert all(np.isfinite(split["inputs"]).all() for split in splits(dataset))  # ratings that are not known are filled
    assert dataset.privileged == tuple(range(5, dataset.test["inputs"].shape[2] - 1))


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        ("label.csv", [("id", "query_id", "product_id", "lable"), (0, 0, 5, "Exact")], "csv has no column label; did you"),
        ("label.csv", [*WANDS_FILES["label.csv"], (7, 0, 5, "Great")], "label 'Great' in row 8; expected one of Exact"),
        ("label.csv", [*WANDS_FILES["label.csv"], (7, 99, 5, "Exact")], "query '99' in row 8; query.csv has none"),
        ("label.csv", [*WANDS_FILES["label.csv"], (7, 0, 99, "Exact")], "product '99' in row 8; product.csv has none"),
        ("label.csv", WANDS_FILES["label.csv"][:1], "label.csv has no row"),
        ("query.csv", [], "query.csv is no tab separated table"),
        ("product.csv", [*WANDS_FILES["product.csv"], (7, *"abcde", "many", "1", "1")], "rating_count, .* must be numbers"),
    ],
)  # fmt: skip
def test_wands_refuses_another_layout(tmp_path, name, rows, message):
    with pytest.raises(UsageError, match=message):
        wands(**write(tmp_path / "wands", **{name: rows}))
