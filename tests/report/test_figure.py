import fake_runs as fake
import matplotlib.image
import pytest

from jdistill.commands import write_report
from jdistill.errors import UsageError
from jdistill.report import collect, curves_figure, scatter_figure
from jdistill.report.figure import _best, _curve, _groups, held_out_curves, pareto


@pytest.fixture
def frame(tmp_path):
    return collect(fake.small_sweep(tmp_path / "sweep"))


def test_pareto_front():
    points = [(1.0, 5.0), (2.0, 4.0), (2.0, 7.0), (3.0, 7.0), (4.0, 9.0)]
    assert pareto(points) == [(1.0, 5.0), (2.0, 7.0), (4.0, 9.0)]
    assert pareto(points, lower=True) == [(1.0, 5.0), (2.0, 4.0)]


@pytest.mark.parametrize("suffix", ["png", "pdf", "svg"])
def test_scatter_is_written_and_deterministic(frame, tmp_path, suffix):
    files = scatter_figure(frame, tmp_path / "new" / f"a.{suffix}")
    assert [f.name for f in files] == list(dict.fromkeys(["a.png", f"a.{suffix}"]))
    again = scatter_figure(frame, tmp_path / f"b.{suffix}", by=["loss"])
    assert files[-1].read_bytes() == again[-1].read_bytes()
    pixels = matplotlib.image.imread(files[0])
    assert pixels.shape[0] > 400 and pixels.std() > 0.05


def test_scatter_svg_holds_what_it_should(frame, tmp_path):
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none"}):
        text = scatter_figure(frame, tmp_path / "a.svg")[-1].read_text()
    for word in ("dkd", "none", "teacher", "test accuracy (%)", "size on disk"):
        assert word in text


def test_curves(tmp_path):
    for seed in range(2):
        curve = [{"epoch": e, "validation": {"accuracy": 0.5 + 0.1 * e + 0.02 * seed}} for e in range(3)]
        fake.write_run(tmp_path / f"run{seed}", fake.result(seed, 0.9), curve)
    frame = collect([tmp_path / "run0", tmp_path / "run1"])
    assert curves_figure(frame, tmp_path / "c.png")[0].stat().st_size > 5000
    with pytest.raises(
        UsageError, match=r"unknown key of metrics.jsonl 'validation.acuracy'; did you mean 'validation.accuracy'"
    ):
        curves_figure(frame, tmp_path / "c.png", y="validation.acuracy")


def test_curve_values():
    runs = [
        [{"epoch": 1, "a": 0.1}, {"epoch": 1, "a": 0.2}, {"epoch": 2, "a": None}],
        [{"epoch": 1, "a": 0.4}, {"epoch": 2, "a": 0.5}],
    ]
    curve = _curve(runs, "epoch", "a")
    assert [point[:2] for point in curve] == [(1.0, pytest.approx(0.3)), (2.0, 0.5)]
    assert curve[0][2] == pytest.approx(0.2 / 2**0.5)


def test_many_groups_and_two_keys_are_drawn(tmp_path):
    records = [
        fake.result(
            0,
            0.9 + t / 1000,
            overrides=[f"loss.temperature={t}", f"compression={c}", "seed=0"],
            config__loss__temperature=t,
            choices__compression=c,
            size__bytes=1000 * 3**t,
        )
        for t in range(1, 12)
        for c in ("none", "prune")
    ]
    assert scatter_figure(collect(fake.write_sweep(tmp_path / "s", records)), tmp_path / "a.png")[0].exists()


def test_bad_requests(frame, tmp_path):
    with pytest.raises(UsageError, match=r"cannot write the format '.docx'"):
        scatter_figure(frame, tmp_path / "a.docx")
    with pytest.raises(UsageError, match=r"unknown numeric column 'size.byte'; did you mean 'size.bytes'"):
        scatter_figure(frame, tmp_path / "a.png", x="size.byte")
    with pytest.raises(UsageError, match=r"no finished run has size.bytes and metrics.test.accuracy"):
        scatter_figure(frame[frame["status"] == "failed"], tmp_path / "a.png")
    with pytest.raises(UsageError, match="no run has learning curves"):
        curves_figure(frame, tmp_path / "a.png")


def grid(folder, rows=20, key="validation"):
    """The baseline, the worst of all, and `rows` temperatures of growing accuracy, two seeds each, with curves."""
    records = []
    for t in range(rows + 1):
        for seed in range(2):
            accuracy = 0.5 + 0.02 * t + 0.01 * seed
            record = fake.result(seed, accuracy, loss="kd" if t else "none")
            if t:
                record["config"]["loss"]["temperature"] = t
                record["overrides"] = ["loss=kd", f"loss.temperature={t}", f"seed={seed}"]
            if key != "validation":
                record["metrics"] = {"test": {"accuracy": accuracy}, "train": {"accuracy": accuracy}}
            records.append(record)
    sweep = fake.write_sweep(folder, records)
    for job, record in enumerate(records):
        lines = [{"epoch": e, key: {"accuracy": 0.1 * e}} for e in range(1, 4)]
        fake.write_run(sweep / f"run{job:02d}", record, lines)
    return sweep


def test_the_best_rows_and_the_baseline_are_drawn(tmp_path):
    columns, groups = _groups(collect(grid(tmp_path / "sweep")), None, ())
    kept, title = _best(groups, columns, "validation.accuracy", 12)
    temperatures = [values[columns.index("config.loss.temperature")] for values in kept]
    assert sorted(t for t in temperatures if t is not None) == list(range(10, 21)) and len(kept) == 12
    assert title == "the best 11 of 21 rows by validation accuracy, and the best one with loss=none"
    lower, _ = _best(groups, columns, "test.cross_entropy", 2)
    assert {values[columns.index("config.loss.temperature")] for values in lower} == {None, 20}
    everything, _ = _best(groups, columns, "validation.accuracy", 21)
    assert everything == groups


def test_only_the_files_of_drawn_rows_are_read_and_each_once(tmp_path, monkeypatch):
    from jdistill.report import figure

    read, real = [], figure.read_curves
    monkeypatch.setattr(figure, "read_curves", lambda path: read.append(path) or real(path))
    frame = collect(grid(tmp_path / "sweep"))
    assert [file.name for file in held_out_curves(frame, tmp_path / "curves.png")] == ["curves.png"]
    assert len(read) == len(set(read)) == 24


@pytest.mark.parametrize("key", ["test", "train"])
def test_without_validation_data(tmp_path, key, monkeypatch):
    from jdistill.report import figure

    drawn = []
    monkeypatch.setattr(figure, "titles", lambda axes, x, y: drawn.append(y))
    assert held_out_curves(collect(grid(tmp_path / "sweep", rows=2, key=key)), tmp_path / "curves.png")
    assert drawn == [f"{key}.accuracy"]


def test_pruned_runs_are_not_in_the_curves(tmp_path):
    sweep = grid(tmp_path / "sweep", rows=2)
    with_all = curves_figure(collect(sweep), tmp_path / "all.png")[0].read_bytes()
    record = {**fake.result(7, 0.1, loss="none"), "status": "pruned"}
    fake.write_run(tmp_path / "run7", record, [{"epoch": 1, "validation": {"accuracy": 0.9}}])
    assert curves_figure(collect([sweep, tmp_path / "run7"]), tmp_path / "more.png")[0].read_bytes() == with_all


def test_many_points_are_named_on_the_front_only(tmp_path):
    import matplotlib

    frame = collect(grid(tmp_path / "sweep", rows=45))
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        text = scatter_figure(frame, tmp_path / "a.svg")[-1].read_text()
    assert "temperature=45" in text and "temperature=30" not in text and "45 rows not on the front" in text


def test_the_report_of_a_sweep_has_curves(tmp_path):
    sweep = grid(tmp_path / "sweep", rows=2)
    assert f"learning curves: {sweep / 'curves.png'}" in write_report(sweep).splitlines()
    first = (sweep / "curves.png").read_bytes()
    write_report(sweep)
    assert (sweep / "curves.png").read_bytes() == first
    bare = fake.small_sweep(tmp_path / "bare")  # no metrics.jsonl
    assert "learning curves" not in write_report(bare) and not (bare / "curves.png").exists()


def test_a_report_reads_each_file_once(tmp_path, monkeypatch):
    """What a job costs is reading its two files; the rest is by the row."""
    from pathlib import Path

    sweep, opened, real = grid(tmp_path / "sweep", rows=3), [], Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda self, *a, **k: opened.append(str(self)) or real(self, *a, **k))
    write_report(sweep)
    assert len(opened) == len(set(opened)) == 8 * 2 + 1
