"""The table of losses in docs/losses.md, read from the registry and the classes' docstrings.

What a docstring must have for it: a one-line summary; then, before `Attributes:`, a paragraph with "value [B] =" that ends
in ", in float32 or wider" and defines its symbols before that; the paper as "Author et al. 2020 (NAME), https://..." or as
'Author & Other 2020, "Title" (VENUE)'; and sentences that name the published code which computes the same or something else.
"""

import inspect
import re
import typing
from collections.abc import Iterable
from typing import Any, NamedTuple

from jdistill.registry import Option

FAMILIES = {
    "Logits": ("logits", "divergences", "decoupled", "regression", "labels", "weighting"),
    "Maps and features": ("features", "maps", "boundaries", "factors", "generation", "review", "spectra"),
    "Relations between examples": ("relations", "graphs", "contrast"),
    "Derivatives with respect to the inputs": ("gradients",),
    "One network's last layer on the other's features": ("reuse",),
    "Items drawn from a teacher's ranking": ("ranked", "collaborative"),
    "Lists of candidates or documents": ("listwise", "listwise_kd"),
    "Embeddings of users and items": ("entities",),
    "Made of other losses": ("wrappers",),
}
PLUGINS = "Of plug-ins"
HEADER = """\
# Losses

Printed by `jdistill list losses --markdown` from the registry and the docstrings of `jdistill/losses/`, which say more. A
loss is chosen by its name, its options are keys: `jdistill loss=kd loss.temperature=2 loss.weight=0.9`. `float*` is a number
that takes a schedule as well: `'loss.weight={name: warmup, end: 5, epochs: 20}'`. `weight` multiplies the batch's mean of the
values; its default is the published one where there is one. `_s` is the student, `_t` the teacher, B the batch, K the number
of logits, H W C a map's height, width and channels; values come in float32 or wider. To add one:
[write-a-loss.md](write-a-loss.md).
"""
COLUMNS = ("name", "what", "formula", "paper", "options", "published code")

_FORMULA = re.compile(r"\bvalue (?:i )?\[B\]|\bvalues \[B\]", re.IGNORECASE)
_END = re.compile(r"[,;]? in float32 or wider")
_AUTHOR = r"(?:Mc)?[A-Z][a-zà-ÿ]+(?:-[A-Z][a-zà-ÿ]+)?"
_PAPER = re.compile(
    rf"(?P<who>(?:{_AUTHOR}, )*{_AUTHOR}(?: & {_AUTHOR}| et al\.)? (?:19|20)\d\d(?: \([\w-]+\))?),"
    r"(?: (?P<title>\"[^\"]+\"(?: \(\w+\))?))?"
    r"(?:,?(?: whose earlier version is)? (?P<link>https?://[^\s,;)]+[^\s,;).]))?"
    r"(?P<where>, (?:equations?|sections?|algorithm|figure) \d+(?:\.\d+)*[a-z]?(?: (?:to|and) \d+)?\b)?"
)
_CODES = re.compile(
    r"\bcodes?\b|authors'|implementations|RepDistiller|mdistiller|AberHu|torchdistill|mmrazor|cls_KD|KD_Lib|TextBrewer|torch's"
)
_SENTENCE = re.compile(r"(?<=[^\s.])(?<!al)\.(?: |$)")


class Row(NamedTuple):
    """What the table says of one loss, as Markdown."""

    name: str
    what: str
    formula: str
    papers: str
    options: str
    codes: str


def markdown(losses: Iterable[Option]) -> str:
    """The page: a section and a table for each family of losses."""
    families: dict[str, list[Option]] = {family: [] for family in (*FAMILIES, PLUGINS)}
    for option in losses:
        families[family_of(option)].append(option)
    parts = [HEADER]
    for family, members in families.items():
        if members:
            lines = [_line(COLUMNS), _line(["---"] * len(COLUMNS)), *(_line(row(option)) for option in members)]
            parts += [f"## {family}\n", "\n".join(lines) + "\n"]
    return "\n".join(parts)


def family_of(option: Option) -> str:
    """The section a loss belongs in, by the module that defines it."""
    package, _, module = option.target.__module__.rpartition(".")
    found = (family for family, modules in FAMILIES.items() if package == "jdistill.losses" and module in modules)
    return next(found, PLUGINS)


def row(option: Option) -> Row:
    """What a loss's docstring and signature say, cut to the table's columns."""
    summary, paragraphs = described(option)
    return Row(
        name=f"`{option.name}`",
        what=_escaped(summary),
        formula=_escaped(" ".join(formulas(summary, paragraphs))),
        papers="; ".join(dict.fromkeys(map(_cited, _PAPER.finditer(" ".join(paragraphs))))),
        options=", ".join(_field(option, name) for name in option.fields),
        codes=_escaped(" ".join(codes(paragraphs))),
    )


def described(option: Option) -> tuple[str, list[str]]:
    """A loss's summary and the paragraphs of its docstring; of a function, those of the class that it returns."""
    target: Any = option.target
    if not inspect.isclass(target):
        made = typing.get_type_hints(target).get("return")
        target = made if inspect.isclass(made) and inspect.getdoc(made) else target
    text = re.split(r"\n(?:Attributes|Args|Raises):\n", inspect.getdoc(target) or "")[0]
    summary, *paragraphs = (" ".join(paragraph.split()) for paragraph in text.split("\n\n"))
    return summary, paragraphs


def formulas(summary: str, paragraphs: list[str]) -> list[str]:
    """Of each paragraph that says what the value is, the part up to the dtype; else the summary that says it."""
    found = [_halves(paragraph)[0] for paragraph in paragraphs if _FORMULA.search(paragraph)]
    if not found and _FORMULA.search(summary):
        found = [summary[_FORMULA.search(summary).start() :]]  # type: ignore[union-attr]
    return [_sentence(part) for part in found]


def codes(paragraphs: list[str]) -> list[str]:
    """The sentences after the formula that name published code, without links."""
    rest = (_halves(p)[1] if _FORMULA.search(p) else p for p in paragraphs)
    sentences = (sentence for part in rest for sentence in _SENTENCE.split(_PAPER.sub(_uncited, part)))
    return [_sentence(sentence) for sentence in sentences if _CODES.search(sentence)]


def _halves(paragraph: str) -> tuple[str, str]:
    """A paragraph up to the end of its formula, and from there on."""
    start = _FORMULA.search(paragraph)
    assert start is not None
    found = _END.search(paragraph, start.end()) or _SENTENCE.search(paragraph, start.end())
    end, after = (found.start(), found.end()) if found else (len(paragraph), len(paragraph))
    cited = _PAPER.search(paragraph, start.end(), end)
    if cited:  # the dtype comes after the citation
        end = after = paragraph.rfind(":", start.end(), cited.start())
    return paragraph[:end], paragraph[after:]


def _sentence(text: str) -> str:
    text = text.strip(" ,;:.")
    first = text.partition(" ")[0]
    return (text[:1].upper() + text[1:] if first.isalpha() and len(first) > 1 else text) + "."


def _uncited(paper: re.Match[str]) -> str:
    return paper["who"] + (f", {paper['title']}" if paper["title"] else "") + (paper["where"] or "")


def _cited(paper: re.Match[str]) -> str:
    who, title, link, where = paper.group("who", "title", "link", "where")
    named = f"[{who}]({link})" if link else who
    return f"{named}{f', {title}' if title else ''}{where or ''}"


def _field(option: Option, name: str) -> str:
    kind, default = option.fields[name]
    typed = "float*" if name in option.numbers else getattr(kind, "__name__", str(kind)) if kind is not Any else ""
    typed = str(kind) if typing.get_args(kind) else typed
    shown = str(list(default) if isinstance(default, tuple) else default).replace("'", "").replace("|", r"\|")
    return f"`{name}{f': {typed}' if typed else ''} = {shown}`".replace(" | ", r" \| ")


def _escaped(text: str) -> str:
    """Text whose bars and outer underscores are not Markdown's; code spans as they are."""
    parts = text.replace("|", r"\|").split("`")
    parts[::2] = [re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", part).replace("*", r"\*") for part in parts[::2]]
    return "`".join(parts)


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
