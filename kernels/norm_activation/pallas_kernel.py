"""Pallas kernels of norm, activation, dropout and residual.

A program holds whole rows; what fills up its tile is masked by hand. The halves of a gated
activation are two blocks of one array, seen as (rows, 2, width).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from ..core import dropout as counter
from ..core import pallas
from ..core.activations import GATED
from ..core.device import Device
from ..core.jax_functions import ACTIVATIONS, dropout_keeps, dropout_row_keys
from .spec import Config, padded, parts

Pair = tuple[Array, ...]
"""One tile, or value and gate."""


class _Tile:
    """The rows of one program: which elements are real, and how to load and store them."""

    def __init__(self, rows: int, width: int, config: Config) -> None:
        shape = config.block_rows, _columns(width)
        first = pl.program_id(0) * config.block_rows
        self.row = first + jax.lax.broadcasted_iota(jnp.int32, (shape[0], 1), 0)
        self.column = jax.lax.broadcasted_iota(jnp.int32, (1, shape[1]), 1)
        self.line = self.column < width
        self.real = (self.row < rows) & self.line

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


def _columns(width: int) -> int:
    """A GPU tile has sides that are powers of two; a TPU block may be as wide as its array."""
    return padded(width) if pallas.masks_blocks() else width


def _normalized(tile: _Tile, x: Pair, count: int, norm: str, eps: float) -> tuple[Pair, Array]:
    """z, 0 where it is not real, and 1 / deviation as a column."""
    if norm == "none":
        return x, jnp.ones_like(x[0][:, :1])
    centred = x
    if norm == "layer":
        mean = sum(jnp.sum(part, axis=1, keepdims=True) for part in x) / count
        centred = tuple(jnp.where(tile.real, part - mean, 0.0) for part in x)
    squares = sum(jnp.sum(part * part, axis=1, keepdims=True) for part in centred)
    inverse = 1.0 / jnp.sqrt(squares / count + eps)
    return tuple(part * inverse for part in centred), inverse


def _keeps(tile: _Tile, seed: Any, dropout: float) -> Array:
    keys = dropout_row_keys((seed[0, 0], seed[0, 1]), tile.row)
    return dropout_keeps(*keys, tile.column, counter.threshold(dropout))


def _forward_kernel(
    *references: Any,
    rows: int,
    width: int,
    config: Config,
    options: tuple[str, str, float, float],
    residual: bool,
) -> None:
    norm, name, eps, dropout = options
    tile, halves = _Tile(rows, width, config), parts(name)
    inputs = list(references[:-1])

    def take(mask: Array | None = None) -> Pair:
        return tuple(tile.load(inputs.pop(0), mask) for _ in range(halves))

    z, _ = _normalized(tile, take(), width * halves, norm, eps)
    weight, bias = take(tile.line), take(tile.line)
    v = tuple(a * b + c for a, b, c in zip(z, weight, bias, strict=True))
    result = ACTIVATIONS[GATED.get(name, name)](v[-1])[0]
    if halves == 2:
        result = v[0] * result
    if dropout:
        keeps = _keeps(tile, inputs.pop(0), dropout)
        result = jnp.where(keeps, result * (1.0 / (1.0 - dropout)), 0.0)
    if residual:
        result += tile.load(inputs.pop(0))
    tile.store(references[-1], result)


def _backward_kernel(
    *references: Any,
    rows: int,
    width: int,
    config: Config,
    options: tuple[str, str, float, float],
) -> None:
    norm, name, eps, dropout = options
    tile, halves = _Tile(rows, width, config), parts(name)
    inputs, outputs = list(references[: -3 * halves]), list(references[-3 * halves :])

    def take(mask: Array | None = None) -> Pair:
        return tuple(tile.load(inputs.pop(0), mask) for _ in range(halves))

    z, inverse = _normalized(tile, take(), width * halves, norm, eps)
    weight, bias = take(tile.line), take(tile.line)
    of_y = tile.load(inputs.pop(0))
    if dropout:
        keeps = _keeps(tile, inputs.pop(0), dropout)
        of_y = jnp.where(keeps, of_y * (1.0 / (1.0 - dropout)), 0.0)
    v = tuple(a * b + c for a, b, c in zip(z, weight, bias, strict=True))
    value, slope = ACTIVATIONS[GATED.get(name, name)](v[-1])
    of_v: Pair = (of_y * slope,) if halves == 1 else (of_y * value, of_y * v[0] * slope)
    of_z = tuple(a * b for a, b in zip(of_v, weight, strict=True))
    of_x = of_z
    if norm != "none":
        products = [a * b for a, b in zip(of_z, z, strict=True)]
        along: Any = sum(jnp.sum(a, axis=1, keepdims=True) for a in products) / (width * halves)
        level: Any = 0.0
        if norm == "layer":
            level = sum(jnp.sum(a, axis=1, keepdims=True) for a in of_z) / (width * halves)
        of_x = tuple((a - level - b * along) * inverse for a, b in zip(of_z, z, strict=True))
    for part in of_x:
        tile.store(outputs.pop(0), part)
    for product in (tuple(a * b for a, b in zip(of_v, z, strict=True)), of_v):
        for part in product:
            masked = jnp.where(tile.real, part, 0.0)
            tile.store(outputs.pop(0), jnp.sum(masked, axis=0, keepdims=True), tile.line)


def _halves(array: Array, width: int, config: Config, halves: int) -> tuple[list, list]:
    """``array`` (rows, columns) as one argument for each half, and their blocks."""
    columns = _columns(width)
    if halves == 1:
        return [array], [pl.BlockSpec((config.block_rows, columns), lambda i: (i, 0))]
    array = array.reshape(-1, 2, width)
    shape = config.block_rows, None, columns
    return [array, array], [pl.BlockSpec(shape, partial(_half, h)) for h in range(2)]


def _half(half: int, program: Any) -> tuple[Any, int, int]:
    return program, half, 0


def _lines(array: Array, width: int, halves: int) -> tuple[list, list]:
    """The halves of a weight (columns,) as lines that every program reads whole."""
    block = pl.BlockSpec((1, _columns(width)), lambda i: (0, 0))
    return list(array.reshape(halves, 1, width)), [block] * halves


def _seed(seed: tuple[Array, Array] | None) -> tuple[list, list]:
    if seed is None:
        return [], []
    return [jnp.stack(seed).reshape(1, 2)], [pl.BlockSpec((1, 2), lambda i: (0, 0))]


def _arguments(*pairs: tuple[list, list]) -> tuple[list, list]:
    return [a for arrays, _ in pairs for a in arrays], [s for _, specs in pairs for s in specs]


@partial(jax.jit, static_argnames=("options", "config", "device"))
def forward(
    x: Array,
    weight: Array,
    bias: Array,
    residual: Array | None,
    seed: tuple[Array, Array] | None,
    *,
    options: tuple[str, str, float, float],
    config: Config,
    device: Device,
) -> Array:
    """Launch on ``x`` (rows, columns), rows > 0; ``options`` are norm, activation, eps, dropout;
    ``device`` keys the compiled code."""
    halves = parts(options[1])
    rows, width = x.shape[0], x.shape[1] // halves
    result = jax.ShapeDtypeStruct((rows, width), x.dtype)
    arguments, specs = _arguments(
        _halves(x, width, config, halves),
        _lines(weight, width, halves),
        _lines(bias, width, halves),
        _seed(seed),
        ([], []) if residual is None else _halves(residual, width, config, 1),
    )
    return pallas.call(
        partial(
            _forward_kernel,
            rows=rows,
            width=width,
            config=config,
            options=options,
            residual=residual is not None,
        ),
        out_shape=[result],
        grid=(pl.cdiv(rows, config.block_rows),),
        in_specs=specs,
        out_specs=_halves(x, width, config, 1)[1],
        num_warps=config.num_warps,
        num_stages=1,
        name="norm_activation",
    )(*arguments)[0]


@partial(jax.jit, static_argnames=("options", "config", "device"))
def backward(
    x: Array,
    weight: Array,
    bias: Array,
    seed: tuple[Array, Array] | None,
    of_y: Array,
    *,
    options: tuple[str, str, float, float],
    config: Config,
    device: Device,
) -> tuple[Array, Array, Array]:
    """The gradients of ``x`` and, in float32, of ``weight`` and ``bias``."""
    halves = parts(options[1])
    rows, width = x.shape[0], x.shape[1] // halves
    programs = pl.cdiv(rows, config.block_rows)
    arguments, specs = _arguments(
        _halves(x, width, config, halves),
        _lines(weight, width, halves),
        _lines(bias, width, halves),
        _halves(of_y, width, config, 1),
        _seed(seed),
    )
    whole = pl.BlockSpec((config.block_rows, _columns(width)), lambda i: (i, 0))
    line = pl.BlockSpec((None, 1, _columns(width)), lambda i: (i, 0, 0))
    results = pallas.call(
        partial(_backward_kernel, rows=rows, width=width, config=config, options=options),
        out_shape=[jax.ShapeDtypeStruct((rows, width), x.dtype)] * halves
        + [jax.ShapeDtypeStruct((programs, 1, width), jnp.float32)] * (2 * halves),
        grid=(programs,),
        in_specs=specs,
        out_specs=[whole] * halves + [line] * (2 * halves),
        num_warps=config.num_warps,
        num_stages=1,
        name="norm_activation_backward",
    )(*arguments)
    of_x = jnp.concatenate(results[:halves], axis=1) if halves == 2 else results[0]
    sums = [part.sum((0, 1)) for part in results[halves:]]
    return of_x, jnp.concatenate(sums[:halves]), jnp.concatenate(sums[halves:])
