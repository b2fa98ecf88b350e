"""Triton kernels of norm, activation, dropout and residual, and their launches.

A program holds whole rows. A gated activation's halves are two tiles side by side. The backward
kernel computes statistics anew from the row it holds anyway, walks over several blocks of rows and
keeps the sums for weight and bias in registers; a second stage adds the programs' sums in a fixed
order, so results repeat bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ..core import dropout as counter
from ..core.activations import GATED
from ..core.ahead_of_time import Compilation
from ..core.device import Device
from ..core.problem import Problem
from ..core.triton_functions import (
    activation,
    dropout_keeps,
    dropout_row_keys,
    row_statistics,
    scale_and_shift,
)
from .spec import Config, padded, parts

_PROGRAMS_PER_PROCESSOR = 4


@triton.jit
def forward_kernel(
    x,
    weight,
    bias,
    residual,
    seed,
    y,
    rows,
    x_row,
    x_column,
    residual_row,
    residual_column,
    eps,
    threshold,
    kept_scale,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    NORM: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    """One block of rows, read once and written once."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, COLUMNS)
    in_row = column < WIDTH
    mask = (row < rows)[:, None] & in_row[None, :]
    source = x + (row * x_row)[:, None] + (column.to(tl.int64) * x_column)[None, :]
    value = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    gate = value
    if GATED:
        half = tl.full([], WIDTH, tl.int64) * x_column
        gate = tl.load(source + half, mask=mask, other=0.0).to(tl.float32)
    if NORM != "none":
        COUNT: tl.constexpr = 2 * WIDTH if GATED else WIDTH
        mean, inverse = row_statistics(value, gate, mask, eps, COUNT, NORM, GATED)
        value = (value - mean[:, None]) * inverse[:, None]
        gate = (gate - mean[:, None]) * inverse[:, None]
    value, _ = scale_and_shift(value, weight, bias, column, in_row, WEIGHT, BIAS)
    if GATED:
        gate, _ = scale_and_shift(gate, weight + WIDTH, bias + WIDTH, column, in_row, WEIGHT, BIAS)
        opened, _ = activation(gate, ACTIVATION)
        result = value * opened
    else:
        result, _ = activation(value, ACTIVATION)
    if DROPOUT:
        k0, k1 = dropout_row_keys(tl.load(seed), row)
        keeps = dropout_keeps(k0[:, None], k1[:, None], column[None, :], threshold)
        result = tl.where(keeps, result * kept_scale, 0.0)
    if RESIDUAL:
        place = residual + (row * residual_row)[:, None]
        place += (column.to(tl.int64) * residual_column)[None, :]
        result += tl.load(place, mask=mask, other=0.0).to(tl.float32)
    target = y + (row * WIDTH)[:, None] + column[None, :]
    tl.store(target, result.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tiles"])
def backward_kernel(
    x,
    weight,
    bias,
    of_y,
    seed,
    of_x,
    sums,
    rows,
    tiles,
    x_row,
    x_column,
    of_y_row,
    of_y_column,
    eps,
    threshold,
    kept_scale,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    NORM: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    """``tiles`` blocks of rows: their gradient, and their share of those of weight and bias."""
    COUNT: tl.constexpr = 2 * WIDTH if GATED else WIDTH
    column = tl.arange(0, COLUMNS)
    in_row = column < WIDTH
    sum_weight = tl.zeros([BLOCK_ROWS, COLUMNS], tl.float32)
    sum_bias = tl.zeros([BLOCK_ROWS, COLUMNS], tl.float32)
    gate_sum_weight = tl.zeros([BLOCK_ROWS, COLUMNS], tl.float32)
    gate_sum_bias = tl.zeros([BLOCK_ROWS, COLUMNS], tl.float32)
    for tile in range(tiles):
        row = (tl.program_id(0).to(tl.int64) * tiles + tile) * BLOCK_ROWS
        row += tl.arange(0, BLOCK_ROWS)
        mask = (row < rows)[:, None] & in_row[None, :]
        source = x + (row * x_row)[:, None] + (column.to(tl.int64) * x_column)[None, :]
        z = tl.load(source, mask=mask, other=0.0).to(tl.float32)
        gate_z = z
        if GATED:
            half = tl.full([], WIDTH, tl.int64) * x_column
            gate_z = tl.load(source + half, mask=mask, other=0.0).to(tl.float32)
        inverse = tl.full([BLOCK_ROWS], 1.0, tl.float32)
        if NORM != "none":
            mean, inverse = row_statistics(z, gate_z, mask, eps, COUNT, NORM, GATED)
            z = tl.where(mask, (z - mean[:, None]) * inverse[:, None], 0.0)
            if GATED:
                gate_z = tl.where(mask, (gate_z - mean[:, None]) * inverse[:, None], 0.0)
        place = of_y + (row * of_y_row)[:, None] + (column.to(tl.int64) * of_y_column)[None, :]
        grad = tl.load(place, mask=mask, other=0.0).to(tl.float32)
        if DROPOUT:
            k0, k1 = dropout_row_keys(tl.load(seed), row)
            keeps = dropout_keeps(k0[:, None], k1[:, None], column[None, :], threshold)
            grad = tl.where(keeps, grad * kept_scale, 0.0)

        value, scale = scale_and_shift(z, weight, bias, column, in_row, WEIGHT, BIAS)
        target = of_x + (row * COUNT)[:, None] + column[None, :]
        if GATED:
            gate, gate_scale = scale_and_shift(
                gate_z, weight + WIDTH, bias + WIDTH, column, in_row, WEIGHT, BIAS
            )
            opened, slope = activation(gate, ACTIVATION)
            of_gate = grad * value * slope
            of_value = grad * opened
            if WEIGHT:
                gate_sum_weight += of_gate * gate_z
            if BIAS:
                gate_sum_bias += of_gate
            of_gate *= gate_scale[None, :]
        else:
            _, slope = activation(value, ACTIVATION)
            of_value = grad * slope
            of_gate = of_value
        if WEIGHT:
            sum_weight += of_value * z
        if BIAS:
            sum_bias += of_value
        of_value *= scale[None, :]
        if NORM != "none":
            along = tl.sum(of_value * z, axis=1)
            if GATED:
                along += tl.sum(of_gate * gate_z, axis=1)
            along /= COUNT
            level = tl.zeros([BLOCK_ROWS], tl.float32)
            if NORM == "layer":
                level = tl.sum(of_value, axis=1)
                if GATED:
                    level += tl.sum(of_gate, axis=1)
                level /= COUNT
            of_value = (of_value - level[:, None] - z * along[:, None]) * inverse[:, None]
            if GATED:
                of_gate = (of_gate - level[:, None] - gate_z * along[:, None]) * inverse[:, None]
        tl.store(target, of_value.to(of_x.dtype.element_ty), mask=mask)
        if GATED:
            tl.store(target + WIDTH, of_gate.to(of_x.dtype.element_ty), mask=mask)

    into = sums + tl.program_id(0).to(tl.int64) * 2 * COUNT + column
    if WEIGHT:
        tl.store(into, tl.sum(sum_weight, axis=0), mask=in_row)
        if GATED:
            tl.store(into + WIDTH, tl.sum(gate_sum_weight, axis=0), mask=in_row)
    if BIAS:
        tl.store(into + COUNT, tl.sum(sum_bias, axis=0), mask=in_row)
        if GATED:
            tl.store(into + COUNT + WIDTH, tl.sum(gate_sum_bias, axis=0), mask=in_row)


def _constants(width: int, norm: str, name: str, config: Config) -> dict[str, Any]:
    return {
        "WIDTH": width,
        "COLUMNS": padded(width),
        "BLOCK_ROWS": config.block_rows,
        "NORM": norm,
        "ACTIVATION": GATED.get(name, name),
        "GATED": name in GATED,
    }


def _chunks(rows: int, block_rows: int, processors: int) -> tuple[int, int]:
    """Programs and blocks of rows for each: enough programs to fill the device, no more, since
    each writes sums of its own."""
    blocks = triton.cdiv(rows, block_rows)
    each = triton.cdiv(blocks, min(blocks, _PROGRAMS_PER_PROCESSOR * processors))
    return triton.cdiv(blocks, each), each


def forward(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    seed: torch.Tensor | None,
    norm: str,
    name: str,
    eps: float,
    dropout: float,
    config: Config,
) -> torch.Tensor:
    """Launch on ``x`` (rows, columns), rows > 0; ``seed`` is one int64 where ``dropout`` > 0."""
    rows, width = x.shape[0], x.shape[1] // parts(name)
    y = torch.empty((rows, width), dtype=x.dtype, device=x.device)
    forward_kernel[(triton.cdiv(rows, config.block_rows),)](
        x,
        x if weight is None else weight,
        x if bias is None else bias,
        x if residual is None else residual,
        x if seed is None else seed,
        y,
        rows,
        *x.stride(),
        *(x if residual is None else residual).stride(),
        eps,
        counter.threshold(dropout),
        1.0 / (1.0 - dropout),
        **_constants(width, norm, name, config),
        WEIGHT=weight is not None,
        BIAS=bias is not None,
        RESIDUAL=residual is not None,
        DROPOUT=dropout > 0,
        num_warps=config.num_warps,
    )
    return y


def backward(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    seed: torch.Tensor | None,
    of_y: torch.Tensor,
    norm: str,
    name: str,
    eps: float,
    dropout: float,
    config: Config,
    device: Device,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of ``x`` (rows, columns), rows > 0, and in float32 those of weight and bias;
    without a weight or a bias its gradient holds anything."""
    rows, columns = x.shape
    of_x = torch.empty((rows, columns), dtype=x.dtype, device=x.device)
    programs, tiles = _chunks(rows, config.block_rows, device.processors)
    affine = weight is not None or bias is not None
    shape = (programs if affine else 0, 2, columns)
    sums = torch.empty(shape, dtype=torch.float32, device=x.device)
    backward_kernel[(programs,)](
        x,
        x if weight is None else weight,
        x if bias is None else bias,
        of_y,
        x if seed is None else seed,
        of_x,
        sums,
        rows,
        tiles,
        *x.stride(),
        *of_y.stride(),
        eps,
        counter.threshold(dropout),
        1.0 / (1.0 - dropout),
        **_constants(columns // parts(name), norm, name, config),
        WEIGHT=weight is not None,
        BIAS=bias is not None,
        DROPOUT=dropout > 0,
        num_warps=config.num_warps,
    )
    of_weight, of_bias = sums.sum(0).unbind(0)
    return of_x, of_weight, of_bias


def compilations(problem: Problem, config: Config, device: Device) -> list[Compilation]:
    """The specialisation that ``problem`` launches, for contiguous tensors."""
    rows, width = problem["rows"], problem["width"]
    name, dropout = problem.flag("activation", "Identity"), problem.flag("dropout", 0.0)
    columns = width * parts(name)
    forward = problem.direction == "forward"
    kernel = forward_kernel if forward else backward_kernel
    programs, tiles = triton.cdiv(rows, config.block_rows), 1
    if not forward:
        programs, tiles = _chunks(rows, config.block_rows, device.processors)
    element = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16"}[problem.dtype]
    integers = {
        "rows": rows,
        "tiles": tiles,
        "x_row": columns,
        "x_column": 1,
        "residual_row": width,
        "residual_column": 1,
        "of_y_row": width,
        "of_y_column": 1,
        "threshold": counter.threshold(dropout),
    }
    constants = {
        **_constants(width, problem.flag("norm", "layer"), name, config),
        **dict.fromkeys(("WEIGHT", "BIAS", "RESIDUAL"), True),
        "DROPOUT": dropout > 0,
        # The launcher compiles an integer 1 in, and knows a multiple of 16.
        **{key: 1 for key, value in integers.items() if value == 1 and key != "tiles"},
    }
    constants = {key: value for key, value in constants.items() if key in kernel.arg_names}
    types = {"eps": "fp32", "kept_scale": "fp32", "sums": "*fp32", "seed": "*i64"}
    if not dropout:
        types["seed"] = element
    signature = {
        argument: "constexpr"
        if argument in constants
        else types.get(argument, "i32" if argument in integers else element)
        for argument in kernel.arg_names
    }
    # ``tiles`` is not specialised: it changes with the device and says nothing about addresses.
    aligned = [key for key, value in integers.items() if value % 16 == 0 and key != "tiles"]
    divisible = tuple(
        argument
        for argument, kind in signature.items()
        if kind.startswith("*") or (kind == "i32" and argument in aligned)
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
