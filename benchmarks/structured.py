"""Latency of a network without half of its units against the same network in full size with zeros in their place.

Both are timed in turn, call by call, so that whatever else the machine does concerns both. Prints p50 in milliseconds and
the ratio. Random weights: how long a network takes does not depend on them.

    python benchmarks/structured.py --calls 200
"""

import time
from typing import Any

import _common

NETWORKS = ("mlp", "resnet20")
BATCHES = (1, 256)


def pair(name: str) -> tuple[Any, tuple[Any, Any], Any]:
    """The shape of an input, two programs `(inputs) -> logits`, masked and cut, and the parameters of each."""
    import jax
    import jax.numpy as jnp

    import jdistill.options  # noqa: F401 (registers every option)
    from jdistill.compress.structured import StructuredPrune
    from jdistill.models.mlp import MLP
    from jdistill.models.resnet import ResNet
    from jdistill.modules import from_linen

    module, shape = {"mlp": (MLP(10, (1200, 1200)), (784,)), "resnet20": (ResNet(10, 20), (32, 32, 3))}[name]
    model, inputs = from_linen(module), jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    params, running = model.init(jax.random.key(0), inputs)
    step = StructuredPrune(sparsity=0.5, streams=bool(model.widths and model.widths.streams))
    state = step.init(jax.random.key(0), params, model=model, inputs=inputs)
    stored = step.encode(params, state)
    node, less = step.shrink({}, running, state, model=model)
    small = from_linen(module.clone(**{key: tuple(value) for key, value in node.items()}))
    masked = step.decode(stored, state)
    calls = (
        jax.jit(lambda x: model.apply(masked, running, x)[0].logits),
        jax.jit(lambda x: small.apply(stored, less, x)[0].logits),
    )
    counts = tuple(sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (params, stored))
    return shape, calls, counts


def timed(calls: tuple[Any, Any], inputs: Any, repeats: int) -> tuple[list[float], float]:
    """p50 of each in milliseconds, and the largest difference of their outputs."""
    import jax
    import numpy as np

    outputs = [np.asarray(jax.block_until_ready(call(inputs))) for call in calls]
    times: list[list[float]] = [[], []]
    for i in range(repeats + 5):
        for own, call in zip(times, calls, strict=True):
            started = time.perf_counter()
            jax.block_until_ready(call(inputs))
            if i >= 5:
                own.append((time.perf_counter() - started) * 1e3)
    return [float(np.median(own)) for own in times], float(abs(outputs[0] - outputs[1]).max())


def main() -> None:
    parser = _common.options(__doc__)
    parser.add_argument("--calls", type=int, default=200)
    parser.add_argument("--networks", type=_common.names(NETWORKS), default=NETWORKS)
    arguments = parser.parse_args()
    _common.keep_to(1)
    import numpy as np

    rows = []
    for name in arguments.networks:
        shape, calls, (full, left) = pair(name)
        for batch in BATCHES:
            inputs = np.random.default_rng(0).normal(size=(batch, *shape)).astype(np.float32)
            repeats = arguments.calls if batch == 1 else max(10, arguments.calls // 10)
            (masked, cut), difference = timed(calls, inputs, repeats)
            row = {"network": name, "batch": batch, "parameters": [full, left], "masked_ms": masked, "cut_ms": cut}
            rows.append({**row, "ratio": masked / cut, "difference": difference, "calls": repeats})
            print(f"{name:9} batch {batch:3}: {full} -> {left} parameters, {masked:.3f} -> {cut:.3f} ms, {masked / cut:.2f}x")
    _common.report({"rows": rows}, arguments.out)


if __name__ == "__main__":
    main()
