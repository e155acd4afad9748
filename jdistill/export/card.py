"""The model card: what an exported model is, what it was checked against, and the checksums of its files."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jdistill.checkpoint import write_json
from jdistill.errors import RunError, UsageError

if TYPE_CHECKING:
    from jdistill.export.model import Deployable

Card = dict[str, Any]
CARD, TEXT, NAMES = "model_card.json", "MODEL_CARD.md", "names.json"
FORMAT = 1
PACKAGES = {
    "stablehlo": ("jax", "jaxlib"),
    "onnx": ("jax", "jax2onnx", "onnx", "onnxruntime"),
    "litert": ("jax", "litert-converter", "ai-edge-litert", "ai-edge-quantizer"),
}


def make_card(deployable: "Deployable", runtime: str, int8: str, folder: Path, files: dict[str, int | None]) -> Card:
    """The card of the files in `folder`, before they are checked; writes `names.json` where the data name what they hold."""
    dataset, result = deployable.blueprint.dataset, deployable.result
    names = _names(deployable)
    if names:
        write_json(folder / NAMES, names)
    constants = {"mean": list(dataset.mean), "std": list(dataset.std), "scale": dataset.scale}
    return {
        "format": FORMAT,
        "student": result["config"]["student"],
        "compression": result["config"]["compression"],
        "task": result["config"]["task"]["name"],
        "data": {"name": dataset.name, "checksums": dataset.checksums},
        "preprocess": None if deployable.is_recommender else constants,
        "runtime": runtime,
        "int8": int8,
        "files": {name: {"batch": batch, **_about(folder / name)} for name, batch in files.items()},
        "names": NAMES if names else None,
        "inputs": [
            {"name": name, "shape": ["batch", *shape], "dtype": dtype.name} for name, (shape, dtype) in deployable.specs.items()
        ],
        "output": {"name": "logits", "shape": ["batch", deployable.blueprint.outputs], "dtype": "float32"},
        "run": {"fingerprint": result["fingerprint"], "artifact": result["size"], "commit": result["environment"]["commit"]},
        "metrics": result["metrics"],
        "versions": {package: _version(package) for package in ("jdistill", *PACKAGES[runtime])},
    }  # fmt: skip


def write_card(folder: Path, card: Card) -> None:
    """Writes `MODEL_CARD.md` and, last, `model_card.json`, which has the checksums of all other files and of itself."""
    (folder / TEXT).write_text(as_text(card))
    others = [name for name in (TEXT, card["names"]) if name]
    card = {**card, "beside": {name: _about(folder / name) for name in others}}
    write_json(folder / CARD, {**card, "sha256": _digest(card)})


def read_card(folder: Path) -> Card:
    """The card of an exported model, whose files are those that it was written for.

    Raises:
      UsageError: there is no card.
      RunError: the card or a file was changed, or a file is missing.
    """
    path = folder / CARD
    try:
        card = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(f"{folder} holds no {CARD}; give a folder that jdistill export wrote") from None
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read ({error}); export again") from error
    if not isinstance(card, dict) or card.pop("sha256", None) != _digest(card):
        raise RunError(f"{path} was changed after it was written; export again")
    if card["format"] != FORMAT:
        raise RunError(f"{path} is of format {card['format']}, this jdistill reads {FORMAT}; export again")
    for name, about in {**card["files"], **card["beside"]}.items():
        if not (folder / name).is_file():
            raise RunError(f"{folder / name} is missing; export again")
        if sha256(folder / name) != about["sha256"]:
            raise RunError(f"{folder / name} was changed after it was checked (its SHA-256 is another one); export again")
    return card


def written(folder: Path) -> list[str]:
    """The names of what an export writes, as far as it lies in `folder`, the card first."""
    fixed = [name for name in (CARD, TEXT, NAMES) if (folder / name).is_file()]
    return [*fixed, *(path.name for path in sorted(folder.glob("model*.*")) if path.name != CARD)]


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _about(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def _digest(card: Card) -> str:
    return hashlib.sha256(json.dumps(card, sort_keys=True).encode()).hexdigest()


def _version(package: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _names(deployable: "Deployable") -> dict[str, list[Any]]:
    """Of each logit the publisher's id of the item or class; of each user too, where the network is given one."""
    dataset, kept = deployable.blueprint.dataset, deployable.result["config"]["data"].get("classes_kept")
    found: dict[str, list[Any]] = {}
    if kept:
        found["labels"] = list(kept)
    elif dataset.classes > 1:
        found["labels"] = list(range(dataset.classes))
    if dataset.side is not None and dataset.side.item_names is not None:
        found["items"] = [_plain(name) for name in dataset.side.item_names]
        if dataset.side.user_names is not None and "user" in deployable.specs:
            found["users"] = [_plain(name) for name in dataset.side.user_names]
    return found


def _plain(name: Any) -> Any:
    """A publisher's id as JSON has it."""
    value = name.item() if hasattr(name, "item") else name
    return value if isinstance(value, int | str) else str(value)


def as_text(card: Card) -> str:
    """The card as a short Markdown page."""
    metric = card["metric"]
    lines = [
        f"# {card['student']['name']} on {card['data']['name']}",
        "",
        f"A {card['task']} model for {card['runtime']}, "
        + ("float32" if card["int8"] == "none" else f"int8 ({card['int8']} activations)")
        + f", exported from run {card['run']['fingerprint']} by jdistill {card['versions']['jdistill']}.",
        "",
        *_table(("file", "batch", "bytes", "SHA-256"), (
            (name, about["batch"] or "any", about["bytes"], about["sha256"]) for name, about in card["files"].items()
        )),
        *_table(("", "name", "shape", "dtype"), (
            (kind, end["name"], " x ".join(map(str, end["shape"])), end["dtype"])
            for kind, end in [*(("input", given) for given in card["inputs"]), ("output", card["output"])]
        )),
        _reads(card),
        "",
        *_table(("batch", "rows", "largest difference from JAX", "relative RMS", "limit", "passed"), (
            (v["batch"], v["rows"], f"{v['largest']:.3g}", f"{v['rms']:.3g}", f"{v['limit']:.3g} ({v['by']})", v["passed"])
            for v in card["parity"]
        )),
        f"Test {metric['name']}: {metric['jax']:.4f} in JAX, {metric['exported']:.4f} as exported.",
        "",
        "Versions: " + ", ".join(f"{name} {version}" for name, version in card["versions"].items()) + ".",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _reads(card: Card) -> str:
    """What inputs and logits mean."""
    names = f" The ids that they stand for are in {card['names']}." if card["names"] else ""
    if card["preprocess"] is None:
        return (
            "Inputs are numbers of users and of items met before (the oldest first, filled on the left with the number of "
            f"items); logits are the scores of all items.{names}"
        )
    constants = card["preprocess"]
    shown = {
        key: value if not isinstance(value, list) or len(value) <= 4 else f"{len(value)} values"
        for key, value in constants.items()
    }
    return (
        f"Inputs are raw: (input / scale - mean) / std is part of the model, scale {shown['scale']}, mean {shown['mean']}, "
        f"std {shown['std']}.{names}"
    )


def _table(head: tuple[str, ...], rows: Iterable[tuple[Any, ...]]) -> list[str]:
    return [f"| {' | '.join(map(str, row))} |" for row in (head, ("---",) * len(head), *rows)] + [""]
