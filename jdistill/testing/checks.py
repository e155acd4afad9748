"""What every loss must do, one function a property; `jdistill.testing` runs them."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jdistill.errors import UsageError
from jdistill.losses.base import Loss
from jdistill.pytrees import as_leaves
from jdistill.sampling import Known
from jdistill.testing.derivatives import hold_stopped, slopes
from jdistill.testing.problem import SIZE, Arrays, Problem, Weights, make_problem
from jdistill.testing.requests import draw_requests, known_with, recommender
from jdistill.testing.schemes import Refused, describe, settings, train_under
from jdistill.testing.subject import EXTREME, QUICK, Subject, equal_networks, extremes, mean_of, value_and_gradients
from jdistill.types import Outputs, PyTree


class Unmet(Exception):
    """A property does not hold; the message says what was found and what was expected."""


class Skipped(Exception):
    """A property does not apply; the message says why."""


def shapes(subject: Subject) -> str:
    """Values [B], in float32 where the outputs are float32 or bfloat16; what it draws are `drawn` items a row."""
    if subject.loss.drawn:
        _drawn(subject)
    for dtype in (jnp.float32, jnp.bfloat16):
        problem = subject.of(3, dtype)
        values, _ = jax.eval_shape(problem.evaluate, problem.params, problem.state, problem.arrays)
        found = f"{getattr(values, 'dtype', type(values).__name__)}{list(np.shape(values))}"
        if found != f"float32[{SIZE}]":
            raise Unmet(f"values are {found} for outputs in {jnp.dtype(dtype).name}, expected float32[{SIZE}]: one an example")
    return "values [B], float32"


def _drawn(subject: Subject) -> None:
    """What `draw` gives: [B, drawn] int32, numbers of items."""
    assert subject.shop is not None
    batch, expected = draw_requests(0, 2, subject.shop), f"int32[{SIZE}, {subject.loss.drawn}]"
    teacher = recommender(subject.shop) if subject.given else None
    items = subject.loss.draw(jax.random.key(7), known_with(subject.shop, teacher), batch["inputs"]["user"])
    found = f"{items.dtype}{list(items.shape)}"
    if found != expected:
        raise Unmet(f"draw gives {found}, expected {expected}: `drawn` items a row")
    if not ((items >= 0) & (items < subject.shop.items)).all():
        raise Unmet(f"draw gives {items.min()} to {items.max()}, expected numbers of the {subject.shop.items} items")


def state(subject: Subject) -> str:
    """The next state has the structure, shapes and types of the first, and is finite."""
    problem = subject.plain
    _, after = jax.eval_shape(problem.evaluate, problem.params, problem.state, problem.arrays)
    found, expected = (
        {jax.tree_util.keystr(path): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in jax.tree.leaves_with_path(tree)}
        for tree in (after, jax.eval_shape(lambda: problem.state))
    )
    if found != expected:
        different = sorted(key for key in found | expected if found.get(key) != expected.get(key))
        key = different[0]
        raise Unmet(f"the next state's {key} is {found.get(key, 'absent')}, expected {expected.get(key, 'absent')} as before")
    return "none" if not expected else "keeps its structure"


def finite(subject: Subject) -> str:
    """Values and gradients are finite at outputs of +-1e4, of zeros and at the teacher's, in float32 and bfloat16."""
    settings = [(3, jnp.float32), (3, jnp.bfloat16)]
    if subject.shop is None and ("student.logits" in subject.reads or subject.calls_a_network):
        settings.append((1, jnp.float32))
    refused = ""
    for classes, dtype in settings:
        plain = (classes, dtype) == (3, jnp.float32)
        try:
            problem = subject.of(classes, dtype)
        except UsageError:
            if classes > 1:
                raise
            refused = "; one logit is refused"
            continue
        program = subject.at_plain if plain else value_and_gradients(problem, quick=True)
        for where, arrays in extremes(problem):
            (_, (values, after)), gradients = program(problem.params, problem.state, arrays)
            for what, tree in (("values", values), ("state", after), ("gradients", gradients)):
                if bad := _not_finite(tree):
                    raise Unmet(f"{what}{bad} at {where}, {jnp.dtype(dtype).name}, K = {classes}; expected finite numbers")
    return f"at +-{EXTREME:g}, zeros and the teacher's outputs{refused}"


def gradients(subject: Subject) -> str:
    """In float64 they are those of finite differences, with what the loss itself stops held fixed."""
    notes = ""
    with jax.enable_x64(True):
        problem, program = subject.wide
        arrays = problem.arrays
        if isinstance(arrays.student, Outputs):
            arrays = arrays._replace(student=_noisy(arrays.student))
        at = problem.params, arrays.student
        (value, _), both = program(problem.params, problem.state, arrays)

        def total(params: PyTree, student: PyTree) -> Any:
            return mean_of(problem, params, problem.state, arrays._replace(student=student))[0]

        def compiled(params: PyTree, student: PyTree) -> Any:
            return program(params, problem.state, arrays._replace(student=student))[0][0]

        for which, what in enumerate(("parameters", "student")):
            if not jax.tree.leaves(at[which]):
                continue
            found, expected = _slopes(compiled, both[which], at, which)
            if not _agree(found, expected, value) and (held := hold_stopped(total, *at)) is not None:
                found, expected = _slopes(held, both[which], at, which)
                notes = ", with what it stops held fixed"
            if not _agree(found, expected, value):
                raise Unmet(f"the slope along the {what} is {found:.8g}, expected {expected:.8g} by finite differences")
    return f"finite differences agree{notes}"


def teacher_gradient(subject: Subject) -> str:
    """No gradient reaches the teacher.

    Training hands over its outputs and parameters stopped, so this holds unless a loss reaches a teacher by another way.
    """
    with jax.enable_x64(True):
        problem, program = subject.wide
        if not problem.teacher_given:
            raise Skipped("it has no teacher")
        _, (_, _, of_teacher) = program(problem.params, problem.state, problem.arrays)
    largest = max(float(np.abs(np.asarray(leaf)).max()) for leaf in jax.tree.leaves(of_teacher))
    if largest > 0:
        raise Unmet(f"a gradient of {largest:.3g} reaches the teacher, expected 0")
    return "none"


def zero_at_teacher(subject: Subject) -> str:
    """Values are 0 where the student's outputs are the teacher's, or are not, as declared."""
    problem, declared = subject.plain, subject.loss.zero_at_teacher
    values = subject.at_plain(problem.params, problem.state, equal_networks(problem))[0][1][0]
    largest = float(np.abs(values).max())
    tolerance = 1e-5 * max(float(np.abs(subject.first).max()), 0.1)
    if declared and not largest <= tolerance:
        raise Unmet(f"zero_at_teacher = True, but values reach {largest:.3g} at the teacher's outputs, expected 0")
    if not declared and largest <= tolerance and subject.is_default:
        raise Unmet("zero_at_teacher = False, but values are 0 at the teacher's outputs; declare True")
    return "0 at the teacher" if declared else "declared not to be"


def jit(subject: Subject) -> str:
    """Compiled values are those computed one operation at a time, twice alike."""
    with jax.enable_x64(True):
        problem, program = subject.wide
        (_, (compiled, _)), _ = program(problem.params, problem.state, problem.arrays)
        eager, again = (problem.evaluate(problem.params, problem.state, problem.arrays)[0] for _ in range(2))
    if not np.array_equal(eager, again):
        raise Unmet(f"two calls with the same key differ by {_apart(eager, again):.3g}; draw random numbers from context.key")
    if not _close(compiled, eager, 1e-6):
        raise Unmet(f"compiled values differ from eager ones by {_apart(compiled, eager):.3g}, expected at most rounding")
    return "compiled = eager"


def no_recompile(subject: Subject) -> str:
    """Another number is the same program."""
    if baked := [name for name in _static_floats(subject.loss) if not _is_structure(subject.loss, name)]:
        raise Unmet(f"{baked[0]} is a number but static, so each value is a program of its own; make it a plain float field")
    members, traces = _members(subject.loss), [0]
    with jax.enable_x64(True):
        problem, _ = subject.wide

        @functools.partial(jax.jit, compiler_options=QUICK)
        def values(loss: Loss, *arrays: PyTree) -> Any:
            traces[0] += 1
            return _with_numbers(problem, loss, *arrays)

        loop = [values(member, problem.params, problem.state, problem.arrays) for member in members]
    if traces[0] > 1:
        raise Unmet(f"{len(members)} settings of its numbers took {traces[0]} programs, expected 1")
    subject.notes["loop"] = np.stack(loop)
    return f"{len(jax.tree.leaves(subject.loss))} numbers, one program"


def vmap(subject: Subject) -> str:
    """Several settings of the numbers at once are those settings one by one."""
    members = _members(subject.loss)
    if "loop" not in subject.notes:
        raise Skipped("its numbers cannot be traced; see no_recompile")
    loop = subject.notes["loop"]
    with jax.enable_x64(True):
        problem, _ = subject.wide
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)
        several = jax.vmap(functools.partial(_with_numbers, problem), in_axes=(0, None, None, None))
        compiled = jax.jit(several, compiler_options=QUICK)
        together = compiled(stacked, problem.params, problem.state, problem.arrays)
    if not _close(together, loop, 1e-6):
        raise Unmet(f"values under vmap differ from a loop's by {_apart(together, loop):.3g}, expected at most rounding")
    return f"{len(members)} settings at once"


def sharded(subject: Subject) -> str:
    """A batch spread over devices gives the values and gradients of one device."""
    count = max(n for n in range(1, min(SIZE, len(jax.devices())) + 1) if SIZE % n == 0)
    if count == 1:
        raise Skipped("one device; XLA_FLAGS=--xla_force_host_platform_device_count=2 makes two of a CPU")
    problem = subject.plain
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:count]), ("batch",))
    spread, copied = (jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes)) for axes in (("batch",), ()))

    def place(tree: PyTree) -> PyTree:
        return jax.device_put(tree, copied if isinstance(tree, Weights | Known) else spread)

    one = subject.at_plain(problem.params, problem.state, problem.arrays)
    arrays = Arrays(*map(place, problem.arrays))
    several = subject.at_plain(*jax.device_put((problem.params, problem.state), copied), arrays)
    for what, a, b in (("values", one[0][1][0], several[0][1][0]), ("gradients", one[1], several[1])):
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
            if not _close(np.asarray(x), np.asarray(y), 1e-4):
                raise Unmet(f"{what} on {count} devices differ from one's by {_apart(x, y):.3g}, expected at most rounding")
    return f"{count} devices = one"


def per_example(subject: Subject) -> str:
    """An example's value depends on the others of its batch, or does not, as declared."""
    declared, first = subject.loss.per_example, subject.first
    moved, size = _moved(subject.plain, subject.at_plain, subject), max(float(np.abs(first).max()), 1e-30)
    if declared and not moved <= 1e-5 * size:
        raise Unmet(f"per_example = True, but a value moves by {moved:.3g} of {size:.3g} with the other examples, expected 0")
    if declared:
        return "others change nothing"
    if moved <= 1e-7 * size and subject.is_default and not subject.calls_a_network:
        unlike = subject.problem(models=subject.pair((True, 4), (True, 6)))  # some add a layer between other widths
        if _moved(unlike, value_and_gradients(unlike), subject) <= 1e-7 * size:
            raise Unmet("per_example = False, but a value does not move with the other examples; declare True")
    return "relational, as declared"


def _moved(problem: Problem, program: Any, subject: Subject) -> float:
    """By how much the value of the last row changes with the others; what counts once in a batch counts in an earlier row."""
    one, other = (
        program(problem.params, problem.state, arrays)[0][1][0] for arrays in (problem.arrays, subject.another_batch(problem))
    )
    return abs(float(one[-1] - other[-1]))


def needs_teacher(subject: Subject) -> str:
    """Without a teacher: a clear error, or none at all, as declared."""
    if not subject.loss.needs_teacher:
        if not subject.runs_without_teacher:
            raise Unmet("needs_teacher = False, but it cannot be evaluated without one; declare True")
        return "runs without one, as declared"
    problem = subject.plain
    student = jax.eval_shape(problem.as_tables, problem.weights).student
    try:
        subject.loss.init(jax.random.key(0), student, None)
    except UsageError as error:
        if "teacher" in str(error):
            return "without one it says so"
        raise Unmet(f"init without a teacher says '{error}', expected a UsageError that names the teacher") from error
    except Exception as error:
        raise Unmet(f"init without a teacher raises {one_line(error)}, expected a UsageError") from error
    if not any(name.startswith("teacher") for name in subject.reads):
        raise Unmet("needs_teacher = True, but nothing of a teacher is read; declare False")
    raise Unmet("init accepts that there is no teacher, expected a UsageError (see jdistill.losses.base)")


def declared(subject: Subject) -> str:
    """`calls_networks`, `reads_initial` and `reads_requests` are true."""
    loss, asks = subject.loss, subject.shop is not None and not subject.runs_on_classes
    calls = "teacher_network" in subject.reads
    reads = any(name.startswith("initial") for name in subject.reads)
    for attribute, used in (("calls_networks", calls), ("reads_initial", reads), ("reads_requests", asks)):
        says = bool(getattr(loss, attribute))
        if says != used and (used or subject.is_default):
            does = "it does" if used else "it does not"
            raise Unmet(f"{attribute} = {says}, but {does}; declare {attribute} = {used}")
    listed = ("calls_networks", "reads_initial", *(["reads_requests"] if asks else []))
    return ", ".join(f"{attribute} = {bool(getattr(loss, attribute))}" for attribute in listed)


def networks(subject: Subject) -> str:
    """With networks without maps (of requests: without embeddings), and with unlike ones, it works or says that it cannot."""
    maps = "maps" if subject.shop is None else "embeddings"
    kinds = {f"networks without {maps}": ((False, 7), (False, 9)), "networks of other widths": ((True, 5), (True, 8)),
             f"{maps} and no {maps}": ((True, 5), (False, 9))}  # fmt: skip
    refused = []
    for name, pair in kinds.items():
        try:
            problem = subject.problem(tables=False, models=subject.pair(*pair))
            values, _ = jax.eval_shape(problem.evaluate, problem.params, problem.state, problem.arrays)
        except UsageError:
            refused.append(name)
            continue
        except Exception as error:
            raise Unmet(f"{name}: {one_line(error)}; expected values, or a UsageError from init") from error
        if np.shape(values) != (SIZE,):
            raise Unmet(f"{name}: values are {list(np.shape(values))}, expected [{SIZE}]")
    return f"it refuses {', '.join(refused)}" if refused else "of all kinds"


def schemes(subject: Subject) -> str:
    """It trains under every scheme: its stages are traced, and with `execute` a step of each is taken."""
    problems, refused, tried = [], [], 0
    for setting in settings(subject.loss):
        tried += 1
        try:
            train_under(setting, subject.loss, subject.execute)
        except Refused:
            refused.append(describe(setting))
        except Exception as error:
            problems.append(f"scheme={describe(setting)}: {one_line(error)}")
    if problems:
        raise Unmet("; ".join(problems))
    why = "it adapts the student, so it refuses" if subject.shop is None else "on requests refused under"
    but = f"; {why} {', '.join(refused)}" if refused else ""
    return f"{tried - len(refused)} settings of all schemes{'' if subject.execute else ', traced'}{but}"


def one_line(error: Exception) -> str:
    """The class and the first line of an error."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def _members(loss: Loss) -> list[Any]:
    """The loss with its numbers, and with two other settings of them."""
    first = as_leaves(loss)
    if not jax.tree.leaves(first):
        raise Skipped("it has no numbers")
    return [jax.tree.map(lambda leaf, i=i: jnp.where(leaf == 0, 0.05 * i, leaf * (1 - 0.1 * i)), first) for i in range(3)]


def _with_numbers(problem: Problem, loss: Any, params: PyTree, state: PyTree, arrays: Arrays) -> Any:
    """Values of `loss`, one with other numbers than the problem's; it draws with them as well."""
    return dataclasses.replace(problem, loss=loss).evaluate(params, state, arrays)[0]


def _static_floats(loss: Any) -> Iterator[str]:
    for field in dataclasses.fields(loss):
        if field.metadata.get("static") and isinstance(getattr(loss, field.name), float):
            yield field.name


def _is_structure(loss: Any, name: str) -> bool:
    """Whether a number decides on the shapes of the loss's parameters or state: half of it, or twice, gives others."""

    def sizes(number: float) -> list[tuple[int, ...]]:
        problem = make_problem(dataclasses.replace(loss, **{name: number}))
        return [np.shape(leaf) for leaf in jax.tree.leaves((problem.params, problem.state))]

    number, found = getattr(loss, name), []
    for other in (number / 2, number * 2):
        with contextlib.suppress(UsageError):
            found.append(sizes(other) != sizes(number))
    return any(found)


def _not_finite(tree: PyTree) -> str | None:
    """Where in a tree a number is not finite; None where all are."""
    for path, leaf in jax.tree.leaves_with_path(tree):
        if jnp.issubdtype(leaf.dtype, jnp.floating) and not np.all(np.isfinite(np.asarray(leaf, np.float64))):
            return jax.tree_util.keystr(path)
    return None


def _noisy(outputs: PyTree) -> PyTree:
    """Outputs that no network made: those of a small one are nearly of low rank, where derivatives of factors are large."""
    random = np.random.RandomState(4)
    return jax.tree.map(lambda x: x + 0.5 * random.standard_normal(x.shape), outputs)


def _slopes(function: Any, gradient: PyTree, at: tuple[PyTree, ...], which: int) -> tuple[float, float]:
    """`slopes` along one of the arguments of `function`."""

    def along(moved: PyTree) -> Any:
        return function(*(moved if i == which else other for i, other in enumerate(at)))

    return slopes(along, gradient, at[which], seed=0)


def _agree(found: float, expected: float, value: Any) -> bool:
    """Whether a slope is the one by finite differences, up to what these can tell."""
    return abs(found - expected) <= 1e-5 * abs(expected) + 1e-8 * max(1.0, abs(float(value)))


def _close(a: Any, b: Any, relative: float) -> bool:
    return np.shape(a) == np.shape(b) and _apart(a, b) <= relative * max(float(np.abs(np.asarray(b)).max(initial=0)), 1e-6)


def _apart(a: Any, b: Any) -> float:
    return float(np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)).max(initial=0))
