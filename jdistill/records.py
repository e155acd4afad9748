"""What a run writes while it goes: `metrics.jsonl` and the trackers that mirror it."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jdistill.checkpoint import finite
from jdistill.errors import RunError, UsageError
from jdistill.registry import register

Listener = Callable[[dict[str, Any]], None]


class MetricsFile:
    """One JSON line an evaluation, null for NaN and infinity. No clock times, so that a resumed run writes the same bytes."""

    def __init__(self, path: Path, listeners: tuple[Listener, ...] = ()):
        self.path, self.listeners = path, listeners

    def append(self, row: dict[str, Any]) -> int:
        """Writes `row`, tells the trackers; returns the length of the file in bytes."""
        with self.path.open("a") as file:
            file.write(json.dumps(finite(row), allow_nan=False) + "\n")
            length = file.tell()
        for listener in self.listeners:
            listener(row)
        return length

    def sync(self) -> None:
        """Makes sure that what was written is on disk: a checkpoint is about to count on it."""
        if self.path.exists():
            with self.path.open("ab") as file:
                os.fsync(file.fileno())

    def truncate(self, length: int, checkpoint: Path | None = None) -> None:
        """Forgets what was written after `length` bytes: rows past the `checkpoint` a run continues from."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            if file.tell() < length:
                raise RunError(f"{self.path} is shorter than its checkpoint says; delete {checkpoint} to begin anew")
            file.truncate(length)

    def last(self) -> dict[str, Any]:
        """The last row, or an empty one."""
        lines = self.path.read_text().splitlines()
        return json.loads(lines[-1]) if lines else {}


class Discard(MetricsFile):
    """For a member whose records are complete, and which is only trained along with others."""

    def __init__(self) -> None:
        super().__init__(Path(os.devnull))

    def append(self, row: dict[str, Any]) -> int:
        del row
        return 0

    def sync(self) -> None:
        pass

    def truncate(self, length: int, checkpoint: Path | None = None) -> None:
        del length, checkpoint

    def last(self) -> dict[str, Any]:
        return {}


class Tracker:
    """A destination of a run's numbers beside `metrics.jsonl`."""

    def start(self, folder: Path, name: str, config: dict[str, Any]) -> Listener | None:
        """Called once a run; returns what is called with every row, or None."""
        del folder, name, config
        return None

    def finish(self, result: dict[str, Any]) -> None:
        """Called with the run's result."""
        del result


@register("tracker", "jsonl")
class Jsonl(Tracker):
    """Only the run folder's own `metrics.jsonl` and `result.json`."""


def flatten(row: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """`{"train/loss": 0.1, ...}`: the numbers of nested dicts."""
    flat: dict[str, float] = {}
    for key, value in row.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            flat[f"{prefix}{key}"] = value
    return flat


@register("tracker", "tensorboard")
class TensorBoard(Tracker):
    """Event files in the run folder's `tensorboard/` (extra `tensorboard`)."""

    def start(self, folder: Path, name: str, config: dict[str, Any]) -> Listener:
        self._writer = _require("tensorboardX", "tensorboard").SummaryWriter(str(folder / "tensorboard"))

        def listen(row: dict[str, Any]) -> None:
            for key, value in flatten({k: v for k, v in row.items() if k not in ("epoch", "step")}).items():
                self._writer.add_scalar(key, value, row["step"])

        return listen

    def finish(self, result: dict[str, Any]) -> None:
        for key, value in flatten({k: result[k] for k in ("metrics", "size") if k in result}).items():
            self._writer.add_scalar(f"result/{key}", value, result.get("steps", 0))
        self._writer.close()


@register("tracker", "wandb")
class WandB(Tracker):
    """Weights & Biases (extra `wandb`); `tracker.mode=offline` writes to the run folder for a later `wandb sync`."""

    def __init__(self, project: str = "jdistill", mode: str = "online"):
        if mode not in ("online", "offline"):
            raise UsageError(f"mode must be online or offline, got '{mode}'")
        self.project, self.mode = project, mode

    def start(self, folder: Path, name: str, config: dict[str, Any]) -> Listener:
        wandb = _require("wandb", "wandb")
        self._run = wandb.init(
            project=self.project, name=name, dir=str(folder), config=config, mode=self.mode, reinit="finish_previous"
        )
        return lambda row: self._run.log(flatten(row), step=row["step"])

    def finish(self, result: dict[str, Any]) -> None:
        self._run.summary.update(flatten({k: result[k] for k in ("metrics", "size") if k in result}))
        self._run.finish()


@register("tracker", "mlflow")
class MLflow(Tracker):
    """MLflow (extra `mlflow`); `tracker.uri` names the store, by default a SQLite file in the working folder."""

    def __init__(self, experiment: str = "jdistill", uri: str = "sqlite:///mlflow.db"):
        self.experiment, self.uri = experiment, uri

    def start(self, folder: Path, name: str, config: dict[str, Any]) -> Listener:
        mlflow = _require("mlflow", "mlflow")
        mlflow.set_tracking_uri(self.uri)
        mlflow.set_experiment(self.experiment)
        self._mlflow = mlflow
        mlflow.start_run(run_name=name)
        mlflow.log_params({k: str(v)[:500] for k, v in _leaves(config).items()})

        def listen(row: dict[str, Any]) -> None:
            mlflow.log_metrics(flatten({k: v for k, v in row.items() if k != "step"}), step=row["step"])

        return listen

    def finish(self, result: dict[str, Any]) -> None:
        self._mlflow.log_metrics(flatten({k: result[k] for k in ("metrics", "size") if k in result}))
        self._mlflow.end_run("FINISHED" if result.get("status") == "finished" else "FAILED")


def _leaves(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _require(module: str, extra: str) -> Any:
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UsageError(f"tracker={extra} needs {module}, which is not installed: pip install 'jdistill[{extra}]'") from error
