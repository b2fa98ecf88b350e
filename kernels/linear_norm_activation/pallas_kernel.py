"""The Pallas kernel of a narrow linear layer with all that follows it.

A program holds a block of rows and the whole weight; what fills up a tile is masked by hand.
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
from ..core.device import Device
from ..core.jax_functions import ACTIVATIONS, dropout_keeps, dropout_row_keys
from .spec import Config, padded

StaticOptions = tuple[str, bool, str, float, float]
"""norm, norm_first, activation, eps, dropout."""


def _side(size: int) -> int:
    """A GPU tile has sides that are powers of two; a TPU block may be as wide as its array."""
    return padded(size) if pallas.masks_blocks() else size


def _iota(size: int, axis: int) -> Array:
    shape = (size, 1) if axis == 0 else (1, size)
    return jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def _load(reference: Any, mask: Array) -> Array:
    """A block with zeros where it is not real."""
    if pallas.masks_blocks():
        return pallas.load(reference, mask)
    return jnp.where(mask, pallas.load(reference), jnp.zeros((), reference.dtype))


def _store(reference: Any, value: Array, mask: Array) -> None:
    masked = mask if pallas.masks_blocks() else None
    pallas.store(reference, value.astype(reference.dtype), masked)


def _normed(
    x: Array, real: Array, weight: Array, bias: Array, norm: str, eps: float, count: int
) -> Array:
    """The norm of rows with weight and bias; 0 where it is not real."""
    if norm == "layer":
        mean = jnp.sum(x, axis=1, keepdims=True) / count
        x = jnp.where(real, x - mean, 0.0)
    if norm != "none":
        squares = jnp.sum(x * x, axis=1, keepdims=True)
        x = x * (1.0 / jnp.sqrt(squares / count + eps))
    return jnp.where(real, x * weight + bias, 0.0)


def _kernel(
    x_block: Any,
    weight_block: Any,
    bias_line: Any,
    norm_weight_line: Any,
    norm_bias_line: Any,
    *others: Any,
    rows: int,
    inputs: int,
    width: int,
    config: Config,
    options: StaticOptions,
    residual: bool,
) -> None:
    norm, norm_first, name, eps, dropout = options
    arguments = list(others)
    row = pl.program_id(0) * config.block_rows + _iota(config.block_rows, 0)
    column, k = _iota(_side(width), 1), _iota(_side(inputs), 1)
    real, real_x = (row < rows) & (column < width), (row < rows) & (k < inputs)
    line = (k < inputs) if norm_first else (column < width)
    scale = _load(norm_weight_line, line).astype(jnp.float32)
    shift = _load(norm_bias_line, line).astype(jnp.float32)
    x = _load(x_block, real_x)
    if norm_first:
        x = _normed(x.astype(jnp.float32), real_x, scale, shift, norm, eps, inputs).astype(x.dtype)
    weight = _load(weight_block, (_iota(_side(width), 0) < width) & (k < inputs))
    z = pallas.dot(x, weight, transpose_right=True)
    z += _load(bias_line, column < width).astype(jnp.float32)
    y = arguments.pop()
    if not norm_first:
        z = _normed(jnp.where(real, z, 0.0), real, scale, shift, norm, eps, width)
    result = ACTIVATIONS[name](z)[0]
    if dropout:
        seed = arguments.pop(0)
        keys = dropout_row_keys((seed[0, 0], seed[0, 1]), row)
        keeps = dropout_keeps(*keys, column, counter.threshold(dropout))
        result = jnp.where(keeps, result * (1.0 / (1.0 - dropout)), 0.0)
    if residual:
        result += _load(arguments.pop(0), real).astype(jnp.float32)
    _store(y, result, real)


@partial(jax.jit, static_argnames=("options", "config", "device"))
def forward(
    x: Array,
    weight: Array,
    bias: Array,
    norm_weight: Array,
    norm_bias: Array,
    residual: Array | None,
    seed: tuple[Array, Array] | None,
    *,
    options: StaticOptions,
    config: Config,
    device: Device,
) -> Array:
    """Launch on ``x`` (rows, in_features), rows > 0; ``device`` keys the compiled code."""
    rows, inputs = x.shape
    width = weight.shape[0]

    def block(columns: int) -> pl.BlockSpec:
        return pl.BlockSpec((config.block_rows, _side(columns)), lambda i: (i, 0))

    def whole(first: int, last: int) -> pl.BlockSpec:
        lines = first if first == 1 else _side(first)
        return pl.BlockSpec((lines, _side(last)), lambda i: (0, 0))

    normed = inputs if options[1] else width
    arrays = [x, weight, *(line[None] for line in (bias, norm_weight, norm_bias))]
    specs = [block(inputs), whole(width, inputs), whole(1, width)]
    specs += [whole(1, normed), whole(1, normed)]
    if seed is not None:
        arrays.append(jnp.stack(seed).reshape(1, 2))
        specs.append(pl.BlockSpec((1, 2), lambda i: (0, 0)))
    if residual is not None:
        arrays.append(residual)
        specs.append(block(width))
    result = jax.ShapeDtypeStruct((rows, width), x.dtype)
    return pallas.call(
        partial(
            _kernel,
            rows=rows,
            inputs=inputs,
            width=width,
            config=config,
            options=options,
            residual=residual is not None,
        ),
        out_shape=[result],
        grid=(pl.cdiv(rows, config.block_rows),),
        in_specs=specs,
        out_specs=[block(width)],
        num_warps=config.num_warps,
        num_stages=1,
        name="linear_norm_activation",
    )(*arrays)[0]
