"""Triton kernels of layer norm, SiLU, skip and layer norm, and their launches.

A program holds whole rows. The backward kernel computes both norms anew from the rows it holds
anyway, walks over several blocks of them and keeps the sums for weights and biases in registers; a
second stage adds the programs' sums in a fixed order, so results repeat bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ..core.ahead_of_time import Compilation
from ..core.device import Device
from ..core.problem import Problem
from ..core.triton_functions import activation, early, row_statistics, scale_and_shift, wait
from .spec import Config, padded

_PROGRAMS_PER_PROCESSOR = 2


@triton.jit
def _normalized(x, mask, eps, WIDTH: tl.constexpr):
    """The rows normalised, 0 where they are not real, and 1 / deviation."""
    mean, inverse = row_statistics(x, x, mask, eps, WIDTH, "layer", False)
    return tl.where(mask, (x - mean[:, None]) * inverse[:, None], 0.0), inverse


@triton.jit
def _of_norm(z, inverse, of_z, WIDTH: tl.constexpr):
    along = tl.sum(of_z * z, axis=1) / WIDTH
    level = tl.sum(of_z, axis=1) / WIDTH
    return (of_z - level[:, None] - z * along[:, None]) * inverse[:, None]


@triton.jit
def forward_kernel(
    x,
    weight,
    bias,
    skip,
    skip_weight,
    skip_bias,
    y,
    rows,
    x_row,
    x_column,
    skip_row,
    skip_column,
    y_row,
    eps,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One block of rows, read once and written once."""
    wait(EARLY)
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, COLUMNS)
    in_row = column < WIDTH
    mask = (row < rows)[:, None] & in_row[None, :]
    far = column.to(tl.int64)
    source = x + (row * x_row)[:, None] + (far * x_column)[None, :]
    other = skip + (row * skip_row)[:, None] + (far * skip_column)[None, :]
    value = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    skipped = tl.load(other, mask=mask, other=0.0).to(tl.float32)
    value, _ = _normalized(value, mask, eps, WIDTH)
    value, _ = scale_and_shift(value, weight, bias, column, in_row, True, True)
    value, _ = activation(value, "SiLU")
    value, _ = _normalized(value + skipped, mask, eps, WIDTH)
    value, _ = scale_and_shift(value, skip_weight, skip_bias, column, in_row, True, True)
    target = y + (row * y_row)[:, None] + column[None, :]
    tl.store(target, value.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tiles"])
def backward_kernel(
    x,
    weight,
    bias,
    skip,
    skip_weight,
    of_y,
    of_x,
    of_skip,
    sums,
    rows,
    tiles,
    x_row,
    x_column,
    skip_row,
    skip_column,
    of_y_row,
    of_y_column,
    eps,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    AFFINE: tl.constexpr,
):
    """``tiles`` blocks of rows: their gradients, and their share of those of the weights."""
    column = tl.arange(0, COLUMNS)
    in_row = column < WIDTH
    far = column.to(tl.int64)
    sum_weight = tl.zeros([BLOCK_ROWS, COLUMNS], tl.float32)
    sum_bias = tl.zeros([BLOCK_ROWS, COLUMNS], tl.float32)
    sum_skip_weight = tl.zeros([BLOCK_ROWS, COLUMNS], tl.float32)
    sum_skip_bias = tl.zeros([BLOCK_ROWS, COLUMNS], tl.float32)
    outer_scale = tl.load(skip_weight + column, mask=in_row, other=0.0).to(tl.float32)
    for tile in range(tiles):
        row = (tl.program_id(0).to(tl.int64) * tiles + tile) * BLOCK_ROWS
        row += tl.arange(0, BLOCK_ROWS)
        mask = (row < rows)[:, None] & in_row[None, :]
        source = x + (row * x_row)[:, None] + (far * x_column)[None, :]
        other = skip + (row * skip_row)[:, None] + (far * skip_column)[None, :]
        place = of_y + (row * of_y_row)[:, None] + (far * of_y_column)[None, :]
        inner = tl.load(source, mask=mask, other=0.0).to(tl.float32)
        skipped = tl.load(other, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(place, mask=mask, other=0.0).to(tl.float32)
        inner, inner_inverse = _normalized(inner, mask, eps, WIDTH)
        value, inner_scale = scale_and_shift(inner, weight, bias, column, in_row, True, True)
        value, slope = activation(value, "SiLU")
        outer, outer_inverse = _normalized(value + skipped, mask, eps, WIDTH)
        if AFFINE:
            sum_skip_weight += grad * outer
            sum_skip_bias += grad
        grad = _of_norm(outer, outer_inverse, grad * outer_scale[None, :], WIDTH)
        target = (row * WIDTH)[:, None] + column[None, :]
        tl.store(of_skip + target, grad.to(of_skip.dtype.element_ty), mask=mask)
        grad = tl.where(mask, grad * slope, 0.0)
        if AFFINE:
            sum_weight += grad * inner
            sum_bias += grad
        grad = _of_norm(inner, inner_inverse, grad * inner_scale[None, :], WIDTH)
        tl.store(of_x + target, grad.to(of_x.dtype.element_ty), mask=mask)

    if AFFINE:
        into = sums + tl.program_id(0).to(tl.int64) * 4 * WIDTH + column
        tl.store(into, tl.sum(sum_weight, axis=0), mask=in_row)
        tl.store(into + WIDTH, tl.sum(sum_bias, axis=0), mask=in_row)
        tl.store(into + 2 * WIDTH, tl.sum(sum_skip_weight, axis=0), mask=in_row)
        tl.store(into + 3 * WIDTH, tl.sum(sum_skip_bias, axis=0), mask=in_row)


def _constants(width: int, config: Config) -> dict[str, Any]:
    return {"WIDTH": width, "COLUMNS": padded(width), "BLOCK_ROWS": config.block_rows}


def _chunks(rows: int, block_rows: int, processors: int) -> tuple[int, int]:
    """Programs and blocks of rows for each: enough programs to fill the device, no more, since
    each writes sums of its own."""
    blocks = triton.cdiv(rows, block_rows)
    each = triton.cdiv(blocks, min(blocks, _PROGRAMS_PER_PROCESSOR * processors))
    return triton.cdiv(blocks, each), each


def forward(
    y: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    skip: torch.Tensor,
    skip_weight: torch.Tensor,
    skip_bias: torch.Tensor,
    eps: float,
    config: Config,
    device: Device,
) -> None:
    """Launch on ``x`` (rows, width), rows > 0, into ``y``, whose last axis has stride 1; weights
    and biases are contiguous."""
    rows, width = x.shape
    forward_kernel[(triton.cdiv(rows, config.block_rows),)](
        x,
        weight,
        bias,
        skip,
        skip_weight,
        skip_bias,
        y,
        rows,
        *x.stride(),
        *skip.stride(),
        y.stride(0),
        eps,
        **_constants(width, config),
        **early(device),
        num_warps=config.num_warps,
    )


def backward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    skip: torch.Tensor,
    skip_weight: torch.Tensor,
    of_y: torch.Tensor,
    eps: float,
    affine: bool,
    config: Config,
    device: Device,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of ``x`` and ``skip`` (rows, width), rows > 0, and in float32 those of weight,
    bias, skip_weight and skip_bias (4, width); these hold zeros without ``affine``."""
    rows, width = x.shape
    of_x, of_skip = (torch.empty((rows, width), dtype=x.dtype, device=x.device) for _ in range(2))
    programs, tiles = _chunks(rows, config.block_rows, device.processors)
    shape = (programs if affine else 0, 4, width)
    sums = torch.empty(shape, dtype=torch.float32, device=x.device)
    backward_kernel[(programs,)](
        x,
        weight,
        bias,
        skip,
        skip_weight,
        of_y,
        of_x,
        of_skip,
        sums,
        rows,
        tiles,
        *x.stride(),
        *skip.stride(),
        *of_y.stride(),
        eps,
        **_constants(width, config),
        AFFINE=affine,
        num_warps=config.num_warps,
    )
    return of_x, of_skip, sums.sum(0)


def compilations(problem: Problem, config: Config, device: Device) -> list[Compilation]:
    """The specialisation that ``problem`` launches, for contiguous tensors."""
    rows, width = problem["rows"], problem["width"]
    forward = problem.direction == "forward"
    kernel = forward_kernel if forward else backward_kernel
    programs, tiles = triton.cdiv(rows, config.block_rows), 1
    if not forward:
        programs, tiles = _chunks(rows, config.block_rows, device.processors)
    element = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16"}[problem.dtype]
    sizes = {
        "rows": rows,
        "tiles": tiles,
        **dict.fromkeys(("x_row", "skip_row", "y_row", "of_y_row"), width),
        **dict.fromkeys(("x_column", "skip_column", "of_y_column"), 1),
    }
    # ``tiles`` is not specialised: it changes with the device and says nothing about addresses.
    special = {key: value for key, value in sizes.items() if key != "tiles"}
    constants = {
        **_constants(width, config),
        "AFFINE": bool(problem.flag("affine", True)),
        **early(device),
        # The launcher compiles an integer 1 in, and knows a multiple of 16.
        **{key: 1 for key, value in special.items() if value == 1},
    }
    constants = {key: value for key, value in constants.items() if key in kernel.arg_names}
    types = {"eps": "fp32", "sums": "*fp32"}
    signature = {
        argument: "constexpr"
        if argument in constants
        else types.get(argument, "i32" if argument in sizes else element)
        for argument in kernel.arg_names
    }
    divisible = tuple(
        argument
        for argument, kind in signature.items()
        if kind.startswith("*") or (kind == "i32" and special.get(argument, 1) % 16 == 0)
    )
    return [
        Compilation(
            kernel,
            signature,
            constants,
            divisible,
            num_warps=config.num_warps,
            programs=programs,
        )
    ]
