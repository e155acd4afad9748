"""LiteRT, where the extra is installed: each file is the network at its batch size, and int8 is smaller."""

import numpy as np
import pytest

pytest.importorskip("litert_converter", reason="needs the extra litert: pip install 'jdistill[litert]'")
pytest.importorskip("ai_edge_litert", reason="needs the extra litert: pip install 'jdistill[litert]'")

from jdistill import export as exporting
from jdistill.errors import RunError, UsageError
from jdistill.export import litert
from tests.export.folders import FAMILIES, silent, write_run

pytestmark = pytest.mark.filterwarnings("default")  # the converters' own


@pytest.mark.parametrize("name", FAMILIES)
def test_litert_is_the_network_at_each_batch_size(name, tmp_path):
    run, blueprint, variables = write_run(tmp_path / name, name)
    runner = exporting.load(exporting.export(run, "litert", batches=(1, 7), say=silent))
    assert runner.passed(1) and runner.passed(7) and list(runner.card["files"]) == ["model_b1.tflite", "model_b7.tflite"]
    assert all(v["largest"] <= 1e-4 for v in runner.card["parity"])
    raw = blueprint.dataset.test["inputs"][:7]
    wanted = blueprint.student.apply(*variables, blueprint.dataset.preprocess(raw), train=False)[0].logits
    np.testing.assert_allclose(runner(*runner.inputs(raw)), wanted, rtol=0, atol=1e-4)
    with pytest.raises(UsageError, match=r"no file for batches of 2, only of 1, 7; export with --batch 2"):
        runner(*runner.inputs(raw[:2]))


@pytest.mark.parametrize("int8", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["mlp", "resnet8", "bpr"])
def test_int8_is_smaller_and_close_at_each_batch_size(name, int8, tmp_path):
    wide = (("student.widths", [600, 300]),) if name == "mlp" else ()
    run, _, _ = write_run(tmp_path / name, name, *wide)
    full, small = (exporting.load(exporting.export(run, "litert", int8=kind, say=silent)) for kind in ("none", int8))
    sizes = [sum(about["bytes"] for about in runner.card["files"].values()) for runner in (full, small)]
    least = {"mlp": 3.5, "resnet8": 3, "bpr": 3 if int8 == "static" else 1.1}[name]  # dynamic keeps what is gathered
    assert sizes[0] / sizes[1] > least
    first, last = (v["rms"] for v in small.card["parity"])
    assert 1e-4 < first < 0.1 and last == pytest.approx(first, rel=0.3)  # the same ranges for both files
    assert small.card["output"]["dtype"] == "float32"


def test_static_int8_of_masked_attention_is_refused(tmp_path):
    run, _, _ = write_run(tmp_path / "run", "sasrec")
    with pytest.raises(RunError, match="litert differs from JAX at batch 1: relative RMS"):
        exporting.export(run, "litert", int8="static", batches=(1,), say=silent)


def test_another_version_of_the_converter_is_refused(tmp_path, monkeypatch):
    run, _, _ = write_run(tmp_path / "run", "mlp")
    monkeypatch.setattr(litert, "CONVERTER", "0.1.0")
    with pytest.raises(RunError, match=r"made for litert-converter 0\.1\.0, found"):
        exporting.export(run, "litert", say=silent)
