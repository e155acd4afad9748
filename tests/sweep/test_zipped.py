"""Zipped sweeps: points with the cartesian product of the rest; values that read back through Hydra's own parser."""

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from jdistill.errors import UsageError
from jdistill.sweep.zipped import override_text, zipped

PARSER = OverridesParser.create()


def test_points_are_combined_with_every_other_job():
    points = [{"loss": "none"}, {"loss": "kd", "loss.temperature": 4}]
    assert zipped(points, [["seed=0", "x=1"], ["seed=1", "x=1"]]) == [
        ["seed=0", "x=1", "loss=none"],
        ["seed=1", "x=1", "loss=none"],
        ["seed=0", "x=1", "loss=kd", "loss.temperature=4"],
        ["seed=1", "x=1", "loss=kd", "loss.temperature=4"],
    ]
    assert zipped(points, [[]]) == [["loss=none"], ["loss=kd", "loss.temperature=4"]]


@pytest.mark.parametrize("points", [None, []])
def test_without_points_nothing_changes(points):
    assert zipped(points, [["a=1"], ["a=2"]]) == [["a=1"], ["a=2"]]


@pytest.mark.parametrize(
    "value",
    [
        4, 0.5, 1e-5, True, None, "kd", "true", "NULL", "4", "a b", "it's", 'say "x"', "back\\slash", "a,b", "x:y", "", "inf",
        [16, 8], [], {"name": "linear", "start": 0, "end": 1.5}, {"names": ["a b", None]}, "${seed}", "path/to/file.py",
    ],
)  # fmt: skip
def test_a_value_reads_back_as_it_was(value):
    (override,) = PARSER.parse_overrides([f"key={override_text(value)}"])
    assert override.value() == value and type(override.value()) is type(value)
    assert not override.is_sweep_override()


@pytest.mark.parametrize(
    ("points", "jobs", "message"),
    [
        ({"loss": "kd"}, [[]], "must be a list of points"),
        (["kd"], [[]], "each point .* got 'kd'"),
        ([{}], [[]], "each point"),
        ([{"loss": "kd"}], [["seed=0", "loss=hint"]], "'loss' is set both by hydra.sweeper.zip and by 'loss=hint'"),
        ([{"+new": 1}], [["new=2"]], "'new' is set both"),
        ([{"hydra.sweep.dir": "x"}], [[]], "cannot set 'hydra.sweep.dir'"),
    ],
)
def test_mistakes_are_named(points, jobs, message):
    with pytest.raises(UsageError, match=message):
        zipped(points, jobs)
