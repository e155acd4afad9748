"""A job composed the cheap way has exactly the config, choices, folder and error that Hydra gives it."""

import itertools
import random

import pytest
from hydra.core.utils import filter_overrides
from hydra.errors import HydraException
from omegaconf import OmegaConf

from jdistill.config import fingerprint
from jdistill.sweep.jobs import choices, plain
from tests.marks import slow_but
from tests.sweep.hydras import multirun

SWEPT = {
    "numbers": [["seed=0", "optim.lr=1"], ["seed=1", "optim.lr=0.5"], ["seed=2", "optim.lr=1e-3"], ["seed=-3", "optim.lr=5"]],
    "an int, then a float": [
        ["loss.temperature=4"], ["loss.temperature=4.0"], ["loss.temperature=inf"],
        ["loss.temperature=2"],
    ],
    "null and back": [["loss.temperature=4"], ["loss.temperature=null"], ["loss.temperature=2"], ["transfer.omit=[1]"]],
    "lists": [["student.widths=[8]"], ["student.widths=[]"], ["student.widths=[4,5,6]"], ["student.widths=[16,8]"]],
    "typed lists": [["transfer.keep=[1,2]"], ["transfer.keep=null"], ["transfer.keep=[3]"], ["transfer.keep=[]"]],
    "bools": [["force=true"], ["force=false"], ["fail_fast=True", "evaluate.latency=no"], ["evaluate.latency=yes"]],
    "strings": [
        ["report=last"], ["report=best_val"], ["report='best_val'"], ['report="best test"'], ["report=1"],
        ["report=''"],
    ],
    "quoted numbers": [["loss.temperature='4'"], ["loss.temperature=4"], ['loss.temperature="a b, c"']],
    "groups": [["loss=kd", "loss.temperature=2"], ["loss=hint"], ["loss=none"], ["loss=kd", "loss.temperature=3"]],
    "group after value": [["loss.weight=0.5", "loss=hint"], ["loss.weight=0.7", "loss=hint"], ["loss.weight=0.7", "loss=dkd"]],
    "packages": [["optim@teacher.optim=sgd"], ["optim@teacher.optim=sgd", "seed=1"], ["teacher.optim.lr=0.1"], ["seed=1"]],
    "experiments": [["experiment=quickstart", "seed=1"], ["experiment=quickstart", "seed=2"], ["seed=2"]],
    "added keys": [["+loss.note=a", "seed=1"], ["+loss.note=a", "seed=2"], ["+loss.note=b", "seed=2"], ["seed=2"]],
    "deleted keys": [["~seed", "optim.lr=1"], ["~seed", "optim.lr=2"], ["optim.lr=2"], ["~plugins"]],
    "schedules": [
        ["loss.weight={name: linear, start: 1, end: 0}"], ["loss.weight=0.5"], ["loss.weight={name: linear, start: 2, end: 0}"],
        ["loss.weight=0.25"], ["seed=3"],
    ],
    "parts of a schedule": [
        ["loss.weight={name: linear, start: 1, end: 0}", "loss.weight.end=0.1"],
        ["loss.weight={name: linear, start: 1, end: 0}", "loss.weight.end=0.2"], ["loss.weight=1"],
    ],
    "interpolations": [
        ["teacher.seed=${seed}", "seed=1"], ["teacher.seed=${seed}", "seed=2"], ["teacher.seed=5", "seed=3"],
        ["loss.weight=${task.weight}", "task.weight=7"], ["loss.weight=${task.weight}", "task.weight=8"],
    ],
    "Hydra's keys": [
        ["seed=1", "hydra.sweep.subdir=job${hydra.job.num}"], ["seed=2", "hydra.sweep.subdir=job${hydra.job.num}"],
        ["seed=1", "hydra.sweep.subdir=${hydra.job.override_dirname}"],
        ["seed=2", "hydra.sweep.subdir=${hydra.job.override_dirname}"],
        ["seed=2", "hydra.sweep.subdir=by-${report}-${seed}"], ["seed=4", "hydra.sweep.subdir=by-${report}-${seed}"],
        ["seed=4", "hydra.sweep.subdir=x-${hydra.overrides.task.0}"],
        ["seed=5", "hydra.sweep.subdir=x-${hydra.overrides.task.0}"],
    ],
    "one key twice": [["seed=1", "seed=2"], ["seed=3", "seed=4"], ["seed=5", "++seed=9"], ["seed=6", "++seed=9"]],
    "a part, then the whole": [
        ["checkpoint.every_steps=1", "checkpoint={every_steps: 7}"],
        ["checkpoint.every_steps=2", "checkpoint={every_steps: 7}"],
        ["checkpoint.every_steps=3"], ["checkpoint={every_steps: 8}", "checkpoint.every_steps=4"],
        ["checkpoint={every_steps: 8}", "checkpoint.every_steps=5"],
    ],
    "a value in place of a group's node": [
        ["teacher.optim.lr=1", "teacher.optim=sgd"],
        ["teacher.optim.lr=2", "teacher.optim=sgd"],
    ],
}  # fmt: skip

REFUSED = {
    "unknown key": ["loss.temprature=3"],
    "unknown option": ["loss=kdd"],
    "wrong type": ["evaluate.every=often"],
    "wrong type in a list": ["transfer.keep=[1,x]"],
    "a bool that is none": ["force=maybe"],
    "an unknown key in a node": ["checkpoint.never=1"],
    "a key below a number": ["seed.x=3"],
    "a package that is not": ["optim@nowhere.optim=sgd", "seed=1"],
    "added twice": ["+seed=3"],
    "deleted, never there": ["~loss.nothing"],
    "null for a bool": ["force=null"],
}


@pytest.fixture(scope="module")
def hydra(tmp_path_factory):
    return multirun(tmp_path_factory.mktemp("multirun") / "sweep")


def assert_as_hydra(hydra, composed, overrides, number):
    """A composed job against Hydra's own composition."""
    config, job = hydra.basic(overrides, number), composed.job
    assert typed(job.config) == typed(plain(config))
    assert job.choices == choices(config.hydra) and job.number == number
    assert job.overrides == tuple(filter_overrides(overrides)) and composed.overrides == tuple(overrides)
    assert job.folder == hydra.composer().folder / str(config.hydra.sweep.subdir)
    assert job.identity == fingerprint(plain(config))


def typed(value):
    """With the types of numbers, and the order of keys: 1 is not 1.0, nor True."""
    if isinstance(value, dict):
        return [(key, typed(v)) for key, v in value.items()]
    return [typed(v) for v in value] if isinstance(value, list) else (type(value), str(value))


QUICK = (
    "numbers", "lists", "groups", "group after value", "added keys", "deleted keys", "interpolations", "Hydra's keys",
)  # fmt: skip
"""The ways in which jobs are asked for."""


@pytest.mark.parametrize("jobs", slow_but(QUICK, SWEPT))
def test_a_job_is_what_hydra_composes(hydra, jobs):
    composer = hydra.composer()
    for number, overrides in enumerate(jobs):
        assert_as_hydra(hydra, composer.job(overrides, number), overrides, number)


SHUFFLED = ("null and back", "lists", "typed lists", "schedules", "interpolations", "one key twice")


@pytest.mark.parametrize("name", slow_but(("null and back", "lists", "schedules"), SHUFFLED))
def test_the_order_of_jobs_does_not_matter(hydra, name):
    """No value of one job is left in the next, whichever comes first."""
    jobs = SWEPT[name]
    wanted = [typed(plain(hydra.basic(overrides, 0))) for overrides in jobs]
    drawn = random.Random(1)
    for _ in range(3):
        composer, order = hydra.composer(), drawn.sample(range(len(jobs)), len(jobs))
        for i in order:
            assert typed(composer.job(jobs[i], i).job.config) == wanted[i], (order, i)


@pytest.mark.slow
def test_many_jobs_in_any_order(hydra):
    """Random rows of a grid over numbers, groups, lists and null, against Hydra."""
    values = {
        "seed": ["0", "1", "7"], "loss.weight": ["0.5", "1", "{name: linear, start: 1, end: 0}"],
        "optim.lr": ["1e-3", "1"], "student.widths": ["[8]", "[4,4]"], "loss": ["kd", "dkd", "logit_mse"],
        "evaluate.patience": ["0", "3"], "teacher.seed": ["${seed}", "4"],
    }  # fmt: skip
    drawn, composer = random.Random(0), hydra.composer()
    for number in range(20):
        keys = drawn.sample(sorted(values), drawn.randint(0, len(values)))
        overrides = [f"{key}={drawn.choice(values[key])}" for key in keys]
        assert_as_hydra(hydra, composer.job(overrides, number), overrides, number)


def test_composed_once_where_only_values_change(hydra, monkeypatch):
    composer, calls = hydra.composer(), []
    real = composer.compose
    monkeypatch.setattr(composer, "compose", lambda *given: calls.append(given) or real(*given))
    for number, (loss, seed) in enumerate(itertools.product(("kd", "none"), range(50))):
        composer.job([f"loss={loss}", f"seed={seed}", f"optim.lr={(seed + 1) / 100}", f"student.widths=[{seed + 1}]"], number)
    assert len(calls) == 2


def cause(compose):
    """The chain of Hydra's errors that `compose()` raises."""
    with pytest.raises(HydraException) as caught:
        compose()
    error, texts = caught.value, []
    while error is not None:
        texts.append((type(error), str(error)))
        error = error.__cause__
    return texts


@pytest.mark.parametrize("overrides", REFUSED.values(), ids=REFUSED)
def test_what_hydra_refuses_is_refused_in_its_words(hydra, overrides):
    composer = hydra.composer()
    assert cause(lambda: composer.job(overrides, 1)) == cause(lambda: hydra.basic(overrides, 1))


@pytest.mark.parametrize(
    ("good", "bad"),
    [
        (["evaluate.every=2"], ["evaluate.every=often"]), (["transfer.keep=[1]"], ["transfer.keep=[1,x]"]),
        (["seed=1", "force=true"], ["seed=2", "force=maybe"]), (["force=false"], ["force=null"]),
    ],
)  # fmt: skip
def test_a_refused_value_is_refused_in_hydras_words_after_others_and_left_behind(hydra, good, bad):
    composer = hydra.composer()
    composer.job(good, 0)
    assert cause(lambda: composer.job(bad, 1)) == cause(lambda: hydra.basic(bad, 1))
    assert_as_hydra(hydra, composer.job(good, 2), good, 2)


def test_the_sweep_folder_is_one_whatever_a_jobs_own_overrides(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for asked in ("sweeps/${jdistill.sweep:}", "here", "../sweep", str(tmp_path / "a b")):
        hydra = multirun(asked, "seed=0,1")
        composer = hydra.composer()
        folders = {composer.job([f"seed={seed}"], seed).job.folder for seed in range(2)}
        assert len(folders) == 2 and all(folder.is_absolute() for folder in folders)
        (parent,) = {folder.parent for folder in folders}
        assert parent.resolve() == (tmp_path / str(hydra.master.hydra.sweep.dir)).resolve()


def test_a_job_is_free_of_hydra(hydra):
    """It is sent to other processes: only plain containers, with nothing left to resolve."""

    def kinds(value):
        if isinstance(value, dict):
            return set().union({dict}, *map(kinds, value.values()))
        return set().union({list}, *map(kinds, value)) if isinstance(value, list) else {type(value)}

    job = hydra.composer().job(["teacher.seed=${seed}", "seed=3", "loss.weight={name: linear, start: 1, end: 0}"], 0).job
    assert kinds(job.config) <= {dict, list, str, int, float, bool, type(None)}
    assert "${" not in str(job.config) and not OmegaConf.is_config(job.config) and job.config["teacher"]["seed"] == 3
