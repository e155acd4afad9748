"""Behaviour prediction: how far a visitor of a shop goes with an item."""

import io

import numpy as np
import pandas as pd

from jdistill.data.base import Dataset
from jdistill.data.interactions.files import fetch_local
from jdistill.data.interactions.retailrocket import EVENTS as PUBLISHED
from jdistill.data.source import Source
from jdistill.data.splits import stratified_order
from jdistill.data.tables.build import Splitting, build_table
from jdistill.data.tables.columns import Features
from jdistill.errors import UsageError
from jdistill.registry import register

EVENTS = ("view", "addtocart", "transaction")
"""The classes, 0 to 2, from the weakest to the strongest."""
RETAILROCKET = Source(
    name="retailrocket_behaviour",
    folders=("retailrocket",),
    addresses=("https://github.com/caserec/Datasets-for-Recommender-Systems",),
    sha256=dict(PUBLISHED[event] for event in EVENTS),
)
HISTORY_SEED = 1
"""Of the draw of the pairs that are only counted; the same for every `split_seed`."""


@register("data", "retailrocket_behaviour")
def retailrocket_behaviour(
    root: str | None = None,
    history: float = 0.5,
    validation: float = 0.1,
    split_seed: int = 0,
    folds: int = 5,
    fold: int = 0,
    limit: int | None = None,
    verify: bool = True,
) -> Dataset:
    """The strongest event of a (visitor, item) pair: view (0), addtocart (1) or transaction (2), out of 6 counts.

    Source: Retailrocket e-commerce events as pre-processed by Fortes; 79,595 pairs of 3,431 visitors and 8,885 items:
    70,195 views, 4,312 carts, 5,088 purchases. The events have no times.

    No label leaks into the inputs: a share `history` of the pairs, drawn by class, is set aside and only counted. The
    inputs of every other pair are the numbers of views, carts and purchases its visitor and its item have in these set
    aside pairs, as log(1 + count). So neither a pair's own events nor those of any pair that is trained, validated or
    tested on enter any input, and inputs mean the same in all splits. (To count all training pairs but a row's own would
    tell its label: where the count of the others is lower by one.) The test split is 20 % of the pairs not set aside.

    Args:
      root: the folder that holds retailrocket; None: $JDISTILL_DATA, else the cache folder.
      history: fraction of the pairs that is only counted, above 0 and below 1.
      validation: fraction of the pairs left that becomes the validation split, stratified.
      split_seed: seed of that draw and of `limit`.
      folds: the test rows are one of so many parts.
      fold: which part, from 0.
      limit: train on at most so many pairs, stratified.
      verify: compare every file's SHA-256 with the publisher's.

    Returns:
      A `Dataset` of float32 [N, 6]: views, carts and purchases of the visitor, then of the item; labels 0 to 2; `index`
      counts the pairs not set aside, by visitor and item; `group` the visitors.

    Raises:
      UsageError: a wrong value, or a file that is missing, truncated or altered.
    """
    if not 0 < history < 1:
        raise UsageError(f"history must be above 0 and below 1, got {history!r}")
    splitting = Splitting(validation=validation, split_seed=split_seed, limit=limit, folds=folds, fold=fold)
    advice = f"unpack Processed Datasets/RetailrocketEcommerce/Retailrocket_Ecommerce.zip of {RETAILROCKET.addresses[0]} there"
    files, checksums = fetch_local(RETAILROCKET, root, verify=verify, advice=advice)
    tables = [pd.read_csv(io.BytesIO(files[PUBLISHED[event][0]].data), sep="\t") for event in EVENTS]
    frame = counted(strongest(tables), history)
    numbers = tuple(column for column in frame.columns if column.endswith(EVENTS))
    return build_table(
        "retailrocket_behaviour", frame, Features(numbers=numbers, log1p=numbers), splitting, label="event", kind="classes",
        checksums=checksums, group="visitorid",
    )  # fmt: skip


def strongest(events: list[pd.DataFrame]) -> pd.DataFrame:
    """One row per (visitorid, itemid), sorted: `event`, the last of the tables that has it, and a 0/1 column for each."""
    flags = pd.concat([table.assign(**{name: 1}) for name, table in zip(EVENTS, events, strict=True)])
    pairs = flags.groupby(["visitorid", "itemid"])[list(EVENTS)].max().fillna(0).astype(np.int32).reset_index()
    return pairs.assign(event=(pairs[list(EVENTS)].to_numpy() * [1, 2, 3]).max(axis=1) - 1)


def counted(pairs: pd.DataFrame, history: float) -> pd.DataFrame:
    """The pairs not set aside, with what their visitor and item have among those set aside.

    Args:
      pairs: see `strongest`.
      history: the fraction set aside.

    Returns:
      `visitorid`, `itemid`, `event`, and of each event the columns `visitor_<event>` and `item_<event>`: counts.
    """
    order = stratified_order(pairs["event"].to_numpy(), HISTORY_SEED)
    cut = round(history * len(order))
    past, rows = pairs.iloc[order[:cut]], pairs.iloc[np.sort(order[cut:])].reset_index(drop=True)
    sides = [
        past.groupby(f"{side}id")[list(EVENTS)].sum().reindex(rows[f"{side}id"], fill_value=0).add_prefix(f"{side}_")
        for side in ("visitor", "item")
    ]
    return pd.concat([rows[["visitorid", "itemid", "event"]], *(side.reset_index(drop=True) for side in sides)], axis=1)
