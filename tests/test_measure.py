"""What a network costs: counts against sums done by hand and by XLA, times against calls of known length, the command."""

import itertools
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import sparse

from jdistill.blueprint import read
from jdistill.errors import UsageError
from jdistill.measure import command as commands
from jdistill.measure import latency, memory_bytes, operations
from jdistill.measure.cost import Uncountable, count
from jdistill.measure.interleaved import Subject, interleaved, one_core
from jdistill.measure.timing import Time, summary, timed
from tests.e2e.helpers import TINY
from tests.e2e.helpers import run as run_command
from tests.tiny import config


def xla(program, *arguments) -> float:
    return jax.jit(program).lower(*arguments).cost_analysis()["flops"]


def zeros(*shape: int) -> jax.Array:
    return jnp.zeros(shape, jnp.float32)


def mlp(weights, x):
    for w, b in weights[:-1]:
        x = jax.nn.relu(x @ w + b)
    return x @ weights[-1][0] + weights[-1][1]


def test_an_mlp_by_hand_and_by_xla():
    widths = (784, 1200, 1200, 10)
    weights = [(zeros(i, o), zeros(o)) for i, o in itertools.pairwise(widths)]
    found = count(mlp, weights, zeros(1, 784))
    assert found.macs == 784 * 1200 + 1200 * 1200 + 1200 * 10
    assert found.others == 2 * 1200 + 2 * 1200 + 10  # a bias and a ReLU each, and the last bias
    assert found.flops == xla(mlp, weights, zeros(1, 784)) == 4_790_410


def pairs(images, height, width, kernel, stride, padding, dilation, channels, outputs, groups):
    """Products of a convolution, one after another."""
    found = 0
    for size in (height, width):
        low, high = padding
        reach = (kernel - 1) * dilation + 1
        starts = range(-low, size + high - reach + 1, stride)
        inside = sum(0 <= start + k * dilation < size for start in starts for k in range(kernel))
        found = inside if not found else found * inside
    return found * images * outputs * (channels // groups)


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation", "groups"),
    [(3, 1, (1, 1), 1, 1), (3, 2, (0, 1), 1, 1), (5, 2, (2, 2), 1, 2), (3, 1, (2, 2), 2, 4), (1, 2, (0, 0), 1, 1)],
)
def test_convolutions_without_their_padding(kernel, stride, padding, dilation, groups):
    height, width, channels, outputs = 9, 8, 4, 8

    def convolved(kernels, x):
        return jax.lax.conv_general_dilated(
            x, kernels, (stride, stride), (padding, padding), rhs_dilation=(dilation, dilation),
            dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups,
        )  # fmt: skip

    given = zeros(kernel, kernel, channels // groups, outputs), zeros(2, height, width, channels)
    wanted = pairs(2, height, width, kernel, stride, padding, dilation, channels, outputs, groups)
    assert count(convolved, *given) == (wanted, 0)
    assert 2 * wanted == xla(convolved, *given)


def test_a_loop_counts_as_often_as_it_runs():
    def looped(w, x):
        return jax.lax.scan(lambda c, _: (jax.lax.fori_loop(0, 3, lambda _, c: c @ w, c), None), x, None, 10)[0]

    def unrolled(w, x):
        for _ in range(30):
            x = x @ w
        return x

    w = zeros(16, 16)
    assert count(looped, w, w).macs == count(unrolled, w, w).macs == 30 * 16**3
    assert count(unrolled, w, w).flops == xla(unrolled, w, w)
    with pytest.raises(Uncountable):
        count(lambda x: jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: x + 1, x), w)


def test_what_is_counted_and_what_is_not():
    x = zeros(4, 6)
    assert count(lambda x: jnp.tanh(x) + x, x) == (0, 48)
    assert count(lambda x: x.sum(), x) == (0, 24)
    assert count(lambda x: x.T.reshape(-1)[::2], x) == (0, 0)
    assert count(lambda x: x.astype(jnp.int32) + 1, x) == (0, 0)
    assert count(lambda x: jnp.zeros((3, 6)).at[jnp.array([0, 0, 1, 2])].add(x), x) == (0, 24)
    assert count(lambda x: (x @ x.T, x + 1)[1], x) == (0, 24)  # nothing depends on the product
    assert count(jax.jit(lambda x: jax.nn.relu(x)), x) == (0, 24)
    stored = sparse.BCSR.fromdense(jnp.array([[1.0, 0, 2], [0, 0, 3]]))
    assert count(lambda rows, x: rows @ x, stored, zeros(3, 5)).macs == 3 * 5


CHOICES = {
    "mlp": {"data": "digits"},
    "lenet": {"data": "digits"},
    "bpr": {"data": "synthetic_shop", "task": "recommend", "history": 0},
    "sasrec": {"data": "synthetic_shop", "task": "recommend", "history": 20},
}


def given(student: str):
    choices = dict(CHOICES[student])
    changes = (("data.history", choices.pop("history")),) if "history" in choices else ()
    blueprint = read(config(*changes, student=student, teacher="none", loss="none", **choices))
    variables = blueprint.student.init(jax.random.key(0), blueprint.inputs)
    return blueprint.student, blueprint.dataset.preprocess, variables, blueprint.dataset.test["inputs"]


@pytest.mark.parametrize("student", CHOICES)
def test_the_operations_of_networks_are_near_those_that_xla_counts(student):
    from jdistill.train import forward

    model, preprocess, variables, inputs = given(student)
    found = operations(model, preprocess, variables, inputs)
    assert 0.98 < found["flops"] / xla(forward(model, preprocess), *variables, inputs[:1]) < 1.02
    assert 0.85 < 2 * found["macs"] / found["flops"] <= 1


def test_a_request_is_answered_for_the_whole_catalogue():
    found = operations(*given("bpr"))
    items, dim = given("bpr")[2][0]["item"].shape
    assert found["macs"] == items * dim


def test_a_recurrent_network_counts_each_position():
    """The gates of a GRU: 3 products of D x D for the input and 3 for the state, at every one of L positions."""
    changes = (("data.history", 20), ("student.dim", 16))
    made = read(config(*changes, data="synthetic_shop", task="recommend", student="gru4rec", teacher="none", loss="none"))
    variables = made.student.init(jax.random.key(0), made.inputs)
    found = operations(made.student, made.dataset.preprocess, variables, made.dataset.test["inputs"])
    items = variables[0]["item"].shape[0]
    assert found["macs"] == 20 * 6 * 16 * 16 + items * 16


def test_a_tree_multiplies_nothing(tmp_path):
    run_command(tmp_path / "tree", "data=digits", "student=tree", "teacher=none", "loss=none", "evaluate.latency=false")
    found = json.loads((tmp_path / "tree" / "result.json").read_text())["cost"]
    assert found == {"flops": None, "macs": None}


def test_memory_is_what_goes_in_comes_out_and_lies_between():
    model, preprocess, variables, inputs = given("lenet")
    found = memory_bytes(model, preprocess, variables, inputs, 256)
    given_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(variables)) + 256 * inputs[0].nbytes
    assert found > given_bytes + 256 * 10 * 4
    one = memory_bytes(model, preprocess, variables, inputs, 1)
    assert found - one >= 255 * (inputs[0].nbytes + 40)


def test_a_summary_of_times():
    times = [Time(wall, wall / 2) for wall in range(1, 101)]
    found = summary(times, 256)
    assert found == pytest.approx(
        {"p50": 50.5, "p90": 90.1, "p99": 99.01, "cpu50": 25.25, "throughput": 256 / 0.0505, "repeats": 100}
    )


def test_processor_time_leaves_out_what_was_waited():
    waited = timed(lambda: time.sleep(0.05))
    assert waited.wall >= 50 and waited.cpu < 25


def test_latency_has_both_batches():
    found = latency(*given("mlp"), 7)
    assert set(found) == {"1", "256"} and all(entry["repeats"] == 7 for entry in found.values())
    assert all(0 < e["p50"] <= e["p90"] <= e["p99"] and e["cpu50"] > 0 for e in found.values())


class Busy:
    """A model that keeps the processor for so many milliseconds of its own time, and notes its calls in a common list."""

    def __init__(self, name: str, milliseconds: float, calls: list[str]):
        self.name, self.nanoseconds, self.calls = name, milliseconds * 1e6, calls

    def __call__(self, raw: np.ndarray) -> np.ndarray:
        self.calls.append(self.name)
        until = time.thread_time_ns() + self.nanoseconds
        while time.thread_time_ns() < until:
            pass
        return raw

    @property
    def subject(self) -> Subject:
        return Subject(self.name, "none", self, np.zeros((3, 2), np.float32))


def test_turns_and_the_ratio_of_known_times():
    calls: list[str] = []
    subjects = [Busy("short", 0.4, calls).subject, Busy("long", 1.2, calls).subject]
    short, long = interleaved(subjects, 4, repeats=40, rounds=8)
    counted = calls[-2 * 8 * 6 :]  # 8 rounds of 2 turns of 1 + 5 calls
    turns = [counted[i : i + 6] for i in range(0, len(counted), 6)]
    assert all(len(set(turn)) == 1 for turn in turns)
    rounds = [(turns[i][0], turns[i + 1][0]) for i in range(0, len(turns), 2)]
    assert {frozenset(pair) for pair in rounds} == {frozenset({"short", "long"})} and len(set(rounds)) == 2
    assert (short["repeats"], long["repeats"], long["batch"]) == (40, 40, 4)
    assert short["ratio"] == 1 and short["baseline"] and not long["baseline"]
    assert long["cpu_ratio.low"] <= long["cpu_ratio"] <= long["cpu_ratio.high"] and 2 < long["cpu_ratio"] < 4
    assert long["ratio.low"] > 1 and long["p50"] >= 1.2


def test_a_slow_model_is_repeated_less_often(monkeypatch):
    monkeypatch.setattr("jdistill.measure.interleaved.SECONDS", 0.04)
    (row,) = interleaved([Busy("slow", 5, []).subject], 1, repeats=1000, rounds=4)
    assert 4 <= row["repeats"] <= 8


def test_rows_that_a_model_cannot_take_are_one_line():
    def refuse(raw):
        raise ValueError("expected (1, 64)\nand much more")

    subject = Subject("other", "onnx", refuse, np.zeros((3, 28, 28), np.uint8))
    with pytest.raises(UsageError, match=r"^other cannot be given 2x28x28 uint8 rows of the data: expected \(1, 64\)$"):
        interleaved([subject], 2, 4, 2)


def test_one_core_is_given_back():
    import os

    before = os.sched_getaffinity(0)
    with one_core() as alone:
        assert alone and len(os.sched_getaffinity(0)) == 1
    assert os.sched_getaffinity(0) == before


class FakeRunner:
    """As `jdistill.export.runtimes.Runner`."""

    def __init__(self, folder: Path):
        self.card = {"runtime": "onnx"}

    def passed(self, batch: int) -> bool:
        return batch == 1

    def inputs(self, raw: np.ndarray) -> tuple[np.ndarray, ...]:
        return (raw,)

    def __call__(self, raw: np.ndarray) -> np.ndarray:
        assert isinstance(raw, np.ndarray) and raw.shape[1:] == (8, 8, 1)
        return raw


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        tiny = (*TINY[:1], *TINY[3:], "data=digits", "teacher=none", "loss=none")
        for name, widths in (("small", "[8]"), ("large", "[512,512]")):
            run_command(folder / name, *tiny, f"student.widths={widths}")
    return [folder / "small", folder / "large"]


def test_runs_record_operations_whether_timed_or_not(runs):
    small, large = (json.loads((run / "result.json").read_text()) for run in runs)
    assert small["latency_ms"] == {} and "memory_bytes" not in small["cost"]
    assert small["cost"]["macs"] == 64 * 8 + 8 * 10 and large["cost"]["macs"] == 64 * 512 + 512 * 512 + 512 * 10


def test_the_command_compares_runs_and_exported_models(runs, tmp_path, monkeypatch):
    monkeypatch.setattr("jdistill.export.runtimes.load", FakeRunner)
    exported = runs[0] / "export" / "onnx"
    exported.mkdir(parents=True)
    out = [tmp_path / f"table.{suffix}" for suffix in ("csv", "md", "json")]
    text = commands.compare([*runs, exported], (1,), 40, 4, out=out)
    rows = json.loads(out[2].read_text())["rows"]
    assert [(row["model"], row["runtime"]) for row in rows] == [
        (str(runs[0]), "jax"), (str(runs[1]), "jax"), (str(exported), "onnx")
    ]  # fmt: skip
    assert rows[1]["cpu_ratio"] > rows[2]["cpu_ratio"] and rows[0]["repeats"] == 40
    lines = text.splitlines()
    assert lines[0].split()[:3] == ["model", "runtime", "batch"] and "first" in lines[2]
    assert any("load average" in line and "cores" in line for line in lines)
    assert len(out[0].read_text().splitlines()) == 4 and out[1].read_text().startswith("| model")
    with pytest.raises(UsageError, match=r"not known to give what JAX gives at batch 256.*--batch 256"):
        commands.compare([runs[0], exported], (1, 256), 4, 2)
    names = [str(exported), str(runs[0])]
    lines = commands.compare([runs[0]], (1,), 4, 2, runtimes=("onnx", "jax")).splitlines()[2:4]
    assert [line.split()[:2] for line in lines] == [[names[0], "onnx"], [names[1], "jax"]]
    assert commands.compare([exported], (1,), 4, 2).splitlines()[2].split()[:2] == [names[0], "onnx"]


def test_mistakes_of_the_command_are_one_line(runs, tmp_path):
    sweep = tmp_path / "sweep"
    sweep.mkdir()
    (sweep / "jobs.jsonl").touch()
    empty = tmp_path / "empty"
    empty.mkdir()
    for paths, options, message in [
        ([tmp_path / "nothing"], {}, "is no folder"),
        ([sweep], {}, "is a sweep"),
        ([empty], {}, "holds no result.json; give a finished run's folder too"),
        ([runs[1]], {"runtimes": ("jax", "litert")}, "litert is not there; make it first: jdistill export .*large --to litert"),
        ([runs[0], runs[0]], {}, "given twice"),
        ([runs[0]], {"batches": (1, 0)}, "--batch must be different positive integers such as 1,256, got 1,0"),
        ([runs[0]], {"rounds": 1}, "--rounds at least 2"),
        ([runs[0]], {"out": [tmp_path / "table.xls"]}, "cannot write '.xls'"),
    ]:
        with pytest.raises(UsageError, match=message):
            commands.compare(paths, **{"batches": (1,), "repeats": 4, "rounds": 2, **options})
