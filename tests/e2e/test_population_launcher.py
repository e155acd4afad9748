"""hydra/launcher=population from the command line: what members are, what Hydra's own launcher would have left."""

import json
import signal
import sys
from pathlib import Path

import pytest
import yaml
from hydra.core.utils import JobStatus

from jdistill.sweep import launch
from tests.e2e.helpers import TINY, call, files, finish, jobs, result, rows, run, start, succeed, until

GRID = ("loss=kd", "loss.temperature=1,4", "seed=range(0,4)")
VMAP, LOOP = ("hydra.launcher.strategy=vmap",), ("hydra.launcher.strategy=loop",)
SAME = ("artifact.safetensors", "metrics.jsonl")

CALLBACK = """
from pathlib import Path
from hydra.experimental.callback import Callback

class Noting(Callback):
    def __init__(self, path):
        self.path = Path(path)

    def note(self, *words):
        with self.path.open("a") as file:
            print(*words, file=file)

    def on_multirun_start(self, config, **kwargs):
        self.note("multirun starts")

    def on_multirun_end(self, config, **kwargs):
        self.note("multirun ends")

    def on_job_start(self, config, *, task_function, **kwargs):
        self.note("start", config.hydra.job.num, config.hydra.runtime.output_dir)

    def on_job_end(self, config, job_return, **kwargs):
        self.note("end", config.hydra.job.num, config.hydra.runtime.output_dir, job_return.status.name)
"""


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """One grid carried out three ways, in the same cache: {way: its folder}."""
    where = tmp_path_factory.mktemp("ways")
    ways = {"vmap": VMAP, "loop": LOOP, "basic": ("hydra/launcher=basic", "hydra/sweeper=basic")}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(where)
        patch.setenv("JDISTILL_CACHE", str(where / "cache"))
        for name, way in ways.items():
            succeed("-m", *TINY, *GRID, *way, f"hydra.sweep.dir={where / name}")
    return {name: where / name for name in ways}


def by_folder(sweep: Path) -> dict[str, dict]:
    return {path.parent.name: result(path.parent) for path in sorted(sweep.glob("*/result.json"))}


def test_a_population_is_recorded_in_results_and_units(swept):
    rows_ = json.loads((swept["vmap"] / "units.json").read_text())
    assert [(row["jobs"], row["strategy"]) for row in rows_] == [(list(range(8)), "vmap")]
    for record in by_folder(swept["vmap"]).values():
        assert record["strategy"]["population"] == {
            "strategy": "vmap", "members": 8, "reason": "asked for by hydra.launcher.strategy",
        }  # fmt: skip
    alone = json.loads((swept["loop"] / "units.json").read_text())
    assert [row["jobs"] for row in alone] == [[i] for i in range(8)] and {row["strategy"] for row in alone} == {"loop"}
    assert all("population" not in record["strategy"] for record in by_folder(swept["loop"]).values())
    assert not list((swept["vmap"] / "populations").glob("*"))


def test_a_population_gives_what_a_loop_gives_in_float32(swept):
    """In float64 to 1e-10: tests/test_population.py. Here one test example may change sides."""
    stacked, looped = by_folder(swept["vmap"]), by_folder(swept["loop"])
    assert set(stacked) == set(looped) and len(stacked) == 8
    for name, one in stacked.items():
        other = looped[name]
        for split in ("train", "validation", "test"):
            for metric, value in one["metrics"][split].items():
                wanted = pytest.approx(other["metrics"][split][metric], rel=2e-4, abs=3e-3 if "acc" in metric else 1e-5)
                if isinstance(value, float) and "agreement" not in metric:
                    assert value == wanted, (name, split, metric)
        for key in ("fingerprint", "config", "choices", "overrides", "epoch", "steps", "data", "report", "teacher"):
            assert one[key] == other[key], key
        assert [(row["epoch"], row["step"]) for row in rows(swept["vmap"] / name)] == [
            (row["epoch"], row["step"]) for row in rows(swept["loop"] / name)
        ]
    assert len({one["metrics"]["test"]["cross_entropy"] for one in stacked.values()}) == 8


def test_members_one_after_another_are_the_runs_of_hydras_launcher_bit_for_bit(swept):
    names = {path.parent.name for path in swept["basic"].glob("*/result.json")}
    assert len(names) == 8
    for name in names:
        for file in SAME:
            assert (swept["loop"] / name / file).read_bytes() == (swept["basic"] / name / file).read_bytes()


def test_a_member_one_after_another_is_its_solo_run_bit_for_bit(swept, tmp_path, monkeypatch):
    monkeypatch.setenv("JDISTILL_CACHE", str(swept["loop"].parent / "cache"))
    found = run(tmp_path / "alone", *TINY, "loss=kd", "loss.temperature=4", "seed=2")
    for file in SAME:
        assert (tmp_path / "alone" / file).read_bytes() == (swept["loop"] / found["fingerprint"] / file).read_bytes()
    assert found["metrics"] == result(swept["loop"] / found["fingerprint"])["metrics"]


@pytest.mark.parametrize("way", ["vmap", "loop"])
def test_job_folders_are_those_of_hydras_launcher(swept, way):
    ours, basic = swept[way], swept["basic"]
    names = {path.parent.name for path in basic.glob("*/result.json")}
    assert names == {job["dir"] for job in jobs(ours)}
    for name in names:
        assert files(ours / name) == files(basic / name)
        for file in ("config.yaml", "overrides.yaml"):
            assert (ours / name / ".hydra" / file).read_bytes() == (basic / name / ".hydra" / file).read_bytes()
        mine, its = (yaml.safe_load((sweep / name / ".hydra" / "hydra.yaml").read_text())["hydra"] for sweep in (ours, basic))
        for node, sweep in ((mine, ours), (its, basic)):
            assert node["runtime"].pop("output_dir") == str(sweep / name) and node["sweep"].pop("dir") == str(sweep)
            for key in ("hydra/launcher", "hydra/sweeper"):
                node["runtime"]["choices"].pop(key)
            node["overrides"].pop("hydra")
        assert mine.pop("launcher")["_target_"].endswith("PopulationLauncher")
        assert its.pop("launcher")["_target_"].endswith("BasicLauncher")
        assert mine.pop("sweeper")["_target_"].endswith("JdistillSweeper")
        its.pop("sweeper")
        assert mine == its


def returns_of(monkeypatch, owner, *arguments):
    """What the launcher gave back to the sweeper."""
    found, real = [], owner.launch
    monkeypatch.setattr(owner, "launch", lambda *given, **more: found.append(real(*given, **more)) or found[-1])
    call("-m", *TINY, "loss=none", "optim=sgd", *arguments)
    return found[0]


@pytest.mark.slow
def test_a_sweeper_gets_the_returns_of_hydras_launcher_in_the_order_of_jobs(monkeypatch, tmp_path):
    """Two groups take turns, and two jobs diverge."""
    given = ("optim.lr=1e-3,1e30", "student.widths=[8],[4]")
    ours = returns_of(monkeypatch, launch, *given, *VMAP, "hydra.launcher.workers=2", "hydra.sweep.dir=ours")
    from hydra._internal.core_plugins.basic_launcher import BasicLauncher  # the class is made anew as Hydra finds plug-ins

    basic = returns_of(monkeypatch, BasicLauncher, *given, "hydra/launcher=basic", "hydra/sweeper=basic", "hydra.sweep.dir=b")
    assert len(ours) == len(basic) == 4
    for one, other in zip(ours, basic, strict=True):
        assert (one.overrides, one.status, one.task_name, one.working_dir) == (
            other.overrides, other.status, other.task_name, other.working_dir,
        )  # fmt: skip
        if one.status == JobStatus.COMPLETED:
            assert one.return_value == pytest.approx(other.return_value, abs=3e-3)
        else:
            assert type(one._return_value) is type(other._return_value) and str(one._return_value) == str(other._return_value)
    diverging = ["optim.lr=1e+30" in returned.overrides or "optim.lr=1e30" in returned.overrides for returned in ours]
    assert [returned.status == JobStatus.FAILED for returned in ours] == diverging and sum(diverging) == 2


@pytest.mark.slow
def test_hydras_launcher_under_our_sweeper():
    """It keeps no book of its jobs, so there is no table; a failed job is the exit code."""
    done = call("-m", *TINY, "loss=none", "seed=0,1", "hydra/launcher=basic", "hydra.sweep.dir=fine")
    assert done.code == 0 and not done.error_lines and len(list(Path("fine").glob("*/result.json"))) == 2
    bad = call("-m", *TINY, "loss=none", "optim=sgd", "optim.lr=1e30,1e-3", "hydra/launcher=basic", "hydra.sweep.dir=bad")
    assert bad.code == 1 and len(bad.error_lines) == 1 and "diverged" in bad.error_lines[0]


def test_a_users_callback_is_called_for_each_job_and_the_sweep(tmp_path, monkeypatch):
    (tmp_path / "noting_of_launcher.py").write_text(CALLBACK)
    monkeypatch.syspath_prepend(str(tmp_path))
    target = f"+hydra.callbacks.mine={{_target_: noting_of_launcher.Noting, path: {tmp_path / 'log'}}}"
    done = call("-m", *TINY, "loss=none", "optim=sgd", "optim.lr=1e-3,1e30", "seed=0,1", *VMAP, target, "hydra.sweep.dir=sweep")
    assert done.code == 1
    found, expected = (tmp_path / "log").read_text().splitlines(), ["multirun starts"]
    for job in jobs(Path("sweep")):
        where = f"{job['job']} {tmp_path / 'sweep' / job['dir']}"
        expected += [f"start {where}", f"end {where} {'COMPLETED' if job['status'] == 'finished' else 'FAILED'}"]
    assert found[: len(expected)] == expected and len(expected) == 9
    sys.modules.pop("noting_of_launcher", None)


def test_a_folder_named_by_the_overrides(tmp_path):
    """A habit of Hydra's users."""
    name = "hydra.sweep.subdir=${hydra.job.num}_${hydra.job.override_dirname}"
    few = ("data.limit=256", "optim.epochs=1", "evaluate.latency=false", "loss=none", "student.widths=[8]")
    exclude = "hydra.job.config.override_dirname.exclude_keys=[data.limit,optim.epochs,evaluate.latency,student.widths]"
    succeed("-m", *few, "seed=0,1", *VMAP, name, exclude, "hydra.sweep.dir=sweep")
    assert [job["dir"] for job in jobs(Path("sweep"))] == ["0_loss=none,seed=0", "1_loss=none,seed=1"]
    assert all(result(Path("sweep") / job["dir"])["status"] == "finished" for job in jobs(Path("sweep")))


EARLY = (*TINY, "loss=none", "optim.epochs=12", "optim.lr=0.003,0.3,1", "seed=0,1", "student.dropout=0.2")


@pytest.mark.slow
@pytest.mark.parametrize(
    "asked", [pytest.param(("evaluate.patience=2",), marks=pytest.mark.slow), ("evaluate.patience=2", "report=best_val")]
)
def test_each_member_stops_and_is_chosen_by_its_own_validation(asked):
    succeed("-m", *EARLY, *asked, *VMAP, "hydra.sweep.dir=stacked")
    succeed("-m", *EARLY, *asked, *LOOP, "hydra.sweep.dir=looped")
    stacked, looped = by_folder(Path("stacked")), by_folder(Path("looped"))
    assert {one["strategy"]["population"]["members"] for one in stacked.values()} == {6}
    for name, one in stacked.items():
        mine, other = rows(Path("stacked") / name), looped[name]
        accuracies = [row["validation"]["accuracy"] for row in mine]
        best = accuracies.index(max(accuracies)) + 1
        if "report=best_val" in asked:
            assert one["epoch"] == best and one["metrics"]["validation"]["accuracy"] == pytest.approx(max(accuracies))
        if "evaluate.patience=2" in asked:
            assert len(mine) == min(12, best + 2) and one["steps"] == len(mine) * 8
            assert one["epoch"] == (best if "report=best_val" in asked else len(mine))
        assert (one["epoch"], one["steps"], len(mine)) == (other["epoch"], other["steps"], len(rows(Path("looped") / name)))
    assert len({one["epoch"] for one in stacked.values()}) > 1


LONG = (*TINY, "loss=none", "optim.epochs=100", "optim.lr=1e-3,3e-3", "seed=0,1", "student.dropout=0.2")


def saved_step(sweep: Path) -> int:
    """The step of the newest checkpoint of a sweep's only population; -1 where there is none."""
    return max((int(path.name.split("-")[1]) for path in sweep.glob("populations/*/checkpoints/[0-9]*-[0-9]*")), default=-1)


@pytest.mark.slow
def test_a_population_that_is_terminated_goes_on_bit_for_bit(tmp_path):
    """And a larger sweep in its folder trains the new members only."""
    succeed("-m", *LONG, *VMAP, "hydra.sweep.dir=whole")
    sweep = tmp_path / "stopped"
    command = ("-m", *LONG, *VMAP, f"hydra.sweep.dir={sweep}")

    process = start(*command, "checkpoint.every_steps=5", cwd=tmp_path)
    assert until(process, lambda: saved_step(sweep) >= 100)
    process.send_signal(signal.SIGTERM)
    done = finish(process)
    assert done.code == 143 and len(done.error_lines) == 1 and "Traceback" not in done.err
    assert {job["status"] for job in jobs(sweep)} == {"pending"} and not list(sweep.glob("*/result.json"))
    stopped = saved_step(sweep)
    assert 100 <= stopped < 100 * 8
    again = succeed(*command)
    assert "4 jobs" in again.err and not list(sweep.glob("populations/*"))
    for name, record in by_folder(tmp_path / "whole").items():
        for file in SAME:
            assert (sweep / name / file).read_bytes() == (tmp_path / "whole" / name / file).read_bytes()
        assert result(sweep / name)["metrics"] == record["metrics"] and result(sweep / name)["steps"] == record["steps"]
    stamps = {path: path.stat().st_mtime_ns for path in sweep.glob("*/*") if path.name in ("result.json", *SAME)}
    larger = [text if text != "seed=0,1" else "seed=0,1,2" for text in command]
    succeed(*larger)
    assert len(stamps) == 12 and all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())
    assert [job["status"] for job in jobs(sweep)] == ["finished"] * 6
    new = [record for record in by_folder(sweep).values() if record["config"]["seed"] == 2]
    assert [record["strategy"]["population"]["members"] for record in new] == [2, 2]
    (unit,) = [row for row in json.loads((sweep / "units.json").read_text()) if row["jobs"] == [2, 5]]
    assert unit["strategy"] == "vmap"


def test_wrong_launcher_keys_are_refused_before_anything_is_trained():
    for key, message in (("strategy=vmpa", "did you mean 'vmap'"), ("workers=-1", "hydra.launcher.workers must be at least 0")):
        done = call("-m", *TINY, "seed=0,1", f"hydra.launcher.{key}", "hydra.sweep.dir=sweep")
        assert done.code == 2 and len(done.error_lines) == 1 and message in done.error_lines[0]
    assert not list(Path("sweep").glob("*/result.json")) if Path("sweep").exists() else True
