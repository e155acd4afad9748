"""What every registered loss must do: the registry is the table, the conformance kit asks (see jdistill.testing)."""

import dataclasses

import pytest

import jdistill.losses
import jdistill.options
from jdistill import blueprint
from jdistill.errors import UsageError
from jdistill.losses import Loss
from jdistill.registry import build, options
from jdistill.testing import assert_conforms
from tests.marks import slow_but
from tests.tiny import config

OWN = {name: option for name, option in options("loss").items() if option.target.__module__.startswith("jdistill.")}
ONCE_MORE = ("shapes", "finite", "gradients", "zero_at_teacher", "per_example", "declared")
"""What depends on a loss's switches."""
OTHER = {
    "attention": {"distance": "l2"},
    "bce_soft": {"temperature": 2.0, "reduction": "sum"},
    "bd": {"form": "exp", "ranks": "bottom", "pool": 20},
    "cc": {"form": "repdistiller", "embedding_size": 0},
    "cd": {"guidance": "student", "form": "linear", "samples": 5, "pool": 20},
    "cross_entropy": {"label_smoothing": 0.1},
    "dist": {"beta": 2.0, "gamma": 0.5},
    "dkd": {"alpha": 2.0, "beta": 0.5, "temperature": 1.0},
    "fsp": {"layers": ["stage3", "stage1"]},
    "hint": {"student_layer": "embedding", "teacher_layer": "embedding"},
    "ir_rrd": {
        "interesting": 4, "uninteresting": 3, "top": 6, "interesting_users": 3, "uninteresting_users": 2, "user_top": 5,
        "item_sample": 0,
    },
    "list_mle": {"order": "grades", "top": 2},
    "listwise_kd": {"temperature": 2.0, "t2": True},
    "logit_mse": {"reduction": "half_sum"},
    "logit_std": {"of": {"name": "dkd"}, "ddof": 0},
    "margin_mse": {"pairs": "all"},
    "mlkd": {"temperatures": [3.0]},
    "nkd": {"gamma": 3.5, "temperature": 3.0},
    "nst": {"layers": ["stage2"]},
    "pairwise_logistic": {"order": "grades", "reduction": "mean"},
    "rank_distil": {"samples": 2, "top": 2},
    "rd": {"top": 4, "samples": 6, "normalise": False, "warmup_steps": 1.0},
    "rkd": {"l2_norm": True},
    "rrd": {"interesting": 4, "uninteresting": 3, "top": 6, "sampled": False},
    "skew_kl": {"alpha": 0.0, "temperature": 4.0},
    "sp": {"student_layer": "stage1", "teacher_layer": "stage1"},
    "sum": {"of": {"kd": {}, "rrd": {"interesting": 4, "uninteresting": 3, "top": 6}, "ftd": {}}},
    "vid": {"layers": ["stage2"]},
}  # fmt: skip
"""Another setting of some losses."""


TRACED = ("shapes", "state", "needs_teacher", "declared")
"""What needs no compiled program, so that it is tried for every loss."""
QUICK = (
    "dkd", "fsp", "ftd", "hard_label", "hint", "kd", "list_mle", "sp",
)  # fmt: skip
"""A loss of each kind, to try all properties of; those of the others take minutes together."""
QUICK_SETTINGS = ("hint", "list_mle")
"""The like among `OTHER`."""


@pytest.mark.parametrize("name", OWN)
def test_every_loss_traces(name):
    assert_conforms(name, only=TRACED)


@pytest.mark.parametrize("name", slow_but(QUICK, tuple(OWN)))
def test_every_loss_conforms(name):
    assert_conforms(name)


@pytest.mark.parametrize("name", OTHER)
def test_with_other_settings_it_traces(name):
    assert_conforms(name, only=("shapes", "declared"), **OTHER[name])


@pytest.mark.parametrize("name", slow_but(QUICK_SETTINGS, tuple(OTHER)))
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


NO_STAGES = "have no stage in common"
NO_FC = "last linear layer"
NOT_ON_REQUESTS = {
    "ab": "must name maps before their activation",
    "attention": NO_STAGES,
    "encoder_decoder": NO_FC,
    "fsp": NO_STAGES,
    "ft": "must be a map [B, H, W, C]",
    "gradient_attention": "inputs must be floats for a loss on derivatives, got a request",
    "input_gradient": "inputs must be floats for a loss on derivatives, got a request",
    "irg": "share no stage and no hidden layer; name the layers",
    "jacobian": "inputs must be floats for a loss on derivatives, got a request",
    "kdsvd": NO_STAGES,
    "logit_std": "needs at least 3 classes, got 2",
    "mgd": "must be a map [B, H, W, C]",
    "nst": NO_STAGES,
    "ofd": "must name maps before their activation",
    "review": NO_STAGES,
    "simkd": NO_FC,
    "vid": NO_STAGES,
}
"""Losses that do not fit recommenders as they are, and what they say; `logit_std` does with more negatives."""
RECOMMEND = {"data": "synthetic_shop", "task": "recommend", "teacher": "bpr", "student": "bpr"}
SMALL = (("data.users", 100), ("data.items", 60), ("student.dim", 4), ("teacher.dim", 6), ("optim.batch_size", 16))


@pytest.mark.parametrize("name", OWN)
def test_a_recommender_learns_by_every_loss_or_is_told_why_not(name):
    """Traced on shapes, as before any training; one negative."""
    own = {"rrd": [("loss.top", 50)], "ir_rrd": [("loss.top", 50)], "de_rrd": [("loss.rrd", {"top": 50})]}.get(name, [])
    if name not in NOT_ON_REQUESTS:
        assert blueprint.read(config(*SMALL, *own, loss=name, **RECOMMEND)).outputs == 60
        return
    with pytest.raises(UsageError) as error:
        blueprint.read(config(*SMALL, loss=name, **RECOMMEND))
    assert NOT_ON_REQUESTS[name] in str(error.value) and "\n" not in str(error.value)


def test_logits_of_three_candidates_can_be_standardised():
    assert blueprint.read(config(*SMALL, ("task.negatives", 2), loss="logit_std", **RECOMMEND)).outputs == 60
