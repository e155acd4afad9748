"""Cleaning, splitting and building, against plain loops over a small random log."""

import dataclasses

import numpy as np
import pytest

from jdistill.data.interactions import build_interactions
from jdistill.data.interactions.log import active, core, implicit, numbered, renumbered, without_duplicates
from jdistill.data.interactions.protocol import Protocol
from jdistill.data.interactions.splits import Rows, cold_items, cold_users, leave_one_out, ratio, ratio_by_users, temporal
from jdistill.errors import UsageError

SPLITS = ("leave_one_out", "leave_last_out", "ratio", "ratio_last", "temporal")


def random_log(seed=0, users=12, items=30, rows=220, times=40, repeats=False):
    rng = np.random.default_rng(seed)
    user, item = rng.integers(0, users, rows), rng.integers(0, items, rows)
    if not repeats:
        first = np.sort(np.unique(user * items + item, return_index=True)[1])
        user, item = user[first], item[first]
    n = len(user)
    return numbered([f"u{u}" for u in user], item * 10, rng.integers(1, 6, n), rng.integers(0, times, n))


def rows_by_user(log, rows):
    """user -> rows in time order, ties in file order; by plain loops."""
    found = {}
    for row in sorted(rows, key=lambda r: (log.time[r] if log.time is not None else 0, r)):
        found.setdefault(int(log.user[row]), []).append(int(row))
    return found


def test_ids_are_numbered_by_first_appearance_and_map_back():
    log = numbered(["b", "a", "b"], [7, 5, 5], [1, 2, 3])
    assert log.user.tolist() == [0, 1, 0] and log.item.tolist() == [0, 1, 1]
    assert log.user_names[log.user].tolist() == ["b", "a", "b"] and log.item_names[log.item].tolist() == [7, 5, 5]
    assert (log.users, log.items, len(log)) == (2, 2, 3) and log.user.dtype == np.int32 and log.value.dtype == np.float32


def test_threshold_keeps_values_of_at_least_it_and_renumbers_features_along():
    log = random_log()
    log = dataclasses.replace(log, item_features=log.item_names[:, None].astype(np.float32))
    kept = implicit(log, 5)
    expected = [(log.user_names[u], log.item_names[i]) for u, i, v in zip(log.user, log.item, log.value) if v >= 5]
    assert list(zip(kept.user_names[kept.user], kept.item_names[kept.item])) == expected
    assert (kept.value == 1).all() and kept.items < log.items
    np.testing.assert_array_equal(kept.item_features[:, 0], kept.item_names)


@pytest.mark.parametrize("k", [3, 6, 9])
def test_core_is_the_largest_log_in_which_every_user_and_item_has_k_rows(k):
    log = random_log()
    pairs = set(zip(log.user_names[log.user], log.item_names[log.item]))
    while True:  # one at a time
        weak = [
            (u, i) for u, i in pairs if sum(x == u for x, _ in pairs) < k or sum(y == i for _, y in pairs) < k
        ]  # fmt: skip
        if not weak:
            break
        pairs.discard(weak[0])
    found = core(log, k)
    assert set(zip(found.user_names[found.user], found.item_names[found.item])) == pairs
    assert not len(found) or min(np.bincount(found.user).min(), np.bincount(found.item).min()) >= k


def test_active_leaves_out_users_only():
    log = numbered([1, 1, 2, 3, 3, 3], [1, 2, 1, 1, 2, 3])
    assert set(active(log, 2).user_names) == {1, 3}


@pytest.mark.parametrize("times", [True, False])
def test_duplicates_last_and_sum_against_a_loop(times):
    log = random_log(repeats=True)
    log = log if times else dataclasses.replace(log, time=None)
    last, total = {}, {}
    for row in sorted(range(len(log)), key=lambda r: (log.time[r] if times else 0, r)):
        pair = int(log.user[row]), int(log.item[row])
        last[pair], total[pair] = row, total.get(pair, 0) + log.value[row]
    rows = sorted(last.values())
    kept, added = without_duplicates(log, "last"), without_duplicates(log, "sum")
    for found in (kept, added):
        np.testing.assert_array_equal(found.pairs, log.pairs[rows])
    np.testing.assert_array_equal(kept.value, log.value[rows])
    np.testing.assert_array_equal(added.value, [total[int(log.user[r]), int(log.item[r])] for r in rows])
    assert len(kept) < len(log)


def test_duplicates_as_an_error_name_the_rows():
    log = numbered(["a", "b", "a"], ["x", "x", "x"])
    with pytest.raises(UsageError, match=r"rows 1 and 3 are both of user a and item x"):
        without_duplicates(log, "error")
    with pytest.raises(UsageError, match="duplicates must be one of"):
        without_duplicates(log, "first")


def test_renumbered_drops_what_has_no_row():
    log = renumbered(numbered(["a", "b", "c"], [1, 2, 3]).take(np.array([2, 0])))
    assert log.user_names.tolist() == ["a", "c"] and log.user.tolist() == [1, 0]


@pytest.mark.parametrize("split", SPLITS)
def test_splits_are_disjoint_whole_and_fixed_by_the_seed(split):
    log = random_log(users=40)
    rows = Protocol(split=split, split_seed=3).rows(log)
    np.testing.assert_array_equal(np.sort(np.concatenate(rows[:3])), np.arange(len(log)))
    assert all((np.diff(part) > 0).all() and len(part) for part in rows[:3])
    for part, again in zip(rows[:3], Protocol(split=split, split_seed=3).rows(log)[:3]):
        np.testing.assert_array_equal(part, again)
    other = Protocol(split=split, split_seed=4).rows(log)
    assert np.array_equal(rows.test, other.test) == (split in ("leave_last_out", "ratio_last", "temporal"))


def test_leave_last_out_takes_the_last_by_time_then_by_file_order():
    log = random_log(users=60, times=4)
    rows = leave_one_out(log, None)
    everything = rows_by_user(log, range(len(log)))
    enough = {u: r for u, r in everything.items() if len(r) >= 3}
    assert len(enough) < len(everything)
    assert sorted(r[-1] for r in enough.values()) == rows.test.tolist()
    assert sorted(r[-2] for r in enough.values()) == rows.validation.tolist()


@pytest.mark.parametrize("seed", [None, 0])
def test_ratio_rounds_up_and_leaves_one_to_train_on(seed):
    log = random_log(users=60)
    rows = ratio(log, 0.4, 0.5, seed)
    count = np.bincount(log.user)
    for user, n in enumerate(count):
        test, validation = (int((log.user[part] == user).sum()) for part in (rows.test, rows.validation))
        most = n - 1 if n >= 3 else 0
        assert test == min(-(-n // 2), most) and test + validation == min(-(-n // 2) + int(np.ceil(0.4 * n)), most)
    with pytest.raises(UsageError, match=r"validation \+ test must be below 1"):
        ratio(log, 0.5, 0.5, seed)


def test_ratio_by_users_gives_each_user_to_one_split():
    log = random_log(users=50, items=100, rows=900)
    rows = ratio_by_users(log, 0.2, 0.1, 0)
    validation, test = (set(log.user[part]) for part in rows[1:3])
    assert not validation & test and len(validation) == 10 and len(validation | test) == 50
    assert len(rows.test) + len(rows.validation) == np.ceil(0.1 * np.bincount(log.user)).sum()


def test_random_leave_one_out_is_uniform_over_a_users_rows():
    log = numbered(np.zeros(4, int), np.arange(4))
    drawn = np.array([[part[0] for part in leave_one_out(log, seed)[1:3]] for seed in range(2000)])
    for column in drawn.T:
        np.testing.assert_allclose(np.bincount(column, minlength=4) / 2000, 0.25, atol=0.05)


def test_temporal_never_trains_on_what_came_later():
    log = random_log(times=25)
    rows = temporal(log, 0.1, 0.2)
    time = log.time
    assert time[rows.train].max() < time[rows.validation].min() and time[rows.validation].max() < time[rows.test].min()
    assert 0.1 < len(rows.test) / len(log) <= 0.2 + 1e-9
    with pytest.raises(UsageError, match="split=temporal needs times"):
        temporal(dataclasses.replace(log, time=None), 0.1, 0.1)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("history", [0, 4])
def test_requests_histories_and_labels_against_a_loop(split, history):
    log = random_log(users=15)
    protocol = Protocol(split=split, history=history)
    rows, dataset = protocol.rows(log), protocol.dataset("x", log, {"a": "b"})
    by_time = split in ("leave_last_out", "ratio_last", "temporal")
    train = rows_by_user(log, rows.train)

    def last(user, past, length):
        items = [int(log.item[r]) for r in past.get(user, [])]
        return ([log.items] * length + items)[len(items) :][-length:] if length else []

    for held, split_, past in (
        (rows.validation, dataset.validation, train),
        (rows.test, dataset.test, rows_by_user(log, [*rows.train, *(rows.validation if by_time else [])])),
    ):
        held = rows_by_user(log, held)
        width = max(map(len, held.values()))
        expected = [[user, *last(user, past, history)] for user in sorted(held)]
        np.testing.assert_array_equal(split_["inputs"], expected)
        labels = [[int(log.item[r]) for r in held[u]] + [-1] * (width - len(held[u])) for u in sorted(held)]
        np.testing.assert_array_equal(split_["label"], labels)
        np.testing.assert_array_equal(split_["index"], [held[u][0] for u in sorted(held)])
        assert {a.dtype for a in split_.values()} == {np.dtype(np.int32)}
    np.testing.assert_array_equal(
        dataset.tables["sequence"], [last(u, train, history + 1) for u in range(log.users)]
    )  # fmt: skip
    np.testing.assert_array_equal(dataset.train["inputs"], np.stack([log.user, log.item], 1)[rows.train])
    np.testing.assert_array_equal(dataset.train["label"], log.value[rows.train])
    np.testing.assert_array_equal(dataset.train["index"], rows.train)
    assert {tuple(e) for e in dataset.side.edges} == {tuple(e) for e in dataset.train["inputs"]}
    assert (dataset.classes, dataset.schema.users, dataset.schema.items) == (log.items, log.users, log.items)
    assert dataset.schema.history == history and dataset.checksums == {"a": "b"}


def test_repeated_items_are_relevant_once_and_those_met_before_are_not():
    log = numbered([0] * 6, ["a", "b", "a", "c", "c", "b"], time=np.arange(6))
    rows = Rows(np.array([0, 1]), np.array([2, 3]), np.array([4, 5]))
    dataset = build_interactions("x", log, rows, history=3, checksums={}, by_time=True)
    assert dataset.validation["label"].tolist() == [[2]]
    assert dataset.test["inputs"].shape == (0, 4) and dataset.test["label"].shape == (0, 1)
    assert dataset.side.edges.tolist() == [[0, 0], [0, 1]]


def test_candidates_are_different_unmet_items_fixed_by_the_seed_and_uniform():
    log = random_log(users=6, items=40, rows=60)
    dataset = Protocol(candidates=12).dataset("x", log, {})
    met = {u: set(log.item[log.user == u]) for u in range(log.users)}
    for split in (dataset.validation, dataset.test):
        for user, candidates in zip(split["inputs"][:, 0], split["candidates"]):
            assert len(set(candidates)) == 12 and not met[user] & set(candidates)
            assert candidates.min() >= 0 and candidates.max() < log.items
    both = {int(u): c.tolist() for u, c in zip(dataset.validation["inputs"][:, 0], dataset.validation["candidates"])}
    assert all(both[int(u)] == c.tolist() for u, c in zip(dataset.test["inputs"][:, 0], dataset.test["candidates"]))
    fewest = log.items - max(map(len, met.values()))
    drawn = np.concatenate(
        [Protocol(candidates=2, split_seed=s).dataset("x", log, {}).test["candidates"][0] for s in range(1500)]
    )  # fmt: skip
    share = np.bincount(drawn, minlength=log.items)[sorted(set(range(log.items)) - met[0])] / len(drawn)
    np.testing.assert_allclose(share, 1 / len(share), atol=0.012)
    everything = Protocol(candidates=fewest).dataset("x", log, {})
    assert everything.test["candidates"].shape[1] == fewest
    with pytest.raises(UsageError, match=f"candidates {fewest + 1} is more than the {fewest} items"):
        Protocol(candidates=fewest + 1).dataset("x", log, {})


def unseen_log():
    return numbered([0, 0, 0, 1, 1, 1], ["a", "b", "c", "a", "b", "d"], time=np.arange(6))


def test_items_in_test_that_training_lacks_are_kept_dropped_or_refused():
    kept = Protocol(split="leave_last_out").dataset("x", unseen_log(), {})
    assert kept.test["label"].tolist() == [[2], [3]] and kept.validation["label"].tolist() == [[1], [1]]
    dropped = Protocol(split="leave_last_out", unseen="drop").dataset("x", unseen_log(), {})
    assert dropped.test["inputs"].shape == (0, 1) and dropped.classes == 4
    with pytest.raises(UsageError, match=r"4 held-out interactions are of items without a training row, such as item b"):
        Protocol(split="leave_last_out", unseen="error").dataset("x", unseen_log(), {})


def test_cold_users_are_known_by_their_history_alone():
    log = random_log(users=20)
    protocol = Protocol(split="leave_last_out", history=50, cold_users=0.25)
    base, dataset = protocol.rows(log), protocol.dataset("x", log, {})
    rows = cold_users(log, base, 0.25, 0)
    cold = set(dataset.test["inputs"][:, 0].tolist())
    assert len(cold) == 5 and not set(dataset.side.edges[:, 0]) & cold
    assert not cold & {*dataset.train["inputs"][:, 0], *dataset.validation["inputs"][:, 0]}
    everything = rows_by_user(log, range(len(log)))
    for request, label in zip(dataset.test["inputs"], dataset.test["label"]):
        items = [int(log.item[r]) for r in everything[int(request[0])]]
        assert [i for i in request[1:] if i < log.items] == items[:-1] and label.tolist() == items[-1:]
    assert len(rows.train) + len(rows.validation) + len(rows.known) == len(base.train) + len(base.validation)
    with pytest.raises(UsageError, match="cold_users are known by their history"):
        Protocol(cold_users=0.1)
    with pytest.raises(UsageError, match=r"cold_users 0.01 is 0 users"):
        Protocol(cold_users=0.01, history=3).dataset("x", log, {})


def test_cold_items_are_in_no_training_row_and_alone_in_the_test():
    log = random_log(users=20)
    base = Protocol(split="leave_last_out").rows(log)
    rows = cold_items(log, base, 0.3, 0)
    dataset = Protocol(split="leave_last_out", cold_items=0.3, history=5).dataset("x", log, {})
    tested = set(log.item[rows.test])
    assert set(rows.test) < set(base.test) and set(dataset.test["label"].ravel()) == tested
    held = set(range(log.items)) - set(dataset.side.edges[:, 1])
    assert tested <= held and len(held) >= 9
    assert not tested & set(dataset.test["inputs"][:, 1:].ravel()) and not tested & set(dataset.validation["label"].ravel())
    with pytest.raises(UsageError, match=r"cold_items 0.01 is 0 items, of which none has a test row"):
        Protocol(cold_items=0.01).dataset("x", log, {})
    with pytest.raises(UsageError, match="set unseen=keep"):
        Protocol(cold_items=0.1, unseen="drop")


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ({"validation": 1.0}, "validation must be at least 0 and below 1"),
        ({"history": -1}, "history must be at least 0"),
        ({"unseen": "kep"}, "unseen must be one of keep, drop, error, got 'kep'; did you mean 'keep'"),
        ({"validation_users": 0.2}, "validation_users is for split=ratio only"),
    ],
)
def test_wrong_keys_are_one_line(keys, line):
    with pytest.raises(UsageError, match=line):
        Protocol(**keys)


def test_a_log_without_training_rows_or_times_is_refused():
    log = numbered(["a", "a", "a"], [1, 2, 3])
    with pytest.raises(UsageError, match="split=leave_last_out needs times"):
        Protocol(split="leave_last_out").dataset("x", log, {})
    with pytest.raises(UsageError, match="no interaction is left to train on"):
        Protocol(min_interactions=4).dataset("x", log, {})


@pytest.mark.slow
def test_twenty_million_rows_take_less_than_a_minute():
    import time

    rng = np.random.default_rng(0)
    pairs = rng.integers(0, 138_000 * 27_000, 20_000_000)
    user, item = (part.astype(np.int32) for part in np.divmod(pairs, 27_000))
    log = dataclasses.replace(
        numbered([0], [0]), user=user, item=item, value=np.ones(len(user), np.float32), time=rng.random(len(user)),
        user_names=np.arange(138_000), item_names=np.arange(27_000),
    )  # fmt: skip
    rows = leave_one_out(log, None)
    start = time.process_time()
    build_interactions("x", log, rows, history=50, checksums={}, by_time=True)
    assert time.process_time() - start < 60
