"""Which parameters of a test are tried by default."""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import pytest


def slow_but(quick: Collection[str], cases: Mapping[str, Any] | Iterable[str]) -> list[Any]:
    """`cases` as parameters, a mapping's values under its names: all but `quick` are left to `pytest -m slow`."""
    cases = cases if isinstance(cases, Mapping) else {name: name for name in cases}
    assert quick and set(quick) <= set(cases), "a name that is gone would leave the default run without its test"
    return [pytest.param(value, id=name, marks=[pytest.mark.slow] * (name not in quick)) for name, value in cases.items()]
