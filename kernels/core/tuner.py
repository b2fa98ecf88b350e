"""Find the fastest implementation and config of a problem, and remember it.

Candidates are the plain path and every config of each implementation that can run. They are
thrown out in this order: by compiling them ahead of time (spills, too much shared memory), by
their numbers (a float64 reference, poisoned outputs), by a short race, by a long one. Each
problem's record is saved before the next begins, so stopping loses at most one.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any

from . import ahead_of_time, dispatch, measure, records, registry, testing, usage
from .device import Device
from .errors import KernelError
from .problem import Case, Problem
from .records import Record, Timing
from .registry import Binding, Framework, Op

DTYPES = ("float32", "bfloat16", "float16")
SIZES = ("small", "ragged", "large")
FINALISTS = 3
_QUICK_SECONDS, _LONG_SECONDS = 0.03, 0.3


@dataclass(frozen=True)
class Candidate:
    """An implementation with one config, None for the plain path."""

    implementation: str
    config: Any = None


@dataclass(frozen=True)
class Tuned:
    """What came of one problem: its record, or None and a ``note`` that says why."""

    problem: Problem
    record: Record | None
    rejected: tuple[tuple[Candidate, str], ...] = ()
    note: str = ""


Compare = Callable[..., dict[Candidate, Timing]]


def problems(
    names: Sequence[str] = (),
    framework: Framework = "torch",
    dtypes: Sequence[str] = DTYPES,
    sizes: Sequence[str] = SIZES,
) -> list[tuple[Op, Case, Problem]]:
    """What `tune` walks through: one problem of each key, the largest first.

    Raises
    ------
    UnknownNameError
        For an op that does not exist.
    """
    found: dict[tuple[Any, ...], tuple[Op, Case, Problem]] = {}
    for op in [registry.get(name) for name in names] or registry.ops().values():
        if not op.has(framework):
            continue
        cases = [case for case in op.spec.CASES if case.size in sizes]
        for case, dtype, direction in itertools.product(cases, dtypes, op.spec.DIRECTIONS):
            problem = case.problem(op.name, dtype, direction)
            key = (op.name, *records.key_of(op.spec, problem, framework))
            found.setdefault(key, (op, case, problem))
    return sorted(found.values(), key=lambda row: -row[0].spec.bytes_moved(row[2]))


def accelerator(framework: Framework) -> Device:
    """The device to tune for.

    Raises
    ------
    KernelError
        If ``framework`` finds no accelerator.
    """
    device = dispatch.current_device(framework)
    if device.platform == "cpu":
        raise KernelError(f"tuning needs an accelerator and {framework} finds none here")
    return device


def tune(
    device: Device,
    names: Sequence[str] = (),
    *,
    framework: Framework = "torch",
    dtypes: Sequence[str] = DTYPES,
    sizes: Sequence[str] = SIZES,
    force: bool = False,
    seconds: float = math.inf,
    compare: Compare = measure.compare,
) -> Iterator[Tuned]:
    """Tune every one of `problems`, one with each step of the iterator. What has a record of the
    present kernels is passed over, unless ``force``; none is begun after ``seconds``.
    """
    start = time.monotonic()
    for op, case, problem in problems(names, framework, dtypes, sizes):
        if time.monotonic() - start > seconds:
            return
        if not force and _is_recorded(op, problem, device, framework):
            yield Tuned(problem, None, note="has a record")
        else:
            binding = op.binding(framework)
            yield tune_problem(problem, device, binding, case=case, compare=compare)


def _is_recorded(op: Op, problem: Problem, device: Device, framework: Framework) -> bool:
    found = records.candidates(op, problem, device, framework)
    return any(row.source in ("user cache", "shipped record") for row in found)


def tune_problem(
    problem: Problem,
    device: Device,
    binding: Binding,
    *,
    case: Case | None = None,
    compare: Compare = measure.compare,
) -> Tuned:
    """Tune one problem and save its record. ``case`` says how to make its inputs, by default with
    the problem's own sizes and flags.

    A direction other than "forward" is timed as a forward and a backward pass together.
    """
    op = registry.get(problem.op)
    case = case or Case("asked", "large", dict(problem.dims), dict(problem.flags))
    plain = Candidate(binding.plain)
    with dispatch.tuning_policy("off"):
        candidates, rejected = prune(op, problem, device, binding)
        if not candidates and not rejected:
            return Tuned(problem, None, note="only the plain path can run")
        try:
            training = problem.direction != "forward"
            load = measure.Workload(op, case, binding.framework, problem.dtype, training)
            functions, wrong = _checked(load, problem, [plain, *candidates])
        except (RuntimeError, MemoryError) as error:
            return Tuned(problem, None, tuple(rejected.items()), f"the plain path fails: {error}")
        rejected |= wrong
        if any(why == _NOT_RUN for why in wrong.values()):
            # Nothing was compared, so nothing must be recorded.
            return Tuned(problem, None, tuple(rejected.items()), _NOT_RUN)
        clock = measure.stopwatch(binding.framework, device)
        times = compare(functions, clock, seconds=_QUICK_SECONDS)
        best = sorted(set(functions) - {plain}, key=lambda c: times[c].p50)[:FINALISTS]
        times = compare({c: functions[c] for c in (plain, *best)}, clock, seconds=_LONG_SECONDS)
    winner = min(times, key=lambda c: times[c].p50)
    record = _record(op, problem, binding, winner, times[winner], times[plain])
    records.save(device, op.name, [record])
    return Tuned(problem, record, tuple(rejected.items()))


def _record(
    op: Op, problem: Problem, binding: Binding, candidate: Candidate, time: Timing, plain: Timing
) -> Record:
    framework, direction, dtype, flags, dims = records.key_of(op.spec, problem, binding.framework)
    config = candidate.config and tuple(dataclasses.asdict(candidate.config).items())
    return Record(
        framework=framework,
        direction=direction,
        dtype=dtype,
        dims=dims,
        flags=flags,
        implementation=candidate.implementation,
        config=config,
        winner=time,
        plain=plain,
        versions=tuple(measure.versions(binding.framework).items()),
        kernel_hash=records.kernel_hash(op, binding.framework),
        date=datetime.now(UTC).date().isoformat(),
    )


def prune(
    op: Op, problem: Problem, device: Device, binding: Binding
) -> tuple[list[Candidate], dict[Candidate, str]]:
    """The candidates worth running and why the others are not, told by compiling them."""
    against = dispatch.reasons_against(problem, device, binding)
    able = [
        Candidate(implementation, config)
        for implementation, reasons in against.items()
        if not reasons
        for config in op.spec.search_space(problem, device, implementation)
    ]
    if device.interpreted:
        return able, {}

    def complaints(candidate: Candidate) -> str:
        if candidate.implementation != "triton":
            return ""
        found = ahead_of_time.inspect(op, problem, device, candidate.config)
        return "; ".join(f"{r.kernel} {text}" for r in found for text in r.complaints)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        texts = list(pool.map(complaints, able))
    rejected = {c: why for c, why in zip(able, texts, strict=True) if why}
    return [c for c in able if c not in rejected], rejected


_NOT_RUN = "this direction was not dispatched, so its config could not be forced"


def _checked(
    load: measure.Workload, problem: Problem, candidates: list[Candidate]
) -> tuple[dict[Candidate, measure.Function], dict[Candidate, str]]:
    """What to time: the candidates whose numbers are right, the plain path first, and what is
    wrong with the others. The plain path sets the tolerance as in `core.testing`.
    """
    functions: dict[Candidate, measure.Function] = {}
    rejected: dict[Candidate, str] = {}
    allowed: dict[str, float] = {}
    for candidate in candidates:
        # An overlay record makes dispatch take this config.
        nothing = Timing(1.0, 1.0, 1.0)
        record = _record(load.op, problem, load.binding, candidate, nothing, nothing)
        overlay = partial(records.overlay, problem.op, record)
        try:
            with overlay(), load.side.running(), usage.record() as ran:
                errors = load.errors(load.run(candidate.implementation))
        except Exception as error:
            if not allowed:
                raise
            rejected[candidate] = f"{type(error).__name__}: {error}"
            continue
        if not allowed:
            rounding = testing.ULPS * testing.EPSILON[problem.dtype]
            allowed = {name: 2 * error + rounding for name, error in errors.items()}
        elif not any(
            (row.direction, row.implementation) == (problem.direction, candidate.implementation)
            and "overlay" in row.why
            for row in ran.rows
        ):
            rejected[candidate] = _NOT_RUN
            continue
        outcomes = [testing.Outcome(name, error, allowed[name]) for name, error in errors.items()]
        wrong = "; ".join(str(outcome) for outcome in outcomes if not outcome.ok)
        if wrong and functions:
            rejected[candidate] = wrong
        else:
            functions[candidate] = _ready(load.function(candidate.implementation), load, overlay)
    return functions, rejected


def _ready(
    function: measure.Function,
    load: measure.Workload,
    overlay: Callable[[], AbstractContextManager[None]],
) -> measure.Function:
    def forced() -> Any:
        with overlay():
            return function()

    return measure.graphed(forced) if load.framework == "torch" else forced
