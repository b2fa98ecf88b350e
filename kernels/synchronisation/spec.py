"""Synchronisation: sizes, limits, cost, and what to run unmeasured.

``pairs`` pairs of ``neurons`` neurons, of ``batch`` samples, over ``ticks`` ticks. The flag
``elapsed`` says how many ticks came before; it costs nothing that could be seen.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ..core.device import Device
from ..core.problem import Case, Choice, Problem

NAME = "synchronisation"
DIMENSIONS = ("ticks", "batch", "neurons", "pairs")
DIRECTIONS = ("forward", "backward")


def _case(name: str, size: Any, sizes: tuple[int, ...], elapsed: int) -> Case:
    return Case(name, size, dict(zip(DIMENSIONS, sizes, strict=True)), {"elapsed": elapsed})


CASES = (
    _case("scan-small", "small", (9, 3, 24, 16), 1),
    _case("scan-ragged", "ragged", (19, 3, 21, 37), 4),
    _case("step-ragged", "ragged", (1, 5, 40, 13), 9),
    _case("ctm-4", "large", (50, 4, 1024, 128), 1),
    _case("ctm-64", "large", (50, 64, 1024, 128), 1),
    _case("ctm-64-step", "large", (1, 64, 1024, 128), 25),
    _case("mazes-64", "large", (50, 64, 128, 64), 1),
)


@dataclass(frozen=True)
class Config:
    """``block`` pairs a program follows through time, ``ticks`` of which it loads at once."""

    block: int = 32
    ticks: int = 16
    num_warps: int = 1


def bucket(problem: Problem) -> Problem:
    """The tuning key: ticks and batch up to a power of two; the others are a model's constants."""
    dims = dict(problem.dims)
    for name in ("ticks", "batch"):
        dims[name] = 1 << max(dims[name] - 1, 0).bit_length()
    return replace(problem.with_dims(dims), flags=())


def bytes_moved(problem: Problem) -> int:
    """Forward: each synchronised neuron in, synchronisation out. Backward: those neurons, the
    result and its cotangent in, the gradient of all neurons out."""
    samples, pairs, neurons = (
        problem["ticks"] * problem["batch"],
        problem["pairs"],
        problem["neurons"],
    )
    read = min(2 * pairs, neurons)
    columns = read + pairs if problem.direction == "forward" else read + 2 * pairs + neurons
    return samples * columns * problem.itemsize


def flops(problem: Problem) -> int:
    """About: nothing here is limited by arithmetic."""
    each = 6 if problem.direction == "forward" else 16
    return each * problem["ticks"] * problem["batch"] * problem["pairs"]


def not_supported_reasons(problem: Problem, implementation: str, device: Device) -> list[str]:
    """Why ``implementation`` cannot run ``problem`` on ``device``; empty if it can."""
    return []


def heuristic(problem: Problem, device: Device, implementations: tuple[str, ...]) -> Choice:
    """The fused kernels, except where XLA's loop starts no kernels."""
    fused = next((name for name in implementations if name in ("triton", "pallas")), None)
    plain = next((name for name in implementations if name in ("torch", "xla")), None)
    if fused is None:
        return Choice(plain or implementations[0], None, "no fused kernel can run here")
    if fused == "pallas" and plain is not None:
        if device.platform == "tpu":
            return Choice(plain, None, "XLA's loop over ticks starts no kernels on a TPU")
        if problem["ticks"] == 1:
            return Choice(plain, None, "XLA makes one kernel of a single tick")
    return Choice(fused, _config(problem, device), "one kernel walks through all ticks")


def _config(problem: Problem, device: Device) -> Config:
    """A pair a thread and a warp a program: the ticks follow each other, so only the number of
    programs hides their latency."""
    at_once = 16 if problem.direction == "forward" else 8
    if device.platform == "cpu":
        at_once = 4  # an interpreter has no latency to hide
    ticks = min(at_once, 1 << max(problem["ticks"] - 1, 0).bit_length())
    if device.platform == "tpu":
        return Config(1024, ticks, 1)
    return Config(64 if device.platform == "hip" else 32, ticks, 1)


def search_space(problem: Problem, device: Device, implementation: str) -> list[Config]:
    """Every config worth timing."""
    most = 1 << max(problem["ticks"] - 1, 0).bit_length()
    return [
        Config(block, ticks, warps)
        for block in (32, 64, 128, 256)
        for ticks in (1, 4, 8, 16, 32)
        for warps in (1, 2, 4)
        if ticks <= most and 32 <= block // warps <= 64
    ]


def check_arguments(
    activations: tuple[int, ...],
    given: dict[str, tuple[int, ...] | None],
    elapsed: int,
) -> None:
    """Raise an error that names the argument that is wrong.

    ``given`` are the shapes of ``left``, ``right``, ``decay`` and ``previous``, None where there
    is none.
    """
    if len(activations) != 3 or not activations[0]:
        raise ValueError(
            f"activations has shape {activations}; it must be (ticks, batch, neurons) with at "
            "least one tick"
        )
    left = given["left"]
    if left is None or len(left) != 1:
        raise ValueError(f"left has shape {left}; it must have one axis, the pairs")
    wanted = {"right": left, "decay": left, "previous": (activations[1], *left)}
    for name, shape in wanted.items():
        if given[name] is not None and given[name] != shape:
            raise ValueError(f"{name} has shape {given[name]}; here it must be {shape}")
    if elapsed < 0:
        raise ValueError(f"elapsed is {elapsed}; it counts ticks and must not be negative")
    if (given["previous"] is None) != (elapsed == 0):
        raise ValueError(
            f"elapsed is {elapsed} and previous is {given['previous'] and 'given'}; give previous "
            "where ticks have elapsed, and only there"
        )


def problem_of(
    activations: tuple[int, ...], pairs: int, dtype: str, direction: str, elapsed: int
) -> Problem:
    """The `Problem` of a call."""
    dims = zip(DIMENSIONS, (*activations, pairs), strict=True)
    return Problem(NAME, tuple(dims), dtype, (("elapsed", elapsed),), direction)
