"""A table as Markdown, LaTeX, CSV or text."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence

from jdistill.errors import unknown
from jdistill.report.cells import Column, Table, cell, lower_is_better
from jdistill.report.keys import missing

_LEFT = ("key",)


def render(table: Table, format: str = "markdown", bold: bool = False) -> str:
    """The table as text that ends with a newline.

    Args:
      format: `markdown` (aligned), `latex` (needs the package booktabs), `csv` (raw numbers, unrounded, fractions
        instead of percent, without the footer) or `text` (for a terminal).
      bold: the best mean of the table's metric in bold (Markdown and LaTeX).

    Raises:
      UsageError: an unknown format.
    """
    if format == "csv":
        return _csv(table)
    if format not in _RENDERERS:
        raise unknown("table format", format, FORMATS)
    body = [[" ".join(cell(column, row).split()) for column in table.columns] for row in table.rows]
    return _RENDERERS[format](table, body, _best(table) if bold else set())


def _best(table: Table) -> set[tuple[int, int]]:
    """(row, column) of the best mean; ties share it."""
    column = next((i for i, c in enumerate(table.columns) if c.kind == "main"), None)
    means = {i: row[f"{table.metric}.mean"] for i, row in enumerate(table.rows) if row["n"]}
    means = {i: mean for i, mean in means.items() if not missing(mean)}
    if column is None or not means:
        return set()
    best = (min if lower_is_better(table.metric) else max)(means.values())
    return {(i, column) for i, mean in means.items() if mean == best}


def _grid(columns: Sequence[Column], lines: Sequence[Sequence[str]]) -> tuple[list[int], list[list[str]]]:
    """The widths of the columns, and the lines padded to them: keys to the left, the rest to the right."""
    widths = [max(3, *(len(line[i]) for line in lines)) for i in range(len(columns))]
    left = [c.kind in _LEFT for c in columns]
    padded = [
        [text.ljust(w) if is_left else text.rjust(w) for text, w, is_left in zip(line, widths, left, strict=True)]
        for line in lines
    ]
    return widths, padded


def _markdown(table: Table, body: list[list[str]], best: set[tuple[int, int]]) -> str:
    body = [
        [f"**{_markdown_escape(t)}**" if (i, j) in best else _markdown_escape(t) for j, t in enumerate(line)]
        for i, line in enumerate(body)
    ]
    widths, lines = _grid(table.columns, [[_markdown_escape(c.title) for c in table.columns], *body])
    rule = ["-" * w if c.kind in _LEFT else "-" * (w - 1) + ":" for w, c in zip(widths, table.columns, strict=True)]
    text = "\n".join(f"| {' | '.join(line)} |" for line in [lines[0], rule, *lines[1:]])
    return text + "\n\n" + "".join(f"- {_markdown_escape(note)}\n" for note in table.footer)


def _markdown_escape(text: str) -> str:
    return re.sub(r"([|*\\<`])", r"\\\1", text)


def _latex(table: Table, body: list[list[str]], best: set[tuple[int, int]]) -> str:
    align = "".join("l" if c.kind in _LEFT else "r" for c in table.columns)
    head = " & ".join(_latex_escape(c.title) for c in table.columns)
    lines = []
    for i, row in enumerate(body):
        texts = (_latex_escape(t) for t in row)
        cells = (rf"{{\boldmath\bfseries {t}}}" if (i, j) in best else t for j, t in enumerate(texts))
        lines.append(" & ".join(cells) + r" \\")
    notes = [rf"{_latex_escape(note)} \\" for note in table.footer]
    return "\n".join(
        [
            "% needs \\usepackage{booktabs}",
            rf"\begin{{tabular}}{{{align}}}",
            r"\toprule",
            head + r" \\",
            r"\midrule",
            *lines,
            r"\bottomrule",
            r"\end{tabular}",
            "",
            r"\smallskip",
            r"{\footnotesize\raggedright",
            *notes[:-1],
            notes[-1].removesuffix(r" \\") + r"\par}",
            "",
        ]
    )


# `[` is wrapped because behind `\\` it would start an optional argument.
_LATEX = {
    "\\": r"\textbackslash{}",
    **{c: rf"\{c}" for c in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "[": "{[}",
    "<": "$<$",
    ">": "$>$",
    "|": "$|$",
    '"': "''",
    "±": r"$\pm$",
    "\u00d7": r"$\times$",
    "\u2013": "--",
    "\u2014": "---",
    "\u2026": r"\ldots{}",
    "\u2019": "'",
    "µ": r"$\mu$",
}


def _latex_escape(text: str) -> str:
    text = "".join(_LATEX.get(c, c if c.isascii() or c in "äöüéèáßñçÄÖÜÉ" else "?") for c in text)
    return re.sub(r"(?<![\w.$-])-(?=\d)", "$-$", text)  # minus signs, not hyphens


def _text(table: Table, body: list[list[str]], best: set[tuple[int, int]]) -> str:
    widths, lines = _grid(table.columns, [[c.title for c in table.columns], *body])
    rule = ["-" * w for w in widths]
    text = "\n".join("  ".join(line).rstrip() for line in [lines[0], rule, *lines[1:]])
    return text + "\n\n" + "".join(f"{note}\n" for note in table.footer)


def _csv(table: Table) -> str:
    raw = {header: key for column in table.columns for header, key in column.raw.items()}
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(raw)
    for row in table.rows:
        writer.writerow(["" if missing(row.get(key)) else row[key] for key in raw.values()])
    return out.getvalue()


_RENDERERS = {"markdown": _markdown, "latex": _latex, "text": _text}
FORMATS = (*_RENDERERS, "csv")
