"""Zipped sweeps: a list of points, each setting several keys at once, combined with every other swept value."""

import re
from collections.abc import Sequence
from typing import Any

from jdistill.errors import UsageError

KEY = "hydra.sweeper.zip"
EXAMPLE = f"{KEY}=[{{loss:kd,loss.temperature:4}},{{loss:dkd,loss.temperature:2}}]"
_BARE = re.compile(r"[A-Za-z_][\w./-]*")  # text that Hydra's grammar reads as itself, without quotes
_NOT_TEXT = re.compile(r"(null|true|false|nan|inf)", re.I)


def zipped(points: Any, jobs: Sequence[Sequence[str]]) -> list[list[str]]:
    """Every point with every job: the overrides of the job, then those of the point; points vary slowest.

    Args:
      points: a list of `{key: value}`; the points need not have the same keys. None or an empty list: `jobs` as they are.
      jobs: the overrides of each job of the cartesian product of all other keys.

    Raises:
      UsageError: `points` is no such list, or a key is also set outside of it.
    """
    written = [[f"{key}={override_text(value)}" for key, value in point.items()] for point in _checked(points)]
    if not written:
        return [list(job) for job in jobs]
    zipped_keys = {_name(text) for point in written for text in point}
    for text in (text for job in jobs for text in job):
        if _name(text) in zipped_keys:
            raise UsageError(f"'{_name(text)}' is set both by {KEY} and by '{text}'; set it in one place")
    return [[*job, *point] for point in written for job in jobs]


def override_text(value: Any) -> str:
    """`value`, of YAML's types, as the right-hand side of a Hydra override, which reads back as the same value."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list):
        return f"[{','.join(map(override_text, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}:{override_text(item)}' for key, item in value.items())}}}"
    text = str(value)
    if _BARE.fullmatch(text) and not _NOT_TEXT.fullmatch(text):
        return text
    from hydra.core.override_parser.types import Quote, QuotedString

    return QuotedString(text, Quote.single).with_quotes()


def _checked(points: Any) -> list[dict[str, Any]]:
    if points is None:
        return []
    if not isinstance(points, list):
        raise UsageError(f"{KEY} must be a list of points such as {EXAMPLE}, got '{points}'")
    for point in points:
        if not isinstance(point, dict) or not point:
            raise UsageError(f"each point of {KEY} must be keys with values, as in {EXAMPLE}; got '{point}'")
        if bad := next((key for key in point if str(key).startswith(("hydra.", "hydra/"))), None):
            raise UsageError(f"{KEY} cannot set '{bad}': Hydra's own keys are the same for all jobs")
    return points


def _name(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")
