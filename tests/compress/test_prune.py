"""Masks against loops in NumPy and against torch's; ramps of sparsity in real training."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdistill.compress import MagnitudePrune, apply_all
from jdistill.compress.artifact import count_nonzero, read_artifact
from jdistill.compress.base import Stored, enter, finished
from jdistill.compress.prune import NMPrune, kept
from jdistill.errors import RunError, UsageError
from jdistill.fit import Interrupted, fit_one
from jdistill.method import Method, Stage
from jdistill.pytrees import as_leaves
from jdistill.registry import build
from jdistill.run import run
from jdistill.schedules import Schedule
from jdistill.stages import enter_stage, init_state
from jdistill.train import Keys, make_step
from tests import tiny
from tests.marks import slow_but
from tests.reference import pruning as reference
from tests.tiny import assert_same_bits

KEY = jax.random.key(0)
RANDOM = np.random.default_rng(0)
PARAMS = {
    "fc1": {"kernel": RANDOM.normal(size=(8, 9)).astype(np.float32), "bias": np.full(9, 0.01, np.float32)},
    "conv": {"kernel": (3 * RANDOM.normal(size=(3, 3, 2, 4))).astype(np.float32)},
    "norm": {"scale": np.zeros(4, np.float32), "kernel": np.zeros(5, np.float32)},
    "items": {"embedding": (0.1 * RANDOM.normal(size=(12, 3))).astype(np.float32)},
}
WEIGHTS = ("conv/kernel", "fc1/kernel", "items/embedding")
GOLDEN = {name: {"kernel": leaf} for name, leaf in reference.golden_weights().items()}
CUBIC = {"name": "cubic", "end": 0.9}


def at(name, params=PARAMS):
    for part in name.split("/"):
        params = params[part]
    return params


def masks(own, params=PARAMS):
    return jax.jit(type(own).init)(as_leaves(own), KEY, params)


def assert_golden(found, table):
    for name, mask in reference.golden_masks(table).items():
        np.testing.assert_array_equal(found[f"{name}/kernel"], mask, name)


# -- masks


@pytest.mark.parametrize("amount", reference.LAYER)
def test_masks_are_torchs(amount):
    assert_golden(masks(MagnitudePrune(sparsity=amount), GOLDEN), reference.LAYER[amount])
    assert_golden(masks(MagnitudePrune(sparsity=amount, scope="global"), GOLDEN), reference.GLOBAL[amount])


@pytest.mark.parametrize("n", reference.N_OF_4)
def test_masks_of_n_in_4_are_torchs(n):
    assert_golden(masks(NMPrune(n=n, m=4), GOLDEN), reference.N_OF_4[n])


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.73, 0.99])
def test_layer_masks(sparsity):
    found = masks(MagnitudePrune(sparsity=sparsity))
    assert tuple(sorted(found)) == WEIGHTS
    for name in WEIGHTS:
        score = np.abs(at(name))
        np.testing.assert_array_equal(found[name], reference.without_smallest(score, round(sparsity * score.size)))


@pytest.mark.parametrize("sparsity", [0.0, 0.25, 0.5, 0.9])
def test_global_masks_have_one_threshold(sparsity):
    found = masks(MagnitudePrune(sparsity=sparsity, scope="global"))
    everything = np.concatenate([np.abs(at(name)).ravel() for name in WEIGHTS])
    mask = np.concatenate([np.asarray(found[name]).ravel() for name in WEIGHTS])
    np.testing.assert_array_equal(mask, reference.without_smallest(everything, round(sparsity * everything.size)))


def test_equal_magnitudes_go_in_order():
    kernel = np.array([[2, -1, 1, 1], [-1, 1, 2, -1]], np.float32)
    found = masks(MagnitudePrune(sparsity=0.5), {"kernel": kernel})["kernel"]
    np.testing.assert_array_equal(found, [[1, 0, 0, 0], [0, 1, 1, 1]])
    both = masks(MagnitudePrune(sparsity=0.5, scope="global"), {"a": {"kernel": kernel[:1]}, "b": {"kernel": kernel[1:]}})
    np.testing.assert_array_equal(np.concatenate([both["a/kernel"], both["b/kernel"]]), found)


def test_scores_of_any_sign_are_ranked_as_sorting_does():
    scores = RANDOM.integers(-4, 5, 90).astype(np.float32) * np.float32(1e-3)
    scores[::7] *= -0.0
    scores[::11] = [3e38, -3e38, 1e-45, -1e-45, np.inf, -np.inf, 1, -1, 0]
    masked = jax.jit(lambda scores, sparsity: kept({"x": scores}, sparsity)["x"])
    for count in range(91):
        found = masked(scores, count / 90)
        np.testing.assert_array_equal(found, reference.without_smallest(scores, count), str(count))


def test_the_number_pruned_is_torchs():
    """`_compute_nparams_toprune` is Python's round(amount * n), ties to even; the float32 amount may decide a tie."""
    count = jax.jit(lambda own, kernel: jnp.sum(own.init(KEY, {"kernel": kernel})["kernel"] == 0))
    for n in (1, 2, 3, 5, 10, 25):
        for percent in range(0, 100, 5):
            wanted = percent * n / 100
            found = int(count(as_leaves(MagnitudePrune(sparsity=percent / 100)), jnp.arange(1.0, n + 1)[None]))
            tie = percent * n % 100 == 50
            assert found == round(wanted) if not tie or percent == 50 else abs(found - wanted) == 0.5, (n, percent)


def test_n_of_m_against_loops():
    for n, m in ((1, 2), (2, 4), (3, 4), (1, 8)):
        found = masks(NMPrune(n=n, m=m))
        named = masks(NMPrune(n=1, m=2, only="conv/*,items*"))
        assert set(found) == ({"conv/kernel", "fc1/kernel"} if m == 2 else {"fc1/kernel"})  # 2 inputs of conv: no multiple of 4
        for name, mask in found.items():
            np.testing.assert_array_equal(mask, reference.n_of_m(at(name), n, m))
    assert set(named) == {"conv/kernel", "items/embedding"}


def test_a_population_is_a_loop():
    many = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf[::-1], 2 * leaf[::-1]]), PARAMS)
    for own in (MagnitudePrune(sparsity=0.4, scope="global"), NMPrune()):
        single = jax.jit(lambda p, own=own: apply_all((own,), p, (own.init(KEY, p),)))
        together = jax.jit(jax.vmap(single))(many)
        for i in range(3):
            one = jax.tree.map(lambda leaf, i=i: leaf[i], many)
            jax.tree.map(np.testing.assert_array_equal, jax.tree.map(lambda leaf, i=i: leaf[i], together), single(one))


# -- what acts, what is refused


@pytest.mark.parametrize("own", [MagnitudePrune(sparsity=0.6), NMPrune()], ids=["prune", "nm_prune"])
def test_effective_parameters_and_gradients_are_masked(own):
    state = masks(own)
    full = {name: state.get(name, jnp.ones_like(at(name))) for name in WEIGHTS}
    effective = apply_all((own,), PARAMS, (state,))
    grads = jax.grad(lambda p: sum(leaf.sum() for leaf in jax.tree.leaves(own.constrain(p, state))))(PARAMS)
    for name, mask in full.items():
        np.testing.assert_array_equal(at(name, effective), at(name) * np.asarray(mask))
        np.testing.assert_array_equal(at(name, grads), mask)
    for name in ("fc1/bias", "norm/scale", "norm/kernel"):
        np.testing.assert_array_equal(at(name, effective), at(name))
        np.testing.assert_array_equal(at(name, grads), 1)
    if isinstance(own, MagnitudePrune):
        found = count_nonzero({name: at(name, effective) for name in WEIGHTS})
        assert found == (72 + 72 + 36, sum(n - round(0.6 * n) for n in (72, 72, 36)))


def test_only_some_leaves():
    assert set(masks(MagnitudePrune(only="fc1/*, it*"))) == {"fc1/kernel", "items/embedding"}
    with pytest.raises(UsageError, match=r"^only='fc9' names no weight of this network \(known: conv/kernel, fc1/kernel"):
        masks(MagnitudePrune(only="fc9"))
    with pytest.raises(UsageError, match=r"^nm_prune: conv/kernel has 2 inputs, which groups of m=4 do not divide; choose"):
        masks(NMPrune(only="conv/*,fc1/*"))
    with pytest.raises(UsageError, match=r"^nm_prune: conv/kernel has 2 inputs, which groups of m=16"):
        masks(NMPrune(m=16))
    with pytest.raises(UsageError, match=r"^nm_prune: this network has no kernel"):
        masks(NMPrune(), {"items": PARAMS["items"]})


def test_a_layer_with_nothing_left_is_one_line():
    params = {"fc1": PARAMS["fc1"], "tail": {"kernel": np.array([[1e-9], [2e-9]], np.float32)}}
    own = MagnitudePrune(sparsity=0.5, scope="global", recover_epochs=0)
    message = (
        r"^nothing is left of tail/kernel: all its 2 weights are zero after pruning \(sparsity=0\.5, scope=global\); prune"
    )
    with pytest.raises(RunError, match=message):
        finished((own,), Stored(params), KEY)
    kept_one = finished((MagnitudePrune(sparsity=0.5, recover_epochs=0),), Stored(params), KEY)
    assert np.count_nonzero(kept_one.params["tail"]["kernel"]) == 1


def test_options():
    assert build("compression", {"name": "prune"}).steps() == (MagnitudePrune(sparsity=0.5, scope="layer", recover_epochs=5),)
    assert MagnitudePrune(recover_epochs=0).recover_epochs == 0 and MagnitudePrune().recover_epochs == 5
    assert build("compression", {"name": "none"}).steps() == () and apply_all((), PARAMS, ()) is PARAMS
    assert build("compression", {"name": "nm_prune"}).steps() == (NMPrune(n=2, m=4, recover_epochs=5),)
    ramp = build("compression", {"name": "prune", "sparsity": CUBIC})
    assert ramp.gradual and ramp.needs_training and ramp.sparsity == Schedule(kind="cubic", start=0.0, end=0.9)
    assert not MagnitudePrune().needs_training
    for key, value in (("sparsity", 1.0), ("sparsity", -0.1), ("scope", "globl"), ("recover_epochs", -1)):
        with pytest.raises(UsageError, match=rf"^compression\.{key} must be"):
            build("compression", {"name": "prune", key: value})
    for value in ({"name": "cubic", "end": 1.0}, {"name": "cubic", "start": -0.1}):
        with pytest.raises(UsageError, match=r"^compression\.sparsity must be at least 0 and below 1"):
            build("compression", {"name": "prune", "sparsity": value})
    for n, m in ((0, 4), (4, 4), (5, 4)):
        with pytest.raises(UsageError, match=r"^compression\.n must be at least 1 and below m=4"):
            build("compression", {"name": "nm_prune", "n": n, "m": m})


# -- gradual


def ramping(epochs=4, **changes):
    """Every step of a stage under a gradual prune of the tiny student: stored parameters and clock time."""
    made = tiny.parts(augment=None)
    own = MagnitudePrune(**{"gradual": True, "sparsity": Schedule(kind="cubic", end=0.8, epochs=2.0), **changes})
    optim = tiny.optimizer(epochs=epochs, weight_decay=0.01, lr=0.05)
    stage = as_leaves(Stage(name="ramp", terms=(tiny.TASK,), optim=optim, compressors=(own,)))
    data, frozen = tiny.data(40), tiny.frozen()
    state = init_state(made, Keys.of(0).init, {n: a[:1] for n, a in data.items()})
    state = enter_stage(made, stage, state, KEY, {n: a[:1] for n, a in data.items()}, frozen, data["label"])
    step, seen = jax.jit(make_step(made)), []
    for i in range(5 * epochs):
        rows = np.arange(8 * i, 8 * i + 8) % 40
        batch = {n: a[rows] for n, a in data.items()} | {"index": rows}
        state, _ = step(state, frozen, batch, KEY, stage, (jnp.float32(5), jnp.float32(epochs)))
        seen.append(jax.tree.map(np.asarray, state.params["student"]))
    return seen, own, state


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_a_ramp_follows_the_cubic_and_what_is_pruned_stays(scope):
    seen, own, state = ramping(scope=scope)
    gone = {name: np.zeros(np.shape(layer["kernel"]), bool) for name, layer in seen[0].items()}
    for i, params in enumerate(seen):
        sparsity = reference.cubic(i, 2 * 5, 0.8)
        sizes = {name: layer["kernel"].size for name, layer in params.items()}
        zeros = {name: int((layer["kernel"] == 0).sum()) for name, layer in params.items()}
        if scope == "layer":
            assert zeros == {name: round(sparsity * size) for name, size in sizes.items()}, i
        else:
            assert sum(zeros.values()) == round(sparsity * sum(sizes.values())), i
        for name, layer in params.items():
            assert np.all(layer["kernel"][gone[name]] == 0), "a pruned weight came back"
            gone[name] = layer["kernel"] == 0
    assert any(np.any(seen[-1][n]["kernel"] != seen[10][n]["kernel"]) for n in gone)  # the others are trained on
    last = finished((own,), Stored(state.params["student"], state.compressor_state), KEY)
    assert_same_bits(jax.tree.map(np.asarray, last.params), jax.tree.map(lambda leaf: leaf + 0, seen[-1]))


def test_a_ramp_that_is_over_is_a_mask_for_the_next_step():
    seen, own, state = ramping()
    after = MagnitudePrune(sparsity=0.9, recover_epochs=0)
    stored = enter((own, after), Stored(state.params["student"], state.compressor_state), KEY)
    for name, layer in seen[-1].items():
        np.testing.assert_array_equal(stored.states[0][f"{name}/kernel"], layer["kernel"] != 0)
        np.testing.assert_array_equal(stored.params[name]["kernel"], layer["kernel"])
    moved = jax.tree.map(lambda leaf: leaf + 1, stored.params)
    acting = apply_all((own, after), moved, stored.states)
    for name, layer in seen[-1].items():
        assert np.all(acting[name]["kernel"][layer["kernel"] == 0] == 0)


def test_the_mask_of_a_ramp_follows_the_weights_and_its_gradient_is_the_masks():
    own, kernel = MagnitudePrune(sparsity=0.5, gradual=True), PARAMS["fc1"]["kernel"]
    state = own.init(KEY, {"kernel": kernel})
    for w in (kernel, kernel[::-1].copy()):
        mask = reference.without_smallest(np.abs(w), 36)
        np.testing.assert_array_equal(own.constrain({"kernel": w}, state)["kernel"], w * mask)
        np.testing.assert_array_equal(own.project({"kernel": w}, state)["kernel"], w * mask)
        np.testing.assert_array_equal(
            jax.grad(lambda p: own.constrain(p, state)["kernel"].sum())({"kernel": w})["kernel"], mask
        )


# -- the real thing


def small(compression, *steps, epochs=2, **choices):
    given = tiny.config(
        ("data.examples", 100), ("optim.epochs", epochs), ("optim.batch_size", 8), ("evaluate.latency", False), loss="none",
        compression=compression, **choices,
    )  # fmt: skip
    if steps:
        given["compression"]["steps"] = list(steps)
    return given


RUNS = {
    "gradual": ({"name": "prune", "sparsity": CUBIC, "recover_epochs": 2}, 0.9),
    "gradual, then trained": (
        {"name": "prune", "sparsity": {**CUBIC, "end": 0.5}, "scope": "global"},
        0.5,
        {"name": "recover", "epochs": 2},
    ),
    "1:2, then int8": ({"name": "nm_prune", "n": 1, "m": 2, "recover_epochs": 1}, 0.5, "int8"),
    "int8 first": ("int8", 0.5, {"name": "prune", "recover_epochs": 1}),
}


@pytest.mark.parametrize("name", slow_but(("gradual", "1:2, then int8"), tuple(RUNS)))
def test_what_is_deployed_has_the_sparsity(name, tmp_path):
    first, sparsity, *rest = RUNS[name]
    result = run(small("pipeline", "distill", first, *rest), tmp_path / "run", choices={})
    params, _, about = read_artifact(tmp_path / "run" / "artifact.safetensors")
    kernels = [layer["kernel"] for layer in params.values()]
    size = sum(kernel.size for kernel in kernels)
    lost = sum(int((kernel == 0).sum()) for kernel in kernels)
    assert lost >= round(sparsity * size) and lost <= sparsity * size + 0.05 * size  # int8 rounds a few more to zero
    assert result["size"]["nonzero"] == result["size"]["parameters"] - sum(
        int((np.asarray(leaf) == 0).sum()) for leaf in jax.tree.leaves(params)
    )
    assert about["forms"] == []


@pytest.mark.slow
def test_a_ramp_that_is_interrupted_goes_on_where_it_was(tmp_path):
    own = MagnitudePrune(sparsity=Schedule(kind="cubic", end=0.8), gradual=True, recover_epochs=3)

    def fitted(folder, **changes):
        folder.mkdir(exist_ok=True)
        return fit_one(tiny.setup(folder, tiny.method(compressor=own, epochs=1), every_steps=2, **changes))

    whole = fitted(tmp_path / "whole")
    with pytest.raises(Interrupted):
        fitted(tmp_path / "parts", stop=tiny.StopAfter(11))
    again = fitted(tmp_path / "parts")
    assert_same_bits(again.variables, whole.variables)
    assert again.states == whole.states
    rows = [json.loads(line) for line in (tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 4 and isinstance(tiny.method(compressor=own), Method)


def test_a_ramp_without_training_is_refused(tmp_path):
    given = small("prune")
    given["compression"] |= {"sparsity": CUBIC, "recover_epochs": 0}
    with pytest.raises(UsageError, match=r"^recover_epochs=0 leaves MagnitudePrune without training to act in"):
        run(given, tmp_path / "run", choices={})
