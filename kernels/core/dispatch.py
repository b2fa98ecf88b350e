"""Which implementation runs, with which config, and why.

``decide`` is the whole policy:

1. An implementation asked for by name (argument, then `use_implementation`, then the environment
   variable ``ML_NETWORKS_IMPLEMENTATION``) runs, or the error lists every reason it cannot.
2. On a CPU, and in float64, the plain framework path.
3. A tuning record (see `core.records` for the order), whose winner may be the plain path.
4. The spec's heuristic.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, get_args

from . import records, registry
from .device import Device
from .errors import TuningMissError, UnsupportedImplementationError, unknown_name
from .problem import Problem
from .registry import Binding, Framework
from .setting import Setting

Policy = Literal["off", "on_miss", "error"]
ENVIRONMENT = "ML_NETWORKS_IMPLEMENTATION"
IMPLEMENTATIONS = ("torch", "triton", "xla", "pallas", "mosaic_gpu")


@dataclass(frozen=True)
class Decision:
    """The answer of `decide`, as data.

    ``source`` is where the choice came from, ``why`` a sentence, ``against`` the reasons against
    each implementation that could not run, ``record`` the tuning record used, if any.
    """

    op: str
    direction: str
    implementation: str
    config: Any
    source: str
    why: str
    against: tuple[tuple[str, tuple[str, ...]], ...] = ()
    record: records.Record | None = None


Overrides = tuple[tuple[str | None, str], ...]
_context: Setting[Overrides] = Setting(())
_policy: Setting[Policy] = Setting("off")


def _checked(implementation: str) -> str:
    if implementation != "auto" and implementation not in IMPLEMENTATIONS:
        raise unknown_name("implementation", implementation, (*IMPLEMENTATIONS, "auto"))
    return implementation


@contextmanager
def use_implementation(implementation: str, *ops: str) -> Iterator[None]:
    """Run ``implementation`` for ``ops`` (for all ops when none is named) inside the block.

    A name that a framework does not have ("triton" in JAX) leaves that framework alone. "auto"
    undoes an outer block. The argument ``implementation=`` of a call is stronger.

    Raises
    ------
    UnknownNameError
        For an op or implementation that does not exist.
    """
    _checked(implementation)
    named: tuple[str | None, ...] = tuple(registry.get(op).name for op in ops) or (None,)
    with _context.during((*((op, implementation) for op in named), *_context.value)):
        yield


@contextmanager
def tuning_policy(policy: Policy) -> Iterator[None]:
    """What a missing tuning record does on an accelerator inside the block: ``off`` (the default:
    take the heuristic), ``on_miss`` (tune this problem now) or ``error``.

    Raises
    ------
    UnknownNameError
        For any other policy.
    """
    if policy not in get_args(Policy):
        raise unknown_name("tuning policy", policy, get_args(Policy))
    with _policy.during(policy):
        yield


@lru_cache(maxsize=16)
def _environment(text: str) -> Overrides:
    """``"triton"`` for all ops, or ``"attention=torch,focal_frequency_loss=triton"``."""
    overrides: list[tuple[str | None, str]] = []
    for entry in filter(None, (part.strip() for part in text.split(","))):
        op, equals, implementation = entry.rpartition("=")
        name = registry.get(op).name if equals else None
        overrides.append((name, _checked(implementation)))
    return tuple(sorted(overrides, key=lambda override: override[0] is None))


def _asked_for(
    op: str, implementations: tuple[str, ...], argument: str | None
) -> tuple[str | None, str]:
    """The implementation asked for (None = auto) and where it was asked for."""
    if argument is not None:
        if argument != "auto" and argument not in implementations:
            raise unknown_name(f"implementation of {op}", argument, (*implementations, "auto"))
        return (None if argument == "auto" else argument), "argument"
    text = os.environ.get(ENVIRONMENT, "")
    for overrides, source in (
        (_context.value, "use_implementation"),
        (_environment(text) if text else (), ENVIRONMENT),
    ):
        for name, implementation in overrides:
            if name in (None, op) and implementation in (*implementations, "auto"):
                return (None if implementation == "auto" else implementation), source
    return None, ""


def is_overridden(binding: Binding, argument: str | None) -> bool:
    """Whether an implementation is asked for by name: cheap enough for every eager call."""
    if argument is None and not _context.value and not os.environ.get(ENVIRONMENT):
        return False
    return _asked_for(binding.op, binding.implementations, argument)[0] is not None


def decide(
    problem: Problem, device: Device, binding: Binding, implementation: str | None = None
) -> Decision:
    """Which implementation of ``binding`` runs ``problem`` on ``device``, and why.

    Parameters
    ----------
    implementation
        The caller's ``implementation=`` argument; None or "auto" leaves the choice open.

    Raises
    ------
    UnknownNameError
        For an implementation that does not exist.
    UnsupportedImplementationError
        If the one asked for cannot run; the message lists shapes, dtype, device and reasons.
    TuningMissError
        Under ``tuning_policy("error")`` when no record fits.
    """
    asked, source = _asked_for(problem.op, binding.implementations, implementation)
    policy = _policy.value
    decision = _decide(problem, device, binding, asked, source, policy, records.overlay_token())
    if policy == "on_miss" and decision.source == "heuristic" and device.platform != "cpu":
        from . import tuner

        tuner.tune_problem(problem, device, binding)
        return _decide(problem, device, binding, asked, source, "off", records.overlay_token())
    return decision


def reasons_against(
    problem: Problem, device: Device, binding: Binding
) -> dict[str, tuple[str, ...]]:
    """The reasons against each implementation; the plain path has none."""
    spec = registry.get(problem.op).spec
    against = {}
    for implementation in binding.implementations[1:]:
        reasons = []
        if device.platform == "cpu" and not device.interpreted:
            reasons.append(
                f"{implementation} needs a GPU and the data is on a CPU (tests run it there in "
                "its interpreter)"
            )
        if problem.dtype == "float64":
            reasons.append("float64 always takes the plain path")
        reasons += spec.not_supported_reasons(problem, implementation, device)
        against[implementation] = tuple(reasons)
    return against


def _refusal(problem: Problem, device: Device, implementation: str, reasons: Any) -> str:
    listed = "".join(f"\n  - {reason}" for reason in reasons)
    return f"{implementation!r} cannot run {problem} on {device.name} ({device.target}):{listed}"


@lru_cache(maxsize=4096)
def _decide(
    problem: Problem,
    device: Device,
    binding: Binding,
    asked: str | None,
    asked_in: str,
    policy: Policy,
    overlay: object,
) -> Decision:
    op = registry.get(problem.op)
    against = reasons_against(problem, device, binding)
    listed = tuple((name, reasons) for name, reasons in against.items() if reasons)

    def decision(implementation: str, config: Any, source: str, why: str, **more: Any) -> Decision:
        return Decision(
            problem.op, problem.direction, implementation, config, source, why, listed, **more
        )

    able = tuple(name for name in binding.implementations if not against.get(name))
    if asked is not None:
        if asked not in able:
            reasons = against[asked]
            raise UnsupportedImplementationError(_refusal(problem, device, asked, reasons))
        for found in records.candidates(op, problem, device, binding.framework):
            if found.record.implementation == asked:
                why = f"asked for by {asked_in}, config: {found.source}"
                config = found.record.instantiate(op.spec)
                return decision(asked, config, asked_in, why, record=found.record)
        config = op.spec.heuristic(problem, device, (asked,)).config
        return decision(asked, config, asked_in, f"asked for by {asked_in}")
    if device.platform == "cpu":
        return decision(binding.plain, None, "cpu", "on a CPU the plain path is the fastest")
    if problem.dtype == "float64":
        return decision(binding.plain, None, "float64", "float64 takes the plain path")
    for found in records.candidates(op, problem, device, binding.framework):
        record = found.record
        if record.implementation in able:
            gain = record.plain.p50 / record.winner.p50
            why = f"{found.source}: {gain:.2f}x the plain path on {record.date}"
            config = record.instantiate(op.spec)
            return decision(record.implementation, config, found.source, why, record=record)
    if policy == "error":
        raise TuningMissError(
            f"no tuning record for {problem} on {device.name}; run `ml-networks tune "
            f"{problem.op}`, or set the policy to 'off'"
        )
    choice = op.spec.heuristic(problem, device, able)
    return decision(choice.implementation, choice.config, "heuristic", choice.why)


records.on_change(_decide.cache_clear)


def explain(
    op: str,
    dims: Mapping[str, int],
    *,
    dtype: str = "float32",
    flags: Mapping[str, Any] | None = None,
    direction: str | None = None,
    framework: Framework = "torch",
    device: Device | None = None,
    implementation: str | None = None,
) -> Decision:
    """What would run for these sizes, without running it.

    Parameters
    ----------
    op
        Name of the op, e.g. ``"focal_frequency_loss"``.
    dims
        The op's tuning dimensions; each op's ``spec.DIMENSIONS`` names them.
    direction
        One of ``spec.DIRECTIONS``; the first by default.
    device
        Where; the framework's current device by default, any of `core.device.TARGETS` if given.

    Returns
    -------
    Decision
        The choice, its source and the reasons against the others.

    Raises
    ------
    UnknownNameError
        For an unknown op, dimension, direction or implementation.
    """
    found = registry.get(op)
    problem = problem_of(op, dims, dtype=dtype, flags=flags, direction=direction)
    if device is None:
        device = current_device(framework)
    return decide(problem, device, found.binding(framework), implementation)


def problem_of(
    op: str,
    dims: Mapping[str, int],
    *,
    dtype: str = "float32",
    flags: Mapping[str, Any] | None = None,
    direction: str | None = None,
) -> Problem:
    """A `Problem` from names and sizes typed by a person, each checked.

    Raises
    ------
    UnknownNameError
        For an unknown op, dimension, dtype or direction.
    ValueError
        For a missing or negative dimension.
    """
    from .problem import DTYPES

    spec = registry.get(op).spec
    for name in dims:
        if name not in spec.DIMENSIONS:
            raise unknown_name(f"dimension of {op}", name, spec.DIMENSIONS)
    missing = [name for name in spec.DIMENSIONS if name not in dims]
    if missing:
        raise ValueError(f"{op} needs the dimensions {', '.join(missing)} too")
    for name, size in dims.items():
        if size < 0:
            raise ValueError(f"dimension {name} is {size}; it must not be negative")
    if dtype not in DTYPES:
        raise unknown_name("dtype", dtype, DTYPES)
    if direction is not None and direction not in spec.DIRECTIONS:
        raise unknown_name(f"direction of {op}", direction, spec.DIRECTIONS)
    ordered = tuple((name, dims[name]) for name in spec.DIMENSIONS)
    return Problem(
        op, ordered, dtype, tuple((flags or {}).items()), direction or spec.DIRECTIONS[0]
    )


def current_device(framework: Framework) -> Device:
    """The device that ``framework`` computes on by default."""
    from . import device

    if framework == "jax":
        return device.jax_device()
    import torch

    return device.torch_device(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
