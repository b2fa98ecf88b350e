"""Triton kernels of norm, shuffle, activation, dropout, residual and FiLM, and their launches.

A tile is some channels x some positions of one sample, its last axis the contiguous one. Moments
and the sums of the backward pass are made in two stages: each program walks over several tiles
and writes sums of its own, a second stage adds them in a fixed order, so results repeat bit for
bit and a few large groups fill the device as well as many small ones. Where an element of the
input goes in the result is a number for its channel plus a number for its position, whatever the
shuffle; the gate of a gated activation is half of the channels further at the same position.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from ..core import dropout as counter
from ..core.activations import GATED
from ..core.ahead_of_time import Compilation
from ..core.device import Device
from ..core.problem import Problem
from ..core.triton_functions import activation, dropout_keeps, dropout_row_keys
from .spec import Config, computes_statistics, parts, shuffled, tile

if TYPE_CHECKING:
    from .torch_op import Options

_PROGRAMS_PER_PROCESSOR = 4
_COMBINED_ROWS = 16
_COMBINED_MEMBERS = 32


@triton.jit
def _by_channel(value, LAST: tl.constexpr):
    """A value for each channel of the tile, to be broadcast."""
    return value[None, :] if LAST else value[:, None]


@triton.jit
def _by_position(value, LAST: tl.constexpr):
    """A value for each position of the tile, to be broadcast."""
    return value[:, None] if LAST else value[None, :]


@triton.jit
def _over_positions(value, LAST: tl.constexpr):
    """The sum of a tile for each channel."""
    return tl.sum(value, axis=0 if LAST else 1)


@triton.jit
def _zeros(BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, LAST: tl.constexpr):
    """A tile of zeros."""
    if LAST:
        tile = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    else:
        tile = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    return tile


@triton.jit
def _offsets(
    channel, position, CHANNELS: tl.constexpr, POSITIONS: tl.constexpr, LAST: tl.constexpr
):
    """Where the elements of a tile lie in their sample."""
    if LAST:
        offsets = (position * CHANNELS)[:, None] + channel[None, :]
    else:
        offsets = (channel * POSITIONS)[:, None] + position[None, :]
    return offsets


@triton.jit
def _destination(
    channel,
    position,
    WIDTH: tl.constexpr,
    SHUFFLE: tl.constexpr,
    LAST: tl.constexpr,
):
    """Channel and position in the result of each element of a tile: for one of the two, or both,
    the sum of a number for its channel and a number for its position."""
    if SHUFFLE > 1:
        inside = channel % (SHUFFLE * SHUFFLE)
        moved = inside // SHUFFLE * (WIDTH * SHUFFLE) + inside % SHUFFLE
        start = position // WIDTH * (WIDTH * SHUFFLE * SHUFFLE) + position % WIDTH * SHUFFLE
        to_channel = _by_channel(channel // (SHUFFLE * SHUFFLE), LAST)
        to_position = _by_channel(moved, LAST) + _by_position(start, LAST)
    elif SHUFFLE < -1:
        row = position // WIDTH
        column = position % WIDTH
        inside = row % -SHUFFLE * -SHUFFLE + column % -SHUFFLE
        to_channel = _by_channel(channel * (SHUFFLE * SHUFFLE), LAST) + _by_position(inside, LAST)
        moved = row // -SHUFFLE * (WIDTH // -SHUFFLE) + column // -SHUFFLE
        to_position = _by_position(moved, LAST)
    else:
        to_channel = _by_channel(channel, LAST)
        to_position = _by_position(position, LAST)
    return to_channel, to_position


@triton.jit
def _scaled(
    x,
    weight,
    bias,
    mean,
    var,
    sample,
    channel,
    in_line,
    eps,
    NORM: tl.constexpr,
    GROUPS: tl.constexpr,
    PER_GROUP: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    LAST: tl.constexpr,
):
    """z, z * weight + bias, and for each channel the weight and 1 / deviation."""
    inverse = tl.where(in_line, 1.0, 1.0)
    scale = tl.where(in_line, 1.0, 1.0)
    z = x
    if NORM != "none":
        row = channel
        if NORM == "group":
            row = sample * GROUPS + channel // PER_GROUP
        centre = tl.load(mean + row, mask=in_line, other=0.0).to(tl.float32)
        spread = tl.load(var + row, mask=in_line, other=1.0).to(tl.float32)
        inverse = 1.0 / tl.sqrt(spread + eps)
        z = (z - _by_channel(centre, LAST)) * _by_channel(inverse, LAST)
    v = z
    if WEIGHT:
        scale = tl.load(weight + channel, mask=in_line, other=0.0).to(tl.float32)
        v = v * _by_channel(scale, LAST)
    if BIAS:
        level = tl.load(bias + channel, mask=in_line, other=0.0).to(tl.float32)
        v = v + _by_channel(level, LAST)
    return z, v, scale, inverse


@triton.jit(do_not_specialize=["batch", "tiles", "splits"])
def statistics_kernel(
    x,
    partials,
    batch,
    tiles,
    splits,
    x_sample,
    CHANNELS: tl.constexpr,
    POSITIONS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    LAST: tl.constexpr,
    PER_SAMPLE: tl.constexpr,
):
    """Count, mean and sum of squared deviations of ``tiles`` tiles, for each channel."""
    P_BLOCKS: tl.constexpr = (POSITIONS + BLOCK_P - 1) // BLOCK_P
    program = tl.program_id(0)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_line = channel < CHANNELS
    first = program * tiles
    end = batch * P_BLOCKS
    if PER_SAMPLE:
        first = program // splits * P_BLOCKS + program % splits * tiles
        end = (program // splits + 1) * P_BLOCKS

    pivot = tl.zeros([BLOCK_C], tl.float32)
    sums = _zeros(BLOCK_C, BLOCK_P, LAST)
    squares = _zeros(BLOCK_C, BLOCK_P, LAST)
    count = 0.0
    for step in range(tiles):
        at = first + step
        position = at % P_BLOCKS * BLOCK_P + tl.arange(0, BLOCK_P)
        real = (position < POSITIONS) & (at < end)
        mask = _by_channel(in_line, LAST) & _by_position(real, LAST)
        source = x + (at // P_BLOCKS).to(tl.int64) * x_sample
        source = source + _offsets(channel, position, CHANNELS, POSITIONS, LAST)
        value = tl.load(source, mask=mask, other=0.0).to(tl.float32)
        here = tl.sum(real.to(tl.float32), axis=0)
        if step == 0:
            # Deviations from a value near the mean lose nothing where the mean is large.
            pivot = _over_positions(value, LAST) / here
        value = tl.where(mask, value - _by_channel(pivot, LAST), 0.0)
        sums += value
        squares += value * value
        count += here
    level = _over_positions(sums, LAST) / count
    spread = _over_positions(squares, LAST) - level * level * count
    plane = tl.num_programs(0).to(tl.int64) * CHANNELS
    into = partials + program.to(tl.int64) * CHANNELS + channel
    tl.store(into, tl.where(in_line, count, count), mask=in_line)
    tl.store(into + plane, pivot + level, mask=in_line)
    tl.store(into + 2 * plane, tl.where(spread < 0, 0.0, spread), mask=in_line)


@triton.jit(do_not_specialize=["rows", "members", "splits"])
def combine_kernel(
    partials,
    mean,
    var,
    rows,
    members,
    splits,
    plane,
    CHANNELS: tl.constexpr,
    GROUPS: tl.constexpr,
    PER_GROUP: tl.constexpr,
    PER_SAMPLE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_MEMBERS: tl.constexpr,
):
    """Mean and variance of each row from the ``members`` partial ones of it."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    in_rows = row < rows
    base = row.to(tl.int64)
    if PER_SAMPLE:
        base = (row // GROUPS).to(tl.int64) * splits * CHANNELS + row % GROUPS * PER_GROUP
    pivot = tl.load(partials + plane + base, mask=in_rows, other=0.0)
    totals = tl.zeros([BLOCK_MEMBERS, BLOCK_ROWS], tl.float32)
    levels = tl.zeros([BLOCK_MEMBERS, BLOCK_ROWS], tl.float32)
    for start in range(0, members, BLOCK_MEMBERS):
        member = start + tl.arange(0, BLOCK_MEMBERS)
        mask = (member < members)[:, None] & in_rows[None, :]
        at = member.to(tl.int64) * CHANNELS
        if PER_SAMPLE:
            at = (member // PER_GROUP).to(tl.int64) * CHANNELS + member % PER_GROUP
        place = partials + base[None, :] + at[:, None]
        count = tl.load(place, mask=mask, other=0.0)
        level = tl.load(place + plane, mask=mask, other=0.0)
        totals += count
        levels += tl.where(mask, count * (level - pivot[None, :]), 0.0)
    total = tl.where(in_rows, tl.sum(totals, axis=0), 1.0)
    centre = pivot + tl.sum(levels, axis=0) / total
    spreads = tl.zeros([BLOCK_MEMBERS, BLOCK_ROWS], tl.float32)
    for start in range(0, members, BLOCK_MEMBERS):
        member = start + tl.arange(0, BLOCK_MEMBERS)
        mask = (member < members)[:, None] & in_rows[None, :]
        at = member.to(tl.int64) * CHANNELS
        if PER_SAMPLE:
            at = (member // PER_GROUP).to(tl.int64) * CHANNELS + member % PER_GROUP
        place = partials + base[None, :] + at[:, None]
        count = tl.load(place, mask=mask, other=0.0)
        level = tl.load(place + plane, mask=mask, other=0.0) - centre[None, :]
        spread = tl.load(place + 2 * plane, mask=mask, other=0.0)
        spreads += tl.where(mask, spread + count * level * level, 0.0)
    tl.store(mean + row, centre, mask=in_rows)
    tl.store(var + row, tl.sum(spreads, axis=0) / total, mask=in_rows)


@triton.jit
def forward_kernel(
    x,
    weight,
    bias,
    residual,
    scale,
    shift,
    mean,
    var,
    seed,
    y,
    x_sample,
    residual_sample,
    eps,
    threshold,
    kept_scale,
    CHANNELS: tl.constexpr,
    POSITIONS: tl.constexpr,
    WIDTH: tl.constexpr,
    OUT_CHANNELS: tl.constexpr,
    OUT_POSITIONS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    LAST: tl.constexpr,
    NORM: tl.constexpr,
    GROUPS: tl.constexpr,
    PER_GROUP: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    SHUFFLE: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    FILM: tl.constexpr,
    RESIDUAL: tl.constexpr,
    RESIDUAL_FIRST: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    """One tile, read once and written once."""
    C_BLOCKS: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    P_BLOCKS: tl.constexpr = (POSITIONS + BLOCK_P - 1) // BLOCK_P
    PARTS: tl.constexpr = 2 if GATED else 1
    program = tl.program_id(0)
    sample = (program // (C_BLOCKS * P_BLOCKS)).to(tl.int64)
    channel = program // P_BLOCKS % C_BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)
    position = program % P_BLOCKS * BLOCK_P + tl.arange(0, BLOCK_P)
    in_line = channel < CHANNELS
    mask = _by_channel(in_line, LAST) & _by_position(position < POSITIONS, LAST)
    source = x + sample * x_sample
    source = source + _offsets(channel, position, PARTS * CHANNELS, POSITIONS, LAST)
    value = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    _, result, _, _ = _scaled(
        value, weight, bias, mean, var, sample, channel, in_line, eps,
        NORM, GROUPS, PER_GROUP, WEIGHT, BIAS, LAST,
    )  # fmt: skip
    to_channel, to_position = _destination(channel, position, WIDTH, SHUFFLE, LAST)
    if LAST:
        target = to_position * OUT_CHANNELS + to_channel
    else:
        target = to_channel * OUT_POSITIONS + to_position
    if DROPOUT:
        k0, k1 = dropout_row_keys(tl.load(seed), sample)
        keeps = dropout_keeps(k0, k1, to_channel * OUT_POSITIONS + to_position, threshold)
    if RESIDUAL:
        added = tl.load(residual + sample * residual_sample + target, mask=mask, other=0.0)
        added = added.to(tl.float32)
    if RESIDUAL_FIRST:
        if DROPOUT:
            result = tl.where(keeps, result * kept_scale, 0.0)
        if RESIDUAL:
            result += added
    if GATED:
        half = CHANNELS if LAST else CHANNELS * POSITIONS
        gate = tl.load(source + half, mask=mask, other=0.0).to(tl.float32)
        _, gate, _, _ = _scaled(
            gate, weight, bias, mean, var, sample, channel + CHANNELS, in_line, eps,
            NORM, GROUPS, PER_GROUP, WEIGHT, BIAS, LAST,
        )  # fmt: skip
        opened, _ = activation(gate, ACTIVATION)
        result = result * opened
    else:
        result, _ = activation(result, ACTIVATION)
    if DROPOUT and not RESIDUAL_FIRST:
        result = tl.where(keeps, result * kept_scale, 0.0)
    if FILM:
        row = sample * CHANNELS + channel
        factor = tl.load(scale + row, mask=in_line, other=0.0).to(tl.float32)
        level = tl.load(shift + row, mask=in_line, other=0.0).to(tl.float32)
        result = result * _by_channel(factor, LAST) + _by_channel(level, LAST)
    if RESIDUAL and not RESIDUAL_FIRST:
        result += added
    into = y + sample * (OUT_CHANNELS * OUT_POSITIONS) + target
    tl.store(into, result.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _pulled(
    x,
    weight,
    bias,
    residual,
    scale,
    mean,
    var,
    seed,
    of_y,
    sample,
    channel,
    position,
    real,
    x_sample,
    residual_sample,
    of_y_sample,
    eps,
    threshold,
    kept_scale,
    CHANNELS: tl.constexpr,
    POSITIONS: tl.constexpr,
    WIDTH: tl.constexpr,
    OUT_CHANNELS: tl.constexpr,
    OUT_POSITIONS: tl.constexpr,
    LAST: tl.constexpr,
    NORM: tl.constexpr,
    GROUPS: tl.constexpr,
    PER_GROUP: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    SHUFFLE: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    FILM: tl.constexpr,
    RESIDUAL: tl.constexpr,
    RESIDUAL_FIRST: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    """What both backward kernels need of a tile: z, the gradient of z * weight + bias, weight and
    1 / deviation, all of these for the gate as well, the cotangent, what FiLM scaled, the gradient
    of a residual that was added first, and where that lies."""
    PARTS: tl.constexpr = 2 if GATED else 1
    in_line = channel < CHANNELS
    mask = _by_channel(in_line, LAST) & _by_position(real, LAST)
    source = x + sample * x_sample
    source = source + _offsets(channel, position, PARTS * CHANNELS, POSITIONS, LAST)
    value = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    z, v, factor, inverse = _scaled(
        value, weight, bias, mean, var, sample, channel, in_line, eps,
        NORM, GROUPS, PER_GROUP, WEIGHT, BIAS, LAST,
    )  # fmt: skip
    to_channel, to_position = _destination(channel, position, WIDTH, SHUFFLE, LAST)
    if LAST:
        target = to_position * OUT_CHANNELS + to_channel
    else:
        target = to_channel * OUT_POSITIONS + to_position
    grad = tl.load(of_y + sample * of_y_sample + target, mask=mask, other=0.0).to(tl.float32)
    of_made = grad
    if FILM:
        row = sample * CHANNELS + channel
        spread = tl.load(scale + row, mask=in_line, other=0.0).to(tl.float32)
        of_made = of_made * _by_channel(spread, LAST)
    if DROPOUT:
        k0, k1 = dropout_row_keys(tl.load(seed), sample)
        keeps = dropout_keeps(k0, k1, to_channel * OUT_POSITIONS + to_position, threshold)
    if RESIDUAL_FIRST:
        if DROPOUT:
            v = tl.where(keeps, v * kept_scale, 0.0)
        if RESIDUAL:
            added = tl.load(residual + sample * residual_sample + target, mask=mask, other=0.0)
            v += added.to(tl.float32)
    elif DROPOUT:
        of_made = tl.where(keeps, of_made * kept_scale, 0.0)
    gate_z, of_gate, gate_factor, gate_inverse = z, z, factor, inverse
    if GATED:
        half = CHANNELS if LAST else CHANNELS * POSITIONS
        gate = tl.load(source + half, mask=mask, other=0.0).to(tl.float32)
        gate_z, gate, gate_factor, gate_inverse = _scaled(
            gate, weight, bias, mean, var, sample, channel + CHANNELS, in_line, eps,
            NORM, GROUPS, PER_GROUP, WEIGHT, BIAS, LAST,
        )  # fmt: skip
        opened, slope = activation(gate, ACTIVATION)
        made = v * opened
        of_gate = tl.where(mask, of_made * v * slope, 0.0)
        of_v = of_made * opened
    else:
        made, slope = activation(v, ACTIVATION)
        of_v = of_made * slope
    of_residual = of_v
    if DROPOUT:
        if RESIDUAL_FIRST:
            of_v = tl.where(keeps, of_v * kept_scale, 0.0)
        else:
            made = tl.where(keeps, made * kept_scale, 0.0)
    of_v = tl.where(mask, of_v, 0.0)
    # fmt: off
    return (
        z, of_v, factor, inverse, gate_z, of_gate, gate_factor, gate_inverse,
        grad, made, of_residual, target,
    )
    # fmt: on


@triton.jit(do_not_specialize=["batch", "tiles", "splits"])
def reduce_kernel(
    x,
    weight,
    bias,
    residual,
    scale,
    mean,
    var,
    seed,
    of_y,
    sums,
    batch,
    tiles,
    splits,
    x_sample,
    residual_sample,
    of_y_sample,
    eps,
    threshold,
    kept_scale,
    CHANNELS: tl.constexpr,
    POSITIONS: tl.constexpr,
    WIDTH: tl.constexpr,
    OUT_CHANNELS: tl.constexpr,
    OUT_POSITIONS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    LAST: tl.constexpr,
    NORM: tl.constexpr,
    GROUPS: tl.constexpr,
    PER_GROUP: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    SHUFFLE: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    FILM: tl.constexpr,
    RESIDUAL: tl.constexpr,
    RESIDUAL_FIRST: tl.constexpr,
    DROPOUT: tl.constexpr,
    PER_SAMPLE: tl.constexpr,
):
    """The sums of ``tiles`` tiles for each channel: of the gradient of v = z * weight + bias, of
    that times z, and for FiLM of the cotangent times what was scaled, and of the cotangent."""
    PARTS: tl.constexpr = 2 if GATED else 1
    P_BLOCKS: tl.constexpr = (POSITIONS + BLOCK_P - 1) // BLOCK_P
    program = tl.program_id(0)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_line = channel < CHANNELS
    first = program * tiles
    end = batch * P_BLOCKS
    if PER_SAMPLE:
        first = program // splits * P_BLOCKS + program % splits * tiles
        end = (program // splits + 1) * P_BLOCKS
    sum_bias = _zeros(BLOCK_C, BLOCK_P, LAST)
    sum_weight = _zeros(BLOCK_C, BLOCK_P, LAST)
    gate_bias = _zeros(BLOCK_C, BLOCK_P, LAST)
    gate_weight = _zeros(BLOCK_C, BLOCK_P, LAST)
    sum_scale = _zeros(BLOCK_C, BLOCK_P, LAST)
    sum_shift = _zeros(BLOCK_C, BLOCK_P, LAST)
    for step in range(tiles):
        at = first + step
        position = at % P_BLOCKS * BLOCK_P + tl.arange(0, BLOCK_P)
        real = (position < POSITIONS) & (at < end)
        # Beyond the last tile nothing is real, but its moments must be: 0 times NaN is NaN.
        sample = (tl.minimum(at, end - 1) // P_BLOCKS).to(tl.int64)
        z, of_v, _, _, gate_z, of_gate, _, _, grad, made, _, _ = _pulled(
            x, weight, bias, residual, scale, mean, var, seed, of_y,
            sample, channel, position, real, x_sample, residual_sample, of_y_sample,
            eps, threshold, kept_scale, CHANNELS, POSITIONS, WIDTH, OUT_CHANNELS, OUT_POSITIONS,
            LAST, NORM, GROUPS, PER_GROUP, ACTIVATION, GATED, SHUFFLE, WEIGHT, BIAS,
            FILM, RESIDUAL, RESIDUAL_FIRST, DROPOUT,
        )  # fmt: skip
        sum_bias += of_v
        sum_weight += of_v * z
        if GATED:
            gate_bias += of_gate
            gate_weight += of_gate * gate_z
        if FILM:
            sum_scale += grad * made
            sum_shift += grad
    plane = tl.num_programs(0).to(tl.int64) * PARTS * CHANNELS
    into = sums + program.to(tl.int64) * PARTS * CHANNELS + channel
    tl.store(into, _over_positions(sum_bias, LAST), mask=in_line)
    tl.store(into + plane, _over_positions(sum_weight, LAST), mask=in_line)
    if GATED:
        tl.store(into + CHANNELS, _over_positions(gate_bias, LAST), mask=in_line)
        tl.store(into + plane + CHANNELS, _over_positions(gate_weight, LAST), mask=in_line)
    if FILM:
        tl.store(into + 2 * plane, _over_positions(sum_scale, LAST), mask=in_line)
        tl.store(into + 3 * plane, _over_positions(sum_shift, LAST), mask=in_line)


@triton.jit
def _through_the_norm(
    of_v,
    z,
    factor,
    inverse,
    totals,
    plane,
    sample,
    channel,
    in_line,
    per_element,
    NORM: tl.constexpr,
    GROUPS: tl.constexpr,
    PER_GROUP: tl.constexpr,
    LAST: tl.constexpr,
):
    """The gradient of x, given that of z * weight + bias."""
    of_z = of_v * _by_channel(factor, LAST)
    if NORM == "batch" or NORM == "group":
        row = channel
        if NORM == "group":
            row = sample * GROUPS + channel // PER_GROUP
        level = tl.load(totals + row, mask=in_line, other=0.0) * per_element
        along = tl.load(totals + plane + row, mask=in_line, other=0.0) * per_element
        if NORM == "batch":
            level *= factor
            along *= factor
        of_z = of_z - _by_channel(level, LAST) - z * _by_channel(along, LAST)
    return of_z * _by_channel(inverse, LAST)


@triton.jit
def backward_kernel(
    x,
    weight,
    bias,
    residual,
    scale,
    mean,
    var,
    seed,
    of_y,
    totals,
    of_x,
    of_residual,
    plane,
    x_sample,
    residual_sample,
    of_y_sample,
    eps,
    threshold,
    kept_scale,
    per_element,
    CHANNELS: tl.constexpr,
    POSITIONS: tl.constexpr,
    WIDTH: tl.constexpr,
    OUT_CHANNELS: tl.constexpr,
    OUT_POSITIONS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    LAST: tl.constexpr,
    NORM: tl.constexpr,
    GROUPS: tl.constexpr,
    PER_GROUP: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    SHUFFLE: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    FILM: tl.constexpr,
    RESIDUAL: tl.constexpr,
    RESIDUAL_FIRST: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    """One tile of the gradients of x and of a residual that was added first."""
    C_BLOCKS: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    P_BLOCKS: tl.constexpr = (POSITIONS + BLOCK_P - 1) // BLOCK_P
    PARTS: tl.constexpr = 2 if GATED else 1
    program = tl.program_id(0)
    sample = (program // (C_BLOCKS * P_BLOCKS)).to(tl.int64)
    channel = program // P_BLOCKS % C_BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)
    position = program % P_BLOCKS * BLOCK_P + tl.arange(0, BLOCK_P)
    in_line = channel < CHANNELS
    real = position < POSITIONS
    mask = _by_channel(in_line, LAST) & _by_position(real, LAST)
    z, of_v, factor, inverse, gate_z, of_gate, gate_factor, gate_inverse, _, _, added, place = (
        _pulled(
            x, weight, bias, residual, scale, mean, var, seed, of_y,
            sample, channel, position, real, x_sample, residual_sample, of_y_sample,
            eps, threshold, kept_scale, CHANNELS, POSITIONS, WIDTH, OUT_CHANNELS, OUT_POSITIONS,
            LAST, NORM, GROUPS, PER_GROUP, ACTIVATION, GATED, SHUFFLE, WEIGHT, BIAS,
            FILM, RESIDUAL, RESIDUAL_FIRST, DROPOUT,
        )
    )  # fmt: skip
    target = of_x + sample * (PARTS * CHANNELS * POSITIONS)
    target = target + _offsets(channel, position, PARTS * CHANNELS, POSITIONS, LAST)
    gradient = _through_the_norm(
        of_v, z, factor, inverse, totals, plane, sample, channel, in_line, per_element,
        NORM, GROUPS, PER_GROUP, LAST,
    )  # fmt: skip
    tl.store(target, gradient.to(of_x.dtype.element_ty), mask=mask)
    if GATED:
        gradient = _through_the_norm(
            of_gate, gate_z, gate_factor, gate_inverse, totals, plane, sample,
            channel + CHANNELS, in_line, per_element, NORM, GROUPS, PER_GROUP, LAST,
        )  # fmt: skip
        half = CHANNELS if LAST else CHANNELS * POSITIONS
        tl.store(target + half, gradient.to(of_x.dtype.element_ty), mask=mask)
    if RESIDUAL and RESIDUAL_FIRST:
        into = of_residual + sample * (OUT_CHANNELS * OUT_POSITIONS) + place
        tl.store(into, added.to(of_residual.dtype.element_ty), mask=mask)


def _constants(
    channels: int,
    height: int,
    width: int,
    config: Config,
    *,
    norm: str,
    num_groups: int,
    name: str,
    shuffle: int,
    channels_last: bool,
) -> dict[str, Any]:
    """What the kernels that apply everything are compiled for; ``channels`` are those of x."""
    of_result, sides = shuffled(channels, [height, width], shuffle)
    halves = parts(name)
    block_c, block_p = tile(channels // halves, height * width, channels_last, config.block)
    return {
        "CHANNELS": channels // halves,
        "POSITIONS": height * width,
        "WIDTH": width,
        "OUT_CHANNELS": of_result // halves,
        "OUT_POSITIONS": sides[0] * sides[1],
        "BLOCK_C": block_c,
        "BLOCK_P": block_p,
        "LAST": channels_last,
        "NORM": norm,
        "GROUPS": num_groups,
        "PER_GROUP": channels // num_groups,
        "ACTIVATION": GATED.get(name, name),
        "GATED": name in GATED,
        "SHUFFLE": shuffle if abs(shuffle) > 1 else 1,
    }


def _blocks(constants: dict[str, Any]) -> tuple[int, int]:
    """Tiles along the channels and along the positions of a sample."""
    return (
        triton.cdiv(constants["CHANNELS"], constants["BLOCK_C"]),
        triton.cdiv(constants["POSITIONS"], constants["BLOCK_P"]),
    )


def _chunks(
    batch: int, blocks: tuple[int, int], per_sample: bool, processors: int
) -> tuple[int, int, int]:
    """Programs, tiles for each, and programs for each sample where no program serves two: enough
    to fill the device, no more, since each writes sums of its own."""
    wanted = max(_PROGRAMS_PER_PROCESSOR * processors // blocks[0], 1)
    if per_sample:
        splits = min(triton.cdiv(wanted, batch), blocks[1])
        tiles = triton.cdiv(blocks[1], splits)
        splits = triton.cdiv(blocks[1], tiles)
        return batch * splits, tiles, splits
    total = batch * blocks[1]
    tiles = triton.cdiv(total, min(total, wanted))
    return triton.cdiv(total, tiles), tiles, 1


def _statistics_constants(
    channels: int, positions: int, channels_last: bool, per_sample: bool, config: Config
) -> dict[str, Any]:
    block_c, block_p = tile(channels, positions, channels_last, config.block)
    return {
        "CHANNELS": channels,
        "POSITIONS": positions,
        "BLOCK_C": block_c,
        "BLOCK_P": block_p,
        "LAST": channels_last,
        "PER_SAMPLE": per_sample,
    }


def _combine_constants(channels: int, num_groups: int, per_sample: bool) -> dict[str, Any]:
    return {
        "CHANNELS": channels,
        "GROUPS": num_groups,
        "PER_GROUP": channels // num_groups,
        "PER_SAMPLE": per_sample,
        "BLOCK_ROWS": _COMBINED_ROWS,
        "BLOCK_MEMBERS": _COMBINED_MEMBERS,
    }


def _combined(programs: int, splits: int, constants: dict[str, Any]) -> int:
    """How many partial moments make one."""
    if constants["PER_SAMPLE"]:
        return splits * int(constants["PER_GROUP"])
    return programs


def _lying(x: torch.Tensor, channels_last: bool) -> torch.Tensor:
    """``x`` with each sample as the kernels take it: without a copy if it already lies so."""
    _, channels, height, width = x.shape
    wanted = (1, width * channels, channels) if channels_last else (height * width, width, 1)
    sides = zip(x.shape[1:], x.stride()[1:], wanted, strict=True)
    if all(size == 1 or got == want for size, got, want in sides):
        return x
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return x.contiguous(memory_format=layout)


def _made(shape: tuple[int, ...], x: torch.Tensor, channels_last: bool) -> torch.Tensor:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)


def _moments(
    x: torch.Tensor, options: Options, config: Config, device: Device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and biased variance, (channels,) of the batch or (batch, groups)."""
    batch, channels, height, width = x.shape
    per_sample = options.norm == "group"
    constants = _statistics_constants(
        channels, height * width, options.channels_last, per_sample, config
    )
    blocks = _blocks(constants)
    programs, tiles, splits = _chunks(batch, blocks, per_sample, device.processors)
    partials = torch.empty((3, programs, channels), dtype=torch.float32, device=x.device)
    statistics_kernel[(programs, blocks[0])](
        x, partials, batch, tiles, splits, x.stride(0), **constants, num_warps=config.num_warps
    )
    shape = (batch, options.num_groups) if per_sample else (channels,)
    mean = torch.empty(shape, dtype=torch.float32, device=x.device)
    var = torch.empty_like(mean)
    constants = _combine_constants(channels, options.num_groups, per_sample)
    combine_kernel[(triton.cdiv(mean.numel(), _COMBINED_ROWS),)](
        partials,
        mean,
        var,
        mean.numel(),
        _combined(programs, splits, constants),
        splits,
        programs * channels,
        **constants,
        num_warps=4,
    )
    return mean, var


def _flags(weight: Any, bias: Any, residual: Any, film: Any, options: Options) -> dict[str, bool]:
    return {
        "WEIGHT": weight is not None,
        "BIAS": bias is not None,
        "FILM": film is not None,
        "RESIDUAL": residual is not None,
        "RESIDUAL_FIRST": options.residual_first,
        "DROPOUT": options.dropout > 0,
    }


def _constants_of(x: torch.Tensor, options: Options, config: Config) -> dict[str, Any]:
    return _constants(
        x.shape[1],
        x.shape[2],
        x.shape[3],
        config,
        norm=options.norm,
        num_groups=options.num_groups,
        name=options.activation,
        shuffle=options.shuffle,
        channels_last=options.channels_last,
    )


def forward(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    mean: torch.Tensor | None,
    var: torch.Tensor | None,
    seed: torch.Tensor | None,
    options: Options,
    config: Config,
    device: Device,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launch on ``x`` (batch, channels, height, width) with elements; the result and the moments
    that were computed, empty where they were given."""
    last = options.channels_last
    x = _lying(x, last)
    moments = x.new_empty(0, dtype=torch.float32), x.new_empty(0, dtype=torch.float32)
    if options.norm in ("batch", "group"):
        mean, var = moments = _moments(x, options, config, device)
    constants = _constants_of(x, options, config)
    batch = x.shape[0]
    channels, sides = shuffled(x.shape[1], list(x.shape[2:]), options.shuffle)
    y = _made((batch, channels // parts(options.activation), *sides), x, last)
    residual = None if residual is None else _lying(residual, last)
    c_blocks, p_blocks = _blocks(constants)
    forward_kernel[(batch * c_blocks * p_blocks,)](
        x,
        x if weight is None else weight,
        x if bias is None else bias,
        x if residual is None else residual,
        x if scale is None else scale,
        x if shift is None else shift,
        x if mean is None else mean,
        x if var is None else var,
        x if seed is None else seed,
        y,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        options.eps,
        counter.threshold(options.dropout),
        1.0 / (1.0 - options.dropout),
        **constants,
        **_flags(weight, bias, residual, scale, options),
        num_warps=config.num_warps,
    )
    return y, *moments


def backward(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    mean: torch.Tensor | None,
    var: torch.Tensor | None,
    seed: torch.Tensor | None,
    of_y: torch.Tensor,
    options: Options,
    config: Config,
    device: Device,
) -> list[torch.Tensor | None]:
    """The gradients of x, weight, bias, a residual that was added first, scale and shift."""
    last = options.channels_last
    x, of_y = _lying(x, last), _lying(of_y, last)
    residual = None if residual is None else _lying(residual, last)
    batch, channels, height, width = x.shape
    constants = _constants_of(x, options, config)
    flags = _flags(weight, bias, residual, scale, options)
    blocks = _blocks(constants)
    arguments = (
        x,
        x if weight is None else weight,
        x if bias is None else bias,
        x if residual is None else residual,
        x if scale is None else scale,
        x if mean is None else mean,
        x if var is None else var,
        x if seed is None else seed,
        of_y,
    )
    strides = x.stride(0), 0 if residual is None else residual.stride(0), of_y.stride(0)
    numbers = options.eps, counter.threshold(options.dropout), 1.0 / (1.0 - options.dropout)
    found: list[torch.Tensor | None] = [None] * 6
    totals, per_element = x, 1.0
    normalises = options.norm in ("batch", "group")
    if normalises or any(value is not None for value in (weight, bias, scale)):
        per_sample = options.norm == "group" or scale is not None
        programs, tiles, splits = _chunks(batch, blocks, per_sample, device.processors)
        planes = 2 if scale is None else 4
        sums = torch.empty((planes, programs, channels), dtype=torch.float32, device=x.device)
        reduce_kernel[(programs, blocks[0])](
            *arguments,
            sums,
            batch,
            tiles,
            splits,
            *strides,
            *numbers,
            **constants,
            **flags,
            PER_SAMPLE=per_sample,
            num_warps=config.num_warps,
        )
        if per_sample:
            sums = sums.reshape(planes, batch, splits, channels).sum(2)
        summed = sums[:2].sum(1)
        found[2], found[1] = summed
        if scale is not None:
            found[4], found[5] = sums[2:, :, : constants["CHANNELS"]]
        totals, per_element = summed, 1.0 / (batch * height * width)
        if options.norm == "group":
            totals = sums[:2] if weight is None else sums[:2] * weight
            totals = totals.reshape(2, batch, options.num_groups, -1).sum(-1)
            per_element = options.num_groups / (channels * height * width)
    of_x = _made(tuple(x.shape), x, last)
    of_residual = x
    if residual is not None and options.residual_first:
        found[3] = of_residual = _made(tuple(of_y.shape), x, last)
    backward_kernel[(batch * blocks[0] * blocks[1],)](
        *arguments,
        totals,
        of_x,
        of_residual,
        totals.numel() // 2,
        *strides,
        *numbers,
        per_element,
        **constants,
        **flags,
        num_warps=config.num_warps,
    )
    found[0] = of_x
    return found


def compilations(problem: Problem, config: Config, device: Device) -> list[Compilation]:
    """The specialisations that ``problem`` launches, for tensors without gaps."""
    batch, channels = problem["batch"], problem["channels"]
    height, width = problem["height"], problem["width"]
    last = bool(problem.flag("channels_last", False))
    norm, groups = problem.flag("norm", "batch"), problem.flag("num_groups", 1)
    if norm == "batch" and not computes_statistics(problem):
        norm = "given"
    dropout, film = problem.flag("dropout", 0.0), bool(problem.flag("film", False))
    constants = _constants(
        channels,
        height,
        width,
        config,
        norm=norm,
        num_groups=groups,
        name=problem.flag("activation", "Identity"),
        shuffle=problem.flag("shuffle", 0),
        channels_last=last,
    )
    flags = {
        "WEIGHT": True,
        "BIAS": True,
        "FILM": film,
        "RESIDUAL": bool(problem.flag("residual", True)),
        "RESIDUAL_FIRST": bool(problem.flag("residual_first", False)),
        "DROPOUT": dropout > 0,
    }
    element = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16"}[problem.dtype]
    result = constants["OUT_CHANNELS"] * constants["OUT_POSITIONS"]
    integers = {
        "batch": batch,
        "tiles": 0,
        "splits": 0,
        "rows": 0,
        "members": 0,
        "plane": 2 * channels if norm == "batch" else 2 * batch * groups,
        "x_sample": channels * height * width,
        "residual_sample": result,
        "of_y_sample": result,
        "threshold": counter.threshold(dropout),
    }
    free = {"batch", "tiles", "splits", "rows", "members"}
    floats = ("eps", "kept_scale", "per_element")
    exact = {"partials", "sums", "totals", "mean", "var"}

    def compilation(
        kernel: Any, constants: dict[str, Any], programs: int, warps: int
    ) -> Compilation:
        signature = {}
        for argument in kernel.arg_names:
            kind = "*fp32" if argument in exact else element
            if argument in constants:
                kind = "constexpr"
            elif argument in integers:
                kind = "i32"
            elif argument in floats:
                kind = "fp32"
            elif argument == "seed" and dropout:
                kind = "*i64"
            signature[argument] = kind
        divisible = tuple(
            argument
            for argument, kind in signature.items()
            if kind.startswith("*")
            or (kind == "i32" and argument not in free and integers[argument] % 16 == 0)
        )
        return Compilation(
            kernel, signature, constants, divisible, num_warps=warps, programs=programs
        )

    blocks = _blocks(constants)
    made = []
    if problem.direction == "forward":
        if norm in ("batch", "group"):
            per_sample = norm == "group"
            of_moments = _statistics_constants(channels, height * width, last, per_sample, config)
            of_blocks = _blocks(of_moments)
            programs, _, _ = _chunks(batch, of_blocks, per_sample, device.processors)
            rows = batch * groups if per_sample else channels
            made = [
                compilation(
                    statistics_kernel, of_moments, programs * of_blocks[0], config.num_warps
                ),
                compilation(
                    combine_kernel,
                    _combine_constants(channels, groups, per_sample),
                    triton.cdiv(rows, _COMBINED_ROWS),
                    4,
                ),
            ]
        kernel: Any = forward_kernel
    else:
        per_sample = norm == "group" or film
        programs, _, _ = _chunks(batch, blocks, per_sample, device.processors)
        of_sums = {**constants, **flags, "PER_SAMPLE": per_sample}
        made = [compilation(reduce_kernel, of_sums, programs * blocks[0], config.num_warps)]
        kernel = backward_kernel
    everywhere = batch * blocks[0] * blocks[1]
    return [
        *made,
        compilation(kernel, {**constants, **flags}, everywhere, config.num_warps),
    ]
