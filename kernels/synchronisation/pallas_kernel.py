"""Pallas kernels of synchronisation: the walk over ticks, forwards and backwards, and the sum of
each neuron over its pairs. XLA makes the products of the pairs, and of the decays what does not
depend on the sample.

A program follows (samples, pairs) through all ticks; what fills up its tile is masked by hand.
Several ticks are loaded before the first of them is stored, so that their loads overlap.
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
from .spec import Config

_ROWS, _NEURONS, _COLLECT_WARPS = 8, 128, 4


class _Tile:
    """The (samples, pairs) of one program: which are real, and how to load and store them."""

    def __init__(self, batch: int, pairs: int, shape: tuple[int, int]) -> None:
        sample = pl.program_id(0) * shape[0] + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
        pair = pl.program_id(1) * shape[1] + jax.lax.broadcasted_iota(jnp.int32, shape, 1)
        self.real = (sample < batch) & (pair < pairs)
        line = pl.program_id(1) * shape[1] + jax.lax.broadcasted_iota(jnp.int32, (1, shape[1]), 1)
        self.line = line < pairs

    def load(self, reference: Any, mask: Array | None = None) -> Array:
        """In float32; 0 where it is not real."""
        mask = self.real if mask is None else mask
        if pallas.masks_blocks():
            return pallas.load(reference, mask).astype(jnp.float32)
        return jnp.where(mask, pallas.load(reference).astype(jnp.float32), 0.0)

    def store(self, reference: Any, value: Array) -> None:
        """Write what is real."""
        value = value.astype(reference.dtype)
        pallas.store(reference, value, self.real if pallas.masks_blocks() else None)


def _walk(ticks: int, at_once: int, step: Any, carry: Any) -> Any:
    """``carry = step(carry, first, count)`` over all ticks, ``at_once`` of them in a step."""
    runs = ticks // at_once
    carry = jax.lax.fori_loop(0, runs, lambda i, c: step(c, i * at_once, at_once), carry)
    return jax.lax.fori_loop(runs * at_once, ticks, lambda t, c: step(c, t, 1), carry)


def _forward_kernel(
    products: Any, r: Any, scale: Any, before: Any, s: Any, *, tile: Any, config: Config
) -> None:
    tile = tile()
    decay = tile.load(r, tile.line)

    def step(alpha: Array, first: Any, count: int) -> Array:
        ticks = [first + i for i in range(count)]
        loaded = [(tile.load(products.at[t]), tile.load(scale.at[t], tile.line)) for t in ticks]
        for t, (product, factor) in zip(ticks, loaded, strict=True):
            alpha = decay * alpha + product
            tile.store(s.at[t], alpha * factor)
        return alpha

    _walk(products.shape[0], config.ticks, step, tile.load(before))


def _backward_kernel(
    s: Any,
    r: Any,
    scale: Any,
    before: Any,
    of_s: Any,
    of_products: Any,
    of_r: Any,
    of_before: Any,
    *,
    tile: Any,
    config: Config,
) -> None:
    tile = tile()
    decay, last = tile.load(r, tile.line), s.shape[0] - 1

    def step(carry: tuple[Array, ...], first: Any, count: int) -> tuple[Array, ...]:
        of_alpha, total = carry
        ticks = [last - first - i for i in range(count)]
        loaded = []
        for t in ticks:
            earlier = jnp.maximum(t - 1, 0)
            factor = tile.load(scale.at[earlier], tile.line)
            value = tile.load(s.at[earlier]) / jnp.where(tile.line, factor, 1.0)
            value = jnp.where(t > 0, value, tile.load(before))
            loaded.append((value, tile.load(scale.at[t], tile.line), tile.load(of_s.at[t])))
        for t, (alpha, factor, cotangent) in zip(ticks, loaded, strict=True):
            of_alpha = decay * of_alpha + factor * cotangent
            total += of_alpha * alpha
            tile.store(of_products.at[t], of_alpha)
        return of_alpha, total

    zeros = jnp.zeros(tile.real.shape, jnp.float32)
    of_alpha, total = _walk(last + 1, config.ticks, step, (zeros, zeros))
    tile.store(of_r, total)
    tile.store(of_before, decay * of_alpha)


def _sides(batch: int, pairs: int, config: Config) -> tuple[int, int]:
    """Samples and pairs of a tile. A GPU tile has sides that are powers of two; a TPU block is as
    wide as its array."""
    if not pallas.masks_blocks():
        return 8, pairs
    columns = min(1 << max(pairs - 1, 0).bit_length(), config.block)
    return config.block // columns, columns


def _specs(shape: tuple[int, ...], config: Config) -> tuple[tuple[int, int], Any, dict[str, Any]]:
    """The grid, what makes a program's tile, and the blocks of each kind of array."""
    ticks, batch, pairs = shape
    rows, columns = _sides(batch, pairs, config)
    return (
        (pl.cdiv(batch, rows), pl.cdiv(pairs, columns)),
        partial(_Tile, batch, pairs, (rows, columns)),
        {
            "ticks": pl.BlockSpec((ticks, rows, columns), lambda i, j: (0, i, j)),
            "scale": pl.BlockSpec((ticks, 1, columns), lambda i, j: (0, 0, j)),
            "tile": pl.BlockSpec((rows, columns), lambda i, j: (i, j)),
            "line": pl.BlockSpec((1, columns), lambda i, j: (0, j)),
        },
    )


@partial(jax.jit, static_argnames=("dtype", "config", "device"))
def forward(
    products: Array,
    r: Array,
    scale: Array,
    before: Array,
    *,
    dtype: Any,
    config: Config,
    device: Device,
) -> Array:
    """Launch on ``products`` (ticks, batch, pairs), with at least one element; ``before`` is alpha
    (batch, pairs) before the first; ``device`` keys the compiled code."""
    grid, tile, specs = _specs(products.shape, config)
    return pallas.call(
        partial(_forward_kernel, tile=tile, config=config),
        out_shape=[jax.ShapeDtypeStruct(products.shape, dtype)],
        grid=grid,
        in_specs=[specs["ticks"], specs["line"], specs["scale"], specs["tile"]],
        out_specs=[specs["ticks"]],
        num_warps=config.num_warps,
        num_stages=1,
        name="synchronisation",
    )(products, r[None], scale[:, None], before)[0]


@partial(jax.jit, static_argnames=("config", "device"))
def backward(
    s: Array,
    r: Array,
    scale: Array,
    before: Array,
    of_s: Array,
    *,
    config: Config,
    device: Device,
) -> tuple[Array, Array, Array]:
    """The gradients of products, r and before, with ``scale`` held."""
    grid, tile, specs = _specs(s.shape, config)
    one = jax.ShapeDtypeStruct(s.shape[1:], jnp.float32)
    of_products, of_r, of_before = pallas.call(
        partial(_backward_kernel, tile=tile, config=config),
        out_shape=[jax.ShapeDtypeStruct(s.shape, jnp.float32), one, one],
        grid=grid,
        in_specs=[
            specs["ticks"],
            specs["line"],
            specs["scale"],
            specs["tile"],
            specs["ticks"],
        ],
        out_specs=[specs["ticks"], specs["tile"], specs["tile"]],
        num_warps=config.num_warps,
        num_stages=1,
        name="synchronisation_backward",
    )(s, r[None], scale[:, None], before, of_s)
    return of_products, of_r.sum(0), of_before


def _collect_kernel(
    z: Any, of_products: Any, starts: Any, pair_of: Any, other_of: Any, of_z: Any
) -> None:
    shape = _ROWS, _NEURONS
    row = pl.program_id(0) * _ROWS + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    neuron = pl.program_id(1) * _NEURONS + jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    rows, neurons = z.shape
    real = (row < rows) & (neuron < neurons)
    first = pallas.load(starts.at[neuron], real)
    count = pallas.load(starts.at[neuron + 1], real) - first

    def add(k: Any, total: Array) -> Array:
        mask = k < count
        pair = pallas.load(pair_of.at[first + k], mask)
        other = pallas.load(other_of.at[first + k], mask)
        product = pallas.load(of_products.at[row, pair], mask)
        return total + product * pallas.load(z.at[row, other], mask).astype(jnp.float32)

    total = jax.lax.fori_loop(0, jnp.max(count), add, jnp.zeros(shape, jnp.float32))
    pallas.store(of_z, total.astype(of_z.dtype), real)


@partial(jax.jit, static_argnames="device")
def collect(z: Array, of_products: Array, left: Array, right: Array, *, device: Device) -> Array:
    """The gradient of ``z`` (rows, neurons) for that of the products (rows, pairs), on a GPU: each
    neuron goes through its pairs in a fixed order."""
    (rows, neurons), pairs = z.shape, left.shape[0]
    both, others = jnp.concatenate([left, right]), jnp.concatenate([right, left])
    order = jnp.argsort(both, stable=True)
    starts = jnp.searchsorted(both[order], jnp.arange(neurons + 1)).astype(jnp.int32)
    arrays = (z, of_products, starts, (order % pairs).astype(jnp.int32), others[order])
    return pallas.call(
        _collect_kernel,
        out_shape=[jax.ShapeDtypeStruct(z.shape, z.dtype)],
        grid=(pl.cdiv(rows, _ROWS), pl.cdiv(neurons, _NEURONS)),
        in_specs=[
            pl.BlockSpec(array.shape, lambda i, j, sides=array.ndim: (0,) * sides)
            for array in arrays
        ],
        out_specs=[pl.BlockSpec((_ROWS, _NEURONS), lambda i, j: (i, j))],
        num_warps=_COLLECT_WARPS,
        num_stages=1,
        name="synchronisation_collect",
    )(*arrays)[0]
