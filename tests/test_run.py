"""A run's folder: finished runs are shown, forced ones repeated, stopped ones continued."""

import pytest

from jdistill.fit import Interrupted
from jdistill.run import run
from tests.tiny import config


def stopper(calls):
    """A `stop` that says so at its `calls`-th call, and counts."""

    def stop():
        stop.calls += 1
        return stop.calls == calls

    stop.calls = 0
    return stop


@pytest.fixture
def asked():
    return config(("optim.epochs", 6), ("evaluate.latency", False), ("checkpoint.every_epochs", 1), loss="none")


def test_force_repeats_a_finished_run_and_continues_a_stopped_one(tmp_path, asked):
    first = run(asked, tmp_path)
    assert run(asked, tmp_path) == first
    forced = {**asked, "force": True}
    whole = stopper(0)
    again = run(forced, tmp_path, stop=whole)
    assert again["metrics"] == first["metrics"] and again["size"] == first["size"] and whole.calls >= 6

    with pytest.raises(Interrupted):
        run(forced, tmp_path, stop=stopper(whole.calls - 2))
    assert not (tmp_path / "result.json").exists()
    rest = stopper(0)
    last = run(forced, tmp_path, stop=rest)
    assert 0 < rest.calls <= 4  # went on from the checkpoint
    assert last["metrics"] == first["metrics"] and last["size"] == first["size"]
