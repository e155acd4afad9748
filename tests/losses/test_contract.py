"""What every registered loss must do: the registry is the table, the conformance kit asks (see jdistill.testing)."""

import dataclasses

import pytest

import jdistill.losses
import jdistill.options
from jdistill.losses import Loss
from jdistill.registry import build, options
from jdistill.testing import assert_conforms

OWN = {name: option for name, option in options("loss").items() if option.target.__module__.startswith("jdistill.")}
ONCE_MORE = ("shapes", "finite", "gradients", "zero_at_teacher", "per_example", "declared")
"""What depends on a loss's switches."""
OTHER = {
    "attention": {"distance": "l2"},
    "bce_soft": {"temperature": 2.0, "reduction": "sum"},
    "cc": {"form": "repdistiller", "embedding_size": 0},
    "cross_entropy": {"label_smoothing": 0.1},
    "dist": {"beta": 2.0, "gamma": 0.5},
    "dkd": {"alpha": 2.0, "beta": 0.5, "temperature": 1.0},
    "fsp": {"layers": ["stage3", "stage1"]},
    "hint": {"student_layer": "embedding", "teacher_layer": "embedding"},
    "logit_mse": {"reduction": "half_sum"},
    "logit_std": {"of": {"name": "dkd"}, "ddof": 0},
    "mlkd": {"temperatures": [3.0]},
    "nkd": {"gamma": 3.5, "temperature": 3.0},
    "nst": {"layers": ["stage2"]},
    "rkd": {"l2_norm": True},
    "skew_kl": {"alpha": 0.0, "temperature": 4.0},
    "sp": {"student_layer": "stage1", "teacher_layer": "stage1"},
    "vid": {"layers": ["stage2"]},
}
"""Another setting of some losses."""


LONG = ("ab", "crd", "ft", "review")
"""Losses of which all properties take 15 to 30 seconds to try."""


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in LONG)) for name in OWN])
def test_every_loss_conforms(name):
    assert_conforms(name)


@pytest.mark.parametrize("name", OTHER)
def test_with_other_settings(name):
    assert_conforms(name, only=ONCE_MORE, **OTHER[name])


@pytest.mark.parametrize("name", OWN)
def test_every_loss_is_described_and_exported(name):
    option, made = OWN[name], build("loss", {"name": name})
    assert isinstance(made, Loss) and dataclasses.is_dataclass(made) and option.summary
    assert option.fields["weight"][0] is not str and option.fields["weight"][1] >= 0
    assert type(made).__name__ in jdistill.losses.__all__


@pytest.mark.parametrize(
    ("name", "weight"),
    [("attention", 1000.0), ("fsp", 50.0), ("kd", 1.0), ("nst", 50.0), ("pkt", 30000.0), ("sp", 3000.0)],
)
def test_default_weights_are_the_published_ones(name, weight):
    assert OWN[name].fields["weight"][1] == weight
