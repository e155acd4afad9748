"""StableHLO by `jax.export`: one file for any batch size, which needs JAX alone to be loaded."""

from pathlib import Path

import jax

from jdistill.export.model import Deployable

FILE = "model.stablehlo"
PLATFORMS = ("cpu", "cuda", "tpu")


def write(deployable: Deployable, folder: Path) -> dict[str, int | None]:
    """Writes `model.stablehlo`, weights inside; returns {file name: its batch size, None for any}."""
    (batch,) = jax.export.symbolic_shape("batch")
    specs = [jax.ShapeDtypeStruct((batch, *shape), dtype) for shape, dtype in deployable.specs.values()]
    exported = jax.export.export(jax.jit(deployable.function), platforms=PLATFORMS)(*specs)
    (folder / FILE).write_bytes(exported.serialize())
    return {FILE: None}
