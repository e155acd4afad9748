"""bfloat16 where networks compute, float32 wherever numbers are kept."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdistill.applying import computing
from jdistill.blueprint import read
from jdistill.run import run
from tests import tiny
from tests.test_parallel import steps

CASES = (tiny.DROPPING, tiny.CONVOLUTIONAL)


def dtypes(tree):
    return {leaf.dtype for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)}


@pytest.mark.parametrize("model", CASES, ids=["mlp", "batchnorm"])
def test_a_network_computes_in_bfloat16_and_gives_float32(model):
    params, state = model.init(jax.random.key(0), tiny.batch()["inputs"])
    low, inputs = computing(model, "bfloat16"), tiny.batch()["inputs"]
    mode = {"key": jax.random.key(1), "train": True}
    outputs, new = low.apply(params, state, inputs, **mode)
    exact, expected = model.apply(params, state, inputs, **mode)
    assert dtypes((outputs, new)) <= {jnp.dtype(jnp.float32)}
    tiny.assert_close(outputs, exact, atol=0.05, rtol=0.05)
    tiny.assert_close(new, expected, atol=0.01, rtol=0.02)
    assert not np.array_equal(outputs.logits, exact.logits)
    text = str(jax.make_jaxpr(lambda p: low.apply(p, state, inputs, **mode)[0].logits)(params))
    products = [line for line in text.splitlines() if "dot_general" in line or "conv_general" in line]
    assert products and all("bf16[" in line.split("=")[0] for line in products)
    assert computing(model, "float32") is model and computing(model, "bfloat16") is low


@pytest.mark.parametrize("model", CASES, ids=["mlp", "batchnorm"])
def test_state_and_metrics_stay_float32(model):
    state, totals = steps(tiny.parts(model)._replace(precision="bfloat16"), (tiny.TASK, tiny.kd()), np.float32)
    exact, sums = steps(tiny.parts(model), (tiny.TASK, tiny.kd()), np.float32)
    assert dtypes((state, totals)) == {jnp.dtype(jnp.float32)}
    assert jax.tree.structure(state) == jax.tree.structure(exact)
    tiny.assert_close(state.params, exact.params, atol=0.02)
    for got, expected in zip(totals, sums, strict=True):
        np.testing.assert_allclose(got["loss"], expected["loss"], rtol=0.05)


def test_digits_in_bfloat16(tmp_path):
    accuracy = {}
    for precision in ("float32", "bfloat16"):
        made = tiny.config(
            ("parallel.precision", precision), ("optim.epochs", 15), ("optim.batch_size", 64), ("student.widths", [32]),
            ("evaluate.latency", False), ("optim.lr", 5e-3), data="digits", teacher="none", loss="none", student="mlp",
        )  # fmt: skip
        made["evaluate"]["latency"] = False
        assert read(made).parts({}).precision == precision
        accuracy[precision] = run(made, tmp_path / precision)["metrics"]["test"]["accuracy"]
    assert accuracy["float32"] > 0.9
    assert abs(accuracy["bfloat16"] - accuracy["float32"]) < 0.03
