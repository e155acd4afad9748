"""What the experiments on recommendation share: tables beside published numbers, learning curves over published ones."""

import argparse
import dataclasses
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from _common import COLOURS, METHOD, Method, run_sweep, save, slug, with_column
from _records import CURVE, plain, recorded_weight

from jdistill.report import Table
from jdistill.report.collect import read_curves
from jdistill.report.keys import primary


def with_published(table: Table, values: Mapping[Any, float], title: str, *keys: str) -> Table:
    """The table with a column of published numbers: by method, or by the tuple of a row's values of `keys`, as text."""

    def value(row: Mapping[str, Any]) -> str | None:
        found = values.get(tuple(str(row[key]) for key in keys) if keys else row[METHOD])
        return None if found is None else f"{found:.4f}"

    return with_column(table, title, value)


def with_curves(frame: pd.DataFrame, metric: str) -> pd.DataFrame:
    """The frame with a column of learning curves, `{"epoch": [E], METRIC: [E]}`: out of the runs' folders, or as recorded."""
    found = []
    for run in frame.to_dict("records"):
        if plain(run.get("path")) is None:
            found.append(plain(run.get(CURVE)))
            continue
        lines = [line for line in read_curves(run["path"]) if metric in line]
        found.append({"epoch": [line["epoch"] for line in lines], metric: [line[metric] for line in lines]})
    return frame.assign(**{CURVE: found})


def curves(frame: pd.DataFrame, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """(epochs [E] that all runs of a frame of `with_curves` have, values [runs, E] of `metric`)."""
    lines = [dict(zip(curve["epoch"], curve[metric], strict=True)) for curve in frame[CURVE]]
    epochs = sorted(set.intersection(*(set(line) for line in lines))) if lines else []
    return np.array(epochs), np.array([[line[epoch] for epoch in epochs] for line in lines])


def curve_figure(
    panels: Mapping[str, Mapping[str, tuple[np.ndarray, np.ndarray]]],
    published: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]],
    path: Path,
    ylabel: str,
) -> None:
    """Ours (mean over seeds, band of one standard deviation) and the published curve (dashed), one panel a student."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(panels), figsize=(3.2 * len(panels) + 0.6, 3.2), squeeze=False, layout="constrained")
    names = list(dict.fromkeys(name for panel in panels.values() for name in panel))
    for axis, (title, panel) in zip(axes[0], panels.items(), strict=True):
        for name, (epochs, values) in panel.items():
            colour = COLOURS[names.index(name) % len(COLOURS)]
            mean = values.mean(0)
            axis.plot(epochs, mean, color=colour, label=f"{name} (n = {len(values)})")
            if len(values) > 1:
                std = values.std(0, ddof=1)
                axis.fill_between(epochs, mean - std, mean + std, color=colour, alpha=0.2, linewidth=0)
            if name in published.get(title, {}):
                axis.plot(*published[title][name], "--", color=colour, linewidth=1)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("epoch")
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(fontsize=7, frameon=False)
    axes[0][0].set_ylabel(ylabel)
    figure.suptitle("lines and bands: ours, mean and standard deviation over seeds; dashed: published (one run)", fontsize=8)
    save(figure, path)


def chosen(experiment: str, method: Method, weights: Sequence[float], given: argparse.Namespace) -> Method:
    """`method` with the `loss.weight` among `weights` that is best on validation with seed 0, and its run with that seed.

    With no seeds asked for, `method` as it is; with `--add` and recorded runs of it, with their weight.
    """
    if not given.seeds:
        return method
    if weight := recorded_weight(given, [f"experiment={experiment}", *method.overrides]):
        return dataclasses.replace(method, overrides=(*method.overrides, weight))
    folder = given.sweeps / slug(f"weights {method.label}")
    grid = f"loss.weight={','.join(f'{weight:g}' for weight in weights)}"
    frame = run_sweep(folder, [f"experiment={experiment}", *method.overrides, grid], [0])
    column = f"metrics.validation.{primary(frame)}"
    if column not in frame or frame[column].notna().sum() == 0:
        sys.exit(f"no run of {method.label} has {column}; see {folder}")
    best = frame[column].idxmax()
    weight = f"loss.weight={frame.loc[best, 'config.loss.weight']:g}"
    return dataclasses.replace(method, overrides=(*method.overrides, weight), done=frame.loc[[best]])


def weights(frame: pd.DataFrame, labels: Iterable[str]) -> list[str]:
    """A note of the weights that `chosen` found for the rows of these labels, out of their runs; none without such rows."""
    found = []
    for label, runs in frame[frame[METHOD].isin(list(labels))].groupby(METHOD, sort=False):
        found += [f"{label} {override}" for override in runs["overrides"].iloc[0] if override.startswith("loss.weight=")]
    return [f"weights chosen on validation, seed 0: {'; '.join(found)}"] if found else []
