"""Triton kernels of norm, SiLU, skip, norm and a linear layer, and their launches.

A program makes a tile of the result from whole rows, and walks over them twice: for the first
norm's statistics, and with the product. A row's SiLU is computed anew in each program of its rows:
two special functions an element are what such a kernel waits for, so they are taken once. What the
second walk does not know yet comes in at its end, since the product is linear: with u the sum of
SiLU and skip, m and i its mean and inverse deviation, S its norm's weight and t its bias,

    norm(u) W^T = i ((u S) W^T - m (S W^T)) + t W^T

and the mean m is that of what is left when the mean of the first columns is taken off u, so that
nothing large cancels. The gradient has the same form. With g what reaches u's norm, s the slope of
the SiLU, w the first norm's weight and z its normalised rows, it is

    j (q - mean q - z mean(q z)),   q = i (g - mean g - o mean(g o)) s w,   o = i (u - m)

of which the products of g s w, s w, u s w, z and 1 with the weights, and ten sums over the row,
are enough.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ..core.ahead_of_time import Compilation
from ..core.device import Device
from ..core.problem import Problem
from .spec import Config, padded

_MINUS_LOG2_E = tl.constexpr(-1.4426950408889634)


@triton.jit
def _rows(source, row, k, stride, real):
    """Columns ``k`` of some rows, in float32; 0 where they are not real."""
    place = source + (row * stride)[:, None] + k[None, :]
    return tl.load(place, mask=real, other=0.0).to(tl.float32)


@triton.jit
def _line(source, k, in_row):
    return tl.load(source + k, mask=in_row, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _spread(sums, squares, eps, WIDTH: tl.constexpr):
    """Mean and 1 / deviation from sums of elements and of squares."""
    mean = tl.sum(sums, axis=1) / WIDTH
    variance = tl.sum(squares, axis=1) / WIDTH - mean * mean
    return mean, 1.0 / tl.sqrt(tl.where(variance < 0.0, 0.0, variance) + eps)


@triton.jit
def _statistics(
    x, row, in_range, stride, eps, WIDTH: tl.constexpr, BLOCK_IN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """Mean and 1 / deviation of each row, of what is left when the first columns' mean is taken
    off: its mean is at most sqrt(WIDTH / BLOCK_IN) deviations, so little cancels."""
    k = tl.arange(0, BLOCK_IN)
    real = in_range[:, None] & (k < WIDTH)[None, :]
    first = _rows(x, row, k, stride, real)
    shift = tl.sum(first, axis=1) / min(BLOCK_IN, WIDTH)
    sums = tl.where(real, first - shift[:, None], 0.0)
    squares = sums * sums
    for start in tl.static_range(BLOCK_IN, WIDTH, BLOCK_IN):
        k = start + tl.arange(0, BLOCK_IN)
        real = in_range[:, None] & (k < WIDTH)[None, :]
        value = tl.where(real, _rows(x, row, k, stride, real) - shift[:, None], 0.0)
        sums += value
        squares += value * value
    mean, inverse = _spread(sums, squares, eps, WIDTH)
    return shift + mean, inverse


@triton.jit
def _activated(x, norm_weight, norm_bias, row, k, in_row, real, stride, mean, inverse):
    """Normalised rows, SiLU of their affine map, its slope, and the norm's weight. Of columns that
    do not exist the last three are such that value and slope times weight are 0."""
    inner = (_rows(x, row, k, stride, real) - mean[:, None]) * inverse[:, None]
    scale = _line(norm_weight, k, in_row)
    value = inner * scale + _line(norm_bias, k, in_row)
    # 1 / (1 + e) from a power of 2 and a reciprocal root: those need no care for subnormal
    # numbers, and take 6 instructions where an exponential and a division take 14. Below 2^-63 it
    # is that.
    e = 1.0 + tl.exp2(tl.minimum(value * _MINUS_LOG2_E, 63.0))
    opened = tl.rsqrt(e * e)
    slope = opened + opened * (1.0 - opened) * value
    return inner, value * opened, slope, scale


@triton.jit
def _first_mean(
    x, norm_weight, norm_bias, skip, row, in_range, x_row, skip_row, mean, inverse,
    WIDTH: tl.constexpr, BLOCK_IN: tl.constexpr,
):  # fmt: skip
    """The mean of SiLU and skip in the first columns of each row."""
    size: tl.constexpr = BLOCK_IN if BLOCK_IN <= WIDTH else WIDTH
    k = tl.arange(0, BLOCK_IN)
    in_row = k < WIDTH
    real = in_range[:, None] & in_row[None, :]
    _, value, _, _ = _activated(
        x, norm_weight, norm_bias, row, k, in_row, real, x_row, mean, inverse
    )
    value = tl.where(real, value + _rows(skip, row, k, skip_row, real), 0.0)
    return tl.sum(value, axis=1) / size


@triton.jit
def _product(left, right, total, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    left = left.to(right.dtype)
    if UPCAST:
        # The interpreter cannot multiply matrices of bfloat16.
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, total, input_precision=PRECISION)


@triton.jit
def forward_kernel(
    x, norm_weight, norm_bias, skip, skip_weight, skip_bias, weight, bias, y, h,
    rows, x_row, skip_row, y_row, h_row, eps,
    WIDTH: tl.constexpr, FEATURES: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr, BLOCK_IN: tl.constexpr, SHARE: tl.constexpr,
    SKIP: tl.constexpr, BIAS: tl.constexpr, KEEP: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """A tile of ``y`` and, with `KEEP`, a share of the columns of ``h``."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    feature = tl.program_id(1) * BLOCK_FEATURES + tl.arange(0, BLOCK_FEATURES)
    in_range, in_features = row < rows, feature < FEATURES
    mean, inverse = _statistics(x, row, in_range, x_row, eps, WIDTH, BLOCK_IN, BLOCK_ROWS)
    total = tl.zeros([BLOCK_ROWS, BLOCK_FEATURES], tl.float32)
    if SKIP:
        shift = _first_mean(
            x, norm_weight, norm_bias, skip, row, in_range, x_row, skip_row, mean, inverse,
            WIDTH, BLOCK_IN,
        )  # fmt: skip
        of_lines = total
        sums = tl.zeros([BLOCK_ROWS, BLOCK_IN], tl.float32)
        squares = sums
        number = tl.arange(0, BLOCK_ROWS)[:, None]
    for start in range(0, WIDTH, BLOCK_IN):
        k = start + tl.arange(0, BLOCK_IN)
        in_row = k < WIDTH
        real = in_range[:, None] & in_row[None, :]
        right = tl.load(
            weight + feature.to(tl.int64)[None, :] * WIDTH + k[:, None],
            mask=in_row[:, None] & in_features[None, :],
            other=0.0,
        )
        _, value, _, _ = _activated(
            x, norm_weight, norm_bias, row, k, in_row, real, x_row, mean, inverse
        )
        if SKIP:
            value += _rows(skip, row, k, skip_row, real) - shift[:, None]
            value = tl.where(in_row[None, :], value, 0.0)
            sums += value
            squares += value * value
            scale = _line(skip_weight, k, in_row)
            value *= scale
            # The norm's weight and bias as two more rows.
            lines = tl.where(number == 0, scale, 0.0)
            lines = tl.where(number == 1, _line(skip_bias, k, in_row), lines)
            of_lines = _product(lines, right, of_lines, PRECISION, UPCAST)
        total = _product(value, right, total, PRECISION, UPCAST)
    if SKIP:
        outer_mean, outer_inverse = _spread(sums, squares, eps, WIDTH)
        of_scale = tl.sum(tl.where(number == 0, of_lines, 0.0), axis=0)
        of_bias = tl.sum(tl.where(number == 1, of_lines, 0.0), axis=0)
        total = (total - outer_mean[:, None] * of_scale[None, :]) * outer_inverse[:, None]
        total += of_bias[None, :]
    if BIAS:
        total += _line(bias, feature, in_features)
    place = y + (row * y_row)[:, None] + feature[None, :]
    mask = in_range[:, None] & in_features[None, :]
    tl.store(place, total.to(y.dtype.element_ty), mask=mask)

    if KEEP:
        k = tl.program_id(1) * SHARE + tl.arange(0, SHARE)
        in_row = k < WIDTH
        real = in_range[:, None] & in_row[None, :]
        _, value, _, _ = _activated(
            x, norm_weight, norm_bias, row, k, in_row, real, x_row, mean, inverse
        )
        if SKIP:
            value += _rows(skip, row, k, skip_row, real) - shift[:, None]
            value = (value - outer_mean[:, None]) * outer_inverse[:, None]
            value = value * _line(skip_weight, k, in_row) + _line(skip_bias, k, in_row)
        place = h + (row * h_row)[:, None] + k[None, :]
        tl.store(place, value.to(h.dtype.element_ty), mask=real)


@triton.jit
def gradient_kernel(
    of_h, x, norm_weight, norm_bias, skip, skip_weight, weight, into, of_skip,
    rows, of_h_row, x_row, skip_row, into_row, of_skip_row, eps,
    WIDTH: tl.constexpr, FEATURES: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr, BLOCK_IN: tl.constexpr, SHARE: tl.constexpr,
    SKIP: tl.constexpr, ADD: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """A tile of the gradient of the linear layer's input, written to ``into`` or added, and a
    share of the columns of the gradient of ``skip``."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    feature = tl.program_id(1) * BLOCK_FEATURES + tl.arange(0, BLOCK_FEATURES)
    in_range, in_features = row < rows, feature < FEATURES
    mean, inverse = _statistics(x, row, in_range, x_row, eps, WIDTH, BLOCK_IN, BLOCK_ROWS)
    of_steep = tl.zeros([BLOCK_ROWS, BLOCK_FEATURES], tl.float32)
    of_inner, of_ones, of_slope, of_sum = of_steep, of_steep, of_steep, of_steep
    nothing = tl.zeros([BLOCK_ROWS, BLOCK_IN], tl.float32)
    steep, steep_inner = nothing, nothing
    if SKIP:
        shift = _first_mean(
            x, norm_weight, norm_bias, skip, row, in_range, x_row, skip_row, mean, inverse,
            WIDTH, BLOCK_IN,
        )  # fmt: skip
        sums, squares, given, given_sum = nothing, nothing, nothing, nothing
        slopes, slopes_inner, sloped, sloped_inner = nothing, nothing, nothing, nothing
    for start in range(0, WIDTH, BLOCK_IN):
        k = start + tl.arange(0, BLOCK_IN)
        in_row = k < WIDTH
        real = in_range[:, None] & in_row[None, :]
        right = tl.load(
            weight + k.to(tl.int64)[:, None] * FEATURES + feature[None, :],
            mask=in_row[:, None] & in_features[None, :],
            other=0.0,
        )
        inner, value, slope, scale = _activated(
            x, norm_weight, norm_bias, row, k, in_row, real, x_row, mean, inverse
        )
        g = _rows(of_h, row, k, of_h_row, real)
        slope *= scale
        if SKIP:
            g *= _line(skip_weight, k, in_row)
            value += _rows(skip, row, k, skip_row, real) - shift[:, None]
            value = tl.where(in_row[None, :], value, 0.0)
            sums += value
            squares += value * value
            given += g
            given_sum += g * value
            slopes += slope
            slopes_inner += slope * inner
            of_slope = _product(slope, right, of_slope, PRECISION, UPCAST)
            value *= slope
            sloped += value
            sloped_inner += value * inner
            of_sum = _product(value, right, of_sum, PRECISION, UPCAST)
        g *= slope
        steep += g
        steep_inner += g * inner
        of_steep = _product(g, right, of_steep, PRECISION, UPCAST)
        of_inner = _product(inner, right, of_inner, PRECISION, UPCAST)
        of_ones = _product(nothing + 1.0, right, of_ones, PRECISION, UPCAST)
    level = tl.sum(steep, axis=1) / WIDTH
    along = tl.sum(steep_inner, axis=1) / WIDTH
    total = of_steep
    if SKIP:
        outer_mean, outer_inverse = _spread(sums, squares, eps, WIDTH)
        # The gradient of u is outer_inverse * (g - base - u * rise).
        base = tl.sum(given, axis=1) / WIDTH
        rise = tl.sum(given_sum, axis=1) / WIDTH - outer_mean * base
        rise *= outer_inverse * outer_inverse
        base -= outer_mean * rise
        level -= base * tl.sum(slopes, axis=1) / WIDTH + rise * tl.sum(sloped, axis=1) / WIDTH
        along -= (
            base * tl.sum(slopes_inner, axis=1) / WIDTH
            + rise * tl.sum(sloped_inner, axis=1) / WIDTH
        )
        level *= outer_inverse
        along *= outer_inverse
        total -= base[:, None] * of_slope + rise[:, None] * of_sum
        total *= outer_inverse[:, None]
    total -= level[:, None] * of_ones + along[:, None] * of_inner
    total *= inverse[:, None]
    place = into + (row * into_row)[:, None] + feature[None, :]
    mask = in_range[:, None] & in_features[None, :]
    if ADD:
        total += tl.load(place, mask=mask, other=0.0).to(tl.float32)
    tl.store(place, total.to(into.dtype.element_ty), mask=mask)

    if SKIP:
        k = tl.program_id(1) * SHARE + tl.arange(0, SHARE)
        in_row = k < WIDTH
        real = in_range[:, None] & in_row[None, :]
        _, value, _, _ = _activated(
            x, norm_weight, norm_bias, row, k, in_row, real, x_row, mean, inverse
        )
        value += _rows(skip, row, k, skip_row, real) - shift[:, None]
        g = _rows(of_h, row, k, of_h_row, real) * _line(skip_weight, k, in_row)
        g = (g - base[:, None] - value * rise[:, None]) * outer_inverse[:, None]
        place = of_skip + (row * of_skip_row)[:, None] + k[None, :]
        tl.store(place, g.to(of_skip.dtype.element_ty), mask=real)


def _precision(platform: str, allow_tf32: bool) -> str:
    """Three TF32 products keep float32 accuracy on tensor cores; AMD has no TF32 dot."""
    if platform == "hip":
        return "ieee"
    return "tf32" if allow_tf32 else "tf32x3"


def _grid(rows: int, features: int, config: Config) -> tuple[int, int]:
    return triton.cdiv(rows, config.block_rows), triton.cdiv(features, config.block_features)


def _constants(rows: int, width: int, features: int, config: Config) -> dict[str, Any]:
    programs = _grid(rows, features, config)[1]
    return {
        "WIDTH": width,
        "FEATURES": features,
        "BLOCK_ROWS": config.block_rows,
        "BLOCK_FEATURES": config.block_features,
        "BLOCK_IN": min(padded(width), config.block_in),
        "SHARE": padded(triton.cdiv(width, programs)),
    }


def _options(dtype: torch.dtype, device: Device, config: Config) -> dict[str, Any]:
    allow_tf32 = torch.get_float32_matmul_precision() != "highest"
    return {
        "PRECISION": _precision(device.platform, allow_tf32),
        "UPCAST": device.interpreted and dtype == torch.bfloat16,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }


def forward(
    y: torch.Tensor,
    h: torch.Tensor | None,
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    skip: torch.Tensor | None,
    skip_weight: torch.Tensor | None,
    skip_bias: torch.Tensor | None,
    eps: float,
    config: Config,
    device: Device,
) -> None:
    """Launch on ``x`` (rows, width), rows > 0, into ``y`` (rows, features) and, if wanted, ``h``.
    The last axis of every tensor has stride 1; ``weight`` is contiguous."""
    rows, width = x.shape
    features = len(weight)
    forward_kernel[_grid(rows, features, config)](
        x,
        norm_weight,
        norm_bias,
        x if skip is None else skip,
        x if skip_weight is None else skip_weight,
        x if skip_bias is None else skip_bias,
        weight,
        x if bias is None else bias,
        y,
        y if h is None else h,
        rows,
        x.stride(0),
        (x if skip is None else skip).stride(0),
        y.stride(0),
        (y if h is None else h).stride(0),
        eps,
        **_constants(rows, width, features, config),
        SKIP=skip is not None,
        BIAS=bias is not None,
        KEEP=h is not None,
        **_options(weight.dtype, device, config),
    )


def gradient(
    into: torch.Tensor,
    add: bool,
    of_skip: torch.Tensor | None,
    of_h: torch.Tensor,
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    weight: torch.Tensor,
    skip: torch.Tensor | None,
    skip_weight: torch.Tensor | None,
    eps: float,
    config: Config,
    device: Device,
) -> None:
    """Launch on ``x`` (rows, width), rows > 0, and ``weight`` (width, features), into ``into``
    (rows, features) and, with a skip connection, ``of_skip``. Strides as in `forward`."""
    rows, width = x.shape
    features = weight.shape[1]
    gradient_kernel[_grid(rows, features, config)](
        of_h,
        x,
        norm_weight,
        norm_bias,
        x if skip is None else skip,
        x if skip_weight is None else skip_weight,
        weight,
        into,
        into if of_skip is None else of_skip,
        rows,
        of_h.stride(0),
        x.stride(0),
        (x if skip is None else skip).stride(0),
        into.stride(0),
        (into if of_skip is None else of_skip).stride(0),
        eps,
        **_constants(rows, width, features, config),
        SKIP=skip is not None,
        ADD=add,
        **_options(weight.dtype, device, config),
    )


def compilations(problem: Problem, config: Config, device: Device) -> list[Compilation]:
    """The specialisation that ``problem`` launches, for contiguous tensors."""
    rows, width, features = (size for _, size in problem.dims)
    backward = problem.direction == "backward"
    kernel = gradient_kernel if backward else forward_kernel
    element = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16"}[problem.dtype]
    integers = {
        "rows": rows,
        **dict.fromkeys(("of_h_row", "x_row", "skip_row", "h_row", "of_skip_row"), width),
        **dict.fromkeys(("y_row", "into_row"), features),
    }
    constants = {
        **_constants(rows, width, features, config),
        "SKIP": bool(problem.flag("skip", False)),
        **dict.fromkeys(("BIAS", "KEEP", "ADD"), True),
        "PRECISION": _precision(device.platform, allow_tf32=False),
        "UPCAST": False,
        # The launcher compiles an integer 1 in, and knows a multiple of 16.
        **{key: 1 for key, value in integers.items() if value == 1},
    }
    signature = {
        argument: "constexpr"
        if argument in constants
        else "fp32"
        if argument == "eps"
        else "i32"
        if argument in integers
        else element
        for argument in kernel.arg_names
    }
    divisible = tuple(
        argument
        for argument, kind in signature.items()
        if kind.startswith("*") or (kind == "i32" and integers[argument] % 16 == 0)
    )
    programs = _grid(rows, features, config)
    return [
        Compilation(
            kernel,
            signature,
            {name: value for name, value in constants.items() if name in kernel.arg_names},
            divisible,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            programs=programs[0] * programs[1],
            uses_dot=problem.dtype != "float32" or device.platform != "hip",
        )
    ]
