"""What students cost, in tables and figures: columns that are asked for, budgets, the Pareto front over any cost."""

import csv
import io

import pytest
from fake_runs import result, write_sweep

from jdistill.errors import UsageError
from jdistill.report import collect, make_table, render, scatter_figure
from jdistill.report.figure import pareto

COSTS = {"none": (0.90, 9000, 5000, 0.05), "kd": (0.93, 9000, 5000, 0.05), "dkd": (0.95, 40000, 70000, 0.2)}


def with_costs(seed: int, loss: str) -> dict:
    accuracy, size, flops, milliseconds = COSTS[loss]
    made = result(seed, accuracy + seed / 1000, loss=loss)
    made["size"]["bytes"] = size + seed  # the mean of two seeds is half a byte more
    made["cost"] = {"flops": flops, "macs": flops // 2, "memory_bytes": 3 * size}
    made["latency_ms"] = {
        "1": {"p50": milliseconds, "cpu50": milliseconds / 2}, "256": {"p50": 1.0, "cpu50": 0.9, "throughput": 256e3}
    }  # fmt: skip
    return made


@pytest.fixture
def frame(tmp_path):
    return collect(write_sweep(tmp_path / "sweep", [with_costs(seed, loss) for loss in COSTS for seed in (0, 1)]))


def cells(table) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(render(table, "csv"))))


def test_costs_are_shown_where_they_are_asked_for(frame):
    asked = ["metric", "flops", "macs", "memory", "throughput", "cpu_1", "cpu_256"]
    made = make_table(frame, columns=asked)
    row = next(row for row in cells(made) if row["loss"] == "dkd")
    found = [float(row[name]) for name in ("flops", "macs", "memory", "latency_ms.256.throughput")]
    assert found == [70000, 35000, 120000, 256000]
    assert float(row["latency_ms.1.cpu50"]) == 0.1 and float(row["latency_ms.256.cpu50"]) == 0.9
    assert "70,000" in render(made, "text")
    assert not {"FLOPs", "MACs", "within budget"} & {column.title for column in make_table(frame).columns}


def test_a_run_without_costs_has_dashes(tmp_path):
    bare = collect(write_sweep(tmp_path / "old", [result(0, 0.9)]))
    made = make_table(bare, columns=["metric", "flops"], budget="flops=100")
    assert render(made, "text").splitlines()[2].split()[-2:] == ["-", "-"] and made.rows[0]["within"] is None


@pytest.mark.parametrize(
    ("budget", "within"),
    [
        ("bytes=20000", {"none": True, "kd": True, "dkd": False}),
        ("bytes=9000.5", {"none": True, "kd": True, "dkd": False}),
        ("bytes=9000", {"none": False, "kd": False, "dkd": False}),
        ({"bytes": 50000, "latency_ms": 0.1}, {"none": True, "kd": True, "dkd": False}),
        ("flops=1e5, nonzero=3e3", {"none": True, "kd": True, "dkd": True}),
    ],
)
def test_rows_beyond_a_budget_are_marked_and_none_is_dropped(frame, budget, within):
    made = make_table(frame, budget=budget)
    assert {row["choices.loss"]: row["within"] for row in made.rows} == within
    column = [column.title for column in made.columns].index("within budget") + 1
    lines = [line.split("|") for line in render(made, "markdown").splitlines()]
    shown = {line[1].strip(): line[column].strip() for line in lines[2:5]}
    assert shown == {loss: "yes" if inside else "no" for loss, inside in within.items()}
    assert made.footer[-1].startswith("within: ") and "<=" in made.footer[-1]
    assert [c.name for c in make_table(frame, budget=budget, columns=["metric"]).columns][-1] == "within"


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ("byte=3", "unknown cost in --budget 'byte'; did you mean 'bytes'"),
        ("bytes=small", "--budget: bytes must be a positive number, such as bytes=20000, got 'small'"),
        ("bytes=0", "must be a positive number"),
        ("bytes", "must be a positive number"),
        ({"bytes": True}, "must be a positive number"),
        (3, "--budget must name costs and their limits, such as bytes and 20000, got 3"),
    ],
)
def test_a_wrong_budget_is_one_line(frame, budget, message):
    with pytest.raises(UsageError, match=message):
        make_table(frame, budget=budget)


@pytest.mark.parametrize(
    ("x", "title"),
    [("flops", "operations"), ("latency_1", "latency at batch 1"), ("memory", "memory"), ("cost.macs", "multiply-accumulates")],
)
def test_the_front_over_another_cost(frame, tmp_path, monkeypatch, x, title):
    from jdistill.report import figure

    axes = []
    titles = figure.titles
    monkeypatch.setattr(figure, "titles", lambda drawn, *names: (titles(drawn, *names), axes.append(drawn)))
    (file,) = scatter_figure(frame, tmp_path / "front.png", x=x)
    assert file.stat().st_size > 1000 and title in axes[0].get_xlabel()
    column = {"flops": "cost.flops", "latency_1": "latency_ms.1.p50", "memory": "cost.memory_bytes"}.get(x, x)
    means = frame.groupby("choices.loss")[[column, "metrics.test.accuracy"]].mean()
    front = next(line for line in axes[0].get_lines() if line.get_label() == "Pareto front")
    wanted = [(px, 100 * py) for px, py in pareto(list(map(tuple, means.to_numpy())))]
    assert len(wanted) == 2  # kd is as cheap as none and better
    assert list(zip(*front.get_data(), strict=True)) == [pytest.approx(point) for point in wanted]
