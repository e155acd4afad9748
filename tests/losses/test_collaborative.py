"""CD, UnKD and BD: NumPy loops on the items drawn, what is drawn and how often, extreme logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdistill import sampling
from jdistill.errors import UsageError
from jdistill.losses import BidirectionalDistillation, CollaborativeDistillation, Sum, UnbiasedDistillation
from jdistill.losses.collaborative import rank_of
from jdistill.method import Stage, Term
from jdistill.optim import Optimizer
from jdistill.passes import known_to, with_lookups
from jdistill.registry import build, options
from jdistill.types import Context, Network, Outputs
from tests.reference import ranked as reference

WORLD = reference.world()
KNOWN = jax.tree.map(jnp.asarray, WORLD.known)
USER = jnp.array([3, 0, 3, 7, 11, 0], jnp.int32)
KEY = jax.random.key(0)
NOTHING = Network(lambda inputs: inputs, lambda embedding: embedding)
CD = CollaborativeDistillation(samples=6, pool=15, gamma=3.0, temperature=1.5, shift=0.25)
UNKD = UnbiasedDistillation(groups=3, pairs=4, temperature=2.0, top=5, depth=20)
BD = BidirectionalDistillation(samples=4, pool=10, epsilon=0.05)


def drawn(loss, key, user, known=KNOWN):
    return jax.jit(lambda key, known, user: loss.draw(key, known, user))(key, known, user)


def context(loss, key=KEY, user=USER, student=WORLD.student, teacher=WORLD.teacher) -> Context:
    items = drawn(loss, key, user)
    s, t = (Outputs(jnp.asarray(table)[user[:, None], items], {}) for table in (student, teacher))
    batch = {"inputs": {"user": user, "items": items[:, :2]}, "label": jnp.zeros(len(user), jnp.int32)}
    return Context(s, t, batch, jax.random.key(5), NOTHING, NOTHING, known=KNOWN)


def evaluated(loss, made, eager=False) -> np.ndarray:
    """Compiled; with `eager` after a comparison."""
    arrays = made._replace(student_network=None, teacher_network=None)
    values = jax.jit(lambda loss, context: loss.evaluate({}, {}, context)[0])(loss, arrays)
    if eager:
        np.testing.assert_allclose(values, loss.evaluate({}, {}, made)[0], rtol=1e-5)
    return np.asarray(values)


def rows_alike(s, t, rows: int, seed: int = 7) -> Context:
    """Many rows of one pool, each with draws of its own."""
    given = [Outputs(jnp.broadcast_to(jnp.asarray(z, jnp.float32), (rows, len(z))), {}) for z in (s, t)]
    return Context(*given, {}, jax.random.key(seed), NOTHING, NOTHING, known=KNOWN)


def test_cd_of_each_row():
    made = context(CD)
    expected = reference.cd(np.asarray(made.student.logits), np.asarray(made.teacher.logits), 1.5, 0.25)
    np.testing.assert_allclose(evaluated(CD, made, eager=True), expected, rtol=1e-5)
    assert CD.drawn == 6 and CD.ranking == (15, 0)


@pytest.mark.parametrize("form", ["exponential", "linear"])
def test_cd_draws_by_the_teachers_rank(form):
    user = jnp.full(20000, 4, jnp.int32)
    items = np.asarray(CollaborativeDistillation(samples=6, pool=15, form=form).draw(KEY, KNOWN, user))
    best = WORLD.known.ranking.items[4, :15]
    assert np.isin(items, best).all() and not WORLD.met[4][items].any()
    assert (np.diff(np.sort(items, axis=1)) > 0).all()
    pi = np.arange(15) / 15
    p = np.exp(-10 * pi) if form == "exponential" else 1 - pi
    counts = np.array([(items[:, 0] == item).sum() for item in best])  # the first drawn
    assert reference.chi_square(counts, p / p.sum()) < 2.5


def test_cd_by_the_students_own_rank():
    loss = CollaborativeDistillation(samples=1, pool=8, guidance="student", gamma=4.0)
    assert loss.drawn == 8 and loss.ranking == (0, 0)
    user = jnp.arange(12, dtype=jnp.int32)
    assert not np.take_along_axis(WORLD.met, np.asarray(drawn(loss, KEY, user)), axis=1).any()
    s, t = np.random.RandomState(3).randn(2, 8).astype(np.float32)
    values = evaluated(loss, rows_alike(s, t, 20000))
    of_items = np.array([reference.cd(s[i : i + 1, None], t[i : i + 1, None], 2.0, 0.0)[0] for i in range(8)])
    nearest = np.abs(values[:, None] - of_items).argmin(axis=1)
    np.testing.assert_allclose(values, of_items[nearest], rtol=1e-4)
    p = np.exp(-4 * np.argsort(np.argsort(-s)) / 8)
    assert reference.chi_square(np.bincount(nearest, minlength=8), p / p.sum()) < 2.5


def test_cd_by_the_student_takes_different_items():
    loss = CollaborativeDistillation(samples=8, pool=8, guidance="student", form="linear", temperature=1.5, shift=0.25)
    made = context(loss)
    expected = reference.cd(np.asarray(made.student.logits), np.asarray(made.teacher.logits), 1.5, 0.25)
    np.testing.assert_allclose(evaluated(loss, made), expected, rtol=1e-5)  # all of them, once each


def test_unkd_of_each_row():
    made = context(UNKD)
    np.testing.assert_allclose(evaluated(UNKD, made, eager=True), reference.unkd(np.asarray(made.student.logits)), rtol=1e-5)
    assert UNKD.drawn == 24 and UNKD.ranking == (20, 0)
    default = UnbiasedDistillation()
    assert default.drawn == 64 and default.groups * default.pairs == 32  # as round(30 / 4) in each of 4 groups


def test_unkd_draws_pairs_within_groups():
    user = jnp.tile(jnp.arange(12, dtype=jnp.int32), 2000)
    items = np.asarray(drawn(UNKD, KEY, user))
    group = reference.popularity_groups(WORLD.known.popularity, 3)
    assert not WORLD.met[np.asarray(user)[:, None], items].any()
    for u in range(12):
        own = items[np.asarray(user) == u]
        for g in range(3):
            ranked = [i for i in WORLD.known.ranking.items[u] if group[i] == g][:5]
            if len(ranked) < 2:
                continue
            rank = {item: r for r, item in enumerate(ranked)}
            better, worse = (
                np.array([[rank[i] for i in row] for row in own[:, at + 4 * g : at + 4 * g + 4]]) for at in (0, 12)
            )
            assert (better < worse).mean() > 0.98 and (better <= worse).all()
            better, worse = better[better < worse], worse[better < worse]
            p = np.exp(-np.arange(len(ranked)) / 2)
            joint = np.triu(np.outer(p, p), 1)
            counts = np.zeros(joint.shape)
            np.add.at(counts, (better, worse), 1)
            assert reference.chi_square(counts.ravel(), (joint / joint.sum()).ravel()) < 4, (u, g)


def test_popularity_groups():
    rs = np.random.RandomState(4)
    for popularity in (WORLD.known.popularity, rs.zipf(1.3, 500).clip(max=1000), np.zeros(5, int), np.array([100, 1, 1])):
        for groups in (1, 2, 4):
            made = np.asarray(sampling.popularity_groups(jnp.asarray(popularity, jnp.int32), groups))
            np.testing.assert_array_equal(made, reference.popularity_groups(popularity, groups))
    made = np.asarray(sampling.popularity_groups(jnp.asarray(np.full(12, 7)), 4))
    np.testing.assert_array_equal(made, np.repeat(np.arange(4), 3))


@pytest.mark.parametrize("loss", [UNKD, Sum(losses=(UNKD, CD), weights=(1.0, 1.0), names=("unkd", "cd"))], ids=["unkd", "sum"])
def test_a_lookup_made_before_draws_the_same(loss):
    user = jnp.arange(12, dtype=jnp.int32)
    before = KNOWN._replace(lookup=jax.jit(loss.lookup)(KNOWN))
    np.testing.assert_array_equal(drawn(loss, KEY, user, before), drawn(loss, KEY, user))


def test_training_makes_lookups_once():
    unkd, cd = (Term(name=name, teacher="teacher", loss=loss) for name, loss in (("unkd", UNKD), ("cd", CD)))
    stage = Stage(name="distil", terms=(unkd, cd), optim=Optimizer())
    frozen = {"tables": {"known": KNOWN._replace(ranking=None), "rankings": {"teacher": KNOWN.ranking}}}
    found = with_lookups(frozen, [stage])
    assert list(found["tables"]["lookups"]) == [("distil", "unkd")] and known_to(cd, stage, found).lookup is None
    known = known_to(unkd, stage, found)
    assert known.lookup[0].shape == KNOWN.ranking.items[:, :20].shape
    np.testing.assert_array_equal(drawn(UNKD, KEY, USER, known), drawn(UNKD, KEY, USER))


def test_ranked_pairs_of_few():
    draw = jax.jit(sampling.ranked_pairs, static_argnums=2)
    better, worse = (np.asarray(a) for a in draw(KEY, jnp.array([0, 1, 2, 50]), 5000, 20.0))
    assert (better >= 0).all() and (worse.max(axis=1) <= [0, 0, 1, 49]).all()
    assert (better[2] < worse[2]).mean() > 0.99 and (better[3] < worse[3]).all()
    better, worse = draw(KEY, jnp.array([0, 1, 2, 50]), 5000, 1e-3)
    assert (better == 0).all() and (worse == 0).all()


@pytest.mark.parametrize("form", ["tanh", "exp"])
@pytest.mark.parametrize("ranks", ["top", "bottom"])
def test_bd_draws_by_the_difference_of_ranks(form, ranks):
    loss = BidirectionalDistillation(form=form, ranks=ranks, samples=1, pool=8, epsilon=0.05)
    s, t = np.random.RandomState(6).randn(2, 8).astype(np.float32)
    values = evaluated(loss, rows_alike(s, t, 20000))
    of_items = np.array([reference.cd(s[i : i + 1, None], t[i : i + 1, None], 2.0, 0.0)[0] for i in range(8)])
    nearest = np.abs(values[:, None] - of_items).argmin(axis=1)
    np.testing.assert_allclose(values, of_items[nearest], rtol=1e-4)
    p = reference.bd_probabilities(s, t, 40, form, 0.05, ranks == "bottom")
    assert reference.chi_square(np.bincount(nearest, minlength=8), p) < 2.5


@pytest.mark.slow
def test_bd_adds_up_its_samples():
    made = context(BD)
    values = evaluated(BD, made, eager=True)
    one = np.array(
        [[reference.soft_binary(1 / (1 + np.exp(-t / 2)), s) for s, t in zip(*rows, strict=True)] for rows in zip(
            np.asarray(made.student.logits), np.asarray(made.teacher.logits), strict=True)]
    )  # fmt: skip
    assert ((values >= 4 * one.min(axis=1) - 1e-5) & (values <= 4 * one.max(axis=1) + 1e-5)).all()
    assert BD.drawn == 10 and BD.ranking == (0, 0) and (values > 0).all()


def test_bd_teaches_nothing_where_ranks_are_equal():
    z = np.arange(8.0)
    assert (evaluated(BidirectionalDistillation(pool=8), rows_alike(z, 2 * z, 3)) == 0).all()
    assert (evaluated(BidirectionalDistillation(pool=8, form="exp"), rows_alike(z, 2 * z, 3)) > 0).all()


def test_rank_of():
    z = np.random.RandomState(8).randint(0, 4, (5, 9)).astype(np.float32)
    expected = [[sum(1 for j in range(9) if (-row[j], j) < (-row[i], i)) for i in range(9)] for row in z]
    np.testing.assert_array_equal(rank_of(jnp.asarray(z)), expected)


GUIDED = CollaborativeDistillation(samples=6, pool=15, guidance="student")


@pytest.mark.parametrize("loss", [CD, GUIDED, UNKD, BD], ids=["cd", "cd_student", "unkd", "bd"])
def test_finite_at_extreme_logits(loss):
    made = context(loss)

    @jax.jit
    @jax.value_and_grad
    def total(s, t):
        return loss.evaluate({}, {}, made._replace(student=Outputs(s, {}), teacher=Outputs(t, {})))[0].sum()

    for scale in (0.0, 1.0, 1e4):
        value, gradient = total(scale * made.student.logits, -scale * made.teacher.logits)
        assert np.isfinite(value) and np.isfinite(np.asarray(gradient)).all()


def test_published_weights():
    found = {name: options("loss")[name].fields["weight"][1] for name in ("cd", "unkd", "bd")}
    assert found == {"cd": 1.0, "unkd": 1.0, "bd": 0.5}


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ({"name": "cd", "guidance": "techer"}, "guidance must be one of teacher, student"),
        ({"name": "cd", "gamma": 0}, "gamma must be positive"),
        ({"name": "cd", "pool": 10}, "pool must be at least samples=50, got 10"),
        ({"name": "unkd", "temperature": 0}, "temperature must be positive"),
        ({"name": "unkd", "top": 1}, "top must be at least 2, got 1"),
        ({"name": "bd", "form": "sinh"}, "form must be one of tanh, exp"),
        ({"name": "bd", "ranks": "up"}, "ranks must be one of top, bottom"),
    ],
)
def test_bad_options(node, message):
    with pytest.raises(UsageError, match=message):
        build("loss", node)


def test_a_ranking_that_is_too_short():
    with pytest.raises(UsageError, match="samples must be at most 20, the number of items that the teacher ranks, got 50"):
        CollaborativeDistillation().draw(KEY, KNOWN, USER)
