"""Low-rank linear: sizes, limits, cost, and what to run unmeasured.

``samples * rows`` rows of ``in_features`` go to ``out_features`` through a base weight and a
low-rank update. Flags: ``per_sample`` (each sample, i.e. index of the first axis, has adapters of
its own), ``gate`` (what it has one value for) and ``scale``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..core.device import Device
from ..core.problem import Case, Choice, Problem

NAME = "lora_linear"
DIMENSIONS = ("samples", "rows", "in_features", "out_features", "rank")
DIRECTIONS = ("forward", "backward")
MAX_RANK = 128
"""Of the kernels: a row's whole low-rank vector stays on the chip."""


def _case(id: str, size: str, dims: Sequence[int], **flags: object) -> Case:
    return Case(id, size, dict(zip(DIMENSIONS, dims, strict=True)), flags)  # type: ignore[arg-type]


CASES = (
    _case("shared", "small", (2, 12, 32, 48, 4), gate="rank", scale=0.5),
    _case("shared-odd", "ragged", (3, 7, 37, 29, 5), gate="sample_rank", scale=2.0),
    _case("per-sample-odd", "ragged", (2, 19, 45, 23, 3), per_sample=True, gate="sample"),
    _case("one-row-each-odd", "ragged", (3, 1, 35, 21, 5), per_sample=True, gate="sample_rank"),
    _case("mlp-256", "large", (1, 1024, 256, 256, 16), gate="rank"),
    _case("mlp-512", "large", (1, 4096, 512, 512, 16), gate="rank"),
    _case("vit-b-qkv", "large", (64, 197, 768, 2304, 16), gate="rank"),
    _case("mlp-2048", "large", (1, 4096, 2048, 2048, 16), gate="rank"),
    _case("one-row-each-512", "large", (256, 1, 512, 512, 8), per_sample=True, gate="sample"),
    _case("per-sample-tokens", "large", (32, 256, 512, 512, 16), per_sample=True, gate="sample"),
)


@dataclass(frozen=True)
class Config:
    """The tile of one program: ``block_rows`` x ``block_columns`` of the output, ``block_depth``
    of the contracted axis at a time. The pass over the output's gradient holds
    ``pass_columns`` of as many rows."""

    block_rows: int = 64
    block_columns: int = 64
    block_depth: int = 64
    num_warps: int = 8
    num_stages: int = 3
    pass_columns: int = 32


def padded(size: int) -> int:
    """The power of two that holds ``size``."""
    return 1 << max(size - 1, 0).bit_length()


def bucket(problem: Problem) -> Problem:
    """The tuning key: row counts up to a power of two, widths and rank as they are. Shared
    adapters do not see samples; gate and scale do not matter to speed."""
    dims = dict(problem.dims)
    per_sample = bool(problem.flag("per_sample", False))
    if not per_sample:
        dims["rows"] *= dims["samples"]
        dims["samples"] = 1
    dims |= {name: padded(dims[name]) for name in ("samples", "rows")}
    return replace(problem.with_dims(dims), flags=(("per_sample", per_sample),))


def _sizes(problem: Problem) -> tuple[int, int, int, int, int]:
    """Rows in all, in_features, out_features, rank, and how many adapters there are."""
    rows = problem["samples"] * problem["rows"]
    adapters = problem["samples"] if problem.flag("per_sample", False) else 1
    sizes = (problem[name] for name in ("in_features", "out_features", "rank"))
    return rows, *sizes, adapters  # type: ignore[return-value]


def bytes_moved(problem: Problem) -> int:
    """Each array once. Backward, with a frozen base weight: the output's gradient, x, the weight
    and the adapters in; the gradients of x and the adapters out."""
    rows, width_in, width_out, rank, adapters = _sizes(problem)
    adapter = adapters * rank * (width_in + width_out)
    elements = rows * (width_in + width_out) + width_in * width_out + adapter
    if problem.direction == "backward":
        elements += rows * width_in + adapter
    return elements * problem.itemsize


def flops(problem: Problem) -> int:
    """The base product and two thin ones; backward (base weight frozen) one base product and the
    four thin ones of the gradients of x, u and v."""
    rows, width_in, width_out, rank, _ = _sizes(problem)
    thin = 2 * rows * rank * (width_in + width_out)
    base = 2 * rows * width_in * width_out
    return base + (thin if problem.direction == "forward" else 2 * thin)


def not_supported_reasons(problem: Problem, implementation: str, device: Device) -> list[str]:
    """Why ``implementation`` cannot run ``problem`` on ``device``; empty if it can."""
    rank = problem["rank"]
    if problem.flag("mixed", False):
        return ["only one of u and v differs between samples: the kernels want both alike"]
    if implementation == "pallas" and _is_own(problem):
        return ["adapters of single rows: no matrix product to fuse into, XLA's passes do as well"]
    if rank > MAX_RANK:
        return [f"rank {rank}: above {MAX_RANK} the update is a matrix product of its own"]
    return []


def _is_own(problem: Problem) -> bool:
    """Whether each row has adapters of its own."""
    return bool(problem.flag("per_sample", False)) and problem["rows"] == 1


def heuristic(problem: Problem, device: Device, implementations: tuple[str, ...]) -> Choice:
    """The fused kernels where launches and passes over memory cost more than the base product;
    the framework's own product where that is what takes the time."""
    fused = next((name for name in implementations if name in ("triton", "pallas")), None)
    plain = next((name for name in implementations if name in ("torch", "xla")), None)
    if fused is None:
        return Choice(plain or implementations[0], None, "no fused kernel can run here")
    against = _against_fusing(problem, device)
    if plain is not None and against:
        return Choice(plain, None, against)
    why = "u and v are read once" if _is_own(problem) else "one kernel instead of four launches"
    return Choice(fused, _config(problem, device), why)


def _against_fusing(problem: Problem, device: Device) -> str | None:
    """Why the plain path is expected to be the faster; None where it is not."""
    rows, width_in, width_out, _, _ = _sizes(problem)
    base = 2 * rows * width_in * width_out
    if device.platform == "tpu":
        return "XLA fuses for a TPU what this kernel fuses for a GPU"
    if base < SMALLEST_BASE:
        return "so little work that the host's time for any call is what counts"
    if _is_own(problem):
        return None
    if base > LARGEST_BASE[problem.dtype]:
        return "the base product takes nearly all the time, and the framework's is the fastest"
    if problem["rows"] < 16 and problem.flag("per_sample", False):
        return f"{problem['rows']} rows an adapter leave a tile of 16 mostly empty"
    if problem.direction == "backward" and rows < SMALLEST_PASS:
        return f"one pass over {rows} rows fills few processors"
    return None


SMALLEST_PASS = 512
"""Rows for which the one pass of the backward kernel has enough programs."""
SMALLEST_BASE = 1_000_000
LARGEST_BASE = dict.fromkeys(("bfloat16", "float16"), 5_000_000_000) | {"float32": 1_000_000_000}
"""FLOPs of the base product between which a kernel is expected to win."""


def _config(problem: Problem, device: Device) -> Config:
    """The tile to take unmeasured. A TPU's tiles have sides of 128."""
    if device.platform == "tpu":
        return Config(128, 128, 128, pass_columns=128)
    if problem.dtype == "float32":
        if device.platform == "hip":
            return Config(block_depth=32, num_stages=1, pass_columns=16)
        blackwell = device.platform == "cuda" and device.capability >= (10, 0)
        return Config(block_depth=32, num_warps=4 if blackwell else 8, pass_columns=16)
    return Config()


def search_space(problem: Problem, device: Device, implementation: str) -> list[Config]:
    """Every config worth timing."""
    if _is_own(problem):
        return [Config()]
    usual = _config(problem, device)
    return [
        replace(usual, block_rows=rows, block_columns=columns, num_warps=warps, num_stages=stages)
        for rows in (32, 64, 128)
        for columns in (64, 128, 256)
        for warps in (4, 8)
        for stages in (3, 4)
        if rows * columns <= 16384
    ]


Shape = Sequence[int]


def check_shapes(
    x: Shape, weight: Shape, bias: Shape | None, u: Shape, v: Shape, gate: Shape | None
) -> tuple[int, int] | None:
    """Raise ValueError, naming the argument, for shapes that do not fit together.

    Returns the gate's shape as (samples or 1, rank or 1); None without a gate.
    """
    if len(weight) != 2:
        raise ValueError(f"weight has shape {tuple(weight)}; it must be (out, in)")
    width_out, width_in = weight
    if not x or x[-1] != width_in:
        raise ValueError(
            f"x has shape {tuple(x)}; its last axis must be the {width_in} input features of "
            f"weight {tuple(weight)}"
        )
    if bias is not None and tuple(bias) != (width_out,):
        raise ValueError(
            f"bias has shape {tuple(bias)}; weight {tuple(weight)} wants ({width_out},)"
        )
    samples = x[0] if len(x) > 1 else None
    for name, shape, width in (("u", u, width_out), ("v", v, width_in)):
        shared = len(shape) == 2 and shape[0] == width
        own = len(shape) == 3 and samples is not None and tuple(shape[:2]) == (samples, width)
        if not (shared or own):
            each = "" if samples is None else f", or ({samples}, {width}, rank) for one per sample"
            raise ValueError(f"{name} has shape {tuple(shape)}; it must be ({width}, rank){each}")
    rank = u[-1]
    if v[-1] != rank or rank < 1:
        raise ValueError(
            f"u has rank {rank} and v has rank {v[-1]} (their last axes); both must be the same, "
            "at least 1"
        )
    return None if gate is None else _gate_shape(tuple(gate), samples, rank)


def _gate_shape(gate: tuple[int, ...], samples: int | None, rank: int) -> tuple[int, int]:
    if gate == ():
        return 1, 1
    if gate == (rank,) == (samples,) and rank > 1:
        raise ValueError(
            f"gate has shape {gate}, and both the rank and the number of samples are {rank}: "
            "write gate[None] for one value per rank, gate[:, None] for one per sample"
        )
    if gate == (rank,):
        return 1, rank
    if samples is not None and gate == (samples,):
        return samples, 1
    if len(gate) == 2 and gate[0] in (1, samples) and gate[1] in (1, rank):
        return gate
    per_sample = "" if samples is None else f", ({samples},), ({samples}, 1), ({samples}, {rank})"
    raise ValueError(f"gate has shape {gate}; it must be (), ({rank},), (1, {rank}){per_sample}")
