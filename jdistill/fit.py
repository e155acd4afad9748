"""The training loop: stages, epochs, blocks of steps; records, checkpoints and resuming. The arithmetic is in `train`.

One loop serves a single run and a population, whose state has a leading axis of members on every leaf.
"""

import contextlib
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jdistill import stacking
from jdistill.checkpoint import restore
from jdistill.errors import RunError
from jdistill.fitting import Fitted, Setup, on_device, sample_of, steps_per_epoch
from jdistill.machine import MACHINE
from jdistill.pytrees import as_leaves
from jdistill.reported import acting, reported
from jdistill.stages import abstract_outputs, calibration_rows, enter_stage, init_state, leave_stage
from jdistill.standing import DIVERGED, PRUNED, STOPPED, Diverged, Interrupted, Pruned, Standing
from jdistill.train import TrainState, epoch_order, epoch_orders, take_jit, take_members, zero_totals
from jdistill.types import PyTree

BLOCK_SECONDS = 1.0


class Cursor(NamedTuple):
    """Where a fit is: stage, epoch of the stage, step of the epoch; epochs since the start."""

    stage: int = 0
    epoch: int = 0
    position: int = 0
    total_epochs: int = 0


def fit(setup: Setup) -> list[Fitted | RunError]:
    """Trains all members through all stages; continues from the newest checkpoint if there is one.

    A member that diverged or was pruned gives its exception; the others go on.

    Raises:
      Interrupted: `setup.stop()` said so; a checkpoint is on disk.
    """
    return _Fit(setup).run()


def fit_one(setup: Setup) -> Fitted:
    """`fit` of a single run.

    Raises:
      Diverged: the loss of an epoch is not finite.
      Interrupted: as `fit`.
    """
    (fitted,) = fit(setup)
    if isinstance(fitted, RunError):
        raise fitted
    return fitted


class _Fit:
    """The mutable part of one `fit`: the carry, the cursor, the standing of the members, the clock."""

    def __init__(self, setup: Setup):
        self.setup, self.members = setup, setup.members
        self.own_stages = [tuple(as_leaves(stage) for stage in m.method.stages) for m in self.members]
        first = self.members[0].method.stages
        self.epochs = [int(stage.optim.epochs) for stage in first]
        self.examples = len(setup.data["label"])
        self.rows = [None if s.rows is None else s.rows.select(np.asarray(setup.data["label"])) for s in first]
        self.programs = setup.layout.programs(setup.parts, len(self.members) if setup.stacked else None)
        self.sample = sample_of(setup.data)
        self.cursor = Cursor()
        self.standing = Standing.beginning(len(self.members))
        self.reasons: dict[int, str] = {}
        self.shapes: dict[int, Any] = {}
        self.seconds, self.trained = 0.0, 0
        self.rate, self.compiled = 0.0, False
        self.train_metrics: list[dict[str, float]] = [{} for _ in self.members]
        self.data = on_device(setup) if setup.resident else setup.data
        own = {"initial"} if setup.stacked else set()  # one for each member
        self.frozen = {name: tree if name in own else setup.layout.put(tree) for name, tree in setup.frozen.items()}
        self.keeps = setup.select is not None or setup.patience > 0
        if setup.stacked:
            self.shared = stacking.stack([(stages, m.keys) for stages, m in zip(self.own_stages, self.members, strict=True)])

    def run(self) -> list[Fitted | RunError]:
        self._begin()
        for index in range(self.cursor.stage, len(self.epochs)):
            if index > self.cursor.stage and self.standing.running.any():
                self._enter(index)
            for _ in range(self.cursor.epoch, self.epochs[index]):
                if self.standing.running.any():
                    self._epoch()
        if self.setup.last_checkpoint:
            self._save()
        given = (self.state, self._reported(), self.kept)
        if self.setup.stacked:
            given = jax.tree.map(np.asarray, given)  # members of host arrays are views
        return [self._fitted(i, *given) for i in range(len(self.members))]

    def _fitted(self, index: int, state: TrainState, reported: PyTree, kept: PyTree) -> Fitted | RunError:
        """What became of a member, from all final states, students, and students kept on the way."""
        standing, setup = self.standing, self.setup
        how, epoch = standing.ended[index], int(standing.ended_epoch[index])
        if how == DIVERGED:
            return Diverged(f"diverged: the training loss is not finite in epoch {epoch} (lower optim.lr or loss.weight)")
        if how == PRUNED:
            return Pruned(self.reasons.get(index, f"pruned in epoch {epoch}"))
        if setup.stacked:
            slot = int(next(iter(np.flatnonzero(standing.slots == index)), 0))  # a member that left has what was kept of it
            state, reported, kept = *stacking.member((state, reported), slot), stacking.member(kept, index)
        if setup.select is not None or how == STOPPED:
            reported, epoch = kept, int(standing.best_epoch[index]) if setup.select is not None else epoch
        else:
            epoch = self.cursor.total_epochs
        share, steps = self.seconds / len(self.members), self._step()
        if how == STOPPED:  # the others may have gone on, in the same last stage
            later = self.cursor.total_epochs - int(standing.ended_epoch[index])
            steps -= later * steps_per_epoch(self.members[0].method.stages[-1], self.examples)
        *variables, states = reported
        return Fitted(state, steps, tuple(variables), epoch, self.train_metrics[index], share, self.trained, states)  # type: ignore[arg-type]

    # -- beginning, resuming, stages

    def _begin(self) -> None:
        setup = self.setup
        with MACHINE.compiling():
            self._place([self._entered(0, i, m.initial) for i, m in enumerate(self.members)])
        if setup.stacked:  # the stack is all that is needed, and as large
            like = jax.eval_shape(lambda: self.members[0].initial)
            setup.members = self.members = tuple(m._replace(initial=like) for m in self.members)
        latest = setup.checkpoints.latest() if setup.checkpoints else None
        if latest is None:
            for m in self.members:
                m.metrics.truncate(0)
        else:
            self._resume(*latest)
        self.saved_at, self.saved_step = time.monotonic(), self._step()

    def _resume(self, stage: int, width: int, path: Path) -> None:
        one = jax.eval_shape(lambda state: self._entered(0, 0, state), self.members[0].initial)
        for index in range(1, stage + 1):
            one = jax.eval_shape(lambda s, index=index: self._entered(index, 0, s), one)
        kept = (one.params["student"], one.model_state["student"], one.compressor_state)
        if self.setup.stacked:
            one, kept = stacking.widened(one, width), stacking.widened(kept, len(self.members))
        standing = Standing.beginning(len(self.members), width if self.setup.stacked else None)
        self.cursor, self.standing = self.cursor._replace(stage=stage), standing
        self._arrange()
        carry = restore(path, self._carry(one, standing, kept if self.keeps else ()))
        self.standing = Standing(*(np.array(leaf) for leaf in carry["standing"]))
        self.cursor = Cursor(*(int(n) for n in np.asarray(carry["cursor"])))
        self._arrange()
        put, width_ = self.setup.layout.put, self._width()
        self.state, self.totals = put(carry["state"], width_), put(carry["totals"], width_)
        self.kept = carry["kept"]
        for i, m in enumerate(self.members):
            m.metrics.truncate(int(self.standing.log_bytes[i]), path.parent)
            self.train_metrics[i] = m.metrics.last().get("train", {})

    def _carry(self, state: Any, standing: Standing, kept: PyTree) -> dict[str, Any]:
        cursor = np.asarray(self.cursor, np.int64)
        return {"state": state, "totals": self.totals, "standing": tuple(standing), "kept": kept, "cursor": cursor}

    def _width(self) -> int | None:
        return len(self.standing.slots) if self.setup.stacked else None

    def _step(self) -> int:
        return int(np.asarray(self.state.step).reshape(-1)[0])

    def _entered(self, index: int, i: int, state: TrainState) -> TrainState:
        """Member `i`'s own state at the beginning of stage `index`."""
        setup, frozen = self.setup, dict(self.setup.frozen)
        key = jax.random.fold_in(self.members[i].keys.init, 100 + index)
        if setup.stacked and "initial" in frozen:
            frozen["initial"] = stacking.member(frozen["initial"], i)
        if index:
            state = leave_stage(self.own_stages[i][index - 1], state)
        stage = self.own_stages[i][index]
        if index not in self.shapes:  # the same for all members
            self.shapes[index] = abstract_outputs(setup.parts, state, self.sample, frozen, stage)
        outputs = self.shapes[index]

        def first() -> tuple[PyTree, PyTree]:
            begun = setup.begin(init_state(setup.parts, self.members[i].keys.init, self.sample))
            return begun.params["student"], begun.model_state["student"]

        rows = partial(calibration_rows, setup.parts, setup.data["inputs"], self.sample)
        return enter_stage(setup.parts, stage, state, key, self.sample, frozen, setup.data["label"], outputs, first, rows)

    def _enter(self, index: int) -> None:
        states = [self.setup.layout.get(self.state)]
        if self.setup.stacked:
            states = [stacking.member(self.state, slot) for slot in range(len(self.standing.slots))]
        self.cursor = self.cursor._replace(stage=index, epoch=0, position=0)
        with MACHINE.compiling():
            self._place([self._entered(index, int(i), s) for i, s in zip(self.standing.slots, states, strict=True)])
        self.standing.best_value[:], self.standing.best_epoch[:] = -np.inf, 0
        self.rate, self.compiled = 0.0, False

    def _place(self, states: list[TrainState]) -> None:
        """Takes the members' states of a stage as the present one."""
        state = stacking.stack(states) if self.setup.stacked else states[0]
        self._arrange()
        self.state = self.setup.layout.put(state, self._width())
        self.kept = self._kept_at_first()

    def _arrange(self) -> None:
        """Stages, keys, frozen arrays and sums for the members that are in the state."""
        setup, slots = self.setup, self.standing.slots
        index = self.cursor.stage
        if setup.stacked:
            arranged = stacking.members((self.shared[0][index], self.shared[1]), slots)
            self.stage, self.keys = setup.layout.put(arranged, len(slots))
            if "initial" in setup.frozen:
                own = setup.layout.put(stacking.members(setup.frozen["initial"], slots), len(slots))
                self.frozen = {**self.frozen, "initial": own}
        else:
            self.stage, self.keys = self.own_stages[0][index], self.members[0].keys
        self._zero()

    def _zero(self) -> None:
        totals = zero_totals(self.own_stages[0][self.cursor.stage], self.setup.observed)
        if self.setup.stacked:
            totals = {name: np.zeros(len(self.standing.slots), np.float32) for name in totals}
            totals = self.setup.layout.put(totals, len(self.standing.slots))
        self.totals = totals

    def _kept_at_first(self) -> PyTree:
        if not self.keeps:
            return ()
        reported = self._reported()
        if self.setup.stacked:  # of every member, also of those that left
            return stacking.members(reported, self._places())
        return jax.tree.map(jnp.copy, reported)  # the state's own buffers are donated to the step

    def _reported(self) -> PyTree:
        return self.setup.layout.get(reported(self.stage, self.state, self.setup.stacked))

    def _places(self) -> np.ndarray:
        """The row of the state in which each member is; 0 for those that left."""
        place = np.zeros(len(self.members), np.int32)
        place[self.standing.slots] = np.arange(len(self.standing.slots))
        return place

    # -- one epoch

    def _epoch(self) -> None:
        rows = self.rows[self.cursor.stage]
        self.examples = len(self.setup.data["label"]) if rows is None else len(rows)
        steps = steps_per_epoch(self.members[0].method.stages[self.cursor.stage], self.examples)
        epochs = self.epochs[self.cursor.stage]
        lengths = (np.float32(steps), np.float32(epochs))
        order = None
        while self.cursor.position < steps:
            count = self._block_length(steps)
            started = time.perf_counter()
            with contextlib.nullcontext() if self.compiled else MACHINE.compiling(), MACHINE.busy():
                order = self._order(rows) if order is None else order
                self._advance(order, self.cursor.position, count, lengths)
                jax.block_until_ready(self.totals)
            spent = time.perf_counter() - started
            if self.compiled:  # the first call of a stage compiles: not a rate
                self.seconds += spent
                self.trained += count * self.stage.optim.batch_size
                self.rate = count / max(spent, 1e-9)
            self.compiled = True
            self.cursor = self.cursor._replace(position=self.cursor.position + count)
            done = self.cursor.epoch * steps + self.cursor.position
            self.setup.progress(self.stage.name, done, epochs * steps, self.rate)
            if self.cursor.position < steps:
                self._maybe_save()
        self._end_epoch()
        self._maybe_save(epoch_ended=True)

    def _order(self, rows: np.ndarray | None) -> Any:
        make = epoch_orders if self.setup.stacked else epoch_order
        order = make(self.keys.order, self.examples, np.int32(self.cursor.total_epochs))
        return order if rows is None else jnp.asarray(rows)[order]

    def _block_length(self, steps: int) -> int:
        left = steps - self.cursor.position
        every = self.setup.policy.every_steps
        if self.setup.checkpoints and every:
            left = min(left, every - self._step() % every)
        wanted = max(1, int(self.rate * BLOCK_SECONDS))  # one step while the rate is not known
        return min(left, self.setup.layout.agreed(wanted))

    def _advance(self, order: Any, start: int, count: int, lengths: Any) -> None:
        setup, key, size = self.setup, self.keys.step, self.stage.optim.batch_size
        whole = min(count, max(0, self.examples // size - start))
        if setup.strategy == "block" and setup.resident and whole:
            span = (np.int32(start), np.int32(whole))
            carry = (self.state, self.totals, self.frozen, self.data)
            self.state, self.totals = self.programs.block(*carry, order, *span, key, self.stage, lengths)
            start, count = start + whole, count - whole
        choose = take_members if setup.stacked else take_jit
        host_order = np.asarray(order) if count else order  # slicing on the device costs more
        for i in range(start, start + count):
            rows = host_order[..., i * size : (i + 1) * size]
            batch = choose(self.data, rows) if setup.resident else self._host_batch(rows)
            carry = (self.state, self.totals, self.frozen, batch)
            self.state, self.totals = self.programs.single(*carry, key, self.stage, lengths)

    def _host_batch(self, rows: np.ndarray) -> dict[str, Any]:
        return {**{name: array[rows] for name, array in self.data.items()}, "index": rows}

    def _end_epoch(self) -> None:
        cursor = self.cursor
        last = cursor.epoch + 1 == self.epochs[cursor.stage]
        self.cursor = cursor._replace(epoch=cursor.epoch + 1, position=0, total_epochs=cursor.total_epochs + 1)
        totals = {name: np.asarray(value).reshape(-1) for name, value in self.totals.items()}
        examples = totals.pop("examples")
        evaluated, found = None, None
        if self.setup.evaluate is not None and (last or self.cursor.epoch % self.setup.evaluate_every == 0):
            with MACHINE.busy():
                evaluated = self.setup.layout.get(acting(self.stage, self.state, self.setup.stacked))
                found = self.setup.evaluate(*evaluated)
        improved = np.zeros(len(self.members), bool)
        for slot, i in enumerate(self.standing.slots):
            if self.standing.running[i]:
                train = {name: float(value[slot] / examples[slot]) for name, value in totals.items()}
                improved[i] = self._end_member_epoch(int(i), train, None if found is None else partial(found, slot))
        if self.keeps and improved.any():
            self._keep(self._reported(), improved)
        rows = self.standing.compact(self.setup.multiple) if self.setup.stacked else None
        over = last and self.cursor.stage == len(self.epochs) - 1
        if rows is not None and not over:
            self.state = stacking.members(self.state, rows)
            self.standing = self.standing._replace(slots=self.standing.slots[rows])
            self.state = self.setup.layout.put(self.state, len(rows))
            self.rate, self.compiled = 0.0, False
            self._arrange()
        self._zero()

    def _end_member_epoch(self, i: int, train: dict[str, float], measure: Callable[[], dict[str, float]] | None) -> bool:
        """Records a member's epoch, ends the member where it is time; whether its network is now the one to report."""
        standing, setup, epoch = self.standing, self.setup, self.cursor.total_epochs
        if not math.isfinite(train["loss"]):
            standing.end(i, DIVERGED, epoch)
            return False
        self.train_metrics[i] = train
        row: dict[str, Any] = {"stage": self.stage.name, "epoch": epoch, "step": self._step(), "train": train}
        better = False
        if measure is not None:
            row[setup.evaluated] = found = measure()
            value = found[setup.select or setup.primary]
            better = value > standing.best_value[i]
            if better:
                standing.best_value[i], standing.best_epoch[i] = value, epoch
            late = self.cursor.stage == len(self.epochs) - 1 and epoch - standing.best_epoch[i] >= setup.patience
            if setup.patience and late:
                standing.end(i, STOPPED, epoch)
            reason = setup.judge(i, epoch, found)
            if reason is not None:
                standing.end(i, PRUNED, epoch)
                self.reasons[i] = reason
        standing.log_bytes[i] = self.members[i].metrics.append(row)
        return better if setup.select is not None else standing.ended[i] == STOPPED

    def _keep(self, reported: PyTree, improved: np.ndarray) -> None:
        """Keeps the students that are now to be reported."""
        if not self.setup.stacked:
            self.kept = jax.tree.map(jnp.copy, reported)
        else:
            self.kept = stacking.where(improved, stacking.members(reported, self._places()), self.kept)

    # -- checkpoints

    def _maybe_save(self, epoch_ended: bool = False) -> None:
        policy, stopping = self.setup.policy, bool(self.setup.layout.agreed(int(self.setup.stop())))
        if self.setup.checkpoints is not None:
            step = self._step()
            due = (
                stopping
                or (policy.every_steps and step % policy.every_steps == 0)
                or (policy.every_epochs and epoch_ended and self.cursor.total_epochs % policy.every_epochs == 0)
                or (policy.every_seconds and time.monotonic() - self.saved_at > policy.every_seconds)
            )
            if due:
                self._save()
        if stopping:
            raise Interrupted("interrupted: a checkpoint was written; the same command continues the run")

    def _save(self) -> None:
        step = self._step()
        if self.setup.checkpoints is None or step == self.saved_step:
            return
        for m in self.members:
            m.metrics.sync()
        carry = self._carry(self.state, self.standing, self.kept)
        self.setup.checkpoints.save(self.cursor.stage, step, carry, self._width())
        self.saved_at, self.saved_step = time.monotonic(), step
