"""Deployment: a network of each family in every runtime that is installed: difference from JAX, bytes, metric, time.

Source: none; the claims of docs/deploy.md, measured.

    python experiments/deployment.py [--runtimes stablehlo,onnx,litert] [--families mlp,cnn]

needs Fashion-MNIST and MovieLens (ml-latest-small) in $JDISTILL_DATA (or a network). The extras onnx and litert are installed
in two environments: run it in both, with the same --sweeps and --out. What is trained in the first is exported in the second,
each runtime has its own file (onnx.json, ...), and the table is made of all of them. What is not installed is left out.
The networks are trained on labels alone, for a few epochs: how an export differs from its network does not depend on a teacher.
Expected and time: results/deployment/README.md.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from _common import add_choice, portable, run_sweep, write_tables

import jdistill.options  # noqa: F401 (registers every option)
from jdistill.environment import environment
from jdistill.errors import RunError, UsageError
from jdistill.export import INT8, RUNTIMES, Runner, export, load
from jdistill.export.runtimes import require
from jdistill.report import Table
from jdistill.report.cells import Column

NAME = "deployment"
BATCHES = (1, 256)
PLAIN = ("teacher=none", "loss=none", "evaluate.latency=false")
SHOP = (*PLAIN, "data=movielens", "data.min_interactions=5", "data.history=50", "optim.drop_last=false")
FAMILIES = {  # family -> overrides; sizes at which the weights are nearly all of the file
    "mlp": (
        *PLAIN, "data=fashion_mnist", "student=mlp", "student.widths=[1200,1200]", "optim.epochs=3", "optim.batch_size=128",
    ),
    "cnn": (*PLAIN, "data=digits", "student=resnet8x4", "optim.epochs=5", "optim.batch_size=64"),
    "transformer": (
        *SHOP, "task=next_item", "task.objective=sampled_softmax", "task.negatives=100", "student=sasrec", "student.dim=64",
        "student.layers=2", "student.heads=2", "optim.epochs=20", "optim.batch_size=64",
    ),
    "embeddings": (*SHOP, "task=recommend", "student=bpr", "student.dim=64", "optim.epochs=20", "optim.batch_size=512"),
}  # fmt: skip
SHOWN = {
    "mlp": "MLP 784-1200-1200-10, Fashion-MNIST",
    "cnn": "ResNet-8x4, digits",
    "transformer": "SASRec 64, MovieLens",
    "embeddings": "BPR 64, MovieLens",
}
WEIGHTS = {"none": "float32", "dynamic": "int8 dynamic", "static": "int8 static"}
Row = dict[str, Any]


def main() -> None:
    """Trains, exports, times, and writes a file for each runtime and the table of all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results") / NAME, help="parts and table: %(default)s")
    parser.add_argument("--sweeps", type=Path, default=Path("sweeps") / NAME, help="run folders: %(default)s")
    add_choice(parser, "--runtimes", RUNTIMES)
    add_choice(parser, "--families", FAMILIES)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    runs = {family: trained(family, given) for family in given.families}
    for runtime in given.runtimes:
        try:
            require(runtime)
        except UsageError as error:
            print(f"left out: {error}", file=sys.stderr)
            continue
        rows = [row for family, run in runs.items() for row in measured(family, runtime, run)]
        part = {"rows": rows, "environment": about()}
        (given.out / f"{runtime}.json").write_text(portable(json.dumps(part, indent=1)) + "\n")
    write_tables(given.out, table({name: part for name in RUNTIMES if (part := read(given.out / f"{name}.json"))}))


def trained(family: str, given: argparse.Namespace) -> Path:
    """The folder of the family's run, which is not repeated where it is finished."""
    frame = run_sweep(given.sweeps / family, FAMILIES[family], [0])
    if frame["status"].iloc[0] != "finished":
        sys.exit(f"{family}: {frame['error'].iloc[0]}")
    return Path(frame["path"].iloc[0])


def measured(family: str, runtime: str, run: Path) -> list[Row]:
    """A row for each kind of weights: what the export is, or the line that refuses it."""
    rows, folders = [], []
    for int8 in INT8 if runtime != "stablehlo" else INT8[:1]:
        row = {"family": family, "runtime": runtime, "int8": int8}
        try:
            folder = export(run, runtime, int8=int8, batches=BATCHES, say=lambda line: None)
        except RunError as error:
            rows.append({**row, "refused": str(error)})
            continue
        folders.append(folder)
        rows.append({**row, **of_card(load(folder))})
    return with_times(rows, timed([*folders, run]))


def of_card(runner: Runner) -> Row:
    """Numbers of an export's card: bytes of one file, which has all weights; the largest differences of all batch sizes."""
    card = runner.card
    return {
        "artifact": card["run"]["artifact"]["sha256"],
        "bytes": next(iter(card["files"].values()))["bytes"],
        "largest": max(verdict["largest"] for verdict in card["parity"]),
        "rms": max(verdict["rms"] for verdict in card["parity"]),
        "parity": card["parity"],
        "metric": card["metric"],
        "versions": card["versions"],
    }


def timed(folders: Sequence[Path]) -> list[Row]:
    """Rows of `jdistill latency`, in its own process: it keeps to one core, which a JAX that has started does not."""
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary) / "latency.json"
        batches = ",".join(map(str, BATCHES))
        command = [sys.executable, "-m", "jdistill", "latency", *map(str, folders), "--batch", batches, "--out", str(out)]
        subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
        return json.loads(out.read_text())["rows"]


def with_times(rows: Sequence[Row], times: Sequence[Row]) -> list[Row]:
    """Rows of a network in a runtime with their times, and with JAX's of the same run.

    `times` has those that were not refused in the order of `rows`, and JAX as the last, at each batch size.
    """
    kept = [row for row in rows if "refused" not in row]
    found: list[Row] = [{} for _ in kept]
    for batch in BATCHES:
        *own, jax = (line for line in times if line["batch"] == batch)
        for row, line in zip(found, own, strict=True):
            row[f"latency_{batch}"] = {key: value for key, value in line.items() if key not in ("model", "runtime", "batch")}
            row[f"jax_{batch}"] = {key: jax[key] for key in ("p50", "cpu50")}
    left = iter(found)
    return [row if "refused" in row else {**row, **next(left)} for row in rows]


def about() -> Row:
    """Where a part was measured."""
    found = environment()
    return {key: found[key] for key in ("machine", "system", "python", "commit")}


def read(path: Path) -> Row | None:
    return json.loads(path.read_text()) if path.is_file() else None


def table(parts: Mapping[str, Row]) -> Table:
    """The table of all parts, in the order of families and runtimes."""
    every = [row for family in FAMILIES for part in parts.values() for row in part["rows"] if row["family"] == family]
    full = {(row["family"], row["runtime"]): row["bytes"] for row in every if row["int8"] == "none" and "bytes" in row}
    rows = tuple(flat(row, full.get((row["family"], row["runtime"]))) for row in every if "refused" not in row)
    columns = (
        Column("model", "model", "key", {"model": "model"}),
        Column("runtime", "runtime", "key", {"runtime": "runtime"}),
        Column("weights", "weights", "key", {"weights": "weights"}),
        Column("largest", "largest difference from JAX", "number", {"largest": "largest"}),
        Column("rms", "relative RMS", "number", {"rms": "rms"}),
        Column("bytes", "bytes", "whole", {"bytes": "bytes"}),
        Column("smaller", "float32 / bytes", "number", {"smaller": "smaller"}),
        Column("metric", "test metric", "key", {"metric": "metric"}),
        Column("jax", "in JAX", "metric", {"jax": "jax.mean"}),
        Column("exported", "exported", "metric", {"exported": "exported.mean"}),
        *(column for batch in BATCHES for column in columns_of(batch)),
    )
    notes = [
        "bytes: of one file (LiteRT has one for each batch size), which has all weights.",
        "CPU: median processor time of a call, NumPy in, NumPy out, on one core; over float32: its ratio to the same runtime's"
        " float32, the geometric mean over rounds of one interleaved run, with a 95 % interval.",
        *(refusal(row) for row in every if "refused" in row),
        *(f"{SHOWN[family]}: parts are of different networks; measure them anew with one --sweeps" for family in mixed(every)),
        *(f"{name}: {where(part)}" for name, part in parts.items()),
    ]
    return Table(columns, rows, tuple(notes), "bytes")


def refusal(row: Row) -> str:
    return f"refused: {SHOWN[row['family']]}, {row['runtime']}, {WEIGHTS[row['int8']]}: {row['refused']}"


def mixed(rows: Sequence[Row]) -> list[str]:
    """Families whose rows are not all of the same trained network."""
    networks = {(row["family"], row["artifact"]) for row in rows if "artifact" in row}
    return [family for family in FAMILIES if sum(name == family for name, _ in networks) > 1]


def where(part: Row) -> str:
    """The machine and the versions of a part."""
    found, versions = part["environment"], next((row["versions"] for row in part["rows"] if "versions" in row), {})
    packages = {"Python": found["python"], **{name: value for name, value in versions.items() if name != "jdistill"}}
    shown = ", ".join(f"{name} {value}" for name, value in packages.items())
    return f"{found['machine']}, {found['system']}, {shown}, commit {found['commit'][:12] if found['commit'] else 'unknown'}"


def columns_of(batch: int) -> tuple[Column, ...]:
    """CPU time at a batch size, in JAX too, and its ratio to float32."""
    ratio = f"cpu_ratio_{batch}"
    return (
        Column(f"cpu_{batch}", f"CPU b={batch} (ms)", "number", {f"cpu_{batch}": f"cpu_{batch}"}),
        Column(ratio, f"over float32 b={batch}", "ratio", {f"{ratio}{end}": f"{ratio}{end}" for end in ("", ".low", ".high")}),
        Column(f"jax_{batch}", f"CPU b={batch} in JAX (ms)", "number", {f"jax_{batch}": f"jax_{batch}"}),
    )


def flat(row: Mapping[str, Any], full: int | None) -> Row:
    """A part's row as a table has it; `full` are the bytes of float32 in the same runtime."""
    found = {
        "model": SHOWN[row["family"]], "runtime": row["runtime"], "weights": WEIGHTS[row["int8"]],
        "baseline": row["int8"] == "none", "largest": row["largest"], "rms": row["rms"], "bytes": row["bytes"],
        "smaller": full / row["bytes"] if full else None,
        "metric": row["metric"]["name"], "jax.mean": row["metric"]["jax"], "exported.mean": row["metric"]["exported"],
    }  # fmt: skip
    for batch in BATCHES:
        own = row[f"latency_{batch}"]
        found |= {f"cpu_{batch}": own["cpu50"], f"jax_{batch}": row[f"jax_{batch}"]["cpu50"]}
        found |= {f"cpu_ratio_{batch}{end}": own[f"cpu_ratio{end}"] for end in ("", ".low", ".high")}
    return found


if __name__ == "__main__":
    main()
