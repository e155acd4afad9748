"""The documents' links lead somewhere, and the losses they show work."""

import contextlib
import re
from pathlib import Path

import pytest

import jdistill.options  # noqa: F401 (what is first registered inside a test would be taken back with it)
from jdistill.plugins import load_plugins
from jdistill.registry import options, provided_by
from jdistill.testing import assert_conforms

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


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
