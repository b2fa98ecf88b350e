"""The Triton kernels of a convolution with what follows it, and their launches.

An implicit matrix product: a tile has positions for rows and output channels for columns, and its
depth is the window's elements, gathered from the input as they are needed. The shuffle is part of
the address that a result is written to. With the window's positions read backwards the same kernel
is the gradient of the input; the gradient of per-sample weights is a second one.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl

from ..core.ahead_of_time import Compilation
from ..core.device import Device
from ..core.problem import Problem
from ..core.triton_functions import activation
from .spec import (
    SMALLEST_SIDE,
    Config,
    Geometry,
    Options,
    geometry,
    geometry_of,
    options_of,
    padded,
)


@triton.jit
def _source(
    position, tap, size, MODE: tl.constexpr, STRIDE: tl.constexpr, DILATION: tl.constexpr,
    PADDING: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """Where along a side an element of the window lies, and whether it is there."""
    if BACKWARD:
        reached = position + PADDING - tap * DILATION
        index = reached // STRIDE
        inside = (reached >= 0) & (index * STRIDE == reached) & (index < size)
    else:
        index = position * STRIDE - PADDING + tap * DILATION
        if MODE == "reflect":
            index = tl.abs(index)
            index = tl.where(index >= size, 2 * (size - 1) - index, index)
        elif MODE == "replicate":
            index = tl.minimum(tl.maximum(index, 0), size - 1)
        elif MODE == "circular":
            index = tl.where(index < 0, index + size, index)
            index = tl.where(index >= size, index - size, index)
        inside = (index >= 0) & (index < size)
    return index, inside


@triton.jit
def _depth(
    step, IN: tl.constexpr, TAPS: tl.constexpr, BLOCK_IN: tl.constexpr, FLAT: tl.constexpr,
    TAPS_LAST: tl.constexpr,
):  # fmt: skip
    """Channel and window element of a block of the product's depth, and which of it exist.

    ``FLAT``: channels and elements in one row, for few channels, in the order of the weight;
    otherwise a step has one element (a scalar) and a block of channels.
    """
    if FLAT:
        k = step * BLOCK_IN + tl.arange(0, BLOCK_IN)
        in_depth = k < IN * TAPS
        if TAPS_LAST:
            channel = k // TAPS
            tap = k % TAPS
        else:
            channel = k % IN
            tap = k // IN
    else:
        blocks: tl.constexpr = (IN + BLOCK_IN - 1) // BLOCK_IN
        tap = step // blocks
        channel = step % blocks * BLOCK_IN + tl.arange(0, BLOCK_IN)
        in_depth = channel < IN
    return channel, tap, in_depth


@triton.jit
def _window(
    rows, position_y, position_x, in_rows, channel, tap, in_depth, height, width, x_channel, x_y,
    x_x, WINDOW_X: tl.constexpr, MODE: tl.constexpr, STRIDE: tl.constexpr,
    DILATION: tl.constexpr, PADDING_Y: tl.constexpr, PADDING_X: tl.constexpr,
    BACKWARD: tl.constexpr, FLAT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The block (positions, depth) of the input; ``rows`` point to each position's sample."""
    tap_y = tap // WINDOW_X
    tap_x = tap % WINDOW_X
    if FLAT:
        tap_y = tap_y[None, :]
        tap_x = tap_x[None, :]
    y, in_y = _source(
        position_y[:, None], tap_y, height, MODE, STRIDE, DILATION, PADDING_Y, BACKWARD
    )
    x, in_x = _source(
        position_x[:, None], tap_x, width, MODE, STRIDE, DILATION, PADDING_X, BACKWARD
    )
    if WIDE:
        y, x, channel = y.to(tl.int64), x.to(tl.int64), channel.to(tl.int64)
    place = rows[:, None] + (y * x_y + x * x_x + (channel * x_channel)[None, :])
    mask = (in_rows[:, None] & in_depth[None, :]) & (in_y & in_x)
    return tl.load(place, mask=mask, other=0.0)


@triton.jit
def _dot(left, right, total, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    if UPCAST:
        # The interpreter cannot multiply matrices of bfloat16.
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, total, input_precision=PRECISION)


@triton.jit
def _positions(block, rows, area, columns, BLOCK: tl.constexpr):
    """The sample whose weights a block takes; sample, row and column of its positions, and which
    of them exist. ``rows`` positions share weights; where all samples do, a block may reach from
    one into the next."""
    blocks = tl.cdiv(rows, BLOCK)
    own = (block // blocks).to(tl.int64)
    row = (block % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    sample = row // area
    place = (row - sample * area).to(tl.int32)
    return own, own + sample, place // columns, place % columns, row < rows


@triton.jit
def _shuffled(
    channel, y, x, at_channel, at_y, at_x, SCALE: tl.constexpr, FACTOR_Y: tl.constexpr,
    FACTOR_X: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Where in a sample the convolution's results (positions, channels) lie after the shuffle."""
    if WIDE:
        channel, y, x = channel.to(tl.int64), y.to(tl.int64), x.to(tl.int64)
    if SCALE > 0:
        of_channel = channel // (FACTOR_Y * FACTOR_X) * at_channel
        of_channel += channel // FACTOR_X % FACTOR_Y * at_y + channel % FACTOR_X * at_x
        of_position = y * FACTOR_Y * at_y + x * FACTOR_X * at_x
    elif SCALE < 0:
        of_channel = channel * (FACTOR_Y * FACTOR_X) * at_channel
        of_position = (y % FACTOR_Y * FACTOR_X + x % FACTOR_X) * at_channel
        of_position += y // FACTOR_Y * at_y + x // FACTOR_X * at_x
    else:
        of_channel = channel * at_channel
        of_position = y * at_y + x * at_x
    return of_position[:, None] + of_channel[None, :]


@triton.jit
def convolution_kernel(
    x,
    weight,
    bias,
    y,
    z,
    rows,
    area,
    columns,
    height,
    width,
    x_sample,
    x_channel,
    x_y,
    x_x,
    weight_sample,
    weight_out,
    weight_in,
    weight_y,
    weight_x,
    bias_sample,
    y_sample,
    y_channel,
    y_y,
    y_x,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    GROUPS: tl.constexpr,
    WINDOW_Y: tl.constexpr,
    WINDOW_X: tl.constexpr,
    MODE: tl.constexpr,
    STRIDE: tl.constexpr,
    DILATION: tl.constexpr,
    PADDING_Y: tl.constexpr,
    PADDING_X: tl.constexpr,
    SCALE: tl.constexpr,
    FACTOR_Y: tl.constexpr,
    FACTOR_X: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BIAS: tl.constexpr,
    KEEP: tl.constexpr,
    BACKWARD: tl.constexpr,
    FLAT: tl.constexpr,
    TAPS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_POSITIONS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One tile of ``y``: a block of positions and a block of the ``OUT`` channels of a group.

    ``BACKWARD``: ``x`` is the cotangent of a convolution's result and ``y`` the gradient of its
    input, ``IN`` and ``OUT`` being the channels of these."""
    TAPS: tl.constexpr = WINDOW_Y * WINDOW_X
    OUT_BLOCKS: tl.constexpr = (OUT + BLOCK_OUT - 1) // BLOCK_OUT
    DEPTH: tl.constexpr = IN * TAPS if FLAT else IN
    BLOCKS: tl.constexpr = (DEPTH + BLOCK_IN - 1) // BLOCK_IN
    STEPS: tl.constexpr = BLOCKS if FLAT else BLOCKS * TAPS
    # Tiles that share input follow each other.
    program = tl.program_id(0)
    out_block = program % (OUT_BLOCKS * GROUPS)
    group = out_block // OUT_BLOCKS
    block = program // (OUT_BLOCKS * GROUPS)
    own, sample, row_y, row_x, in_rows = _positions(block, rows, area, columns, BLOCK_POSITIONS)
    out = out_block % OUT_BLOCKS * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    in_out = out < OUT
    inputs = x + sample * x_sample + (group * IN).to(tl.int64) * x_channel
    weights = weight + own * weight_sample
    if BACKWARD:
        weights += (group * IN).to(tl.int64) * weight_in
    else:
        weights += (group * OUT).to(tl.int64) * weight_out
    across = out
    if WIDE:
        across = across.to(tl.int64)
    across = (across * weight_out)[None, :]

    total = tl.zeros([BLOCK_POSITIONS, BLOCK_OUT], tl.float32)
    for step in range(STEPS):
        channel, tap, in_depth = _depth(step, IN, TAPS, BLOCK_IN, FLAT, TAPS_LAST)
        left = _window(
            inputs, row_y, row_x, in_rows, channel, tap, in_depth, height, width, x_channel, x_y,
            x_x, WINDOW_X, MODE, STRIDE, DILATION, PADDING_Y, PADDING_X, BACKWARD, FLAT,
            WIDE,
        )  # fmt: skip
        if WIDE:
            channel = channel.to(tl.int64)
        depth = channel * weight_in + (tap // WINDOW_X) * weight_y + (tap % WINDOW_X) * weight_x
        right = tl.load(
            weights + (depth[:, None] + across),
            mask=in_depth[:, None] & in_out[None, :],
            other=0.0,
        )
        total = _dot(left, right, total, PRECISION, UPCAST)

    channel = group * OUT + out
    if BIAS:
        place = bias + own * bias_sample + channel
        total += tl.load(place, mask=in_out, other=0.0).to(tl.float32)[None, :]
    place = _shuffled(channel, row_y, row_x, y_channel, y_y, y_x, SCALE, FACTOR_Y, FACTOR_X, WIDE)
    mask = in_rows[:, None] & in_out[None, :]
    if KEEP:
        kept = (z + sample * y_sample)[:, None] + place
        tl.store(kept, total.to(z.dtype.element_ty), mask=mask)
    result, _ = activation(total, ACTIVATION)
    tl.store((y + sample * y_sample)[:, None] + place, result.to(y.dtype.element_ty), mask=mask)


@triton.jit
def pull_kernel(
    z,
    of_y,
    of_z,
    of_bias,
    rows,
    area,
    columns,
    channels,
    z_sample,
    z_channel,
    z_y,
    z_x,
    y_sample,
    y_channel,
    y_y,
    y_x,
    at_sample,
    at_channel,
    at_y,
    at_x,
    SCALE: tl.constexpr,
    FACTOR_Y: tl.constexpr,
    FACTOR_X: tl.constexpr,
    ACTIVATION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_POSITIONS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
):
    """From the cotangent of the result to that of the convolution's, and its sums by channel."""
    out_blocks = tl.cdiv(channels, BLOCK_OUT)
    program = tl.program_id(0)
    tile = program // out_blocks
    _, sample, row_y, row_x, in_rows = _positions(tile, rows, area, columns, BLOCK_POSITIONS)
    out = program % out_blocks * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    in_out = out < channels
    mask = in_rows[:, None] & in_out[None, :]
    place = _shuffled(out, row_y, row_x, y_channel, y_y, y_x, SCALE, FACTOR_Y, FACTOR_X, WIDE)
    place = (of_y + sample * y_sample)[:, None] + place
    cotangent = tl.load(place, mask=mask, other=0.0).to(tl.float32)
    if ACTIVATION != "Identity":
        place = _shuffled(out, row_y, row_x, z_channel, z_y, z_x, SCALE, FACTOR_Y, FACTOR_X, WIDE)
        place = (z + sample * z_sample)[:, None] + place
        _, slope = activation(tl.load(place, mask=mask, other=0.0).to(tl.float32), ACTIVATION)
        cotangent = tl.where(mask, cotangent * slope, 0.0)
    place = _shuffled(out, row_y, row_x, at_channel, at_y, at_x, 0, 1, 1, WIDE)
    place = (of_z + sample * at_sample)[:, None] + place
    tl.store(place, cotangent.to(of_z.dtype.element_ty), mask=mask)
    sums = of_bias + tile.to(tl.int64) * channels + out
    tl.store(sums, tl.sum(cotangent, axis=0), mask=in_out)


@triton.jit
def weight_kernel(
    x,
    of_z,
    of_weight,
    rows,
    columns,
    height,
    width,
    x_sample,
    x_channel,
    x_y,
    x_x,
    z_sample,
    z_channel,
    z_y,
    z_x,
    weight_sample,
    weight_out,
    weight_in,
    weight_y,
    weight_x,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    GROUPS: tl.constexpr,
    WINDOW_Y: tl.constexpr,
    WINDOW_X: tl.constexpr,
    MODE: tl.constexpr,
    STRIDE: tl.constexpr,
    DILATION: tl.constexpr,
    PADDING_Y: tl.constexpr,
    PADDING_X: tl.constexpr,
    FLAT: tl.constexpr,
    TAPS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_POSITIONS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One tile of the gradient of a sample's weight, (output channels, depth): the product of
    cotangent and window over all positions."""
    TAPS: tl.constexpr = WINDOW_Y * WINDOW_X
    OUT_BLOCKS: tl.constexpr = (OUT + BLOCK_OUT - 1) // BLOCK_OUT
    DEPTH: tl.constexpr = IN * TAPS if FLAT else IN
    BLOCKS: tl.constexpr = (DEPTH + BLOCK_IN - 1) // BLOCK_IN
    STEPS: tl.constexpr = BLOCKS if FLAT else BLOCKS * TAPS
    program = tl.program_id(0)
    step = program % STEPS
    out_block = program // STEPS % (OUT_BLOCKS * GROUPS)
    group = out_block // OUT_BLOCKS
    sample = (program // STEPS // (OUT_BLOCKS * GROUPS)).to(tl.int64)
    out = out_block % OUT_BLOCKS * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    in_out = out < OUT
    channel, tap, in_depth = _depth(step, IN, TAPS, BLOCK_IN, FLAT, TAPS_LAST)
    inputs = x + sample * x_sample + (group * IN).to(tl.int64) * x_channel
    cotangents = of_z + sample * z_sample + (group * OUT).to(tl.int64) * z_channel
    if WIDE:
        out = out.to(tl.int64)
    total = tl.zeros([BLOCK_OUT, BLOCK_IN], tl.float32)
    for start in range(0, rows, BLOCK_POSITIONS):
        row = start + tl.arange(0, BLOCK_POSITIONS)
        in_rows = row < rows
        row_y = row // columns
        row_x = row % columns
        right = _window(
            inputs + tl.zeros([BLOCK_POSITIONS], tl.int64), row_y, row_x, in_rows, channel, tap,
            in_depth, height, width, x_channel, x_y, x_x, WINDOW_X, MODE, STRIDE, DILATION,
            PADDING_Y, PADDING_X, False, FLAT, WIDE,
        )  # fmt: skip
        if WIDE:
            row_y, row_x = row_y.to(tl.int64), row_x.to(tl.int64)
        left = tl.load(
            cotangents + ((out * z_channel)[:, None] + (row_y * z_y + row_x * z_x)[None, :]),
            mask=in_out[:, None] & in_rows[None, :],
            other=0.0,
        )
        total = _dot(left, right, total, PRECISION, UPCAST)
    if WIDE:
        channel = channel.to(tl.int64)
    depth = channel * weight_in + (tap // WINDOW_X) * weight_y + (tap % WINDOW_X) * weight_x
    place = of_weight + sample * weight_sample + (group * OUT).to(tl.int64) * weight_out
    tl.store(
        place + ((out * weight_out)[:, None] + depth[None, :]),
        total.to(of_weight.dtype.element_ty),
        mask=in_out[:, None] & in_depth[None, :],
    )


def _allows_tf32() -> bool:
    """The framework's own setting for convolutions."""
    convolutions: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    return bool(convolutions.fp32_precision == "tf32")


def _precision(platform: str, allow_tf32: bool) -> str:
    """Three TF32 products keep float32 accuracy on tensor cores; AMD has no TF32 dot."""
    if platform == "hip":
        return "ieee"
    return "tf32" if allow_tf32 else "tf32x3"


def _four(maps: torch.Tensor) -> tuple[int, ...]:
    """Strides of sample, channel, row and column; a sequence has one row."""
    strides = maps.stride()
    return strides if maps.dim() == 4 else (*strides[:2], 0, strides[2])


def _weight_strides(weight: torch.Tensor, sides: int) -> tuple[int, ...]:
    """Of sample, output, input, row and column."""
    own = weight.dim() == sides + 3
    strides = weight.stride() if own else (0, *weight.stride())
    return strides if sides == 2 else (*strides[:3], 0, strides[3])


def _taps_last(weight_in: int, weight_x: int) -> bool:
    return weight_x <= weight_in


def _is_wide(*tensors: torch.Tensor) -> bool:
    """Whether offsets inside a sample, or inside all weights, may leave 32 bits."""
    return any(
        sum((size - 1) * step for size, step in zip(v.shape[1:], v.stride()[1:], strict=True))
        >= 2**31 - 1
        or max(v.stride()) >= 2**31
        for v in tensors
    )


def _flat(inputs: int, window: tuple[int, int]) -> bool:
    """Few channels would leave most of a block of them empty."""
    return inputs < SMALLEST_SIDE or math.prod(window) == 1


def _block_in(config: Config, inputs: int, window: tuple[int, int]) -> int:
    """The block of the product's depth: no more than there is."""
    depth = inputs * math.prod(window) if _flat(inputs, window) else inputs
    return min(config.block_in, padded(depth))


def _window_constants(sizes: Geometry, options: Options) -> dict[str, Any]:
    return {
        "GROUPS": options.groups,
        "WINDOW_Y": sizes.window[0],
        "WINDOW_X": sizes.window[1],
        "MODE": options.padding_mode if options.padding else "zeros",
        "STRIDE": options.stride,
        "DILATION": options.dilation,
        "PADDING_Y": sizes.padding[0],
        "PADDING_X": sizes.padding[1],
    }


def _convolution_constants(
    sizes: Geometry, options: Options, config: Config, backward: bool
) -> dict[str, Any]:
    """All but the memory's order, precision and what is optional."""
    inputs = sizes.in_channels // options.groups
    outputs = sizes.out_channels // options.groups
    if backward:
        inputs, outputs = outputs, inputs
    flat = _flat(inputs, sizes.window)
    scale = 0 if backward else options.shuffle
    return {
        **_window_constants(sizes, options),
        "IN": inputs,
        "OUT": outputs,
        "SCALE": (scale > 0) - (scale < 0),
        "FACTOR_Y": sizes.factor[0] if scale else 1,
        "FACTOR_X": sizes.factor[1] if scale else 1,
        "ACTIVATION": "Identity" if backward else options.activation,
        "BACKWARD": backward,
        "FLAT": flat,
        "BLOCK_POSITIONS": config.block_positions,
        "BLOCK_OUT": min(config.block_out, padded(outputs)),
        "BLOCK_IN": _block_in(config, inputs, sizes.window),
    }


def _weight_constants(sizes: Geometry, options: Options, config: Config) -> dict[str, Any]:
    inputs = sizes.in_channels // options.groups
    outputs = sizes.out_channels // options.groups
    return {
        **_window_constants(sizes, options),
        "IN": inputs,
        "OUT": outputs,
        "FLAT": _flat(inputs, sizes.window),
        # The positions are the depth here.
        "BLOCK_POSITIONS": min(32, padded(math.prod(sizes.convolved))),
        "BLOCK_OUT": min(config.block_out, padded(outputs)),
        "BLOCK_IN": _block_in(config, inputs, sizes.window),
    }


def _programs(area: int, batch: int, per_sample: bool, constants: dict[str, Any]) -> int:
    """Of a kernel that writes maps of ``area`` positions."""
    outer, rows = (batch, area) if per_sample else (1, batch * area)
    columns = triton.cdiv(constants["OUT"], constants["BLOCK_OUT"]) * constants["GROUPS"]
    return int(outer * triton.cdiv(rows, constants["BLOCK_POSITIONS"]) * columns)


def _launch(config: Config, device: Device, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "PRECISION": _precision(device.platform, _allows_tf32()),
        "UPCAST": device.interpreted and dtype == torch.bfloat16,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }


def forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    z: torch.Tensor | None,
    options: Options,
    config: Config,
    device: Device,
) -> None:
    """Launch on a batch that is not empty; writes the result to ``y`` and, if given, the
    activation's argument to ``z``, which has the strides of ``y``."""
    sizes = geometry(tuple(x.shape), tuple(weight.shape), options)
    per_sample, area = weight.dim() > x.dim(), math.prod(sizes.convolved)
    strides = _weight_strides(weight, x.dim() - 2)
    constants = _convolution_constants(sizes, options, config, backward=False)
    bias = None if bias is None else bias.contiguous()
    convolution_kernel[(_programs(area, sizes.batch, per_sample, constants),)](
        x,
        weight,
        x if bias is None else bias,
        y,
        y if z is None else z,
        area if per_sample else sizes.batch * area,
        area,
        sizes.convolved[1],
        *sizes.size,
        *_four(x),
        *strides,
        sizes.out_channels if per_sample else 0,
        *_four(y),
        **constants,
        BIAS=bias is not None,
        KEEP=z is not None,
        TAPS_LAST=_taps_last(strides[2], strides[4]),
        WIDE=_is_wide(x, weight, y),
        **_launch(config, device, x.dtype),
    )


PULL_POSITIONS, PULL_CHANNELS, PULL_WARPS = 64, 32, 8


def pull(
    weight: torch.Tensor,
    z: torch.Tensor,
    of_y: torch.Tensor,
    of_z: torch.Tensor,
    options: Options,
) -> torch.Tensor:
    """Launch on a batch that is not empty; writes the cotangent of the convolution's result to
    ``of_z``. Returns its sums, the gradient of the bias, in float32."""
    per_sample = weight.dim() > of_z.dim()
    batch, channels, *sizes = of_z.shape
    area, scale = math.prod(sizes), options.shuffle
    rows = area if per_sample else batch * area
    tiles = triton.cdiv(rows, PULL_POSITIONS)
    outer = batch if per_sample else 1
    sums = torch.empty((outer, tiles, channels), dtype=torch.float32, device=of_z.device)
    slope = of_y if options.activation == "Identity" else z
    pull_kernel[(outer * tiles * triton.cdiv(channels, PULL_CHANNELS),)](
        slope,
        of_y,
        of_z,
        sums,
        rows,
        area,
        sizes[-1],
        channels,
        *_four(slope),
        *_four(of_y),
        *_four(of_z),
        **_pull_constants(scale, len(sizes), options.activation),
        WIDE=_is_wide(slope, of_y, of_z),
        num_warps=PULL_WARPS,
    )
    total = sums.sum(1)
    return total if per_sample else total[0]


def _pull_constants(scale: int, sides: int, name: str) -> dict[str, Any]:
    return {
        "SCALE": (scale > 0) - (scale < 0),
        "FACTOR_Y": abs(scale) if scale and sides == 2 else 1,
        "FACTOR_X": abs(scale) or 1,
        "ACTIVATION": name,
        "BLOCK_POSITIONS": PULL_POSITIONS,
        "BLOCK_OUT": PULL_CHANNELS,
    }


def input_gradient(
    weight: torch.Tensor,
    of_z: torch.Tensor,
    of_x: torch.Tensor,
    options: Options,
    config: Config,
    device: Device,
) -> None:
    """Launch on a batch that is not empty, with per-sample weights and padding by zeros; writes
    the gradient of a convolution's input to ``of_x``."""
    sizes = geometry(tuple(of_x.shape), tuple(weight.shape), options)
    area = math.prod(sizes.size)
    sample, out, into, *window = _weight_strides(weight, of_x.dim() - 2)
    constants = _convolution_constants(sizes, options, config, backward=True)
    convolution_kernel[(_programs(area, sizes.batch, True, constants),)](
        of_z,
        weight,
        of_z,
        of_x,
        of_x,
        area,
        area,
        sizes.size[1],
        *sizes.convolved,
        *_four(of_z),
        *(sample, into, out, *window),
        0,
        *_four(of_x),
        **constants,
        BIAS=False,
        KEEP=False,
        TAPS_LAST=_taps_last(out, window[1]),
        WIDE=_is_wide(of_z, weight, of_x),
        **_launch(config, device, of_z.dtype),
    )


def weight_gradient(
    x: torch.Tensor,
    of_z: torch.Tensor,
    of_weight: torch.Tensor,
    options: Options,
    config: Config,
    device: Device,
) -> None:
    """Launch on a batch that is not empty; writes the gradient of per-sample weights."""
    sizes = geometry(tuple(x.shape), tuple(of_weight.shape), options)
    strides = _weight_strides(of_weight, x.dim() - 2)
    constants = _weight_constants(sizes, options, config)
    weight_kernel[(_weight_programs(sizes.batch, constants),)](
        x,
        of_z,
        of_weight,
        math.prod(sizes.convolved),
        sizes.convolved[1],
        *sizes.size,
        *_four(x),
        *_four(of_z),
        *strides,
        **constants,
        TAPS_LAST=_taps_last(strides[2], strides[4]),
        WIDE=_is_wide(x, of_z, of_weight),
        **_launch(config, device, x.dtype),
    )


def _weight_programs(batch: int, constants: dict[str, Any]) -> int:
    taps = constants["WINDOW_Y"] * constants["WINDOW_X"]
    flat, inputs, block = (constants[name] for name in ("FLAT", "IN", "BLOCK_IN"))
    steps = triton.cdiv(inputs * taps, block) if flat else triton.cdiv(inputs, block) * taps
    outputs = triton.cdiv(constants["OUT"], constants["BLOCK_OUT"]) * constants["GROUPS"]
    return int(batch * outputs * steps)


_ELEMENTS = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16"}


def _compilation(
    kernel: Any,
    dtype: str,
    integers: dict[str, int],
    constants: dict[str, Any],
    *,
    dot: bool,
    programs: int,
    num_warps: int,
    num_stages: int = 1,
) -> Compilation:
    """The launcher compiles an integer 1 in, and knows a multiple of 16."""
    constants = {**constants, **{key: 1 for key, value in integers.items() if value == 1}}
    signature = {}
    for name in kernel.arg_names:
        element = "*fp32" if name == "of_bias" else _ELEMENTS[dtype]
        kind = "i32" if name in integers else element
        signature[name] = "constexpr" if name in constants else kind
    divisible = tuple(
        name
        for name, kind in signature.items()
        if kind.startswith("*") or (kind == "i32" and integers[name] % 16 == 0)
    )
    return Compilation(
        kernel,
        signature,
        constants,
        divisible,
        num_warps=num_warps,
        num_stages=num_stages,
        programs=programs,
        uses_dot=dot,
    )


def _strides(prefix: str, shape: tuple[int, ...], names: tuple[str, ...]) -> dict[str, int]:
    """Of a contiguous tensor, under the names of a kernel's arguments."""
    return {f"{prefix}_{name}": math.prod(shape[i + 1 :]) for i, name in enumerate(names)}


_MAPS = ("sample", "channel", "y", "x")


def compilations(problem: Problem, config: Config, device: Device) -> list[Compilation]:
    """What ``problem`` launches in training, for contiguous tensors and biases."""
    sizes, options = geometry_of(problem), options_of(problem)
    per_sample, sides = bool(problem.flag("per_sample", False)), problem.flag("sides", 2)
    area, batch, dtype = math.prod(sizes.convolved), sizes.batch, problem.dtype
    inputs = sizes.in_channels // options.groups
    result = (*sizes.result[:2], *(1, *sizes.result[2:])[-2:])
    own = _strides(
        "weight",
        (batch, sizes.out_channels, inputs, *sizes.window),
        ("sample", "out", "in", "y", "x"),
    )
    weights = own if per_sample else {**own, "weight_sample": 0}
    precision = {"PRECISION": _precision(device.platform, allow_tf32=False), "UPCAST": False}
    product: dict[str, Any] = {
        "dot": dtype != "float32" or device.platform != "hip",
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
    x = _strides("x", (batch, sizes.in_channels, *sizes.size), _MAPS)
    z = (batch, sizes.out_channels, *sizes.convolved)
    if problem.direction == "forward":
        constants = _convolution_constants(sizes, options, config, backward=False)
        integers = {
            "rows": area if per_sample else batch * area,
            "area": area,
            "columns": sizes.convolved[1],
            "height": sizes.size[0],
            "width": sizes.size[1],
            **x,
            **weights,
            "bias_sample": sizes.out_channels if per_sample else 0,
            **_strides("y", result, _MAPS),
        }
        constants |= {"BIAS": True, "KEEP": True, "TAPS_LAST": True, "WIDE": False, **precision}
        programs = _programs(area, batch, per_sample, constants)
        return [
            _compilation(
                convolution_kernel, dtype, integers, constants, programs=programs, **product
            )
        ]
    outer, rows = (batch, area) if per_sample else (1, batch * area)
    tiles = outer * triton.cdiv(rows, PULL_POSITIONS)
    found = [
        _compilation(
            pull_kernel,
            dtype,
            {
                "rows": rows,
                "area": area,
                "columns": sizes.convolved[1],
                "channels": sizes.out_channels,
                **_strides("z", result, _MAPS),
                **_strides("y", result, _MAPS),
                **_strides("at", z, _MAPS),
            },
            _pull_constants(options.shuffle, sides, options.activation) | {"WIDE": False},
            dot=False,
            programs=tiles * triton.cdiv(sizes.out_channels, PULL_CHANNELS),
            num_warps=PULL_WARPS,
        )
    ]
    if not per_sample:
        return found
    constants = _convolution_constants(sizes, options, config, backward=True)
    constants |= {
        "MODE": "zeros",
        "BIAS": False,
        "KEEP": False,
        "TAPS_LAST": True,
        "WIDE": False,
        **precision,
    }
    integers = {
        "rows": math.prod(sizes.size),
        "area": math.prod(sizes.size),
        "columns": sizes.size[1],
        "height": sizes.convolved[0],
        "width": sizes.convolved[1],
        **_strides("x", z, _MAPS),
        **own,
        "weight_out": own["weight_in"],
        "weight_in": own["weight_out"],
        "bias_sample": 0,
        **_strides("y", (batch, sizes.in_channels, *sizes.size), _MAPS),
    }
    programs = _programs(math.prod(sizes.size), batch, True, constants)
    found.append(
        _compilation(convolution_kernel, dtype, integers, constants, programs=programs, **product)
    )
    constants = _weight_constants(sizes, options, config) | {
        "TAPS_LAST": True,
        "WIDE": False,
        **precision,
    }
    integers = {
        "rows": area,
        "columns": sizes.convolved[1],
        "height": sizes.size[0],
        "width": sizes.size[1],
        **x,
        **_strides("z", z, _MAPS),
        **own,
    }
    programs = _weight_programs(batch, constants)
    found.append(
        _compilation(weight_kernel, dtype, integers, constants, programs=programs, **product)
    )
    return found
