"""Hydra's and OmegaConf's errors as one line that says what was found, what was expected, and the nearest name."""

import re

from jdistill.errors import UsageError, did_you_mean

_OPTION = re.compile(r"Could not find '([\w/@.]+)/([^'/]+)'")
_VALUE = re.compile(r"Value '(.*?)'(?: of type '\w+')? (?:could not be converted to|is not a valid|cannot be) ?(.*?)$", re.M)
_KEY = re.compile(r"full_key: (\S+)")


def explain(error: Exception) -> UsageError:
    """The `UsageError` that says what `error` says, in one line."""
    causes = _chain(error)
    text = "\n".join(str(e) for e in causes)
    if found := _OPTION.search(text):
        return _unknown_option(found[1], found[2], text)
    for cause in causes:
        key = getattr(cause, "full_key", None) or next(iter(_KEY.findall(str(cause))), None)
        parent = getattr(cause, "parent_node", None)
        if (key and "is not in struct" in str(cause)) or (key and "not in '" in str(cause)):
            known = [str(k) for k in parent] if parent is not None and hasattr(parent, "keys") else []
            return _unknown_key(str(key), known)
        if "is not a ListConfig" in str(cause) and key:
            return UsageError(f"{key} must be a list such as [1,2], got {_given(text)}")
        if "is not Optional" in str(cause) and key:
            return UsageError(f"{key} must have a value, got null")
        if value := _VALUE.search(str(cause)):
            kind = {"Float": "a number", "Integer": "an integer", "bool": "true or false"}.get(
                value[2].partition(" (")[0].strip("'\". "), value[2]
            )
            return UsageError(f"{key} must be {kind}, got '{value[1]}'")
    if found := re.search(r"Ambiguous value for argument '([^']+)'", text):
        return UsageError(f"{found[1]} gives several values to a single run; add -m to run them all, or write [..] for a list")
    if found := re.search(r"Could not override '([^']+)'", text):
        return _unknown_key(found[1], [])
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return UsageError("; ".join(lines[:3]))


def _given(text: str) -> str:
    found = re.search(r"Error merging override [^=\s]+=(.*)", text)
    return f"'{found[1]}'" if found else "something else"


def _chain(error: BaseException | None) -> list[BaseException]:
    out = []
    while error is not None and error not in out:
        out.append(error)
        error = error.__cause__ or error.__context__
    return out


def _unknown_option(group: str, name: str, text: str) -> UsageError:
    listed = text.partition("Available options in")[2].partition("Config search path")[0]
    known = sorted({line.strip() for line in listed.splitlines()[1:] if line.startswith("\t")})
    names = f" (known: {', '.join(known)})" if known else ""
    return UsageError(f"{group}={name}: no such option{did_you_mean(name, known)}{names}")


def _unknown_key(key: str, known: list[str]) -> UsageError:
    last = key.rsplit(".", 1)[-1]
    from jdistill.config import TrainConfig

    if not known and "." not in key:
        known = list(TrainConfig.__dataclass_fields__)
    names = f" (known: {', '.join(sorted(known))})" if known else "; jdistill --cfg job shows all keys"
    return UsageError(f"unknown key '{key}'{did_you_mean(last, known)}{names}")
