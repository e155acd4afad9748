"""`jdistill.fit` against a bare loop of the same steps over the same data: what records, checkpoints and resuming cost.

    python benchmarks/fit_vs_bare.py [--networks mnist,lenet] [--epochs 5] [--rounds 7] [--threads 1] [--out FILE]

An MLP 784-64-10 on MNIST, whose steps run in blocks inside one program (strategy `block`), and LeNet-5 on MNIST's first
6,400 images, step by step (`loop`). `fit` runs with its metrics file, checkpoint folder and default policy, without
held-out data. The bare loops:

  same-step     jdistill's own step in a jitted `fori_loop` of an epoch, or called in a Python loop: no more than that
  hand-written  Flax and optax: cross-entropy, `optax.adam`, the sums of loss and accuracy that `fit` keeps, too

Each call trains a fresh network for all epochs; compilation is before the timing. The sides take turns; the ratios are of
the medians. Random arrays stand in for MNIST where $JDISTILL_DATA has none.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from _common import keep_to, names, options, report, table

Run = Callable[[], float]
"""Trains a fresh network; the mean training loss of the last epoch."""


def fit_run(problem: Any, strategy: str, epochs: int) -> Run:
    """`jdistill.fit`, in a new folder each time."""
    import jax

    from jdistill.checkpoint import Checkpoints
    from jdistill.fit import fit_one
    from jdistill.fitting import CheckpointPolicy, Member, Setup
    from jdistill.records import MetricsFile
    from jdistill.tasks.classification import Classification
    from jdistill.train import Keys

    initial = problem.initial(0)

    def run() -> float:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            member = Member(
                problem.method, Keys.of(0), MetricsFile(folder / "metrics.jsonl"), jax.tree.map(jax.numpy.copy, initial)
            )
            setup = Setup(
                parts=problem.parts, members=(member,), data=problem.data, frozen={}, strategy=strategy, resident=True,
                checkpoints=Checkpoints(folder / "checkpoints"), policy=CheckpointPolicy(), observed=Classification.observed,
            )  # fmt: skip
            return fit_one(setup).train_metrics["loss"]

    return run


def loop(
    problem: Any, strategy: str, epochs: int, begin: Callable[[], Any], step: Callable[..., Any], zero: Callable[[], Any]
) -> Run:
    """A bare loop. `step` is `((state, sums), rows, data) -> (state, sums)`; `begin` and `zero` make state and sums."""
    import jax
    import jax.numpy as jnp

    from jdistill.train import Keys, epoch_order

    batch, examples = problem.batch, len(problem.data["label"])
    steps, order_key = examples // batch, Keys.of(0).order

    def chosen(i: Any, carry: Any, data: Any, order: Any) -> Any:
        return step(carry, jax.lax.dynamic_slice(order, (i * batch,), (batch,)), data)

    def epoch(carry: Any, data: Any, order: Any) -> Any:
        return jax.lax.fori_loop(0, steps, lambda i, carry: chosen(i, carry, data, order), carry)

    whole, one = jax.jit(epoch, donate_argnums=0), jax.jit(chosen, donate_argnums=1)

    def run() -> float:
        data = {name: jnp.asarray(array) for name, array in problem.data.items()}
        state, sums = begin(), zero()
        for number in range(epochs):
            order, carry = epoch_order(order_key, examples, jnp.int32(number)), (state, zero())
            if strategy == "block":
                carry = whole(carry, data, order)
            else:
                for i in range(steps):
                    carry = one(jnp.int32(i), carry, data, order)
            state, sums = carry
        return float(sums["loss"]) / (steps * batch)

    return run


def same_step(problem: Any, strategy: str, epochs: int) -> Run:
    """The step that `fit` runs, in a bare loop."""
    import jax
    import jax.numpy as jnp

    from jdistill.tasks.classification import Classification
    from jdistill.train import Keys, add, make_step, take, zero_totals

    step, stage, key = make_step(problem.parts), problem.stage, Keys.of(0).step
    lengths = (jnp.float32(len(problem.data["label"]) // problem.batch), jnp.float32(epochs))
    initial = problem.entered(0)

    def bare(carry: Any, rows: Any, data: Any) -> Any:
        state, metrics = step(carry[0], {}, take(data, rows), key, stage, lengths)
        return state, add(carry[1], metrics)

    begin = partial(jax.tree.map, jnp.copy, initial)
    return loop(problem, strategy, epochs, begin, bare, partial(zero_totals, stage, Classification.observed))


def hand_written(problem: Any, strategy: str, epochs: int) -> Run:
    """Flax and optax, as a user would write it for this one network."""
    import jax
    import jax.numpy as jnp
    import optax

    network, preprocess, optimizer = problem.module, problem.parts.preprocess, optax.adam(1e-3)
    params = problem.initial(0).params["student"]

    def bare(carry: Any, rows: Any, data: Any) -> Any:
        (params, opt_state), sums = carry
        inputs, label = preprocess(data["inputs"][rows]), data["label"][rows]

        def objective(params: Any) -> Any:
            logits, _ = network.apply({"params": params}, inputs, train=True)
            return optax.softmax_cross_entropy_with_integer_labels(logits, label).mean(), logits

        (loss, logits), grads = jax.value_and_grad(objective, has_aux=True)(params)
        updates, opt_state = optimizer.update(grads, opt_state)
        hits = (logits.argmax(-1) == label).sum()
        sums = {"loss": sums["loss"] + loss * problem.batch, "accuracy": sums["accuracy"] + hits}
        return (optax.apply_updates(params, updates), opt_state), sums

    def begin() -> Any:
        own = jax.tree.map(jnp.copy, params)
        return own, optimizer.init(own)

    return loop(problem, strategy, epochs, begin, bare, lambda: {"loss": jnp.zeros(()), "accuracy": jnp.zeros((), int)})


SIDES = {"fit": fit_run, "same-step": same_step, "hand-written": hand_written}
STRATEGIES = {"mnist": "block", "lenet": "loop", "digits": "block"}
EXAMPLES = {"lenet": 6400}


def measure(name: str, epochs: int, rounds: int) -> dict[str, Any]:
    """Seconds of each side in each round, the sides taking turns; and the losses they end with."""
    from _problem import problem

    made = problem(name, epochs, EXAMPLES.get(name))
    sides = {side: make(made, STRATEGIES[name], epochs) for side, make in SIDES.items()}
    losses = {side: run() for side, run in sides.items()}  # compiles
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(rounds):
        for side, run in sides.items():
            started = time.perf_counter()
            run()
            seconds[side].append(time.perf_counter() - started)
    steps = len(made.data["label"]) // made.batch * epochs
    return {"seconds": seconds, "losses": losses, "steps": steps, "data": made.what}


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--networks", type=names(list(STRATEGIES)), default=["mnist", "lenet"], help="comma-separated")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    keep_to(given.threads)
    rows, numbers = [], {}
    for name in given.networks:
        numbers[name] = found = measure(name, given.epochs, given.rounds)
        medians = {side: statistics.median(values) for side, values in found["seconds"].items()}
        for side, median in medians.items():
            low, high = min(found["seconds"][side]), max(found["seconds"][side])
            rows.append(
                (f"{name} ({STRATEGIES[name]}) {side}", f"{median:.3f}", f"{low:.3f} to {high:.3f}",
                 f"{median / found['steps'] * 1e6:.0f}", f"{found['losses'][side]:.4f}", f"{medians['fit'] / median:.3f}")
            )  # fmt: skip
        found["ratios"] = {side: medians["fit"] / median for side, median in medians.items()}
    table(("side", "seconds", "range", "us a step", "loss", "fit / side"), rows)
    report(numbers, given.out)


if __name__ == "__main__":
    main()
