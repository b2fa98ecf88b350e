"""Pallas kernels of layer norm, SiLU, skip and layer norm.

A program holds whole rows; what fills up its tile is masked by hand.
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
from ..core.jax_functions import ACTIVATIONS
from .spec import Config, padded


class _Tile:
    """The rows of one program: which elements are real, and how to load and store them."""

    def __init__(self, rows: int, width: int, config: Config) -> None:
        shape = config.block_rows, _columns(width)
        first = pl.program_id(0) * config.block_rows
        row = first + jax.lax.broadcasted_iota(jnp.int32, (shape[0], 1), 0)
        self.line = jax.lax.broadcasted_iota(jnp.int32, (1, shape[1]), 1) < width
        self.real = (row < rows) & self.line
        self.width = width

    def load(self, reference: Any, mask: Array | None = None) -> Array:
        """In float32; 0 where it is not real."""
        mask = self.real if mask is None else mask
        if pallas.masks_blocks():
            return pallas.load(reference, mask).astype(jnp.float32)
        return jnp.where(mask, pallas.load(reference).astype(jnp.float32), 0.0)

    def store(self, reference: Any, value: Array, mask: Array | None = None) -> None:
        """Write what is real."""
        mask = self.real if mask is None else mask
        value = value.astype(reference.dtype)
        pallas.store(reference, value, mask if pallas.masks_blocks() else None)

    def mean(self, value: Array) -> Array:
        """Of each row, as a column."""
        return jnp.sum(value, axis=1, keepdims=True) / self.width

    def normalized(self, x: Array, eps: float) -> tuple[Array, Array]:
        """The rows normalised, 0 where they are not real, and 1 / deviation."""
        centred = jnp.where(self.real, x - self.mean(x), 0.0)
        inverse = 1.0 / jnp.sqrt(self.mean(centred * centred) + eps)
        return centred * inverse, inverse

    def of_norm(self, z: Array, inverse: Array, of_z: Array) -> Array:
        """The gradient of what was normalised to ``z``."""
        return (of_z - self.mean(of_z) - z * self.mean(of_z * z)) * inverse


def _columns(width: int) -> int:
    """A GPU tile has sides that are powers of two; a TPU block may be as wide as its array."""
    return padded(width) if pallas.masks_blocks() else width


def _forward_kernel(
    x: Any,
    weight: Any,
    bias: Any,
    skip: Any,
    skip_weight: Any,
    skip_bias: Any,
    y: Any,
    *,
    tile: Any,
    eps: float,
) -> None:
    tile = tile()
    value, _ = tile.normalized(tile.load(x), eps)
    value = value * tile.load(weight, tile.line) + tile.load(bias, tile.line)
    value, _ = tile.normalized(ACTIVATIONS["SiLU"](value)[0] + tile.load(skip), eps)
    value = value * tile.load(skip_weight, tile.line) + tile.load(skip_bias, tile.line)
    tile.store(y, value)


def _backward_kernel(
    x: Any,
    weight: Any,
    bias: Any,
    skip: Any,
    skip_weight: Any,
    of_y: Any,
    of_x: Any,
    of_skip: Any,
    *sums: Any,
    tile: Any,
    eps: float,
) -> None:
    tile = tile()
    scale = tile.load(weight, tile.line)
    inner, inner_inverse = tile.normalized(tile.load(x), eps)
    value, slope = ACTIVATIONS["SiLU"](inner * scale + tile.load(bias, tile.line))
    outer, outer_inverse = tile.normalized(value + tile.load(skip), eps)
    of_outer = tile.load(of_y)
    of_u = tile.of_norm(outer, outer_inverse, of_outer * tile.load(skip_weight, tile.line))
    tile.store(of_skip, of_u)
    of_v = jnp.where(tile.real, of_u * slope, 0.0)
    tile.store(of_x, tile.of_norm(inner, inner_inverse, of_v * scale))
    shares = of_v * inner, of_v, of_outer * outer, of_outer
    for reference, share in zip(sums, shares, strict=True):
        tile.store(reference, jnp.sum(share, axis=0, keepdims=True), tile.line)


def _blocks(x: Array, config: Config) -> tuple[Any, int, pl.BlockSpec, pl.BlockSpec]:
    """What makes a program's tile, the programs, and the blocks of rows and of a weight."""
    rows, width = x.shape
    columns = _columns(width)
    return (
        partial(_Tile, rows, width, config),
        pl.cdiv(rows, config.block_rows),
        pl.BlockSpec((config.block_rows, columns), lambda i: (i, 0)),
        pl.BlockSpec((1, columns), lambda i: (0, 0)),
    )


@partial(jax.jit, static_argnames=("eps", "config", "device"))
def forward(
    x: Array,
    weight: Array,
    bias: Array,
    skip: Array,
    skip_weight: Array,
    skip_bias: Array,
    *,
    eps: float,
    config: Config,
    device: Device,
) -> Array:
    """Launch on ``x`` (rows, width), rows > 0; ``device`` keys the compiled code."""
    tile, programs, whole, line = _blocks(x, config)
    return pallas.call(
        partial(_forward_kernel, tile=tile, eps=eps),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype)],
        grid=(programs,),
        in_specs=[whole, line, line, whole, line, line],
        out_specs=[whole],
        num_warps=config.num_warps,
        num_stages=1,
        name="norm_silu_skip_norm",
    )(x, weight[None], bias[None], skip, skip_weight[None], skip_bias[None])[0]


@partial(jax.jit, static_argnames=("eps", "config", "device"))
def backward(
    x: Array,
    weight: Array,
    bias: Array,
    skip: Array,
    skip_weight: Array,
    of_y: Array,
    *,
    eps: float,
    config: Config,
    device: Device,
) -> tuple[Array, ...]:
    """The gradients of ``x`` and ``skip`` and, in float32, of weight, bias, skip_weight and
    skip_bias."""
    tile, programs, whole, line = _blocks(x, config)
    share = pl.BlockSpec((None, 1, _columns(x.shape[1])), lambda i: (i, 0, 0))
    shares = jax.ShapeDtypeStruct((programs, 1, x.shape[1]), jnp.float32)
    of_x, of_skip, *sums = pallas.call(
        partial(_backward_kernel, tile=tile, eps=eps),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype)] * 2 + [shares] * 4,
        grid=(programs,),
        in_specs=[whole, line, line, whole, line, whole],
        out_specs=[whole] * 2 + [share] * 4,
        num_warps=config.num_warps,
        num_stages=1,
        name="norm_silu_skip_norm_backward",
    )(x, weight[None], bias[None], skip, skip_weight[None], of_y)
    return of_x, of_skip, *(part.sum((0, 1)) for part in sums)
