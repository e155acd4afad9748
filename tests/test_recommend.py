"""The tasks of recommendation: batches against plain loops, training that stops and goes on, populations, metrics."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jdistill.options  # noqa: F401 (registers every option)
from jdistill import stacking
from jdistill.blueprint import labels
from jdistill.checkpoint import Checkpoints
from jdistill.data.base import Requests, Schema
from jdistill.errors import UsageError
from jdistill.fit import fit
from jdistill.fitting import CheckpointPolicy, Member, Setup, sample_of
from jdistill.losses import Loss
from jdistill.method import Method, Stage, Term
from jdistill.ranking import Ranked, met_in_training, requests_of_all, teacher_ranking
from jdistill.records import MetricsFile
from jdistill.registry import build
from jdistill.stages import init_state
from jdistill.standing import Interrupted
from jdistill.tasks import NextItem, Recommend
from jdistill.tasks.recommendation import Pairs, Sequences
from jdistill.teachers.targets import Live
from jdistill.train import Keys, Learner, Parts
from jdistill.types import Outputs
from tests import tiny
from tests.models.recommend.shop import network
from tests.test_ranking import COLD, ITEMS, LENGTH, SATED, USERS, dataset, met_sets, with_candidates
from tests.tiny import StopAfter, assert_close, assert_same_bits


def shop(history=0):
    """The data of `tests.test_ranking`, with sequences as long as histories ask for."""
    return dataset(history)


def batch_of(task, data, rows):
    arrays = task.rows(data)
    chosen = {name: jnp.asarray(array[rows]) for name, array in arrays.items()}
    return {**chosen, "index": jnp.asarray(rows, jnp.int32)}


def tables_of(task, data):
    return jax.tree.map(jnp.asarray, task.tables(data))


def assert_shapes(sampler, raw, made):
    expected = sampler.shapes(jax.eval_shape(lambda: raw))
    found = jax.eval_shape(lambda: made)
    assert jax.tree.structure(expected) == jax.tree.structure(found)
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)


# -- batches


@pytest.mark.parametrize("history", [0, LENGTH])
@pytest.mark.parametrize("negatives", [1, 5])
def test_pairs_are_positives_and_items_never_met(history, negatives):
    data, met = shop(history), met_sets()
    task = Recommend(negatives=negatives)
    rows = np.arange(len(data.train["label"]))
    raw, tables, sampler = batch_of(task, data, rows), tables_of(task, data), task.sampler(data)
    made = jax.jit(sampler)(jax.random.key(0), raw, tables)
    assert_same_bits(made, sampler(jax.random.key(0), raw, tables))
    assert_shapes(sampler, raw, made)
    request = jax.tree.map(np.asarray, made["inputs"])
    assert set(request) == {"user", "items"} | ({"history"} if history else set())
    for row, (user, item) in enumerate(data.train["inputs"].tolist()):
        assert request["user"][row] == user and request["items"][row, 0] == item
        assert not set(request["items"][row, 1:].tolist()) & met[user]
        if history:
            np.testing.assert_array_equal(request["history"][row], data.tables["sequence"][user, 1:])
    assert np.all(np.asarray(made["label"]) == 0) and np.asarray(made["index"]).tolist() == rows.tolist()


@pytest.mark.parametrize(("task", "history"), [(Recommend(), 0), (Recommend(), LENGTH), (NextItem(), LENGTH)])
def test_everyones_requests_are_those_of_training(task, history):
    data = shop(history)
    sampler, rows = task.sampler(data), np.array([3, 0, 3])
    request = sampler(jax.random.key(0), batch_of(task, data, rows), tables_of(task, data))["inputs"]
    everyone = sampler.everyone(data.tables)
    assert set(everyone) == set(request) - {"items"} and len(everyone["user"]) % USERS == 0
    positions = len(everyone["user"]) // USERS
    users = np.asarray(request["user"])[::positions]
    for name, values in everyone.items():
        by_user = values.reshape(USERS, -1)
        np.testing.assert_array_equal(np.asarray(request[name]).reshape(len(users), -1), by_user[users])


def test_pairs_are_drawn_anew_with_each_key():
    data, task = shop(), Recommend(negatives=4)
    raw, tables = batch_of(task, data, np.arange(12)), tables_of(task, data)
    first, again, other = (task.sampler(data)(jax.random.key(k), raw, tables)["inputs"]["items"] for k in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(first[:, 0], other[:, 0])
    assert not np.array_equal(first[:, 1:], other[:, 1:])


def test_equal_samplers_are_equal():
    """So that programs compiled for one run serve the next."""
    schema = Schema(3, 5, 2)
    assert Pairs(schema, 2) == Pairs(Schema(3, 5, 2), 2) and hash(Pairs(schema, 2)) == hash(Pairs(Schema(3, 5, 2), 2))
    assert Pairs(schema, 2) != Pairs(schema, 3) and Pairs(schema, 2) != Sequences(schema, 2)


@pytest.mark.parametrize("negatives", [1, 3])
def test_each_position_of_a_sequence_asks_for_the_item_after_it(negatives):
    data, met, task = shop(LENGTH), met_sets(), NextItem(negatives=negatives)
    data.tables["sequence"][0] = [ITEMS, ITEMS, *sorted(met[SATED])[:3]]
    data.tables["sequence"][1] = sorted(met[SATED])[: LENGTH + 1]  # a sequence without room
    users = task.rows(data)["inputs"][:, 0].tolist()
    assert users == [u for u in range(USERS) if (data.tables["sequence"][u] < ITEMS).sum() >= 2] and COLD not in users
    raw, tables, sampler = batch_of(task, data, np.arange(len(users))), tables_of(task, data), task.sampler(data)
    made = jax.jit(sampler)(jax.random.key(0), raw, tables)
    assert_same_bits(made, sampler(jax.random.key(0), raw, tables))
    assert_shapes(sampler, raw, made)
    request, valid = jax.tree.map(np.asarray, made["inputs"]), np.asarray(made["valid"])
    assert request["history"].shape == (len(users), LENGTH) and len(request["user"]) == len(users) * LENGTH
    asked = 0
    for s, user in enumerate(users):
        sequence = data.tables["sequence"][user].tolist()
        assert request["history"][s].tolist() == sequence[:-1]
        for p in range(LENGTH):
            row = s * LENGTH + p
            assert request["user"][row] == user and np.asarray(made["index"])[row] == s
            assert valid[row] == (sequence[p] < ITEMS)
            if valid[row]:  # an item asks for the one after it
                assert request["items"][row, 0] == sequence[p + 1]
                assert not set(request["items"][row, 1:].tolist()) & met[user]
                asked += 1
    assert asked == sum((data.tables["sequence"][u] < ITEMS).sum() - 1 for u in users) == valid.sum()


def test_what_is_observed_of_sequences_leaves_filled_positions_out():
    logits = jnp.array([[1.0, 0.0, 2.0], [5.0, 0.0, 0.0], [0.0, 1.0, 1.0], [9.0, 0.0, 0.0]])
    valid = jnp.array([True, True, True, False])
    found = NextItem.observe(Outputs(logits, {}), {"valid": valid})["ordered"]
    np.testing.assert_allclose(found.mean(), np.mean([0.5, 1.0, 0.0]), rtol=1e-6)
    np.testing.assert_allclose(Recommend.observe(Outputs(logits, {}), {})["ordered"], [0.5, 1.0, 0.0, 1.0])


def test_filled_positions_do_not_count():
    term = labels(NextItem())
    values = jnp.array([1.0, 2.0, 50.0])
    batch = {"valid": jnp.array([True, True, False])}
    assert term.mean(values, {}, batch) == 1.5 and labels(NextItem(reduction="sum")).mean(values, {}, batch) == 3.0
    assert labels(Recommend(reduction="sum")).mean(values, {}, {}) == 53.0


# -- training


class Shop:
    """What a run on the small data is made of: one task, a student, a teacher with its ranking."""

    def __init__(self, task, student, distil, *, history=0, teacher="bpr"):
        self.task, self.data = task, shop(history)
        schema, side = self.data.schema, self.data.side
        self.student = network(student, schema, side, dim=3)
        frozen = network(teacher, schema, side, dim=4)
        self.parts = Parts(
            (Learner("student", self.student),), (("teacher", Live(frozen)),), Requests(history), None, task.observe,
            sampler=task.sampler(self.data),
        )  # fmt: skip
        self.rows = task.rows(self.data)
        inputs = task.sampler(self.data).shapes(sample_of(self.rows))["inputs"]
        variables = frozen.init(jax.random.key(99), inputs)
        ranking = teacher_ranking(frozen, self.data, variables, 6)
        self.frozen = {"teacher": variables, "tables": {**task.tables(self.data), "rankings": {"teacher": ranking}}}
        self.distil = distil

    def method(self, lr=0.02, epochs=3):
        own = Term(name="distil", teacher="teacher", loss=self.distil, where=self.task.where, reduction=self.task.reduction)
        stage = Stage(name="s", terms=(labels(self.task), own), optim=tiny.optimizer(lr=lr, epochs=epochs, batch_size=4))
        return Method(stages=(stage,))

    def members(self, folder, numbers):
        return tuple(
            Member(self.method(lr), (keys := Keys.of(seed)), MetricsFile(folder / f"{seed}.jsonl"),
                   init_state(self.parts, keys.init, sample_of(self.rows)))
            for seed, lr in numbers
        )  # fmt: skip

    def setup(self, folder, numbers=((0, 0.02),), *, stacked=False, **changes):
        task, data, model = self.task, self.data, self.student

        def evaluate(params, state):
            if stacked:
                answers = task.answers(model, data, (params, state), "validation")
                return lambda row: task.metrics(answers(row), data, "validation")
            answer = task.answer(model, data, (params, state), "validation")
            return lambda _: task.metrics(answer, data, "validation")

        folder.mkdir(exist_ok=True)
        given = {
            "parts": self.parts, "members": self.members(folder, numbers), "data": self.rows, "frozen": self.frozen,
            "strategy": "block", "resident": True, "checkpoints": Checkpoints(folder / "checkpoints"),
            "policy": CheckpointPolicy(every_seconds=0), "observed": task.observed, "stacked": stacked,
            "evaluate": evaluate, "primary": task.primary, "select": task.primary,
        }  # fmt: skip
        return Setup(**{**given, **changes})


CUTOFFS = (2, 5)
RRD = {"name": "rrd", "interesting": 3, "uninteresting": 2, "top": 6}


def made(name) -> Shop:
    if name == "bpr, rrd":
        return Shop(Recommend(cutoffs=CUTOFFS, reduction="sum"), "bpr", build("loss", RRD))
    if name == "sasrec, kd":
        return Shop(NextItem(cutoffs=CUTOFFS, negatives=2), "sasrec", build("loss", {"name": "kd"}), history=LENGTH,
                    teacher="gru4rec")  # fmt: skip
    return Shop(Recommend(cutoffs=CUTOFFS), "bpr", build("loss", {"name": "de"}))


@pytest.mark.parametrize("name", ["bpr, rrd", pytest.param("sasrec, kd", marks=pytest.mark.slow)])
def test_stopping_and_going_on_is_one_run(name, tmp_path):
    """Whatever is drawn in a step is drawn again: the same bits, the same records."""
    own = made(name)
    (whole,) = fit(own.setup(tmp_path / "whole", checkpoints=None))
    folder, sessions, found = tmp_path / "cut", 0, None
    while found is None:
        try:
            (found,) = fit(own.setup(folder, policy=CheckpointPolicy(every_steps=4, every_seconds=0), stop=StopAfter(3)))
        except Interrupted:
            sessions += 1
        assert sessions < 30
    assert sessions >= 1
    assert_same_bits(found.state, whole.state)
    assert_same_bits(found.variables, whole.variables)
    assert (folder / "0.jsonl").read_bytes() == (tmp_path / "whole/0.jsonl").read_bytes()
    assert (found.epoch, found.train_metrics) == (whole.epoch, whole.train_metrics)


@pytest.mark.parametrize("form", [{"strategy": "loop"}, {"resident": False}])
def test_blocks_and_single_steps_draw_alike(form, tmp_path):
    own = made("bpr, rrd")
    (block,), (other,) = fit(own.setup(tmp_path / "a")), fit(own.setup(tmp_path / "b", **form))
    assert_close(block.state.params, other.state.params, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["bpr, rrd", pytest.param("bpr, de", marks=pytest.mark.slow)])
def test_a_population_is_its_members_alone(name, tmp_path):
    own, numbers = made(name), ((0, 0.02), (1, 0.05), (2, 0.01))
    together = fit(own.setup(tmp_path / "all", numbers, stacked=True))
    for number, one in zip(numbers, together, strict=True):
        (other,) = fit(own.setup(tmp_path / str(number[0]), (number,)))
        assert_close(one.variables, other.variables, rtol=1e-4, atol=1e-5)
        assert one.train_metrics == pytest.approx(other.train_metrics, rel=1e-4)
        assert one.epoch == other.epoch
    user = [np.asarray(one.variables[0]["user"]) for one in together]
    assert np.abs(user[0] - user[1]).max() > 1e-2


def test_learning_orders_what_was_met_first(tmp_path):
    own = Shop(Recommend(cutoffs=CUTOFFS, negatives=3), "bpr", build("loss", {"name": "kd"}))
    method = Method(stages=(Stage(name="s", terms=(labels(own.task),), optim=tiny.optimizer(lr=0.05, epochs=60)),))
    setup = own.setup(tmp_path, evaluate=None, select=None, checkpoints=None)
    member = setup.members[0]._replace(method=method)
    (fitted,) = fit(dataclasses.replace(setup, members=(member,)))
    logits = own.student.apply(*fitted.variables, Requests()(jnp.asarray(requests_of_all(own.data))))[0].logits
    met, scores = met_sets(), np.asarray(logits)
    right = [scores[u, list(met[u])].min() > np.delete(scores[u], list(met[u])).max() for u in range(USERS) if met[u]]
    assert np.mean(right) >= 0.7 and fitted.train_metrics["ordered"] > 0.9


# -- metrics


def answer_of(items):
    items = np.array(items, np.int32)
    return Ranked(items, np.zeros(items.shape, np.float32))


def test_metrics_of_a_split():
    data, task = shop(), Recommend(cutoffs=(1, 3))
    label = data.validation["label"]
    right = np.stack([np.roll(label[:, 0], 0), label[:, 0] * 0 - 1, label[:, 0] * 0 - 1], axis=1)
    found = task.metrics(answer_of(right), data, "validation", answer_of(right))
    relevant = (label >= 0).sum(1)
    assert found["recall_at_1"] == pytest.approx(np.mean(1 / relevant)) and found["ndcg_at_1"] == 1.0
    assert found["teacher_overlap_at_3"] == 1.0
    assert task.primary == "ndcg_at_1" and Recommend(select="recall_at_50").primary == "recall_at_50"


def test_of_candidates_only_the_first_relevant_item_counts():
    """The others are not ranked, and cannot be found."""
    data, task = with_candidates(shop()), Recommend(cutoffs=(1,))
    second = (data.test["label"] + 1) % ITEMS
    data = dataclasses.replace(data, test={**data.test, "label": np.concatenate([data.test["label"], second], axis=1)})
    found = task.metrics(answer_of(data.test["label"][:, :1]), data, "test")
    assert found["recall_at_1"] == found["ndcg_at_1"] == found["hit_rate_at_1"] == 1.0


def test_what_is_known_of_the_data():
    data = shop(LENGTH)
    tables = Recommend().tables(data)
    assert tables["known"].items == ITEMS and tables["known"].met is met_in_training(data) and tables["known"].ranking is None
    counts = [sum(i in own for own in met_sets()) for i in range(ITEMS)]
    assert tables["known"].popularity.tolist() == counts
    assert tables["sequence"] is data.tables["sequence"] and "sequence" not in Recommend().tables(shop())


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"objective": "softmax"}, r"^objective must be one of bpr, .*did you mean 'sampled_softmax'"),
        ({"reduction": "max"}, r"^reduction must be one of mean, sum"),
        ({"negatives": 0}, r"^negatives must be positive, got 0"),
        ({"negatives": -1}, r"^negatives must be positive, got -1"),
        ({"groups": 0}, r"^groups must be positive"),
        ({"cutoffs": ()}, r"^cutoffs must name at least one k"),
        ({"cutoffs": (10, 0)}, r"^cutoffs\[1\] must be positive, got 0"),
        ({"select": "ndcg_at_7"}, r"^select must be one of recall_at_10, .*, got 'ndcg_at_7'; did you mean 'ndcg_at_"),
        ({"select": "accuracy"}, r"^select must be one of recall_at_10, "),
        ({"weight": -1.0}, r"^weight must be at least 0"),
    ],
)
def test_wrong_fields(fields, pattern):
    for task in (Recommend, NextItem):
        with pytest.raises(UsageError, match=pattern):
            task(**fields)


@pytest.mark.parametrize("select", ["recall_at_50", "ndcg_at_10", "map_at_20", "recall_at_50_unpopular", "coverage_at_50"])
def test_every_metric_can_choose(select):
    task = Recommend(select=select)
    found = task.metrics(answer_of(np.tile(np.arange(ITEMS), (7, 1))), shop(), "test")
    assert task.primary in found


def test_what_the_data_must_have():
    table = dataclasses.replace(shop(), schema=Schema(), name="digits")
    with pytest.raises(UsageError, match=r"^task=recommend needs data of users and items.*; data=digits has none"):
        Recommend().width(table)
    with pytest.raises(UsageError, match=r"^task=next_item needs data of users and items"):
        NextItem().width(table)
    with pytest.raises(UsageError, match=r"^task=next_item needs data with histories, got data.history=0"):
        NextItem().width(shop())
    assert Recommend().width(shop()) == NextItem().width(shop(LENGTH)) == ITEMS


def test_cutoffs_beyond_the_candidates():
    data = with_candidates(shop())
    assert Recommend(cutoffs=(7,)).width(data) == ITEMS
    with pytest.raises(UsageError, match=r"^task.cutoffs must be at most 7, the candidates of data=small and .*, got 10"):
        Recommend(cutoffs=(10, 5)).width(data)


def test_the_objectives():
    assert all(isinstance(Recommend(objective=name).loss(), Loss) for name in ("bpr", "sampled_softmax", "pointwise_bce"))
    assert Recommend(objective="sampled_softmax").term == "sampled_softmax"


def test_members_of_a_population_are_measured_one_by_one():
    own = made("bpr, rrd")
    variables = [own.student.init(jax.random.key(seed), {"user": jnp.zeros(1, jnp.int32)}) for seed in (0, 1)]
    stacked = stacking.stack(variables)
    answers = own.task.answers(own.student, own.data, stacked, "test")
    for row, alone in enumerate(variables):
        np.testing.assert_array_equal(answers(row).items, own.task.answer(own.student, own.data, alone, "test").items)
