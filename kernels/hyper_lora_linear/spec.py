"""Hypernetwork low-rank linear: sizes, limits, cost, and what to run unmeasured.

Each row generates its adapters and its gate from ``context`` features, so they act as shared
adapters of rank ``rank * (context + 1)``. ``scale`` is the only flag.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..core.device import Device
from ..core.problem import Case, Choice, Problem

NAME = "hyper_lora_linear"
DIMENSIONS = ("rows", "in_features", "out_features", "rank", "context")
DIRECTIONS = ("forward", "backward")


def _case(id: str, size: str, dims: Sequence[int], **flags: object) -> Case:
    return Case(id, size, dict(zip(DIMENSIONS, dims, strict=True)), flags)  # type: ignore[arg-type]


CASES = (
    _case("small", "small", (24, 32, 48, 4, 8), scale=0.5),
    _case("odd", "ragged", (21, 37, 29, 3, 5), scale=2.0),
    _case("synapse-1024", "large", (64, 1024, 880, 8, 8)),
    _case("synapse-bottleneck", "large", (64, 304, 160, 8, 8)),
    _case("mlp-256", "large", (2048, 256, 256, 8, 8)),
    _case("mlp-512", "large", (4096, 512, 512, 8, 8)),
)


@dataclass(frozen=True)
class Config:
    """The tile of one program: ``block_rows`` x ``block_columns`` of the output, ``block_depth``
    of the contracted axis at a time. The pass over the output's gradient holds ``pass_rows`` x
    ``pass_columns``."""

    block_rows: int = 32
    block_columns: int = 64
    block_depth: int = 32
    num_warps: int = 8
    num_stages: int = 2
    pass_rows: int = 16
    pass_columns: int = 16


def padded(size: int) -> int:
    """The power of two that holds ``size``."""
    return 1 << max(size - 1, 0).bit_length()


def width_of(problem: Problem) -> int:
    """The rank of the shared adapters that stand for every row's own."""
    return problem["rank"] * (problem["context"] + 1)


def bucket(problem: Problem) -> Problem:
    """The tuning key: rows up to a power of two, the rest as it is; the scale does not matter to
    speed."""
    dims = dict(problem.dims)
    return replace(problem.with_dims({**dims, "rows": padded(dims["rows"])}), flags=())


def bytes_moved(problem: Problem) -> int:
    """Each array once. Backward, with a frozen base weight: the output's gradient, x, context and
    all weights in; the gradients of x, context and the generators out."""
    rows, width_in, width_out, _, context = (size for _, size in problem.dims)
    generators = width_of(problem) * (width_in + width_out) + context + 1
    elements = rows * (width_in + width_out + context) + width_in * width_out + generators
    if problem.direction == "backward":
        elements += rows * (width_in + context) + generators
    return elements * problem.itemsize


def flops(problem: Problem) -> int:
    """The base product, the two of the generators, and per row the way from one to the other;
    backward (base weight frozen) one base product and twice the rest."""
    rows, width_in, width_out, rank, context = (size for _, size in problem.dims)
    thin = 2 * rows * width_of(problem) * (width_in + width_out)
    thin += 2 * rows * (2 * rank + 1) * (context + 1)
    base = 2 * rows * width_in * width_out
    return base + (thin if problem.direction == "forward" else 2 * thin)


def not_supported_reasons(problem: Problem, implementation: str, device: Device) -> list[str]:
    """Why ``implementation`` cannot run ``problem`` on ``device``; empty if it can."""
    rank, context = problem["rank"], problem["context"]
    width = padded(rank) * padded(context + 1)
    if width > MAX_WIDTH:
        return [
            f"rank {rank} and context {context}: a tile {width} wide, padded to powers of two; "
            f"above {MAX_WIDTH} it leaves the registers"
        ]
    return []


MAX_WIDTH = 128
"""Of the kernels' generator tiles."""


def heuristic(problem: Problem, device: Device, implementations: tuple[str, ...]) -> Choice:
    """The fused kernels where launches and passes over memory cost more than the products."""
    fused = next((name for name in implementations if name in ("triton", "pallas")), None)
    plain = next((name for name in implementations if name in ("torch", "xla")), None)
    if fused is None:
        return Choice(plain or implementations[0], None, "no fused kernel can run here")
    against = _against_fusing(problem, device)
    if plain is not None and against:
        return Choice(plain, None, against)
    return Choice(fused, _config(device), "one kernel instead of a dozen launches")


def _config(device: Device) -> Config:
    """The tile to take unmeasured. A TPU's tiles have sides of 128; on AMD eight warps leave a
    thread too few registers."""
    if device.platform == "tpu":
        return Config(128, 128, 128, pass_rows=128, pass_columns=128)
    return Config(num_warps=4, num_stages=1) if device.platform == "hip" else Config()


def _against_fusing(problem: Problem, device: Device) -> str | None:
    """Why the plain path is expected to be the faster; None where it is not."""
    rows, width_in, width_out, *_ = (size for _, size in problem.dims)
    base = 2 * rows * width_in * width_out
    if device.platform == "tpu":
        return "XLA fuses for a TPU what this kernel fuses for a GPU"
    if base < SMALLEST_BASE:
        return "so little work that the host's time for any call is what counts"
    if base > LARGEST_BASE:
        return "the products take nearly all the time, and the framework's are the fastest"
    if problem.direction == "backward" and rows < SMALLEST_PASS:
        return f"one pass over {rows} rows fills few processors"
    return None


SMALLEST_BASE, LARGEST_BASE = 1_000_000, 1_000_000_000
"""FLOPs of the base product between which a kernel is expected to win."""
SMALLEST_PASS = 1024
"""Rows for which the one pass of the backward kernel has enough programs."""


def search_space(problem: Problem, device: Device, implementation: str) -> list[Config]:
    """Every config worth timing."""
    return [
        replace(
            _config(device),
            block_rows=rows,
            block_columns=columns,
            block_depth=depth,
            num_warps=warps,
        )
        for rows in (16, 32, 64)
        for columns in (32, 64, 128)
        for depth in (32, 64)
        for warps in (4, 8)
    ]


Shape = Sequence[int]


def check_shapes(shapes: dict[str, Shape | None]) -> int:
    """Raise ValueError, naming the argument, for shapes that do not fit together; returns the
    rank."""
    x, weight, context = (_given(shapes, name) for name in ("x", "weight", "context"))
    if len(weight) != 2:
        raise ValueError(f"weight has shape {weight}; it must be (out, in)")
    width_out, width_in = weight
    if not x or x[-1] != width_in:
        raise ValueError(
            f"x has shape {x}; its last axis must be the {width_in} input features of weight "
            f"{weight}"
        )
    if not context or context[:-1] != x[:-1]:
        raise ValueError(
            f"context has shape {context}; its leading axes must be those of x, {x[:-1]}: expand "
            "a context that several rows share"
        )
    features, rows = context[-1], _given(shapes, "u_weight")[0]
    rank = rows // width_out if width_out else 0
    if rank < 1 or rows % width_out:
        raise ValueError(
            f"u_weight has {rows} rows; it must have out * rank, and weight {weight} has "
            f"{width_out} outputs"
        )
    wanted = {
        "bias": (width_out,),
        "gate_weight": (1, features),
        "gate_bias": (1,),
        "u_weight": (width_out * rank, features),
        "u_bias": (width_out * rank,),
        "v_weight": (width_in * rank, features),
        "v_bias": (width_in * rank,),
    }
    for name, shape in wanted.items():
        if shapes[name] is not None and tuple(shapes[name] or ()) != shape:
            raise ValueError(
                f"{name} has shape {_given(shapes, name)}; with x {x}, weight {weight}, context "
                f"{context} and rank {rank} it must be {shape}"
            )
    return rank


def _given(shapes: dict[str, Shape | None], name: str) -> tuple[int, ...]:
    return tuple(shapes[name] or ())
