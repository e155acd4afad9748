"""Errors a user sees as one line: `UsageError` (exit code 2) and `RunError` (exit code 1)."""

import difflib
import os
from collections.abc import Iterable


class UsageError(ValueError):
    """The request is wrong: a key, an option, a value, a missing file. Raised before any long work; exit code 2."""


class RunError(RuntimeError):
    """A run that started could not finish (diverged, corrupt file found on the way, disk full); exit code 1."""


def from_system(error: OSError, where: str | os.PathLike[str]) -> RunError:
    """One line for what the system refused: the file it names, or `where`, and its reason."""
    return RunError(f"{error.filename or where}: {error.strerror or error}")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`"; did you mean 'temperature'?"` where a known word is close to `word`, else an empty string."""
    close = difflib.get_close_matches(str(word), [str(k) for k in known], n=1, cutoff=0.6)
    return f"; did you mean '{close[0]}'?" if close else ""


def unknown(kind: str, word: str, known: Iterable[str]) -> UsageError:
    """The error for a name that does not exist: what was found, what exists, the nearest one."""
    known = sorted(known)
    return UsageError(f"unknown {kind} '{word}'{did_you_mean(word, known)} (known: {', '.join(known)})")
