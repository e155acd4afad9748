"""Rating prediction: how many stars a user gives a film."""

import io

import pandas as pd

from jdistill.data.base import Dataset
from jdistill.data.interactions.files import fetch_local
from jdistill.data.interactions.movielens import PUBLISHER, SMALL_SHA256
from jdistill.data.source import Source
from jdistill.data.tables.build import Splitting, build_table
from jdistill.data.tables.columns import Features
from jdistill.registry import register

MOVIELENS_RATINGS = Source(
    name="movielens_ratings",
    folders=("ml-latest-small",),
    addresses=(PUBLISHER,),
    sha256=SMALL_SHA256,
)
NO_GENRE = "(no genres listed)"


@register("data", "movielens_ratings")
def movielens_ratings(
    root: str | None = None,
    split: str = "random",
    validation: float = 0.1,
    split_seed: int = 0,
    folds: int = 5,
    fold: int = 0,
    limit: int | None = None,
    verify: bool = True,
) -> Dataset:
    """100,836 ratings (0.5 to 5 stars) of 9,724 films by 610 users, to be predicted as numbers.

    Source: MovieLens ml-latest-small (Harper and Konstan 2015). Columns: year (from the title; the mean where it has
    none), a column of 0 and 1 for each of the 19 genres, and as categories userId and movieId (0 .. n - 1, for networks
    with embeddings; 0 is a user or film that no training row has). 20 % of the ratings are the test split.

    Args:
      root: the folder that holds ml-latest-small; None: $JDISTILL_DATA, else the cache folder.
      split: random, or time: the last 20 % are the test split, the last of those before them the validation split.
      validation: fraction of the other ratings that becomes the validation split.
      split_seed: seed of that draw and of `limit`.
      folds: of a random split: the test rows are one of so many parts.
      fold: which part, from 0.
      limit: train on at most so many ratings.
      verify: compare every file's SHA-256 with the publisher's.

    Returns:
      A `Dataset` of float32 [N, 22], float32 labels, `group` the users.

    Raises:
      UsageError: a wrong value, or a file that is missing, truncated or altered.
    """
    splitting = Splitting(validation=validation, split_seed=split_seed, limit=limit, split=split, folds=folds, fold=fold)
    files, checksums = fetch_local(
        MOVIELENS_RATINGS, root, verify=verify, advice=f"unpack {PUBLISHER}/ml-latest-small.zip there"
    )
    ratings, films = (pd.read_csv(io.BytesIO(files[name].data)) for name in ("ratings.csv", "movies.csv"))
    known = film_features(films)
    frame = ratings.merge(known, on="movieId", how="left", validate="many_to_one")
    numbers = tuple(str(name) for name in known.columns if name != "movieId")
    features = Features(numbers=numbers, categories=("userId", "movieId"), encoding="index")
    return build_table(
        "movielens_ratings", frame, features, splitting, label="rating", kind="regression", checksums=checksums,
        group="userId", time="timestamp",
    )  # fmt: skip


def film_features(films: pd.DataFrame) -> pd.DataFrame:
    """`movieId`, `year` (the first year of the brackets that end the title, NaN without) and a 0/1 column per genre."""
    year = films["title"].str.extract(r"\((\d{4})(?:\D\d{0,4})?\)\s*$")[0].astype("float32")
    genres = films["genres"].str.get_dummies("|").drop(columns=NO_GENRE, errors="ignore")
    return pd.concat([films["movieId"], year.rename("year"), genres], axis=1)
