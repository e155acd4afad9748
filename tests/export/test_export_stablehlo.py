"""StableHLO: one file is the network at any batch size, of every family, and needs JAX alone."""

import subprocess
import sys

import numpy as np
import pytest

from jdistill import export as exporting
from jdistill.export.model import read_run
from tests.export.folders import FAMILIES, silent, write_run
from tests.marks import slow_but

INPUTS = {"mlp": ("inputs",), "resnet8": ("inputs",), "sasrec": ("history",), "bpr": ("user",), "neumf": ("user",)}


@pytest.mark.parametrize("name", slow_but(("mlp", "bpr", "sasrec"), tuple(FAMILIES)))
def test_stablehlo_is_the_network_at_any_batch_size(name, tmp_path):
    run, blueprint, variables = write_run(tmp_path / name, name)
    lines = []
    folder = exporting.export(run, "stablehlo", out=tmp_path / "out", batches=(1, 256), say=lines.append)
    runner = exporting.load(folder)
    assert runner.names == INPUTS[name] and runner.batches == (1, 256)
    assert runner.passed(1) and runner.passed(256) and not runner.passed(2)
    assert all(v["largest"] <= 1e-4 and v["by"] == "largest" for v in runner.card["parity"])
    raw = blueprint.dataset.test["inputs"][:7]  # a size that was not exported for
    request = blueprint.dataset.preprocess(raw)
    wanted = np.asarray(blueprint.student.apply(*variables, request, train=False)[0].logits)
    found = runner(*runner.inputs(raw))
    assert found.shape == (7, blueprint.outputs) and found.dtype == np.float32
    assert np.ptp(wanted) > 1e-3
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4)
    assert any(line.startswith("batch 256: largest difference from JAX") for line in lines)
    metric = runner.card["metric"]
    assert metric["name"] == blueprint.task.primary and metric["difference"] == metric["exported"] - metric["jax"]


def test_the_file_needs_nothing_of_jdistill(tmp_path):
    run, blueprint, _ = write_run(tmp_path / "run", "mlp")
    folder = exporting.export(run, "stablehlo", out=tmp_path / "out", batches=(2,), say=silent)
    np.save(tmp_path / "raw.npy", blueprint.dataset.test["inputs"][:2])
    code = (
        "import sys, jax, numpy as np; from pathlib import Path\n"
        f"call = jax.export.deserialize(bytearray(Path({str(folder / 'model.stablehlo')!r}).read_bytes())).call\n"
        f"np.save({str(tmp_path / 'logits.npy')!r}, call(np.load({str(tmp_path / 'raw.npy')!r})))\n"
        "assert not [m for m in sys.modules if m.startswith(('jdistill', 'flax'))]\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    wanted = read_run(run).reference(np.load(tmp_path / "raw.npy"))
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), wanted, rtol=0, atol=1e-4)
