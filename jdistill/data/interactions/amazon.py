"""Amazon reviews, 5-core: what each buyer reviewed, in the order of time."""

import dataclasses
import json

import numpy as np

from jdistill.data.files import AGAIN, File
from jdistill.data.interactions.log import Interactions, numbered
from jdistill.data.interactions.protocol import Loaded, interaction_data
from jdistill.data.source import Source, fetch
from jdistill.errors import UsageError
from jdistill.pytrees import require_one_of

CATEGORIES = {
    "Beauty": {
        "Beauty.txt": "226cce9c3105299ca0db9615d7d3fb32b3175e90da43100ae352599f0f0107b8",
        "Beauty_item2attributes.json": "129e40f67486f6877eff0f5318cfa8530ee8ac23d8b0d1de04e1bb7a2ba0b2d4",
    },
    "Toys_and_Games": {"Toys_and_Games.txt": "176c680c688d497598c4a89a03b402c0fe78d795e5db335c2e78dd5f2d778a3f"},
}


@interaction_data("amazon", no_splits=("temporal",), split="leave_last_out", history=50)
def amazon(root: str | None = None, category: str = "Beauty", download: bool = True, verify: bool = True) -> Loaded:
    """Amazon reviews, 5-core, as sequences: Beauty 22,363 users, 12,101 items, 198,502 actions; Toys 19,412, 11,924, 167,597.

    As pre-processed for S3-Rec (Zhou et al., CIKM 2020). Only the order of each user's actions is known, so split=temporal,
    which compares users, cannot be had. Of Beauty the attributes are item features, 1 where an item has one.

    Args:
      root: the folder that holds amazon-5core; None: $JDISTILL_DATA, else the cache folder.
      category: Beauty or Toys_and_Games.
      download: fetch missing files from github.com/RUCAIBox/CIKM2020-S3Rec.
      verify: compare every file's SHA-256 with the known one.
      {keys}
    Raises:
      UsageError: a wrong value, or a file that is missing or altered.
    """
    require_one_of(CATEGORIES, category=category)
    source = Source(
        name="amazon",
        folders=("amazon-5core",),
        addresses=("https://raw.githubusercontent.com/RUCAIBox/CIKM2020-S3Rec/master/data",),
        sha256=CATEGORIES[category],
    )
    files, checksums = fetch(source, root, download=download, verify=verify)
    attributes = files.get(f"{category}_item2attributes.json")
    return Loaded(_sequences(files[f"{category}.txt"], attributes), checksums)


def _sequences(file: File, attributes: File | None) -> Interactions:
    """The log of a file with a line for each user: the user's id and the items' ids in the order of time."""
    try:
        lines = [np.array(line.split(), np.int64) for line in file.data.decode("ascii").splitlines()]
    except ValueError as error:
        raise UsageError(f"{file.path} is not a list of numbers ({error}); {AGAIN}") from error
    lengths = np.array([len(line) - 1 for line in lines])
    if (lengths < 1).any():
        raise UsageError(f"{file.path} line {int(np.argmax(lengths < 1)) + 1} has no item; {AGAIN}")
    user = np.repeat([line[0] for line in lines], lengths)
    log = numbered(user, np.concatenate([line[1:] for line in lines]), time=np.concatenate([np.arange(n) for n in lengths]))
    return log if attributes is None else _with_attributes(log, attributes)


def _with_attributes(log: Interactions, file: File) -> Interactions:
    """The log with item features [items, largest attribute] float32, of an object item id -> attribute ids from 1."""
    table = {int(item): ids for item, ids in json.loads(file.data).items()}
    features = np.zeros((log.items, max(max(ids, default=0) for ids in table.values())), np.float32)
    for n, item in enumerate(log.item_names):
        features[n, np.array(table.get(int(item), []), int) - 1] = 1
    return dataclasses.replace(log, item_features=features)
