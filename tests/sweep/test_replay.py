"""What is left of a job once its outcome is known: the files, callbacks and return values of Hydra's own job run."""

import random
from pathlib import Path

import pytest
from hydra.core.utils import JobStatus, run_job
from omegaconf import OmegaConf

from jdistill.errors import RunError
from jdistill.sweep import replay
from jdistill.sweep.replay import Replay, to_yaml
from tests.e2e.helpers import files
from tests.marks import slow_but
from tests.sweep.hydras import multirun

JOBS = {
    "numbers": [["seed=0", "optim.lr=1"], ["seed=1", "optim.lr=5e-4"], ["seed=2", "optim.lr=0.5"]],
    "groups and lists": [["loss=hint", "student.widths=[8]"], ["loss=kd", "student.widths=[4,5]"], ["loss=none"]],
    "strings": [
        ["+loss.note='yes'", "report=last"], ["+loss.note='a: b # c'"], ['+loss.note="two  words"'],
        ["+loss.note='é☂😀'"],
    ],
    "schedules": [["loss.weight={name: linear, start: 1, end: 0}"], ["loss.weight=0.5"]],
    "interpolations": [["teacher.seed=${seed}", "seed=1"], ["teacher.seed=${seed}", "seed=2"]],
    "Hydra's keys": [
        ["seed=1", "hydra.sweep.subdir=job${hydra.job.num}"], ["seed=2", "hydra.sweep.subdir=job${hydra.job.num}"],
        ["seed=3", "hydra.sweep.subdir=${hydra.job.override_dirname}"],
        ["seed=4", "hydra.sweep.subdir=${hydra.job.override_dirname}"],
        ["seed=1", "hydra.output_subdir=record"], ["seed=2", "hydra.output_subdir=null"], ["seed=5", "+hydra.job.env_set.A=b"],
    ],
    "no override": [[]],
}  # fmt: skip

RESULT = {"metrics": {"test": {"accuracy": 0.875}}}

CALLBACK = """
from pathlib import Path
from hydra.experimental.callback import Callback

class Noting(Callback):
    def __init__(self, path):
        self.path = path

    def on_job_start(self, config, *, task_function, **kwargs):
        self.note("start", config)

    def on_job_end(self, config, job_return, **kwargs):
        self.note("end", config, job_return.status.name)

    def note(self, *words):
        words = [str(w.hydra.runtime.output_dir) + " " + str(w.hydra.job.num) if hasattr(w, "hydra") else w for w in words]
        with Path(self.path).open("a") as file:
            print(*words, file=file)
"""

LOGGING = [
    "hydra/job_logging=default", "hydra.job_logging.handlers.file.filename=${hydra.runtime.output_dir}/own.log",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("replay")


@pytest.fixture(scope="module")
def plain(folder):
    return multirun(folder / "sweep")


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in files(folder)}


def by_hydra(hydra, composer, composed, outcome):
    """Hydra's own job run of the same job."""
    return run_job(
        hydra_context=hydra.context,
        task_function=lambda config: replay.value_of(outcome),
        config=composer.compose(composed.overrides, composed.job.number),
        job_dir_key="hydra.sweep.dir",
        job_subdir_key="hydra.sweep.subdir",
    )


@pytest.mark.parametrize("jobs", slow_but(["groups and lists", "strings", "Hydra's keys"], JOBS))
def test_a_job_folder_is_hydras_byte_for_byte(plain, jobs):
    composer = plain.composer()
    replayed = Replay(plain.context, composer)
    composed = [composer.job(overrides, number) for number, overrides in enumerate(jobs)]
    for one in composed:
        returned = replayed(one, RESULT)
        mine = contents(one.job.folder)
        for name in mine:
            (one.job.folder / name).unlink()
        theirs = by_hydra(plain, composer, one, RESULT)
        assert mine == contents(one.job.folder)
        assert len(mine) == (0 if "hydra.output_subdir=null" in one.overrides else 3)
        assert returned.overrides == theirs.overrides and returned.task_name == theirs.task_name == "jdistill"
        assert returned.status == theirs.status == JobStatus.COMPLETED
        assert returned.return_value == theirs.return_value == 0.875
        assert returned.working_dir == theirs.working_dir


def test_values_only_are_written_without_composing(plain, monkeypatch):
    """Otherwise the test above would compare Hydra with itself."""
    composer = plain.composer()
    replayed = Replay(plain.context, composer)
    composed = [composer.job(overrides, number) for number, overrides in enumerate(JOBS["numbers"] + JOBS["schedules"])]
    monkeypatch.setattr(replay, "run_job", None)
    monkeypatch.setattr(composer, "compose", None)
    for one in composed:
        replayed(one, RESULT)
        assert (one.job.folder / ".hydra" / "config.yaml").is_file()


@pytest.mark.parametrize("asked", ["../elsewhere", "a/../b", "with space"])
def test_a_relative_sweep_folder_is_written_as_hydra_writes_it(tmp_path, monkeypatch, asked):
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    hydra = multirun(Path(asked))
    composer = hydra.composer()
    one = composer.job(["seed=3"], 0)
    Replay(hydra.context, composer)(one, RESULT)
    mine = contents(one.job.folder)
    by_hydra(hydra, composer, one, RESULT)
    assert mine == contents(one.job.folder) and len(mine) == 3


def test_a_failed_job_returns_its_exception(plain):
    composer = plain.composer()
    error = RunError("diverged: so it is")
    returned = Replay(plain.context, composer)(composer.job(["seed=11"], 0), error)
    assert returned.status == JobStatus.FAILED
    with pytest.raises(RunError, match="so it is") as caught:
        _ = returned.return_value
    assert caught.value is error
    theirs = by_hydra(plain, composer, composer.job(["seed=11"], 0), error)
    assert theirs.status == returned.status and theirs._return_value is returned._return_value is error


def test_a_users_callback_sees_every_job(tmp_path, monkeypatch):
    (tmp_path / "noting_callback.py").write_text(CALLBACK)
    monkeypatch.syspath_prepend(str(tmp_path))
    log = tmp_path / "log"
    target = "{_target_: noting_callback.Noting, path: " + str(log) + "}"
    hydra = multirun(tmp_path / "sweep", f"+hydra.callbacks.noting={target}")
    composer = hydra.composer()
    composed = [composer.job([f"seed={seed}"], seed) for seed in range(3)]
    replayed = Replay(hydra.context, composer)
    for one, outcome in zip(composed, (RESULT, RunError("no"), RESULT), strict=True):
        replayed(one, outcome)
    expected = []
    for one, status in zip(composed, ("COMPLETED", "FAILED", "COMPLETED"), strict=True):
        where = f"{one.job.folder} {one.job.number}"
        expected += [f"start {where}", f"end {where} {status}"]
    assert log.read_text().splitlines() == expected
    assert len({one.job.folder for one in composed}) == 3


def test_a_users_logging_config_is_set_up_for_each_job(tmp_path):
    import logging

    hydra = multirun(tmp_path / "sweep", *LOGGING)
    root, kept = logging.getLogger(), list(logging.getLogger().handlers)
    composer = hydra.composer()
    replayed = Replay(hydra.context, composer)
    try:
        for seed in range(2):
            one = composer.job([f"seed={seed}"], seed)
            replayed(one, RESULT)
            assert (one.job.folder / "own.log").is_file() and len(files(one.job.folder)) == 4
            root.info("after job %d", seed)
            assert f"after job {seed}" in (one.job.folder / "own.log").read_text()
    finally:
        for handler in set(root.handlers) - set(kept):
            handler.close()
        root.handlers[:] = kept
        root.setLevel(logging.WARNING)
        logging.disable(logging.NOTSET)
        for logger in logging.Logger.manager.loggerDict.values():
            if isinstance(logger, logging.Logger):
                logger.disabled = False


def test_yaml_is_omegaconfs():
    """The C library against OmegaConf's own dumper, on texts that YAML may read otherwise."""
    words = [
        "yes", "NO", "null", "~", "1", "1e3", "1_000", "0x1f", "12:30", "1.", ".5", "-", "- a", "a: b", "a:b",
        "#", "a #b", "[", "{a}",
        "&x", "*x", "!x", "%x", "@x", "`", "'", '"', "a'b", 'a"b', "", " ", " a", "a ", "a\nb", "a\n", "\t",
        "é", "☂", "😀", "\u200b",
        "\x07", "\x85", "\u2028", "x" * 100, "word " * 40, "é " * 60, "2024-01-01", "<<", "=", "?", "? a",
        ".inf", ".nan", "${a.b}", "\\n",
    ]  # fmt: skip
    scalars = [*words, 0, 1, -5, 1.0, 1e-300, 0.1, float("inf"), True, False, None]
    drawn = random.Random(0)

    def value(depth):
        kind = drawn.random()
        if depth == 0 or kind < 0.6:
            return drawn.choice(scalars) if drawn.random() < 0.8 else "".join(drawn.choices(words, k=3))
        if kind < 0.8:
            return [value(depth - 1) for _ in range(drawn.randint(0, 3))]
        return {drawn.choice(["a", "b b", "yes", "1", "é", "x" * 130]): value(depth - 1) for _ in range(drawn.randint(0, 3))}

    for _ in range(500):
        content = {"a": value(3), "b": value(3)}
        assert to_yaml(content) == OmegaConf.to_yaml(OmegaConf.create(content)), content
