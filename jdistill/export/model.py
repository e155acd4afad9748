"""The network of a finished run as one function: raw inputs -> logits, with its preprocessing constants and its weights."""

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jdistill import blueprint as blueprints
from jdistill.blueprint import Blueprint
from jdistill.errors import RunError, UsageError
from jdistill.evaluation import reload
from jdistill.ranking import requests_of_all
from jdistill.train import forward
from jdistill.types import Model, PyTree

CALIBRATION_ROWS = 512
"""Rows of the training split that static int8 ranges are taken from, at most."""
LOOPS = ("scan", "while")


@dataclasses.dataclass(frozen=True, eq=False)
class Deployable:
    """A trained student, read back from its artifact.

    Attributes:
      folder: the run's.
      result: its `result.json`.
      blueprint: what its config describes; the data are loaded.
      model, variables: the network and its `(params, state)`, NumPy arrays.
    """

    folder: Path
    result: dict[str, Any]
    blueprint: Blueprint
    model: Model
    variables: tuple[PyTree, PyTree]

    @property
    def is_estimator(self) -> bool:
        """Whether the student is no network: a tree, boosted trees, a linear SVM."""
        return self.blueprint.estimator is not None

    @property
    def is_recommender(self) -> bool:
        return bool(self.blueprint.dataset.schema.items)

    def all_specs(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Of everything a request may bring the name, the shape of one row and the dtype."""
        dataset = self.blueprint.dataset
        if not self.is_recommender:
            return {"inputs": (tuple(dataset.input_shape), dataset.test["inputs"].dtype)}
        ids, history = np.dtype(np.int32), dataset.schema.history
        return {"user": ((), ids), **({"history": ((history,), ids)} if history else {})}

    @functools.cached_property
    def specs(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Those of `all_specs` that the network's logits depend on, in order: what a deployed model is given."""
        every = self.all_specs()
        shapes = [jax.ShapeDtypeStruct((2, *shape), dtype) for shape, dtype in every.values()]
        kept = jax.export.export(jax.jit(functools.partial(self._logits, tuple(every))))(*shapes).module_kept_var_idx
        return {name: spec for i, (name, spec) in enumerate(every.items()) if i in kept}

    @property
    def function(self) -> Callable[..., Array]:
        """`(inputs [B, ...])` or `(user [B], history [B, L])`, as `specs` says, -> logits [B, K] float32.

        Of a recommender the logits are the scores of the whole catalogue [B, items].
        """
        return functools.partial(self._logits, tuple(self.specs))

    @property
    def unrolled(self) -> Callable[..., Array]:
        """`function`, of a network that scores the catalogue in a loop over its chunks without that loop.

        For runtimes in which loops are slow or missing; all activations of the catalogue then exist at once.
        """
        if not self.is_recommender:
            return self.function
        listing = functools.partial(self._logits, tuple(self.specs), listed=True)
        shapes = [jax.ShapeDtypeStruct((2, *shape), dtype) for shape, dtype in self.specs.values()]
        plain, named = (_loops(jax.make_jaxpr(one)(*shapes).jaxpr) for one in (self.function, listing))
        return listing if named < plain else self.function

    def _logits(self, names: tuple[str, ...], *arrays: Any, listed: bool = False) -> Array:
        given: Any = dict(zip(names, arrays, strict=True))
        if self.is_recommender:
            rows = arrays[0].shape[0]
            given.setdefault("user", jnp.zeros((rows,), jnp.int32))  # not read, save for its shape
            if listed:
                given["items"] = jnp.arange(self.blueprint.dataset.schema.items, dtype=jnp.int32)
        else:
            given = self.blueprint.dataset.preprocess(given["inputs"])
        variables = jax.tree.map(jnp.asarray, self.variables)  # constants of the function that is traced here
        return self.model.apply(*variables, given, train=False)[0].logits.astype(jnp.float32)

    def inputs(self, raw: np.ndarray) -> tuple[np.ndarray, ...]:
        """What `function` is given for raw rows of the data: images, table rows, or requests [B, 1 + L]."""
        if not self.is_recommender:
            return (raw,)
        parts = {"user": raw[:, 0], "history": raw[:, 1:]}
        return tuple(np.ascontiguousarray(parts[name], np.int32) for name in self.specs)

    def reference(self, raw: np.ndarray) -> np.ndarray:
        """Logits [B, K] float32 of raw rows, as the run's own evaluation computes them."""
        return np.asarray(forward(self.model, self.blueprint.dataset.preprocess)(*self.variables, raw), np.float32)

    def calibration(self) -> np.ndarray:
        """Raw rows of the training split, the same ones each time; of recommenders the requests of users."""
        dataset = self.blueprint.dataset
        rows = requests_of_all(dataset) if self.is_recommender else dataset.train["inputs"]
        chosen = np.random.default_rng(0).permutation(len(rows))[:CALIBRATION_ROWS]
        return rows[chosen]


def read_run(folder: Path) -> Deployable:
    """The student of a finished run's folder, from its `result.json` and `artifact.safetensors`.

    Raises:
      UsageError: the folder holds no finished run, or the data that its config names are not there.
      RunError: a file is damaged, or not the one that the result is about.
    """
    try:
        result = json.loads((folder / "result.json").read_text())
    except FileNotFoundError:
        raise UsageError(f"{folder} holds no result.json; give the folder of a finished run") from None
    except (OSError, ValueError) as error:
        raise RunError(f"{folder / 'result.json'} cannot be read ({error}); carry the run out again") from error
    status = result.get("status") if isinstance(result, dict) else None
    if status != "finished":
        raise UsageError(f"{folder} holds a run that is {status or 'damaged'}; only a finished one can be exported")
    _require_same(folder / "artifact.safetensors", result)
    blueprint = blueprints.read(result["config"])
    model, variables = reload(blueprint, folder / "artifact.safetensors")
    return Deployable(folder, result, blueprint, model, jax.tree.map(np.asarray, variables))


def _loops(jaxpr: Any) -> int:
    """How many loops a program has, those within others too."""
    inner = [value for eqn in jaxpr.eqns for value in eqn.params.values()]
    found = [getattr(value, "jaxpr", value) for value in inner if hasattr(getattr(value, "jaxpr", value), "eqns")]
    return sum(eqn.primitive.name in LOOPS for eqn in jaxpr.eqns) + sum(_loops(one) for one in found)


def _require_same(path: Path, result: dict[str, Any]) -> None:
    from jdistill.export.card import sha256

    if not path.is_file():
        raise RunError(f"{path} is missing; carry the run out again (force=true)")
    if sha256(path) != result["size"]["sha256"]:
        raise RunError(f"{path} is not the file that result.json was measured on; carry the run out again (force=true)")
