"""What the benchmarks of recommendation share: CiteULike, matrix factorisation by BPR, steps a second."""

import statistics
import time
from typing import Any

BATCH = 1024


def citeulike() -> tuple[Any, str]:
    """The data of topology distillation and what they are: random pairs of the same numbers where it is not there."""
    import numpy as np

    from jdistill.data.interactions import citeulike as load
    from jdistill.errors import UsageError

    try:
        return load(split="topology"), "CiteULike"
    except UsageError as error:
        rng = np.random.default_rng(0)
        pairs = np.stack([rng.integers(0, 5220, 115_142), rng.integers(0, 25_182, 115_142)], axis=1).astype(np.int32)
        return dataset(5220, 25_182, pairs), f"random pairs ({error})"


def dataset(users: int, items: int, pairs: Any) -> Any:
    """A `Dataset` of training pairs [N, 2], which asks for every user's items in the test."""
    import numpy as np

    from jdistill.data.base import Dataset, Schema

    asked = np.arange(users, dtype=np.int32)[:, None]
    none = {"inputs": np.zeros((0, 1), np.int32), "label": np.zeros((0, 1), np.int32)}
    test = {"inputs": asked, "label": np.zeros_like(asked)}
    train = {"inputs": pairs, "label": np.ones(len(pairs), np.float32)}
    return Dataset("random", train, none, test, items, (), (), 1.0, None, {}, Schema(users=users, items=items))


class Training:
    """BPR on a data set as `jdistill.fit` trains it: blocks of steps in one program, the last, smaller batch by itself.

    With a teacher, `(model, (params, state))`, plus KD from its scores of the positive and the negative.
    """

    def __init__(self, data: Any, dim: int, rows: bool = False, teacher: Any = None):
        import jax
        import jax.numpy as jnp

        from jdistill.losses import KD
        from jdistill.method import Stage, Term
        from jdistill.models.recommend.bpr import BPR
        from jdistill.modules import from_linen
        from jdistill.optim import Optimizer
        from jdistill.pytrees import as_leaves
        from jdistill.stages import enter_stage, init_state
        from jdistill.tasks.recommendation import Recommend
        from jdistill.teachers.targets import Live
        from jdistill.train import Keys, Learner, Parts, programs, zero_totals

        task, self.keys = Recommend(reduction="sum"), Keys.of(0)
        self.model = from_linen(BPR(schema=data.schema, dim=dim))
        learners, sampler = (Learner("student", self.model),), task.sampler(data)
        terms = [Term(name="bpr", loss=task.loss(), reduction="sum")]
        targets = () if teacher is None else (("teacher", Live(teacher[0])),)
        if teacher is not None:
            terms.append(Term(name="kd", teacher="teacher", loss=KD(), reduction="sum"))
        parts = Parts(learners, targets, data.preprocess, None, lambda *_: {}, sampler=sampler)
        optim = Optimizer(batch_size=BATCH, weight_decay=1e-3, rows=rows)
        self.stage = as_leaves(Stage(name="train", terms=tuple(terms), optim=optim))
        self.data = {name: jnp.asarray(data.train[name]) for name in ("inputs", "label")}
        self.frozen = {"tables": jax.tree.map(jnp.asarray, task.tables(data))}
        if teacher is not None:
            self.frozen["teacher"] = teacher[1]
        sample: dict[str, Any] = {k: jax.ShapeDtypeStruct((2, *v.shape[1:]), v.dtype) for k, v in self.data.items()}
        sample["index"] = jax.ShapeDtypeStruct((2,), jnp.int32)
        start = init_state(parts, self.keys.init, sample)
        self.state = enter_stage(parts, self.stage, start, self.keys.init, sample, self.frozen, self.data["label"])
        self.programs, self.none, self.number = programs(parts), zero_totals(self.stage, ()), 0
        self.steps, self.rest = divmod(len(data.train["label"]), BATCH)
        self.lengths = (jnp.float32(self.steps + 1), jnp.float32(100))

    def block(self, count: int) -> tuple[Any, ...]:
        """The arguments of a block of `count` steps in a new order."""
        import jax.numpy as jnp

        from jdistill.train import epoch_order

        self.number += 1
        self.order = epoch_order(self.keys.order, len(self.data["label"]), jnp.int32(self.number))
        span = (jnp.int32(0), jnp.int32(count))
        given = (self.frozen, self.data, self.order, *span, self.keys.step, self.stage, self.lengths)
        return (self.state, self.none, *given)

    def epoch(self) -> dict[str, float]:
        """Trains on every pair once; seconds and the mean loss."""
        from jdistill.train import take_jit

        started = time.perf_counter()
        self.state, totals = self.programs.block(*self.block(self.steps))
        loss = float(totals["loss"]) / BATCH  # the term is a sum over the batch, counted once for each of its examples
        if self.rest:
            batch = take_jit(self.data, self.order[self.steps * BATCH :])
            given = (self.frozen, batch, self.keys.step, self.stage, self.lengths)
            self.state, totals = self.programs.single(self.state, self.none, *given)
            loss += float(totals["loss"]) / self.rest
        return {"seconds": time.perf_counter() - started, "loss": loss / len(self.data["label"])}

    def rate(self, rounds: int) -> float:
        """Steps a second, compilation left out: the median of blocks of a second or more, or of 256 steps."""
        import jax

        self.state, _ = self.programs.block(*self.block(2))
        steps, rates = 4, []
        while len(rates) < rounds:
            block = jax.block_until_ready(self.block(steps))
            started = time.perf_counter()
            self.state, _ = jax.block_until_ready(self.programs.block(*block))
            seconds = time.perf_counter() - started
            if seconds < 1 and steps < 256:
                steps *= 4
                continue
            rates.append(steps / seconds)
        return statistics.median(rates)
