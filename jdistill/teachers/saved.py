"""Saved teachers: the folders that hold them, and what their manifests say."""

import json
from pathlib import Path
from typing import Any

from jdistill.errors import RunError, UsageError
from jdistill.registry import options


def saved_teacher_node(node: dict[str, Any], outputs: int, shape: list[int]) -> dict[str, Any]:
    """The network node of the teacher saved at `node["checkpoint"]`, for a config that names one.

    `outputs` and `shape` are those of the data: the number of logits, and the shape of an input.

    Raises:
      UsageError: nothing usable is there, it is another network than the config names, or does not fit the data.
    """
    path = Path(node["checkpoint"])
    saved, manifest = read_manifest(path)
    if saved["name"] != node["name"]:
        raise UsageError(
            f"teacher.checkpoint {path} holds a {saved['name']}, but teacher={node['name']}; use teacher={saved['name']}"
        )
    for key, value in node.items():
        default = options("teacher")[node["name"]].fields.get(key, (None, value))[1]
        asked = value not in (saved.get(key), _listed(default))
        if asked and key not in ("name", "checkpoint", "seed", "optim", "data", "task"):
            raise UsageError(
                f"teacher.{key} is {value}, but teacher.checkpoint {path} has {saved.get(key)}; leave teacher.{key} out"
            )
    require_fit(path, manifest, outputs, shape)
    return saved


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def require_fit(path: Path, manifest: dict[str, Any], outputs: int, shape: list[int]) -> None:
    """Raises `UsageError` where a teacher has other inputs or logits than the data needs."""
    found = (manifest["outputs"], manifest["input_shape"])
    if found != (outputs, shape):
        raise UsageError(
            f"teacher.checkpoint {path} takes inputs {found[1]} and gives {found[0]} logits;"
            f" this data has {shape} and {outputs}"
        )


def read_manifest(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(network node as a teacher, manifest) of a teacher folder or of a finished run's folder."""
    if (path / "manifest.json").is_file():
        manifest = _read_json(path / "manifest.json")
        return manifest["config"]["teacher"], manifest
    if (path / "result.json").is_file() and (path / "artifact.safetensors").is_file():
        result = _read_json(path / "result.json")
        about = _about(path / "artifact.safetensors")
        node = {**about.pop("student"), "checkpoint": str(path), "seed": result["config"]["seed"], "optim": None}
        known = {"hash": result["fingerprint"], "parameters": result["size"]["parameters"]}
        return node, {**result, **known, **about}
    raise UsageError(
        f"teacher.checkpoint '{path}' is not a teacher's folder (manifest.json) nor a finished run's (result.json);"
        " `jdistill list teachers` shows those there are"
    )


def _about(path: Path) -> dict[str, Any]:
    from jdistill.compress.artifact import read_artifact

    about = read_artifact(path)[2]
    return {name: about[name] for name in ("outputs", "input_shape", "student")}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise RunError(f"{path} is damaged ({error}); delete the folder and run again") from error


def list_teachers(cache: Path) -> list[dict[str, Any]]:
    """The manifests of all finished teachers in a cache, each with its `folder`, in the order of their names."""
    found = sorted((cache / "teachers").glob("*/manifest.json"))
    return [{**_read_json(path), "folder": str(path.parent)} for path in found if not path.parent.name.endswith(".partial")]
