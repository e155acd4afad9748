"""RD, RRD, IR-RRD and DE-RRD: NumPy loops on the items drawn, what is drawn and how often, users and items counted once."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jdistill.losses.entities  # noqa: F401 (registers de)
from jdistill import sampling
from jdistill.errors import UsageError
from jdistill.losses import KD, LogitStd, RankingDistillation, RelaxedRanking, Sum
from jdistill.losses.ranked import ItemRegularisedRanking, relaxed_ranking
from jdistill.losses.wrappers import takes_candidates
from jdistill.registry import build, options
from jdistill.types import Context, Network, Outputs
from tests.reference import ranked as reference

WORLD = reference.world()
KNOWN = jax.tree.map(jnp.asarray, WORLD.known)
USER = jnp.array([3, 0, 3, 7, 11, 0], jnp.int32)
RD = RankingDistillation(top=6, samples=9, sharpness=2.0, mu=0.05)
RRD = RelaxedRanking(interesting=5, uninteresting=4, temperature=3.0, top=15)
IR = ItemRegularisedRanking(
    interesting=5, uninteresting=4, top=15, interesting_users=3, uninteresting_users=2, user_top=6, user_temperature=2.0,
    item_sample=0,
)  # fmt: skip
KEY = jax.random.key(0)


def scores(table, users, items):
    return jnp.asarray(table)[jnp.asarray(users)[:, None], items]


def network(table):
    def outputs(request):
        return Outputs(scores(table, request["user"], request["items"]), {})

    return Network(outputs, lambda embedding: embedding)


def drawn(loss, key, user):
    return jax.jit(lambda key, known, user: loss.draw(key, known, user))(key, KNOWN, user)


def context(loss, key=KEY, user=USER, student=WORLD.student, teacher=WORLD.teacher, **fields) -> Context:
    """As the batch builder makes it: the task's candidates in the request, the loss's own columns in the logits."""
    items = drawn(loss, key, user)
    task = jnp.stack([user + 1, user + 2], axis=1)
    given = [Outputs(scores(table, user, items), {}) for table in (student, teacher)]
    batch = {"inputs": {"user": user, "items": task}, "label": jnp.zeros(len(user), jnp.int32)}
    return Context(*given, batch, jax.random.key(5), network(student), network(teacher), known=KNOWN)._replace(**fields)


def evaluated(loss, made, state=None, eager=True):
    """Compiled, after a comparison with eager execution."""
    state = start(loss) if state is None else state
    arrays = made._replace(student_network=None, teacher_network=None)

    def evaluate(state, arrays):
        networks = {"student_network": made.student_network, "teacher_network": made.teacher_network}
        return loss.evaluate({}, state, arrays._replace(**networks))

    values, after = jax.jit(evaluate)(state, arrays)
    if eager:
        np.testing.assert_allclose(values, evaluate(state, arrays)[0], rtol=1e-5)
    return np.asarray(values), after


def start(loss):
    empty = Outputs(jnp.zeros((1, loss.drawn)), {})
    return loss.init_state(KEY, empty, empty, jnp.zeros(3, jnp.int32))


@pytest.mark.parametrize(("step", "normalise"), [(0, True), (9, True), (10, True), (10, False)])
def test_rd_of_each_row(step, normalise):
    loss = RankingDistillation(top=6, samples=9, sharpness=2.0, mu=0.05, warmup_steps=10.0, normalise=normalise)
    made = context(loss)
    values, state = evaluated(loss, made, {"step": jnp.int32(step)}, eager=step == 9)
    expected = reference.rd(np.asarray(made.student.logits), 6, 40, 2.0, 0.05, step >= 10, normalise)
    np.testing.assert_allclose(values, expected, rtol=1e-5)
    assert state["step"] == step + 1 and start(loss)["step"] == 0


def test_rd_draws_the_teachers_best_and_unobserved_items():
    user = jnp.arange(12, dtype=jnp.int32)
    items = np.asarray(drawn(RD, KEY, user))
    np.testing.assert_array_equal(items[:, :6], WORLD.known.ranking.items[:, :6])
    assert not np.take_along_axis(WORLD.met, items, axis=1).any()
    assert RD.drawn == 15 and RD.ranking == (6, 0)


def test_rd_weights_without_gradient():
    made = context(RD)

    def total(logits, loss):
        return loss.evaluate({}, {"step": jnp.int32(0)}, made._replace(student=Outputs(logits, {})))[0].sum()

    z = np.asarray(made.student.logits)
    gradient = np.asarray(jax.grad(total)(made.student.logits, RD))
    assert (gradient[:, 6:] == 0).all()
    weight = gradient[:, :6] * -(1 + np.exp(z[:, :6]))  # the derivative of -w log sigmoid(s) is -w sigmoid(-s)
    np.testing.assert_allclose(weight.sum(axis=1), 1, rtol=1e-4)


def test_relaxed_ranking_is_a_probability():
    """Over all orders of what may come first, the probabilities add up to one."""
    logits = np.random.RandomState(1).randn(5)
    total = 0.0
    for first in itertools.permutations(range(5), 2):
        rest = [i for i in range(5) if i not in first]
        total += np.exp(-float(relaxed_ranking(jnp.asarray(logits[list(first)]), jnp.asarray(logits[rest]))))
    assert abs(total - 1) < 1e-5


def test_rrd_of_each_user():
    made = context(RRD)
    values, _ = evaluated(RRD, made)
    np.testing.assert_allclose(values, reference.rrd(np.asarray(made.student.logits), np.asarray(USER), 5), rtol=1e-5)
    np.testing.assert_allclose(values, RRD({}, made.student, None, made.batch), rtol=1e-6)
    assert [v > 0 for v in values] == [True, True, False, True, True, False]


def test_rrd_draws_by_rank_and_from_the_rest():
    user = jnp.zeros(20000, jnp.int32) + 4
    items = np.asarray(drawn(RRD, KEY, user))
    best = WORLD.known.ranking.items[4]
    place = np.argsort(best)[np.searchsorted(np.sort(best), items[:, :5])]
    assert (best[place] == items[:, :5]).all() and (np.diff(place) > 0).all() and place.max() < 15
    assert not WORLD.met[4][items].any() and not np.isin(items[:, 5:], best).any()
    rest = np.ones(40, bool)
    rest[best] = False
    rest &= ~WORLD.met[4]
    assert reference.chi_square(np.bincount(items[:, 5:].ravel(), minlength=40), rest / rest.sum()) < 2.5
    # The first of five drawn without replacement is what a draw of one gives: the one of the highest noisy weight.
    one = drawn(RelaxedRanking(interesting=1, uninteresting=1, temperature=3.0, top=15), KEY, user)[:, 0]
    p = np.exp(-np.arange(15) / 3)
    counts = np.array([(np.asarray(one) == item).sum() for item in best[:15]])
    assert reference.chi_square(counts, p / p.sum()) < 2.5


def test_rrd_not_sampled_takes_the_best():
    loss = RelaxedRanking(interesting=5, uninteresting=4, top=15, sampled=False)
    items = np.asarray(drawn(loss, KEY, USER))
    np.testing.assert_array_equal(items[:, :5], WORLD.known.ranking.items[np.asarray(USER), :5])


def items_of(loss, made):
    return jax.jit(lambda arrays: loss._items(arrays))(made._replace(student_network=None, teacher_network=None))


def users_of(loss, key, item):
    return jax.jit(lambda known, item: loss._users(key, Context(None, None, {}, None, None, known=known), item))(KNOWN, item)


@pytest.mark.slow
def test_ir_rrd_adds_the_items_once_each():
    """The item side by loops, on the users that the loss draws for the items that it draws."""
    made = context(IR)
    values, _ = evaluated(IR, made)
    of_users = reference.rrd(np.asarray(made.student.logits), np.asarray(USER), 5)
    item, count = (np.asarray(a) for a in items_of(IR, made))
    users = np.asarray(users_of(IR, jax.random.fold_in(made.key, 1), jnp.asarray(item)))
    total = 0.0
    for i, weight, row in zip(item, count, users, strict=True):
        assert weight in (0, 1)
        if weight:
            total += reference.relaxed_ranking(WORLD.student[row[:3], i], WORLD.student[row[3:], i])
    np.testing.assert_allclose(values.sum(), of_users.sum() + 0.5 * total, rtol=1e-5)


def test_ir_rrd_items_are_those_of_first_rows():
    made = context(IR)
    draws = jax.random.fold_in(made.key, 0)
    given = set(np.asarray(drawn(IR, draws, USER))[[0, 1, 3, 4]].ravel().tolist())
    item, count = (np.asarray(a) for a in items_of(IR, made))
    assert set(item[count > 0].tolist()) == given and len(set(item.tolist())) == len(item)
    few = ItemRegularisedRanking(interesting=5, uninteresting=4, top=15, item_sample=3)
    item, count = items_of(few, made)
    assert item.shape == (3,) and set(np.asarray(item).tolist()) <= given
    np.testing.assert_allclose(count.sum(), len(given), rtol=1e-6)


def test_ir_rrd_users_rank_high_or_are_others():
    item = jnp.repeat(jnp.arange(40, dtype=jnp.int32), 30)
    users = np.asarray(users_of(IR, KEY, item))
    best = WORLD.known.ranking.users[np.asarray(item)]
    place = (users[:, :3, None] == best[:, None]).argmax(axis=-1)
    assert (np.take_along_axis(best, place, axis=1) == users[:, :3]).all() and (np.diff(place) > 0).all()


def test_uninterested_users():
    """Uniform over the users that neither met the item nor rank high for it, where these are most of the users."""
    big = reference.world(users=60, items=8, depth=4, user_depth=5)
    known = jax.tree.map(jnp.asarray, big.known)
    users = np.asarray(jax.jit(sampling.uninterested, static_argnums=3)(KEY, known, jnp.full(800, 5, jnp.int32), 20))
    fit = ~big.met[:, 5]
    fit[big.known.ranking.users[5]] = False
    assert fit.sum() > 30 and fit[users].mean() > 0.998
    counts = np.bincount(users[fit[users]], minlength=60)
    assert reference.chi_square(counts, fit / fit.sum()) < 2


def test_contains():
    user, item = (a.ravel() for a in np.meshgrid(np.arange(12), np.arange(40), indexing="ij"))
    found = jax.jit(sampling.contains)(KNOWN.met, jnp.asarray(user), jnp.asarray(item))
    np.testing.assert_array_equal(found, WORLD.met[user, item])
    nothing = sampling.as_lists(np.zeros(0, int), np.zeros(0, int), 3)
    assert not sampling.contains(jax.tree.map(jnp.asarray, nothing), jnp.arange(3), jnp.arange(3)).any()


@pytest.mark.parametrize("loss", [RD, RRD, IR], ids=["rd", "rrd", "ir_rrd"])
def test_finite_at_extreme_logits(loss):
    made = context(loss)

    items = drawn(loss, KEY, USER)

    @jax.jit
    @jax.value_and_grad
    def total(table):
        student = Outputs(scores(table, USER, items), {})
        return loss.evaluate({}, start(loss), made._replace(student=student, student_network=network(table)))[0].sum()

    for scale in (0.0, 1.0, 1e4):
        value, gradient = total(scale * jnp.asarray(WORLD.student))
        assert np.isfinite(value) and np.isfinite(np.asarray(gradient)).all()


def test_sum_gives_each_part_its_columns():
    parts = {"rd": RD, "kd": KD(), "rrd": LogitStd(of=RRD)}
    loss = Sum(losses=tuple(parts.values()), weights=(1.0, 2.0, 0.5), names=tuple(parts))
    assert loss.drawn == 24 and loss.ranking == (15, 0) and loss.reads_requests and takes_candidates(loss)
    assert not takes_candidates(parts["rrd"]) and takes_candidates(LogitStd(of=KD()))
    items = drawn(loss, KEY, USER)
    np.testing.assert_array_equal(items[:, :15], drawn(RD, jax.random.fold_in(KEY, 0), USER))
    np.testing.assert_array_equal(items[:, 15:], drawn(RRD, jax.random.fold_in(KEY, 2), USER))
    made = context(loss)
    task = made.batch["inputs"]["items"]
    s, t = (
        Outputs(jnp.concatenate([scores(w, USER, task), scores(w, USER, items)], 1), {}) for w in (WORLD.student, WORLD.teacher)
    )
    values, _ = loss.evaluate({name: {} for name in parts}, start(loss), made._replace(student=s, teacher=t))
    expected = 0.0
    columns = {"rd": slice(2, 17), "kd": slice(0, 2), "rrd": slice(17, 26)}
    for (name, part), weight in zip(parts.items(), loss.weights, strict=True):
        own = made._replace(**{k: o._replace(logits=o.logits[:, columns[name]]) for k, o in (("student", s), ("teacher", t))})
        expected += weight * part.evaluate({}, start(part), own)[0]
    np.testing.assert_allclose(values, expected, rtol=1e-5)


def test_de_rrd_is_the_sum_of_both():
    rrd = {"interesting": 5, "uninteresting": 4, "top": 15}
    loss = build("loss", {"name": "de_rrd", "de": {"experts": 3}, "rrd": rrd, "ranking_weight": 0.25})
    assert loss.drawn == 9 and loss.ranking == (15, 0) and loss.reads_requests and not loss.per_example
    made, rs = context(loss), np.random.RandomState(2)
    features = [
        {"user": jnp.asarray(rs.randn(6, d), jnp.float32), "item": jnp.asarray(rs.randn(6, 2, d), jnp.float32)} for d in (3, 4)
    ]
    s, t = (o._replace(features=f) for o, f in zip((made.student, made.teacher), features, strict=True))
    params = loss.init(KEY, s, t)
    values, _ = loss.evaluate(params, {"de": {}, "rrd": {}}, made._replace(student=s, teacher=t))
    de = loss.losses[0].evaluate(params["de"], {}, made._replace(student=s, teacher=t, key=jax.random.fold_in(made.key, 0)))[0]
    of_users = reference.rrd(np.asarray(made.student.logits), np.asarray(USER), 5)
    np.testing.assert_allclose(values, np.asarray(de) + 0.25 * of_users, rtol=1e-5)


def test_published_weights():
    found = {name: options("loss")[name].fields["weight"][1] for name in ("rd", "rrd", "ir_rrd", "de_rrd")}
    assert found == {"rd": 1.0, "rrd": 1e-3, "ir_rrd": 1e-3, "de_rrd": 0.01}
    assert build("loss", {"name": "ir_rrd"}).item_weight == 0.5


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ({"name": "rd", "mu": 0}, "mu must be positive"),
        ({"name": "rd", "warmup_steps": -1}, "warmup_steps must be at least 0"),
        ({"name": "rrd", "top": 20}, "top must be at least interesting=40, got 20"),
        ({"name": "ir_rrd", "user_top": 5}, "user_top must be at least interesting_users=20, got 5"),
        ({"name": "de_rrd", "de": 3}, "de must be a dict"),
        ({"name": "de_rrd", "rrd": {"tmp": 3}}, "rrd: "),
    ],
)
def test_bad_options(node, message):
    with pytest.raises(UsageError, match=message):
        build("loss", node)


def test_a_ranking_that_is_too_short():
    with pytest.raises(UsageError, match="interesting must be at most 20, the number of items that the teacher ranks, got 40"):
        RelaxedRanking().draw(KEY, KNOWN, USER)
    with pytest.raises(UsageError, match="top must be at most 20"):
        RankingDistillation(top=30).draw(KEY, KNOWN, USER)
    with pytest.raises(UsageError, match="interesting_users must be at most 6, the number of users"):
        users_of(ItemRegularisedRanking(), KEY, jnp.arange(2))


def test_ir_rrd_refuses_histories():
    made = context(IR)
    inputs = {**made.batch["inputs"], "history": jnp.zeros((6, 3), jnp.int32)}
    with pytest.raises(UsageError, match="use loss=rrd"):
        IR.evaluate({}, {}, made._replace(batch={**made.batch, "inputs": inputs}))
