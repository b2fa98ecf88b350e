"""Norm, activation, dropout and residual: sizes, limits, cost, and what to run unmeasured.

``rows`` rows of ``width`` results each; a gated activation reads rows of twice that. Flags:
``norm``; ``activation``; ``dropout``, its probability; ``residual``, whether there is one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ..core import dropout as counter
from ..core.activations import GATED, check_name
from ..core.device import Device
from ..core.errors import unknown_name
from ..core.problem import Case, Choice, Problem

NAME = "norm_activation"
DIMENSIONS = ("rows", "width")
DIRECTIONS = ("forward", "backward")

NORMS = ("layer", "rms", "none")
MAX_COLUMNS = 8192
"""A program holds whole rows; a wider one leaves its registers."""
SMALLEST_COLUMNS = 16

CASES = (
    Case("layer-gelu-small", "small", {"rows": 32, "width": 256}, {"activation": "GELU"}),
    Case(
        "rms-swiglu-ragged",
        "ragged",
        {"rows": 37, "width": 50},
        {"norm": "rms", "activation": "SwiGLU", "eps": 1e-6, "dropout": 0.25, "seed": -9},
    ),
    Case(
        "bias-mish-ragged",
        "ragged",
        {"rows": 41, "width": 23},
        {"norm": "none", "activation": "Mish"},
    ),
    Case("mlp-256", "large", {"rows": 16384, "width": 256}, {"activation": "GELU"}),
    Case("vit-1024", "large", {"rows": 6304, "width": 1024}, {"activation": "GELU"}),
    Case(
        "mlp-2048-swiglu",
        "large",
        {"rows": 2048, "width": 2048},
        {"norm": "rms", "activation": "SwiGLU", "eps": 1e-6},
    ),
)


@dataclass(frozen=True)
class Config:
    """``block_rows`` rows a program holds at a time."""

    block_rows: int = 4
    num_warps: int = 4


def padded(size: int) -> int:
    """The power of two that holds ``size``; tiles have such sides."""
    return max(1 << max(size - 1, 0).bit_length(), SMALLEST_COLUMNS)


def parts(activation: str) -> int:
    """How many columns of the input make one of the result."""
    return 2 if activation in GATED else 1


def _parts(problem: Problem) -> int:
    return parts(problem.flag("activation", "Identity"))


def bucket(problem: Problem) -> Problem:
    """The tuning key: rows up to a power of two; the width is a model's constant. All elementwise
    activations cost about the same, as do both norms; a residual and a seed do not matter."""
    rows = 1 << max(problem["rows"] - 1, 0).bit_length()
    key = problem.with_dims({"rows": rows, "width": problem["width"]})
    flags = (
        ("norm", "none" if problem.flag("norm", "layer") == "none" else "layer"),
        ("activation", "SwiGLU" if _parts(problem) == 2 else "GELU"),
        ("dropout", bool(problem.flag("dropout", 0.0))),
    )
    return replace(key, flags=flags)


def bytes_moved(problem: Problem) -> int:
    """Forward: input and residual in, result out. Backward: input and cotangent in, gradient out;
    the residual's is the cotangent itself. Weights once."""
    elements, inputs = problem["rows"] * problem["width"], _parts(problem)
    weights = 2 * problem["width"] * inputs * problem.itemsize
    if problem.direction == "forward":
        streams = inputs + 1 + bool(problem.flag("residual", True))
    else:
        streams = 2 * inputs + 1
    forward = problem.direction == "forward"
    return streams * elements * problem.itemsize + (weights if forward else 2 * weights)


def flops(problem: Problem) -> int:
    """Statistics, normalisation and activation, about: nothing here is limited by arithmetic."""
    elements = problem["rows"] * problem["width"] * _parts(problem)
    return (20 if problem.direction == "forward" else 40) * elements


def not_supported_reasons(problem: Problem, implementation: str, device: Device) -> list[str]:
    """Why ``implementation`` cannot run ``problem`` on ``device``; empty if it can."""
    reasons = []
    columns = padded(problem["width"]) * _parts(problem)
    if implementation in ("triton", "pallas") and columns > MAX_COLUMNS:
        reasons.append(
            f"a program holds whole rows of up to {MAX_COLUMNS} elements, here they are {columns}"
        )
    if implementation == "pallas" and device.platform == "tpu" and _parts(problem) == 2:
        reasons.append("on a TPU the halves of a gated activation cannot be blocks of one array")
    return reasons


def heuristic(problem: Problem, device: Device, implementations: tuple[str, ...]) -> Choice:
    """The fused kernels, except where XLA fuses as well: its forward pass is one kernel too."""
    fused = next((name for name in implementations if name in ("triton", "pallas")), None)
    plain = next((name for name in implementations if name in ("torch", "xla")), None)
    if fused is None:
        return Choice(plain or implementations[0], None, "no fused kernel can run here")
    if fused == "pallas" and plain is not None:
        if device.platform == "tpu":
            return Choice(plain, None, "XLA fuses row operations on a TPU")
        if problem.direction == "forward" or problem.flag("norm", "layer") == "none":
            return Choice(plain, None, "XLA makes one kernel of it")
    why = "one kernel reads each row once"
    if problem.direction == "backward":
        why += ", and sums the gradients of weight and bias as it goes"
    return Choice(fused, _config(problem, device), why)


def _config(problem: Problem, device: Device) -> Config:
    """Sixteen elements a thread forward, eight backward, where sums are held beside them. A TPU
    block has a multiple of eight rows."""
    columns = padded(problem["width"]) * _parts(problem)
    each = 512 if problem.direction == "forward" else 256
    rows = max(4 * each // columns, 8 if device.platform == "tpu" else 1)
    most = 16 if columns > 4096 or problem.direction == "forward" else 8
    return Config(rows, min(max(rows * columns // each, 1), most))


def search_space(problem: Problem, device: Device, implementation: str) -> list[Config]:
    """Every config worth timing."""
    columns = padded(problem["width"]) * _parts(problem)
    return [
        Config(rows, warps)
        for rows in (1, 2, 4, 8, 16, 32, 64)
        for warps in (1, 2, 4, 8, 16)
        if 4 * 32 <= rows * columns // warps <= 32 * 32
    ]


def check_arguments(
    shape: tuple[int, ...],
    given: dict[str, tuple[int, ...] | None],
    norm: str,
    activation: str,
    dropout: float,
) -> int:
    """The width of the result, or an error that names the argument that is wrong.

    ``given`` are the shapes of ``weight``, ``bias`` and ``residual``, None where there is none.
    """
    if norm not in NORMS:
        raise unknown_name("norm", norm, NORMS)
    check_name(activation)
    counter.check_probability(dropout)
    if not shape or shape[-1] < 1:
        raise ValueError(f"x has shape {shape}; it needs a last axis of at least one element")
    if shape[-1] % parts(activation):
        raise ValueError(
            f"x has {shape[-1]} elements on its last axis; {activation} halves it, so the number "
            "must be even"
        )
    width = shape[-1] // parts(activation)
    wanted = {"weight": shape[-1:], "bias": shape[-1:], "residual": (*shape[:-1], width)}
    for name, got in given.items():
        if got is not None and got != wanted[name]:
            raise ValueError(f"{name} has shape {got}; here it must be {wanted[name]}")
    return width


def problem_of(
    rows: int, width: int, dtype: str, direction: str, options: dict[str, Any]
) -> Problem:
    """The `Problem` of a call."""
    return Problem(
        NAME, (("rows", rows), ("width", width)), dtype, tuple(options.items()), direction
    )
