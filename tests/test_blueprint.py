"""A config becomes checked objects, or one line that names the key."""

import copy
import re

import pytest

from jdistill import blueprint
from jdistill.compress import IntegerWeights, MagnitudePrune
from jdistill.config import GROUPS, fingerprint
from jdistill.errors import UsageError
from jdistill.losses import KD, CrossEntropy
from tests.tiny import config


def test_the_default_config():
    read = blueprint.read(config())
    assert (read.outputs, list(read.teachers), read.compressors) == (2, ["teacher"], ())
    (stage,) = read.method().stages
    assert [(t.name, t.teacher, t.loss, t.weight) for t in stage.terms] == [
        ("cross_entropy", None, CrossEntropy(), 1.0), ("kd", "teacher", KD(), 1.0),
    ]  # fmt: skip
    parts = read.parts({})
    assert parts.targets == () and [learner.name for learner in parts.learners] == ["student"]
    assert hash(parts) == hash(blueprint.read(config(("seed", 3))).parts({}))


def test_a_loss_without_teacher_builds_none():
    for loss in ("none", "cross_entropy"):
        read = blueprint.read(config(loss=loss, teacher="none"))
        assert not read.loss.needs_teacher and read.teachers == {}
    assert [t.name for t in blueprint.read(config(loss="none")).method().stages[0].terms] == ["cross_entropy"]


def test_compressors_that_recover_get_a_stage():
    changes = (("compression.recover_epochs", 3), ("optim.epochs", 9))
    read = blueprint.read(config(*changes, compression="prune", scheme="two_stage"))
    stages = read.method().stages
    assert [stage.name for stage in stages] == ["hint", "distil", "recover1"]
    assert stages[2].compressors == (MagnitudePrune(recover_epochs=3),) and stages[2].terms == stages[1].terms
    assert [stage.optim.epochs for stage in stages] == [5, 9, 3]
    for recover, compression in ((0, "prune"), (None, "int8")):
        changes = () if recover is None else (("compression.recover_epochs", 0),)
        read = blueprint.read(config(*changes, compression=compression))
        assert len(read.method().stages) == 1 and isinstance(read.compressors[0], MagnitudePrune | IntegerWeights)


def test_nothing_to_learn_is_refused():
    with pytest.raises(UsageError, match=r"task\.weight=0 with loss=none leaves nothing to learn"):
        blueprint.read(config(("task.weight", 0.0), loss="none"))


def test_a_given_teacher_counts_by_its_content(tmp_path):
    paths = [tmp_path / name for name in ("a.npz", "b.npz")]
    configs = [config(("teacher.path", str(path)), loss="kd", teacher="logits") for path in paths]
    for path in paths:
        path.write_bytes(b"one")
    first = fingerprint(configs[0])
    assert fingerprint(configs[1]) == first
    paths[0].write_bytes(b"two")
    assert fingerprint(configs[0]) != first == fingerprint(configs[1])
    for name, text in (("x", "{}"), ("y", "{}"), ("z", "[]")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text(text)
    x, y, z = (fingerprint(config(("teacher.checkpoint", str(tmp_path / name)))) for name in "xyz")
    assert x == y != z and fingerprint(config()) not in (x, z)


NOT_OPTIONS = [(group, value) for group in (*GROUPS, "checkpoint", "evaluate") for value in (None, "text", [1])]


@pytest.mark.parametrize(("group", "value"), NOT_OPTIONS)
def test_a_group_that_is_no_option(group, value):
    with pytest.raises(UsageError) as error:
        blueprint.read(config((group, value)))
    assert str(error.value).startswith(f"{group} must be one of ") and str(error.value).endswith(f"got {value!r}")


@pytest.mark.parametrize("group", GROUPS)
def test_an_option_that_does_not_exist(group):
    for broken in ({"name": "nothing"}, {}):
        with pytest.raises(UsageError, match=rf"^unknown {group} '(nothing|None)'.* \(known: "):
            blueprint.read(config((group, broken)))


@pytest.mark.parametrize(
    "key", [*(f"{group}.tpyo" for group in GROUPS), "checkpoint.tpyo", "evaluate.tpyo", "tpyo", "teacher.optim.tpyo"]
)
def test_an_unknown_key(key):
    with pytest.raises(UsageError, match=rf"^unknown key '{re.escape(key)}'.*\(known: ") as error:
        blueprint.read(config((key, 1)))
    assert "\n" not in str(error.value)


BAD = {
    "data.validation": (1.5, {}), "data.classes": (1, {}), "data.examples": (3, {}), "data.limit": (0, {}),
    "task.weight": (-1.0, {}), "task.label_smoothing": (1.0, {}), "task.outputs": ("sigmod", {}),
    "teacher.widths": ([0], {}), "student.widths": ([8, -1], {}), "student.dropout": (1.0, {}),
    "student.activation": ("relo", {}),
    "loss.temperature": (-1.0, {}), "loss.weight": (-1.0, {}), "loss.student_layer": ("nothing", {"loss": "hint"}),
    "loss.reduction": ("men", {"loss": "logit_mse"}), "scheme.init_epochs": (0, {"scheme": "two_stage"}),
    "compression.sparsity": (1.0, {"compression": "prune"}), "compression.granularity": ("row", {"compression": "int8"}),
    "optim.lr": (0.0, {}), "optim.epochs": (0, {}), "optim.batch_size": (10**6, {}), "optim.milestones": ([-1.0], {}),
    "teacher.optim.lr": (-1.0, {}), "teacher.optim.schedule": ("csine", {}), "parallel.strategy": ("blok", {}),
    "parallel.device_bytes": (0.0, {}), "tracker.mode": ("off", {"tracker": "wandb"}), "checkpoint.every_steps": (-1, {}),
    "evaluate.every": (0, {}), "evaluate.repeats": (0, {}), "report": ("best", {}), "seed": ("one", {}),
}  # fmt: skip


@pytest.mark.parametrize("key", BAD)
def test_a_bad_value_names_its_key(key):
    value, choices = BAD[key]
    with pytest.raises(UsageError) as error:
        blueprint.read(config((key, value), **choices))
    assert str(error.value).startswith(key) and "\n" not in str(error.value), str(error.value)


@pytest.mark.parametrize(
    ("overrides", "choices", "message"),
    [
        ((), {"teacher": "none"}, "loss=kd needs a teacher, got teacher=none; choose one, or loss=none"),
        ((), {"scheme": "two_stage", "loss": "none"}, "scheme=two_stage needs a distillation loss"),
        ((), {"loss": "attention"}, "loss.layers must be maps"),
        (
            (("data.validation", 0.0), ("report", "best_val")),
            {},
            "report=best_val needs validation data, got data.validation=0",
        ),
        ((("data.classes", 3),), {"task": "binary"}, "task.outputs=sigmoid needs data of 2 classes, this has 3"),
        ((("teacher.optim", None),), {}, "teacher.optim must be one of the options of group optim, got None"),
        ((), {"teacher": "logits"}, "teacher.path is missing"),
        ((("teacher.path", "/nowhere.npz"),), {"teacher": "logits"}, "teacher.path '/nowhere.npz' does not exist"),
        ((("teacher.checkpoint", "/nowhere"),), {}, "teacher.checkpoint"),
    ],
)
def test_what_does_not_go_together(overrides, choices, message):
    with pytest.raises(UsageError, match=f"^{re.escape(message)}"):
        blueprint.read(config(*overrides, **choices))


def test_reading_leaves_the_config_as_it_is():
    given = config(compression="prune", loss="hint")
    before = copy.deepcopy(given)
    blueprint.read(given)
    assert given == before


def group(*overrides, **choices):
    return blueprint.read(config(*overrides, **choices)).group()


def test_numbers_share_a_program():
    base = group()
    for key, value in {
        "seed": 5, "loss.temperature": 1.5, "loss.weight": 3, "task.weight": 0.5, "optim.lr": 0.1,
        "optim.epochs": 3, "force": True, "checkpoint.every_steps": 5, "data.root": "/tmp",
    }.items():  # fmt: skip
        assert group((key, value)) == base and hash(group((key, value))) == hash(base), key
    assert group(("optim.milestones", [1.0])) == group(("optim.milestones", [2]))
    assert group(tracker="tensorboard") == base
    assert group(("optim.weight_decay", 0.1)) == group(("optim.weight_decay", 0.2)) != base


def test_structure_makes_another_program():
    groups = {
        "default": group(), "widths": group(("student.widths", [16])), "activation": group(("student.activation", "tanh")),
        "teacher": group(("teacher.widths", [8])), "teacher seed": group(("teacher.seed", 1)), "loss": group(loss="logit_mse"),
        "none": group(loss="none"), "scheme": group(scheme="two_stage"), "prune": group(compression="prune"),
        "global": group(("compression.scope", "global"), compression="prune"), "batch": group(("optim.batch_size", 32)),
        "kind": group(optim="sgd"), "schedule": group(("optim.schedule", "cosine")), "data": group(("data.seed", 1)),
        "milestones": group(("optim.milestones", [1.0])), "teacher recipe": group(("teacher.optim.lr", 0.1)),
        "no task": group(("task.weight", 0.0)), "schedule of weight": group(("loss.weight", {"name": "warmup"})),
        "transfer": group(("transfer.omit", [1])), "residual": group(loss="residual"), "self": group(scheme="self"),
        "two teachers": group(scheme="multi_teacher"), "online": group(scheme="online"), "joint": group(scheme="joint"),
    }  # fmt: skip
    names = list(groups)
    same = [(a, b) for i, a in enumerate(names) for b in names[:i] if groups[a] == groups[b]]
    assert same == []
    assert group(("teacher.seed", 1), loss="none") == groups["none"]  # no teacher is read
