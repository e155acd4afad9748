"""The sub-commands on results: `table`, `ranks`, `status`, `export`, `latency`. Nothing imports JAX before it is needed."""

import argparse
import contextlib
from pathlib import Path
from typing import Any, NoReturn

from jdistill.errors import UsageError

SUFFIXES = {"markdown": "md", "latex": "tex", "csv": "csv", "text": "txt"}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{self.prog}: {message} ({self.prog} --help shows the options)")


def table(arguments: list[str]) -> int:
    """`jdistill table SWEEP ...`."""
    parser = _Parser(
        prog="jdistill table",
        description="One row a method: mean ± std over seeds, differences to a baseline, sizes, times.",
    )
    parser.add_argument("paths", nargs="+", type=Path, metavar="SWEEP", help="sweep folders or run folders")
    parser.add_argument(
        "--by",
        help="comma-separated keys that tell rows apart, such as loss,loss.temperature (default: what varies, except seeds)",
    )
    parser.add_argument(
        "--baseline", default="auto", help="KEY=VALUE[,KEY=VALUE] or none (default: loss=none where there is one)"
    )
    parser.add_argument("--metric", help="the metric compared (default: the task's on the test split)")
    parser.add_argument("--metrics", default="", help="comma-separated further metrics, such as teacher_agreement")
    parser.add_argument("--columns", help="comma-separated columns to show, in order")
    parser.add_argument("--test", default="t", help="t, permutation or wilcoxon; paired over seeds (default: %(default)s)")
    parser.add_argument("--correction", default="holm", help="holm, bonferroni, bh or none (default: %(default)s)")
    parser.add_argument("--format", default="text", help="text, markdown, latex or csv (default: %(default)s)")
    parser.add_argument("--commands", action="store_true", help="the commands that make each row again, in the order of rows")
    parser.add_argument("--budget", help="mark rows beyond it: bytes=20000,nonzero=...,flops=...,latency_ms=...")
    parser.add_argument("--bold", action="store_true", help="best value of each column in bold")
    parser.add_argument("--out", type=Path, help="write the table to this file")
    parser.add_argument("--figure", type=Path, help="also write accuracy against bytes to this .png, .pdf or .svg")
    parser.add_argument("--x", default="size.bytes", help="what --figure shows accuracy against: bytes, flops, latency_1, ...")
    parser.add_argument("--curves", type=Path, help="also write learning curves to this file")
    given = parser.parse_args(arguments)

    from jdistill.report import collect, curves_figure, make_table, render, scatter_figure
    from jdistill.report.reproduce import commands as reproduce

    frame = collect(given.paths)
    made = make_table(
        frame, by=_words(given.by), baseline=None if given.baseline == "none" else given.baseline, metric=given.metric,
        metrics=_words(given.metrics) or (), columns=_words(given.columns), test=given.test, correction=given.correction,
        budget=given.budget,
    )  # fmt: skip
    text = render(made, format=given.format, bold=given.bold)
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(text if text.endswith("\n") else text + "\n")
        print(given.out)
    else:
        print(text)
    if given.commands:
        print(*reproduce(frame, made), sep="\n")
    if given.figure:
        print(*scatter_figure(frame, by=_words(given.by), path=given.figure, x=given.x), sep="\n")
    if given.curves:
        print(*curves_figure(frame, by=_words(given.by), path=given.curves), sep="\n")
    return 0


def ranks(arguments: list[str]) -> int:
    """`jdistill ranks SWEEP ... --out FILE.png`."""
    parser = _Parser(
        prog="jdistill ranks",
        description="Critical-difference diagram: average ranks over seeds, bars over methods that do not differ.",
    )
    parser.add_argument("paths", nargs="+", type=Path, metavar="SWEEP", help="sweep folders or run folders")
    parser.add_argument("--by", help="comma-separated keys that tell methods apart (default: what varies, except seeds)")
    parser.add_argument("--metric", help="the metric that is ranked (default: the task's on the test split)")
    parser.add_argument(
        "--bars", default="pairwise", help="pairwise (paired tests) or nemenyi (critical difference) (default: %(default)s)"
    )
    parser.add_argument("--test", default="t", help="t, permutation or wilcoxon; paired over seeds (default: %(default)s)")
    parser.add_argument("--correction", default="holm", help="holm, bonferroni, bh or none (default: %(default)s)")
    parser.add_argument("--alpha", type=float, default=0.05, help="level of the bars (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="write the diagram to this .png, .pdf or .svg")
    given = parser.parse_args(arguments)

    from jdistill.report import collect, ranks_figure, ranks_of_runs
    from jdistill.report.keys import primary
    from jdistill.report.ranks import ranks_text

    frame = collect(given.paths)
    metric = given.metric or f"test.{primary(frame)}"
    found = ranks_of_runs(
        frame, by=_words(given.by), metric=metric, bars=given.bars, test=given.test,
        correction=given.correction, alpha=given.alpha,
    )  # fmt: skip
    print(ranks_text(found, metric), end="")
    if given.out:
        print(*ranks_figure(found, given.out, metric), sep="\n")
    return 0


def status(arguments: list[str]) -> int:
    """`jdistill status SWEEP [--watch [SECONDS]]`."""
    parser = _Parser(prog="jdistill status", description="What of a sweep is finished, failed, running, pending; time left.")
    parser.add_argument("sweep", type=Path, metavar="SWEEP", help="a sweep folder")
    parser.add_argument(
        "--watch", nargs="?", type=_seconds, const=5.0, metavar="SECONDS",
        help="show it again every SECONDS (default: 5) until all is done",
    )  # fmt: skip
    given = parser.parse_args(arguments)

    from jdistill.report.status import status as read
    from jdistill.report.status import status_text, watch

    if given.watch is None:
        print(status_text(read(given.sweep)))
    else:
        with contextlib.suppress(KeyboardInterrupt):  # the usual way to stop looking
            watch(given.sweep, given.watch)
    return 0


def export(arguments: list[str]) -> int:
    """`jdistill export RUN --to RUNTIME` and `jdistill export --check FOLDER`."""
    parser = _Parser(
        prog="jdistill export",
        description="A finished run's student as a file for another runtime, with a model card, checked against JAX.",
    )
    parser.add_argument("run", nargs="?", type=Path, metavar="RUN", help="the folder of a finished run")
    parser.add_argument("--to", metavar="RUNTIME", help="stablehlo, onnx or litert")
    parser.add_argument("--int8", default="none", help="none, dynamic or static, for onnx and litert (default: %(default)s)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where it goes (default: RUN/export/RUNTIME)")
    parser.add_argument("--batch", default="1,256", help="batch sizes that are checked (default: %(default)s)")
    parser.add_argument("--check", type=Path, metavar="FOLDER", help="only check that an exported folder is as it was written")
    given = parser.parse_args(arguments)
    if (given.run is None) == (given.check is None) or (given.run is not None and given.to is None):
        raise UsageError("jdistill export takes RUN --to stablehlo|onnx|litert, or --check FOLDER")

    from jdistill import export as exporting

    if given.check is not None:
        card = exporting.read_card(given.check)
        print(f"{given.check}: {', '.join(card['files'])} for {card['runtime']}, unchanged")
        return 0
    folder = exporting.export(given.run, given.to, int8=given.int8, out=given.out, batches=_sizes(given.batch))
    print(f"exported to {folder} (MODEL_CARD.md says what it is)")
    return 0


def latency(arguments: list[str]) -> int:
    """`jdistill latency RUN ...`."""
    parser = _Parser(
        prog="jdistill latency",
        description="Finished runs and exported models, timed in turns in one process: percentiles, times over the first's.",
    )
    parser.add_argument("paths", nargs="+", type=Path, metavar="RUN", help="folders of finished runs, or of exported models")
    parser.add_argument("--batch", default="1,256", help="comma-separated batch sizes (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=200, help="counted calls of each model (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=10, help="turns they are divided into (default: %(default)s)")
    parser.add_argument(
        "--runtime",
        default="jax",
        help="what runs are timed in: jax, or folders of RUN/export, such as jax,onnx (default: jax)",
    )
    parser.add_argument(
        "--out", type=Path, action="append", default=[], help="also write a .md, .csv, .tex, .txt or .json; repeatable"
    )
    given = parser.parse_args(arguments)

    from jdistill.measure.command import compare

    print(compare(given.paths, _sizes(given.batch), given.repeats, given.rounds, _words(given.runtime) or ["jax"], given.out))
    return 0


def _sizes(text: str) -> list[int]:
    """The numbers of `1,256`; 0, which is refused, for what is none."""
    return [int(word) if word.isdecimal() else 0 for word in _words(text) or []]


def write_report(folder: Path, **options: Any) -> str:
    """Writes `table.md`, `table.csv`, `table.tex`, `accuracy_bytes.png`, `curves.png` of a sweep; returns the text to print.

    A figure is left out where no run has what it shows.
    """
    from jdistill.report import collect, make_table, render, scatter_figure
    from jdistill.report.figure import held_out_curves

    frame = collect(folder)
    made = make_table(frame, **options)
    for name in ("markdown", "csv", "latex"):
        (folder / f"table.{SUFFIXES[name]}").write_text(render(made, format=name))
    lines = [render(made, format="text"), f"table: {folder / 'table.md'} (also .csv, .tex)"]
    if "size.bytes" in frame and frame["size.bytes"].notna().any():
        lines.append(f"figure: {scatter_figure(frame, path=folder / 'accuracy_bytes.png')[0]}")
    by = options.get("by")
    lines += [f"learning curves: {file}" for file in held_out_curves(frame, folder / "curves.png", by)]
    return "\n".join(lines)


def _seconds(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < (seconds := float(text)) <= 86400:
            return seconds
    raise argparse.ArgumentTypeError(f"expected a number of seconds above 0, up to 86400, got '{text}'")


def _words(text: str | None) -> list[str] | None:
    return [word.strip() for word in text.split(",") if word.strip()] if text else None
