"""Pallas kernels of a whole narrow multi-layer perceptron.

A program takes a block of rows through all layers, one weight whole at a time; what fills up a
tile is masked by hand. The gradients of the weights are products over the rows, which XLA makes.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from ..core import dropout as counter
from ..core import pallas
from ..core.device import Device
from ..core.jax_functions import ACTIVATIONS, dropout_keeps, dropout_row_keys
from .spec import Config, padded

StaticOptions = tuple[str, str, str, float, float]
"""norm, activation, output_activation, eps, dropout."""
Seed = tuple[Array, Array] | None


class Arrays(NamedTuple):
    """The arrays of a call, ``x`` as rows; vectors are always there: a bias for each weight, a
    norm weight and bias for each hidden layer."""

    x: Array
    weights: tuple[Array, ...]
    biases: tuple[Array, ...]
    norm_weights: tuple[Array, ...]
    norm_biases: tuple[Array, ...]


class Kept(NamedTuple):
    """What the backward pass needs: each hidden layer's product and result, the output layer's
    product if an activation follows."""

    pre: tuple[Array, ...]
    post: tuple[Array, ...]
    pre_out: tuple[Array, ...]


def _side(size: int) -> int:
    """A GPU tile has sides that are powers of two; a TPU block may be as wide as its array."""
    return padded(size) if pallas.masks_blocks() else size


def _line(size: int) -> Array:
    return jax.lax.broadcasted_iota(jnp.int32, (1, _side(size)), 1)


def _load(reference: Any, mask: Array) -> Array:
    """A block with zeros where it is not real."""
    if pallas.masks_blocks():
        return pallas.load(reference, mask)
    return jnp.where(mask, pallas.load(reference), jnp.zeros((), reference.dtype))


def _store(reference: Any, value: Array, mask: Array) -> None:
    masked = mask if pallas.masks_blocks() else None
    pallas.store(reference, value.astype(reference.dtype), masked)


def _vector(reference: Any, size: int) -> Array:
    return _load(reference, _line(size) < size).astype(jnp.float32)


def _weight(reference: Any, outputs: int, inputs: int) -> Array:
    row = jax.lax.broadcasted_iota(jnp.int32, (_side(outputs), 1), 0)
    return _load(reference, (row < outputs) & (_line(inputs) < inputs))


def _row(config: Config) -> Array:
    first = pl.program_id(0) * config.block_rows
    return first + jax.lax.broadcasted_iota(jnp.int32, (config.block_rows, 1), 0)


def _dropped(value: Array, seed: Any, layer: int, row: Array, size: int, dropout: float) -> Array:
    keys = dropout_row_keys((seed[0, 0], seed[0, 1] + jnp.uint32(layer)), row)
    keeps = dropout_keeps(*keys, _line(size), counter.threshold(dropout))
    return jnp.where(keeps, value * (1.0 / (1.0 - dropout)), 0.0)


def _normalized(z: Array, real: Array, width: int, norm: str, eps: float) -> tuple[Array, Any]:
    """Normalised rows, 0 where they are not real, and what they were scaled by."""
    if norm == "none":
        return z, 1.0
    if norm == "layer":
        mean = jnp.sum(jnp.where(real, z, 0.0), axis=1, keepdims=True) / width
        z = z - mean
    z = jnp.where(real, z, 0.0)
    inverse = 1.0 / jnp.sqrt(jnp.sum(z * z, axis=1, keepdims=True) / width + eps)
    return z * inverse, inverse


def _forward_kernel(
    *references: Any,
    rows: int,
    sizes: tuple[int, ...],
    config: Config,
    options: StaticOptions,
    keep: bool,
) -> None:
    norm, name, output_name, eps, dropout = options
    remaining = list(references)
    take = partial(remaining.pop, 0)
    *inner, last = range(len(sizes) - 1)
    row = _row(config)
    h = _load(take(), (row < rows) & (_line(sizes[0]) < sizes[0]))
    weights, biases = [take() for _ in range(last + 1)], [take() for _ in range(last + 1)]
    scales, shifts = [take() for _ in inner], [take() for _ in inner]
    seed = take() if dropout else None
    y = take()
    pre, post = ([take() for _ in inner] if keep else [] for _ in range(2))
    for layer in range(last + 1):
        inputs, width = sizes[layer], sizes[layer + 1]
        real = (row < rows) & (_line(width) < width)
        z = pallas.dot(h, _weight(weights[layer], width, inputs), transpose_right=True)
        z += _vector(biases[layer], width)
        if keep and layer < last:
            _store(pre[layer], z, real)
        elif keep and output_name != "Identity":
            _store(take(), z, real)
        if layer < last:
            n, _ = _normalized(z, real, width, norm, eps)
            z = n * _vector(scales[layer], width) + _vector(shifts[layer], width)
        value = ACTIVATIONS[name if layer < last else output_name](z)[0]
        if dropout:
            value = _dropped(value, seed, layer, row, width, dropout)
        # What is not real must stay finite: the next layer multiplies it by zero.
        h = jnp.where(real, value, 0.0).astype(y.dtype)
        if keep and layer < last:
            _store(post[layer], h, real)
    _store(y, h, real)


def _backward_kernel(
    *references: Any,
    rows: int,
    sizes: tuple[int, ...],
    config: Config,
    options: StaticOptions,
) -> None:
    norm, name, output_name, eps, dropout = options
    remaining = list(references)
    take = partial(remaining.pop, 0)
    *inner, last = range(len(sizes) - 1)
    row = _row(config)
    weights = [take() for _ in range(last + 1)]
    scales, shifts, pre = ([take() for _ in inner] for _ in range(3))
    products = take() if output_name != "Identity" else None
    of_y = take()
    seed = take() if dropout else None
    of_x, *of_z = (take() for _ in range(last + 2))
    of_bias, of_scale, of_shift = (
        [take() for _ in range(last + 1)],
        *([take() for _ in inner] for _ in range(2)),
    )
    width = sizes[-1]
    real = (row < rows) & (_line(width) < width)
    grad = _load(of_y, real).astype(jnp.float32)

    def total(reference: Any, value: Array) -> None:
        masked = jnp.where(real, value, 0.0)
        _store(reference, jnp.sum(masked, axis=0, keepdims=True), _line(width) < width)

    for layer in reversed(range(last + 1)):
        width = sizes[layer + 1]
        real = (row < rows) & (_line(width) < width)
        if dropout:
            grad = _dropped(grad, seed, layer, row, width, dropout)
        if layer == last and products is not None:
            z = _load(products, real).astype(jnp.float32)
            grad = grad * ACTIVATIONS[output_name](z)[1]
        elif layer < last:
            z = _load(pre[layer], real).astype(jnp.float32)
            n, inverse = _normalized(z, real, width, norm, eps)
            scale = _vector(scales[layer], width)
            grad = grad * ACTIVATIONS[name](n * scale + _vector(shifts[layer], width))[1]
            total(of_scale[layer], grad * n)
            total(of_shift[layer], grad)
            grad = jnp.where(real, grad * scale, 0.0)
            if norm != "none":
                along = jnp.sum(grad * n, axis=1, keepdims=True) / width
                level: Any = 0.0
                if norm == "layer":
                    level = jnp.sum(grad, axis=1, keepdims=True) / width
                grad = (grad - level - n * along) * inverse
        total(of_bias[layer], grad)
        left = jnp.where(real, grad, 0.0).astype(of_x.dtype)
        _store(of_z[layer], left, real)
        grad = pallas.dot(left, _weight(weights[layer], width, sizes[layer]))
    _store(of_x, grad, (row < rows) & (_line(sizes[0]) < sizes[0]))


def _sizes(arrays: Arrays) -> tuple[int, ...]:
    """Features before the first layer and after each."""
    return arrays.x.shape[1], *(weight.shape[0] for weight in arrays.weights)


def _whole(array: Array) -> tuple[Array, pl.BlockSpec]:
    """A weight or, as a line, a vector that every program reads whole."""
    if array.ndim == 1:
        return array[None], pl.BlockSpec((1, _side(array.size)), lambda i: (0, 0))
    block = (_side(array.shape[0]), _side(array.shape[1]))
    return array, pl.BlockSpec(block, lambda i: (0, 0))


def _words(seed: Seed) -> list[tuple[Array, pl.BlockSpec]]:
    if seed is None:
        return []
    return [(jnp.stack(seed).reshape(1, 2), pl.BlockSpec((1, 2), lambda i: (0, 0)))]


def _block(columns: int, config: Config) -> pl.BlockSpec:
    return pl.BlockSpec((config.block_rows, _side(columns)), lambda i: (i, 0))


@partial(jax.jit, static_argnames=("options", "keep", "config", "device"))
def forward(
    arrays: Arrays,
    seed: Seed,
    *,
    options: StaticOptions,
    keep: bool,
    config: Config,
    device: Device,
) -> tuple[Array, Kept]:
    """Launch on rows > 0 of ``x``; ``device`` keys the compiled code."""
    (rows, _), dtype, sizes = arrays.x.shape, arrays.x.dtype, _sizes(arrays)
    given = [(arrays.x, _block(sizes[0], config)), *map(_whole, jax.tree.leaves(arrays[1:]))]
    given += _words(seed)
    hidden, products = sizes[1:-1], sizes[-1:] if options[2] != "Identity" else ()
    written = sizes[-1], *((*hidden, *hidden, *products) if keep else ())
    y, *others = pallas.call(
        partial(
            _forward_kernel, rows=rows, sizes=sizes, config=config, options=options, keep=keep
        ),
        out_shape=[jax.ShapeDtypeStruct((rows, size), dtype) for size in written],
        grid=(pl.cdiv(rows, config.block_rows),),
        in_specs=[spec for _, spec in given],
        out_specs=[_block(size, config) for size in written],
        num_warps=config.num_warps,
        num_stages=1,
        name="fused_mlp",
    )(*(array for array, _ in given))
    layers = len(hidden)
    pre, post, pre_out = others[:layers], others[layers : 2 * layers], others[2 * layers :]
    return y, Kept(tuple(pre), tuple(post), tuple(pre_out))


@partial(jax.jit, static_argnames=("options", "config", "device"))
def backward(
    arrays: Arrays,
    kept: Kept,
    seed: Seed,
    of_y: Array,
    *,
    options: StaticOptions,
    config: Config,
    device: Device,
) -> Arrays:
    """The gradients of ``arrays``, each in its dtype."""
    (rows, _), dtype, sizes = arrays.x.shape, arrays.x.dtype, _sizes(arrays)
    programs = pl.cdiv(rows, config.block_rows)
    lines = (arrays.weights, arrays.norm_weights, arrays.norm_biases)
    given = list(map(_whole, jax.tree.leaves(lines)))
    by_row = (*kept.pre, *kept.pre_out, of_y)
    given += [(array, _block(array.shape[1], config)) for array in by_row]
    given += _words(seed)
    hidden = sizes[1:-1]
    summed = *sizes[1:], *hidden, *hidden

    def line(size: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, 1, _side(size)), lambda i: (i, 0, 0))

    of_x, *others = pallas.call(
        partial(_backward_kernel, rows=rows, sizes=sizes, config=config, options=options),
        out_shape=[jax.ShapeDtypeStruct((rows, size), dtype) for size in sizes]
        + [jax.ShapeDtypeStruct((programs, 1, size), jnp.float32) for size in summed],
        grid=(programs,),
        in_specs=[spec for _, spec in given],
        out_specs=[_block(size, config) for size in sizes] + [line(size) for size in summed],
        num_warps=config.num_warps,
        num_stages=1,
        name="fused_mlp_backward",
    )(*(array for array, _ in given))
    layers = len(sizes) - 1
    of_z, sums = others[:layers], [other.sum((0, 1)) for other in others[layers:]]
    of_weights = [
        jnp.matmul(z.T, h, preferred_element_type=jnp.float32)
        for z, h in zip(of_z, (arrays.x, *kept.post), strict=True)
    ]
    of_biases, of_norms = sums[:layers], sums[layers:]
    found = Arrays(
        of_x,
        tuple(of_weights),
        tuple(of_biases),
        tuple(of_norms[: layers - 1]),
        tuple(of_norms[layers - 1 :]),
    )
    return jax.tree.map(lambda value, like: value.astype(like.dtype), found, arrays)
