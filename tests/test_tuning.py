"""Training a part of a network: what it starts at, what moves, and that what is deployed is what was trained."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdistill.compress.artifact import read_artifact
from jdistill.errors import UsageError
from jdistill.fit import fit_one as fit
from jdistill.method import Method
from jdistill.modules import from_linen
from jdistill.pytrees import structure_key
from jdistill.registry import build, options
from jdistill.run import run
from jdistill.schemes import FineTune
from jdistill.stages import leave_stage
from jdistill.tuning import HEAD, HeadOnly, LowRank
from tests import tiny
from tests.marks import slow_but
from tests.tiny import assert_close, assert_same_bits

NETWORK = tiny.CONVOLUTIONAL
TUNINGS = {"frozen": HeadOnly(), "low_rank": LowRank(rank=2, scale=3.0)}
every_tuning = pytest.mark.parametrize("tuning", TUNINGS.values(), ids=TUNINGS)


def variables(seed: int = 0) -> tuple[Any, Any]:
    return NETWORK.init(jax.random.key(seed), tiny.data()["inputs"])


def moved(trained: Any, seed: int = 1) -> Any:
    """Other numbers for what a tuning trains."""
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: leaf + random.normal(size=leaf.shape).astype(leaf.dtype), trained)


@every_tuning
def test_training_starts_at_the_network_itself(tuning):
    params, _ = variables()
    trained = tuning.init(jax.random.key(1), params)
    assert_same_bits(tuning.apply(params, trained), params)
    assert set(trained) == ({HEAD} if isinstance(tuning, HeadOnly) else {HEAD, "adapters"})
    assert_same_bits(trained[HEAD], params[HEAD])


def test_low_rank_changes_are_scale_over_rank_a_b():
    params, _ = variables()
    tuning = LowRank(rank=2, scale=3.0)
    trained = moved(tuning.init(jax.random.key(1), params))
    found = tuning.apply(params, trained)
    assert set(trained["adapters"]) == {"conv1/kernel", "conv2/kernel", "fc1/kernel"}
    for name, (rows, columns) in {"conv1": (3 * 3, 6), "conv2": (2 * 2 * 6, 5), "fc1": (5, 7)}.items():
        pair, kernel = trained["adapters"][f"{name}/kernel"], np.asarray(params[name]["kernel"])
        assert pair["down"].shape == (rows, 2) and pair["up"].shape == (2, columns)
        down, up = (np.asarray(pair[part], np.float64) for part in ("down", "up"))
        change = np.zeros((rows, columns))
        for i in range(rows):
            for j in range(columns):
                change[i, j] = 3.0 / 2 * sum(down[i, r] * up[r, j] for r in range(2))
        expected = (kernel.reshape(rows, columns) + change).reshape(kernel.shape)
        np.testing.assert_allclose(found[name]["kernel"], expected, rtol=1e-4, atol=1e-5)
        assert np.linalg.matrix_rank(change) == 2
    for name in ("conv1", "conv2", "fc1"):
        assert_same_bits(found[name]["bias"], params[name]["bias"])
    assert_same_bits(found["norm1"], params["norm1"])
    assert_same_bits(found[HEAD], trained[HEAD])


def test_a_rank_as_large_as_a_kernel_leaves_it_alone():
    params, _ = variables()
    assert set(LowRank(rank=5).init(jax.random.key(0), params)["adapters"]) == {"conv1/kernel"}
    assert LowRank(rank=9).init(jax.random.key(0), params)["adapters"] == {}


def test_a_is_drawn_with_variance_one_over_its_rows_and_by_its_key():
    params = {
        "fc1": {"kernel": jnp.zeros((400, 300))},
        "wide": {"kernel": jnp.zeros((400, 300))},
        HEAD: {"kernel": jnp.zeros((2, 2))},
    }
    first, again, other = (LowRank(rank=64).init(jax.random.key(seed), params)["adapters"] for seed in (0, 0, 1))
    down = np.asarray(first["fc1/kernel"]["down"])
    assert abs(down.std() * 20 - 1) < 0.02 and not np.any(first["fc1/kernel"]["up"])
    assert_same_bits(first, again)
    assert np.any(down != other["fc1/kernel"]["down"]) and np.any(down != first["wide/kernel"]["down"])


@every_tuning
def test_gradients_reach_only_what_is_trained(tuning):
    params, state = variables()
    trained, batch = moved(tuning.init(jax.random.key(1), params)), tiny.batch()

    def loss(params, trained):
        return (NETWORK.apply(tuning.apply(params, trained), state, batch["inputs"])[0].logits ** 2).sum()

    assert all(np.any(leaf) for leaf in jax.tree.leaves(jax.grad(loss, argnums=1)(params, trained)))


@every_tuning
def test_a_network_without_that_last_layer_is_refused(tuning):
    for params in ({"other": {"kernel": jnp.zeros((3, 3))}}, [jnp.zeros((3, 3))]):
        with pytest.raises(UsageError, match=r"no last layer named 'fc', so its body cannot be frozen; use scheme\.body=all"):
            tuning.init(jax.random.key(0), params if isinstance(params, dict) else {"x": params[0]})


@pytest.mark.parametrize("name", ["mlp", "lenet", "resnet8", "wrn_16_2", "vgg8", "mobilenetv2", "shufflenetv2"])
def test_the_registered_networks_can_be_tuned(name):
    if name not in options("student"):
        pytest.skip(f"no network {name}")
    model = build("student", {"name": name}, outputs=10)
    from jdistill.modules import as_model

    inputs = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    params, _ = jax.eval_shape(lambda: as_model(model).init(jax.random.key(0), jnp.zeros(inputs.shape)))
    for tuning in TUNINGS.values():
        trained = jax.eval_shape(tuning.init, jax.random.key(0), params)
        assert jax.eval_shape(tuning.apply, params, trained) == params
    assert sum(leaf.size for leaf in jax.tree.leaves(trained)) < sum(leaf.size for leaf in jax.tree.leaves(params)) / 2


@pytest.mark.parametrize("changes", [{"rank": 0}, {"scale": 0.0}, {"scale": -1.0}])
def test_bad_numbers_are_refused(changes):
    with pytest.raises(UsageError, match=r"^(rank|scale) must be positive"):
        LowRank(**changes)


def test_the_scale_is_a_number_and_the_rank_is_structure():
    assert structure_key(LowRank(scale=1.0)) == structure_key(LowRank(scale=2.0)) != structure_key(LowRank(rank=2))


# -- in training


def scheme(body: str) -> FineTune:
    return FineTune(body=body, epochs=2, rank=2)


def fitted(folder, body: str, last: int | None = None) -> tuple[Any, Method]:
    """A fit by `fine_tune`, of its first `last` stages."""
    own = tiny.method(scheme=scheme(body), student=NETWORK, epochs=2, weight_decay=0.01)
    own = Method(stages=own.stages[:last])
    return fit(tiny.setup(folder, own, parts=tiny.parts(NETWORK, augment=tiny.AUGMENT), checkpoints=None)), own


@pytest.mark.parametrize("body", slow_but(["all"], ("frozen", "low_rank", "all")))
def test_the_body_keeps_what_it_is_told_to_keep(body, tmp_path):
    before, _ = fitted(tmp_path / "before", body, last=1)
    after, own = fitted(tmp_path / "after", body)
    assert [stage.name for stage in own.stages] == ["distil", "fine_tune"]
    (first, state), (last, last_state) = before.variables, after.variables
    changed = {
        f"{name}/{key}" for name, layer in first.items() for key, leaf in layer.items() if np.any(leaf != last[name][key])
    }
    everything = {f"{name}/{key}" for name, layer in first.items() for key in layer}
    adapted = {f"{name}/kernel" for name in ("conv1", "conv2", "fc1")}
    assert changed == {"frozen": set(), "low_rank": adapted, "all": everything}[body] | {"fc/kernel", "fc/bias"}
    if body == "all":
        assert np.any(last_state["batch_stats"]["norm1"]["mean"] != state["batch_stats"]["norm1"]["mean"])
    else:
        assert_same_bits(last_state, state)
        assert set(after.state.params) == {"student", "loss", "tuning"} != set(before.state.params)
    if body == "low_rank":  # the change has the rank that was asked for
        change = np.asarray(last["conv2"]["kernel"] - first["conv2"]["kernel"]).reshape(-1, 5)
        singular = np.linalg.svd(change, compute_uv=False)
        assert singular[1] > 1e-4 > 1e-6 * 10 > singular[2]


@pytest.mark.parametrize("body", ["frozen", "low_rank"])
def test_the_stage_that_follows_begins_with_the_merged_student(body, tmp_path):
    after, own = fitted(tmp_path, body)
    merged = leave_stage(own.stages[-1], after.state)
    assert "tuning" not in merged.params
    assert_close(merged.params["student"], after.variables[0], rtol=1e-6, atol=1e-7)
    inputs = tiny.data()["inputs"]
    tuned = own.stages[-1].tuning.apply(after.state.params["student"], after.state.params["tuning"])
    outputs = [NETWORK.apply(params, after.variables[1], inputs)[0].logits for params in (merged.params["student"], tuned)]
    np.testing.assert_allclose(*outputs, rtol=1e-5, atol=1e-6)
    assert leave_stage(own.stages[0], after.state) is after.state


def test_only_the_task_is_learned_in_the_second_stage(tmp_path):
    fitted(tmp_path, "frozen")
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["stage"] for row in rows] == ["distil"] * 2 + ["fine_tune"] * 2
    assert [set(row["train"]) - {"loss", "accuracy"} for row in rows] == [{"kd"}] * 2 + [{"cross_entropy"}] * 2
    assert rows[3]["train"]["cross_entropy"] < rows[2]["train"]["cross_entropy"]


@pytest.mark.parametrize(
    ("body", "compression"), [pytest.param("low_rank", "none", marks=pytest.mark.slow), ("frozen", "prune")]
)
def test_what_is_exported_has_the_students_own_form(body, compression, tmp_path):
    small = (("data.examples", 100), ("optim.epochs", 2), ("teacher.optim.epochs", 1), ("evaluate.latency", False))
    given = tiny.config(
        *small,
        ("optim.batch_size", 8),
        ("scheme.body", body),
        ("scheme.epochs", 2),
        scheme="fine_tune",
        compression=compression,
    )
    if compression == "prune":
        given["compression"]["recover_epochs"] = 1
    result = run(given, tmp_path / "run", choices={})
    params, state, _ = read_artifact(tmp_path / "run" / "artifact.safetensors")
    student = from_linen(build("student", given["student"], outputs=2))
    expected, _ = student.init(jax.random.key(0), jnp.zeros((1, given["data"]["features"])))
    assert result["status"] == "finished" and state == {}
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, expected)
