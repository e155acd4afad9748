"""What a search varies and what it wants: Hydra's sweep syntax as Optuna's distributions, objectives as paths into a result."""

import dataclasses
import math
from collections.abc import Sequence
from decimal import Decimal
from typing import Any, Literal

from jdistill.errors import UsageError, did_you_mean

SECTIONS = {
    "validation": ("metrics", "validation"),
    "test": ("metrics", "test"),
    "train": ("metrics", "train"),
    "size": ("size",),
    "latency_ms": ("latency_ms",),
    "time_s": ("time_s",),
}
"""First word of an objective -> where it is in `result.json`."""
Direction = Literal["maximize", "minimize"]
DIRECTIONS: dict[str, Direction] = {"max": "maximize", "min": "minimize"}


@dataclasses.dataclass(frozen=True)
class Objective:
    """A number of a run's result that is to be large or small.

    Attributes:
      path: its keys, such as ("validation", "accuracy").
      direction: `maximize` or `minimize`.
    """

    path: tuple[str, ...]
    direction: Direction

    def __str__(self) -> str:
        return f"{'.'.join(self.path)}:{self.direction[:3]}"

    @property
    def section(self) -> str:
        return self.path[0]

    def value(self, result: dict[str, Any]) -> float:
        """The number in `result`.

        Raises:
          UsageError: there is none.
        """
        found: Any = result
        for key in (*SECTIONS[self.section], *self.path[1:]):
            if not isinstance(found, dict) or key not in found:
                known = sorted(found) if isinstance(found, dict) else []
                raise UsageError(
                    f"hydra.sweeper.objectives: results have no '{'.'.join(self.path)}'{did_you_mean(key, known)}"
                    f" (known here: {', '.join(known) or 'nothing'})"
                )
            found = found[key]
        if not isinstance(found, int | float) or isinstance(found, bool):
            inside = f"; it holds {', '.join(sorted(found))}" if isinstance(found, dict) else ""
            raise UsageError(f"hydra.sweeper.objectives: '{'.'.join(self.path)}' is not a number{inside}")
        return float(found)


def read_objectives(texts: Sequence[str], allow_test: bool) -> tuple[Objective, ...]:
    """`["validation.accuracy:max", "size.bytes:min"]` as objectives.

    Raises:
      UsageError: a text is no objective, or looks at test data without `allow_test`.
    """
    objectives = []
    for text in texts:
        path, _, direction = str(text).rpartition(":")
        keys = tuple(path.removeprefix("metrics.").split("."))
        if direction not in DIRECTIONS or len(keys) < 2:
            raise UsageError(
                f"hydra.sweeper.objectives: '{text}' must be PATH:max or PATH:min, such as validation.accuracy:max"
            )
        if keys[0] not in SECTIONS:
            hint = did_you_mean(keys[0], SECTIONS)
            raise UsageError(f"hydra.sweeper.objectives: unknown '{keys[0]}' in '{text}'{hint} (known: {', '.join(SECTIONS)})")
        if keys[0] == "test" and not allow_test:
            raise UsageError(
                f"hydra.sweeper.objectives: '{text}' would choose by test data, whose numbers then say nothing; use"
                f" validation.{'.'.join(keys[1:])}, or hydra.sweeper.allow_test=true"
            )
        objectives.append(Objective(keys, DIRECTIONS[direction]))
    if not objectives or len(set(objectives)) < len(objectives):
        raise UsageError(f"hydra.sweeper.objectives must be one or more different objectives, got {list(texts)}")
    return tuple(objectives)


def read_space(swept: Sequence[Any]) -> dict[str, Any]:
    """Hydra's parsed sweep overrides as key -> distribution.

    `choice(a,b)` and `a,b`: one of the texts; `interval(a,b)`: a real number in [a, b]; `int(interval(a,b))` and
    `range(a,b,step)`: a step of the range (b excluded in `range` as everywhere in Hydra); with `tag(log,...)` uniform
    in the logarithm.

    Raises:
      UsageError: nothing is swept, or a space is empty or impossible.
    """
    space = {}
    for item in swept:
        key = item.get_key_element()
        try:
            space[key] = _distribution(item)
        except ValueError as error:
            raise UsageError(f"{key}={item.get_value_string()}: {error}") from error
    if not space:
        raise UsageError(
            "nothing to search; give a key a space, such as loss.temperature=interval(1,10) or loss=choice(kd,dkd)"
        )
    return space


def _distribution(item: Any) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    sweep = item.value()
    tags: set[str] = getattr(sweep, "tags", set())
    if unknown := sorted(tags - {"log", "int"}):
        raise ValueError(f"unknown tag '{unknown[0]}' (known: int, log)")
    log = "log" in tags
    if item.is_interval_sweep():
        low, high = sweep.start, sweep.end
        if low >= high:
            raise ValueError(f"the interval from {low} to {high} is empty")
        if "int" in tags or (isinstance(low, int) and isinstance(high, int)):
            return IntDistribution(int(low), int(high), log=log)
        return FloatDistribution(float(low), float(high), log=log)
    if item.is_range_sweep():
        low, high, step = _ends(sweep)
        kind = IntDistribution if all(isinstance(value, int) for value in (low, high, step)) else FloatDistribution
        return kind(low, high, log=True) if log else kind(low, high, step=step)
    texts = list(item.sweep_string_iterator())
    if len(set(texts)) < len(texts) or not texts:
        raise ValueError("the choices must be different, and at least one")
    return CategoricalDistribution(texts)


def _ends(sweep: Any) -> tuple[Any, Any, Any]:
    """(lowest value, highest value, step > 0) of Hydra's `range`, which leaves `stop` out; in decimals, without rounding."""
    start, stop, step = (Decimal(str(number)) for number in (sweep.start, sweep.stop, sweep.step))
    count = math.ceil((stop - start) / step) if step else 0
    if count < 1:
        raise ValueError("the range is empty")
    whole = all(isinstance(number, int) for number in (sweep.start, sweep.stop, sweep.step))
    low, high = sorted((start, start + (count - 1) * step))
    return tuple(int(number) if whole else float(number) for number in (low, high, abs(step)))  # type: ignore[return-value]


def suggest(trial: Any, key: str, distribution: Any) -> Any:
    """The value of `key` in `trial`: the one it has, or a new one."""
    from optuna.distributions import CategoricalDistribution, IntDistribution

    if isinstance(distribution, CategoricalDistribution):
        return trial.suggest_categorical(key, distribution.choices)
    kind = trial.suggest_int if isinstance(distribution, IntDistribution) else trial.suggest_float
    return kind(key, distribution.low, distribution.high, step=distribution.step, log=distribution.log)


def override(key: str, value: Any) -> str:
    """A trial's parameter as an override: choices are Hydra's text already, numbers are written without loss."""
    return f"{key}={value if isinstance(value, str) else repr(value)}"


def describe(distribution: Any) -> str:
    """A distribution in one line, equal for equal distributions: `choice(kd,dkd)`, `log float [0.001, 0.1]`."""
    from optuna.distributions import CategoricalDistribution, IntDistribution

    if isinstance(distribution, CategoricalDistribution):
        return f"choice({','.join(map(str, distribution.choices))})"
    kind = "int" if isinstance(distribution, IntDistribution) else "float"
    step = f" step {distribution.step}" if distribution.step not in (None, 1) else ""
    return f"{'log ' if distribution.log else ''}{kind} [{distribution.low}, {distribution.high}]{step}"
