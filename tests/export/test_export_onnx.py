"""ONNX, where the extra is installed: the file is the network, and int8 is smaller by what it says."""

import numpy as np
import pytest

pytest.importorskip("jax2onnx", reason="needs the extra onnx: pip install 'jdistill[onnx]'")
pytest.importorskip("onnxruntime", reason="needs the extra onnx: pip install 'jdistill[onnx]'")

from jdistill import export as exporting
from jdistill.errors import RunError
from jdistill.export import onnx
from tests.export.folders import FAMILIES, silent, write_run

pytestmark = pytest.mark.filterwarnings("default")  # the converters' own


@pytest.mark.parametrize("name", FAMILIES)
def test_onnx_is_the_network_at_any_batch_size(name, tmp_path):
    run, blueprint, variables = write_run(tmp_path / name, name)
    runner = exporting.load(exporting.export(run, "onnx", say=silent))
    assert runner.passed(1) and runner.passed(256) and list(runner.card["files"]) == ["model.onnx"]
    assert all(v["largest"] <= 1e-4 for v in runner.card["parity"])
    raw = blueprint.dataset.test["inputs"][:7]
    wanted = blueprint.student.apply(*variables, blueprint.dataset.preprocess(raw), train=False)[0].logits
    np.testing.assert_allclose(runner(*runner.inputs(raw)), wanted, rtol=0, atol=1e-4)


def test_residual_blocks_after_which_jax2onnx_alone_writes_a_broken_file(tmp_path):
    run, _, _ = write_run(tmp_path / "run", "resnet8", student="resnet14")  # two blocks before a strided projection
    runner = exporting.load(exporting.export(run, "onnx", batches=(1, 5), say=silent))
    assert runner.passed(1) and runner.passed(5)


@pytest.mark.parametrize(("name", "int8"), [("mlp", "dynamic"), ("mlp", "static"), ("resnet8", "static"), ("bpr", "static")])
def test_int8_is_smaller_and_close(name, int8, tmp_path):
    wide = (("student.widths", [600, 300]),) if name == "mlp" else ()
    run, _, _ = write_run(tmp_path / name, name, *wide)
    full, small = (exporting.load(exporting.export(run, "onnx", int8=kind, say=silent)) for kind in ("none", int8))
    sizes = [runner.card["files"]["model.onnx"]["bytes"] for runner in (full, small)]
    assert sizes[0] / sizes[1] > {"mlp": 3.5, "resnet8": 2.7, "bpr": 3}[name]
    assert all(v["by"] == "rms" and 1e-4 < v["rms"] < 0.1 for v in small.card["parity"])
    assert set(small.card["metric"]) == {"name", "jax", "exported", "difference"}
    integer = {"static": "QuantizeLinear", "dynamic": "MatMulInteger"}[int8]
    assert integer in operations(tmp_path / name, int8)


def operations(run, int8):
    import onnx as library

    model = library.load(run / "export" / f"onnx-int8-{int8}" / "model.onnx")
    return {node.op_type for node in model.graph.node}


def test_static_int8_of_masked_attention_is_refused(tmp_path):
    run, _, _ = write_run(tmp_path / "run", "sasrec")
    with pytest.raises(RunError, match="not kept"):
        exporting.export(run, "onnx", int8="static", say=silent)
    assert exporting.load(exporting.export(run, "onnx", int8="dynamic", say=silent)).passed(256)


def test_another_version_of_the_converter_is_refused(tmp_path, monkeypatch):
    run, _, _ = write_run(tmp_path / "run", "mlp")
    monkeypatch.setattr(onnx, "JAX2ONNX", "0.1.0")
    with pytest.raises(RunError, match=r"made for jax2onnx 0\.1\.0, found"):
        exporting.export(run, "onnx", say=silent)
