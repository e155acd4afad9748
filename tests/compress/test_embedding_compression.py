"""Forms of embedding tables against NumPy; sequences with other steps, and the file."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdistill.checkpoint import restore, save
from jdistill.compress import IntegerWeights, MagnitudePrune, Stored, apply_all, enter, finished
from jdistill.compress.artifact import read_artifact, write_artifact
from jdistill.compress.embeddings import (
    EmbeddingDims,
    EmbeddingRows,
    HashEmbedding,
    PQEmbedding,
    QREmbedding,
    bucket,
)
from jdistill.compress.forms import kmeans
from jdistill.compress.low_rank import LowRank
from jdistill.compress.row_quantize import RowInt4, RowInt8
from jdistill.errors import UsageError
from jdistill.registry import build
from tests.marks import slow_but
from tests.reference import embeddings as reference

RANDOM = np.random.default_rng(2)
TABLES = {
    "user": RANDOM.normal(size=(37, 8)).astype(np.float32),
    "item": (RANDOM.normal(size=(48, 8)) + np.linspace(-1, 1, 8)).astype(np.float32),
    "fc1": {"kernel": RANDOM.normal(size=(8, 8)).astype(np.float32)},
    "bias": np.ones(48, np.float32),
}
KEY = jax.random.key(0)
FORMS = {
    "hash": HashEmbedding(share=0.3),
    "qr multiply": QREmbedding(rows=12),
    "qr add": QREmbedding(rows=12, operation="add"),
    "pq": PQEmbedding(subspaces=4, centroids=6),
    "rows": EmbeddingRows(share=0.4),
    "dims": EmbeddingDims(share=0.4),
}
every_form = pytest.mark.parametrize("own", FORMS.values(), ids=FORMS)


def encoded(own, params=TABLES):
    """The stored form and the state, in two programs instead of hundreds of tiny ones."""
    state = jax.jit(own.init)(KEY, params)
    return jax.jit(own.encode)(params, state), state


def restored(own, params=TABLES):
    return jax.jit(own.decode)(*encoded(own, params))


@every_form
def test_only_tables_are_stored_otherwise(own):
    stored, state = encoded(own)
    assert set(state) == {"user", "item"}
    np.testing.assert_array_equal(stored["fc1"]["kernel"], TABLES["fc1"]["kernel"])
    full = own.decode(stored, state)
    assert full["fc1"]["kernel"] is stored["fc1"]["kernel"] and full["bias"] is stored["bias"]
    assert jax.tree.map(jnp.shape, full) == jax.tree.map(np.shape, TABLES)
    assert sum(leaf.size for leaf in jax.tree.leaves(stored)) < 0.75 * sum(leaf.size for leaf in jax.tree.leaves(full))


@every_form
def test_a_checkpoint_holds_them(own, tmp_path):
    pair = encoded(own)
    save(tmp_path / "a", pair)
    jax.tree.map(np.testing.assert_array_equal, restore(tmp_path / "a", pair), pair)


@every_form
def test_decoding_what_was_encoded_changes_nothing_more(own):
    """The fit of what a form can hold exactly is exact."""
    stored, state = encoded(own)
    once = own.decode(stored, state)
    again = own.decode(jax.jit(own.encode)(once, state), state)
    np.testing.assert_allclose(again["item"], once["item"], atol=1e-5)
    np.testing.assert_allclose(again["user"], once["user"], atol=2e-3)  # 20 sweeps, where the last quotient has one id of 12


@pytest.mark.parametrize("own", slow_but(["pq", "rows"], FORMS))
def test_jit_and_vmap_change_nothing(own):
    stack = jax.tree.map(lambda leaf: np.stack([leaf, leaf[::-1] ** 2]), TABLES)
    state = jax.jit(jax.vmap(own.init, in_axes=(None, 0)))(KEY, stack)
    both = jax.jit(jax.vmap(lambda p, s: own.decode(own.encode(p, s), s)))(stack, state)
    for i in range(2):
        one = jax.tree.map(lambda leaf, i=i: leaf[i], stack)
        alone = own.init(KEY, one)
        jax.tree.map(lambda a, b, i=i: np.testing.assert_array_equal(a[i], b), state, alone)
        decoded = own.decode(own.encode(one, alone), alone)
        jax.tree.map(lambda a, b, i=i: np.testing.assert_allclose(a[i], b, atol=2e-5), both, decoded)


def test_hashed_rows_are_the_means_of_their_buckets():
    stored, _ = encoded(HashEmbedding(rows=11))
    for name in ("user", "item"):
        wanted, table = reference.hashed(TABLES[name], 11), TABLES[name]
        np.testing.assert_allclose(stored[name]["buckets"], wanted, atol=1e-6)
        rows = [wanted[reference.bucket(i, 11)] for i in range(len(table))]
        np.testing.assert_allclose(restored(HashEmbedding(rows=11))[name], rows, atol=1e-6)


@pytest.mark.parametrize("buckets", [7, 64, 1000])
def test_the_hash_is_the_stated_one_and_spreads_ids(buckets):
    found = np.asarray(bucket(30 * buckets, buckets))
    np.testing.assert_array_equal(found, [reference.bucket(i, buckets) for i in range(30 * buckets)])
    filled = np.bincount(found, minlength=buckets)
    assert filled.min() > 0 and filled.max() < 90


def test_quotients_and_remainders_are_the_least_squares_fit():
    for name in ("user", "item"):  # 12 divides 48 rows, and not 37
        found = restored(QREmbedding(rows=12, operation="add"))[name]
        np.testing.assert_allclose(found, reference.sums(TABLES[name], 12), atol=1e-4)
    i, q, r = np.arange(37), RANDOM.normal(size=(4, 8)), RANDOM.normal(size=(12, 8))
    exact = (q[i // 12] * r[i % 12]).astype(np.float32)
    np.testing.assert_allclose(restored(QREmbedding(rows=12), {"item": exact})["item"], exact, atol=1e-5)
    found = restored(QREmbedding(rows=12))["item"]
    np.testing.assert_allclose(found, reference.products(TABLES["item"], 12), atol=1e-4)
    stored, _ = encoded(QREmbedding(rows=12))
    assert stored["user"]["quotient"].shape == (4, 8) and stored["user"]["remainder"].shape == (12, 8)
    zeros = np.zeros((40, 4), np.float32)
    np.testing.assert_array_equal(restored(QREmbedding(rows=12), {"item": zeros})["item"], zeros)


def test_clusters_are_lloyds():
    points = np.concatenate([TABLES["item"][:, :3], np.tile(TABLES["item"][:1, :3], (5, 1))])
    first = points[np.asarray(jax.random.permutation(KEY, len(points)))[:6]]
    for iterations in (0, 1, 25):
        codes, _ = reference.lloyd(points, first, iterations)
        np.testing.assert_array_equal(kmeans(KEY, points, 6, iterations), codes)


def test_codebooks_are_the_means_of_what_they_stand_for():
    own = PQEmbedding(subspaces=4, centroids=6)
    stored, state = encoded(own)
    for name in ("user", "item"):
        codes, books = np.asarray(state[name]), np.asarray(stored[name]["codebooks"])
        assert codes.shape == (len(TABLES[name]), 4) and codes.max() < 6 and books.shape == (4, 6, 2)
        for s in range(4):
            part = TABLES[name][:, 2 * s : 2 * s + 2]
            for c in set(codes[:, s]):
                np.testing.assert_allclose(books[s, c], part[codes[:, s] == c].mean(0), atol=1e-6)
        rows = [np.concatenate([books[s, code] for s, code in enumerate(row)]) for row in codes]
        np.testing.assert_array_equal(own.decode(stored, state)[name], rows)
    pairs = encoded(PQEmbedding(centroids=6))[0]["item"]["codebooks"]
    np.testing.assert_array_equal(pairs, stored["item"]["codebooks"])  # subspaces=0 takes 8 / 2


def test_the_shortest_rows_share_one():
    stored, state = encoded(EmbeddingRows(share=0.4, only="item"))
    order = np.argsort(np.linalg.norm(TABLES["item"], axis=1))
    gone, kept = order[: 48 - 19], np.sort(order[48 - 19 :])
    np.testing.assert_array_equal(np.flatnonzero(state["item"]), kept)
    np.testing.assert_allclose(stored["item"], [TABLES["item"][gone].mean(0), *TABLES["item"][kept]], atol=1e-6)
    wanted = TABLES["item"].copy()
    wanted[gone] = TABLES["item"][gone].mean(0)
    np.testing.assert_allclose(restored(EmbeddingRows(share=0.4))["item"], wanted, atol=1e-6)


def test_the_dimensions_that_say_least_go_in_all_tables():
    stored, state = encoded(EmbeddingDims(share=0.4))
    energy = [sum((u[k] * i[k]) ** 2.0 for u in TABLES["user"] for i in TABLES["item"]) for k in range(8)]
    kept = np.sort(np.argsort(energy)[-3:])
    for name in ("user", "item"):
        np.testing.assert_array_equal(np.flatnonzero(state[name]), kept)
        np.testing.assert_array_equal(stored[name], TABLES[name][:, kept])
    full = restored(EmbeddingDims(share=0.4))
    scores = TABLES["user"][:, kept] @ TABLES["item"][:, kept].T
    np.testing.assert_allclose(full["user"] @ full["item"].T, scores, atol=1e-5)
    narrow = {**TABLES, "met": RANDOM.normal(size=(9, 4)).astype(np.float32)}
    assert encoded(EmbeddingDims(share=0.5), narrow)[0]["met"].shape == (9, 2)


@every_form
def test_gradients_are_differences(own):
    goal = RANDOM.normal(size=(48, 8)).astype(np.float32)
    stored, state = encoded(own)
    score = jax.jit(lambda part: jnp.sum(own.decode({**stored, "item": part}, state)["item"] * goal))
    leaves, tree = jax.tree.flatten(stored["item"])
    for i, grad in enumerate(jax.tree.leaves(jax.grad(score)(stored["item"]))):
        place = tuple(n // 2 for n in leaves[i].shape)
        low, high = (tree.unflatten([*leaves[:i], leaves[i].at[place].add(d), *leaves[i + 1 :]]) for d in (-0.5, 0.5))
        assert np.any(grad != 0)
        np.testing.assert_allclose(grad[place], score(high) - score(low), rtol=1e-3, atol=1e-3)


PRUNE, ITEM = MagnitudePrune(sparsity=0.5), {"only": "item"}
ORDERS = {
    **{name: (own,) for name, own in FORMS.items()},
    "int8 of codebooks": (PQEmbedding(subspaces=4, centroids=6), IntegerWeights()),
    "prune, rows, dims": (PRUNE, EmbeddingRows(share=0.4), EmbeddingDims(share=0.5)),
    "dims, rows, prune, int8": (EmbeddingDims(share=0.5), EmbeddingRows(share=0.4), PRUNE, IntegerWeights()),
    "rows, hash": (EmbeddingRows(share=0.8), HashEmbedding(share=0.4)),
    "dims, pq": (EmbeddingDims(share=0.5), PQEmbedding(subspaces=2, centroids=4)),
    "low rank, row_int8": (LowRank(rank=2, only="user,item"), RowInt8()),
    "row_int8 and pq of the other": (RowInt8(only="user"), PQEmbedding(subspaces=4, centroids=4, **ITEM)),
    "row_int8, hash": (RowInt8(only="item"), HashEmbedding()),
    "prune, row_int4": (PRUNE, RowInt4()),
}


QUICK = (
    "qr multiply", "prune, rows, dims", "row_int8 and pq of the other",
)  # fmt: skip
"""Products of tables, tables that are cut, steps on a table each."""


@pytest.mark.parametrize("steps", slow_but(QUICK, ORDERS))
def test_the_file_reads_back_as_what_was_evaluated(steps, tmp_path):
    stored = Stored(jax.tree.map(jnp.asarray, TABLES))
    for i in range(len(steps)):
        stored = enter(steps[: i + 1], stored, KEY)
    wanted = jax.tree.map(np.asarray, apply_all(steps, stored.params, stored.states))
    assert jax.tree.map(np.shape, wanted) == jax.tree.map(np.shape, TABLES)
    size = write_artifact(tmp_path / "a", steps, finished(steps, stored, KEY), {}, {})
    found = read_artifact(tmp_path / "a")[0]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, wanted)
    assert size < 4 * sum(leaf.size for leaf in jax.tree.leaves(TABLES))


def test_masks_follow_the_rows_and_dimensions_that_stay():
    steps = (PRUNE, EmbeddingRows(share=0.4), EmbeddingDims(share=0.5))
    stored = Stored(jax.tree.map(jnp.asarray, TABLES))
    for i in range(3):
        stored = enter(steps[: i + 1], stored, KEY)
    masks, rows, dims = stored.states
    own = PRUNE.init(KEY, TABLES)["item"]
    kept, cut = np.asarray(rows["item"]) == 1, np.asarray(dims["item"]) == 1
    wanted = np.concatenate([own[~kept].max(0, keepdims=True), own[kept]])[:, cut]
    np.testing.assert_array_equal(masks["item"], wanted)
    assert masks["fc1/kernel"].shape == (8, 8) and "item" not in HashEmbedding().encode({}, {})


NOTHING = {
    HashEmbedding(rows=48, **ITEM): "the largest, item [48, 8], has 1536 bytes and would take 1542; set fewer rows",
    QREmbedding(rows=100): "compression=qr_embedding makes no chosen weight smaller",
    PQEmbedding(centroids=256): "the largest, item [48, 8], has 1536 bytes and would take 8384; set fewer",
    PQEmbedding(subspaces=3): "subspaces must divide the 8 numbers of a row of item, as 1, 2, 4, 8 do, got 3",
    EmbeddingDims(share=0.99): "compression=embedding_dims makes no chosen weight smaller",
    EmbeddingRows(only="itme"): "only='itme' names no table (matrices: fc1/kernel, item, user); did you mean 'item'?",
}


@pytest.mark.parametrize(("own", "says"), NOTHING.items(), ids=[type(own).__name__ for own in NOTHING])
def test_what_cannot_be_done_is_one_line(own, says):
    with pytest.raises(UsageError) as error:
        jax.eval_shape(own.init, KEY, TABLES)
    assert says in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("own", FORMS.values(), ids=FORMS)
def test_networks_without_tables_are_one_line(own):
    with pytest.raises(UsageError, match=r"found no table user, item, met, table or embedding \(matrices: fc1/kernel\); name"):
        own.init(KEY, {"fc1": TABLES["fc1"], "bias": TABLES["bias"]})


def test_odd_rows_need_subspaces():
    with pytest.raises(UsageError, match="subspaces=0 takes pairs of numbers, and a row of item has 7; set subspaces"):
        PQEmbedding().init(KEY, {"item": TABLES["item"][:, :7]})


WRONG = [
    *((name, key, value) for name in ("hash_embedding", "qr_embedding") for key, value in (("rows", -1), ("share", 1.0))),
    *((name, "share", 0.0) for name in ("embedding_rows", "embedding_dims")),
    ("qr_embedding", "operation", "mul"), ("pq_embedding", "centroids", 257), ("pq_embedding", "subspaces", -1),
]  # fmt: skip


@pytest.mark.parametrize(("name", "key", "value"), WRONG)
def test_wrong_options_are_one_line(name, key, value):
    with pytest.raises(UsageError, match=rf"^compression\.{key} must be"):
        build("compression", {"name": name, key: value})
