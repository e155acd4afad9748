"""experiments/deployment.py: parts of several invocations become one table, times belong to their rows, refusals are said."""

import importlib
from pathlib import Path

import pytest

from jdistill.report import render

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    monkeypatch.setenv("MPLBACKEND", "Agg")
    return importlib.import_module("deployment")


def exported(runtime, int8, size):
    metric = {"name": "accuracy", "jax": 0.5, "exported": 0.5 + (int8 != "none") / 4, "difference": 0.0}
    row = {"family": "mlp", "runtime": runtime, "int8": int8, "bytes": size, "largest": 1e-6, "rms": 1e-7, "metric": metric}
    return {**row, "artifact": "one", "versions": {runtime: "1.2"}}


def of(machine):
    return {"machine": machine, "system": "Linux", "python": "3.11", "commit": None}


def times(*cpu):
    """What `jdistill latency` says of models that take `cpu` ms at batch 1, and 100 times that at 256; JAX last."""
    return [
        {"model": "m", "runtime": "r", "batch": batch, "p50": 9.0, "cpu50": scale * value, "baseline": i == 0}
        | {f"cpu_ratio{end}": value / cpu[0] for end in ("", ".low", ".high")}
        for batch, scale in ((1, 1), (256, 100))
        for i, value in enumerate(cpu)
    ]


def test_times_belong_to_the_rows_that_were_not_refused(script):
    refused = {"family": "mlp", "runtime": "onnx", "int8": "dynamic", "refused": "too far"}
    rows = [exported("onnx", "none", 400), refused, exported("onnx", "static", 100)]
    full, same, small = script.with_times(rows, times(2.0, 1.0, 5.0))
    assert same == refused
    assert (full["latency_1"]["cpu50"], small["latency_1"]["cpu50"], small["latency_256"]["cpu50"]) == (2.0, 1.0, 100.0)
    assert (small["jax_1"]["cpu50"], full["jax_256"]["cpu50"]) == (5.0, 500.0)
    assert small["latency_1"]["cpu_ratio"] == 0.5


def test_parts_become_one_table(script):
    onnx = [exported("onnx", "none", 400), exported("onnx", "static", 100)]
    refused = {"family": "mlp", "runtime": "litert", "int8": "static", "refused": "too far"}
    litert = [exported("litert", "none", 300), exported("litert", "dynamic", 200), refused]
    parts = {
        "onnx": {"rows": script.with_times(onnx, times(2.0, 1.0, 5.0)), "environment": of("one")},
        "litert": {"rows": script.with_times(litert, times(4.0, 6.0, 5.0)), "environment": of("two")},
    }
    table = script.table(parts)
    shown = [[row[key] for key in ("runtime", "weights", "smaller", "cpu_1", "cpu_ratio_1")] for row in table.rows]
    assert shown == [
        ["onnx", "float32", 1.0, 2.0, 1.0],
        ["onnx", "int8 static", 4.0, 1.0, 0.5],
        ["litert", "float32", 1.0, 4.0, 1.0],
        ["litert", "int8 dynamic", 1.5, 6.0, 1.5],  # over the bytes and the time of float32 in its own runtime
    ]
    text = render(table, "markdown")
    assert "0.7500" in text and "litert, int8 static, too far" in text.replace(": ", ", ")
    assert "onnx: one, Linux, Python 3.11, onnx 1.2" in text and "litert: two, Linux, Python 3.11, litert 1.2" in text
    assert "different networks" not in text
    parts["litert"]["rows"][0]["artifact"] = "another"
    assert "MLP 784-1200-1200-10, Fashion-MNIST: parts are of different networks" in render(script.table(parts), "markdown")


def test_a_file_is_written_for_each_runtime_that_is_installed(script, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["deployment.py", "--out", str(tmp_path / "out"), "--families", "mlp"])
    monkeypatch.setattr(script, "require", lambda runtime: refuse() if runtime == "onnx" else None)
    rows = script.with_times([exported("any", "none", 400)], times(2.0, 5.0))
    monkeypatch.setattr(script, "measured", lambda family, runtime, run: [{**rows[0], "runtime": runtime}])
    monkeypatch.setattr(script, "trained", lambda family, given: tmp_path)
    script.main()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "litert.json", "stablehlo.json", "table.csv", "table.md",
    ]  # fmt: skip
    assert "left out: no onnx here" in capsys.readouterr().err


def refuse():
    from jdistill.errors import UsageError

    raise UsageError("no onnx here")
