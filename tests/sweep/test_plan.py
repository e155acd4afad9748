"""Which jobs are trained together: structure decides, then a rule for the width; what a killed session left comes first."""

import json
import shutil
from pathlib import Path

import pytest

from jdistill.errors import UsageError
from jdistill.sweep import plan
from jdistill.sweep.plan import plan_units, unit_of, width_of, workers_of
from jdistill.sweep.units import Settings
from tests.sweep import made
from tests.tiny import config

LOOP, VMAP = Settings(strategy="loop"), Settings(strategy="vmap")


def numbers(units):
    return [[job.number for job in unit.jobs] for unit in units]


def planned(folder, jobs, settings=VMAP):
    return plan_units(jobs, made.blueprints(jobs), folder, settings)


TOGETHER = {
    "seed": (0, 1, 2),
    "loss.temperature": (1, 4.0, 2.5),
    "loss.weight": (0.1, 0.5, 1),
    "task.weight": (0.5, 1.0),
    "optim.lr": (1e-3, 1, 0.5),
    "optim.momentum": (0.9, 0.8),
    "optim.weight_decay": (1e-4, 1e-3),
    "optim.warmup_epochs": (0.0, 1.0),
    "evaluate.predictions": (True, False),
    "force": (True, False),
}
APART = {
    "optim.epochs": (2, 3),
    "optim.batch_size": (16, 32),
    "optim.kind": ("adam", "sgd"),
    "optim.weight_decay": (0.0, 1e-3),  # none at all is another program
    "optim.drop_last": (True, False),
    "student.widths": ([6], [7]),
    "student.dropout": (0.0, 0.1),
    "teacher.widths": ([8], [9]),
    "teacher.seed": (0, 1),
    "teacher.optim.lr": (0.01, 0.02),
    "data.seed": (0, 1),
    "data.split_seed": (0, 1),
    "data.limit": (50, 60),
    "report": ("last", "best_val"),
    "evaluate.patience": (0, 2),
    "evaluate.every": (1, 2),
    "transfer.keep": (None, [1]),
    "parallel.precision": ("float32", "bfloat16"),
    "parallel.strategy": ("auto", "loop"),
}


@pytest.mark.parametrize("key", TOGETHER)
def test_numbers_do_not_split_a_population(key, tmp_path):
    if key == "force":  # the same run twice is one run
        same = made.jobs(tmp_path, ((key, True),), ((key, False),))
        assert same[0].identity == same[1].identity and numbers(planned(tmp_path, same)) == [[1]]
        return
    jobs = made.jobs(tmp_path, *(((key, value),) for value in TOGETHER[key]))
    (unit,) = planned(tmp_path, jobs)
    assert unit.jobs == tuple(jobs) and unit.strategy == "vmap" and unit.folder.parent == tmp_path / "populations"


@pytest.mark.parametrize("key", APART)
def test_structure_splits(key, tmp_path):
    jobs = made.jobs(tmp_path, *(((key, value), ("seed", seed)) for seed in (0, 1) for value in APART[key]))
    assert numbers(planned(tmp_path, jobs)) == [[0, 2], [1, 3]]


def test_other_checkpoints_split(tmp_path):
    each = [(("checkpoint.every_epochs", i % 2), ("seed", i)) for i in range(4)]
    assert numbers(planned(tmp_path, made.jobs(tmp_path, *each))) == [[0, 2], [1, 3]]


def test_options_split(tmp_path):
    jobs = [made.job(tmp_path, i, ("seed", i), loss=loss) for i, loss in enumerate(("kd", "logit_mse", "kd", "none"))]
    units = planned(tmp_path, jobs)
    assert numbers(units) == [[0, 2], [1], [3]]
    assert [unit.strategy for unit in units] == ["vmap", "loop", "loop"]
    assert units[1].reason == "the only job of its structure" and units[1].folder is None


def test_a_derived_number_does_not_split(tmp_path):
    """Two weights that add up to one, a rate that depends on the seed: all numbers, one program."""
    each = [
        (("loss.weight", w), ("task.weight", 1 - w), ("optim.lr", 0.01 * (s + 1)), ("seed", s))
        for s in (0, 1)
        for w in (0.1, 0.7)
    ]
    (unit,) = planned(tmp_path, made.jobs(tmp_path, *each))
    assert len(unit.jobs) == 4


def test_a_schedule_is_another_program_but_its_numbers_are_not(tmp_path):
    def falling(end):
        return {"name": "linear", "start": 1.0, "end": end, "epochs": None, "delay": 0}

    jobs = made.jobs(tmp_path, *((("loss.weight", value),) for value in (0.5, falling(0.0), 0.7, falling(0.2))))
    assert numbers(planned(tmp_path, jobs)) == [[0, 2], [1, 3]]


@pytest.mark.parametrize("key", ["scheme.seed", "scheme.labelled"])
def test_other_labelled_examples_split(key, tmp_path):
    values = {"scheme.seed": (0, 1), "scheme.labelled": (0.1, 0.3)}[key]
    each = [((key, value), ("seed", seed)) for seed in (0, 1) for value in values]
    assert numbers(planned(tmp_path, made.jobs(tmp_path, *each, scheme="semi"))) == [[0, 2], [1, 3]]


def test_equal_configs_are_one_job(tmp_path):
    """4 and 4.0 are one temperature; where the run is kept, and whether it is forced, is not what it is."""
    jobs = made.jobs(
        tmp_path, (("loss.temperature", 4),), (("loss.temperature", 4.0),), (("cache", "x"),), (("seed", 1),), (("seed", 1),)
    )
    found = numbers(planned(tmp_path, jobs))
    assert len(found) == 1 and len(found[0]) == 2 == len({jobs[i].identity for i in found[0]})


# -- widths


def width(settings=Settings(), count=64, *changes):  # noqa: B008 (frozen)
    (blueprint,) = made.blueprints([made.job(Path("nowhere"), 0, *changes)])
    return width_of(blueprint, count, settings)


def on(monkeypatch, platform="cpu", memory=1e12, cores=1):
    monkeypatch.setattr(plan.jax, "default_backend", lambda: platform)
    monkeypatch.setattr(plan, "free_memory", lambda: memory)
    monkeypatch.setattr(plan.os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)


def state_bytes(inputs=10, hidden=6, classes=2):
    """Parameters, and Adam's two moments of each, in float32."""
    return 3 * 4 * (inputs * hidden + hidden + hidden * classes + classes)


def test_dense_members_fill_the_cache_and_no_more(monkeypatch):
    on(monkeypatch)
    monkeypatch.setattr(plan, "CACHE_BYTES", 10.5 * state_bytes())
    found, reason = width()
    assert found == 10 and "dense" in reason
    assert width(Settings(), 7)[0] == 7
    monkeypatch.setattr(plan, "LARGE_BYTES", 0.9 * state_bytes())
    found, reason = width()
    assert found == 1 and "worth its call" in reason
    monkeypatch.setattr(plan, "LARGE_BYTES", 1e9)
    sgd = (("optim.kind", "sgd"),)
    monkeypatch.setattr(plan, "CACHE_BYTES", 3 * state_bytes())
    assert width(Settings(), 64, *sgd)[0] == 4  # parameters and one moment


def test_every_worker_has_a_unit(monkeypatch):
    on(monkeypatch, cores=4)
    assert [width(Settings(), count)[0] for count in (64, 10, 5)] == [16, 3, 2]
    found, reason = width(Settings(), 4)
    assert found == 1 and reason == "4 jobs for 4 workers"
    assert width(Settings(workers=2), 64)[0] == 32


def test_convolutions_are_trained_one_by_one_on_a_cpu_alone(monkeypatch):
    on(monkeypatch)
    small = [("data", config(data="digits")["data"]), ("student", config(student="lenet")["student"])]
    found, reason = width(Settings(), 8, *small)
    assert found == 1 and "convolutions" in reason
    assert width(VMAP, 8, *small)[0] == 8
    on(monkeypatch, platform="gpu")
    found, reason = width(Settings(), 8, *small)
    assert found == 8 and "accelerator" in reason


def test_no_more_members_than_fit_into_memory(monkeypatch):
    on(monkeypatch, platform="gpu", memory=1e12)
    assert width(Settings(), 10_000)[0] == plan.WIDEST == width(VMAP, 10_000)[0]
    on(monkeypatch, platform="gpu", memory=1e6)
    few = width(Settings(), 10_000)[0]
    on(monkeypatch, platform="gpu", memory=2e6)
    assert 1 < few < plan.WIDEST and width(Settings(), 10_000)[0] in (2 * few, 2 * few + 1)
    on(monkeypatch, platform="gpu", memory=1.0)
    assert width(Settings(), 10_000)[0] == width(VMAP, 10_000)[0] == 1


def test_what_the_user_asks_for(monkeypatch):
    on(monkeypatch)
    assert width(LOOP) == (1, "asked for by hydra.launcher.strategy")
    assert width(VMAP) == (64, "asked for by hydra.launcher.strategy")
    assert width(Settings(strategy="vmap", max_members=5))[0] == 5 == width(Settings(max_members=5))[0]
    assert width(VMAP, 1) == (1, "the only job of its structure")
    monkeypatch.setattr(plan, "is_resident", lambda blueprint: False)
    assert width(VMAP) == (1, "the data is sent batch by batch")


def test_data_beyond_the_device_is_not_stacked(monkeypatch):
    on(monkeypatch)
    assert width(VMAP, 64, ("parallel.device_bytes", 10.0)) == (1, "the data is sent batch by batch")


def test_workers(monkeypatch):
    on(monkeypatch, cores=3)
    assert workers_of(Settings()) == 3 and workers_of(Settings(workers=7)) == 7
    assert workers_of(Settings(platform="gpu")) == 1
    on(monkeypatch, platform="gpu", cores=3)
    assert workers_of(Settings()) == 1 and workers_of(Settings(platform="cpu")) == 3


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"strategy": "vmpa"}, r"hydra.launcher.strategy must be one of auto, loop, vmap, got 'vmpa'; did you mean 'vmap'\?"),
        ({"workers": -1}, "hydra.launcher.workers must be at least 0, got -1"),
        ({"max_members": -2}, "hydra.launcher.max_members must be at least 0, got -2"),
    ],
)
def test_wrong_settings(given, message):
    with pytest.raises(UsageError, match=message):
        Settings(**given)


def test_units_are_cut_evenly_in_order(tmp_path):
    jobs = made.jobs(tmp_path, *((("seed", seed),) for seed in range(7)))
    units = planned(tmp_path, jobs, Settings(strategy="vmap", max_members=3))
    assert numbers(units) == [[0, 1, 2], [3, 4, 5], [6]]
    assert [unit.strategy for unit in units] == ["vmap", "vmap", "loop"]
    assert len({unit.folder for unit in units}) == 3
    assert numbers(planned(tmp_path, jobs, LOOP)) == [[i] for i in range(7)]


# -- what a killed session left


def test_a_run_with_a_checkpoint_of_its_own_goes_on_alone(tmp_path, seeds):
    (seeds[2].folder / "checkpoints" / "0-8").mkdir(parents=True)
    units = planned(tmp_path, seeds)
    assert sorted(numbers(units)) == [[0, 1, 3, 4, 5], [2]]
    assert next(unit for unit in units if len(unit.jobs) == 1).strategy == "loop"


def checkpointed(unit):
    (unit.folder / "checkpoints" / "0-8").mkdir(parents=True)
    return unit


@pytest.fixture
def seeds(tmp_path):
    return made.jobs(tmp_path, *((("seed", seed),) for seed in range(6)))


def test_a_population_that_was_begun_keeps_its_members_and_their_order(tmp_path, seeds):
    order = [seeds[i] for i in (4, 0, 2)]
    begun = checkpointed(unit_of(order, "the reason", tmp_path))
    units = planned(tmp_path, seeds)
    assert numbers(units) == [[4, 0, 2], [1, 3, 5]]
    assert units[0] == begun and units[0].reason == "the reason"


def test_finished_members_are_trained_along_where_their_population_goes_on(tmp_path, seeds):
    checkpointed(unit_of(seeds[:4], "r", tmp_path))
    units = planned(tmp_path, [seeds[1], seeds[5]])  # all others are finished
    assert numbers(units) == [[0, 1, 2, 3], [5]]
    assert [(job.number, job.identity, job.folder) for job in units[0].jobs] == [
        (j.number, j.identity, j.folder) for j in seeds[:4]
    ]
    assert [job.config for job in units[0].jobs] == [job.config for job in seeds[:4]]


def test_a_job_keeps_the_number_it_has_in_this_sweep(tmp_path, seeds):
    checkpointed(unit_of(seeds[:3], "r", tmp_path))
    renumbered = [made.job(tmp_path, 10 + seed, ("seed", seed)) for seed in range(3)]
    assert numbers(planned(tmp_path, renumbered)) == [[10, 11, 12]]


def test_a_population_without_a_checkpoint_is_planned_anew(tmp_path, seeds):
    unit_of(seeds[:4], "r", tmp_path)
    assert numbers(planned(tmp_path, seeds)) == [[0, 1, 2, 3, 4, 5]]


def test_a_population_that_is_done_is_left_alone(tmp_path, seeds):
    checkpointed(unit_of(seeds[:4], "r", tmp_path))
    assert numbers(planned(tmp_path, seeds[4:])) == [[4, 5]]


def test_a_folder_that_moved_is_found_where_it_is(tmp_path, seeds):
    sweep = tmp_path / "sweep"
    jobs = made.jobs(sweep, *((("seed", seed),) for seed in range(3)))
    checkpointed(unit_of(jobs, "r", sweep))
    shutil.move(sweep, tmp_path / "moved")
    moved = made.jobs(tmp_path / "moved", *((("seed", seed),) for seed in range(3)))
    (unit,) = planned(tmp_path / "moved", moved[:1])
    assert [job.folder for job in unit.jobs] == [job.folder for job in moved]
    assert unit.folder.parent == tmp_path / "moved" / "populations"


DAMAGE = {
    "empty": lambda text: "",
    "cut": lambda text: text[: len(text) // 2],
    "a list": lambda text: "[1, 2]",
    "null": lambda text: "null",
    "no jobs": lambda text: json.dumps({**json.loads(text), "jobs": None}),
    "no reason": lambda text: json.dumps({k: v for k, v in json.loads(text).items() if k != "reason"}),
    "one job short": lambda text: json.dumps({**json.loads(text), "jobs": json.loads(text)["jobs"][1:]}),
    "an unknown field": lambda text: json.dumps(
        {**json.loads(text), "jobs": [{**row, "new": 1} for row in json.loads(text)["jobs"]]}
    ),
    "another's": lambda text: json.dumps({**json.loads(text), "fingerprints": ["0" * 12] * 4}),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_record_is_ignored(damage, tmp_path, seeds):
    unit = checkpointed(unit_of(seeds[:4], "r", tmp_path))
    path = unit.folder / "unit.json"
    path.write_text(damage(path.read_text()))
    assert numbers(planned(tmp_path, seeds)) == [[0, 1, 2, 3, 4, 5]]
