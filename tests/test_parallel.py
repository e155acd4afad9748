"""Several devices give what one gives: float64, 8 forced CPU devices in a process of their own."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdistill import blueprint, distributed
from jdistill.errors import UsageError
from jdistill.method import Stage
from jdistill.modules import from_nnx
from jdistill.parallel import Auto, Data, Layout, Members, Pmap, Single
from jdistill.pytrees import as_leaves
from jdistill.stages import enter_stage, init_state
from jdistill.train import make_step
from tests import tiny

DEVICES = "--xla_force_host_platform_device_count=8"
LENGTHS = (jnp.float32(5), jnp.float32(3))


def on_eight_devices(*names):
    process = subprocess.run(
        [sys.executable, "-m", "tests.device_cases", *names], env={**os.environ, "XLA_FLAGS": DEVICES},
        capture_output=True, text=True, check=False, cwd=os.path.dirname(os.path.dirname(__file__)),
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-3000:]
    return json.loads(process.stdout.splitlines()[-1])


def test_a_run_on_eight_devices_is_one_on_one():
    """BatchNorm, Dropout, augmentation, a loss of the whole batch, a live teacher, blocks, and a short last batch."""
    found = on_eight_devices("first")["first"]
    assert set(found) == {"data/dense-rkd", "pmap/dense-rkd"}
    for name, (state, totals) in found.items():
        assert state < 1e-10 and totals < 1e-6, name  # totals are summed in float32


@pytest.mark.slow
def test_other_losses_networks_and_schemes_on_eight_devices():
    found = on_eight_devices("others")["others"]
    assert len(found) == 10
    for name, (state, totals) in found.items():
        assert state < 1e-10 and totals < 1e-6, name


@pytest.mark.slow
def test_microbatches_on_eight_devices():
    for name, (state, totals) in on_eight_devices("accumulated")["accumulated"].items():
        assert state < 1e-10 and totals < 1e-6, name


@pytest.mark.slow
def test_members_are_spread_over_devices():
    found = on_eight_devices("population")["population"]
    assert set(found) == {"members", "auto", "data", "pmap"}
    for name, (state, devices, split) in found.items():
        assert state < 1e-10 and devices == 8 and split == (name in ("members", "auto")), name


@pytest.mark.slow
def test_runs_with_other_numbers_share_the_programs():
    assert on_eight_devices("retraced")["retraced"] == {"data": 2, "pmap": 2}  # a whole batch, and the short last one


# -- micro-batches on one device


def steps(parts, terms, dtype, count=3, size=8):
    """The state after some steps, in `dtype`."""
    frozen, key = tiny.frozen(), jax.random.key(0)
    data = tiny.data(dtype=dtype)
    sample = {k: jax.ShapeDtypeStruct((2, *v.shape[1:]), v.dtype) for k, v in tiny.batch(dtype=dtype).items()}
    stage, state = Stage(name="s", terms=terms, optim=tiny.optimizer(kind="sgd")), init_state(parts, key, sample)
    if dtype == np.float64:
        frozen, state, stage = map(tiny.as_float64, (frozen, state, stage))
    state = enter_stage(parts, stage, state, key, sample, frozen, data["label"])
    step, totals = jax.jit(make_step(parts)), []
    for seed in range(count):
        state, metrics = step(state, frozen, tiny.batch(size, seed, dtype), key, as_leaves(stage), LENGTHS)
        totals.append(metrics)
    return state, totals


def test_microbatches_are_the_whole_batch():
    """Also a batch that they do not divide, which is computed whole; Dropout draws one mask for the whole batch."""
    parts = tiny.parts(tiny.DROPPING)
    with jax.enable_x64(True):
        for size in (8, 6):
            whole = steps(parts, (tiny.TASK, tiny.kd()), np.float64, size=size)
            micro = steps(parts._replace(microbatches=4), (tiny.TASK, tiny.kd()), np.float64, size=size)
            tiny.assert_close(micro[0], whole[0], rtol=1e-10, atol=1e-13)
            tiny.assert_close(micro[1], whole[1], rtol=1e-6, atol=1e-6)


def test_batchnorm_takes_the_statistics_of_each_microbatch():
    whole = steps(tiny.parts(tiny.CONVOLUTIONAL), (tiny.TASK,), np.float32, count=1)
    micro = steps(tiny.parts(tiny.CONVOLUTIONAL)._replace(microbatches=2), (tiny.TASK,), np.float32, count=1)
    means = [np.asarray(s[0].model_state["student"]["batch_stats"]["norm1"]["mean"]) for s in (whole, micro)]
    # Two updates from 0: 0.9 * 0.1 * a + 0.1 * b of the halves' means a and b, where the whole's is 0.1 * (a + b) / 2.
    np.testing.assert_allclose(means[1], 2 * means[0] - 0.01 * half_mean(), rtol=1e-4, atol=1e-6)


def half_mean():
    """The mean of what `norm1` reads in the first half of the first batch."""
    key = jax.random.key(0)
    params, _ = tiny.CONVOLUTIONAL.init(jax.random.fold_in(key, 0), tiny.batch()["inputs"])
    kernel, bias = params["conv1"]["kernel"], params["conv1"]["bias"]
    x = jax.lax.conv_general_dilated(
        tiny.batch()["inputs"][:4], kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return np.asarray(x + bias).mean((0, 1, 2))


def test_microbatches_refuse_networks_whose_dropout_they_cannot_reach():
    from flax import nnx

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.fc = nnx.Linear(16, tiny.CLASSES, rngs=rngs)

        def __call__(self, inputs, rngs=None):
            x = inputs.reshape(inputs.shape[0], -1)
            return self.fc(x), {"embedding": x}

    parts = tiny.parts(from_nnx(Net))._replace(microbatches=2)
    with pytest.raises(UsageError, match="Flax Linen only"):
        steps(parts, (tiny.TASK,), np.float32, count=1)


# -- bad requests


@pytest.mark.parametrize(
    ("option", "changes", "message"),
    [
        (
            "single",
            {"parallel.precision": "bfloat"},
            r"parallel\.precision must be one of float32, bfloat16, got 'bfloat'.*bfloat16",
        ),
        ("single", {"parallel.microbatches": 0}, r"parallel\.microbatches must be positive, got 0"),
        ("single", {"parallel.microbatches": 3}, r"optim\.batch_size is 128, .*parallel\.microbatches=3 .*take 126 or 129"),
        ("single", {"parallel.distributed": ["localhost", 2, 0]}, r"parallel\.distributed must be \[HOST:PORT, "),
        ("single", {"parallel.distributed": ["localhost:1", 2, 2]}, r"parallel\.distributed must be \[HOST:PORT, "),
        ("pmap", {"parallel.distributed": ["localhost:1", 2, 0]}, r"parallel\.distributed needs parallel=data"),
    ],
)
def test_what_cannot_be_is_one_line(option, changes, message):
    config = tiny.config(*{**changes, "optim.batch_size": 128}.items(), parallel=option)
    with pytest.raises(UsageError, match=message) as caught:
        blueprint.read(config)
    assert "\n" not in str(caught.value)


def test_a_batch_the_devices_do_not_divide_names_the_nearest_sizes(monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda: [jax.local_devices()[0]] * 8)
    for layout in (Data(), Pmap()):
        with pytest.raises(UsageError, match=r"optim\.batch_size is 20, which 8 devices do not divide; take 16 or 24"):
            layout.check_batch(20)
        layout.check_batch(24)
    with pytest.raises(UsageError, match=r"is 24, which 8 devices and parallel.microbatches=2 do not divide; take 16 or 32"):
        Data(microbatches=2).check_batch(24)
    with pytest.raises(UsageError, match=r"is 5, which 8 devices do not divide; take 8$"):
        Data().check_batch(5)
    Auto().check_batch(20)


def test_on_one_device_every_layout_but_pmap_is_single():
    parts, single = tiny.parts(), Single()
    assert Auto().programs(parts) is single.programs(parts) and Members().programs(parts) is single.programs(parts)
    assert [layout.devices for layout in (single, Data(), Pmap(), Members(), Auto())] == [1] * 5
    tree = {"a": jnp.ones(2)}
    assert single.put(tree) is tree and Auto().put(tree) is tree and single.get(tree) is tree and Data().agreed(7) == 7


def test_one_process_shares_its_folder_with_nobody(tmp_path):
    assert distributed.is_main() and distributed.parse(["h:1", 2, 1]) == ("h:1", 2, 1) and distributed.parse("auto") == "auto"
    with distributed.run_folder(tmp_path) as folder:
        assert folder == tmp_path
    assert Layout().alone == Layout()
