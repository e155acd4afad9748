"""Checkpoints are whole or absent, and give back the same bits."""

import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdistill.checkpoint import Checkpoints, first_line, restore, save, write_atomically, write_json
from jdistill.errors import RunError
from tests.tiny import assert_same_bits

TREE = {
    "float": jnp.array([1 / 3, -0.0, 1e-42, jnp.inf]), "int": jnp.int32(7), "pair": (jnp.ones((2, 3), jnp.bfloat16), ()),
    "wide": np.float64(1 / 3), "long": np.int64(2**40), "mask": jnp.array([True, False]),
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "checkpoints"


def test_round_trip_of_every_bit(folder):
    save(folder / "c", TREE)
    found = restore(folder / "c", TREE)
    assert_same_bits(found, TREE)
    assert isinstance(found["float"], jax.Array) and not isinstance(found["wide"], jax.Array)
    abstract = jax.eval_shape(lambda: {k: v for k, v in TREE.items() if k not in ("wide", "long")})
    assert_same_bits(restore(folder / "c", {**abstract, "wide": TREE["wide"], "long": TREE["long"]}), TREE)


def test_many_leaves_keep_their_order(folder):
    tree = [jnp.int32(i) for i in range(25)]
    save(folder / "c", tree)
    assert [int(leaf) for leaf in restore(folder / "c", tree)] == list(range(25))


def test_saving_again_replaces(folder):
    save(folder / "c", {"x": jnp.zeros(3)})
    save(folder / "c", {"x": jnp.ones(4)})
    assert_same_bits(restore(folder / "c", {"x": jnp.zeros(4)}), {"x": jnp.ones(4)})


@pytest.mark.parametrize(
    "like",
    [
        {"x": jnp.zeros(4), "y": jnp.zeros(2)}, {"x": jnp.zeros(3, jnp.int32), "y": jnp.zeros(2)},
        {"x": jnp.zeros(3)}, {"x": jnp.zeros(3), "y": jnp.zeros(2), "z": jnp.zeros(2)},
    ],
    ids=["shape", "dtype", "fewer", "more"],
)  # fmt: skip
def test_another_configs_shapes_are_an_error(like, folder):
    save(folder / "c", {"x": jnp.zeros(3), "y": jnp.zeros(2)})
    with pytest.raises(RunError, match=r"checkpoint .* delete that folder"):
        restore(folder / "c", like)


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, flip, lambda path: path.unlink()], ids=["truncated", "altered", "missing"])
def test_a_damaged_checkpoint_is_an_error_of_one_line(damage, folder):
    tree = {"x": jnp.asarray(np.random.default_rng(0).normal(size=(64, 64)), jnp.float32)}
    save(folder / "c", tree)
    for path in (p for p in (folder / "c").rglob("*") if p.is_file() and p.parent.name == "d"):
        damage(path)
    with pytest.raises(RunError, match="cannot be read") as error:
        restore(folder / "c", tree)
    assert "\n" not in str(error.value) and str(folder / "c") in str(error.value)


def test_no_checkpoint_is_an_error(folder):
    with pytest.raises(RunError, match="cannot be read"):
        restore(folder / "nothing", TREE)


def test_the_newest_counts_and_older_ones_go(folder):
    own = Checkpoints(folder)
    assert own.latest() is None
    for name in ("0-9", "0-10", "1-10", "1-9.orbax-checkpoint-tmp-7", "2-11.orbax-checkpoint-tmp-1", ".hidden"):
        (folder / name).mkdir(parents=True)
    assert own.latest() == (1, 0, folder / "1-10")  # by number, not by spelling; a killed save's folder does not count
    own.save(1, 12, {"x": jnp.zeros(3)})
    assert [path.name for path in folder.iterdir()] == ["1-12"] and own.latest() == (1, 0, folder / "1-12")
    own.save(1, 13, {"x": jnp.zeros((4, 3))}, 4)
    assert own.latest() == (1, 4, folder / "1-13-4")  # of a population
    own.clear()
    assert own.latest() is None and not folder.exists()


def test_a_save_that_dies_leaves_the_older_checkpoint(folder, monkeypatch):
    own, tree = Checkpoints(folder), {"x": jnp.arange(3.0)}
    own.save(0, 1, tree)
    monkeypatch.setattr("orbax.checkpoint.PyTreeCheckpointer.save", dies)
    with pytest.raises(KeyboardInterrupt):
        own.save(0, 2, tree)
    stage, rows, path = own.latest()
    assert (stage, rows, path.name) == (0, 0, "0-1")
    assert_same_bits(restore(path, tree), tree)


def dies(self, path, *arguments, **options):
    (path.parent / f"{path.name}.orbax-checkpoint-tmp-3").mkdir()
    raise KeyboardInterrupt


# -- small files


def test_write_json_turns_what_json_lacks_into_null(tmp_path):
    path = tmp_path / "a.json"
    write_json(
        path, {"nan": float("nan"), "inf": [np.float32("inf"), (1, -np.inf)], "n": np.int64(3), "x": np.float64(0.1), 5: None}
    )
    assert json.loads(path.read_text()) == {"nan": None, "inf": [None, [1, None]], "n": 3, "x": 0.1, "5": None}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"old": 1})

    def fails(temporary):
        temporary.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fails)
    with pytest.raises(TypeError):
        write_json(path, {"new": object()})
    assert json.loads(path.read_text()) == {"old": 1} and [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_first_line():
    assert first_line(ValueError("\n  \nfirst\nsecond")) == "first" and first_line(KeyboardInterrupt()) == "KeyboardInterrupt"
