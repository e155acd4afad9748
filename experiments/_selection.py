"""Settings chosen on validation: of a method's runs only those of the setting that is best there, in each fold."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd
from _common import METHOD, PROBLEM

FOLD = "config.data.fold"
TRIED = "tried"


def select(
    frame: pd.DataFrame, keys: Sequence[str], metric: str, repetition: str | None = "config.seed", least: bool = False
) -> pd.DataFrame:
    """The runs of each method's best setting in each repetition, by the mean of a validation metric over its runs there.

    So what is tested on a fold was chosen without that fold's test rows.

    Args:
      frame: of labelled runs, several settings a method.
      keys: what tells settings apart, such as `loss.weight`; one that a run has not is left out.
      metric: of the validation split.
      repetition: the column that is chosen within: the seed, or the fold; None: one setting for all.
      least: whether the smallest value is the best.

    Returns:
      The runs kept, in their order, with the column `tried`: their setting as text, empty where there was one only. Runs that
      did not finish stay.
    """
    rows = [column for column in (PROBLEM, METHOD) if column in frame]
    frame = frame.copy()  # of one piece: joined frames of many columns are not
    frame[TRIED] = [setting(row, keys) for row in frame.to_dict("records")]
    alone = frame.groupby(rows, sort=False)[TRIED].transform("nunique") == 1
    frame.loc[alone, TRIED] = ""
    done, kept = frame["status"] == "finished", []
    for _, runs in frame[done].groupby([*rows, *([repetition] if repetition else [])], sort=False):
        means = runs.groupby(TRIED, sort=False)[f"metrics.validation.{metric}"].mean()
        kept += list(runs.index[runs[TRIED] == (means.idxmin() if least else means.idxmax())])
    return frame.loc[sorted([*kept, *frame.index[~done]])]


def setting(row: Mapping[str, Any], keys: Sequence[str]) -> str:
    """`loss.weight=1 task.weight=0`: the values of those keys that the run has."""
    found = {key: row.get(f"config.{key}") for key in keys}
    return " ".join(f"{key}={value:g}" for key, value in found.items() if isinstance(value, int | float) and value == value)


def settings(frame: pd.DataFrame, repetition: str = "config.seed") -> Callable[[Mapping[str, Any]], str | None]:
    """For `with_column`: which settings a row's repetitions chose and how often; nothing where there was one to choose."""

    def values(row: Mapping[str, Any]) -> str | None:
        own = frame[[all(frame.at[i, k] == row[k] for k in (METHOD, PROBLEM) if k in row) for i in frame.index]]
        counts = Counter(own.drop_duplicates([repetition, TRIED])[TRIED])
        return ", ".join(f"{text} ({count})" for text, count in counts.most_common() if text) or None

    return values
