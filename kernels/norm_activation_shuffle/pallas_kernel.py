"""Pallas kernels of norm, activation, dropout and residual.

Feature maps are (batch, positions, channels), as XLA keeps them around its convolutions. A program
holds all channels of some positions of one sample; what fills up its tile is masked by hand. The
halves of a gated activation are two blocks of one array, seen as (batch, positions, 2, channels).
Partial moments and sums, a line of channels for each program, are combined by XLA; so are the
groups of a group norm, whose moments reach the kernels as lines again.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from ..core import dropout as counter
from ..core import pallas
from ..core.activations import GATED
from ..core.device import Device
from ..core.jax_functions import ACTIVATIONS, dropout_keeps, dropout_row_keys
from .spec import Config, parts, power_of_two

Pair = tuple[Array, ...]
"""One tile, or value and gate."""
Pairs = tuple[list[Any], list[Any]]
"""Arguments of a kernel and their blocks."""


class Options(NamedTuple):
    """What the kernels are compiled for."""

    activation: str
    dropout: float
    residual_first: bool


class Lines(NamedTuple):
    """(1 or batch, channels) in float32: moments, weight and bias as the kernels take them."""

    mean: Array
    inverse: Array
    weight: Array
    bias: Array


class _Tile:
    """One program's positions: which elements are real, and how to load and store them."""

    def __init__(self, positions: int, width: int, config: Config) -> None:
        shape = _block(positions, width, config)
        first = pl.program_id(1) * shape[0]
        self.position = first + jax.lax.broadcasted_iota(jnp.int32, (shape[0], 1), 0)
        self.channel = jax.lax.broadcasted_iota(jnp.int32, (1, shape[1]), 1)
        self.line = self.channel < width
        self.real = (self.position < positions) & self.line
        self.positions = positions

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

    def sum(self, value: Array) -> Array:
        """Over the positions, as a line."""
        return jnp.sum(jnp.where(self.real, value, 0.0), axis=0, keepdims=True)

    def dropped(self, value: Array, seed: Any, dropout: float) -> Array:
        """``value`` times the mask of this tile."""
        row = jnp.full((1, 1), pl.program_id(0), jnp.int32)
        keys = dropout_row_keys((seed[0, 0], seed[0, 1]), row)
        column = self.channel * self.positions + self.position
        keeps = dropout_keeps(*keys, column, counter.threshold(dropout))
        return jnp.where(keeps, value * (1.0 / (1.0 - dropout)), 0.0)


def _block(positions: int, width: int, config: Config) -> tuple[int, int]:
    """Positions and channels of a tile. On a GPU its sides are powers of two; a TPU block may be
    as wide as its array, and has a multiple of eight positions."""
    padded = power_of_two(width)
    rows = max(config.block // padded, 1)
    if pallas.masks_blocks():
        return min(rows, power_of_two(positions)), padded
    return (positions if rows >= positions else max(rows, 8)), width


def _programs(positions: int, width: int, config: Config) -> int:
    return int(pl.cdiv(positions, _block(positions, width, config)[0]))


def _statistics_kernel(
    x: Any, mean: Any, spread: Any, *, positions: int, width: int, config: Config
) -> None:
    tile = _Tile(positions, width, config)
    value = tile.load(x)
    rows = _block(positions, width, config)[0]
    count = jnp.minimum(positions - pl.program_id(1) * rows, rows).astype(jnp.float32)
    level = tile.sum(value) / count
    centred = value - level
    tile.store(mean, level, tile.line)
    tile.store(spread, tile.sum(centred * centred), tile.line)


class _Inputs:
    """The references of a kernel, taken one after another."""

    def __init__(self, references: list[Any], tile: _Tile, options: Options) -> None:
        self.references, self.tile, self.halves = references, tile, parts(options.activation)
        self.options = options

    def take(self, mask: Array | None = None) -> Pair:
        """Value, and gate of a gated activation."""
        return tuple(self.one(mask) for _ in range(self.halves))

    def one(self, mask: Array | None = None) -> Array:
        """One tile, or line."""
        return self.tile.load(self.references.pop(0), mask)

    def line(self) -> Pair:
        """As `take`, of lines."""
        return self.take(self.tile.line)

    def scaled(self) -> tuple[Pair, Pair, Pair, Pair]:
        """z, z weight + bias, weight and 1 / deviation."""
        x, mean, inverse, weight, bias = self.take(), *(self.line() for _ in range(4))
        z = tuple((a - b) * c for a, b, c in zip(x, mean, inverse, strict=True))
        v = tuple(a * b + c for a, b, c in zip(z, weight, bias, strict=True))
        return z, v, weight, inverse

    def dropping(self) -> Callable[[Array], Array]:
        """What drops elements of a tile."""
        dropout = self.options.dropout
        if not dropout:
            return lambda value: value
        seed = self.references.pop(0)
        return lambda value: self.tile.dropped(value, seed, dropout)


def _forward_kernel(
    *references: Any, positions: int, width: int, config: Config, options: Options, residual: bool
) -> None:
    tile = _Tile(positions, width, config)
    inputs = _Inputs(list(references[:-1]), tile, options)
    _, v, _, _ = inputs.scaled()
    drop = inputs.dropping()
    added: Any = inputs.one() if residual else 0.0
    name = GATED.get(options.activation, options.activation)
    if options.residual_first:
        result = ACTIVATIONS[name](drop(v[0]) + added)[0]
    else:
        result = ACTIVATIONS[name](v[-1])[0]
        result = drop(result if len(v) == 1 else v[0] * result) + added
    tile.store(references[-1], result)


def _pulled(inputs: _Inputs) -> tuple[Pair, Pair, Pair, Pair, Array]:
    """z, the gradient of z weight + bias, weight, 1 / deviation, and the gradient of a residual
    that was added first."""
    z, v, weight, inverse = inputs.scaled()
    of_y, drop = inputs.one(), inputs.dropping()
    name = GATED.get(inputs.options.activation, inputs.options.activation)
    if inputs.options.residual_first:
        added: Any = inputs.one() if inputs.references else 0.0
        of_residual = of_y * ACTIVATIONS[name](drop(v[0]) + added)[1]
        return z, (drop(of_residual),), weight, inverse, of_residual
    of_y = drop(of_y)
    value, slope = ACTIVATIONS[name](v[-1])
    of_v: Pair = (of_y * slope,) if len(v) == 1 else (of_y * value, of_y * v[0] * slope)
    return z, of_v, weight, inverse, of_y


def _reduce_kernel(
    *references: Any, positions: int, width: int, config: Config, options: Options
) -> None:
    halves = parts(options.activation)
    tile = _Tile(positions, width, config)
    inputs = _Inputs(list(references[: -2 * halves]), tile, options)
    z, of_v, _, _, _ = _pulled(inputs)
    made = (*of_v, *(a * b for a, b in zip(of_v, z, strict=True)))
    for reference, value in zip(references[-2 * halves :], made, strict=True):
        tile.store(reference, tile.sum(value), tile.line)


def _backward_kernel(
    *references: Any, positions: int, width: int, config: Config, options: Options, outputs: int
) -> None:
    tile = _Tile(positions, width, config)
    inputs = _Inputs(list(references[:-outputs]), tile, options)
    level, along = inputs.line(), inputs.line()
    z, of_v, weight, inverse, of_residual = _pulled(inputs)
    of_x = [
        (a * b - c - d * e) * f
        for a, b, c, d, e, f in zip(of_v, weight, level, z, along, inverse, strict=True)
    ]
    for reference, value in zip(references[-outputs:], [*of_x, of_residual], strict=False):
        tile.store(reference, value)


def _maps(array: Array, halves: int, config: Config) -> Pairs:
    """``array`` (batch, positions, channels) as one argument for each half, and their blocks."""
    _, positions, channels = array.shape
    block = _block(positions, channels // halves, config)
    if halves == 1:
        return [array], [pl.BlockSpec((None, *block), lambda n, p: (n, p, 0))]
    array = array.reshape(*array.shape[:2], 2, -1)
    shape = None, block[0], None, block[1]
    return [array, array], [pl.BlockSpec(shape, partial(_half, h)) for h in range(2)]


def _half(half: int, sample: Any, block: Any) -> tuple[Any, Any, int, int]:
    return sample, block, half, 0


def _lines(values: Array, halves: int, positions: int, config: Config) -> Pairs:
    """The halves of (1 or batch, channels) as lines for each sample."""
    rows, channels = values.shape
    width = channels // halves
    line = _block(positions, width, config)[1]
    split = values.reshape(rows, halves, 1, width).swapaxes(0, 1)

    def index(sample: Any, _: Any) -> tuple[Any, int, int]:
        return sample if rows > 1 else 0, 0, 0

    return list(split), [pl.BlockSpec((None, 1, line), index)] * halves


def _seed(seed: tuple[Array, Array] | None) -> Pairs:
    if seed is None:
        return [], []
    return [jnp.stack(seed).reshape(1, 2)], [pl.BlockSpec((1, 2), lambda n, p: (0, 0))]


def _arguments(*pairs: Pairs) -> Pairs:
    return [a for arrays, _ in pairs for a in arrays], [s for _, specs in pairs for s in specs]


def _partials(x: Array, width: int, config: Config, count: int) -> Pairs:
    """Shapes and blocks of a line for each program."""
    batch, positions = x.shape[:2]
    shape = batch, _programs(positions, width, config), 1, width
    line = _block(positions, width, config)[1]
    block = pl.BlockSpec((None, None, 1, line), lambda n, p: (n, p, 0, 0))
    return [jax.ShapeDtypeStruct(shape, jnp.float32)] * count, [block] * count


@partial(jax.jit, static_argnames=("num_groups", "config", "device"))
def moments(
    x: Array, *, num_groups: int | None, config: Config, device: Device
) -> tuple[Array, Array]:
    """Mean and biased variance of ``x`` (batch, positions, channels): (channels,) of the batch, or
    (batch, groups). ``device`` keys the compiled code."""
    batch, positions, channels = x.shape
    shapes, specs = _partials(x, channels, config, 2)
    inputs, blocks = _maps(x, 1, config)
    mean, spread = pallas.call(
        partial(_statistics_kernel, positions=positions, width=channels, config=config),
        out_shape=shapes,
        grid=(batch, shapes[0].shape[1]),
        in_specs=blocks,
        out_specs=specs,
        num_warps=config.num_warps,
        num_stages=1,
        name="norm_activation_shuffle_statistics",
    )(*inputs)
    rows = _block(positions, channels, config)[0]
    count = jnp.minimum(positions - rows * jnp.arange(mean.shape[1]), rows).astype(jnp.float32)
    count = count.reshape(-1, 1, 1)
    axes: tuple[int, ...] = (0, 1, 2)
    if num_groups is not None:
        mean, spread = (
            v.reshape(batch, -1, num_groups, channels // num_groups) for v in (mean, spread)
        )
        axes = (1, 3)
    total = positions * (batch if num_groups is None else channels // num_groups)
    centre = (mean * count).sum(axes, keepdims=True) / total
    var = (spread + count * (mean - centre) ** 2).sum(axes) / total
    return centre.reshape(var.shape), var


@partial(jax.jit, static_argnames=("options", "config", "device"))
def forward(
    x: Array,
    lines: Lines,
    residual: Array | None,
    seed: tuple[Array, Array] | None,
    *,
    options: Options,
    config: Config,
    device: Device,
) -> Array:
    """Launch on ``x`` (batch, positions, channels) with elements."""
    halves = parts(options.activation)
    batch, positions, channels = x.shape
    width = channels // halves
    result = jax.ShapeDtypeStruct((batch, positions, width), x.dtype)
    arguments, specs = _arguments(
        _maps(x, halves, config),
        *(_lines(line, halves, positions, config) for line in lines),
        _seed(seed),
        ([], []) if residual is None else _maps(residual, 1, config),
    )
    block = pl.BlockSpec((None, *_block(positions, width, config)), lambda n, p: (n, p, 0))
    return pallas.call(
        partial(
            _forward_kernel,
            positions=positions,
            width=width,
            config=config,
            options=options,
            residual=residual is not None,
        ),
        out_shape=[result],
        grid=(batch, _programs(positions, width, config)),
        in_specs=specs,
        out_specs=[block],
        num_warps=config.num_warps,
        num_stages=1,
        name="norm_activation_shuffle",
    )(*arguments)[0]


@partial(jax.jit, static_argnames=("options", "norm", "num_groups", "config", "device"))
def backward(
    x: Array,
    lines: Lines,
    residual: Array | None,
    seed: tuple[Array, Array] | None,
    of_y: Array,
    *,
    options: Options,
    norm: str,
    num_groups: int,
    config: Config,
    device: Device,
) -> tuple[Array, Array, Array, Array | None]:
    """The gradients of ``x``, in float32 those of weight and bias, and that of a residual that was
    added first, which is only given then."""
    halves = parts(options.activation)
    batch, positions, channels = x.shape
    width = channels // halves
    shared = _arguments(
        _maps(x, halves, config),
        *(_lines(line, halves, positions, config) for line in lines),
        _maps(of_y, 1, config),
        _seed(seed),
        ([], []) if residual is None else _maps(residual, 1, config),
    )
    kernel: dict[str, Any] = {
        "positions": positions,
        "width": width,
        "config": config,
        "options": options,
    }
    call = partial(
        pallas.call,
        grid=(batch, _programs(positions, width, config)),
        num_warps=config.num_warps,
        num_stages=1,
    )
    shapes, blocks = _partials(x, width, config, 2 * halves)
    sums = call(
        partial(_reduce_kernel, **kernel),
        out_shape=shapes,
        in_specs=shared[1],
        out_specs=blocks,
        name="norm_activation_shuffle_reduce",
    )(*shared[0])
    of_samples = [part.sum((1, 2)) for part in sums]
    of_bias = jnp.concatenate(of_samples[:halves], axis=1)
    of_weight = jnp.concatenate(of_samples[halves:], axis=1)
    level, along = (
        _averaged(v * lines.weight, norm, num_groups, positions) for v in (of_bias, of_weight)
    )
    arguments, specs = _arguments(
        _lines(level, halves, positions, config), _lines(along, halves, positions, config), shared
    )
    outputs = halves + (residual is not None)
    block = pl.BlockSpec((None, *_block(positions, width, config)), lambda n, p: (n, p, 0))
    results = call(
        partial(_backward_kernel, **kernel, outputs=outputs),
        out_shape=[jax.ShapeDtypeStruct((batch, positions, width), x.dtype)] * outputs,
        in_specs=specs,
        out_specs=[block] * outputs,
        name="norm_activation_shuffle_backward",
    )(*arguments)
    of_x = jnp.concatenate(results[:halves], axis=-1) if halves == 2 else results[0]
    of_residual = None if residual is None else results[-1]
    return of_x, of_weight.sum(0), of_bias.sum(0), of_residual


def _averaged(value: Array, norm: str, num_groups: int, positions: int) -> Array:
    """The mean of what shares moments, (1 or batch, channels), given sums over positions."""
    batch, channels = value.shape
    if norm == "batch":
        return value.sum(0, keepdims=True) / (batch * positions)
    if norm == "group":
        members = channels // num_groups
        sums = value.reshape(batch, num_groups, members).sum(-1) / (members * positions)
        return jnp.repeat(sums, members, 1)
    return jnp.zeros((1, channels), jnp.float32)
