"""Builds sweep folders like those a sweep writes, for the tests of reports."""

import json
from pathlib import Path
from typing import Any

CHOICES = {
    "data": "digits",
    "student": "mlp",
    "teacher": "mlp",
    "loss": "kd",
    "compression": "none",
    "scheme": "offline",
    "optim": "adam",
}
LOSSES: dict[str, dict[str, Any]] = {
    "none": {"name": "none", "weight": 1.0},
    "kd": {"name": "kd", "temperature": 4.0, "weight": 1.0},
    "dkd": {"name": "dkd", "alpha": 1.0, "beta": 8.0, "weight": 1.0},
}


def result(
    seed: int, accuracy: float, overrides: list[str] | None = None, loss: str = "kd", **change: Any
) -> dict[str, Any]:
    """The content of a finished run's result.json; `change` replaces dotted keys written with `__`."""
    config = {
        "seed": seed,
        "loss": dict(LOSSES[loss]),
        "student": {"name": "mlp", "widths": [64, 64]},
        "epochs": 20,
        "teacher": {"name": "mlp", "seed": seed},
        "output_dir": f"runs/{loss}/{seed}",
    }
    record: dict[str, Any] = {
        "status": "finished",
        "error": None,
        "fingerprint": f"{loss}{seed}{accuracy}",
        "choices": {**CHOICES, "loss": loss},
        "config": config,
        "overrides": [f"loss={loss}", f"seed={seed}"] if overrides is None else overrides,
        "metrics": {
            "test": {"accuracy": accuracy, "cross_entropy": 2 * (1 - accuracy), "teacher_agreement": 0.9},
            "validation": {"accuracy": accuracy + 0.01},
        },
        "report": "last",
        "epoch": 20,
        "size": {"parameters": 2410, "nonzero": 2410, "bytes": 9900, "sha256": "0"},
        "latency_ms": {"1": {"p50": 0.05, "p90": 0.06}, "256": {"p50": 0.2, "p90": 0.3}},
        "time_s": {"total": 1.2, "train": 0.5},
        "steps": 440,
        "teacher": {"hash": "t", "metrics": {"test": {"accuracy": 0.97}}, "parameters": 50000, "bytes": 200000},
        "environment": {"jax": "0.10.2", "device": "cpu", "machine": "box", "commit": "abcdef", "dirty": False},
    }
    for name, value in change.items():
        *parents, last = name.split("__")
        inner = record
        for parent in parents:
            inner = inner[parent]
        inner[last] = value
    return record


def failure(seed: int, error: str, loss: str = "kd", status: str = "failed") -> dict[str, Any]:
    full = result(seed, 0.0, loss=loss)
    return {"status": status, "error": error, **{k: full[k] for k in ("fingerprint", "choices", "config", "overrides")}}


def write_run(folder: Path, record: dict[str, Any], curve: list[dict[str, Any]] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").write_text(json.dumps(record))
    if curve is not None:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in curve))
    return folder


def write_sweep(folder: Path, records: list[dict[str, Any]]) -> Path:
    """A sweep folder with one job a record; records of status running or pending get no result.json."""
    lines = []
    for job, record in enumerate(records):
        name = f"run{job:02d}"
        lines.append(
            {
                "job": job,
                "dir": name,
                "overrides": record["overrides"],
                "status": record["status"],
                "error": record.get("error"),
            }
        )
        if record["status"] not in ("running", "pending"):
            write_run(folder / name, record)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "jobs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def small_sweep(folder: Path) -> Path:
    """Three losses, three seeds: the baseline, one better, and one of which a seed failed."""
    accuracies = {"none": [0.90, 0.91, 0.92], "kd": [0.92, 0.94, 0.93], "dkd": [0.93, 0.95]}
    records = [result(seed, a, loss=loss) for loss, values in accuracies.items() for seed, a in enumerate(values)]
    return write_sweep(folder, [*records, failure(2, "out of memory", loss="dkd")])
