"""Triton kernels of norm, SiLU, skip, norm and a linear layer, and their launches.

A program makes a tile of the result from whole rows, and walks over them with the product; the
first norm's statistics come from the call that made the rows, or from a walk of their own. A row's
SiLU is computed anew in each program of its rows: two special functions an element are what such
a kernel waits for, so they are taken once. What the walk does not know yet comes in at its end,
since the product is linear: with u the sum of SiLU and skip, m and i its mean and inverse
deviation, S its norm's weight and t its bias,

    norm(u) W^T = i ((u S) W^T - m (S W^T)) + t W^T

and the mean m is that of what is left when about its level in the first columns is taken off u, so
that nothing large cancels. The gradient has the same form. With g what reaches u's norm, s the
slope of the SiLU, w the first norm's weight and z its normalised rows, it is

    j (q - mean q - z mean(q z)),   q = i (g - mean g - o mean(g o)) s w,   o = i (u - m)

of which the products of g s w, s w, u s w, z and 1 with the weights, and sums over the row, are
enough.

Tiles are (slices, rows, depth): each warp has a slice of the columns and makes all of the tile's
products of it, and the slices are added at the end. Warps that shared the columns would each load
all rows again, and wait for one product after the other.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ..core.ahead_of_time import Compilation
from ..core.device import Device
from ..core.problem import Problem
from ..core.triton_functions import early, wait
from .spec import MOMENT_COLUMNS, SMALLEST_SIDE, Config, padded

_MINUS_LOG2_E = tl.constexpr(-1.4426950408889634)
_HIGH_BITS = tl.constexpr(0xFFFFE000)
"""Of a float32 number: those that a TF32 product takes."""


@triton.jit
def _columns(start, SLICES: tl.constexpr, DEPTH: tl.constexpr):
    """``SLICES * DEPTH`` columns from ``start``, (slices, depth)."""
    return start + (tl.arange(0, SLICES) * DEPTH)[:, None] + tl.arange(0, DEPTH)[None, :]


@triton.jit
def _real(in_range, in_row):
    return in_range[None, :, None] & in_row[:, None, :]


@triton.jit
def _place(source, row, k, stride):
    return source + (row * stride)[None, :, None] + k[:, None, :]


@triton.jit
def _rows(source, row, k, stride, real):
    """Columns ``k`` of some rows, in float32; 0 where they are not real."""
    return tl.load(_place(source, row, k, stride), mask=real, other=0.0).to(tl.float32)


@triton.jit
def _line(source, k, in_row):
    return tl.load(source + k, mask=in_row, other=0.0).to(tl.float32)[:, None, :]


@triton.jit
def _sum(tile):
    """Over slices and depth: of each row."""
    return tl.sum(tl.sum(tile, 2), 0)


@triton.jit
def _each(value):
    """A number of each row, to go with tiles."""
    return value[None, :, None]


@triton.jit
def _inverse_deviation(variance, eps):
    return tl.rsqrt(tl.maximum(variance, 0.0) + eps)


@triton.jit
def _spread(sums, squares, eps, WIDTH: tl.constexpr):
    """Mean and 1 / deviation from sums of elements and of squares."""
    mean = _sum(sums) / WIDTH
    return mean, _inverse_deviation(_sum(squares) / WIDTH - mean * mean, eps)


@triton.jit
def _statistics(
    x, row, in_range, stride, eps, WIDTH: tl.constexpr, SLICES: tl.constexpr, DEPTH: tl.constexpr
):
    """Mean and 1 / deviation of each row, of what is left when the first columns' mean is taken
    off: its mean is at most sqrt(WIDTH / (SLICES * DEPTH)) deviations, so little cancels."""
    BLOCK: tl.constexpr = SLICES * DEPTH
    k = _columns(0, SLICES, DEPTH)
    real = _real(in_range, k < WIDTH)
    first = _rows(x, row, k, stride, real)
    shift = _sum(first) / min(BLOCK, WIDTH)
    sums = tl.where(real, first - _each(shift), 0.0)
    squares = sums * sums
    for start in tl.static_range(BLOCK, WIDTH, BLOCK):
        k = _columns(start, SLICES, DEPTH)
        real = _real(in_range, k < WIDTH)
        value = tl.where(real, _rows(x, row, k, stride, real) - _each(shift), 0.0)
        sums += value
        squares += value * value
    mean, inverse = _spread(sums, squares, eps, WIDTH)
    return shift + mean, inverse


@triton.jit
def _joined(
    moments, row, rows, in_range, eps, WIDTH: tl.constexpr, BLOCKS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Mean and 1 / deviation of each row from those of its blocks of columns."""
    blocks: tl.constexpr = (WIDTH + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS
    block = tl.arange(0, BLOCKS)
    real = in_range[:, None] & (block < blocks)[None, :]
    place = moments + (row * blocks)[:, None] + block[None, :]
    means = tl.load(place, mask=real, other=0.0)
    squares = tl.load(place + tl.full([], 1, tl.int64) * rows * blocks, mask=real, other=0.0)
    left = WIDTH - block * BLOCK_COLUMNS
    size = tl.minimum(tl.maximum(left, 0), BLOCK_COLUMNS).to(tl.float32)[None, :]
    mean = tl.sum(means * size, 1) / WIDTH
    away = means - mean[:, None]
    variance = tl.sum(squares + size * away * away, 1) / WIDTH
    return mean, _inverse_deviation(variance, eps)


@triton.jit
def _store_moments(
    moments, stored, row, rows, in_range, FEATURES: tl.constexpr, BLOCK_COLUMNS: tl.constexpr
):
    """Of a tile of y (features, rows) the mean of each block of columns and the sum of squared
    distances from it."""
    COUNT: tl.constexpr = stored.shape[0] // BLOCK_COLUMNS
    blocks: tl.constexpr = (FEATURES + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS
    block = tl.program_id(1) * COUNT + tl.arange(0, COUNT)
    left = FEATURES - block * BLOCK_COLUMNS
    size = tl.minimum(tl.maximum(left, 1), BLOCK_COLUMNS).to(tl.float32)[:, None]
    values = tl.reshape(stored.to(tl.float32), [COUNT, BLOCK_COLUMNS, stored.shape[1]])
    real = (tl.arange(0, BLOCK_COLUMNS)[None, :] < left[:, None])[:, :, None]
    mean = tl.sum(tl.where(real, values, 0.0), 1) / size
    away = tl.where(real, values - mean[:, None, :], 0.0)
    place = moments + (row * blocks)[None, :] + block[:, None]
    mask = (block < blocks)[:, None] & in_range[None, :]
    tl.store(place, mean, mask=mask)
    place += tl.full([], 1, tl.int64) * rows * blocks
    tl.store(place, tl.sum(away * away, 1), mask=mask)


@triton.jit
def _normed(x, mean, inverse):
    return x * _each(inverse) - _each(mean * inverse)


@triton.jit
def _sigmoid(value):
    """1 / (1 + e) from a power of 2 and a reciprocal root: those need no care for subnormal
    numbers, and take 5 instructions where an exponential and a division take 14. Below 2^-64 it is
    0."""
    e = 1.0 + tl.exp2(value * _MINUS_LOG2_E)
    return tl.rsqrt(e * e)


@triton.jit
def _silu(x, scale, bias, mean, inverse):
    """Of the norm of rows; 0 in columns that do not exist, whose scale and bias are."""
    value = _normed(x, mean, inverse) * scale + bias
    return value * _sigmoid(value)


@triton.jit
def _level(
    norm_bias, skip, row, in_range, stride, WIDTH: tl.constexpr, BLOCK_COLUMNS: tl.constexpr
):
    """About where the sum of SiLU and skip is in each row: its mean in some columns, where the
    norm is taken to be 0."""
    k = tl.arange(0, BLOCK_COLUMNS)[None, :]
    size: tl.constexpr = BLOCK_COLUMNS if BLOCK_COLUMNS < WIDTH else WIDTH
    bias = tl.load(norm_bias + k, mask=k < WIDTH, other=0.0).to(tl.float32)
    real = in_range[:, None] & (k < WIDTH)
    value = tl.load(skip + (row * stride)[:, None] + k, mask=real, other=0.0).to(tl.float32)
    return tl.sum(value + bias * _sigmoid(bias), 1) / size


@triton.jit
def _activated(x, scale, bias, mean, inverse):
    """Normalised rows, SiLU of their affine map, and its slope."""
    inner = _normed(x, mean, inverse)
    value = inner * scale + bias
    opened = _sigmoid(value)
    return inner, value * opened, opened + opened * (1.0 - opened) * value


@triton.jit
def _product(weight, value, total, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """``total`` (slices, features, rows) and the product of weights (slices, features, depth) with
    a tile."""
    value = tl.permute(value.to(weight.dtype), (0, 2, 1))
    if UPCAST:
        # The interpreter cannot multiply matrices of bfloat16.
        return tl.dot(weight.to(tl.float32), value.to(tl.float32), total)
    if PRECISION == "tf32x3" and weight.dtype == tl.float32:
        # What `tl.dot` does for "tf32x3", without its care for infinite weights: two thirds of the
        # instructions.
        high_weight = (weight.to(tl.uint32, bitcast=True) & _HIGH_BITS).to(
            tl.float32, bitcast=True
        )
        high_value = (value.to(tl.uint32, bitcast=True) & _HIGH_BITS).to(tl.float32, bitcast=True)
        total = tl.dot(weight - high_weight, high_value, total, input_precision="tf32")
        total = tl.dot(high_weight, value - high_value, total, input_precision="tf32")
        return tl.dot(high_weight, high_value, total, input_precision="tf32")
    return tl.dot(weight, value, total, input_precision=PRECISION)


@triton.jit
def _matrix(weight, feature, k, in_features, in_row, feature_stride, k_stride):
    """Weights (slices, features, depth)."""
    place = weight + (feature.to(tl.int64) * feature_stride)[None, :, None]
    place += (k.to(tl.int64) * k_stride)[:, None, :]
    mask = in_features[None, :, None] & in_row[:, None, :]
    return tl.load(place, mask=mask, other=0.0)


@triton.jit
def _scales(norm_weight, norm_bias, k, in_row):
    return _line(norm_weight, k, in_row), _line(norm_bias, k, in_row)


@triton.jit
def forward_kernel(
    x, norm_weight, norm_bias, skip, skip_weight, skip_bias, weight, bias, moments,
    y, h, of_y, statistics,
    rows, x_row, skip_row, y_row, h_row, eps,
    WIDTH: tl.constexpr, FEATURES: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr, SLICES: tl.constexpr, DEPTH: tl.constexpr, SHARE: tl.constexpr,
    LINES: tl.constexpr, BLOCKS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, SKIP: tl.constexpr,
    BIAS: tl.constexpr, KEEP: tl.constexpr, MOMENTS: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """A tile of ``y``, its moments and, with `KEEP`, a share of the columns of ``h``; the first
    programs of the rows write the norms' statistics. `MOMENTS`: those of ``x`` are given."""
    wait(EARLY)
    BLOCK: tl.constexpr = SLICES * DEPTH
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    feature = tl.program_id(1) * BLOCK_FEATURES + tl.arange(0, BLOCK_FEATURES)
    in_range, in_features = row < rows, feature < FEATURES
    # What waits for nothing is asked for first.
    if BIAS:
        offsets = tl.load(bias + feature, mask=in_features, other=0.0).to(tl.float32)
    share = _columns(tl.program_id(1) * SHARE, 1, SHARE)
    in_share = share < WIDTH
    real_share = _real(in_range, in_share)
    if KEEP and not SKIP:
        kept = _rows(x, row, share, x_row, real_share)
        share_scale, share_offset = _scales(norm_weight, norm_bias, share, in_share)
    if SKIP:
        shift = _level(norm_bias, skip, row, in_range, skip_row, WIDTH, BLOCK_COLUMNS)
        # The norm's weight and bias, as two more rows.
        of_lines = tl.zeros([SLICES, BLOCK_FEATURES, LINES], tl.float32)
        number = tl.arange(0, LINES)[None, :, None]
        sums = tl.zeros([SLICES, BLOCK_ROWS, DEPTH], tl.float32)
        squares = sums
    if MOMENTS:
        mean, inverse = _joined(moments, row, rows, in_range, eps, WIDTH, BLOCKS, BLOCK_COLUMNS)
    else:
        mean, inverse = _statistics(x, row, in_range, x_row, eps, WIDTH, SLICES, DEPTH)
    total = tl.zeros([SLICES, BLOCK_FEATURES, BLOCK_ROWS], tl.float32)
    for start in range(0, WIDTH, BLOCK):
        k = _columns(start, SLICES, DEPTH)
        in_row = k < WIDTH
        real = _real(in_range, in_row)
        matrix = _matrix(weight, feature, k, in_features, in_row, WIDTH, 1)
        scale, offset = _scales(norm_weight, norm_bias, k, in_row)
        value = _silu(_rows(x, row, k, x_row, real), scale, offset, mean, inverse)
        if SKIP:
            value += _rows(skip, row, k, skip_row, real) - _each(shift)
            value = tl.where(in_row[:, None, :], value, 0.0)
            sums += value
            squares += value * value
            scale, offset = _scales(skip_weight, skip_bias, k, in_row)
            value *= scale
            lines = tl.where(number == 0, scale, tl.where(number == 1, offset, 0.0))
            of_lines = _product(matrix, lines, of_lines, PRECISION, UPCAST)
        total = _product(matrix, value, total, PRECISION, UPCAST)
    total = tl.sum(total, 0)
    if SKIP:
        outer_mean, outer_inverse = _spread(sums, squares, eps, WIDTH)
        number = tl.arange(0, LINES)[None, None, :]
        of_scale = tl.sum(tl.sum(tl.where(number == 0, of_lines, 0.0), 2), 0)
        of_bias = tl.sum(tl.sum(tl.where(number == 1, of_lines, 0.0), 2), 0)
        total = (total - of_scale[:, None] * outer_mean[None, :]) * outer_inverse[None, :]
        total += of_bias[:, None]
        outer_mean += shift
    if BIAS:
        total += offsets[:, None]
    stored = total.to(y.dtype.element_ty)
    place = y + (row * y_row)[None, :] + feature[:, None]
    tl.store(place, stored, mask=in_features[:, None] & in_range[None, :])
    _store_moments(of_y, stored, row, rows, in_range, FEATURES, BLOCK_COLUMNS)
    COUNT: tl.constexpr = 4 if SKIP else 2
    number = tl.arange(0, COUNT)[None, :]
    known = tl.where(number == 0, mean[:, None], inverse[:, None])
    if SKIP:
        known = tl.where(number == 2, outer_mean[:, None], known)
        known = tl.where(number == 3, outer_inverse[:, None], known)
    place = statistics + (row * COUNT)[:, None] + number
    tl.store(place, known, mask=(in_range & (tl.program_id(1) == 0))[:, None])
    if KEEP:
        if SKIP:  # which has no registers to keep them in
            kept = _rows(x, row, share, x_row, real_share)
            share_scale, share_offset = _scales(norm_weight, norm_bias, share, in_share)
        kept = _silu(kept, share_scale, share_offset, mean, inverse)
        if SKIP:
            kept += _rows(skip, row, share, skip_row, real_share) - _each(outer_mean)
            share_scale, share_offset = _scales(skip_weight, skip_bias, share, in_share)
            kept = kept * _each(outer_inverse) * share_scale + share_offset
        tl.store(_place(h, row, share, h_row), kept.to(h.dtype.element_ty), mask=real_share)


@triton.jit
def gradient_kernel(
    of_h, x, norm_weight, norm_bias, skip, skip_weight, weight, statistics, into, of_skip,
    rows, of_h_row, x_row, skip_row, into_row, of_skip_row, eps,
    WIDTH: tl.constexpr, FEATURES: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr, SLICES: tl.constexpr, DEPTH: tl.constexpr, SHARE: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr, SKIP: tl.constexpr, ADD: tl.constexpr, STATISTICS: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """A tile of the gradient of the linear layer's input, written to ``into`` or added, and a
    share of the columns of the gradient of ``skip``. `STATISTICS` of the norms are given."""
    wait(EARLY)
    BLOCK: tl.constexpr = SLICES * DEPTH
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    feature = tl.program_id(1) * BLOCK_FEATURES + tl.arange(0, BLOCK_FEATURES)
    in_range, in_features = row < rows, feature < FEATURES
    # What waits for nothing is asked for first.
    place = into + (row * into_row)[None, :] + feature[:, None]
    mask = in_features[:, None] & in_range[None, :]
    before = tl.zeros([BLOCK_FEATURES, BLOCK_ROWS], tl.float32)
    if ADD:
        before = tl.load(place, mask=mask, other=0.0).to(tl.float32)
    if STATISTICS:
        # Picked by sums: the compiler would make a number it can load again in every layout, and
        # with it the SiLU.
        COUNT: tl.constexpr = 4 if SKIP else 2
        number = tl.arange(0, COUNT)[None, :]
        told = statistics + (row * COUNT)[:, None] + number
        known = tl.load(told, mask=in_range[:, None], other=0.0)
        mean = tl.sum(tl.where(number == 0, known, 0.0), 1)
        inverse = tl.sum(tl.where(number == 1, known, 0.0), 1)
        if SKIP:
            shift = tl.sum(tl.where(number == 2, known, 0.0), 1)
            outer_inverse = tl.sum(tl.where(number == 3, known, 0.0), 1)
            outer_mean = tl.zeros([BLOCK_ROWS], tl.float32)
    else:
        mean, inverse = _statistics(x, row, in_range, x_row, eps, WIDTH, SLICES, DEPTH)
        if SKIP:
            shift = _level(norm_bias, skip, row, in_range, skip_row, WIDTH, BLOCK_COLUMNS)
    of_steep = tl.zeros([SLICES, BLOCK_FEATURES, BLOCK_ROWS], tl.float32)
    of_inner, of_ones, of_slope, of_sum = of_steep, of_steep, of_steep, of_steep
    nothing = tl.zeros([SLICES, BLOCK_ROWS, DEPTH], tl.float32)
    steep, steep_inner = nothing, nothing
    if SKIP:
        sums, squares, given, given_sum = nothing, nothing, nothing, nothing
        slopes, slopes_inner, sloped, sloped_inner = nothing, nothing, nothing, nothing
    for start in range(0, WIDTH, BLOCK):
        k = _columns(start, SLICES, DEPTH)
        in_row = k < WIDTH
        real = _real(in_range, in_row)
        matrix = _matrix(weight, feature, k, in_features, in_row, 1, FEATURES)
        scale, offset = _scales(norm_weight, norm_bias, k, in_row)
        inner, value, slope = _activated(
            _rows(x, row, k, x_row, real), scale, offset, mean, inverse
        )
        g = _rows(of_h, row, k, of_h_row, real)
        slope *= scale
        if SKIP:
            g *= _line(skip_weight, k, in_row)
            value += _rows(skip, row, k, skip_row, real) - _each(shift)
            value = tl.where(in_row[:, None, :], value, 0.0)
            if not STATISTICS:
                sums += value
                squares += value * value
            given += g
            given_sum += g * value
            slopes += slope
            slopes_inner += slope * inner
            of_slope = _product(matrix, slope, of_slope, PRECISION, UPCAST)
            value *= slope
            sloped += value
            sloped_inner += value * inner
            of_sum = _product(matrix, value, of_sum, PRECISION, UPCAST)
        g *= slope
        steep += g
        steep_inner += g * inner
        of_steep = _product(matrix, g, of_steep, PRECISION, UPCAST)
        of_inner = _product(matrix, inner, of_inner, PRECISION, UPCAST)
        of_ones = _product(matrix, nothing + 1.0, of_ones, PRECISION, UPCAST)
    if SKIP:
        if not STATISTICS:
            outer_mean, outer_inverse = _spread(sums, squares, eps, WIDTH)
        # The gradient of u is outer_inverse * (g - base - u * rise).
        base = _sum(given) / WIDTH
        rise = _sum(given_sum) / WIDTH - outer_mean * base
        rise *= outer_inverse * outer_inverse
        base -= outer_mean * rise
        steep -= _each(base) * slopes + _each(rise) * sloped
        steep_inner -= _each(base) * slopes_inner + _each(rise) * sloped_inner
        of_steep -= base[None, None, :] * of_slope + rise[None, None, :] * of_sum
    level = (_sum(steep) / WIDTH)[None, None, :]
    along = (_sum(steep_inner) / WIDTH)[None, None, :]
    total = tl.sum(of_steep - level * of_ones - along * of_inner, 0)
    factor = inverse
    if SKIP:
        factor *= outer_inverse
    total = total * factor[None, :] + before
    tl.store(place, total.to(into.dtype.element_ty), mask=mask)
    if SKIP:
        share = _columns(tl.program_id(1) * SHARE, 1, SHARE)
        in_share = share < WIDTH
        real_share = _real(in_range, in_share)
        share_scale, share_offset = _scales(norm_weight, norm_bias, share, in_share)
        kept = _rows(x, row, share, x_row, real_share)
        kept = _silu(kept, share_scale, share_offset, mean, inverse)
        kept += _rows(skip, row, share, skip_row, real_share) - _each(shift)
        share_g = _rows(of_h, row, share, of_h_row, real_share)
        share_g *= _line(skip_weight, share, in_share)
        share_g = (share_g - _each(base) - kept * _each(rise)) * _each(outer_inverse)
        found = share_g.to(of_skip.dtype.element_ty)
        tl.store(_place(of_skip, row, share, of_skip_row), found, mask=real_share)


def _precision(platform: str, allow_tf32: bool) -> str:
    """Three TF32 products keep float32 accuracy on tensor cores; AMD has no TF32 dot."""
    if platform == "hip":
        return "ieee"
    return "tf32" if allow_tf32 else "tf32x3"


def _grid(rows: int, features: int, config: Config) -> tuple[int, int]:
    return triton.cdiv(rows, config.block_rows), triton.cdiv(features, config.block_features)


def _constants(
    rows: int, width: int, features: int, config: Config, device: Device
) -> dict[str, Any]:
    """Of both kernels."""
    programs = _grid(rows, features, config)[1]
    return {
        "WIDTH": width,
        "FEATURES": features,
        "BLOCK_ROWS": config.block_rows,
        "BLOCK_FEATURES": config.block_features,
        "SLICES": config.num_warps,
        "DEPTH": max(min(padded(width), config.block_in) // config.num_warps, SMALLEST_SIDE),
        "SHARE": padded(triton.cdiv(width, programs)),
        "LINES": 16 if device.platform == "hip" else 8,
        "BLOCKS": padded(triton.cdiv(width, MOMENT_COLUMNS), 1),
        "BLOCK_COLUMNS": MOMENT_COLUMNS,
    }


def _launch(
    kernel: Any,
    arguments: dict[str, Any],
    flags: dict[str, bool],
    sizes: tuple[int, int, int],
    config: Config,
    device: Device,
) -> None:
    weight: torch.Tensor = arguments["weight"]
    allow_tf32 = torch.get_float32_matmul_precision() != "highest"
    rows, _, features = sizes
    constants = _constants(*sizes, config, device) | flags
    constants["PRECISION"] = _precision(device.platform, allow_tf32)
    constants["UPCAST"] = device.interpreted and weight.dtype == torch.bfloat16
    # Where there is no such tensor any other takes its place, and is not looked at.
    given = {name: weight if value is None else value for name, value in arguments.items()}
    given |= {f"{name}_row": value.stride(0) for name, value in given.items() if name in _STRIDED}
    given |= constants | early(device)
    kernel[_grid(rows, features, config)](
        **{name: given[name] for name in (*kernel.arg_names, "launch_pdl") if name in given},
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


_STRIDED = ("x", "skip", "y", "h", "of_h", "into", "of_skip")


def forward(
    y: torch.Tensor,
    h: torch.Tensor | None,
    of_y: torch.Tensor,
    statistics: torch.Tensor,
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    skip: torch.Tensor | None,
    skip_weight: torch.Tensor | None,
    skip_bias: torch.Tensor | None,
    moments: torch.Tensor | None,
    eps: float,
    config: Config,
    device: Device,
) -> None:
    """Launch on ``x`` (rows, width), rows > 0, into ``y`` (rows, features), the moments ``of_y``,
    ``statistics`` and, if wanted, ``h``. The last axis of every tensor has stride 1; ``weight``
    and what calls tell each other are contiguous."""
    arguments = {
        "x": x,
        "norm_weight": norm_weight,
        "norm_bias": norm_bias,
        "skip": skip,
        "skip_weight": skip_weight,
        "skip_bias": skip_bias,
        "weight": weight,
        "bias": bias,
        "moments": moments,
        "y": y,
        "h": h,
        "of_y": of_y,
        "statistics": statistics,
        "rows": len(x),
        "eps": eps,
    }
    flags = {
        "SKIP": skip is not None,
        "BIAS": bias is not None,
        "KEEP": h is not None,
        "MOMENTS": moments is not None,
    }
    _launch(forward_kernel, arguments, flags, (*x.shape, len(weight)), config, device)


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
    statistics: torch.Tensor | None,
    eps: float,
    config: Config,
    device: Device,
) -> None:
    """Launch on ``x`` (rows, width), rows > 0, and ``weight`` (width, features), into ``into``
    (rows, features) and, with a skip connection, ``of_skip``. Strides as in `forward`."""
    arguments = {
        "of_h": of_h,
        "x": x,
        "norm_weight": norm_weight,
        "norm_bias": norm_bias,
        "skip": skip,
        "skip_weight": skip_weight,
        "weight": weight,
        "statistics": statistics,
        "into": into,
        "of_skip": of_skip,
        "rows": len(x),
        "eps": eps,
    }
    flags = {"SKIP": skip is not None, "ADD": add, "STATISTICS": statistics is not None}
    _launch(gradient_kernel, arguments, flags, (*x.shape, weight.shape[1]), config, device)


def compilations(problem: Problem, config: Config, device: Device) -> list[Compilation]:
    """The specialisation that ``problem`` launches, for contiguous tensors."""
    rows, width, features = (size for _, size in problem.dims)
    backward = problem.direction == "backward"
    kernel = gradient_kernel if backward else forward_kernel
    element = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16"}[problem.dtype]
    exact = ("moments", "of_y", "statistics")
    integers = {
        "rows": rows,
        **dict.fromkeys(("of_h_row", "x_row", "skip_row", "h_row", "of_skip_row"), width),
        **dict.fromkeys(("y_row", "into_row"), features),
    }
    constants = {
        **_constants(rows, width, features, config, device),
        "SKIP": bool(problem.flag("skip", False)),
        **dict.fromkeys(("BIAS", "KEEP", "ADD"), True),
        **dict.fromkeys(("MOMENTS", "STATISTICS"), False),
        "PRECISION": _precision(device.platform, allow_tf32=False),
        "UPCAST": False,
        **early(device),
        # The launcher compiles an integer 1 in, and knows a multiple of 16.
        **{key: 1 for key, value in integers.items() if value == 1},
    }
    aligned = {name for name, value in integers.items() if value % 16 == 0}
    programs = _grid(rows, features, config)
    own = {name: value for name, value in constants.items() if name in kernel.arg_names}
    types = dict.fromkeys(own, "constexpr") | {"eps": "fp32"} | dict.fromkeys(exact, "*fp32")
    signature = {
        name: types.get(name, "i32" if name in integers else element) for name in kernel.arg_names
    }
    divisible = tuple(
        name
        for name, kind in signature.items()
        if kind.startswith("*") or (kind == "i32" and name in aligned)
    )
    return [
        Compilation(
            kernel,
            signature,
            own,
            divisible,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            programs=programs[0] * programs[1],
            uses_dot=problem.dtype != "float32" or device.platform != "hip",
        )
    ]
