"""Pallas kernels of binary spherical quantization.

A row is one code: features (tokens, groups * bits) are rows (tokens * groups, bits) without a
copy. A program holds ``block_tokens`` rows; what fills up its tile is masked by hand.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from ..core import pallas
from ..core.device import Device
from .spec import SMALLEST_NORM, Config, padded

LOW_BITS = 32
"""Bits of an index's low word; the rest is its high word. Kernels have no 64-bit integers."""
_SMALLEST_LINES = 8
"""A TPU block has a multiple of eight lines."""


def _coin(logit: Array) -> tuple[Array, Array, Array]:
    """sigmoid(logit), sigmoid(-logit) and the entropy of that coin; log(1 + e) by the series of
    2 artanh(e / (2 + e)), accurate also where e is tiny."""
    size = jnp.abs(logit)
    decay = jnp.exp(-size)
    large = 1.0 / (1.0 + decay)
    small = decay * large
    s = decay / (2.0 + decay)
    series = jnp.full_like(s, 1.0 / 15.0)
    for odd in (13.0, 11.0, 9.0, 7.0, 5.0, 3.0, 1.0):
        series = 1.0 / odd + s * s * series
    positive = logit >= 0
    p, q = jnp.where(positive, large, small), jnp.where(positive, small, large)
    return p, q, 2.0 * s * series + size * small


def _inverse_norm(x: Array) -> Array:
    """1 / |row| as a column, 0 for a zero vector; NaN stays NaN."""
    squared = jnp.sum(x * x, axis=1, keepdims=True)
    is_zero = squared <= SMALLEST_NORM**2
    return jnp.where(is_zero, 0.0, 1.0 / jnp.sqrt(jnp.where(is_zero, 1.0, squared)))


class _Tile:
    """The rows of one program: which elements are real, and how to load and store them."""

    def __init__(self, rows: int, bits: int, config: Config) -> None:
        self.bits = bits
        shape = config.block_tokens, _columns(bits)
        first = pl.program_id(0) * config.block_tokens
        self.row = first + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
        self.column = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
        self.is_bit = self.column < bits
        self.real = (self.row < rows) & self.is_bit
        line = first + jax.lax.broadcasted_iota(jnp.int32, (shape[0], 1), 0)
        self.in_range = line < rows

    def load(self, reference: Any) -> Array:
        """Rows, or one number for each, in float32; 0 where they are not real."""
        mask = self.in_range if reference.shape[1] == 1 else self.real
        if pallas.masks_blocks():
            return pallas.load(reference, mask).astype(jnp.float32)
        return jnp.where(mask, pallas.load(reference).astype(jnp.float32), 0.0)

    def store(self, reference: Any, value: Array) -> None:
        """Write rows, or one number for each."""
        mask = self.in_range if reference.shape[1] == 1 else self.real
        value = value.astype(reference.dtype)
        pallas.store(reference, value, mask if pallas.masks_blocks() else None)

    def line_mask(self) -> Array | None:
        """The mask of a single line, (1, columns)."""
        if not pallas.masks_blocks():
            return None
        return jax.lax.broadcasted_iota(jnp.int32, (1, self.column.shape[1]), 1) < self.bits


def _columns(bits: int) -> int:
    """A GPU tile has sides that are powers of two; a TPU block may be as wide as its array."""
    return padded(bits) if pallas.masks_blocks() else bits


def _word(bit: Array, shift: Array, first: int) -> Array:
    """The int32 with the 32 bits of the index from bit ``first`` on, as a column."""
    inside = bit & (shift >= first) & (shift < first + LOW_BITS)
    value = jnp.left_shift(jnp.int32(1), jnp.clip(shift - first, 0, LOW_BITS - 1))
    return jnp.sum(jnp.where(inside, value, 0), axis=1, keepdims=True)


def _forward_kernel(
    features: Any,
    quantized: Any,
    low: Any,
    *rest: Any,
    rows: int,
    config: Config,
    groups: int,
    bits: int,
    slope: float,
) -> None:
    tile = _Tile(rows, bits, config)
    x = tile.load(features)
    z = x * _inverse_norm(x)
    positive = x >= 0
    code = jnp.where(positive, bits**-0.5, -(bits**-0.5))
    tile.store(quantized, jnp.where(z == z, code, z))
    shift = bits - 1 - tile.column
    tile.store(low, _word(positive, shift, 0))
    high, of_entropy = rest[: bits > LOW_BITS], rest[bits > LOW_BITS :]
    for reference in high:
        tile.store(reference, _word(positive, shift, LOW_BITS))
    if not of_entropy:
        return
    sample_entropy, sums = of_entropy
    p, q, entropy = _coin(slope * z)
    total = jnp.sum(jnp.where(tile.is_bit, entropy, 0.0), axis=1, keepdims=True)
    tile.store(sample_entropy, total)
    mask = tile.line_mask()
    for group in range(groups):
        member = tile.real & (tile.row % groups == group)
        for value, coin in enumerate((q, p)):
            line = jnp.sum(jnp.where(member, coin, 0.0), axis=0, keepdims=True)
            pallas.store(sums.at[pl.ds(2 * group + value, 1), :], line, mask)


def _backward_kernel(
    features: Any,
    of_quantized: Any,
    *rest: Any,
    rows: int,
    config: Config,
    groups: int,
    bits: int,
    slope: float,
) -> None:
    *of_entropy, gradient = rest
    tile = _Tile(rows, bits, config)
    x = tile.load(features)
    inverse_norm = _inverse_norm(x)
    z = x * inverse_norm
    of_z = tile.load(of_quantized)
    if of_entropy:
        of_sample_entropy, of_coins = of_entropy
        logit = slope * z
        p, q, _ = _coin(logit)
        of_logit = -tile.load(of_sample_entropy) * logit
        for group in range(groups):
            line = pallas.load(of_coins.at[pl.ds(group, 1), :], tile.line_mask())
            of_logit += jnp.where(tile.row % groups == group, line, 0.0)
        of_z += slope * of_logit * p * q
    radial = jnp.sum(jnp.where(tile.real, of_z * z, 0.0), axis=1, keepdims=True)
    tile.store(gradient, (of_z - radial * z) * inverse_norm)


def _blocks(bits: int, config: Config) -> tuple[pl.BlockSpec, pl.BlockSpec]:
    """A program's share of rows, and of one number a row."""
    return (
        pl.BlockSpec((config.block_tokens, _columns(bits)), lambda i: (i, 0)),
        pl.BlockSpec((config.block_tokens, 1), lambda i: (i, 0)),
    )


@partial(jax.jit, static_argnames=("slope", "groups", "entropies", "config", "device"))
def forward(
    rows: Array, *, slope: float, groups: int, entropies: bool, config: Config, device: Device
) -> tuple[Array, Array, Array, Array | None, Array | None]:
    """Launch on ``rows`` (tokens * groups, bits), tokens > 0; ``device`` keys the compiled code.

    Returns ``quantized``, the low and the high word of the indices (int32), and, if asked for,
    the sample entropy of each row and the sum over tokens of q and p, (groups, bits, 2).
    """
    count, bits = rows.shape
    row, number = _blocks(bits, config)
    column = jax.ShapeDtypeStruct((count, 1), jnp.int32)
    words = 1 + (bits > LOW_BITS)
    outputs = [jax.ShapeDtypeStruct(rows.shape, rows.dtype), *[column] * words]
    specs = [row, *[number] * words]
    programs, slots = pl.cdiv(count, config.block_tokens), max(padded(2 * groups), _SMALLEST_LINES)
    if entropies:
        outputs += [
            jax.ShapeDtypeStruct((count, 1), jnp.float32),
            jax.ShapeDtypeStruct((programs * slots, bits), jnp.float32),
        ]
        specs += [number, pl.BlockSpec((slots, _columns(bits)), lambda i: (i, 0))]
    quantized, low, *rest = pallas.call(
        partial(_forward_kernel, rows=count, config=config, groups=groups, bits=bits, slope=slope),
        out_shape=outputs,
        grid=(programs,),
        in_specs=[row],
        out_specs=specs,
        num_warps=config.num_warps,
        num_stages=1,
        name="binary_spherical_quantize",
    )(rows)
    low = low[:, 0]
    high = rest.pop(0)[:, 0] if bits > LOW_BITS else jnp.zeros_like(low)
    if not entropies:
        return quantized, low, high, None, None
    sample_entropy, sums = rest
    sums = sums.reshape(programs, slots, bits)[:, : 2 * groups].sum(0)
    sums = sums.reshape(groups, 2, bits).transpose(0, 2, 1)
    return quantized, low, high, sample_entropy[:, 0], sums


@partial(jax.jit, static_argnames=("slope", "groups", "config", "device"))
def backward(
    rows: Array,
    of_quantized: Array,
    of_sample_entropy: Array | None,
    of_sums: Array | None,
    *,
    slope: float,
    groups: int,
    config: Config,
    device: Device,
) -> Array:
    """The gradient of ``rows`` for the cotangents of `forward`'s floating outputs."""
    count, bits = rows.shape
    row, number = _blocks(bits, config)
    inputs, specs = [rows, of_quantized], [row, row]
    if of_sample_entropy is not None and of_sums is not None:
        lines = max(padded(groups), _SMALLEST_LINES)
        of_coins = jnp.zeros((lines, bits), jnp.float32)
        of_coins = of_coins.at[:groups].set(of_sums[..., 1] - of_sums[..., 0])
        inputs += [of_sample_entropy[:, None], of_coins]
        specs += [number, pl.BlockSpec((lines, _columns(bits)), lambda i: (0, 0))]
    return pallas.call(
        partial(
            _backward_kernel, rows=count, config=config, groups=groups, bits=bits, slope=slope
        ),
        out_shape=[jax.ShapeDtypeStruct(rows.shape, rows.dtype)],
        grid=(pl.cdiv(count, config.block_tokens),),
        in_specs=specs,
        out_specs=[row],
        num_warps=config.num_warps,
        num_stages=1,
        name="binary_spherical_quantize_backward",
    )(*inputs)[0]
