"""Pallas kernels of the neuron-level model.

A program holds one neuron: batched dots are not lowered. Its past is (length, rows) of a history
(neurons, length, rows), in which a trace is the tile of ``memory`` times from a tick on, read
where it lies; what fills up the tile is masked by hand. Times and hidden units are rows of a tile,
and samples its columns. The gradients compute the hidden layer again.
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
_PROGRAMS_PER_PROCESSOR = 4


class _Sizes(NamedTuple):
    """Of a call; ``hidden`` is 0 in the shallow form."""

    rows: int
    neurons: int
    length: int
    memory: int
    hidden: int
    block_rows: int

    @property
    def units(self) -> int:
        """What the last layer takes."""
        return self.hidden or self.memory

    @property
    def blocks(self) -> int:
        """Of rows."""
        return pl.cdiv(self.rows, self.block_rows)


def _side(size: int) -> int:
    """A GPU tile has sides that are powers of two; a TPU block may be as wide as its array."""
    return padded(size) if pallas.masks_blocks() else size


def _real(shape: tuple[int, ...], rows: Any, columns: Any) -> Array:
    row = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    return (row < rows) & (jax.lax.broadcasted_iota(jnp.int32, shape, 1) < columns)


def _load(reference: Any, rows: Any, columns: Any) -> Array:
    """A tile of which ``rows`` x ``columns`` exist, with zeros elsewhere."""
    real = _real(reference.shape, rows, columns)
    if pallas.masks_blocks():
        return pallas.load(reference, real)
    return jnp.where(real, pallas.load(reference), jnp.zeros_like(reference))


def _store(reference: Any, value: Array, rows: Any, columns: Any) -> None:
    real = _real(reference.shape, rows, columns) if pallas.masks_blocks() else None
    pallas.store(reference, value.astype(reference.dtype), real)


def _window(reference: Any, tick: Any, row: Any, sizes: _Sizes) -> Any:
    """The traces of a block of rows at a tick, (times, rows), in a history's reference."""
    return reference.at[pl.ds(tick, _side(sizes.memory)), pl.ds(row, sizes.block_rows)]


class _Weights:
    """Of one neuron, from the references of a call."""

    def __init__(self, references: list[Any], sizes: _Sizes) -> None:
        self.hidden = sizes.hidden
        if sizes.hidden:
            self.first = [_load(references.pop(0), sizes.memory, sizes.hidden) for _ in range(2)]
            self.first_bias = [
                _load(references.pop(0), sizes.hidden, 1).astype(jnp.float32) for _ in range(2)
            ]
        self.last = [
            _load(references.pop(0), sizes.units, 1).astype(jnp.float32) for _ in range(2)
        ]
        self.last_bias = [_load(references.pop(0), 1, 1).astype(jnp.float32) for _ in range(2)]


class _Layers:
    """Both layers of one neuron for a tile of traces."""

    def __init__(self, x: Array, weights: _Weights) -> None:
        self.x, self.weights = x, weights
        self.inner = x.astype(jnp.float32)
        if weights.hidden:
            products = [pallas.dot(weight, x, transpose_left=True) for weight in weights.first]
            # An infinite x makes NaN of the zeros beyond the hidden layer.
            real = _real(products[0].shape, weights.hidden, x.shape[1])
            self.value, gate = (
                jnp.where(real, product + bias, 0.0)
                for product, bias in zip(products, weights.first_bias, strict=True)
            )
            self.opened = _sigmoid(gate)
            self.inner = self.value * self.opened
        self.v, u = (
            jnp.sum(self.inner * weight, axis=0, keepdims=True) + bias
            for weight, bias in zip(weights.last, weights.last_bias, strict=True)
        )
        self.o = _sigmoid(u)

    def of_last(self, of_z: Array) -> tuple[Array, Array]:
        """The gradients of value and gate of the last layer, as lines."""
        of_v = of_z.astype(jnp.float32) * self.o
        return of_v, of_v * self.v * (1.0 - self.o)

    def of_first(self, of_v: Array, of_u: Array) -> tuple[Array, Array]:
        """The gradients of value and gate of the first layer."""
        to_value, to_gate = self.weights.last
        of_value = (of_v * to_value + of_u * to_gate) * self.opened
        return of_value, of_value * self.value * (1.0 - self.opened)


def _sigmoid(x: Array) -> Array:
    return ACTIVATIONS["Sigmoid"](x)[0]


def _forward_kernel(tick: Any, history: Any, *references: Any, sizes: _Sizes) -> None:
    *inputs, z = references
    row = pl.program_id(1) * sizes.block_rows
    rows = sizes.rows - row
    weights = _Weights(inputs, sizes)
    x = _load(_window(history, tick[0], row, sizes), sizes.memory, rows)
    layers = _Layers(x, weights)
    _store(z, layers.v * layers.o, 1, rows)


def _trace_gradient_kernel(
    tick: Any, history: Any, *references: Any, sizes: _Sizes, add: bool
) -> None:
    *inputs, result = references
    row = pl.program_id(1) * sizes.block_rows
    rows = sizes.rows - row
    weights = _Weights(inputs, sizes)
    of_z, *into = inputs
    x = _load(_window(history, tick[0], row, sizes), sizes.memory, rows)
    layers = _Layers(x, weights)
    of_v, of_u = layers.of_last(_load(of_z, 1, rows))
    if sizes.hidden:
        of_first = layers.of_first(of_v, of_u)
        of_x: Any = sum(
            pallas.dot(weight, of_part.astype(x.dtype))
            for weight, of_part in zip(weights.first, of_first, strict=True)
        )
    else:
        of_x = weights.last[0] * of_v + weights.last[1] * of_u
    target = result
    if add:
        if not pallas.masks_blocks():  # the block does not start as what it is written to
            result[...] = into[0][...]
        target = _window(result, tick[0], row, sizes)
        of_x += _load(_window(into[0], tick[0], row, sizes), sizes.memory, rows)
    _store(target, of_x, sizes.memory, rows)


def _weight_gradient_kernel(
    tick: Any, history: Any, *references: Any, sizes: _Sizes, ticks: int, tiles: int
) -> None:
    """The share of ``tiles`` tiles, which are blocks of rows of a tick."""
    count = 8 if sizes.hidden else 4
    inputs, outputs = list(references[:-count]), references[-count:]
    weights = _Weights(inputs, sizes)
    (of_z,) = inputs
    first = pl.program_id(1) * tiles

    def step(index: Any, sums: tuple[Array, ...]) -> tuple[Array, ...]:
        tile = first + index
        now, row = jax.lax.div(tile, sizes.blocks), jax.lax.rem(tile, sizes.blocks)
        row = row * sizes.block_rows
        rows = jnp.where(now < ticks, sizes.rows - row, 0)
        x = _load(_window(history, tick[0] + now, row, sizes), sizes.memory, rows)
        layers = _Layers(x, weights)
        line = of_z.at[pl.ds(now, 1), pl.ds(row, sizes.block_rows)]
        of_last = layers.of_last(_load(line, 1, rows))
        shares = []
        if sizes.hidden:
            of_first = layers.of_first(*of_last)
            shares += [
                pallas.dot(x, of_part.astype(x.dtype), transpose_right=True)
                for of_part in of_first
            ]
            shares += [jnp.sum(of_part, axis=1, keepdims=True) for of_part in of_first]
        shares += [jnp.sum(layers.inner * of_part, axis=1, keepdims=True) for of_part in of_last]
        shares += [jnp.sum(of_part, axis=1, keepdims=True) for of_part in of_last]
        return tuple(total + share for total, share in zip(sums, shares, strict=True))

    zeros = tuple(jnp.zeros(output.shape, jnp.float32) for output in outputs)
    sums = jax.lax.fori_loop(0, tiles, step, zeros)
    for output, total, sides in zip(outputs, sums, _sides_of_weights(sizes), strict=True):
        _store(output, total, *sides)


def _sides_of_weights(sizes: _Sizes) -> list[tuple[int, int]]:
    """Of each half, value before gate, of the weights and biases, layer by layer."""
    sides = [(sizes.units, 1)] * 2 + [(1, 1)] * 2
    if sizes.hidden:
        sides = [(sizes.memory, sizes.hidden)] * 2 + [(sizes.hidden, 1)] * 2 + sides
    return sides


def _tile(sides: tuple[int, int]) -> tuple[int, int]:
    rows, columns = (_side(side) if side > 1 else 1 for side in sides)
    return rows, columns


def _halves(array: Array, sides: tuple[int, int]) -> tuple[list[Array], list[Any]]:
    """Values and gates of (neurons, rows, 2 * columns) as two arguments, and their blocks."""
    array = array.reshape(array.shape[0], sides[0], 2, sides[1])
    rows, columns = _tile(sides)
    if pallas.masks_blocks():
        return [array, array], [
            pl.BlockSpec((None, rows, None, columns), partial(_half_columns, half))
            for half in range(2)
        ]
    block = pl.BlockSpec((None, rows, columns), lambda neuron, _: (neuron, 0, 0))
    return [array[:, :, 0], array[:, :, 1]], [block, block]


def _half_columns(half: int, neuron: Any, _: Any) -> tuple[Any, ...]:
    return neuron, 0, half, 0


def _half_lines(array: Array, units: int) -> tuple[list[Array], list[Any]]:
    """Values and gates of (neurons, 2 * units), as columns, and their blocks."""
    array = array.reshape(array.shape[0], 2, units, 1)
    block = None, None, *_tile((units, 1))
    return [array, array], [pl.BlockSpec(block, partial(_half_column, half)) for half in range(2)]


def _half_column(half: int, neuron: Any, _: Any) -> tuple[Any, ...]:
    return neuron, half, 0, 0


def _whole(array: Array | jax.ShapeDtypeStruct) -> Any:
    """The block that holds all of a neuron."""
    return pl.BlockSpec((None, *array.shape[1:]), lambda neuron, _: (neuron, 0, 0))


def _traces(sizes: _Sizes) -> Any:
    """The block of traces of (neurons, memory, rows)."""
    sides = None, _side(sizes.memory), sizes.block_rows
    return pl.BlockSpec(sides, lambda neuron, block: (neuron, 0, block))


def _line(sizes: _Sizes) -> Any:
    """A block of rows of (neurons, 1, rows)."""
    return pl.BlockSpec((None, 1, sizes.block_rows), lambda neuron, block: (neuron, 0, block))


def _inputs(
    history: Array,
    tick: Array,
    weight1: Array,
    bias1: Array,
    weight2: Array | None,
    bias2: Array | None,
    config: Config,
) -> tuple[_Sizes, list[Array], list[Any]]:
    """Sizes, arguments and blocks of a call."""
    neurons, length, rows = history.shape
    memory = weight1.shape[1]
    hidden = 0 if weight2 is None else weight2.shape[1]
    # A TPU block may be as long as its array, and its parts not be masked.
    block_rows = config.block_rows if pallas.masks_blocks() else rows
    sizes = _Sizes(rows, neurons, length, memory, hidden, block_rows)
    tick = jnp.clip(jnp.asarray(tick, jnp.int32), 0, length - memory).reshape(1)
    pairs = [([tick], [pallas.scalar_block()]), ([history], [_whole(history)])]
    last, last_bias = weight1, bias1
    if weight2 is not None and bias2 is not None:
        last, last_bias = weight2, bias2
        pairs += [_halves(weight1, (memory, hidden)), _half_lines(bias1, hidden)]
    pairs += [_halves(last, (sizes.units, 1)), _half_lines(last_bias, 1)]
    arguments = [array for arrays, _ in pairs for array in arrays]
    return sizes, arguments, [block for _, blocks in pairs for block in blocks]


@partial(jax.jit, static_argnames=_STATIC)
def forward(
    history: Array,
    tick: Array,
    weight1: Array,
    bias1: Array,
    weight2: Array | None,
    bias2: Array | None,
    *,
    config: Config,
    device: Device,
) -> Array:
    """z, (rows, neurons), of the traces at a tick of ``history`` (neurons, length, rows), rows >
    0; ``device`` keys the compiled code."""
    sizes, arguments, specs = _inputs(history, tick, weight1, bias1, weight2, bias2, config)
    z = pallas.call(
        partial(_forward_kernel, sizes=sizes),
        out_shape=jax.ShapeDtypeStruct((sizes.neurons, 1, sizes.rows), history.dtype),
        grid=(sizes.neurons, sizes.blocks),
        in_specs=specs,
        out_specs=_line(sizes),
        num_warps=config.num_warps,
        num_stages=1,
        name="neuron_level_model",
    )(*arguments)
    return z[:, 0].T


@partial(jax.jit, static_argnames=_STATIC)
def trace_gradient(
    into: Array | None,
    of_z: Array,
    history: Array,
    tick: Array,
    weight1: Array,
    bias1: Array,
    weight2: Array | None,
    bias2: Array | None,
    *,
    config: Config,
    device: Device,
) -> Array:
    """The gradient (neurons, memory, rows) of the traces at a tick for that of z, (rows, neurons);
    or ``into``, a gradient of ``history``, with that added where they lie, in place."""
    sizes, arguments, specs = _inputs(history, tick, weight1, bias1, weight2, bias2, config)
    arguments.append(of_z.T[:, None])
    specs.append(_line(sizes))
    shape, aliases = (sizes.neurons, sizes.memory, sizes.rows), {}
    result, place = jax.ShapeDtypeStruct(shape, history.dtype), _traces(sizes)
    if into is not None:
        result = jax.ShapeDtypeStruct(into.shape, into.dtype)
        place = _whole(into)
        aliases = {len(arguments): 0}
        arguments.append(into)
        specs.append(_whole(into))
    found: Array = pallas.call(
        partial(_trace_gradient_kernel, sizes=sizes, add=into is not None),
        out_shape=result,
        grid=(sizes.neurons, sizes.blocks),
        in_specs=specs,
        out_specs=place,
        num_warps=config.num_warps,
        num_stages=1,
        name="neuron_level_model_trace_gradient",
        input_output_aliases=aliases,
    )(*arguments)
    return found


@partial(jax.jit, static_argnames=_STATIC)
def weight_gradient(
    of_z: Array,
    history: Array,
    tick: Array,
    weight1: Array,
    bias1: Array,
    weight2: Array | None,
    bias2: Array | None,
    *,
    config: Config,
    device: Device,
) -> tuple[Array, ...]:
    """The gradients of the weights that there are, for those of z at a tick and those that follow,
    (ticks, rows, neurons)."""
    sizes, arguments, specs = _inputs(history, tick, weight1, bias1, weight2, bias2, config)
    arguments.append(of_z.transpose(2, 0, 1))
    specs.append(_whole(arguments[-1]))
    parts, tiles = _parts(sizes, len(of_z), device)
    results = pallas.call(
        partial(_weight_gradient_kernel, sizes=sizes, ticks=len(of_z), tiles=tiles),
        out_shape=[
            jax.ShapeDtypeStruct((parts, sizes.neurons, *sides), jnp.float32)
            for sides in _sides_of_weights(sizes)
        ],
        grid=(sizes.neurons, parts),
        in_specs=specs,
        out_specs=[
            pl.BlockSpec((None, None, *_tile(sides)), lambda neuron, part: (part, neuron, 0, 0))
            for sides in _sides_of_weights(sizes)
        ],
        num_warps=config.num_warps,
        num_stages=1,
        name="neuron_level_model_weight_gradient",
    )(*arguments)
    sums = [part.sum(0).astype(history.dtype) for part in results]
    *first, value, gate, value_bias, gate_bias = sums
    weight = jnp.concatenate((value, gate), -1)
    bias = jnp.concatenate((value_bias, gate_bias), 1)[:, :, 0]
    if not first:
        return weight, bias
    return jnp.concatenate(first[:2], -1), jnp.concatenate(first[2:], 1)[:, :, 0], weight, bias


def _parts(sizes: _Sizes, ticks: int, device: Device) -> tuple[int, int]:
    """Into how many parts the tiles are divided, and the tiles of one: enough programs to fill the
    device, no more, since each part has sums of its own."""
    total = ticks * sizes.blocks
    if not pallas.masks_blocks():
        return 1, total
    wanted = max(_PROGRAMS_PER_PROCESSOR * device.processors // max(sizes.neurons, 1), 1)
    tiles = pl.cdiv(total, min(total, wanted))
    return pl.cdiv(total, tiles), tiles
