"""A run's folder: finished runs are shown, forced ones repeated, stopped ones continued."""

import pytest

from jdistill.run import run
from jdistill.standing import Interrupted
from jdistill.teachers import store
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


def test_default_layers_are_the_same_for_a_cached_teacher_as_for_a_live_one(tmp_path, monkeypatch):
    """The middle of three hidden layers is the second, also where the cache keeps only the first and the second."""
    losses = {"hint": {"weight": 1.0}, "first": {"name": "hint", "teacher_layer": "hidden1"}}
    small = (("data.examples", 120), ("optim.epochs", 2), ("teacher.optim.epochs", 1), ("evaluate.latency", False))
    given = config(
        *small, ("teacher.widths", [8, 7, 6]), ("cache", str(tmp_path)), ("loss", {"name": "sum", "weight": 1.0, "of": losses})
    )
    cached = run(given, tmp_path / "cached", choices={})
    monkeypatch.setattr(store, "CACHED_OUTPUT_BYTES", 0)
    store._ready.cache_clear()
    live = run(given, tmp_path / "live", choices={})
    assert (cached["teacher"]["outputs"], live["teacher"]["outputs"]) == ("cached", "live")
    assert cached["metrics"]["train"]["sum"] == pytest.approx(live["metrics"]["train"]["sum"], rel=1e-5)
