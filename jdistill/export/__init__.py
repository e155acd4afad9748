"""Deployment: a trained student as a file for another runtime, with a model card, and a check against the JAX network."""

import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jdistill.errors import RunError, UsageError, unknown
from jdistill.export.card import Card, make_card, read_card, write_card, written
from jdistill.export.model import Deployable, read_run
from jdistill.export.parity import metric, verdict
from jdistill.export.runtimes import Runner, load, require
from jdistill.measure.timing import require_batches

RUNTIMES = ("stablehlo", "onnx", "litert")
INT8 = ("none", "dynamic", "static")


def export(
    run: Path, to: str, *, int8: str = "none", out: Path | None = None, batches: Sequence[int] = (1, 256),
    say: Callable[[str], Any] = print,
) -> Path:  # fmt: skip
    """Writes the student of a finished run for a runtime, checks it against JAX, and returns the folder.

    The folder has the model's files, `names.json` where the data name classes or items, `MODEL_CARD.md` and
    `model_card.json`. A model that is too far from JAX at any of the batch sizes is not kept.

    Args:
      run: the run's folder.
      to: `stablehlo`, `onnx` or `litert`.
      int8: `none`, `dynamic` or `static`; not for stablehlo.
      out: the folder; RUN/export/TO, with `-int8-dynamic` or `-int8-static`, by default.
      batches: sizes that are checked; LiteRT has a file for each.
      say: is told what was found, line by line.

    Raises:
      UsageError: a wrong option, no finished run, a runtime that is not installed, a folder with other files.
      RunError: the network cannot be converted, or its outputs differ from JAX's.
    """
    _require(to, int8, batches)
    out = out or run / "export" / (to if int8 == "none" else f"{to}-int8-{int8}")
    if out.is_dir() and {path.name for path in out.iterdir()} - set(written(out)):
        raise UsageError(f"{out} holds other files; choose another folder by --out")
    deployable = read_run(run)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".export-") as temporary:
        folder = Path(temporary)
        card = make_card(deployable, to, int8, folder, _written(deployable, to, int8, folder, batches))
        card = _checked(deployable, card, folder, batches, say)
        write_card(folder, card)
        out.mkdir(exist_ok=True)
        for name in written(out):
            (out / name).unlink()
        for name in reversed(written(folder)):  # the card last: without it the folder is none of ours
            shutil.move(folder / name, out / name)
    return out


def _require(to: str, int8: str, batches: Sequence[int]) -> None:
    if to not in RUNTIMES:
        raise unknown("runtime", to, RUNTIMES)
    if int8 not in INT8:
        raise unknown("--int8", int8, INT8)
    if to == "stablehlo" and int8 != "none":
        raise UsageError(f"stablehlo is float32, got --int8 {int8}; use --to onnx or --to litert")
    require_batches(batches)
    require(to)


def _written(deployable: Deployable, to: str, int8: str, folder: Path, batches: Sequence[int]) -> dict[str, int | None]:
    from jdistill.export import litert, onnx, stablehlo

    try:
        if to == "stablehlo":
            return stablehlo.write(deployable, folder)
        return litert.write(deployable, folder, int8, batches) if to == "litert" else onnx.write(deployable, folder, int8)
    except (UsageError, RunError):
        raise
    except Exception as error:  # the converters raise whatever they meet
        name, line = deployable.result["config"]["student"]["name"], " ".join(str(error).split())[:200]
        advice = "" if to == "stablehlo" else "; --to stablehlo takes every student"
        raise RunError(f"student={name} cannot be converted to {to} ({type(error).__name__}: {line}){advice}") from error


def _checked(deployable: Deployable, card: Card, folder: Path, batches: Sequence[int], say: Callable[[str], Any]) -> Card:
    """The card with the verdict at each batch size and the metric on the test split."""
    try:
        runner = Runner(folder, {**card, "parity": []}, threads=1)
        return _compared(deployable, card, runner, batches, say)
    except (UsageError, RunError):
        raise
    except Exception as error:  # a file that its own runtime refuses
        line = " ".join(str(error).split())[:200]
        raise RunError(f"{card['runtime']} cannot run the model that was made for it ({line}); it was not kept") from error


def _compared(deployable: Deployable, card: Card, runner: Runner, batches: Sequence[int], say: Callable[[str], Any]) -> Card:
    for name, about in card["files"].items():
        say(f"{name}: {about['bytes']:,} bytes")
    found = []
    for batch in batches:
        one = verdict(deployable, runner, batch)
        found.append(one)
        say(
            f"batch {batch}: largest difference from JAX {one['largest']:.3g}, relative RMS {one['rms']:.3g} "
            f"({one['rows']} rows)"
        )
        if not one["passed"]:
            raise RunError(
                f"{card['runtime']} differs from JAX at batch {batch}: {_named(one['by'])} {one[one['by']]:.3g}, at most "
                f"{one['limit']:.3g} is allowed; the model was not kept"
            )
    score = metric(deployable, runner, max(batches))
    say(f"test {score['name']}: {score['jax']:.4f} in JAX, {score['exported']:.4f} as exported ({score['difference']:+.4f})")
    return {**card, "parity": found, "metric": score}


def _named(by: str) -> str:
    return {"rms": "relative RMS", "largest": "largest difference"}[by]


__all__ = ["INT8", "RUNTIMES", "Card", "Deployable", "Runner", "export", "load", "read_card", "read_run"]
