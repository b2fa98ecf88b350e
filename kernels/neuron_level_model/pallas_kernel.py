"""Pallas kernels of the neuron-level model.

A program holds one neuron and a block of rows: batched dots are not lowered, so traces come neuron
by neuron, (neurons, rows, memory). What fills up a tile is masked by hand. The gradients compute
the hidden layer again; those of the weights are written for each block of rows, and XLA adds them.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from ..core import pallas
from ..core.device import Device
from ..core.jax_functions import ACTIVATIONS
from .spec import Config, padded

_STATIC = ("config", "device")


class _Sizes(NamedTuple):
    """Of a call; ``hidden`` is 0 in the shallow form."""

    rows: int
    neurons: int
    memory: int
    hidden: int
    block_rows: int

    @property
    def units(self) -> int:
        """What the last layer takes."""
        return self.hidden or self.memory

    @property
    def grid(self) -> tuple[int, int]:
        return self.neurons, pl.cdiv(self.rows, self.block_rows)


def _side(size: int) -> int:
    """A GPU tile has sides that are powers of two; a TPU block may be as wide as its array."""
    return padded(size) if pallas.masks_blocks() else size


def _real(shape: tuple[int, ...], rows: Any, columns: int) -> Array:
    row = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    return (row < rows) & (jax.lax.broadcasted_iota(jnp.int32, shape, 1) < columns)


def _load(reference: Any, rows: Any, columns: int) -> Array:
    """A tile of which ``rows`` x ``columns`` exist, with zeros elsewhere."""
    real = _real(reference.shape, rows, columns)
    if pallas.masks_blocks():
        return pallas.load(reference, real)
    return jnp.where(real, pallas.load(reference), jnp.zeros_like(reference))


def _store(reference: Any, value: Array, rows: Any, columns: int) -> None:
    real = _real(reference.shape, rows, columns) if pallas.masks_blocks() else None
    pallas.store(reference, value.astype(reference.dtype), real)


class _Layers:
    """Both layers of one neuron for a block of rows, from the references of their inputs."""

    def __init__(self, references: list[Any], sizes: _Sizes) -> None:
        self.rows = sizes.rows - pl.program_id(1) * sizes.block_rows
        self.x = _load(references.pop(0), self.rows, sizes.memory)
        self.inner = self.x.astype(jnp.float32)
        if sizes.hidden:
            self.first = [_load(references.pop(0), sizes.memory, sizes.hidden) for _ in range(2)]
            biases = [_load(references.pop(0), 1, sizes.hidden) for _ in range(2)]
            products = [pallas.dot(self.x, weight) for weight in self.first]
            # An infinite x makes NaN of the zeros beyond the hidden layer.
            real = _real(products[0].shape, self.rows, sizes.hidden)
            self.value, gate = (
                jnp.where(real, product + bias.astype(jnp.float32), 0.0)
                for product, bias in zip(products, biases, strict=True)
            )
            self.opened = _sigmoid(gate)
            self.inner = self.value * self.opened
        self.last = [
            _load(references.pop(0), 1, sizes.units).astype(jnp.float32) for _ in range(2)
        ]
        biases = [_load(references.pop(0), 1, 1).astype(jnp.float32) for _ in range(2)]
        self.v, u = (
            jnp.sum(self.inner * weight, axis=1, keepdims=True) + bias
            for weight, bias in zip(self.last, biases, strict=True)
        )
        self.o = _sigmoid(u)

    def of_last(self, reference: Any) -> tuple[Array, Array]:
        """The gradients of value and gate of the last layer, as columns."""
        of_z = _load(reference, self.rows, 1).astype(jnp.float32)
        return of_z * self.o, of_z * self.o * self.v * (1.0 - self.o)

    def of_first(self, of_v: Array, of_u: Array) -> tuple[Array, Array]:
        """The gradients of value and gate of the first layer."""
        of_value = (of_v * self.last[0] + of_u * self.last[1]) * self.opened
        return of_value, of_value * self.value * (1.0 - self.opened)


def _sigmoid(x: Array) -> Array:
    return ACTIVATIONS["Sigmoid"](x)[0]


def _forward_kernel(*references: Any, sizes: _Sizes) -> None:
    inputs = list(references[:-1])
    layers = _Layers(inputs, sizes)
    _store(references[-1], layers.v * layers.o, layers.rows, 1)


def _trace_gradient_kernel(*references: Any, sizes: _Sizes) -> None:
    inputs = list(references[:-1])
    layers = _Layers(inputs, sizes)
    of_v, of_u = layers.of_last(inputs.pop(0))
    if sizes.hidden:
        of_x: Any = sum(
            pallas.dot(of_first.astype(layers.x.dtype), weight, transpose_right=True)
            for of_first, weight in zip(layers.of_first(of_v, of_u), layers.first, strict=True)
        )
    else:
        of_x = of_v * layers.last[0] + of_u * layers.last[1]
    _store(references[-1], of_x, layers.rows, sizes.memory)


def _weight_gradient_kernel(*references: Any, sizes: _Sizes) -> None:
    count = 8 if sizes.hidden else 4
    inputs, outputs = list(references[:-count]), list(references[-count:])
    layers = _Layers(inputs, sizes)
    of_last = layers.of_last(inputs.pop(0))
    if sizes.hidden:
        of_first = layers.of_first(*of_last)
        for of_part in of_first:
            of_weight = pallas.dot(layers.x, of_part.astype(layers.x.dtype), transpose_left=True)
            _store(outputs.pop(0), of_weight, sizes.memory, sizes.hidden)
        for of_part in of_first:
            of_bias = jnp.sum(of_part, axis=0, keepdims=True)
            _store(outputs.pop(0), of_bias, 1, sizes.hidden)
    for of_part in of_last:
        of_weight = jnp.sum(of_part * layers.inner, axis=0, keepdims=True)
        _store(outputs.pop(0), of_weight, 1, sizes.units)
    for of_part in of_last:
        _store(outputs.pop(0), jnp.sum(of_part, axis=0, keepdims=True), 1, 1)


def _lines(array: Array, width: int) -> tuple[list[Array], list[Any]]:
    """``array`` (neurons, 2, width) as two arguments, a line each, and their blocks."""
    array = array.reshape(array.shape[0], 2, 1, width)
    side = _side(width) if width > 1 else 1
    return [array, array], [
        pl.BlockSpec((None, None, 1, side), partial(_half_line, half)) for half in range(2)
    ]


def _half_line(half: int, neuron: Any, _: Any) -> tuple[Any, ...]:
    return neuron, half, 0, 0


def _first_weights(weight: Array, sizes: _Sizes) -> tuple[list[Array], list[Any]]:
    """Values' and gates' columns of the first layer, and their blocks."""
    weight = weight.reshape(sizes.neurons, sizes.memory, 2, sizes.hidden)
    sides = _side(sizes.memory), _side(sizes.hidden)
    if pallas.masks_blocks():
        return [weight, weight], [
            pl.BlockSpec((None, sides[0], None, sides[1]), partial(_half_columns, half))
            for half in range(2)
        ]
    block = pl.BlockSpec((None, *sides), lambda neuron, _: (neuron, 0, 0))
    return [weight[:, :, 0], weight[:, :, 1]], [block, block]


def _half_columns(half: int, neuron: Any, _: Any) -> tuple[Any, ...]:
    return neuron, 0, half, 0


def _columns(sizes: _Sizes, width: int) -> Any:
    """The block of rows of an array (neurons, rows, width)."""
    side = _side(width) if width > 1 else 1
    return pl.BlockSpec((None, sizes.block_rows, side), lambda neuron, block: (neuron, block, 0))


def _inputs(
    trace: Array,
    weight1: Array,
    bias1: Array,
    weight2: Array | None,
    bias2: Array | None,
    of_z: Array | None,
    config: Config,
) -> tuple[_Sizes, list[Array], list[Any]]:
    """Sizes, arguments and blocks of a call."""
    rows, neurons, memory = trace.shape
    hidden = 0 if weight2 is None else weight2.shape[1]
    sizes = _Sizes(rows, neurons, memory, hidden, config.block_rows)
    pairs = [([trace.transpose(1, 0, 2)], [_columns(sizes, memory)])]
    last, last_bias = weight1, bias1
    if weight2 is not None and bias2 is not None:
        last, last_bias = weight2, bias2
        pairs += [_first_weights(weight1, sizes), _lines(bias1, hidden)]
    pairs += [_lines(last.mT, sizes.units), _lines(last_bias, 1)]
    if of_z is not None:
        pairs.append(([of_z.T[:, :, None]], [_columns(sizes, 1)]))
    arguments = [array for arrays, _ in pairs for array in arrays]
    return sizes, arguments, [block for _, blocks in pairs for block in blocks]


@partial(jax.jit, static_argnames=_STATIC)
def forward(
    trace: Array,
    weight1: Array,
    bias1: Array,
    weight2: Array | None,
    bias2: Array | None,
    *,
    config: Config,
    device: Device,
) -> Array:
    """Launch on ``trace`` (rows, neurons, memory), rows > 0; ``device`` keys the compiled code."""
    sizes, arguments, specs = _inputs(trace, weight1, bias1, weight2, bias2, None, config)
    z = pallas.call(
        partial(_forward_kernel, sizes=sizes),
        out_shape=jax.ShapeDtypeStruct((sizes.neurons, sizes.rows, 1), trace.dtype),
        grid=sizes.grid,
        in_specs=specs,
        out_specs=_columns(sizes, 1),
        num_warps=config.num_warps,
        num_stages=1,
        name="neuron_level_model",
    )(*arguments)
    return z[:, :, 0].T


@partial(jax.jit, static_argnames=_STATIC)
def trace_gradient(
    of_z: Array,
    trace: Array,
    weight1: Array,
    bias1: Array,
    weight2: Array | None,
    bias2: Array | None,
    *,
    config: Config,
    device: Device,
) -> Array:
    """The gradient of ``trace`` for that of z, (rows, neurons)."""
    sizes, arguments, specs = _inputs(trace, weight1, bias1, weight2, bias2, of_z, config)
    shape = sizes.neurons, sizes.rows, sizes.memory
    of_trace = pallas.call(
        partial(_trace_gradient_kernel, sizes=sizes),
        out_shape=jax.ShapeDtypeStruct(shape, trace.dtype),
        grid=sizes.grid,
        in_specs=specs,
        out_specs=_columns(sizes, sizes.memory),
        num_warps=config.num_warps,
        num_stages=1,
        name="neuron_level_model_trace_gradient",
    )(*arguments)
    return of_trace.transpose(1, 0, 2)


@partial(jax.jit, static_argnames=_STATIC)
def weight_gradient(
    of_z: Array,
    trace: Array,
    weight1: Array,
    bias1: Array,
    weight2: Array | None,
    bias2: Array | None,
    *,
    config: Config,
    device: Device,
) -> tuple[Array, ...]:
    """The gradients of the weights that there are."""
    sizes, arguments, specs = _inputs(trace, weight1, bias1, weight2, bias2, of_z, config)
    sides = [(1, sizes.units)] * 2 + [(1, 1)] * 2
    if sizes.hidden:
        sides = [(sizes.memory, sizes.hidden)] * 2 + [(1, sizes.hidden)] * 2 + sides
    blocks = sizes.grid[1]
    results = pallas.call(
        partial(_weight_gradient_kernel, sizes=sizes),
        out_shape=[
            jax.ShapeDtypeStruct((blocks, sizes.neurons, *pair), jnp.float32) for pair in sides
        ],
        grid=sizes.grid,
        in_specs=specs,
        out_specs=[
            pl.BlockSpec(
                (None, None, *(_side(side) if side > 1 else 1 for side in pair)),
                lambda neuron, block: (block, neuron, 0, 0),
            )
            for pair in sides
        ],
        num_warps=config.num_warps,
        num_stages=1,
        name="neuron_level_model_weight_gradient",
    )(*arguments)
    sums = [part.sum(0).astype(trace.dtype) for part in results]
    *first, value, gate, value_bias, gate_bias = sums
    weight = jnp.stack((value[:, 0], gate[:, 0]), -1)
    bias = jnp.concatenate((value_bias, gate_bias), -1)[:, 0]
    if not first:
        return weight, bias
    return jnp.concatenate(first[:2], -1), jnp.concatenate(first[2:], -1)[:, 0], weight, bias
