"""Saved teachers: the folders that hold them, and what their manifests say."""

import json
from pathlib import Path
from typing import Any

from jdistill.errors import RunError, UsageError


def saved_teacher_node(node: dict[str, Any]) -> dict[str, Any]:
    """The network node of the teacher saved at `node["checkpoint"]`, for a config that names one.

    Raises:
      UsageError: nothing usable is there, or it is another network than the config names.
    """
    path = Path(node["checkpoint"])
    saved, _ = read_manifest(path)
    if saved["name"] != node["name"]:
        raise UsageError(
            f"teacher.checkpoint {path} holds a {saved['name']}, but teacher={node['name']}; use teacher={saved['name']}"
        )
    return saved


def read_manifest(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(network node as a teacher, manifest) of a teacher folder or of a finished run's folder."""
    if (path / "manifest.json").is_file():
        manifest = _read_json(path / "manifest.json")
        return manifest["config"]["teacher"], manifest
    if (path / "result.json").is_file() and (path / "artifact.safetensors").is_file():
        result = _read_json(path / "result.json")
        node = {**result["config"]["student"], "checkpoint": str(path), "seed": result["config"]["seed"], "optim": None}
        return node, {**result, "hash": result["fingerprint"], "parameters": result["size"]["parameters"]}
    raise UsageError(
        f"teacher.checkpoint '{path}' is not a teacher's folder (manifest.json) nor a finished run's (result.json);"
        " `jdistill list teachers` shows those there are"
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise RunError(f"{path} is damaged ({error}); delete the folder and run again") from error


def list_teachers(cache: Path) -> list[dict[str, Any]]:
    """The manifests of all finished teachers in a cache, each with its `folder`, in the order of their names."""
    found = sorted((cache / "teachers").glob("*/manifest.json"))
    return [{**_read_json(path), "folder": str(path.parent)} for path in found if not path.parent.name.endswith(".partial")]
