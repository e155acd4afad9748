"""DE, the hint on entities, FTD and HTD: plain NumPy forms over unique ids, filled rows, the smallest temperature."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jdistill.options  # noqa: F401 (registers every loss)
from jdistill.errors import UsageError
from jdistill.registry import build, options
from jdistill.types import Context, Network, Outputs
from tests.marks import slow_but
from tests.reference import entities as reference

KEY = jax.random.key(3)
B, K, D_S, D_T = 7, 3, 3, 5
random = np.random.RandomState(0)
USER_TABLES = [random.randn(6, d) for d in (D_S, D_T)]
ITEM_TABLES = [random.randn(9, d) for d in (D_S, D_T)]
USER = np.array([2, 0, 2, 5, 1, 0, 3])
ITEMS = np.array([[1, 4, 8], [1, 2, 4], [0, 0, 7], [3, 1, 2], [5, 8, 8], [4, 5, 6], [2, 6, 0]])
NAMES = ("de", "entity_hint", "ftd", "htd")
OPTIONS = {"de": {"experts": 4, "temperature": 0.7}, "entity_hint": {}, "ftd": {}, "htd": {"groups": 3, "temperature": 0.5}}
every_loss = pytest.mark.parametrize("name", slow_but(("entity_hint", "ftd", "htd"), NAMES))
of_each_kind = pytest.mark.parametrize("name", [name for name in NAMES if name != "entity_hint"])  # de with one expert


def made(name: str, **changes):
    return build("loss", {"name": name, **OPTIONS[name], **changes})


def outputs(users, items, user=USER, asked=ITEMS) -> Outputs:
    return Outputs(jnp.zeros(asked.shape), {"user": jnp.asarray(users)[user], "item": jnp.asarray(items)[asked]})


def problem(user=USER, items=ITEMS, **more):
    student, teacher = (outputs(users, table, user, items) for users, table in zip(USER_TABLES, ITEM_TABLES, strict=True))
    return student, teacher, {"inputs": {"user": jnp.asarray(user), "items": jnp.asarray(items)}, **more}


def run(loss, params, student, teacher, batch):
    network = Network(lambda inputs: student, lambda embedding: embedding)
    return loss.evaluate(params, {}, Context(student, teacher, batch, KEY, network))[0]


program = jax.jit(run)
start = jax.jit(lambda loss, student, teacher: loss.init(KEY, student, teacher))


def total(name: str, loss, params, keys=KEY) -> float:
    """The published sum, in loops; noise as the loss draws it."""
    users = reference.unique(USER, *(table[USER] for table in USER_TABLES))

    def items_of(ids):
        return reference.unique(ids.ravel(), *(table[ids.ravel()] for table in ITEM_TABLES))

    if name == "ftd":
        return reference.ftd(users + items_of(ITEMS))
    found = [("users", users, B)]
    if name == "htd":
        found += [("items", items_of(ITEMS), B * K)]
    else:
        found += [("items", items_of(ITEMS[:, 0]), B), ("items", items_of(ITEMS[:, 1:]), B * (K - 1))]
    experts = loss.groups if name == "htd" else loss.experts
    errors = []
    for i, (which, some, size) in enumerate(found):
        noise = np.asarray(jax.random.gumbel(jax.random.fold_in(keys, i), (size, experts), np.float64))
        errors.append(reference.expert_errors(params[which], some, noise, loss.temperature))
    if name == "htd":
        return loss.alpha * reference.htd_topology(params, users, found[1][1]) + (1 - loss.alpha) * sum(errors)
    return errors[0] + 0.5 * (errors[1] + errors[2])


@every_loss
def test_the_sum_is_that_over_unique_users_and_items(name):
    with jax.enable_x64(True):
        loss, given = made(name), problem()
        params = start(loss, *given[:2])
        jitted = np.asarray(program(loss, params, *given))
        eager = np.asarray(run(loss, params, *given)) if name in ("de", "ftd") else jitted  # each operation is compiled
        expected = total(name, loss, jax.tree.map(np.asarray, params))
    assert jitted.shape == (B,) and expected > 1
    np.testing.assert_allclose(jitted.sum(), expected, rtol=1e-10)
    np.testing.assert_allclose(jitted, eager, rtol=1e-10)
    if name == "ftd":  # the others draw other noise in float32
        assert program(loss, {}, *problem()).sum() == pytest.approx(expected, rel=1e-5)


@of_each_kind
def test_rows_that_ask_for_nothing_do_not_count(name):
    """Filled rows before and among the others, of users and items that occur elsewhere too."""
    filled = np.array([1, 4])
    user, items = np.insert(USER, filled, [2, 4]), np.insert(ITEMS, filled, [[1, 2, 3], [0, 0, 0]], axis=0)
    valid = ~np.isin(np.arange(B + 2), [1, 5])
    with jax.enable_x64(True):
        loss = made(name, temperature=1e-10) if name in ("de", "htd") else made(name)
        student, teacher, batch = problem(user, items, valid=jnp.asarray(valid))
        params = start(loss, student, teacher)
        for one in params.values():  # one expert whatever the noise, which is drawn by place
            one["selection"]["bias"] += 1e4 * np.arange(one["selection"]["bias"].size)
        found, expected = (np.asarray(program(loss, params, *given)) for given in ((student, teacher, batch), problem()))
    np.testing.assert_allclose(found.sum(), expected.sum(), rtol=1e-10)
    assert np.all(found[~valid] == 0) and found.sum() > 1


@of_each_kind
def test_gradients_are_finite_where_embeddings_are_zero_or_large_and_reach_no_teacher(name):
    loss = made(name, temperature=1e-10) if name in ("de", "htd") else made(name)
    student, teacher, batch = problem()
    params = start(loss, student, teacher)

    @jax.jit
    def gradients(params, scale_s, scale_t):
        def value(params, features):
            return run(loss, params, student._replace(features=features), t, batch).sum()

        scaled, t = (o._replace(features=jax.tree.map(lambda f, c=c: c * f, o.features))
                     for o, c in ((student, scale_s), (teacher, scale_t)))  # fmt: skip
        return jax.value_and_grad(value, argnums=(0, 1))(params, scaled.features)

    for scales in ((0.0, 1.0), (1.0, 0.0), (1e4, 1e4), (1e-10, 1.0)):
        for leaf in jax.tree.leaves(gradients(params, *scales)):
            assert np.all(np.isfinite(leaf)), scales
    _, (of_params, of_student) = gradients(params, 1.0, 1.0)
    assert all(np.abs(leaf).max() > 1e-3 for leaf in of_student.values())
    if name != "ftd":
        assert all(np.abs(leaf).max() > 0 for leaf in (of_params["users"]["in_kernel"], of_params["items"]["out_bias"]))


def test_the_smallest_temperature_chooses_one_expert():
    """And a high one mixes all alike."""
    with jax.enable_x64(True):
        given = problem()
        cold, warm = made("de", temperature=1e-10), made("de", temperature=1e10)
        params = start(cold, *given[:2])
        for loss in (cold, warm):
            expected = total("de", loss, jax.tree.map(np.asarray, params))
            np.testing.assert_allclose(np.asarray(program(loss, params, *given)).sum(), expected, rtol=1e-9)


def test_topology_is_blind_to_turning_and_length_and_zero_at_the_teacher():
    with jax.enable_x64(True):
        student, teacher, batch = problem()
        turn = np.linalg.qr(np.random.RandomState(2).randn(D_T, D_T))[0]
        turned = teacher._replace(features=jax.tree.map(lambda f: 3 * f @ turn, teacher.features))
        loss = made("ftd")
        assert np.abs(program(loss, {}, turned, teacher, batch)).max() < 1e-10
        assert np.abs(program(loss, {}, student, teacher, batch)).max() > 1


def test_shapes_of_experts():
    """Between the two widths, and half of them where student and teacher are as wide, as the authors' code has it."""
    student, teacher, _ = jax.eval_shape(lambda: problem())
    for name, wide, alike in (("de", 4, 2), ("htd", 4, 5)):
        assert made(name).init(KEY, student, teacher)["users"]["in_kernel"].shape == (OPTIONS[name].get("experts", 3), 3, wide)
        assert made(name).init(KEY, teacher, teacher)["items"]["in_kernel"].shape[2] == alike
    assert made("entity_hint").init(KEY, student, teacher)["users"]["selection"]["kernel"].shape == (5, 1)


def test_published_defaults():
    expected = {"de": (0.01, {"experts": 30, "temperature": 1.0}), "ftd": (1e-3, {}),
                "htd": (1e-3, {"groups": 30, "alpha": 0.5, "temperature": 1.0})}  # fmt: skip
    for name, (weight, fields) in expected.items():
        assert options("loss")[name].fields["weight"][1] == weight
        assert dataclasses.asdict(build("loss", {"name": name})) == fields


@every_loss
def test_what_does_not_fit(name):
    loss = made(name)
    student, teacher, _ = problem()
    with pytest.raises(UsageError, match="needs a teacher"):
        loss.init(KEY, student, None)
    for features in ({}, {"user": student.features["user"]}, {**student.features, "item": student.features["item"][:, 0]}):
        with pytest.raises(UsageError, match=r"needs the features user \[B, D\] and item \[B, K, D\] of the student") as error:
            loss.init(KEY, student._replace(features=features), teacher)
        assert "\n" not in str(error.value)
    with pytest.raises(UsageError, match="at least one negative item"):
        loss.init(KEY, *(o._replace(features={**o.features, "item": o.features["item"][:, :1]}) for o in (student, teacher)))
    if name in ("ftd", "htd"):
        unlike = {**teacher.features, "user": teacher.features["user"][:, :2]}
        with pytest.raises(UsageError, match="unlike widths in the teacher: 2 and 5"):
            loss.init(KEY, student, teacher._replace(features=unlike))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"name": "de", "experts": 0}, "loss.experts must be positive, got 0"),
        ({"name": "de", "temperature": 0.0}, "loss.temperature must be positive, got 0.0"),
        ({"name": "htd", "alpha": 1.5}, "loss.alpha must be at least 0 and below 1, got 1.5"),
        ({"name": "ftd", "temperature": 1.0}, "loss.temperature"),
    ],
)
def test_bad_options(config, message):
    with pytest.raises(UsageError, match=message):
        build("loss", config)
