"""Jobs of small synthetic runs, without Hydra."""

from pathlib import Path
from typing import Any

from jdistill.blueprint import Blueprint, read
from jdistill.config import fingerprint
from jdistill.sweep.units import Job
from tests.tiny import config

SMALL = (
    ("data.examples", 120), ("student.widths", [6]), ("teacher.widths", [8]), ("optim.epochs", 2), ("optim.batch_size", 16),
    ("optim.lr", 0.01), ("teacher.optim.epochs", 1), ("teacher.optim.batch_size", 16), ("evaluate.latency", False),
)  # fmt: skip


def job(folder: Path, number: int, *changes: tuple[str, Any], **choices: str) -> Job:
    """Job `number` of the sweep in `folder`, in the folder of its fingerprint."""
    own = config(*SMALL, ("cache", str(folder.parent / "cache")), *changes, **choices)
    texts = tuple(f"{key}={value}" for key, value in changes)
    return Job(number, texts, own, {"loss": own["loss"]["name"]}, folder.absolute() / fingerprint(own))


def jobs(folder: Path, *each: tuple[tuple[str, Any], ...], **choices: str) -> list[Job]:
    """A job for each tuple of changes."""
    return [job(folder, number, *changes, **choices) for number, changes in enumerate(each)]


def blueprints(made: list[Job]) -> list[Blueprint]:
    return [read(job.config) for job in made]
