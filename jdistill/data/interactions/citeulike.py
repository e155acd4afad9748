"""CiteULike-t: who put which article into their library."""

import io

import numpy as np
import pandas as pd

from jdistill.data.files import AGAIN, File
from jdistill.data.interactions.files import fetch_local
from jdistill.data.interactions.log import Interactions, numbered, without_duplicates
from jdistill.data.interactions.protocol import Loaded, interaction_data
from jdistill.data.interactions.splits import Rows
from jdistill.data.source import Source, fetch
from jdistill.errors import UsageError

USERS = Source(
    name="citeulike",
    folders=("citeulike-t",),
    addresses=("https://raw.githubusercontent.com/js05212/citeulike-t/master",),
    sha256={"users.dat": "02d5d429b2c0362e0ed79f6ef204666b4092563d21493abf4dfb521e8a7078bf"},
)
TOPOLOGY = Source(
    name="citeulike",
    folders=("citeulike-t",),
    addresses=("https://github.com/SeongKu-Kang/Topology_Distillation_KDD21",),
    sha256={
        "train.csv": "d1aeaa2dc441f01d3a1ab766dabb7068dbd70264721e5d2642b24d9c92e779e2",
        "valid.csv": "5d88bc174475ea152312fec0c51b70d9f96aa2fbf7b2a0a2aba3ce3c03ca7919",
        "test.csv": "35b77348cf73a7df389c99c83fb24986d12c39f6d106bbae1feec9d2a01f5cbc",
    },
)
DERRD = Source(
    name="citeulike",
    folders=("citeulike-derrd",),
    addresses=("https://github.com/SeongKu-Kang/DE-RRD_CIKM20",),
    sha256={
        "train.csv": "6e407aa1ec925455f22488994cc980959e66204ad057cdf7a113a80c09a67332",
        "valid.csv": "d95762307e57d23c9e3aed00c26dccf119b719306dc6cebeb943efb710337a97",
        "test.csv": "e111d3a301dbb0ed8c81dbe7b4ab929241a8f4519fe3783a3538bc7a5353bee9",
    },
)
PUBLISHED = {"topology": TOPOLOGY, "derrd": DERRD}

USERS_COUNTED, ITEMS_COUNTED = 5220, 25182
"""As the published code counts: one more of each than have any interaction (5,219 and 25,181)."""


@interaction_data("citeulike", more_splits=tuple(PUBLISHED), split="topology", min_interactions=5)
def citeulike(
    root: str | None = None, split: str = "topology", download: bool = True, verify: bool = True, min_interactions: int = 5
) -> Loaded:
    """CiteULike-t: 125,580 articles put into their library by 5,219 researchers (users of at least 5), no times.

    All splits number users by their line in users.dat, after those of fewer than 5 articles are left out, and articles
    in the order of their first appearance there. The two published splits are of leave-one-out and count, as their code
    does, one user and one item more, that nothing is known of: 5,220 and 25,182.

    Args:
      root: the folder that holds citeulike-t (users.dat; train.csv, valid.csv, test.csv) and citeulike-derrd (the latter
        three); None: $JDISTILL_DATA, else the cache folder.
      download: fetch users.dat where it is missing (the published splits cannot be downloaded in this form).
      verify: compare every file's SHA-256 with the known one.
      {keys}
    The split is also one of topology: that of Topology Distillation (Kang et al., KDD 2021), and derrd: that of DE-RRD
    (Kang et al., CIKM 2020, seed 0), whose protocol is candidates=499. They are not cleaned any further.

    Raises:
      UsageError: a wrong value, or a file that is missing or altered.
    """
    if split not in PUBLISHED:
        files, checksums = fetch(USERS, root, download=download, verify=verify)
        return Loaded(read_users(files["users.dat"], min_interactions), checksums)
    source = PUBLISHED[split]
    advice = (
        f"split={split} is published as pickles at {source.addresses[0]}: write them there as train.csv, valid.csv and "
        "test.csv with the header user,item, or set split=leave_one_out"
    )
    files, checksums = fetch_local(source, root, verify=verify, advice=advice)
    parts = [_read_pairs(files[name]) for name in source.sha256]
    user, item = np.concatenate(parts).T.astype(np.int32)
    log = Interactions(
        user, item, np.ones(len(user), np.float32), None, np.arange(USERS_COUNTED), np.arange(ITEMS_COUNTED)
    )  # fmt: skip
    ends = np.cumsum([len(part) for part in parts])
    return Loaded(log, checksums, Rows(*np.split(np.arange(ends[-1]), ends[:-1])))


def read_users(file: File, least: int) -> Interactions:
    """The log of a users.dat: a line for each user with the number of items and their ids.

    Users of fewer than `least` are left out before items are numbered. `user_names` are the line numbers, from 0.
    """
    lines = [np.array(line.split(), np.int64) for line in file.data.decode("ascii").splitlines()]
    counts = np.array([line[0] if len(line) else 0 for line in lines])
    if wrong := [n for n, line in enumerate(lines) if len(line) != counts[n] + 1]:
        raise UsageError(f"{file.path} line {wrong[0] + 1} does not hold as many items as it announces; {AGAIN}")
    kept = np.flatnonzero(counts >= least)
    if not len(kept):
        raise UsageError(f"min_interactions {least} leaves no user; the most any has is {counts.max(initial=0)}")
    item = np.concatenate([lines[n][1:] for n in kept])
    return without_duplicates(numbered(np.repeat(kept, counts[kept]), item))


def _read_pairs(file: File) -> np.ndarray:
    """[N, 2] int64 of a CSV file with the header user,item.

    Raises:
      UsageError: another header, text, or an id that the published counts do not have.
    """
    try:
        table = pd.read_csv(io.BytesIO(file.data), dtype=np.int64)
    except ValueError as error:
        raise UsageError(f"{file.path} is no table of integers ({error}); {AGAIN}") from error
    if list(table.columns) != ["user", "item"]:
        raise UsageError(f"{file.path} has the header {','.join(table.columns)}, expected user,item; {AGAIN}")
    pairs = table.to_numpy()
    if (pairs < 0).any() or (pairs >= (USERS_COUNTED, ITEMS_COUNTED)).any():
        raise UsageError(f"{file.path} has an id outside 0 to {USERS_COUNTED - 1} (user), {ITEMS_COUNTED - 1} (item); {AGAIN}")
    return pairs
