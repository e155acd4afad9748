"""Run folders as a run leaves them, with a network that was initialised and not trained."""

import jax
import jax.numpy as jnp
import numpy as np

from jdistill import blueprint as blueprints
from jdistill.checkpoint import write_json
from jdistill.compress.artifact import write_artifact
from jdistill.compress.base import Stored
from jdistill.export.card import sha256
from tests.tiny import config

SHOP = (("data.history", 20), ("task.cutoffs", [5]))
FAMILIES = {
    "mlp": ((("student.widths", [16]),), {"data": "digits", "student": "mlp"}),
    "resnet8": ((), {"data": "digits", "student": "resnet8"}),
    "sasrec": (SHOP, {"data": "synthetic_shop", "task": "next_item", "student": "sasrec"}),
    "bpr": (SHOP, {"data": "synthetic_shop", "task": "recommend", "student": "bpr"}),
    "neumf": (SHOP, {"data": "synthetic_shop", "task": "recommend", "student": "neumf"}),
}


def perturbed(tree, seed, noise):
    """Every leaf with noise, so that no bias is 0, no running mean 0 and no variance 1."""
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda a: np.asarray(a + noise(random, a.shape), np.float32), tree)


def small(random, shape):
    return 0.05 * random.normal(size=shape)


def positive(random, shape):
    return 0.2 * random.uniform(size=shape)


def write_run(folder, name, *overrides, **choices):
    """A finished run's folder of one of `FAMILIES`, changed by overrides; returns (folder, blueprint, variables)."""
    given, chosen = FAMILIES[name]
    made = config(*given, *overrides, **{"teacher": "none", "loss": "none", **chosen, **choices})
    blueprint = blueprints.read(made)
    params, state = blueprint.student.init(jax.random.key(0), blueprint.inputs)
    variables = perturbed(params, 1, small), perturbed(state, 2, positive)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "artifact.safetensors"
    size = write_artifact(path, (), Stored(variables[0]), variables[1], {"student": made["student"]})
    result = {
        "status": "finished", "config": made, "fingerprint": "0" * 12, "metrics": {"test": {}},
        "size": {"bytes": size, "sha256": sha256(path)}, "environment": {"commit": None},
    }  # fmt: skip
    write_json(folder / "result.json", result)
    return folder, blueprint, jax.tree.map(jnp.asarray, variables)


def silent(line):
    del line
