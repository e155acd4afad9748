import fake_runs as fake
import matplotlib.image
import pytest

from jdistill.errors import UsageError
from jdistill.report import collect, curves_figure, scatter_figure
from jdistill.report.figure import _curve, pareto


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
