"""docs/losses.md is what the registry and the docstrings say, and says something of every loss."""

import contextlib
import re
from pathlib import Path

import pytest

import jdistill.losses  # noqa: F401 (registers)
from jdistill.losses import _catalogue as catalogue
from jdistill.losses.base import Loss, loss
from jdistill.pytrees import pytree, static
from jdistill.registry import options, provided_by
from tests.e2e.helpers import call, succeed

OWN = {name: option for name, option in options("loss").items() if option.target.__module__.startswith("jdistill.")}
PAGE = Path(__file__).parents[2] / "docs/losses.md"
NO_PAPER = {"none", "cross_entropy", "residual", "sum", "mse"}


def test_the_page_is_up_to_date():
    made = catalogue.markdown(OWN.values())
    assert PAGE.read_text() == made, "docs/losses.md is old: jdistill list losses --markdown > docs/losses.md"


def test_every_module_of_losses_has_a_family():
    found = {option.target.__module__.rpartition(".")[2] for option in OWN.values()}
    listed = [module for modules in catalogue.FAMILIES.values() for module in modules]
    assert found == set(listed) and len(listed) == len(set(listed))


@pytest.mark.parametrize("name", OWN)
def test_every_row_has_a_formula_a_paper_and_all_options(name):
    row = catalogue.row(OWN[name])
    assert "alue" in row.formula and "[B]" in row.formula
    assert bool(row.papers) == (name not in NO_PAPER)
    assert [re.match(r"\w+", part)[0] for part in row.options.split("`")[1::2]] == list(OWN[name].fields)
    assert "\n" not in "".join(row) and not any(re.search(r"(?<!\\)\|", cell) for cell in row)


def test_every_link_of_a_docstring_is_in_its_row():
    for option in OWN.values():
        text = " ".join(catalogue.described(option)[1])
        links = {link.rstrip(".,;)") for link in re.findall(r"https?://[^\s]+", text)}
        assert links == set(re.findall(r"\]\((\S+)\)", catalogue.row(option).papers)), option.name


@pytest.fixture
def remove_after():
    """What a test registers is taken back."""
    with contextlib.suppress(KeyboardInterrupt), provided_by("a test"):
        yield
        raise KeyboardInterrupt


def test_a_row_says_what_the_docstring_says(remove_after):
    @loss("made_up", weight=2.5)
    @pytree
    class MadeUp(Loss):
        """What it is: a | b.

        With G = a b, value [B] = sum_c |a_c| _s G, in float32 or wider: One & Two-Three 2019 (NAME), https://example.org/1,
        equations 1 to 3, as printed; RepDistiller `X` computes half of it. This says nothing. See Four et al. 2020,
        https://example.org/2. The authors' code of Five 2021, "A Title" (VENUE), section 2.1, differs.

        Attributes:
          rate: see RepDistiller.
        """

        rate: float = 0.5
        names: tuple[str, ...] | None = static(default=None)
        kind: str = static(default="a")

    row = catalogue.row(options("loss")["made_up"])
    assert row == (
        "`made_up`",
        r"What it is: a \| b.",
        r"With G = a b, value [B] = sum_c \|a_c\| \_s G.",
        "[One & Two-Three 2019 (NAME)](https://example.org/1), equations 1 to 3; [Four et al. 2020](https://example.org/2); "
        'Five 2021, "A Title" (VENUE), section 2.1',
        r"`rate: float* = 0.5`, `names: list[str] \| None = None`, `kind: str = a`, `weight: float* = 2.5`",
        "One & Two-Three 2019 (NAME), equations 1 to 3, as printed; RepDistiller `X` computes half of it. "
        'The authors\' code of Five 2021, "A Title" (VENUE), section 2.1, differs.',
    )
    assert catalogue.family_of(options("loss")["made_up"]) == catalogue.PLUGINS
    assert f"## {catalogue.PLUGINS}\n" in catalogue.markdown(options("loss").values())


def test_the_command_prints_the_page():
    out = succeed("list", "losses", "--markdown").out
    for name in OWN:
        assert f"\n| `{name}` | " in out
    done = call("list", "losses", "--markdown", "cache=x")
    assert done.code == 2 and "usage" in done.err
    assert call("list", "models", "--markdown").code == 2
