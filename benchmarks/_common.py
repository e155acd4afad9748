"""What the benchmarks share: the command in processes of its own, its results, PyTorch students, tables."""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
TORCH_STUDENTS = HERE / "_torch_students.py"


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def keep_to(threads: int) -> None:
    """Keeps this process to so many cores and threads; to be called before JAX or NumPy is imported."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    os.environ |= {"OMP_NUM_THREADS": str(threads), "JAX_PLATFORMS": "cpu"}
    if threads == 1:
        os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"


def processor_seconds() -> float:
    """Processor time that this program's child processes have used and ended with."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def machine() -> dict[str, Any]:
    """Versions, processor, commit, and the load before the benchmark."""
    from jdistill.environment import environment

    return {**environment(), "cores": cores(), "load": os.getloadavg()[0]}


def options(doc: str | None) -> argparse.ArgumentParser:
    """A parser that describes itself by the first line of a script's docstring, with `--out`."""
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, help="write the numbers to this file, as JSON")
    return parser


def names(allowed: Sequence[str]) -> Any:
    """An argument type: a comma-separated choice of `allowed`."""

    def parse(text: str) -> list[str]:
        chosen = text.split(",")
        if wrong := [name for name in chosen if name not in allowed]:
            raise argparse.ArgumentTypeError(f"'{wrong[0]}' is none of {', '.join(allowed)}")
        return chosen

    return parse


def report(numbers: dict[str, Any], out: Path | None) -> None:
    """Writes `numbers` with what they were measured on, where asked for."""
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({**numbers, "machine": machine()}, indent=2) + "\n")


@contextmanager
def workplace(given: Path | None) -> Iterator[Path]:
    """The folder to work in: `given`, which is kept, or a temporary one."""
    if given is not None:
        given.mkdir(parents=True, exist_ok=True)
        yield given.resolve()
        return
    with tempfile.TemporaryDirectory(prefix="jdistill-benchmark-") as folder:
        yield Path(folder)


def fresh(folder: Path) -> Path:
    """The folder, without what an earlier benchmark left there."""
    shutil.rmtree(folder, ignore_errors=True)
    return folder


def finish(command: Sequence[str], environment: dict[str, str] | None = None, cwd: Path | None = None) -> tuple[float, str]:
    """Runs a command to its end; its wall time in seconds and its standard output. Ends this program if it fails."""
    started = time.perf_counter()
    done = subprocess.run(command, env=os.environ | (environment or {}), cwd=cwd, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - started
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\nended with code {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return seconds, done.stdout


def jdistill(*arguments: str) -> list[str]:
    """The command line of `jdistill` with the Python that runs this."""
    return [sys.executable, "-m", "jdistill", *arguments]


def results(sweep: Path) -> list[dict[str, Any]]:
    """The results of a sweep's finished jobs."""
    found = [json.loads(path.read_text()) for path in sorted(sweep.glob("*/result.json"))]
    return [result for result in found if result["status"] == "finished"]


def arrays_of(dataset: Any, logits: np.ndarray) -> dict[str, np.ndarray]:
    """The arrays that a PyTorch student reads.

    `inputs` uint8 [N, H, W, C], `label` [N], `logits` float32 [N, K] of the teacher, `test_inputs`, `test_label`, and
    `mean`, `std` of pixels in [0, 1].
    """
    return {
        "inputs": dataset.train["inputs"],
        "label": dataset.train["label"].astype(np.int64),
        "logits": logits,
        "test_inputs": dataset.test["inputs"],
        "test_label": dataset.test["label"].astype(np.int64),
        "mean": np.asarray(dataset.mean, np.float32),
        "std": np.asarray(dataset.std, np.float32),
    }


def taught(result: dict[str, Any]) -> dict[str, np.ndarray]:
    """`arrays_of` the data and the teacher of the run that left `result`."""
    from jdistill import blueprint as blueprints
    from jdistill.teachers.store import prepare

    blueprint = blueprints.read(result["config"])
    return arrays_of(blueprint.dataset, np.asarray(prepare(blueprint, frozenset()).arrays.logits))


def torch_students(
    python: str, network: str, students: Sequence[dict[str, Any]], data: Path, folder: Path, *,
    epochs: int, batch: int, device: str = "cpu", processes: int | None = None,
) -> tuple[float, list[float]]:  # fmt: skip
    """Trains students in PyTorch; wall time in seconds, and their test accuracies in order.

    `processes`: so many at a time, one for each student, with one thread each on a CPU; None: one loop in one process.
    """
    folder.mkdir(parents=True, exist_ok=True)

    def start(number: int, some: Sequence[dict[str, Any]]) -> list[float]:
        out = folder / f"{number}.json"
        command = [python, str(TORCH_STUDENTS), "--network", network, "--data", str(data), "--out", str(out)]
        command += ["--epochs", str(epochs), "--batch", str(batch), "--device", device, "--students", json.dumps(some)]
        finish(command, {"OMP_NUM_THREADS": "1"} if processes else {})
        return json.loads(out.read_text())["accuracy"]

    started = time.perf_counter()
    if processes is None:
        accuracies = start(0, students)
    else:
        with ThreadPoolExecutor(processes) as pool:
            ended = list(pool.map(lambda pair: start(pair[0], [pair[1]]), enumerate(students)))
        accuracies = [accuracy for some in ended for accuracy in some]
    return time.perf_counter() - started, accuracies


def has_torch(python: str) -> bool:
    """Whether that Python can import PyTorch."""
    return subprocess.run([python, "-c", "import torch"], capture_output=True, check=False).returncode == 0


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints columns, the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    for row in (head, *rows):
        cells = [cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths))]
        print("  ".join(cells).rstrip(), flush=True)
