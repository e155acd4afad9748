"""Calls the command in this process or in one of its own, and reads what it wrote."""

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from jdistill.report.collect import read_jobs

TINY = (
    "data.limit=256", "student.widths=[16]", "teacher.widths=[32]", "optim.epochs=2", "optim.batch_size=32",
    "teacher.optim.epochs=2", "teacher.optim.batch_size=32", "evaluate.latency=false",
)  # fmt: skip
"""A run of 16 steps and a teacher of 16 steps."""


class Done(NamedTuple):
    """What a command left: its exit code and what it printed."""

    code: int
    out: str
    err: str

    @property
    def error_lines(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith("jdistill: error: ")]


def call(*arguments: str) -> Done:
    """The command in this process: quick, as JAX is imported already."""
    from hydra.core.global_hydra import GlobalHydra

    from jdistill.cli import main
    from jdistill.teachers import store

    store._ready.cache_clear()  # a new process has no teacher in memory
    GlobalHydra.instance().clear()
    argv, handlers = sys.argv, {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    out, err, code = io.StringIO(), io.StringIO(), None
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main(list(arguments))
    except SystemExit as end:
        code = end.code
    finally:
        sys.argv = argv
        for number, handler in handlers.items():
            signal.signal(number, handler)
        GlobalHydra.instance().clear()
    assert isinstance(code, int)
    return Done(code, out.getvalue(), err.getvalue())


def succeed(*arguments: str) -> Done:
    """`call`, which must end with exit code 0."""
    done = call(*arguments)
    assert done.code == 0, done.err
    return done


def run(folder: Path, *arguments: str) -> dict[str, Any]:
    """One finished run in `folder`: its result."""
    succeed(*arguments, f"hydra.run.dir={folder}")
    return result(folder)


def start(*arguments: str, cwd: Path, **environment: str) -> "subprocess.Popen[str]":
    """The command in a process of its own, with its output in pipes."""
    return subprocess.Popen(
        [sys.executable, "-m", "jdistill", *arguments], cwd=cwd, env={**os.environ, **environment}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def finish(process: "subprocess.Popen[str]", timeout: float = 300) -> Done:
    """Waits for a process of `start`."""
    out, err = process.communicate(timeout=timeout)
    return Done(process.returncode, out, err)


def result(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "result.json").read_text())


def jobs(sweep: Path) -> list[dict[str, Any]]:
    return read_jobs(sweep)


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def teachers(cache: Path) -> list[Path]:
    """Folders of the finished teachers in a cache."""
    return sorted(path.parent for path in (cache / "teachers").glob("*/manifest.json") if ".partial" not in str(path))


def files(folder: Path) -> set[str]:
    """All files below a folder, by their paths in it."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def names(text: str) -> list[str]:
    """The first column of a list printed to no terminal."""
    return [line.partition("\t")[0] for line in text.splitlines()]


def sole_error(done: Done, pattern: str, code: int) -> str:
    """The one line on standard error, which must match `pattern`; no traceback, the exit code `code`."""
    assert done.code == code, done
    assert "Traceback" not in done.err + done.out
    lines = done.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("jdistill: error: "), done.err
    assert re.search(pattern, lines[0]), f"{lines[0]!r} does not match {pattern!r}"
    return lines[0]


def saved_step(folder: Path) -> int:
    """The step of the newest checkpoint of a run (or teacher) in `folder`; -1 where there is none."""
    found = [re.fullmatch(r"(\d+)-(\d+)(?:-\d+)?", path.name) for path in (folder / "checkpoints").glob("*")]
    return max((int(match[2]) for match in found if match), default=-1)


def until(process: "subprocess.Popen[str]", condition: Callable[[], Any], timeout: float = 120) -> bool:
    """Waits for `condition()`; False if the process ended before."""
    deadline = time.monotonic() + timeout
    while not condition():
        if process.poll() is not None:
            return False
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.002)
    return True
