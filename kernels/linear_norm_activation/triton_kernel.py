"""The Triton kernel of a narrow linear layer with all that follows it, and its launch.

A program holds whole rows of the linear layer's result in registers, so the norm's statistics, the
activation, dropout and residual need no further pass over memory. What the backward pass needs,
the linear layer's result, is written only when asked for.
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


@triton.jit
def _first_statistics(
    x, row, rows, x_row, x_column, eps, IN: tl.constexpr, BLOCK_IN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Mean and 1 / deviation of the rows of ``x``, which the product then reads from cache."""
    in_range = row < rows
    mean = tl.zeros([BLOCK_ROWS], tl.float32)
    if NORM == "layer":
        for start in range(0, IN, BLOCK_IN):
            k = start + tl.arange(0, BLOCK_IN)
            place = x + (row * x_row)[:, None] + (k.to(tl.int64) * x_column)[None, :]
            mask = in_range[:, None] & (k < IN)[None, :]
            mean += tl.sum(tl.load(place, mask=mask, other=0.0).to(tl.float32), axis=1)
        mean /= IN
    squares = tl.zeros([BLOCK_ROWS], tl.float32)
    for start in range(0, IN, BLOCK_IN):
        k = start + tl.arange(0, BLOCK_IN)
        place = x + (row * x_row)[:, None] + (k.to(tl.int64) * x_column)[None, :]
        mask = in_range[:, None] & (k < IN)[None, :]
        centred = tl.load(place, mask=mask, other=0.0).to(tl.float32) - mean[:, None]
        centred = tl.where(mask, centred, 0.0)
        squares += tl.sum(centred * centred, axis=1)
    return mean, 1.0 / tl.sqrt(squares / IN + eps)


@triton.jit
def _product(left, weight, k, column, total, IN: tl.constexpr, WIDTH: tl.constexpr,
             PRECISION: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """``total`` and the share of the columns ``k`` of ``left`` in its product with ``weight``."""
    mask = (k < IN)[:, None] & (column < WIDTH)[None, :]
    right = tl.load(weight + column[None, :] * IN + k[:, None], mask=mask, other=0.0)
    if UPCAST:
        # The interpreter cannot multiply matrices of bfloat16.
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, total, input_precision=PRECISION)


@triton.jit
def forward_kernel(
    x,
    weight,
    bias,
    norm_weight,
    norm_bias,
    residual,
    seed,
    y,
    z,
    rows,
    x_row,
    x_column,
    residual_row,
    residual_column,
    eps,
    threshold,
    kept_scale,
    IN: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    NORM: tl.constexpr,
    NORM_FIRST: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    BIAS: tl.constexpr,
    NORM_WEIGHT: tl.constexpr,
    NORM_BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    DROPOUT: tl.constexpr,
    KEEP: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One block of rows from ``x`` to ``y``."""
    COUNT: tl.constexpr = 2 * WIDTH if GATED else WIDTH
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, COLUMNS)
    in_range, in_row = row < rows, column < WIDTH
    mask = in_range[:, None] & in_row[None, :]
    value = tl.zeros([BLOCK_ROWS, COLUMNS], tl.float32)
    gate = value
    if NORM_FIRST and NORM != "none":
        mean, inverse = _first_statistics(
            x, row, rows, x_row, x_column, eps, IN, BLOCK_IN, BLOCK_ROWS, NORM
        )
    for start in range(0, IN, BLOCK_IN):
        k = start + tl.arange(0, BLOCK_IN)
        place = x + (row * x_row)[:, None] + (k.to(tl.int64) * x_column)[None, :]
        left = tl.load(place, mask=in_range[:, None] & (k < IN)[None, :], other=0.0)
        if NORM_FIRST:
            normed = left.to(tl.float32)
            if NORM != "none":
                normed = (normed - mean[:, None]) * inverse[:, None]
            normed, _ = scale_and_shift(
                normed, norm_weight, norm_bias, k, k < IN, NORM_WEIGHT, NORM_BIAS
            )
            left = tl.where((k < IN)[None, :], normed, 0.0).to(left.dtype)
        value = _product(left, weight, k, column, value, IN, WIDTH, PRECISION, UPCAST)
        if GATED:
            gate = _product(
                left, weight + WIDTH * IN, k, column, gate, IN, WIDTH, PRECISION, UPCAST
            )
    if BIAS:
        value += tl.load(bias + column, mask=in_row, other=0.0).to(tl.float32)[None, :]
        if GATED:
            gate += tl.load(bias + WIDTH + column, mask=in_row, other=0.0).to(tl.float32)[None, :]
    if KEEP:
        target = z + (row * COUNT)[:, None] + column[None, :]
        tl.store(target, value.to(z.dtype.element_ty), mask=mask)
        if GATED:
            tl.store(target + WIDTH, gate.to(z.dtype.element_ty), mask=mask)
    if not NORM_FIRST:
        if NORM != "none":
            value = tl.where(mask, value, 0.0)
            gate = tl.where(mask, gate, 0.0)
            mean, inverse = row_statistics(value, gate, mask, eps, COUNT, NORM, GATED)
            value = (value - mean[:, None]) * inverse[:, None]
            gate = (gate - mean[:, None]) * inverse[:, None]
        value, _ = scale_and_shift(
            value, norm_weight, norm_bias, column, in_row, NORM_WEIGHT, NORM_BIAS
        )
        if GATED:
            gate, _ = scale_and_shift(
                gate, norm_weight + WIDTH, norm_bias + WIDTH, column, in_row,
                NORM_WEIGHT, NORM_BIAS,
            )  # fmt: skip
    if GATED:
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
    tl.store(
        y + (row * WIDTH)[:, None] + column[None, :], result.to(y.dtype.element_ty), mask=mask
    )


def _precision(platform: str, allow_tf32: bool) -> str:
    """Three TF32 products keep float32 accuracy on tensor cores; AMD has no TF32 dot."""
    if platform == "hip":
        return "ieee"
    return "tf32" if allow_tf32 else "tf32x3"


def _constants(
    inputs: int, width: int, norm: str, norm_first: bool, name: str, config: Config
) -> dict[str, Any]:
    return {
        "IN": inputs,
        "WIDTH": width,
        "COLUMNS": padded(width),
        "BLOCK_ROWS": config.block_rows,
        "BLOCK_IN": min(config.block_in, padded(inputs)),
        "NORM": norm,
        "NORM_FIRST": norm_first,
        "ACTIVATION": GATED.get(name, name),
        "GATED": name in GATED,
    }


def forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    seed: torch.Tensor | None,
    norm: str,
    norm_first: bool,
    name: str,
    eps: float,
    dropout: float,
    keep: bool,
    config: Config,
    device: Device,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch on ``x`` (rows, in_features), rows > 0. Returns the result and, where ``keep``, that
    of the linear layer, which is empty otherwise."""
    rows, inputs = x.shape
    outputs = weight.shape[0]
    width = outputs // parts(name)
    y = torch.empty((rows, width), dtype=x.dtype, device=x.device)
    z = torch.empty((rows if keep else 0, outputs), dtype=x.dtype, device=x.device)
    forward_kernel[(triton.cdiv(rows, config.block_rows),)](
        x,
        weight,
        x if bias is None else bias,
        x if norm_weight is None else norm_weight,
        x if norm_bias is None else norm_bias,
        x if residual is None else residual,
        x if seed is None else seed,
        y,
        z,
        rows,
        *x.stride(),
        *(x if residual is None else residual).stride(),
        eps,
        counter.threshold(dropout),
        1.0 / (1.0 - dropout),
        **_constants(inputs, width, norm, norm_first, name, config),
        BIAS=bias is not None,
        NORM_WEIGHT=norm_weight is not None,
        NORM_BIAS=norm_bias is not None,
        RESIDUAL=residual is not None,
        DROPOUT=dropout > 0,
        KEEP=keep,
        PRECISION=_precision(device.platform, torch.get_float32_matmul_precision() != "highest"),
        UPCAST=device.interpreted and x.dtype == torch.bfloat16,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return y, z


def compilations(problem: Problem, config: Config, device: Device) -> list[Compilation]:
    """The specialisation that ``problem`` launches in training, for contiguous tensors."""
    rows, inputs, width = (size for _, size in problem.dims)
    name, dropout = problem.flag("activation", "Identity"), problem.flag("dropout", 0.0)
    element = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16"}[problem.dtype]
    integers = {
        "rows": rows,
        "x_row": inputs,
        "x_column": 1,
        "residual_row": width,
        "residual_column": 1,
        "threshold": counter.threshold(dropout),
    }
    constants = {
        **_constants(
            inputs,
            width,
            problem.flag("norm", "none"),
            problem.flag("norm_first", False),
            name,
            config,
        ),
        **dict.fromkeys(("BIAS", "NORM_WEIGHT", "NORM_BIAS", "RESIDUAL", "KEEP"), True),
        "DROPOUT": dropout > 0,
        "PRECISION": _precision(device.platform, allow_tf32=False),
        "UPCAST": False,
        # The launcher compiles an integer 1 in, and knows a multiple of 16.
        **{key: 1 for key, value in integers.items() if value == 1},
    }
    types = {"eps": "fp32", "kept_scale": "fp32", "seed": "*i64" if dropout else element}
    signature = {
        argument: "constexpr"
        if argument in constants
        else types.get(argument, "i32" if argument in integers else element)
        for argument in forward_kernel.arg_names
    }
    divisible = tuple(
        argument
        for argument, kind in signature.items()
        if kind.startswith("*") or (kind == "i32" and integers[argument] % 16 == 0)
    )
    return [
        Compilation(
            forward_kernel,
            signature,
            constants,
            divisible,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            programs=triton.cdiv(rows, config.block_rows),
            uses_dot=problem.dtype != "float32" or device.platform != "hip",
        )
    ]
