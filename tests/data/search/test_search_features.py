"""Search features on a corpus small enough to compute by hand."""

import math
import re

import numpy as np
import pytest
from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
from sklearn.metrics.pairwise import cosine_similarity

from jdistill.data.search.features import (
    CHEAP,
    Catalogue,
    Pairs,
    bm25,
    feature_table,
    latent,
    require_features,
    stem,
    tokens,
)
from jdistill.errors import UsageError

TITLES = ["HP laptop 15", "Laptop bag for HP laptops", "Bluetooth headphones", "Red mouse", "Batteries AA 4-pack"]
DESCRIPTIONS = ["A laptop", "bag, black; fits 15 inch", "", "wireless mouse", "AA battery battery"]
BRANDS = ["HP", "Case Logic", "Sony", "Logitech", "Duracell"]
QUERIES = ["laptop", "hp laptops", "case logic laptop bag", "battery battery", "!?", "zzz"]
PRICE = np.array([1.0, 2.0, np.nan, 4.0, 5.0])
CATALOGUE = Catalogue(
    {"title": TITLES, "description": DESCRIPTIONS, "brand": BRANDS, "kind": ["Notebook", "Bag", "", "Mouse", "Battery"],
     "attributes": [""] * 5},
    {"log_price": PRICE},
)  # fmt: skip
PAIRS = Pairs(QUERIES, np.repeat(np.arange(6), 5), np.tile(np.arange(5), 6))


def columns(features="text", components=3):
    table, names = feature_table(CATALOGUE, PAIRS, features, components)
    assert table.dtype == np.float32 and table.shape == (30, len(names)) == (30, len(set(names)))
    return {name: table[:, i].reshape(6, 5) for i, name in enumerate(names)}


def words(text):
    return [stem(w) for w in re.findall(r"\w+", text.lower())]


@pytest.mark.parametrize(
    ("word", "expected"),
    [("batteries", "battery"), ("laptops", "laptop"), ("cases", "case"), ("glass", "glass"), ("bus", "bus"), ("shoes", "shoe"),
     ("zombies", "zomby"), ("aaies", "aaie"), ("s", "s"), ("as", "as"), ("mouse", "mouse")],
)  # fmt: skip
def test_stem(word, expected):
    assert stem(word) == expected


def test_tokens_are_stems_of_words():
    assert tokens("TN-2110 Toners, Größe 4") == ["tn", "2110", "toner", "größe", "4"]
    assert tokens(" ?! ") == []


@pytest.mark.parametrize(("k1", "b"), [(1.2, 0.75), (0.5, 0.0), (2.0, 1.0)])
def test_bm25_is_the_formula_in_plain_loops(k1, b):
    documents, queries = [words(t) for t in TITLES], [words(q) for q in QUERIES]
    vectoriser = CountVectorizer(analyzer=lambda w: w)
    found = bm25(vectoriser.fit_transform(documents), vectoriser.transform(queries), PAIRS, k1, b).reshape(6, 5)
    average = sum(map(len, documents)) / 5
    for q, query in enumerate(queries):
        for d, document in enumerate(documents):
            expected = 0.0
            for term in query:
                n = sum(term in other for other in documents)
                idf = math.log(1 + (5 - n + 0.5) / (n + 0.5))
                tf = document.count(term)
                expected += idf * tf * (k1 + 1) / (tf + k1 * (1 - b + b * len(document) / average))
            assert found[q, d] == pytest.approx(expected, rel=1e-12)
    assert found[3, 4] > 0 and found[5].sum() == 0


def test_fields_match_as_documented():
    got = columns("all")
    for name, texts in (("title", TITLES), ("description", DESCRIPTIONS), ("brand", BRANDS)):
        for q, query in enumerate(map(words, QUERIES)):
            for d, document in enumerate(map(words, texts)):
                hits = len(set(query) & set(document)) / max(1, len(set(query)))
                assert got[f"fraction_{name}"][q, d] == pytest.approx(hits)
                assert got[f"all_{name}"][q, d] == (hits == 1)
                starts = range(len(document) - len(query) + 1)
                assert got[f"phrase_{name}"][q, d] == any(query and document[i : i + len(query)] == query for i in starts)
                assert got[f"length_{name}"][q, d] == pytest.approx(math.log1p(len(document)))
    np.testing.assert_array_equal(got["length_query"][:, 0], [1, 2, 4, 2, 0, 1])
    np.testing.assert_array_equal(got["first_title"][0], [0.5, 1, 0, 0, 0])
    np.testing.assert_allclose(got["cover_title"][1], [2 / 3, 3 / 5, 0, 0, 0], rtol=1e-6)
    np.testing.assert_array_equal(got["named_brand"][1:3], [[1, 0, 0, 0, 0], [0, 1, 0, 0, 0]])
    np.testing.assert_array_equal(got["named_kind"][2:4], [[0, 1, 0, 0, 0], [0, 0, 0, 0, 1]])
    np.testing.assert_array_equal(got["log_price"], np.broadcast_to(PRICE, (6, 5)))
    assert not any("attributes" in name for name in got)  # a field that no product has


def test_cosines_are_those_of_scikit_learn():
    got = columns("text", components=2)
    texts = [" ".join(words(" ".join(parts))) for parts in zip(TITLES, DESCRIPTIONS, BRANDS, CATALOGUE.texts["kind"])]
    tfidf = TfidfVectorizer(token_pattern=r"\S+", sublinear_tf=True)
    weights = tfidf.fit_transform(texts)
    queries = tfidf.transform([" ".join(words(q)) for q in QUERIES])
    np.testing.assert_allclose(got["tfidf_word"], cosine_similarity(queries, weights), atol=1e-6)
    char = TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 3), sublinear_tf=True)
    products = char.fit_transform(TITLES)
    np.testing.assert_allclose(got["tfidf_char"], cosine_similarity(char.transform(QUERIES), products), atol=1e-6)
    # LSA is the projection on the leading right singular vectors, whose signs and order a cosine does not see
    right = np.linalg.svd(weights.toarray())[2][:2].T
    seen = [np.linalg.norm(vectors, axis=1) > 1e-3 for vectors in (queries @ right, weights @ right)]  # else rounding alone
    assert seen[0].sum() >= 3 and seen[1].sum() >= 3
    expected = cosine_similarity(queries @ right, weights @ right)
    np.testing.assert_allclose(got["lsa"][np.ix_(*seen)], expected[np.ix_(*seen)], atol=1e-4)
    vectors = [np.stack([got[f"lsa_{of}_{i}"] for i in range(2)], axis=-1) for of in ("query", "product")]
    np.testing.assert_allclose((vectors[0] * vectors[1]).sum(axis=-1), got["lsa"], atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(vectors[1][:, seen[1]], axis=-1), 1, atol=1e-5)


def test_cheap_features_come_first_in_every_selection():
    names = {features: list(columns(features)) for features in ("cheap", "all", "text")}
    assert tuple(names["cheap"]) == CHEAP == tuple(names["all"][:5])
    assert names["text"][: len(names["all"])] == names["all"]
    assert len(names["text"]) == len(names["all"]) + 6


def test_pairs_do_not_depend_on_the_other_pairs(monkeypatch):
    monkeypatch.setattr("jdistill.data.search.features._BLOCK", 4)
    few = feature_table(CATALOGUE, PAIRS._replace(query=PAIRS.query[7:9], product=PAIRS.product[7:9]), "text", 3)[0]
    np.testing.assert_allclose(few, feature_table(CATALOGUE, PAIRS, "text", 3)[0][7:9], atol=1e-6)


def test_lsa_has_at_most_as_many_components_as_the_texts():
    _, svd = latent([["a", "b"], ["b", "c"]], 64)
    assert svd.components_.shape == (2, 3)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"features": "al", "components": 3, "privileged": False}, "features must be one of cheap, all, text, got 'al'"),
        ({"features": "all", "components": 0, "privileged": False}, "components must be positive"),
        ({"features": "cheap", "components": 3, "privileged": True}, "privileged_features needs features beyond the cheap"),
    ],
)
def test_impossible_keys_are_refused(keys, message):
    with pytest.raises(UsageError, match=message):
        require_features(**keys)
