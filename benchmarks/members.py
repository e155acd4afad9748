"""What a member of a population costs: time a step and peak memory of N = 1, 8, 64, 512 members, by strategy.

    python benchmarks/members.py [--networks digits,mnist,lenet] [--members 1,8,64,512] [--threads 1,2] [--out FILE]

Strategy `vmap` is `programs(parts, stacked=True)`: all members in each step. `loop` is one member after another in the
program of a single run; each gets a block of steps in turn, as many as the population does, up to 64 members. Time: the
median of `--rounds` calls divided by steps and members. Memory: the largest resident size (VmHWM) of a process of its own
for each N, which trains a few steps under `vmap`. Its growth a member (the states before they are stacked count, too) is
set against the member's share of the state (parameters, optimizer state), of the order of the examples, and of what the
compiled program holds for a step (the compiler's count: batch, activations, gradients).

The networks: MLP 64-32-10 on digits (batch 64), MLP 784-64-10 on MNIST (batch 128), LeNet-5 on MNIST (batch 64; step by
step, since convolutions inside a compiled loop are slow on a CPU; up to 8 members). Random arrays stand in for MNIST where
$JDISTILL_DATA has none.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from _common import cores, finish, keep_to, names, options, report, table

NAMES = ("digits", "mnist", "lenet")
STEPS = {"digits": 20, "mnist": 8, "lenet": 4}
MOST = {"lenet": 8}
LOOPED = 64
SECONDS = 0.5
"""Of a timed call, at least."""

Call = Callable[[], None]
Sizes = Callable[[], dict[str, float]]


def population(problem: Any, members: int, in_blocks: bool, steps: int) -> tuple[Call, Sizes]:
    """A call that trains `members` for `steps` steps under vmap; and what tells the bytes of a member."""
    import jax
    import jax.numpy as jnp

    from jdistill import stacking
    from jdistill.train import Keys, epoch_orders, programs, take_members, zero_totals

    stage, examples = problem.stage, len(problem.data["label"])
    state = stacking.stack([problem.entered(seed) for seed in range(members)])
    stages, keys = stacking.stack([stage] * members), stacking.stack([Keys.of(seed) for seed in range(members)])
    totals = {name: jnp.zeros(members) for name in zero_totals(stage, ("accuracy",))}
    data = {name: jnp.asarray(array) for name, array in problem.data.items()}
    order = epoch_orders(keys.order, examples, jnp.int32(0))
    compiled: Any = programs(problem.parts, stacked=True)
    lengths = (jnp.float32(examples // problem.batch), jnp.float32(1))

    def call() -> None:
        nonlocal state, totals
        if in_blocks:
            span = (jnp.int32(0), jnp.int32(steps))
            state, totals = compiled.block(state, totals, {}, data, order, *span, keys.step, stages, lengths)
        else:
            for i in range(steps):
                batch = take_members(data, order[:, i * problem.batch : (i + 1) * problem.batch])
                state, totals = compiled.single(state, totals, {}, batch, keys.step, stages, lengths)
        jax.block_until_ready(totals)

    def sizes() -> dict[str, float]:
        if in_blocks:
            span = (jnp.int32(0), jnp.int32(steps))
            lowered = compiled.block.lower(state, totals, {}, data, order, *span, keys.step, stages, lengths)
        else:
            batch = take_members(data, order[:, : problem.batch])
            lowered = compiled.single.lower(state, totals, {}, batch, keys.step, stages, lengths)
        inside = lowered.compile().memory_analysis().temp_size_in_bytes
        own = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        return {"state": own / members, "order": order.nbytes / members, "program": inside / members}

    return call, sizes


def one_by_one(problem: Any, members: int, in_blocks: bool, steps: int) -> Call:
    """A call that trains `members`, one after another, `steps` steps each."""
    import jax
    import jax.numpy as jnp

    from jdistill.train import Keys, epoch_order, programs, take_jit, zero_totals

    stage, examples = problem.stage, len(problem.data["label"])
    carries = [(problem.entered(seed), zero_totals(stage, ("accuracy",))) for seed in range(members)]
    keys = [Keys.of(seed) for seed in range(members)]
    data = {name: jnp.asarray(array) for name, array in problem.data.items()}
    orders = [epoch_order(key.order, examples, jnp.int32(0)) for key in keys]
    compiled, lengths = programs(problem.parts), (jnp.float32(examples // problem.batch), jnp.float32(1))

    def call() -> None:
        for member, (carry, order) in enumerate(zip(carries, orders)):
            key = keys[member].step
            if in_blocks:
                span = (jnp.int32(0), jnp.int32(steps))
                carries[member] = compiled.block(*carry, {}, data, order, *span, key, stage, lengths)
                continue
            for i in range(steps):
                batch = take_jit(data, order[i * problem.batch : (i + 1) * problem.batch])
                carry = compiled.single(*carry, {}, batch, key, stage, lengths)
            carries[member] = carry
        jax.block_until_ready(carries)

    return call


def time_of(make: Callable[[int], Call], steps: int, rounds: int) -> float:
    """Seconds a step of all members: the median of `rounds` calls, each long enough to be timed."""
    call = make(steps)
    call()  # compiles
    times: list[float] = []
    while len(times) < rounds:
        started, calls = time.perf_counter(), 0
        while not calls or time.perf_counter() - started < SECONDS:
            call()
            calls += 1
        times.append((time.perf_counter() - started) / calls / steps)
    return statistics.median(times)


def worker(given: argparse.Namespace) -> None:
    """In a process of its own: one network, one number of threads, one number of members, as JSON."""
    keep_to(given.threads[0])
    from _problem import problem

    name, members = given.networks[0], given.members[0]
    made, in_blocks, steps = problem(name), name != "lenet", STEPS[name]
    if given.worker == "memory":
        call, sizes = population(made, members, in_blocks, 2)
        call()
        status = Path("/proc/self/status").read_text()
        peak = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
        print(json.dumps({"peak": peak, "sizes": sizes()}))
        return
    looped = min(members, LOOPED)
    vmap = time_of(lambda n: population(made, members, in_blocks, n)[0], steps, given.rounds) / members
    loop = time_of(lambda n: one_by_one(made, looped, in_blocks, n), steps, given.rounds) / looped
    print(json.dumps({"vmap": vmap, "loop": loop}))


def ask(what: str, name: str, members: int, threads: int, rounds: int) -> dict[str, Any]:
    """What a process of its own measured."""
    command = [sys.executable, __file__, "--worker", what, "--networks", name, "--members", str(members)]
    _, out = finish([*command, "--threads", str(threads), "--rounds", str(rounds)])
    return json.loads(out.splitlines()[-1])


def times(given: argparse.Namespace) -> list[dict[str, Any]]:
    """Prints microseconds a member and step of both strategies; returns the numbers."""
    found, rows = [], []
    for name in given.networks:
        for threads in given.threads:
            for members in (n for n in given.members if n <= MOST.get(name, n)):
                got = ask("time", name, members, threads, given.rounds)
                found.append({"network": name, "threads": threads, "members": members, **got})
                us = (f"{got[strategy] * 1e6:.1f}" for strategy in ("vmap", "loop"))
                rows.append((name, str(threads), str(members), *us, f"{got['loop'] / got['vmap']:.2f}x"))
                print(" ".join(rows[-1]), file=sys.stderr, flush=True)
    table(("network", "threads", "members", "vmap, us", "loop, us", "loop / vmap"), rows)
    return found


def memory(given: argparse.Namespace) -> list[dict[str, Any]]:
    """Prints the peak of each N and its growth a member; returns the numbers."""
    found, rows = [], []
    for name in given.networks:
        before: tuple[int, float] | None = None
        for members in (n for n in given.members if n <= MOST.get(name, n)):
            got = ask("memory", name, members, max(given.threads), given.rounds)
            growth = (got["peak"] - before[1]) / (members - before[0]) if before else None
            before = (members, got["peak"])
            found.append({"network": name, "members": members, "growth": growth, **got})
            kilobytes = (f"{size / 1e3:.0f}" for size in (*got["sizes"].values(), sum(got["sizes"].values())))
            grown = "" if growth is None else f"{growth / 1e3:.0f}"
            rows.append((name, str(members), f"{got['peak'] / 1e6:.0f}", grown, *kilobytes))
            print(" ".join(rows[-1]), file=sys.stderr, flush=True)
    table(("network", "members", "peak, MB", "growth a member, kB", "state, kB", "order", "program", "sum"), rows)
    return found


def whole_numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--networks", type=names(NAMES), default=list(NAMES), help="comma-separated")
    parser.add_argument("--members", type=whole_numbers, default=[1, 8, 64, 512])
    parser.add_argument("--threads", type=whole_numbers, default=sorted({1, cores()}))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--worker", choices=("time", "memory"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        worker(given)
        return
    numbers = {"times": times(given)}
    if Path("/proc/self/status").exists():
        numbers["memory"] = memory(given)
    report(numbers, given.out)


if __name__ == "__main__":
    main()
