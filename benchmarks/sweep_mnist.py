"""64 students of MNIST (seeds x temperatures x weights): a population against other launchers and against PyTorch.

    python benchmarks/sweep_mnist.py [--torch-python PATH] [--sides population,basic-off,...] [--students 64] [--out FILE]

Each student: MLP 784-64-10, knowledge distillation from one cached teacher plus cross-entropy, Adam at 1e-3, batch 128,
2 epochs of MNIST's 60,000 training images, accuracy on its 10,000 test images. Every side is timed from the start of
its command to its end, with an empty cache of compiled programs; the teacher is trained before. The sides:

  population       jdistill -m, as it comes
  population-warm  the same, with the compiled programs of an earlier sweep in the cache
  basic-off        Hydra's basic launcher: one process, one job after another, each compiled anew (as where hyperparameters
                   are constants of the program), JAX's compilation cache off
  basic-on         the same, the compilation cache on: a job that needs a program already in the cache reads it there
  basic-shared     Hydra's basic launcher as it comes: jobs in one process share what was compiled
  joblib           Hydra's joblib launcher with 2 processes, as it comes
  torch-processes  PyTorch, a process a student, two at a time, a thread each
  torch-loop       PyTorch, one process, one student after another, all cores

The mean test accuracies of the sides must agree within one percentage point. The arithmetic bound is the time that the
trainings' matrix products alone take on all cores: at the rate of a large product, and at the rate of these very shapes.
Needs $JDISTILL_DATA with MNIST, hydra-joblib-launcher, and torch (in this Python, or in that of --torch-python).
"""

import argparse
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from _common import (
    HERE,
    cores,
    finish,
    fresh,
    has_torch,
    jdistill,
    names,
    options,
    processor_seconds,
    report,
    results,
    table,
    taught,
    torch_students,
    workplace,
)

BATCH, EPOCHS, WIDTHS, EXAMPLES, TEST = 128, 2, (784, 64, 10), 60_000, 10_000
STUDENT = (
    "data=mnist", "data.validation=0", "student=mlp", "student.widths=[64]", "teacher=mlp", "teacher.optim.epochs=2",
    "teacher.optim.batch_size=128", "loss=kd", f"optim.batch_size={BATCH}", "evaluate.latency=false",
)  # fmt: skip
TEMPERATURES, WEIGHTS = (1, 2, 4, 8), (0.25, 0.5, 1, 2)
BASIC = ("hydra/sweeper=basic", "hydra/launcher=basic")
ANEW = "+hydra.callbacks.recompile._target_=_recompile.Recompile"
CACHE_OFF = {"JAX_ENABLE_COMPILATION_CACHE": "false"}
LAUNCHERS: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {
    "population": ((), {}),
    "population-warm": ((), {}),
    "basic-off": ((*BASIC, ANEW), CACHE_OFF),
    "basic-on": ((*BASIC, ANEW), {}),
    "basic-shared": (BASIC, {}),
    "joblib": (("hydra/sweeper=basic", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"), {}),
}
SIDES = (*LAUNCHERS, "torch-processes", "torch-loop")
Side = Callable[[], list[float]]
"""Trains all students of a side; their test accuracies."""


def grid(students: int) -> tuple[list[int], tuple[int, ...], tuple[float, ...]]:
    """Seeds, temperatures and weights of a cube of `students` points."""
    side = round(students ** (1 / 3))
    return list(range(side)), TEMPERATURES[:side], WEIGHTS[:side]


def listed(values: Any) -> str:
    return ",".join(map(str, values))


def ours(side: str, students: int, folder: Path) -> Side:
    """A side that is a jdistill command."""
    given, environment = LAUNCHERS[side]
    seeds, temperatures, weights = grid(students)
    command = jdistill(
        "-m", *STUDENT, f"optim.epochs={EPOCHS}", f"cache={folder / 'cache'}", *given,
        f"seed={listed(seeds)}", f"loss.temperature={listed(temperatures)}", f"loss.weight={listed(weights)}",
    )  # fmt: skip
    environment = environment | {
        "PYTHONPATH": os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH")))),
        "JAX_COMPILATION_CACHE_DIR": str(fresh(folder / f"compiled-{side}")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }

    def run(name: str = side) -> list[float]:
        finish([*command, f"hydra.sweep.dir={fresh(folder / name)}"], environment, folder)
        return [result["metrics"]["test"]["accuracy"] for result in results(folder / name)]

    if side == "population-warm":
        run("warming")
    return run


def torchs(side: str, students: int, folder: Path, python: str) -> Side:
    """A side in PyTorch."""
    points = itertools.product(*grid(students))
    tasks = [dict(zip(("seed", "temperature", "weight"), point)) for point in points]
    processes = 2 if side == "torch-processes" else None
    given: dict[str, Any] = {"epochs": EPOCHS, "batch": BATCH, "processes": processes}
    return lambda: torch_students(python, "mlp", tasks, folder / "data.npz", folder / side, **given)[1]


def measure(run: Side, students: int) -> dict[str, float]:
    """Wall time, processor time a second of it, and mean accuracy of a side."""
    before, started = processor_seconds(), time.perf_counter()
    accuracies = run()
    seconds = time.perf_counter() - started
    if len(accuracies) != students:
        raise SystemExit(f"{len(accuracies)} of {students} students finished")
    used = (processor_seconds() - before) / seconds
    return {"seconds": seconds, "cores": used, "accuracy": statistics.mean(accuracies)}


def prepare(folder: Path) -> None:
    """Trains the teacher, and writes what the PyTorch students read."""
    cache = f"cache={folder / 'cache'}"
    finish(jdistill(*STUDENT, cache, "optim.epochs=1", f"hydra.run.dir={fresh(folder / 'first')}"), cwd=folder)
    result = json.loads((folder / "first" / "result.json").read_text())
    np.savez(folder / "data.npz", **taught(result))  # type: ignore[arg-type]


def products() -> list[tuple[int, int, int]]:
    """The matrix products (rows, inner, columns) of one step of one student: forward, weights' and inputs' gradients."""
    pairs = list(itertools.pairwise(WIDTHS))
    forward = [(BATCH, a, b) for a, b in pairs]
    return forward + [(a, BATCH, b) for a, b in pairs] + [(BATCH, b, a) for a, b in pairs[1:]]


def seconds_of(rows: int, inner: int, columns: int, copies: int) -> float:
    """Seconds of `copies` float32 products of one shape in one call of JAX on all cores; the median of 5."""
    import jax
    import jax.numpy as jnp

    left, right = jnp.ones((copies, rows, inner)), jnp.ones((copies, inner, columns))
    call = jax.jit(jnp.matmul)
    times = []
    for _ in range(6):  # the first compiles
        started = time.perf_counter()
        call(left, right).block_until_ready()
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def bounds(students: int) -> dict[str, float]:
    """Floating-point operations of all trainings and tests, and seconds that their products alone take."""
    steps = EXAMPLES // BATCH * EPOCHS
    of_step = sum(2 * a * b * c for a, b, c in products())
    of_test = sum(2 * TEST * a * b for a, b in itertools.pairwise(WIDTHS))
    flops = students * (steps * of_step + of_test)
    rate = 2 * 2048**3 / seconds_of(2048, 2048, 2048, 1)
    share = 1 + of_test / (steps * of_step)
    same = sum(seconds_of(*shape, copies=64) / 64 for shape in products()) * steps * students * share
    return {"flops": flops, "gflops_per_second": rate / 1e9, "large": flops / rate, "same_shapes": same}


def show(rows: dict[str, dict[str, Any]], bound: dict[str, float], students: int) -> None:
    first = rows.get("population")
    table(
        ("side", "seconds", "a student", "cores used", "accuracy", "to population"),
        [
            (side, f"{row['seconds']:.1f}", f"{row['seconds'] / students:.2f}", f"{row['cores']:.2f}", f"{row['accuracy']:.2%}",
             f"{row['seconds'] / first['seconds']:.2f}x" if first else "")
            for side, row in rows.items()
        ],
    )  # fmt: skip
    print(
        f"matrix products of all {students} trainings and tests: {bound['flops'] / 1e12:.2f} TFLOP; on {cores()} cores "
        f"{bound['large']:.1f} s at the rate of a large product ({bound['gflops_per_second']:.0f} GFLOP/s), "
        f"{bound['same_shapes']:.1f} s at that of their own shapes"
    )
    for side, row in rows.items():
        shares = ", ".join(f"{bound[name] / row['seconds']:.0%} ({name})" for name in ("large", "same_shapes"))
        print(f"  {side}: share of its wall time that the products need: {shares}")
    if first and "torch-processes" in rows:
        seconds = rows["torch-processes"]["seconds"]
        print(
            f"PyTorch processes / population: {seconds / first['seconds']:.1f}x; arithmetic alone allows "
            f"{seconds / bound['large']:.1f}x (large) or {seconds / bound['same_shapes']:.1f}x (own shapes)"
        )


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--sides", type=names(SIDES), default=list(SIDES), help="comma-separated")
    parser.add_argument("--students", type=int, choices=(1, 8, 27, 64), default=64)
    parser.add_argument("--torch-python", default=sys.executable, help="a Python that has torch")
    parser.add_argument("--folder", type=Path, help="work here and keep it (default: a temporary folder)")
    given: argparse.Namespace = parser.parse_args()
    if any(side.startswith("torch") for side in given.sides) and not has_torch(given.torch_python):
        raise SystemExit(f"{given.torch_python} has no torch: pip install torch, or --torch-python PATH, or --sides")
    rows: dict[str, dict[str, Any]] = {}
    with workplace(given.folder) as folder:
        prepare(folder)
        bound = bounds(given.students)
        for side in given.sides:
            if side in LAUNCHERS:
                run = ours(side, given.students, folder)
            else:
                run = torchs(side, given.students, folder, given.torch_python)
            rows[side] = measure(run, given.students)
            print(f"{side}: {rows[side]['seconds']:.1f} s", file=sys.stderr, flush=True)
    show(rows, bound, given.students)
    report({"students": given.students, "sides": rows, "bound": bound}, given.out)
    found = [row["accuracy"] for row in rows.values()]
    if max(found) - min(found) > 0.01:
        raise SystemExit(f"the sides did not do the same work: mean accuracies {min(found):.2%} to {max(found):.2%}")


if __name__ == "__main__":
    main()
