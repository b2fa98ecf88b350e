"""The Pallas kernel of a convolution with what follows it.

An implicit matrix product, as in Triton: a tile has positions for rows and output channels for
columns; the window's elements are gathered as they are needed, and the shuffle is part of the
address that a result is written to. Maps are (batch, height, width, channels), flat, as XLA keeps
them around its convolutions.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from ..core import pallas
from ..core.device import Device
from ..core.jax_functions import ACTIVATIONS
from .spec import SMALLEST_SIDE, Config, Geometry, Options, padded


def _divided(value: Array, by: int) -> tuple[Array, Array]:
    """Quotient and remainder of integers that are not negative."""
    divisor = jnp.full_like(value, by)
    return jax.lax.div(value, divisor), jax.lax.rem(value, divisor)


def _line(size: int, axis: int) -> Array:
    shape = (size, 1) if axis == 0 else (1, size)
    return jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def _source(index: Array, size: int, mode: str) -> tuple[Array, Array]:
    """Where along a side of ``size`` an element lies, and whether it is there."""
    if mode == "reflect":
        index = jnp.abs(index)
        index = jnp.where(index >= size, 2 * (size - 1) - index, index)
    elif mode == "replicate":
        index = jnp.minimum(jnp.maximum(index, 0), size - 1)
    elif mode == "circular":
        index = jnp.where(index < 0, index + size, index)
        index = jnp.where(index >= size, index - size, index)
    return index, (index >= 0) & (index < size)


def _result(
    channel: Array, y: Array, x: Array, sizes: Geometry, scale: int
) -> tuple[Array, Array, Array]:
    """Channel, row and column of a convolution's result after the shuffle."""
    fy, fx = sizes.factor
    if scale > 0:
        rest, of_x = _divided(channel, fx)
        channel, of_y = _divided(rest, fy)
        return channel, y * fy + of_y, x * fx + of_x
    if scale < 0:
        (y, of_y), (x, of_x) = _divided(y, fy), _divided(x, fx)
        return channel * (fy * fx) + (of_y * fx + of_x), y, x
    return channel, y, x


def _kernel(
    x: Any,
    weight: Any,
    bias: Any,
    result: Any,
    *,
    sizes: Geometry,
    options: Options,
    own: bool,
    config: Config,
) -> None:
    (height, width), (rows, columns) = sizes.size, sizes.convolved
    groups, area, taps = options.groups, rows * columns, math.prod(sizes.window)
    inputs, outputs = sizes.in_channels // groups, sizes.out_channels // groups
    flat = inputs < SMALLEST_SIDE or taps == 1
    block_in = min(config.block_in, padded(inputs * taps if flat else inputs))
    block_out = _block_out(sizes, options, config)
    positions = area if own else sizes.batch * area
    sample, block = _divided(pl.program_id(0), pl.cdiv(positions, config.block_positions))
    row = block * config.block_positions + _line(config.block_positions, 0)
    in_rows = row < positions
    of_row, place = _divided(row, area)
    place_y, place_x = _divided(place, columns)
    maps = sample + of_row
    group, out_block = _divided(pl.program_id(1), pl.cdiv(outputs, block_out))
    out = out_block * block_out + _line(block_out, 1)
    in_out = out < outputs

    def step(index: Array, total: Array) -> Array:
        if flat:
            k, down = (index * block_in + _line(block_in, axis) for axis in (1, 0))
            tap, channel = _divided(k, inputs)
            in_depth, in_down = k < inputs * taps, down < inputs * taps
        else:
            tap, block = _divided(index, pl.cdiv(inputs, block_in))
            channel, below = (block * block_in + _line(block_in, axis) for axis in (1, 0))
            in_depth, in_down, down = channel < inputs, below < inputs, tap * inputs + below
        tap_y, tap_x = _divided(tap, sizes.window[1])
        near_y = place_y * options.stride - sizes.padding[0] + tap_y * options.dilation
        near_x = place_x * options.stride - sizes.padding[1] + tap_x * options.dilation
        y, in_y = _source(near_y, height, options.padding_mode)
        z, in_x = _source(near_x, width, options.padding_mode)
        at = ((maps * height + y) * width + z) * sizes.in_channels + group * inputs + channel
        left = pallas.load(x.at[at], in_rows & in_depth & in_y & in_x)
        at = (sample * (taps * inputs) + down) * sizes.out_channels + group * outputs + out
        right = pallas.load(weight.at[at], in_down & in_out)
        return total + pallas.dot(left, right)

    steps = pl.cdiv(inputs * taps, block_in) if flat else pl.cdiv(inputs, block_in) * taps
    total = jnp.zeros((config.block_positions, block_out), jnp.float32)
    total = jax.lax.fori_loop(0, steps, step, total)
    channel = group * outputs + out
    total += pallas.load(bias.at[sample * sizes.out_channels + channel], in_out).astype(
        jnp.float32
    )
    made, y, z = _result(channel, place_y, place_x, sizes, options.shuffle)
    _, channels, *ends = sizes.result
    high, wide = (1, *ends)[-2:]
    mask = in_rows & in_out
    # The interpreter writes what is masked too, so that must lie beyond the end.
    end = sizes.batch * channels * high * wide
    at = jnp.where(mask, ((maps * high + y) * wide + z) * channels + made, end)
    value = ACTIVATIONS[options.activation](total)[0]
    pallas.store(result.at[at], value.astype(result.dtype), mask)


def _block_out(sizes: Geometry, options: Options, config: Config) -> int:
    return min(config.block_out, padded(sizes.out_channels // options.groups))


@partial(jax.jit, static_argnames=("sizes", "options", "config", "device"))
def forward(
    x: Array,
    weight: Array,
    bias: Array,
    *,
    sizes: Geometry,
    options: Options,
    config: Config,
    device: Device,
) -> Array:
    """Launch on ``x`` (batch, height, width, channels), batch > 0, with ``weight``
    ([batch,] *window, in, out) and ``bias`` ([batch,] out); ``device`` keys the compiled code. The
    result is (batch, height, width, channels) too."""
    own, area = bias.ndim == 2, math.prod(sizes.convolved)
    outer, positions = (sizes.batch, area) if own else (1, sizes.batch * area)
    columns = pl.cdiv(sizes.out_channels // options.groups, _block_out(sizes, options, config))
    _, channels, *ends = sizes.result
    shape = (sizes.batch, *(1, *ends)[-2:], channels)

    def whole(size: int) -> pl.BlockSpec:
        return pl.BlockSpec((size,), lambda i, j: (0,))

    flat = [value.reshape(-1) for value in (x, weight, bias)]
    result = jax.ShapeDtypeStruct((math.prod(shape),), x.dtype)
    y: Array = pallas.call(
        partial(_kernel, sizes=sizes, options=options, own=own, config=config),
        out_shape=[result],
        grid=(outer * pl.cdiv(positions, config.block_positions), columns * options.groups),
        in_specs=[whole(value.size) for value in flat],
        out_specs=[whole(result.size)],
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        name="conv_shuffle",
    )(*flat)[0]
    return y.reshape(shape)
