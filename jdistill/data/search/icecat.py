"""Icecat: electronics with text, attributes, brand and price, and graded search results."""

import csv
import io
import itertools
import json
import zipfile
from collections.abc import Iterable
from typing import Any

import numpy as np

from jdistill.data.base import Dataset, Schema
from jdistill.data.files import AGAIN, File
from jdistill.data.search.features import CHEAP, Catalogue, Pairs, feature_table, latent, require_features, tokens
from jdistill.data.search.lists import Queries, Rows
from jdistill.data.source import Source, fetch
from jdistill.errors import UsageError
from jdistill.pytrees import require_positive
from jdistill.registry import register

ICECAT = Source(
    name="icecat",
    folders=("icecat",),
    addresses=(
        "https://github.com/querqy/chorus/raw/main/data-encoder/ecommerce/vectors/data",
        "https://github.com/querqy/chorus/raw/main/katas",
    ),
    sha256={
        "1.json.zip": "15b622a11a6267aa0c450919a84b0fc41d7748db552f4c9c0e04167bbc7c38cb",
        "2.json.zip": "17d95160289440d03ca50af65c1363d9edd1d5e82678ddb874b27aeac1f87c33",
        "3.json.zip": "d4d088908fa648da7e79682872a77771ba42f065b253c4fb0f333e630d94f45a",
        "4.json.zip": "533329e5173eac349ce61512fc86a352d5f6651e31694e03aa6e8428cbeaf3c0",
        "Broad_Query_Set_rated.csv": "065b79c6c19b9ea8fa2dc2b0b8dae3f40c6389454a1f26aac3d3f8a7d43731b2",
    },
)

_RATINGS = "Broad_Query_Set_rated.csv"
_RARE = 10
"""A brand with fewer training products shares the category of all rare and unknown brands."""


@register("data", "icecat")
def icecat(
    root: str | None = None,
    validation: float = 0.1,
    split_seed: int = 0,
    limit: int | None = None,
    folds: int | None = 5,
    fold: int = 0,
    list_size: int | None = None,
    features: str = "all",
    components: int = 64,
    privileged_features: bool = False,
    download: bool = True,
    verify: bool = True,
) -> Dataset:
    """Search relevance: 135 queries, 3,668 products graded 0 to 3 for them, features from a catalogue of 19,406.

    Source: Open Icecat products with the ratings of the Chorus project (querqy). Every graded product is in the catalogue (a
    file of ratings that names another is refused). 36 queries have equal grades throughout, 4 of them one product: they are
    kept and teach nothing; 19 have no relevant product.

    Args:
      root: the folder that holds icecat; None: $JDISTILL_DATA, else the cache folder.
      validation: fraction of the queries outside the test split that becomes the validation split.
      split_seed: seed of that draw, of `limit` and of what `list_size` keeps.
      limit: train on at most so many queries.
      folds: parts that the queries are dealt into, the same for every `split_seed`; none: 20 % are the test split.
      fold: the part that is the test split.
      list_size: training lists keep at most so many products, drawn at random; none: all (the longest has 60).
      features: cheap (what a first stage has), all, or text (all and the LSA vectors of query and product).
      components: of LSA.
      privileged_features: whether only a teacher may read the features beyond the cheap ones.
      download: fetch missing files.
      verify: compare every file's SHA-256 with the publisher's; false: layout only.

    Returns:
      A `Dataset` of lists, `inputs` [Q, 60, D + 1] float32; see `features.feature_table` for the columns.

    Raises:
      UsageError: a wrong value, or a file that is missing, truncated or altered.
    """
    queries = Queries(validation=validation, split_seed=split_seed, limit=limit, list_size=list_size, folds=folds, fold=fold)
    require_features(features, components=components, privileged=privileged_features)
    files, checksums = fetch(ICECAT, root, download=download, verify=verify)
    products = _products(files)
    pairs, grade = _ratings(files[_RATINGS], {product["id"]: i for i, product in enumerate(products)})
    table, names = feature_table(_catalogue(products), pairs, features, components)
    rows = Rows(pairs.query, table, grade)
    privileged = tuple(range(len(CHEAP), len(names))) if privileged_features else ()
    return queries("icecat", rows, checksums, privileged=privileged)


@register("data", "icecat_price")
def icecat_price(
    root: str | None = None,
    validation: float = 0.1,
    split_seed: int = 0,
    limit: int | None = None,
    components: int = 64,
    download: bool = True,
    verify: bool = True,
) -> Dataset:
    """Price regression: 19,406 products, the label is the natural logarithm of the price (in the file's unit, cents).

    Columns: the brand (category 0: fewer than 10 training products, or none), the numbers of tokens of title and
    description (log(1 + n)), the numbers of text, yes/no and numeric attributes (log(1 + n)), the year of release, and the
    LSA vector of title, description and attributes (fewer columns where there are fewer training products). Brands, tf-idf,
    LSA, mean and std are fitted on training products. The test split is a random 20 %, the same for every `split_seed`.

    Args:
      root: the folder that holds icecat; None: $JDISTILL_DATA, else the cache folder.
      validation: fraction of the other products that becomes the validation split, at random.
      split_seed: seed of that draw and of `limit`.
      limit: train on at most so many products.
      components: of LSA.
      download: fetch missing files.
      verify: compare every file's SHA-256 with the publisher's; false: layout only.

    Returns:
      A `Dataset` of `inputs` [N, 7 + components] and `label` [N], both float32, with one "class".

    Raises:
      UsageError: a wrong value, or a file that is missing, truncated or altered.
    """
    from jdistill.data.tables.build import Splitting  # brings pandas, half a second that others need not wait
    from jdistill.data.tables.transforms import moments

    splitting = Splitting(validation=validation, split_seed=split_seed, limit=limit)
    require_positive(components=components)
    files, checksums = fetch(ICECAT, root, download=download, verify=verify)
    products = _products(files)
    splits = splitting(np.zeros(len(products), np.int64))
    inputs, brands = _price_table(products, splits[0], components)
    label = np.log(_prices(products)).astype(np.float32)
    train, held, test = ({"inputs": inputs[rows], "label": label[rows], "index": rows.astype(np.int32)} for rows in splits)
    mean, std = moments(train["inputs"][:, 1:])
    schema = Schema(fields=(brands, *[0] * len(mean)))
    return Dataset("icecat_price", train, held, test, 1, (0.0, *mean), (1.0, *std), 1.0, None, checksums, schema=schema)


def _products(files: dict[str, File]) -> list[dict[str, Any]]:
    products: list[dict[str, Any]] = []
    for name, file in files.items():
        if name == _RATINGS:
            continue
        try:
            with zipfile.ZipFile(io.BytesIO(file.data)) as archive:
                products += json.loads(archive.read(name.removesuffix(".zip")))
        except (zipfile.BadZipFile, KeyError, ValueError) as error:
            raise UsageError(f"{file.path} is no zip of {name.removesuffix('.zip')} ({error}); {AGAIN}") from error
    return products


def _ratings(file: File, rows: dict[str, int]) -> tuple[Pairs, np.ndarray]:
    """Pairs of the file, and their grades; a query's number is that of its first line."""
    lines = list(csv.DictReader(io.StringIO(file.data.decode())))
    if not lines or set(lines[0]) != {"query", "docid", "rating"}:
        raise UsageError(f"{file.path} must have the columns query, docid, rating and a line for each pair; {AGAIN}")
    if unknown := [line["docid"] for line in lines if line["docid"] not in rows]:
        raise UsageError(f"{file.path} grades product {unknown[0]}, which no .json.zip beside it has; {AGAIN}")
    number: dict[str, int] = {}
    query = np.array([number.setdefault(line["query"], len(number)) for line in lines])
    pairs = Pairs(list(number), query, np.array([rows[line["docid"]] for line in lines]))
    return pairs, np.array([int(line["rating"]) for line in lines])


def _catalogue(products: list[dict[str, Any]]) -> Catalogue:
    texts = {
        "title": [product["title"] for product in products],
        "description": [product.get("short_description", "") for product in products],
        "attributes": [_attributes(product) for product in products],
        "brand": [product["supplier"] for product in products],
        "kind": [product.get("attr_t_product_type") or product.get("attr_t_type", "") for product in products],
    }
    return Catalogue(texts, {"log_price": np.log(_prices(products))})


def _prices(products: list[dict[str, Any]]) -> np.ndarray:
    return np.array([product["price"] for product in products], np.float64)


def _attributes(product: dict[str, Any]) -> str:
    """The values of text attributes, and the names of yes/no attributes that are true."""
    parts = (_attribute(key, value) for key, value in product.items())
    return " ".join(part for part in parts if part)


def _attribute(key: str, value: Any) -> str:
    if key.startswith("attr_t_"):
        return value
    return key.removeprefix("attr_b_").replace("_", " ") if key.startswith("attr_b_") and value else ""


def _price_table(products: list[dict[str, Any]], train: np.ndarray, components: int) -> tuple[np.ndarray, int]:
    """Columns [N, 7 + components] float32 and the number of brand categories."""
    catalogue = _catalogue(products)
    brand = np.array(catalogue.texts["brand"])
    known, count = np.unique(brand[train], return_counts=True)
    number = {name: i + 1 for i, name in enumerate(known[count >= _RARE])}
    fields = [[tokens(text) for text in catalogue.texts[field]] for field in ("title", "description", "attributes")]
    whole = [list(itertools.chain(*parts)) for parts in zip(*fields, strict=True)]
    tfidf, svd = latent([whole[row] for row in train], components)
    columns = [
        np.array([number.get(name, 0) for name in brand]),
        *(np.log1p([len(words) for words in field]) for field in fields[:2]),
        *(np.log1p(_starting(products, f"attr_{kind}_")) for kind in "tbn"),
        np.array([int(product["date_released"][:4]) for product in products]),
    ]
    return np.column_stack([*columns, svd.transform(tfidf.transform(whole))]).astype(np.float32), len(number) + 1


def _starting(products: Iterable[dict[str, Any]], prefix: str) -> list[int]:
    """Of each product the number of keys that begin with `prefix`."""
    return [sum(key.startswith(prefix) for key in product) for product in products]
