"""RetailRocket: what visitors of a shop viewed, put into the cart and bought."""

import io

import numpy as np
import pandas as pd

from jdistill.data.files import AGAIN, File
from jdistill.data.interactions.files import fetch_local
from jdistill.data.interactions.log import numbered, without_duplicates
from jdistill.data.interactions.protocol import Loaded, interaction_data
from jdistill.data.source import Source
from jdistill.errors import UsageError
from jdistill.pytrees import require_nonnegative, require_one_of

EVENTS = {
    # event: (file, SHA-256)
    "view": ("view_ecommerce.dat", "3712d3a92bea4db6a5ac6c2ba0850cf2b0b77e51c14399736c2c263c8c21423e"),
    "addtocart": ("add_to_cart_ecommerce.dat", "4443a0e9a6db580b96d1594fb20607235b6040a62a19ed2e5d889aea8558a3b7"),
    "transaction": ("purchase_ecommerce.dat", "9ee6a462005273aeb7dd26615b09e02b55a2eccced451c5eadcd41ca2cae70b6"),
}
COLUMNS = ["visitorid", "itemid", "event"]


@interaction_data("retailrocket", no_splits=("leave_last_out", "ratio_last", "temporal"))
def retailrocket(
    root: str | None = None,
    events: tuple[str, ...] = ("view", "addtocart", "transaction"),
    weights: tuple[float, ...] = (1.0, 1.0, 1.0),
    verify: bool = True,
) -> Loaded:
    """RetailRocket: 78,371 views, 9,028 carts and 5,088 purchases of 3,431 visitors and 8,885 products, without times.

    As cleaned by Arthur Fortes (visitors of at least 10 events); each file names a visitor and product once. The value of
    a visitor and product is the sum of the weights of their events.

    Args:
      root: the folder that holds retailrocket; None: $JDISTILL_DATA, else the cache folder.
      events: any of view, addtocart, transaction.
      weights: what a view, a cart and a purchase count, in this order.
      verify: compare every file's SHA-256 with the known one.
      {keys}
    Raises:
      UsageError: a wrong value, or a file that is missing or altered.
    """
    if not events or len(set(events)) < len(events):
        raise UsageError(f"events must be one or more different words of {', '.join(EVENTS)}, got {list(events)}")
    for event in events:
        require_one_of(EVENTS, events=event)
    if len(weights) != len(EVENTS):
        raise UsageError(f"weights must be {len(EVENTS)} numbers, of {', '.join(EVENTS)}, got {list(weights)}")
    for weight in weights:
        require_nonnegative(weights=weight)
    source = Source(
        name="retailrocket",
        folders=("retailrocket",),
        addresses=("https://github.com/caserec/Datasets-for-Recommender-Systems",),
        sha256=dict(EVENTS[event] for event in events),
    )
    advice = f"unpack Processed Datasets/RetailrocketEcommerce/Retailrocket_Ecommerce.zip of {source.addresses[0]} there"
    files, checksums = fetch_local(source, root, verify=verify, advice=advice)
    tables = [_read(files[EVENTS[event][0]]) for event in events]
    value = np.repeat([weights[list(EVENTS).index(event)] for event in events], [len(table) for table in tables])
    user, item = np.concatenate(tables).T
    return Loaded(without_duplicates(numbered(user, item, value), "sum"), checksums)


def _read(file: File) -> np.ndarray:
    """[N, 2] int64: visitor and product."""
    try:
        table = pd.read_csv(io.BytesIO(file.data), sep="\t", dtype=np.int64)
    except ValueError as error:
        raise UsageError(f"{file.path} is no table of integers ({error}); {AGAIN}") from error
    if list(table.columns) != COLUMNS:
        raise UsageError(f"{file.path} has the columns {', '.join(table.columns)}, expected {', '.join(COLUMNS)}; {AGAIN}")
    return table[COLUMNS[:2]].to_numpy()
