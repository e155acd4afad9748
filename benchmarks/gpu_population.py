"""Students of CIFAR-100 (resnet8x4) on a GPU: a population under vmap, one after another, and PyTorch processes.

    python benchmarks/gpu_population.py [--torch-python PATH] [--students 8] [--limit 12800] [--out FILE]

Each student: resnet8x4, knowledge distillation from given logits plus cross-entropy, Adam at 1e-3, batch 64, 2 epochs of
`--limit` training images of CIFAR-100, accuracy on the 10,000 test images. The sides, each timed from the start of its
command to its end, with an empty cache of compiled programs:

  vmap             jdistill -m hydra.launcher.strategy=vmap: all students in each step
  vmap-warm        the same, with the compiled programs of an earlier sweep in the cache
  loop             jdistill -m hydra.launcher.strategy=loop: one after another, in one process
  torch-processes  PyTorch (eager), a process a student, `--processes` at a time
  torch-loop       PyTorch, one process, one student after another

The images are random arrays in CIFAR-100's file layout and the teacher's logits random numbers, unless $JDISTILL_DATA has
CIFAR-100: no time depends on them. Does nothing where JAX has no GPU. PyTorch's sides need torch with CUDA.
"""

import argparse
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from _common import (
    arrays_of,
    finish,
    fresh,
    has_torch,
    jdistill,
    names,
    options,
    report,
    results,
    table,
    torch_students,
    workplace,
)

BATCH, EPOCHS, TRAIN, TEST, CLASSES = 64, 2, 50_000, 10_000, 100
STRATEGIES = {"vmap": "vmap", "vmap-warm": "vmap", "loop": "loop"}
SIDES = (*STRATEGIES, "torch-processes", "torch-loop")
TEMPERATURE, WEIGHT = 4, 0.5
ON_GPU = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}


def device() -> str:
    """Kind of JAX's first device where it is a GPU, else nothing. Asked in a process of its own, which frees it again."""
    code = "import jax; d = jax.devices()[0]; print(d.device_kind if d.platform == 'gpu' else '')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    return done.stdout.strip()


def images(folder: Path) -> dict[str, Any]:
    """The keys of `data=cifar100` that name the images: CIFAR-100 where it is there, else random ones, written now."""
    root = os.environ.get("JDISTILL_DATA")
    if root and (Path(root) / "cifar-100-binary" / "train.bin").is_file():
        return {"root": root}
    random = np.random.default_rng(0)
    (folder / "cifar-100-binary").mkdir(exist_ok=True)
    for name, rows in (("train", TRAIN), ("test", TEST)):
        records = random.integers(0, 256, (rows, 2 + 3 * 32 * 32), np.uint8)
        records[:, 1] = np.arange(rows) % CLASSES
        records[:, 0] = records[:, 1] // 5  # the coarse label
        (folder / "cifar-100-binary" / f"{name}.bin").write_bytes(records.tobytes())
    return {"root": str(folder), "verify": False}


def prepare(folder: Path, limit: int) -> tuple[str, ...]:
    """Writes logits and what the PyTorch students read; returns the overrides of a student."""
    from jdistill.data import cifar100

    data = {**images(folder), "validation": 0.0, "limit": limit}
    dataset = cifar100(**data)
    logits = np.random.default_rng(1).standard_normal((TRAIN, CLASSES)).astype(np.float32)
    np.savez(folder / "logits.npz", ids=np.arange(TRAIN), logits=logits)
    np.savez(folder / "data.npz", **arrays_of(dataset, logits[dataset.train["index"]]))  # type: ignore[arg-type]
    return (
        "data=cifar100", *(f"data.{key}={value}" for key, value in data.items()), "student=resnet8x4", "teacher=logits",
        f"teacher.path={folder / 'logits.npz'}", "loss=kd", f"loss.temperature={TEMPERATURE}", f"loss.weight={WEIGHT}",
        f"optim.batch_size={BATCH}", f"optim.epochs={EPOCHS}", "evaluate.latency=false",
    )  # fmt: skip


def ours(side: str, student: tuple[str, ...], students: int, folder: Path) -> tuple[float, list[float]]:
    """Wall time and accuracies of a side that is a jdistill command."""
    command = jdistill(
        "-m", *student, f"seed=range(0,{students})", f"hydra.launcher.strategy={STRATEGIES[side]}",
        f"cache={fresh(folder / f'cache-{side}')}",
    )  # fmt: skip
    if side == "vmap-warm":
        finish([*command, f"hydra.sweep.dir={fresh(folder / 'warming')}"], ON_GPU, folder)
    seconds, _ = finish([*command, f"hydra.sweep.dir={fresh(folder / side)}"], ON_GPU, folder)
    return seconds, [result["metrics"]["test"]["accuracy"] for result in results(folder / side)]


def torchs(side: str, given: argparse.Namespace, folder: Path) -> tuple[float, list[float]]:
    """Wall time and accuracies of a side in PyTorch."""
    tasks = [{"seed": seed, "temperature": TEMPERATURE, "weight": WEIGHT} for seed in range(given.students)]
    processes = given.processes if side == "torch-processes" else None
    return torch_students(
        given.torch_python, "resnet8x4", tasks, folder / "data.npz", folder / side, epochs=EPOCHS, batch=BATCH,
        device="cuda", processes=processes,
    )  # fmt: skip


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--sides", type=names(SIDES), default=list(SIDES), help="comma-separated")
    parser.add_argument("--students", type=int, default=8)
    parser.add_argument("--limit", type=int, default=12_800, help="training images, at most 50,000")
    parser.add_argument("--processes", type=int, default=2, help="PyTorch processes at a time")
    parser.add_argument("--torch-python", default=sys.executable, help="a Python that has torch")
    parser.add_argument("--folder", type=Path, help="work here and keep it (default: a temporary folder)")
    given = parser.parse_args()
    if not (kind := device()):
        print("JAX has no GPU here: nothing to measure")
        return
    if any(side.startswith("torch") for side in given.sides) and not has_torch(given.torch_python):
        raise SystemExit(f"{given.torch_python} has no torch: pip install torch, or --torch-python PATH, or --sides")
    os.environ["JAX_PLATFORMS"] = "cpu"  # of this process: the GPU is for the sides
    rows: dict[str, dict[str, Any]] = {}
    with workplace(given.folder) as folder:
        student = prepare(folder, given.limit)
        del os.environ["JAX_PLATFORMS"]
        for side in given.sides:
            torch = side.startswith("torch")
            seconds, found = torchs(side, given, folder) if torch else ours(side, student, given.students, folder)
            if len(found) != given.students:
                raise SystemExit(f"{side} finished {len(found)} of {given.students} students")
            rows[side] = {"seconds": seconds, "accuracy": statistics.mean(found)}
            print(f"{side}: {seconds:.1f} s", file=sys.stderr, flush=True)
    print(f"{kind}; {given.students} students, {given.limit} images, {EPOCHS} epochs, batch {BATCH}")
    base = rows.get("vmap", {}).get("seconds")
    table(
        ("side", "seconds", "a student", "accuracy", "to vmap"),
        [
            (side, f"{row['seconds']:.1f}", f"{row['seconds'] / given.students:.2f}", f"{row['accuracy']:.2%}",
             f"{row['seconds'] / base:.2f}x" if base else "")
            for side, row in rows.items()
        ],
    )  # fmt: skip
    report({"device": kind, "students": given.students, "limit": given.limit, "sides": rows}, given.out)


if __name__ == "__main__":
    main()
