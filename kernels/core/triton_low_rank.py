"""A linear layer with a low-rank term in its epilogue: the Triton kernel that several ops launch.

    y = x W^T + bias + scale * (gate * t) U^T,    t = x V, taken along or given

Rows come in groups, each with adapters of its own; shared adapters are one group.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .ahead_of_time import Compilation
from .device import Device

SMALLEST_DOT = 16


class Tile(NamedTuple):
    """What of a `Config` the kernel takes."""

    block_rows: int
    block_columns: int
    block_depth: int
    num_warps: int
    num_stages: int


@triton.jit
def dot(left, right, total, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """``total + left @ right`` in float32. ``UPCAST``: the interpreter multiplies no bfloat16."""
    if UPCAST:
        return tl.dot(left.to(tl.float32), right.to(tl.float32), total, input_precision="ieee")
    return tl.dot(left, right, total, input_precision=PRECISION)


@triton.jit(
    do_not_specialize=[
        *("rows", "rank", "gate_rows", "x_group", "u_group", "v_group"),
        *("gate_sample", "gate_rank"),
    ]
)
def linear_kernel(
    x,
    weight,
    bias,
    u,
    v,
    gate,
    t,
    y,
    rows,
    columns,
    depth,
    rank,
    gate_rows,
    scale,
    x_group,
    x_row,
    x_depth,
    weight_column,
    weight_depth,
    u_group,
    u_column,
    u_rank,
    v_group,
    v_depth,
    v_rank,
    gate_sample,
    gate_rank,
    RANKS: tl.constexpr,
    PROJECT: tl.constexpr,
    SAVE: tl.constexpr,
    GATE: tl.constexpr,
    BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
):
    """One tile of y. ``PROJECT``: t is computed (and stored if ``SAVE``) instead of read."""
    column_tiles = tl.cdiv(columns, BLOCK_COLUMNS)
    row_tiles = tl.cdiv(rows, BLOCK_ROWS)
    program = tl.program_id(0)
    column_tile = program % column_tiles
    row_tile = program // column_tiles % row_tiles
    group = (program // column_tiles // row_tiles).to(tl.int64)
    row = row_tile.to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = column_tile.to(tl.int64) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    r = tl.arange(0, RANKS)
    in_rows = row < rows
    in_columns = column < columns
    in_rank = r < rank
    element = y.dtype.element_ty

    x_rows = x + group * x_group + row * x_row
    weight_columns = weight + column * weight_column
    total = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    low = tl.zeros([BLOCK_ROWS, RANKS], tl.float32)
    for start in range(0, depth, BLOCK_DEPTH):
        k = start + tl.arange(0, BLOCK_DEPTH)
        in_depth = k < depth
        k = k.to(tl.int64)
        left = tl.load(
            x_rows[:, None] + (k * x_depth)[None, :],
            mask=in_rows[:, None] & in_depth[None, :],
            other=0.0,
        )
        right = tl.load(
            weight_columns[None, :] + (k * weight_depth)[:, None],
            mask=in_depth[:, None] & in_columns[None, :],
            other=0.0,
        )
        total = dot(left, right, total, PRECISION, UPCAST)
        if PROJECT:
            v_tile = v + group * v_group + (k * v_depth)[:, None] + (r * v_rank)[None, :]
            thin = tl.load(v_tile, mask=in_depth[:, None] & in_rank[None, :], other=0.0)
            low = dot(left, thin, low, PRECISION, UPCAST)

    t_mask = in_rows[:, None] & in_rank[None, :]
    t_place = t + ((group * rows + row) * rank)[:, None] + r[None, :]
    if PROJECT:
        if SAVE & (column_tile == 0):
            tl.store(t_place, low.to(element), mask=t_mask)
        # An infinite x makes NaN of the zeros beyond the rank.
        low = tl.where(t_mask, low, 0.0)
    else:
        low = tl.load(t_place, mask=t_mask, other=0.0).to(tl.float32)
    if GATE:
        sample = (group * rows + row) // gate_rows
        gates = tl.load(
            gate + (sample * gate_sample)[:, None] + (r * gate_rank)[None, :],
            mask=t_mask,
            other=0.0,
        )
        low *= gates.to(tl.float32)
    low *= scale
    u_columns = u + group * u_group + column * u_column
    adapter = tl.load(
        u_columns[None, :] + (r * u_rank)[:, None],
        mask=in_rank[:, None] & in_columns[None, :],
        other=0.0,
    )
    total = dot(low.to(element), adapter, total, PRECISION, UPCAST)
    if BIAS:
        total += tl.load(bias + column, mask=in_columns, other=0.0).to(tl.float32)[None, :]
    place = y + ((group * rows + row) * columns)[:, None] + column[None, :]
    tl.store(place, total.to(element), mask=in_rows[:, None] & in_columns[None, :])


def precision(device: Device) -> str:
    """Three TF32 products keep float32 accuracy on tensor cores; AMD has no TF32 dot."""
    if device.platform == "hip" or device.interpreted:
        return "ieee"
    return "tf32" if torch.get_float32_matmul_precision() != "highest" else "tf32x3"


def ranks(rank: int) -> int:
    """The power of two that holds a rank; a dot wants 16."""
    return max(triton.next_power_of_2(rank), SMALLEST_DOT)


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    u: torch.Tensor,
    v: torch.Tensor | None,
    gate: torch.Tensor | None,
    t: torch.Tensor | None,
    *,
    scale: float,
    gate_rows: int,
    save: bool,
    tile: Tile,
    device: Device,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch on rows ``x`` (groups, rows, in), any strides, with ``u`` (groups, out, rank), ``v``
    (groups, in, rank), or ``t`` (all rows, rank), contiguous, in its place. ``gate`` is
    (samples, rank), a sample being ``gate_rows`` rows.

    Returns y (all rows, out) and t, which is empty where it is neither given nor wanted.
    """
    groups, rows, depth = x.shape
    columns, rank = weight.shape[0], u.shape[2]
    y = torch.empty((groups * rows, columns), dtype=x.dtype, device=x.device)
    project = v is not None
    if t is None:
        t = torch.empty((groups * rows if save else 0, rank), dtype=x.dtype, device=x.device)
    programs = groups * triton.cdiv(rows, tile.block_rows)
    programs *= triton.cdiv(columns, tile.block_columns)
    linear_kernel[(programs,)](
        x,
        weight,
        y if bias is None else bias.contiguous(),
        u,
        y if v is None else v,
        y if gate is None else gate,
        t,
        y,
        rows,
        columns,
        depth,
        rank,
        gate_rows,
        scale,
        *x.stride(),
        *weight.stride(),
        *u.stride(),
        *((0, 0, 0) if v is None else v.stride()),
        *((0, 0) if gate is None else gate.stride()),
        RANKS=ranks(rank),
        PROJECT=project,
        SAVE=save,
        GATE=gate is not None,
        BIAS=bias is not None,
        PRECISION=precision(device),
        UPCAST=device.interpreted and x.dtype == torch.bfloat16,
        BLOCK_ROWS=tile.block_rows,
        BLOCK_COLUMNS=tile.block_columns,
        BLOCK_DEPTH=tile.block_depth,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return y, t


ELEMENTS = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16"}


def compilation(
    kernel: Any,
    dtype: str,
    integers: Mapping[str, int],
    constants: Mapping[str, Any],
    *,
    exact: tuple[str, ...] = (),
    uses_dot: bool = True,
    programs: int,
    num_warps: int,
    num_stages: int,
) -> Compilation:
    """The specialisation for integer arguments as the launcher makes it: 1 is compiled in, a
    multiple of 16 known, unless the kernel asks for neither. Pointers named in ``exact`` are to
    float32, the others to ``dtype``; ``scale`` is a float."""
    integers = {name: integers[name] for name in kernel.arg_names if name in integers}
    free = {kernel.arg_names[i] if isinstance(i, int) else i for i in kernel.do_not_specialize}
    ones = {name for name, value in integers.items() if value == 1 and name not in free}
    constants = {**constants, **dict.fromkeys(ones, 1)}
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name in integers:
            signature[name] = "i32"
        elif name == "scale":
            signature[name] = "fp32"
        else:
            signature[name] = "*fp32" if name in exact else ELEMENTS[dtype]
    divisible = tuple(
        name
        for name, kind in signature.items()
        if kind.startswith("*")
        or (kind == "i32" and name not in free and integers[name] % 16 == 0)
    )
    return Compilation(
        kernel,
        signature,
        constants,
        divisible,
        num_warps=num_warps,
        num_stages=num_stages,
        programs=programs,
        uses_dot=uses_dot,
    )


def linear_compilation(
    dtype: str,
    groups: int,
    rows: int,
    depth: int,
    columns: int,
    rank: int,
    *,
    transposed: bool = False,
    project: bool,
    save: bool,
    gate: bool,
    bias: bool,
    tile: Tile,
    device: Device,
) -> Compilation:
    """What `linear` launches for contiguous arrays; ``transposed``: the weight is (in, out)."""
    integers = {
        "rows": rows,
        "columns": columns,
        "depth": depth,
        "rank": rank,
        "gate_rows": 1,
        "x_group": rows * depth,
        "x_row": depth,
        "x_depth": 1,
        "weight_column": 1 if transposed else depth,
        "weight_depth": columns if transposed else 1,
        "u_group": columns * rank,
        "u_column": rank,
        "u_rank": 1,
        "v_group": depth * rank if project else 0,
        "v_depth": rank if project else 0,
        "v_rank": 1 if project else 0,
        "gate_sample": 1,
        "gate_rank": 1,
    }
    constants = {
        "RANKS": ranks(rank),
        "PROJECT": project,
        "SAVE": save,
        "GATE": gate,
        "BIAS": bias,
        "PRECISION": precision(device),
        "UPCAST": False,
        "BLOCK_ROWS": tile.block_rows,
        "BLOCK_COLUMNS": tile.block_columns,
        "BLOCK_DEPTH": tile.block_depth,
    }
    programs = groups * triton.cdiv(rows, tile.block_rows)
    return compilation(
        linear_kernel,
        dtype,
        integers,
        constants,
        programs=programs * triton.cdiv(columns, tile.block_columns),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
