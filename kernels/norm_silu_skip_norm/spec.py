"""Layer norm, SiLU, skip and layer norm: sizes, limits, cost, and what to run unmeasured.

``rows`` rows of ``width`` elements. The flag ``affine`` says whether the backward pass also makes
the gradients of weights and biases.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ..core.device import Device
from ..core.problem import Case, Choice, Problem

NAME = "norm_silu_skip_norm"
DIMENSIONS = ("rows", "width")
DIRECTIONS = ("forward", "backward")

MAX_COLUMNS = 8192
"""A program holds whole rows; a wider one leaves its registers."""
SMALLEST_COLUMNS = 16

CASES = (
    Case("small", "small", {"rows": 8, "width": 64}),
    Case("ragged", "ragged", {"rows": 37, "width": 23}, {"eps": 1e-3}),
    Case("ragged-wide", "ragged", {"rows": 5, "width": 304}),
    Case("ctm-4", "large", {"rows": 4, "width": 1024}),
    Case("ctm-64", "large", {"rows": 64, "width": 1024}),
    Case("ctm-64-inner", "large", {"rows": 64, "width": 160}),
    Case("ctm-64-all-ticks", "large", {"rows": 3200, "width": 1024}),
    Case("mazes-64", "large", {"rows": 64, "width": 128}),
)


@dataclass(frozen=True)
class Config:
    """``block_rows`` rows a program holds at a time."""

    block_rows: int = 1
    num_warps: int = 4


def padded(size: int) -> int:
    """The power of two that holds ``size``; tiles have such sides."""
    return max(1 << max(size - 1, 0).bit_length(), SMALLEST_COLUMNS)


def bucket(problem: Problem) -> Problem:
    """The tuning key: rows up to a power of two; the width is a model's constant."""
    rows = 1 << max(problem["rows"] - 1, 0).bit_length()
    key = problem.with_dims({"rows": rows, "width": problem["width"]})
    affine = problem.direction == "forward" or bool(problem.flag("affine", True))
    return replace(key, flags=(("affine", affine),))


def bytes_moved(problem: Problem) -> int:
    """Forward: input and skip in, result out. Backward: those and the cotangent in, two gradients
    out. Weights once, their gradients once."""
    weights = 4 * problem["width"] * problem.itemsize
    streams = 3
    if problem.direction == "backward":
        streams = 5
        weights *= 1 + bool(problem.flag("affine", True))
    return streams * problem["rows"] * problem["width"] * problem.itemsize + weights


def flops(problem: Problem) -> int:
    """About: nothing here is limited by arithmetic."""
    each = 30 if problem.direction == "forward" else 60
    return each * problem["rows"] * problem["width"]


def not_supported_reasons(problem: Problem, implementation: str, device: Device) -> list[str]:
    """Why ``implementation`` cannot run ``problem`` on ``device``; empty if it can."""
    columns = padded(problem["width"])
    if implementation in ("triton", "pallas") and columns > MAX_COLUMNS:
        return [
            f"a program holds whole rows of up to {MAX_COLUMNS} elements, here they are {columns}"
        ]
    return []


def heuristic(problem: Problem, device: Device, implementations: tuple[str, ...]) -> Choice:
    """The fused kernels, except on a TPU."""
    fused = next((name for name in implementations if name in ("triton", "pallas")), None)
    plain = next((name for name in implementations if name in ("torch", "xla")), None)
    if fused is None:
        return Choice(plain or implementations[0], None, "no fused kernel can run here")
    if fused == "pallas" and plain is not None and device.platform == "tpu":
        return Choice(plain, None, "XLA fuses row operations on a TPU")
    why = "one kernel reads each row once"
    if problem.direction == "backward":
        why += ", and sums the gradients of weights and biases as it goes"
    return Choice(fused, _config(problem, device), why)


def _config(problem: Problem, device: Device) -> Config:
    """Eight elements a thread, and few rows a program: there are no more rows than samples. A TPU
    block has a multiple of eight rows."""
    columns = padded(problem["width"])
    rows = max(256 // columns, 8 if device.platform == "tpu" else 1)
    return Config(rows, min(max(rows * columns // 256, 1), 16))


def search_space(problem: Problem, device: Device, implementation: str) -> list[Config]:
    """Every config worth timing."""
    columns = padded(problem["width"])
    return [
        Config(rows, warps)
        for rows in (1, 2, 4, 8, 16, 32)
        for warps in (1, 2, 4, 8, 16)
        if 2 * 32 <= rows * columns // warps <= 16 * 32
    ]


def check_arguments(shape: tuple[int, ...], given: dict[str, tuple[int, ...]]) -> None:
    """Raise an error that names the argument that is wrong.

    ``given`` are the shapes of ``skip`` and of weights and biases.
    """
    if not shape or shape[-1] < 1:
        raise ValueError(f"x has shape {shape}; it needs a last axis of at least one element")
    for name, got in given.items():
        wanted = shape if name in ("skip", "out") else shape[-1:]
        if got != wanted:
            raise ValueError(f"{name} has shape {got}; here it must be {wanted}")


def problem_of(
    rows: int, width: int, dtype: str, direction: str, flags: dict[str, Any]
) -> Problem:
    """The `Problem` of a call."""
    dims = ("rows", rows), ("width", width)
    return Problem(NAME, dims, dtype, tuple(flags.items()), direction)
