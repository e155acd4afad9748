"""Factor transfer against the published implementations' own numbers, and against the formula in plain loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jdistill.errors import UsageError
from jdistill.losses.factors import FactorTransfer, Paraphrase, factor_distance
from jdistill.registry import build, options
from jdistill.types import Outputs
from tests.reference import factors as reference
from tests.reference.boundaries import golden_signed

(FSP,), (FTP,) = golden_signed()
PRECISIONS = pytest.mark.parametrize(("x64", "tolerance"), [(True, 1e-10), (False, 2e-5)], ids=["float64", "float32"])
NORMALISATIONS = pytest.mark.parametrize("normalisation", ["full", "channel_mean"])

RANDOM = np.random.RandomState(1)
FS, FT, LARGE = RANDOM.randn(4, 4, 3, 3), RANDOM.randn(4, 4, 3, 6), RANDOM.randn(4, 6, 5, 6)

# name: (value of the signed maps as factors, the implementation that gave it in float64)
GOLDENS = {
    "full": (0.1143918573772667, "AberHu FT; mmrazor, torchdistill p=1 agree"),
    "channel_mean": (0.12682069549601427, "RepDistiller FactorTransfer, p1=2 p2=1"),
}


def network(last: np.ndarray, **others: np.ndarray) -> Outputs:
    features = {"stage1": jnp.zeros((len(last), 8, 8, 2)), "stage2": jnp.asarray(last), "embedding": jnp.zeros((len(last), 5))}
    return Outputs(jnp.zeros((len(last), 3)), {**features, **{name: jnp.asarray(f) for name, f in others.items()}})


def start(loss, student: Outputs, teacher: Outputs):
    """Parameters with other scales and offsets than at the start."""
    random, params = np.random.RandomState(2), jax.jit(loss.init)(jax.random.key(0), student, teacher)
    return jax.tree.map(lambda p: p + 0.1 * random.randn(*p.shape).astype(p.dtype), params)


@PRECISIONS
@pytest.mark.parametrize("name", GOLDENS)
def test_published_value_of_given_factors(name, x64, tolerance):
    expected, _origin = GOLDENS[name]
    with jax.enable_x64(x64):
        values = jax.jit(factor_distance, static_argnums=2)(jnp.asarray(FSP), jnp.asarray(FTP), name)
        assert values.shape == (8,) and values.dtype == (jnp.float64 if x64 else jnp.float32)
        np.testing.assert_allclose(values.mean(), expected, rtol=tolerance)


@NORMALISATIONS
@pytest.mark.parametrize("ft", [FT, LARGE], ids=["equal", "larger"])
def test_value_of_each_example(normalisation, ft):
    loss = FactorTransfer(normalisation=normalisation)
    with jax.enable_x64(True):
        student, teacher = network(FS), network(ft)
        params = start(loss, student, teacher)
        values = jax.jit(loss)(params, student, teacher, {})
    factors = reference.run(params["translator"], FS), reference.run(params["encoder"], ft)
    assert [f.shape[3] for f in factors] == [3, 3]
    np.testing.assert_allclose(values, reference.distance(*factors, normalisation), rtol=1e-10)


@pytest.mark.slow
def test_jit_is_eager():
    loss, student, teacher = FactorTransfer(), network(FS), network(FT)
    params = start(loss, student, teacher)
    np.testing.assert_allclose(jax.jit(loss)(params, student, teacher, {}), loss(params, student, teacher, {}), rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["mse", "l1"])
def test_preparation_trains_the_paraphraser_alone_on_the_same_parameters(form):
    loss = FactorTransfer(reconstruction=form, init_epochs=7)
    with jax.enable_x64(True):
        student, teacher = network(FS), network(FT)
        first, epochs = loss.preparation()
        assert epochs == 7
        inits = [jax.jit(of.init)(jax.random.key(3), student, teacher) for of in (loss, first)]
        jax.tree.map(np.testing.assert_array_equal, *inits)
        params = start(first, student, teacher)
        values = jax.jit(first)(params, student, teacher, {})
        grads = jax.jit(jax.grad(lambda p: first(p, student, teacher, {}).mean()))(params)
    np.testing.assert_allclose(values, reference.reconstruction(params, FT, form), rtol=1e-10)
    assert all(np.abs(g).max() > 0 for part in ("encoder", "decoder") for g in jax.tree.leaves(grads[part]))
    assert all(np.abs(g).max() == 0 for g in jax.tree.leaves(grads["translator"]))


@pytest.mark.slow
def test_preparation_lowers_the_reconstruction_error():
    student, teacher = network(FS), network(np.maximum(FT, 0).astype(np.float32))
    loss, _ = FactorTransfer(rate=1.0).preparation()
    params = jax.jit(loss.init)(jax.random.key(0), student, teacher)

    @jax.jit
    def step(params):
        value, grads = jax.value_and_grad(lambda p: loss(p, student, teacher, {}).mean())(params)
        return value, jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)

    before, params = step(params)
    for _ in range(200):
        after, params = step(params)
    assert after < 0.9 * before


def test_without_epochs_there_is_no_preparation():
    assert FactorTransfer(init_epochs=0).preparation() is None
    assert isinstance(FactorTransfer().preparation()[0], Paraphrase) and FactorTransfer().preparation()[1] == 30


@NORMALISATIONS
def test_gradients_reach_translator_and_student_only(normalisation):
    loss = FactorTransfer(normalisation=normalisation)
    with jax.enable_x64(True):
        teacher = network(FT)
        params = start(loss, network(FS), teacher)

        @jax.jit
        def total(translator, fs):
            return loss({**params, "translator": translator}, network(fs), teacher, {}).sum()

        check_grads(total, (params["translator"], jnp.asarray(FS)), order=1, modes=["rev"], atol=1e-5, rtol=1e-5, eps=1e-6)
        grad = jax.jit(jax.grad(lambda p, ft: loss(p, network(FS), network(ft), {}).sum(), argnums=(0, 1)))
        grads = grad(params, jnp.asarray(FT))
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(grads[0].pop("translator")))
    assert all(np.abs(g).max() == 0 for g in jax.tree.leaves(grads))


EXTREME = {"full": FactorTransfer(), "channel_mean": FactorTransfer(normalisation="channel_mean")}
EXTREME["paraphrase"] = Paraphrase(of=FactorTransfer())


@pytest.mark.slow
@pytest.mark.parametrize("of", EXTREME.values(), ids=EXTREME)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_finite_at_extreme_maps(of, dtype):
    random = np.random.RandomState(4)
    large = jnp.asarray(1e4 * np.sign(random.randn(4, 4, 4, 4)), dtype)
    dead = jnp.asarray(random.randn(4, 4, 4, 4) * [1, 0, 0, 0], dtype)
    params = jax.jit(of.init)(jax.random.key(0), network(large), network(large))

    @jax.jit
    def evaluate(params, fs, ft):
        return jax.value_and_grad(lambda p, f: of(p, network(f), network(ft), {}).mean(), argnums=(0, 1))(params, fs)

    for fs in (large, -large, 0 * large, dead):
        for ft in (large, 0 * large, dead):
            value, grads = evaluate(params, fs, ft)
            assert value.dtype == jnp.float32 and np.isfinite(value)
            assert all(np.all(np.isfinite(np.asarray(g, np.float32))) for g in jax.tree.leaves(grads))


@NORMALISATIONS
def test_zero_factors_have_no_gradient_of_their_own(normalisation):
    grad = jax.jit(jax.value_and_grad(lambda s: factor_distance(s, jnp.asarray(FT), normalisation).sum()))
    values, grads = grad(jnp.zeros(FT.shape))
    assert values > 0 and np.all(np.asarray(grads) == 0)
    assert np.all(np.asarray(factor_distance(jnp.asarray(FT), jnp.asarray(FT), normalisation)) == 0)


def test_parameters_start_as_torchs_do():
    maps = [jax.ShapeDtypeStruct((2, 4, 4, width), jnp.bfloat16) for width in (30, 40)]
    student, teacher = (Outputs(None, {"stage1": f}) for f in maps)
    params = FactorTransfer(rate=0.75).init(jax.random.key(0), student, teacher)
    expected = {  # (channels in, out, torch's fan-in over 9)
        "encoder": [(40, 40, 40), (40, 30, 40), (30, 30, 30)],
        "decoder": [(30, 30, 30), (30, 40, 40), (40, 40, 40)],
        "translator": [(30, 30, 30), (30, 30, 30), (30, 30, 30)],
    }
    assert set(params) == set(expected)
    for part, layers in expected.items():
        for layer, (c_in, c_out, fan) in zip(params[part], layers, strict=True):
            kernel, bound = np.asarray(layer["kernel"]), (9 * fan) ** -0.5
            assert kernel.shape == (3, 3, c_in, c_out) and kernel.dtype == np.float32
            np.testing.assert_allclose([kernel.min(), kernel.max()], [-bound, bound], rtol=0.02)
            assert set(layer) == ({"kernel", "scale", "offset"} if part == "translator" else {"kernel", "bias"})
    assert not np.allclose(params["encoder"][2]["kernel"], params["translator"][2]["kernel"])


def test_chosen_layers_and_a_rate_of_one_channel():
    student, teacher = network(FS, mine=FT), network(FT, yours=LARGE)
    chosen = FactorTransfer(student_layer="mine", teacher_layer="yours", rate=0.01)
    params = chosen.init(jax.random.key(0), student, teacher)
    assert params["encoder"][2]["kernel"].shape == (3, 3, 1, 1)
    expected = jax.jit(FactorTransfer(rate=0.01))(params, network(FT), network(LARGE), {})
    np.testing.assert_allclose(jax.jit(chosen)(params, student, teacher, {}), expected, rtol=1e-6)


def test_default_weight_is_the_authors():
    assert options("loss")["ft"].fields["weight"][1] == 500


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"rate": 0.0}, "loss.rate must be positive, got 0.0"),
        ({"normalisation": "channels"}, "loss.normalisation must be one of full, channel_mean, got 'channels'"),
        ({"reconstruction": "l2"}, "loss.reconstruction must be one of mse, l1, got 'l2'"),
        ({"init_epochs": -1}, "loss.init_epochs must be at least 0, got -1"),
    ],
)
def test_bad_options(config, message):
    with pytest.raises(UsageError) as error:
        build("loss", {"name": "ft", **config})
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (FactorTransfer(student_layer="stagee2"), "student_layer 'stagee2' does not exist in the student; did you mean"),
        (FactorTransfer(teacher_layer="stage9"), "teacher_layer 'stage9' does not exist in the teacher"),
        (FactorTransfer(teacher_layer="embedding"), "teacher_layer must be a map [B, H, W, C], 'embedding' is [B, 5]"),
    ],
)
def test_layers_that_do_not_fit(loss, message):
    with pytest.raises(UsageError) as error:
        loss.init(jax.random.key(0), network(FS), network(FT))
    assert str(error.value).startswith(message) and "\n" not in str(error.value)
    with pytest.raises(UsageError, match="needs a teacher"):
        FactorTransfer().init(jax.random.key(0), network(FS), None)
