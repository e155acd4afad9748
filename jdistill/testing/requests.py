"""What a loss on requests is tried on: small recommenders, the items that some users met, a teacher's ranking of the others."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jdistill.data import Dataset
from jdistill.data.base import Schema
from jdistill.losses.base import Loss
from jdistill.models.recommend import BPR
from jdistill.modules import from_linen
from jdistill.ranking import met_in_training, teacher_ranking
from jdistill.sampling import Known
from jdistill.tasks.recommendation import Pairs, Recommend
from jdistill.types import Batch, Model

MET = 3
"""Items that each user has met: rows 3 u to 3 u + 2 of the training set are those of user u."""
ASKED = ((15, 3, 9, 16), (18, 6, 30, 16))
"""The rows of two batches: of users 5, 1, 3, 5 and of 6, 2, 10, 5. They share the last, whose user is twice in the first."""


class Shop(NamedTuple):
    """How many users and items there are, and how many items of each user and users of each item the teacher ranks."""

    users: int
    items: int
    ranked_items: int
    ranked_users: int


def shop_for(loss: Loss) -> Shop:
    """A shop of which the ranking that `loss` wants is about half."""
    items, users = loss.ranking
    return Shop(max(12, 2 * users), max(40, 2 * items), items, users)


@functools.lru_cache(maxsize=8)
def interactions(shop: Shop) -> Dataset:
    """Who met what."""
    random = np.random.RandomState(0)
    items = np.concatenate([random.choice(shop.items, MET, replace=False) for _ in range(shop.users)])
    pairs = np.stack([np.arange(len(items)) // MET, items], axis=1).astype(np.int32)
    rows = {"inputs": pairs, "label": np.ones(len(pairs), np.float32), "index": np.arange(len(pairs), dtype=np.int32)}
    schema = Schema(users=shop.users, items=shop.items)
    return Dataset("shop", rows, rows, rows, shop.items, (0.0,), (1.0,), 1.0, None, {}, schema)


@functools.cache
def recommender(shop: Shop, width: int = 3, embeddings: bool = True) -> Model:
    """Matrix factorisation of `width`; without `embeddings` it gives no features `user` and `item`."""
    model = from_linen(BPR(Schema(users=shop.users, items=shop.items), dim=width, init_std=1.0))
    if embeddings:
        return model

    def apply(params: Any, state: Any, inputs: Any, **mode: Any) -> Any:
        outputs, state = model.apply(params, state, inputs, **mode)
        return outputs._replace(features={"embedding": outputs.features["embedding"]}), state

    return model._replace(apply=apply)


@functools.lru_cache(maxsize=16)
def known_with(shop: Shop, teacher: Model | None) -> Known:
    """What is known of users and items, with the ranking of a teacher as initialised by key 0 where one is wanted."""
    dataset = interactions(shop)
    known: Known = jax.tree.map(jnp.asarray, Recommend().tables(dataset)["known"])
    if teacher is None or not (shop.ranked_items or shop.ranked_users):
        return known
    variables = teacher.init(jax.random.key(0), draw_requests(0, 2, shop)["inputs"])
    return known._replace(ranking=teacher_ranking(teacher, dataset, variables, shop.ranked_items, shop.ranked_users))


def draw_requests(seed: int, candidates: int, shop: Shop) -> Batch:
    """The batch of `ASKED[seed]`: the item of each row, and `candidates` - 1 that its user has not met."""
    dataset = interactions(shop)
    index = np.array(ASKED[seed], np.int32)
    batch = {"inputs": jnp.asarray(dataset.train["inputs"][index]), "index": jnp.asarray(index)}
    tables = {"known": Known(shop.items, jax.tree.map(jnp.asarray, met_in_training(dataset)), None)}
    return Pairs(dataset.schema, candidates - 1)(jax.random.key(0), batch, tables)
