"""Where things are: the configuration folder, and the cache of teachers, data and compiled programs."""

import os
from pathlib import Path

from jdistill.errors import RunError

CACHE_VARIABLE = "JDISTILL_CACHE"


def conf_dir() -> Path:
    """The folder `conf/`: inside the installed package, or beside it in a checkout."""
    here = Path(__file__).resolve().parent
    for folder in (here / "conf", here.parent / "conf"):
        if (folder / "train.yaml").is_file():
            return folder
    raise RunError(f"the configuration folder is missing beside {here}; install jdistill again")


def cache_folder(given: str = "") -> Path:
    """The cache: `given`, else $JDISTILL_CACHE, else ~/.cache/jdistill. It need not exist."""
    return Path(given or os.environ.get(CACHE_VARIABLE) or "~/.cache/jdistill").expanduser().absolute()
