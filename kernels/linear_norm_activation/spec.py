"""Linear, norm, activation, dropout and residual: sizes, limits, cost, and what to run unmeasured.

``rows`` rows of ``in_features`` become rows of ``width``; a gated activation makes one result of
two outputs of the linear layer. Flags: ``norm`` and ``norm_first``; ``activation``; ``dropout``,
its probability; ``residual``, whether there is one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ..core import dropout as counter
from ..core.activations import GATED, check_name
from ..core.device import Device
from ..core.errors import unknown_name
from ..core.problem import Case, Choice, Problem

NAME = "linear_norm_activation"
DIMENSIONS = ("rows", "in_features", "width")
DIRECTIONS = ("forward",)
"""The gradients are matrix products of the framework and the backward op of norm_activation."""

NORMS = ("layer", "rms", "none")
MAX_COLUMNS = 256
"""A program holds whole rows of sums, at least 16 of them."""
MAX_IN_FEATURES = 512
MAX_PALLAS_IN_FEATURES = 256
"""A program of Pallas holds the whole weight's tile at once."""
SMALLEST_SIDE = 16

CASES = (
    Case(
        "layer-gelu-small",
        "small",
        {"rows": 32, "in_features": 64, "width": 64},
        {"norm": "layer", "activation": "GELU"},
    ),
    Case(
        "rms-first-ragged",
        "ragged",
        {"rows": 37, "in_features": 29, "width": 43},
        {"norm": "rms", "norm_first": True, "activation": "SiLU", "eps": 1e-6},
    ),
    Case(
        "rms-swiglu-ragged",
        "ragged",
        {"rows": 21, "in_features": 40, "width": 13},
        {"norm": "rms", "activation": "SwiGLU", "eps": 1e-6, "dropout": 0.2, "seed": 5},
    ),
    Case(
        "mlp-256",
        "large",
        {"rows": 16384, "in_features": 256, "width": 256},
        {"norm": "layer", "activation": "GELU"},
    ),
    Case(
        "mlp-1024",
        "large",
        {"rows": 4096, "in_features": 1024, "width": 1024},
        {"norm": "layer", "activation": "GELU"},
    ),
)


@dataclass(frozen=True)
class Config:
    """``block_rows`` rows a program holds, ``block_in`` of their elements at a time."""

    block_rows: int = 64
    block_in: int = 32
    num_warps: int = 8
    num_stages: int = 2


def padded(size: int) -> int:
    """The power of two that holds ``size``; tiles have such sides."""
    return max(1 << max(size - 1, 0).bit_length(), SMALLEST_SIDE)


def parts(activation: str) -> int:
    """How many outputs of the linear layer make one result."""
    return 2 if activation in GATED else 1


def _parts(problem: Problem) -> int:
    return parts(problem.flag("activation", "Identity"))


def bucket(problem: Problem) -> Problem:
    """The tuning key: rows up to a power of two, a model's widths as they are. All elementwise
    activations cost about the same, as do both norms; residual, dropout and seed do not matter."""
    rows = 1 << max(problem["rows"] - 1, 0).bit_length()
    key = problem.with_dims({**dict(problem.dims), "rows": rows})
    norm = "none" if problem.flag("norm", "none") == "none" else "layer"
    flags = (
        ("norm", norm),
        ("norm_first", norm != "none" and bool(problem.flag("norm_first", False))),
        ("activation", "SwiGLU" if _parts(problem) == 2 else "GELU"),
    )
    return replace(key, flags=flags)


def bytes_moved(problem: Problem) -> int:
    """Input, weights and residual in, result out."""
    rows, columns = problem["rows"], problem["width"] * _parts(problem)
    streams = problem["in_features"] + problem["width"] * (1 + problem.flag("residual", True))
    return (rows * streams + columns * (problem["in_features"] + 3)) * problem.itemsize


def flops(problem: Problem) -> int:
    """The matrix product, and about 20 for each of its results."""
    columns = problem["width"] * _parts(problem)
    return problem["rows"] * columns * (2 * problem["in_features"] + 20)


def not_supported_reasons(problem: Problem, implementation: str, device: Device) -> list[str]:
    """Why ``implementation`` cannot run ``problem`` on ``device``; empty if it can."""
    reasons = []
    columns, inputs = padded(problem["width"]) * _parts(problem), problem["in_features"]
    most = MAX_PALLAS_IN_FEATURES if implementation == "pallas" else MAX_IN_FEATURES
    if columns > MAX_COLUMNS:
        reasons.append(
            f"a program holds whole rows of up to {MAX_COLUMNS} sums, here they are {columns}"
        )
    if inputs > most:
        reasons.append(
            f"in_features={inputs}: above {most} the framework's matrix product, with "
            "norm_activation behind it, is the faster"
        )
    if implementation == "pallas" and _parts(problem) == 2:
        reasons.append("a gated activation takes two products, which XLA makes as one")
    return reasons


def heuristic(problem: Problem, device: Device, implementations: tuple[str, ...]) -> Choice:
    """The fused kernel for narrow layers; a wide one stays with the framework's matrix product,
    and only what follows is fused."""
    fused = next((name for name in implementations if name in ("triton", "pallas")), None)
    plain = next((name for name in implementations if name in ("torch", "xla")), None)
    if fused is None:
        why = "the matrix product stays with the framework, norm_activation decides on the rest"
        return Choice(plain or implementations[0], None, why)
    if plain is not None and problem.dtype == "float32":
        why = "three TF32 products cost more than the pass over memory that fusing saves"
        return Choice(plain, None, why)
    if plain is not None and device.platform == "tpu":
        return Choice(plain, None, "XLA fuses what follows a product on a TPU")
    return Choice(fused, config(problem, device), "the linear layer's result stays on the chip")


def config(problem: Problem, device: Device) -> Config:
    """The tile to take unmeasured: a row's sums take 16 to 64 registers of each thread. More is
    faster where it fits, and spills with some norms and activations."""
    columns = padded(problem["width"]) * _parts(problem)
    rows = 64 if columns <= 128 else 32
    if device.platform == "hip" and _parts(problem) == 2:
        rows = 16
    if problem.dtype == "float32":
        rows = max(rows // 2, 16)
    return Config(rows, 32, 4 if columns <= 128 else 8)


def search_space(problem: Problem, device: Device, implementation: str) -> list[Config]:
    """Every config worth timing."""
    return [
        Config(rows, block_in, warps, stages)
        for rows in (16, 32, 64, 128)
        for block_in in ((32, 64) if implementation == "triton" else (32,))
        for warps in (4, 8)
        for stages in (2, 3)
    ]


def check_arguments(
    shape: tuple[int, ...],
    given: dict[str, tuple[int, ...] | None],
    norm: str,
    norm_first: bool,
    activation: str,
    dropout: float,
) -> int:
    """The width of the result, or an error that names the argument that is wrong.

    ``given`` are the shapes of ``weight`` and of the arguments that follow it, None where there is
    none.
    """
    if norm not in NORMS:
        raise unknown_name("norm", norm, NORMS)
    check_name(activation)
    counter.check_probability(dropout)
    weight = given["weight"]
    if weight is None or len(weight) != 2:
        raise ValueError(f"weight has shape {weight}; it must be (out_features, in_features)")
    outputs, inputs = weight
    if not shape or shape[-1] != inputs or not inputs or not outputs:
        raise ValueError(f"x has shape {shape} and weight {weight}; their last axes must be equal")
    if outputs % parts(activation):
        raise ValueError(
            f"weight has {outputs} rows; {activation} halves its result, so the number must be "
            "even"
        )
    width, normed = outputs // parts(activation), inputs if norm_first else outputs
    wanted = {
        "bias": (outputs,),
        "norm_weight": (normed,),
        "norm_bias": (normed,),
        "residual": (*shape[:-1], width),
    }
    for name, expected in wanted.items():
        if given[name] is not None and given[name] != expected:
            raise ValueError(f"{name} has shape {given[name]}; here it must be {expected}")
    return width


def problem_of(rows: int, inputs: int, width: int, dtype: str, options: dict[str, Any]) -> Problem:
    """The `Problem` of a call."""
    dims = (("rows", rows), ("in_features", inputs), ("width", width))
    return Problem(NAME, dims, dtype, tuple(options.items()), "forward")
