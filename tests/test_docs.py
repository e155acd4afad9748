"""The documents' links lead somewhere, the losses they show work, and their tables say what the results' tables say."""

import contextlib
import re
from pathlib import Path

import pytest

import jdistill.options  # noqa: F401 (what is first registered inside a test would be taken back with it)
from jdistill.plugins import load_plugins
from jdistill.registry import options, provided_by
from jdistill.testing import assert_conforms

ROOT = Path(__file__).parents[1]
RESULTS = sorted((ROOT / "results").glob("*/README.md"))
WITH_TABLES = [page for page in RESULTS if len([*page.parent.glob("*.md")]) > 1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *RESULTS]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: f"{page.parent.name}/{page.name}")
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


def table_rows(path):
    """The rows of a page's tables: column -> cell, blanks and escapes aside; headers are the rows before dashes."""
    header = None
    lines = [line.strip() for line in path.read_text().splitlines()]
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        cells = [" ".join(cell.replace("\\", "").split()) for cell in line.strip("|").split("|")]
        if not line.startswith("|"):
            header = None
        elif set(following) <= set("|-: ") and "-" in following:
            header = cells
        elif header and not set(line) <= set("|-: "):
            yield dict(zip(header, cells, strict=True))


@pytest.mark.parametrize("page", WITH_TABLES, ids=lambda page: page.parent.name)
def test_a_results_page_copies_its_tables_rightly(page):
    made = {cell for path in page.parent.glob("*.md") if path != page for row in table_rows(path) for cell in row.values()}
    assert made
    for row in table_rows(page):
        for column, cell in row.items():
            if "±" in cell or column.startswith("difference"):
                assert cell in made, (column, row)
            if column.startswith("p ("):
                assert re.fullmatch(r"-|[01]\.\d{3}|<0\.001", cell), (column, row)


@pytest.fixture
def remove_after():
    """What a test registers is taken back."""
    with contextlib.suppress(KeyboardInterrupt), provided_by("a test"):
        yield
        raise KeyboardInterrupt


def test_the_losses_of_the_guide_work(remove_after, tmp_path):
    known = set(options("loss"))
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/write-a-loss.md").read_text(), re.DOTALL)
    for name, code in (("my_loss.py", blocks[0]), ("three.py", "\n".join(blocks[1:]))):
        (tmp_path / name).write_text(code)
        load_plugins([str(tmp_path / name)])
    new = set(options("loss")) - known
    assert new == {"my_loss", "mapped", "centred", "noisy", "top_over_rest"}
    for name in new:
        assert_conforms(name, only=["shapes", "state", "needs_teacher", "declared"])
