"""WANDS: search of furniture and home goods."""

import io

import numpy as np

from jdistill.data.base import Dataset
from jdistill.data.files import AGAIN, File
from jdistill.data.search.features import CHEAP, Catalogue, Pairs, feature_table, require_features
from jdistill.data.search.lists import Queries, Rows
from jdistill.data.source import Source, fetch
from jdistill.errors import UsageError, did_you_mean
from jdistill.registry import register

WANDS = Source(
    name="wands",
    folders=("wands", "WANDS/dataset"),
    addresses=("https://raw.githubusercontent.com/wayfair/WANDS/main/dataset",),
    sha256={"query.csv": "", "product.csv": "", "label.csv": ""},
)

GRADES = {"Exact": 2, "Partial": 1, "Irrelevant": 0}

_TEXTS = {
    "title": "product_name",
    "description": "product_description",
    "attributes": "product_features",
    "kind": "product_class",
    "category": "category_hierarchy",
}
_NUMBERS = ("rating_count", "average_rating", "review_count")


@register("data", "wands")
def wands(
    root: str | None = None,
    validation: float = 0.1,
    split_seed: int = 0,
    limit: int | None = None,
    folds: int | None = None,
    fold: int = 0,
    list_size: int | None = None,
    features: str = "all",
    components: int = 64,
    privileged_features: bool = False,
    download: bool = True,
) -> Dataset:
    """Search relevance: 480 queries, 42,994 products, 233,448 pairs graded 2 (exact), 1 (partial) or 0 (irrelevant).

    Source: Chen et al. 2022, "WANDS: Dataset for Product Search Relevance Assessment" (ECIR), github.com/wayfair/WANDS. Its
    publisher gives no checksums: files are checked by their layout. Lists take queries x longest list x columns x 4 bytes of
    memory; `list_size` bounds those of training.

    Args:
      root: the folder that holds wands; None: $JDISTILL_DATA, else the cache folder.
      validation: fraction of the queries outside the test split that becomes the validation split.
      split_seed: seed of that draw, of `limit` and of what `list_size` keeps.
      limit: train on at most so many queries.
      folds: parts that the queries are dealt into, the same for every `split_seed`; none: 20 % are the test split.
      fold: the part that is the test split.
      list_size: training lists keep at most so many products, drawn at random; none: all.
      features: cheap (what a first stage has), all, or text (all and the LSA vectors of query and product).
      components: of LSA.
      privileged_features: whether only a teacher may read the features beyond the cheap ones.
      download: fetch missing files.

    Returns:
      A `Dataset` of lists; see `features.feature_table` for the columns.

    Raises:
      UsageError: a wrong value, or a file that is missing or of another layout.
    """
    select = Queries(validation=validation, split_seed=split_seed, limit=limit, list_size=list_size, folds=folds, fold=fold)
    require_features(features, components=components, privileged=privileged_features)
    files, checksums = fetch(WANDS, root, download=download, verify=False)
    queries = _table(files["query.csv"], ("query_id", "query"))
    products = _table(files["product.csv"], ("product_id", *_TEXTS.values(), *_NUMBERS))
    labels = _table(files["label.csv"], ("query_id", "product_id", "label"))
    grade = _codes(files["label.csv"], labels["label"], GRADES, "label")
    query = _codes(files["label.csv"], labels["query_id"], {name: i for i, name in enumerate(queries["query_id"])}, "query")
    product = _codes(
        files["label.csv"], labels["product_id"], {name: i for i, name in enumerate(products["product_id"])}, "product"
    )
    graded, number = np.unique(query, return_inverse=True)  # a query without a label has no list
    pairs = Pairs([queries["query"][i] for i in graded], number, product)
    texts = {field: products[column] for field, column in _TEXTS.items()}
    table, names = feature_table(Catalogue(texts, _numbers(files["product.csv"], products)), pairs, features, components)
    privileged = tuple(range(len(CHEAP), len(names))) if privileged_features else ()
    return select("wands", Rows(number, table, grade), checksums, privileged=privileged)


def _table(file: File, needed: tuple[str, ...]) -> dict[str, list[str]]:
    """The needed columns of a tab separated file, all as text; a space in a column's name reads as an underscore."""
    import pandas as pd

    try:
        table = pd.read_csv(io.BytesIO(file.data), sep="\t", dtype=str, keep_default_na=False)
    except ValueError as error:  # pandas' parser errors are ValueErrors
        raise UsageError(f"{file.path} is no tab separated table ({error}); {AGAIN}") from error
    table.columns = table.columns.str.replace(" ", "_")
    for column in needed:
        if column not in table.columns:
            raise UsageError(f"{file.path} has no column {column}{did_you_mean(column, table.columns)}; {AGAIN}")
    if table.empty:
        raise UsageError(f"{file.path} has no row; {AGAIN}")
    return {column: table[column].tolist() for column in needed}


def _codes(file: File, values: list[str], numbers: dict[str, int], what: str) -> np.ndarray:
    """The number of each value."""
    for row, value in enumerate(values):
        if value not in numbers:
            known = f"expected one of {', '.join(numbers)}" if numbers is GRADES else f"{what}.csv has none of this {what}_id"
            raise UsageError(f"{file.path} has {what} '{value}' in row {row + 1}; {known}; {AGAIN}")
    return np.array([numbers[value] for value in values])


def _numbers(file: File, products: dict[str, list[str]]) -> dict[str, np.ndarray]:
    """Log(1 + n) of the counts, and the mean rating; NaN where a product has none."""
    try:
        numbers = {name: np.array([float(v or "nan") for v in products[name]]) for name in _NUMBERS}
    except ValueError as error:
        raise UsageError(f"{file.path}: {', '.join(_NUMBERS)} must be numbers ({error}); {AGAIN}") from error
    return {name: values if name == "average_rating" else np.log1p(values) for name, values in numbers.items()}
