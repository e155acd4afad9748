"""Deployment: the exported function is the network, is checked against it, and is never silently another one."""

import json

import jax
import numpy as np
import pytest

import jdistill.export.runtimes as runtimes
from jdistill import export as exporting
from jdistill.cli import main
from jdistill.errors import RunError, UsageError
from jdistill.export import parity, stablehlo
from jdistill.export.card import CARD, read_card
from jdistill.export.model import read_run
from jdistill.ranking import rank_split
from tests.export.folders import silent, write_run


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The run folder, blueprint and variables of each family, made when asked for."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = write_run(tmp_path_factory.mktemp("runs") / name, name)
        return made[name]

    return get


def test_an_mlp_from_raw_pixels_by_numpy(runs, tmp_path):
    run, blueprint, (params, _) = runs("mlp")
    runner = exporting.load(exporting.export(run, "stablehlo", out=tmp_path / "out", batches=(3,), say=silent))
    raw = blueprint.dataset.test["inputs"][:3]
    assert raw.dtype == np.uint8
    constants = runner.card["preprocess"]
    for row, logits in zip(raw, runner(raw), strict=True):
        x = [(float(v) / constants["scale"] - constants["mean"][0]) / constants["std"][0] for v in row.reshape(-1)]
        for layer, last in (("fc1", False), ("fc", True)):
            kernel, bias = params[layer]["kernel"], params[layer]["bias"]
            x = [sum(a * float(w) for a, w in zip(x, column, strict=True)) + float(b) for column, b in zip(kernel.T, bias)]
            x = x if last else [max(v, 0.0) for v in x]
        np.testing.assert_allclose(logits, x, rtol=0, atol=1e-4)


def test_the_card_says_what_it_is(runs, tmp_path):
    run, blueprint, _ = runs("bpr")
    folder = exporting.export(run, "stablehlo", out=tmp_path / "out", batches=(4,), say=silent)
    card = read_card(folder)
    assert card["inputs"] == [{"name": "user", "shape": ["batch"], "dtype": "int32"}]
    assert card["output"]["shape"] == ["batch", blueprint.dataset.schema.items]
    assert card["data"] == {"name": "synthetic_shop", "checksums": blueprint.dataset.checksums}
    assert card["files"]["model.stablehlo"]["bytes"] == (folder / "model.stablehlo").stat().st_size
    assert card["versions"]["jax"] == jax.__version__
    text = (folder / "MODEL_CARD.md").read_text()
    assert text.startswith("# bpr on synthetic_shop\n") and card["files"]["model.stablehlo"]["sha256"] in text


def test_names_of_labels_are_the_publishers(tmp_path):
    run, _, _ = write_run(tmp_path / "run", "mlp", ("data.classes_kept", [7, 2]))
    folder = exporting.export(run, "stablehlo", out=tmp_path / "out", batches=(1,), say=silent)
    assert json.loads((folder / "names.json").read_text()) == {"labels": [7, 2]}


def test_one_edited_byte_is_a_clear_line(runs, tmp_path, capsys):
    run, _, _ = runs("mlp")
    folder = exporting.export(run, "stablehlo", out=tmp_path / "out", batches=(1,), say=silent)
    assert exit_code("export", "--check", str(folder)) == 0
    assert "unchanged" in capsys.readouterr().out
    files = sorted(folder.iterdir())
    assert [f.name for f in files] == ["MODEL_CARD.md", "model.stablehlo", "model_card.json", "names.json"]
    for path in files:
        whole = path.read_bytes()
        for place in (0, len(whole) // 2, len(whole) - 1):
            edited = bytearray(whole)
            edited[place] ^= 4
            path.write_bytes(edited)
            assert exit_code("export", "--check", str(folder)) == 1
            (line,) = capsys.readouterr().err.splitlines()
            assert path.name in line and ("was changed" in line or "cannot be read" in line)
            with pytest.raises(RunError, match=path.name):
                exporting.load(folder)
        path.write_bytes(whole)
        path.rename(tmp_path / "away")
        assert exit_code("export", "--check", str(folder)) == (2 if path.name == CARD else 1)
        assert path.name in capsys.readouterr().err
        (tmp_path / "away").rename(path)


def exit_code(*arguments):
    with pytest.raises(SystemExit) as caught:
        main(list(arguments))
    return caught.value.code


class Wrong(runtimes.Runner):
    """A runtime that is right at batch 1 and, at larger ones, adds 0.0002 to the last row."""

    def __call__(self, *inputs):
        found = np.array(super().__call__(*inputs))
        if len(found) > 1:
            found[-1] += 2e-4
        return found


def test_a_wrong_batch_size_is_found_and_nothing_is_kept(runs, tmp_path, monkeypatch):
    run, _, _ = runs("mlp")
    monkeypatch.setattr(exporting, "Runner", Wrong)
    with pytest.raises(RunError, match=r"stablehlo differs from JAX at batch 256: largest difference 0\.0002, at most 0\.0001"):
        exporting.export(run, "stablehlo", out=tmp_path / "kept" / "out", say=silent)
    assert list((tmp_path / "kept").iterdir()) == []
    exporting.export(run, "stablehlo", out=tmp_path / "kept" / "out", batches=(1,), say=silent)


def test_a_failed_export_leaves_the_earlier_one(runs, tmp_path, monkeypatch):
    run, _, _ = runs("mlp")
    folder = exporting.export(run, "stablehlo", out=tmp_path / "out", batches=(1,), say=silent)
    with monkeypatch.context() as patched:
        patched.setattr(exporting, "Runner", Wrong)
        with pytest.raises(RunError):
            exporting.export(run, "stablehlo", out=folder, batches=(2,), say=silent)
    assert exporting.load(folder).batches == (1,)
    assert exporting.load(exporting.export(run, "stablehlo", out=folder, batches=(2,), say=silent)).batches == (2,)


class Fake:
    """A runner that gives JAX's outputs, changed."""

    def __init__(self, deployable, int8, change):
        self.deployable, self.card, self.change = deployable, {"int8": int8}, change

    def inputs(self, raw):
        return (raw,)

    def __call__(self, raw):
        return self.change(self.deployable.reference(raw))


def test_verdicts(runs):
    deployable = read_run(runs("mlp")[0])
    wanted = deployable.reference(deployable.blueprint.dataset.test["inputs"][:256])

    def verdict(int8, change):
        return parity.verdict(deployable, Fake(deployable, int8, change), 256)

    same = verdict("none", lambda logits: logits)
    assert same["passed"] and same["largest"] == 0 and same["rows"] == 256
    shifted = verdict("static", lambda logits: logits + np.float32(0.1 * wanted.std()))
    assert shifted["passed"] and shifted["rms"] == pytest.approx(0.1, rel=1e-4)
    assert shifted["largest"] == pytest.approx(0.1 * wanted.std(), rel=1e-4)
    assert not verdict("static", lambda logits: logits + np.float32(0.21 * wanted.std()))["passed"]
    assert not verdict("none", lambda logits: logits + np.float32(1.5e-4))["passed"]
    for int8 in ("none", "static"):
        assert not verdict(int8, lambda logits: np.where(np.arange(len(logits))[:, None] == 3, np.nan, logits))["passed"]


def test_ranking_of_exported_scores_is_the_runs_own(runs):
    run, blueprint, _ = runs("bpr")
    deployable = read_run(run)
    dataset, task = blueprint.dataset, blueprint.task
    raw = dataset.test["inputs"]
    own = rank_split(deployable.model, dataset, deployable.variables, "test", max(task.cutoffs))
    found = parity._answer(deployable, lambda: (deployable.reference(raw[i : i + 50]) for i in range(0, len(raw), 50)))
    np.testing.assert_array_equal(found.items, own.items)
    assert task.metrics(found, dataset, "test") == task.metrics(own, dataset, "test")


def test_a_network_that_scores_in_chunks_can_do_without_the_loop(runs):
    for name, loops in (("neumf", True), ("bpr", False), ("mlp", False)):
        deployable = read_run(runs(name)[0])
        assert (deployable.unrolled.keywords.get("listed", False)) == loops
        given = deployable.inputs(deployable.blueprint.dataset.test["inputs"][:3])
        np.testing.assert_allclose(deployable.unrolled(*given), deployable.function(*given), rtol=0, atol=1e-6)


def test_a_tree_is_exported_too(tmp_path):
    from jdistill.run import run
    from tests.tiny import config

    folder = tmp_path / "run"
    run(config(("evaluate.latency", False), data="digits", teacher="none", loss="none", student="tree"), folder)
    card = read_card(exporting.export(folder, "stablehlo", say=silent))
    assert [v["largest"] for v in card["parity"]] == [0, 0]
    result = json.loads((folder / "result.json").read_text())
    assert card["metric"]["jax"] == card["metric"]["exported"] == result["metrics"]["test"]["accuracy"]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["RUN", "--to", "onxn"], "unknown runtime 'onxn'; did you mean 'onnx'?"),
        (["RUN", "--to", "stablehlo", "--int8", "static"], "stablehlo is float32, got --int8 static"),
        (["RUN", "--to", "stablehlo", "--batch", "1,x"], "--batch must be different positive integers"),
        (["RUN", "--to", "stablehlo", "--batch", "2,2"], "--batch must be different positive integers"),
        (["RUN"], "takes RUN --to"),
        (["NONE", "--to", "stablehlo"], "holds no result.json"),
        (["RUN", "--to", "stablehlo", "--out", "TAKEN"], "holds other files"),
        (["--check", "NONE"], "holds no model_card.json"),
    ],
)
def test_wrong_requests_are_one_line(arguments, line, runs, tmp_path, capsys):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.tex").touch()
    places = {"RUN": str(runs("mlp")[0]), "NONE": str(tmp_path / "none"), "TAKEN": str(tmp_path / "taken")}
    assert exit_code("export", *[places.get(a, a) for a in arguments]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert line in error
    assert (tmp_path / "taken" / "thesis.tex").is_file()


@pytest.mark.parametrize("runtime", ["onnx", "litert"])
def test_a_missing_extra_is_named(runtime, runs, monkeypatch):
    monkeypatch.setattr(runtimes.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=rf"{runtime} needs .* pip install 'jdistill\[{runtime}\]'"):
        exporting.export(runs("mlp")[0], runtime, say=silent)


def test_only_a_finished_unchanged_run(tmp_path):
    run, _, _ = write_run(tmp_path / "run", "mlp")
    result = json.loads((run / "result.json").read_text())
    (run / "result.json").write_text(json.dumps({**result, "status": "failed"}))
    with pytest.raises(UsageError, match="a run that is failed"):
        exporting.export(run, "stablehlo", say=silent)
    (run / "result.json").write_text(json.dumps(result))
    artifact = bytearray((run / "artifact.safetensors").read_bytes())
    artifact[-1] ^= 1
    (run / "artifact.safetensors").write_bytes(artifact)
    with pytest.raises(RunError, match="not the file that result"):
        exporting.export(run, "stablehlo", say=silent)
    (run / "artifact.safetensors").unlink()
    with pytest.raises(RunError, match=r"artifact.safetensors is missing"):
        exporting.export(run, "stablehlo", say=silent)


def test_what_cannot_be_converted_is_one_line(runs, tmp_path, monkeypatch):
    def refuse(*_):
        raise NotImplementedError("no such primitive\nline two")

    monkeypatch.setattr(stablehlo, "write", refuse)
    with pytest.raises(RunError, match=r"student=mlp cannot be converted to stablehlo \(NotImplementedError: no such"):
        exporting.export(runs("mlp")[0], "stablehlo", out=tmp_path / "out", say=silent)
    assert not (tmp_path / "out").exists()
