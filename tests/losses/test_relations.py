"""Relational losses against the published implementations' own numbers, and against the formulas in plain loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdistill.errors import UsageError
from jdistill.losses import CorrelationCongruence, ProbabilisticTransfer, RelationalKD, SimilarityPreserving
from jdistill.registry import build
from jdistill.types import Outputs
from tests.reference import relations as reference
from tests.reference.inputs import channels_last, golden_inputs

IN, POOLED = golden_inputs(), reference.golden_pooled()
FS, FT = channels_last(IN.fs), channels_last(IN.ft)

PRECISIONS = pytest.mark.parametrize(("x64", "tolerance"), [(True, 1e-10), (False, 1e-4)], ids=["float64", "float32"])

NEIGHBOURS = CorrelationCongruence(form="repdistiller", embedding_size=0)

# name: (loss, student's feature, teacher's, value, the implementation that gave it in float64)
GOLDENS = {
    "sp": (SimilarityPreserving(), FS, FT, 0.006846332951271575, "RepDistiller Similarity; mdistiller, AberHu agree"),
    "cc_repdistiller": (NEIGHBOURS, POOLED.es, POOLED.et, 7.158003394081464, "RepDistiller Correlation, no embedding"),
    "cc_rbf": (CorrelationCongruence(), POOLED.es, POOLED.et, 0.03857888374149562, "AberHu CC, gamma 0.4, order 2"),
    "rkd": (RelationalKD(), POOLED.ps, POOLED.pt, 4.468392976660835, "RepDistiller RKDLoss; four others agree"),
    "rkd_distance": (
        RelationalKD(distance_weight=1.0, angle_weight=0.0), POOLED.ps, POOLED.pt, 0.060947419777372225, "its D alone"
    ),
    "rkd_angle": (
        RelationalKD(distance_weight=0.0, angle_weight=1.0), POOLED.ps, POOLED.pt, 0.058894149644530575, "its A alone"
    ),
    "rkd_l2_norm": (RelationalKD(l2_norm=True), POOLED.ps, POOLED.pt, 3.7554099954762536, "mmrazor with_l2_norm"),
    "pkt": (ProbabilisticTransfer(), POOLED.ps, POOLED.pt, 0.019024724215414686, "RepDistiller PKT; two others agree"),
    "pkt_aberhu": (ProbabilisticTransfer(epsilon=1e-6), POOLED.ps, POOLED.pt, 0.019024253305349563, "AberHu, eps 1e-6"),
}  # fmt: skip


def one(feature: np.ndarray) -> Outputs:
    """A network with one feature, by every name that is taken by default."""
    return Outputs(jnp.zeros((len(feature), 3)), {name: jnp.asarray(feature) for name in ("stage3", "embedding")})


def values_of(loss, fs: np.ndarray, ft: np.ndarray, params=None):
    student, teacher = one(fs), one(ft)
    params = loss.init(jax.random.key(0), student, teacher) if params is None else params
    values = jax.jit(loss)(params, student, teacher, {})
    assert values.shape == (len(fs),)
    return values


@PRECISIONS
@pytest.mark.parametrize("name", GOLDENS)
def test_published_value(name, x64, tolerance):
    loss, fs, ft, expected, _origin = GOLDENS[name]
    with jax.enable_x64(x64):
        values = values_of(loss, fs, ft)
        assert values.dtype == (jnp.float64 if x64 else jnp.float32)
        np.testing.assert_allclose(values.mean(), expected, rtol=tolerance)


SHAPES = pytest.mark.parametrize(
    ("shape_s", "shape_t"), [((5, 3, 2, 4), (5, 7)), ((6, 4), (6, 4)), ((2, 3), (2, 9))], ids=["map", "vectors", "two"]
)
FORMULAS = {
    "sp": (SimilarityPreserving(), reference.similarity_preserving),
    "cc": (CorrelationCongruence(gamma=0.7, order=4), lambda s, t: reference.correlation_rbf(s, t, 0.7, 4)),
    "cc_linear": (CorrelationCongruence(gamma=0.2, order=1), lambda s, t: reference.correlation_rbf(s, t, 0.2, 1)),
    "rkd": (
        RelationalKD(distance_weight=2.0, angle_weight=3.0),
        lambda s, t: 2 * reference.rkd_distance(s, t) + 3 * reference.rkd_angle(s, t),
    ),
    "rkd_l2_norm": (
        RelationalKD(l2_norm=True),
        lambda s, t: sum(
            weight * part(reference.unit_rows(s), reference.unit_rows(t))
            for weight, part in ((25, reference.rkd_distance), (50, reference.rkd_angle))
        ),
    ),
    "pkt": (ProbabilisticTransfer(epsilon=1e-3), lambda s, t: reference.pkt(s, t, 1e-3)),
}


@SHAPES
@pytest.mark.parametrize("name", FORMULAS)
def test_the_mean_is_the_formula(name, shape_s, shape_t):
    random = np.random.RandomState(1)
    fs, ft = 3 * random.randn(*shape_s), random.randn(*shape_t)
    loss, formula = FORMULAS[name]
    with jax.enable_x64(True):
        np.testing.assert_allclose(values_of(loss, fs, ft).mean(), formula(fs, ft), rtol=1e-10, atol=1e-14)


def test_far_apart_distances_reach_the_linear_part_of_huber():
    fs, ft = np.array([[0.0], [0.1], [0.2], [90.0]]), np.arange(4.0)[:, None]
    loss = RelationalKD(distance_weight=1.0, angle_weight=0.0)
    with jax.enable_x64(True):
        np.testing.assert_allclose(values_of(loss, fs, ft).mean(), reference.rkd_distance(fs, ft), rtol=1e-10)


@pytest.mark.parametrize("shape", [(5, 3, 2, 4), (5, 7)], ids=["map", "vector"])
def test_cc_of_embeddings(shape):
    random = np.random.RandomState(2)
    fs, ft = random.randn(*shape), random.randn(5, 9)
    loss = CorrelationCongruence(form="repdistiller", embedding_size=6)
    with jax.enable_x64(True):
        params = loss.init(jax.random.key(3), one(fs), one(ft))
        values = values_of(loss, fs, ft, params)
        es, et = (
            f.reshape(5, -1) @ np.asarray(params[side]["kernel"]) + np.asarray(params[side]["bias"])
            for f, side in ((fs, "student"), (ft, "teacher"))
        )
        np.testing.assert_allclose(values.mean(), reference.correlation_neighbours(es, et), rtol=1e-10)
        grads = jax.grad(lambda p: loss(p, one(fs), one(ft), {}).mean())(params)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads)), "both embeddings are trained"


def test_embeddings_of_cc_start_as_torch_does():
    abstract = [Outputs(None, {"embedding": jax.ShapeDtypeStruct((2, d), jnp.bfloat16)}) for d in (300, 50)]
    params = CorrelationCongruence(form="repdistiller").init(jax.random.key(0), *abstract)
    for side, width in (("student", 300), ("teacher", 50)):
        kernel, bound = np.asarray(params[side]["kernel"]), width**-0.5
        assert kernel.shape == (width, 128) and kernel.dtype == np.float32 and params[side]["bias"].shape == (128,)
        np.testing.assert_allclose([kernel.min(), kernel.max()], [-bound, bound], rtol=0.05)
        assert np.abs(params[side]["bias"]).max() <= bound


def test_neighbours_of_cc_share_their_product():
    with jax.enable_x64(True):
        values = values_of(NEIGHBOURS, POOLED.es, POOLED.et)
    d = np.abs(POOLED.es - POOLED.et)
    np.testing.assert_allclose(values[0], d[0] @ d[1] * 8 / 14, rtol=1e-12)
    np.testing.assert_allclose(values[3], (d[2] @ d[3] + d[3] @ d[4]) * 8 / 14, rtol=1e-12)


LOSSES = {
    "sp": SimilarityPreserving(), "cc": CorrelationCongruence(), "neighbours": NEIGHBOURS, "rkd": RelationalKD(),
    "rkd_l2_norm": RelationalKD(l2_norm=True), "pkt": ProbabilisticTransfer(),
}  # fmt: skip
LIKE = np.random.RandomState(3).randn(4, 5)
DEGENERATE = {
    "zeros": np.zeros((4, 5)), "zero_rows": LIKE * [[0], [1], [1], [0]], "twins": LIKE[[0, 0, 0, 1]],
    "opposite": LIKE[[0, 0, 1, 1]] * [[1], [-1], [1], [-1]], "equal": np.ones((4, 5)), "tiny": 1e-18 * LIKE, "one": LIKE[:1],
}  # fmt: skip


@jax.jit
def value_and_gradient(loss, fs, ft):
    return jax.value_and_grad(lambda fs: loss({}, one(fs), one(ft), {}).mean())(fs)


@pytest.mark.parametrize("case", DEGENERATE)
@pytest.mark.parametrize("name", LOSSES)
def test_degenerate_batches_have_finite_and_modest_gradients(name, case):
    fs = jnp.asarray(DEGENERATE[case], jnp.float32)
    for ft in (jnp.asarray(LIKE[: len(fs)], jnp.float32), jnp.zeros_like(fs), fs):
        value, gradient = value_and_gradient(LOSSES[name], fs, ft)
        assert np.isfinite(value) and value >= -1e-7
        assert np.all(np.isfinite(gradient))
        if case != "tiny":  # where directions are real, and change as fast as 1 / norm
            assert np.abs(gradient).max() < 1e3


def test_pkt_of_opposite_vectors_does_not_round_below_zero():
    f = np.random.RandomState(4).randn(64, 7).astype(np.float32)
    assert np.all(np.isfinite(values_of(ProbabilisticTransfer(), np.concatenate([f, -f]), np.concatenate([f, f]))))


def test_sp_takes_each_networks_last_stage_else_the_embedding():
    random = np.random.RandomState(5)
    maps, flat = random.randn(4, 2, 2, 3), random.randn(4, 6)
    both = Outputs(jnp.zeros((4, 3)), {"stage9": 2 + maps, "stage10": jnp.asarray(maps), "embedding": jnp.asarray(flat)})
    mlp = Outputs(jnp.zeros((4, 3)), {"hidden1": jnp.asarray(flat) + 1, "embedding": jnp.asarray(flat)})
    expected = values_of(SimilarityPreserving(student_layer="stage3"), maps, flat)
    np.testing.assert_allclose(SimilarityPreserving()({}, both, mlp, {}), expected, rtol=1e-6)
    named = SimilarityPreserving(student_layer="stage10", teacher_layer="embedding")
    np.testing.assert_array_equal(named({}, both, both, {}), SimilarityPreserving()({}, both, mlp, {}))


@pytest.mark.parametrize("loss", [SimilarityPreserving, CorrelationCongruence, RelationalKD, ProbabilisticTransfer])
@pytest.mark.parametrize("field", ["student_layer", "teacher_layer"])
def test_a_layer_that_does_not_exist(loss, field):
    with pytest.raises(UsageError, match=rf"^{field} 'embeding' does not exist in the .*; did you mean 'embedding'\?"):
        loss(**{field: "embeding"}).init(jax.random.key(0), one(LIKE), one(LIKE))


def test_unequal_widths_without_embeddings():
    with pytest.raises(UsageError, match=r"^student_layer of 5 numbers and teacher_layer of 4 .*; set embedding_size=128"):
        NEIGHBOURS.init(jax.random.key(0), one(LIKE), one(LIKE[:, :4]))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"name": "cc", "form": "bilinear"}, "loss.form must be one of rbf, repdistiller, got 'bilinear'"),
        ({"name": "cc", "gamma": 0.0}, "loss.gamma must be positive, got 0.0"),
        ({"name": "cc", "order": 0}, "loss.order must be positive, got 0"),
        ({"name": "cc", "embedding_size": -1}, "loss.embedding_size must be at least 0, got -1"),
        ({"name": "rkd", "distance_weight": -1.0}, "loss.distance_weight must be at least 0, got -1.0"),
        ({"name": "rkd", "angle_weight": -1.0}, "loss.angle_weight must be at least 0, got -1.0"),
        ({"name": "pkt", "epsilon": 0.0}, "loss.epsilon must be positive, got 0.0"),
    ],
)
def test_bad_options(config, message):
    with pytest.raises(UsageError) as error:
        build("loss", config)
    assert message in str(error.value) and "\n" not in str(error.value)
