"""Search features of (query, product) pairs. All statistics come from the product texts of the whole catalogue, which a
shop knows when it serves; grades are never read."""

import functools
import itertools
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jdistill.errors import UsageError
from jdistill.pytrees import require_one_of, require_positive

FEATURES = ("cheap", "all", "text")
"""What the key `features` of a loader selects: the first-stage features, all matches, all with the LSA vectors."""

CHEAP = ("bm25_title", "bm25_description", "fraction_title", "length_title", "length_query")
"""What a fast first stage has: two scores and a count out of an inverted index, and two lengths."""

_BLOCK = 32768
_WORD = re.compile(r"\w+")


class Catalogue(NamedTuple):
    """Texts and numbers of products.

    Attributes:
      texts: field name -> [P] texts, "" where a product has none; `title` and `description` are always there, `brand` and
        `kind` (product type or category) have features of their own.
      numbers: name -> [P] float, NaN where unknown.
    """

    texts: dict[str, list[str]]
    numbers: dict[str, np.ndarray]


class Pairs(NamedTuple):
    """Which products are compared with which queries.

    Attributes:
      queries: [Q] texts.
      query, product: [N] int, the rows of a pair among `queries` and in the catalogue.
    """

    queries: list[str]
    query: np.ndarray
    product: np.ndarray


@functools.cache
def stem(word: str) -> str:
    """A plural's singular: -ies becomes -y and -s goes, save after u and s, as in the S-stemmer of Harman 1991, "How effective
    is suffixing?". Words of one or two letters stay as they are."""
    if len(word) < 3:
        return word
    if word.endswith("ies") and not word.endswith(("eies", "aies")):
        return word[:-3] + "y"
    return word[:-1] if word.endswith("s") and not word.endswith(("us", "ss")) else word


def tokens(text: str) -> list[str]:
    """Stems of the words (letters, digits, underscores) of a text in small letters."""
    return [stem(word) for word in _WORD.findall(text.lower())]


def require_features(features: str, *, components: int, privileged: bool) -> None:
    """Raises `UsageError` for keys of a loader that cannot be, before any file is read."""
    require_one_of(FEATURES, features=features)
    require_positive(components=components)
    if privileged and features == "cheap":
        raise UsageError("privileged_features needs features beyond the cheap ones; set features to all or text")


def feature_table(catalogue: Catalogue, pairs: Pairs, features: str, components: int) -> tuple[np.ndarray, list[str]]:
    """Features of pairs, those of `CHEAP` first.

    Of each field f: `bm25_f`; `fraction_f`, the part of the query's terms that the field has; `all_f`, 1 where it has all;
    `phrase_f`, 1 where it has the query word for word; `length_f`, log(1 + its tokens). Of the title also `first_title`,
    1 / (1 + place of the first token that is in the query), 0 for none, and `cover_title`, the part of its tokens that are in
    the query. `named_brand` and `named_kind` are 1 where the query has all tokens of the field. `tfidf_word` (stems, all
    fields), `tfidf_char` (three letters within words, title) and `lsa` (of all fields) are cosines. `length_query` counts
    tokens. The catalogue's numbers follow by their own names. `text` adds the LSA vectors of query and product, both of length
    1: `lsa_query_0` ..., `lsa_product_0` .... Terms are stems, see `tokens`. Fields that no product has are left out.

    Args:
      catalogue: P products, all of them, graded or not.
      pairs: N pairs.
      features: one of `FEATURES`.
      components: of LSA, the truncated SVD of tf-idf (Deerwester et al. 1990); fewer where the texts have a lower rank.

    Returns:
      [N, D] float32 and the D names.
    """
    fields = {name: [tokens(text) for text in texts] for name, texts in catalogue.texts.items() if any(texts)}
    asked = [tokens(query) for query in pairs.queries]
    columns = {"length_query": np.array([len(words) for words in asked])[pairs.query]}
    for name, products in fields.items():
        columns |= _field(name, products, asked, pairs)
    if features != "cheap":
        columns |= _titles(fields["title"], asked, pairs)
        columns |= {f"named_{f}": _named(fields[f], asked, pairs) for f in ("brand", "kind") if f in fields}
        columns |= {name: values[pairs.product] for name, values in catalogue.numbers.items()}
        columns["tfidf_char"] = _char_cosine(catalogue.texts["title"], pairs)
        words, queries, products_ = _latent(list(fields.values()), asked, pairs, components)
        columns |= {"tfidf_word": words, "lsa": (queries[pairs.query] * products_[pairs.product]).sum(axis=1)}
        if features == "text":
            columns |= {f"lsa_query_{i}": queries[pairs.query, i] for i in range(queries.shape[1])}
            columns |= {f"lsa_product_{i}": products_[pairs.product, i] for i in range(queries.shape[1])}
    first = [name for name in CHEAP if name in columns]
    names = first if features == "cheap" else first + [name for name in columns if name not in CHEAP]
    return np.stack([columns[name] for name in names], axis=1).astype(np.float32), names


def bm25(counts: Any, queries: Any, pairs: Pairs, k1: float = 1.2, b: float = 0.75) -> np.ndarray:
    """Okapi BM25 (Robertson et al. 1995) of pairs, with log(1 + (P - n + 0.5) / (n + 0.5)), never negative, as idf.

    Args:
      counts: [P, V] sparse, how often a product has a term; some product has one.
      queries: [Q, V] sparse, how often a query has it; a term counts as often.
      pairs: N pairs.
      k1, b: saturation of repeated terms, and correction for length.

    Returns:
      [N] float64.
    """
    weights = counts.astype(np.float64)  # may order its entries anew: from here on only `weights` is read
    length = np.asarray(weights.sum(axis=1)).ravel()
    with_term = np.bincount(weights.indices, minlength=weights.shape[1])
    idf = np.log1p((len(length) - with_term + 0.5) / (with_term + 0.5))
    penalty = np.repeat(k1 * (1 - b + b * length / length.mean()), np.diff(weights.indptr))
    weights.data *= (k1 + 1) / (weights.data + penalty) * idf[weights.indices]
    return _dot(queries, weights, pairs)


def latent(texts: Sequence[Sequence[str]], components: int) -> tuple[Any, Any]:
    """The fitted tf-idf and truncated SVD of tokenised texts (scikit-learn's); at most `components`."""
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer

    tfidf = TfidfVectorizer(analyzer=_same, sublinear_tf=True, dtype=np.float32)
    weights = tfidf.fit_transform(texts)
    return tfidf, TruncatedSVD(min(components, *weights.shape), random_state=0).fit(weights)


def _field(name: str, products: list[list[str]], asked: list[list[str]], pairs: Pairs) -> dict[str, np.ndarray]:
    from sklearn.feature_extraction.text import CountVectorizer

    vectoriser = CountVectorizer(analyzer=_same)
    counts = vectoriser.fit_transform(products)
    queries = vectoriser.transform(asked)
    terms = np.array([max(1, len(set(words))) for words in asked])[pairs.query]
    found = _dot((queries > 0).astype(np.float64), (counts > 0).astype(np.float64), pairs)
    joined, sought = [f" {' '.join(words)} " for words in products], [f" {' '.join(words)} " for words in asked]
    phrase = [bool(asked[q]) and sought[q] in joined[p] for q, p in zip(pairs.query, pairs.product, strict=True)]
    return {
        f"bm25_{name}": bm25(counts, queries, pairs),
        f"fraction_{name}": found / terms,
        f"all_{name}": found == terms,
        f"phrase_{name}": np.array(phrase),
        f"length_{name}": np.log1p([len(words) for words in products])[pairs.product],
    }


def _titles(titles: list[list[str]], asked: list[list[str]], pairs: Pairs) -> dict[str, np.ndarray]:
    sought = [set(words) for words in asked]
    hits = [[word in sought[q] for word in titles[p]] for q, p in zip(pairs.query, pairs.product, strict=True)]
    return {
        "first_title": np.array([1 / (1 + hit.index(True)) if any(hit) else 0 for hit in hits]),
        "cover_title": np.array([sum(hit) / max(1, len(hit)) for hit in hits]),
    }


def _named(products: list[list[str]], asked: list[list[str]], pairs: Pairs) -> np.ndarray:
    known, sought = [set(words) for words in products], [set(words) for words in asked]
    return np.array([bool(known[p]) and known[p] <= sought[q] for q, p in zip(pairs.query, pairs.product, strict=True)])


def _char_cosine(titles: list[str], pairs: Pairs) -> np.ndarray:
    from sklearn.feature_extraction.text import TfidfVectorizer

    tfidf = TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 3), sublinear_tf=True)
    weights = tfidf.fit_transform(titles)
    return _dot(tfidf.transform(pairs.queries), weights, pairs)


def _latent(
    fields: list[list[list[str]]], asked: list[list[str]], pairs: Pairs, components: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The tf-idf cosine of pairs, and LSA vectors [Q, C], [P, C] of length 1 (0 where LSA knows nothing of a text)."""
    texts = [list(itertools.chain(*parts)) for parts in zip(*fields, strict=True)]
    tfidf, svd = latent(texts, components)
    queries, products = tfidf.transform(asked), tfidf.transform(texts)
    return _dot(queries, products, pairs), _unit(svd.transform(queries)), _unit(svd.transform(products))


def _dot(queries: Any, products: Any, pairs: Pairs) -> np.ndarray:
    """Of each pair the inner product [N] of its sparse rows, block by block: the rows of a pair are copied."""
    blocks = np.array_split(np.arange(len(pairs.query)), len(pairs.query) // _BLOCK + 1)
    parts = (queries[pairs.query[rows]].multiply(products[pairs.product[rows]]) for rows in blocks)
    return np.concatenate([np.asarray(part.sum(axis=1)).ravel() for part in parts])


def _unit(vectors: np.ndarray) -> np.ndarray:
    """Vectors of length 1; those that rounding alone keeps from 0 become 0."""
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.where(length > 1e-6, vectors / np.maximum(length, 1e-6), 0)


def _same(words: Any) -> Any:
    return words
