"""MovieLens: ratings of films, in the publisher's three layouts."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from jdistill.data.files import AGAIN
from jdistill.data.interactions.files import Archive, fetch_zip
from jdistill.data.interactions.log import Interactions, implicit, numbered
from jdistill.data.interactions.protocol import Loaded, interaction_data
from jdistill.errors import UsageError
from jdistill.pytrees import require_one_of

PUBLISHER = "https://files.grouplens.org/datasets/movielens"
SMALL_SHA256 = {
    "ratings.csv": "aa289ca83157595d0df6aea1be6a4ded676ddc4385472e8313a8ed9805352646",
    "movies.csv": "5a5f32dd9bb3797b8e728a1b98958789d2b13f294a69fdfbc5727f8a9611aa07",
}
NO_GENRE = ("(no genres listed)", "unknown")
GENRES_100K = (
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama", "Fantasy",
    "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western",
)  # fmt: skip
"""The last columns of u.item, in the order of u.genre."""


def _archive(version: str, md5: str, *files: str) -> Archive:
    return Archive(f"ml-{version}", f"{PUBLISHER}/ml-{version}.zip", md5, files)


VERSIONS = {
    # version: (archive, ratings)
    "latest-small": (_archive("latest-small", "", "ratings.csv", "movies.csv"), 100_836),
    "100k": (_archive("100k", "0e33842e24a9c977be4e0107933c0723", "u.data", "u.item"), 100_000),
    "1m": (_archive("1m", "c4d9eecfca2ab87c1945afe126590906", "ratings.dat", "movies.dat"), 1_000_209),
    "20m": (_archive("20m", "cd245b17a1ae2cc31bb14903e1204af3", "ratings.csv", "movies.csv"), 20_000_263),
    "25m": (_archive("25m", "6b51fb2759a8657d3bfcbfc42b592ada", "ratings.csv", "movies.csv"), 25_000_095),
}


@interaction_data("movielens", split="leave_last_out")
def movielens(
    root: str | None = None,
    version: str = "latest-small",
    threshold: float | None = None,
    download: bool = True,
    verify: bool = True,
) -> Loaded:
    """MovieLens: ratings of films from 0.5 or 1 to 5, with times in seconds and genres as item features.

    Items are the films that have a rating (of latest-small 9,724 of the 9,742 listed), in the order of their first one.

    Args:
      root: the folder that holds ml-latest-small, ml-100k, ml-1m, ml-20m or ml-25m; None: $JDISTILL_DATA, else the cache
        folder.
      version: latest-small, 100k, 1m, 20m or 25m.
      threshold: keep ratings of at least this, each with value 1 (implicit feedback); None: all, with their values.
      download: fetch the missing archive from files.grouplens.org (not: latest-small, which its publisher changes).
      verify: compare the SHA-256 of latest-small, of the others the number of ratings, with the published.
      {keys}
    Raises:
      UsageError: a wrong value, or a file that is missing or altered.
    """
    require_one_of(VERSIONS, version=version)
    archive, ratings = VERSIONS[version]
    paths, checksums = fetch_zip(archive, root, download=download)
    if verify and version == "latest-small":
        for path in paths:
            if checksums[path.name] != SMALL_SHA256[path.name]:
                raise UsageError(f"{path} is not the file of September 2018; {AGAIN}, or set verify=false")
    table = _ratings(paths[0])
    if verify and len(table) != ratings:
        raise UsageError(f"{paths[0]} has {len(table)} ratings, expected {ratings}; {AGAIN}, or set verify=false")
    log = numbered(*(table[column].to_numpy() for column in ("user", "item", "value", "time")))
    log = dataclasses.replace(log, item_features=_genres(paths[1], log))
    return Loaded(log if threshold is None else implicit(log, threshold), checksums)


def _ratings(path: Path) -> pd.DataFrame:
    """The columns user, item, value, time of ratings.csv, ratings.dat or u.data.

    Raises:
      UsageError: a field that is no number, or missing.
    """
    layouts: dict[str, dict[str, Any]] = {
        "ratings.csv": {"header": 0, "sep": ",", "usecols": [0, 1, 2, 3]},
        "ratings.dat": {"header": None, "sep": ":", "usecols": [0, 2, 4, 6]},  # "::": every other field is empty
        "u.data": {"header": None, "sep": "\t", "usecols": [0, 1, 2, 3]},
    }
    try:
        table = pd.read_csv(path, **layouts[path.name])
        table.columns = ["user", "item", "value", "time"]
        return table.astype({"user": np.int32, "item": np.int32, "value": np.float32, "time": np.float64})
    except ValueError as error:
        raise UsageError(f"{path} is not in the layout of MovieLens ({error}); {AGAIN}") from error


def _genres(path: Path, log: Interactions) -> np.ndarray:
    """[items, genres] float32, 1 where a film is of a genre; genres by name.

    Raises:
      UsageError: a film of the log is not listed.
    """
    if path.name == "u.item":
        table = pd.read_csv(path, sep="|", header=None, encoding="latin-1")
        flags = table.iloc[:, -len(GENRES_100K) :].set_axis(list(GENRES_100K), axis=1)
        flags.index = table[0]
    else:
        csv = path.suffix == ".csv"
        lines = path.read_text("utf-8" if csv else "latin-1").split("\n")[int(csv) : -1]  # the last line ends
        # titles may hold commas; the first and the last field never do
        fields = [(int(line.partition("," if csv else "::")[0]), line.rpartition("," if csv else "::")[2]) for line in lines]
        flags = pd.Series(dict(fields)).str.get_dummies("|")
    flags = flags.drop(columns=[name for name in NO_GENRE if name in flags]).sort_index(axis=1)
    unlisted = ~np.isin(log.item_names, flags.index)
    if unlisted.any():
        raise UsageError(f"{path} lacks film {log.item_names[unlisted][0]}, which has ratings; {AGAIN}")
    return flags.loc[log.item_names].to_numpy(np.float32)
