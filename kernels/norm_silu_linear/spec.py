"""Norm, SiLU, skip, norm and a linear layer: sizes, limits, cost, and what to run unmeasured.

``rows`` rows of ``width`` elements become rows of ``features``. The flag ``skip`` says whether
there is a skip connection and a norm after it. Direction ``backward`` is the gradient, pulled back
through the norms and then through the linear layer that made ``x``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ..core.device import Device
from ..core.problem import Case, Choice, Problem

NAME = "norm_silu_linear"
DIMENSIONS = ("rows", "width", "features")
DIRECTIONS = ("forward", "backward")

FEW_ROWS = 64
"""Each program normalises the rows it needs, features / block_features times over in all; that is
less than a kernel of its own for it only while there are few."""
WIDEST_FLOAT32 = 400
"""Columns in float32 with a skip connection: of the gradient, in Pallas also forward."""
SMALLEST_SIDE = 16
MOMENT_COLUMNS = 32
"""A call tells the next one mean and squared distances of each so many columns of its result."""


def _case(id: str, size: str, dims: tuple[int, int, int], **flags: Any) -> Case:
    return Case(id, size, dict(zip(DIMENSIONS, dims, strict=True)), flags)  # type: ignore[arg-type]


CASES = (
    _case("small", "small", (8, 64, 48)),
    _case("small-skip", "small", (16, 64, 32), skip=True),
    _case("ragged", "ragged", (19, 23, 37), eps=1e-3),
    _case("ragged-skip", "ragged", (21, 147, 29), skip=True),
    _case("ctm-64-down", "large", (64, 1024, 880)),
    _case("ctm-64-up", "large", (64, 880, 1024), skip=True),
    _case("ctm-64-inner", "large", (64, 160, 304), skip=True),
    _case("mazes-64", "large", (64, 128, 90)),
)


@dataclass(frozen=True)
class Config:
    """A program makes ``block_rows`` x ``block_features`` results, from ``block_in`` columns at a
    time, of which in Triton each warp takes a share of at least 16."""

    block_rows: int = 16
    block_features: int = 32
    block_in: int = 128
    num_warps: int = 8
    num_stages: int = 3


def padded(size: int, least: int = SMALLEST_SIDE) -> int:
    """The power of two that holds ``size``; tiles have such sides."""
    return max(1 << max(size - 1, 0).bit_length(), least)


def moments_shape(rows: int, columns: int) -> tuple[int, int, int]:
    """Of what a call tells the next one."""
    return 2, rows, -(-columns // MOMENT_COLUMNS)


def bucket(problem: Problem) -> Problem:
    """The tuning key: rows up to a power of two; the rest are a model's constants."""
    rows = 1 << max(problem["rows"] - 1, 0).bit_length()
    key = problem.with_dims({**dict(problem.dims), "rows": rows})
    return replace(key, flags=(("skip", bool(problem.flag("skip", False))),))


def bytes_moved(problem: Problem) -> int:
    """Each array once. Forward: x, skip and weights in, results out. Backward: those and the
    cotangent in; the gradients of the linear layer's input and of the skip out."""
    rows, width, features = (size for _, size in problem.dims)
    skip = bool(problem.flag("skip", False))
    streams = 2 + skip if problem.direction == "forward" else 2 + 2 * skip
    return (rows * (streams * width + features) + width * (features + 4)) * problem.itemsize


def flops(problem: Problem) -> int:
    """The product, and the norms once; the gradient takes three products, five with a skip."""
    rows, width, features = (size for _, size in problem.dims)
    skip = bool(problem.flag("skip", False))
    products = 1 + skip if problem.direction == "forward" else 3 + 2 * skip
    return rows * width * (2 * products * features + 30)


def not_supported_reasons(problem: Problem, implementation: str, device: Device) -> list[str]:
    """Why ``implementation`` cannot run ``problem`` on ``device``; empty if it can."""
    if implementation == "pallas" and device.platform == "tpu":
        return ["XLA fuses what precedes a product on a TPU"]
    return []


def heuristic(problem: Problem, device: Device, implementations: tuple[str, ...]) -> Choice:
    """The fused kernel for few rows; with many, norms and products apart."""
    fused = next((name for name in implementations if name in ("triton", "pallas")), None)
    plain = next((name for name in implementations if name in ("torch", "xla")), None)
    if fused is None:
        return Choice(plain or implementations[0], None, "no fused kernel can run here")
    if plain is not None and problem["rows"] > FEW_ROWS:
        why = f"above {FEW_ROWS} rows it pays to normalise them once, in a kernel of its own"
        return Choice(plain, None, why)
    backward, skip = problem.direction == "backward", bool(problem.flag("skip", False))
    wide = problem["width"] > WIDEST_FLOAT32 and (backward or fused == "pallas")
    if plain is not None and problem.dtype == "float32" and skip and wide:
        why = (
            f"above {WIDEST_FLOAT32} columns and with a skip connection, splitting float32 into "
            "TF32 numbers in every program takes longer than a second launch"
        )
        return Choice(plain, None, why)
    config = _config if fused == "triton" else _pallas_config
    return Choice(fused, config(problem, device), "one launch in place of two")


def _config(problem: Problem, device: Device) -> Config:
    """Small programs of few warps: what a program does besides its product takes as long for few
    rows and features as for many, and two on a processor do it side by side. With a skip
    connection, sums over rows want registers. AMD's matrix instructions have at least 16 rows, and
    its warps 64 lanes."""
    if device.platform == "hip":
        return Config(16, 32, 128, 8, 2)
    full, skip = problem.dtype == "float32", bool(problem.flag("skip", False))
    if problem.direction == "backward":
        return Config(8, 32 if full or skip else 64, 64 if skip else 128, 4)
    if not skip:
        return Config(8, 32, 128, 4)
    # 128 columns at a time spill 8 to 16 bytes on sm_100, and 8 on sm_80 with three stages.
    return Config(8, 32, 64 if device.capability >= (10, 0) else 128, 4, 2)


def _pallas_config(problem: Problem, device: Device) -> Config:
    """Of these its kernels are known to spill nothing. 16 features of a program, or 64 if that
    leaves one for every processor."""
    skip, full = bool(problem.flag("skip", False)), problem.dtype == "float32"
    heavy = skip and (full or problem.direction == "backward")
    block_in = 32 if heavy else 64 if full else 128
    features, blocks = 16, -(-problem["rows"] // 16)
    while features < 64 and blocks * -(-problem["features"] // features) > device.processors:
        features *= 2
    return Config(16, features, block_in)


def search_space(problem: Problem, device: Device, implementation: str) -> list[Config]:
    """Every config worth timing."""
    if implementation == "pallas":
        return [
            Config(rows, features, block_in, warps, stages)
            for rows in (16, 32)
            for features in (16, 32, 64)
            for block_in in (32, 64, 128)
            for warps in (4, 8)
            for stages in (2, 3, 4)
        ]
    fewest = 16 if device.platform == "hip" else 8
    return [
        Config(rows, features, block_in, warps, stages)
        for rows in (fewest, 2 * fewest)
        for features in (MOMENT_COLUMNS, 2 * MOMENT_COLUMNS)
        for block_in in (64, 128, 256)
        for warps in (2, 4, 8)
        if block_in >= SMALLEST_SIDE * warps
        for stages in (2, 3, 4)
    ]


def check_arguments(
    shape: tuple[int, ...],
    given: dict[str, tuple[int, ...] | None],
    weight: tuple[int, ...],
    transposed: bool = False,
) -> None:
    """Raise an error that names the argument that is wrong.

    ``given`` are the shapes of the other arguments, None where there is none; ``weight`` is
    (features, width), or with ``transposed`` (width, features).
    """
    if not shape or shape[-1] < 1:
        raise ValueError(f"x has shape {shape}; it needs a last axis of at least one element")
    width = shape[-1]
    if len(weight) != 2 or weight[0 if transposed else 1] != width or 0 in weight:
        form = f"({width}, features)" if transposed else f"(features, {width})"
        raise ValueError(f"weight has shape {weight}; for x of shape {shape} it must be {form}")
    features = weight[1 if transposed else 0]
    wanted = {
        "norm_weight": (width,),
        "norm_bias": (width,),
        "bias": (features,),
        "skip": shape,
        "skip_weight": (width,),
        "skip_bias": (width,),
        "of_h": shape,
        "of_skip": shape,
        "into": (*shape[:-1], features),
        "y": (*shape[:-1], features),
        "h": shape,
    }
    for name, got in given.items():
        if got is not None and got != wanted[name]:
            raise ValueError(f"{name} has shape {got}; here it must be {wanted[name]}")
    after = [name for name in ("skip", "skip_weight", "skip_bias") if name in given]
    lacking = [name for name in after if given[name] is None]
    if lacking and len(lacking) < len(after):
        raise ValueError(f"{lacking[0]} is missing: {', '.join(after)} go together")


def problem_of(
    rows: int, width: int, features: int, dtype: str, direction: str, skip: bool
) -> Problem:
    """The `Problem` of a call."""
    dims = ("rows", rows), ("width", width), ("features", features)
    return Problem(NAME, dims, dtype, (("skip", skip),), direction)
