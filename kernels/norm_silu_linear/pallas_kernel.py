"""Pallas kernels of norm, SiLU, skip, norm and a linear layer.

The algebra is the Triton kernel's, whose docstring explains it: a program makes a tile of the
result from whole rows, some columns at a time, and walks over them twice. The first walk is for
the first norm's statistics and is spelled out, so that its loads need not wait for each other; the
second is a loop with the products in it, and what it does not know yet comes in at its end. SiLU
is taken in the second only. What fills up a tile is masked by hand.
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

_STATIC = ("eps", "config", "device")


class Norms(NamedTuple):
    """What precedes the linear layer: arrays, or in a kernel the references of a program's rows;
    the last three are None without a skip connection."""

    x: Any
    weight: Any
    bias: Any
    skip: Any
    skip_weight: Any
    skip_bias: Any


class _Sizes(NamedTuple):
    """Of a call and of its tiles; a program also writes ``share`` of the columns of its rows."""

    rows: int
    width: int
    features: int
    block_rows: int
    block_features: int
    block_in: int
    share: int

    @property
    def grid(self) -> tuple[int, int]:
        return pl.cdiv(self.rows, self.block_rows), pl.cdiv(self.features, self.block_features)


def _sizes(rows: int, width: int, features: int, config: Config) -> _Sizes:
    share = padded(pl.cdiv(width, pl.cdiv(features, config.block_features)))
    block_in = min(padded(width), config.block_in)
    tile = config.block_rows, config.block_features, block_in
    return _Sizes(rows, width, features, *tile, share)


def _iota(size: int, axis: int) -> Array:
    shape = (size, 1) if axis == 0 else (1, size)
    return jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def _row_sum(value: Array) -> Array:
    return jnp.sum(value, axis=1, keepdims=True)


class _Columns:
    """Some columns of a program's rows; what is loaded is float32, and 0 where it is not real."""

    def __init__(self, start: Any, size: int, in_range: Array, width: int) -> None:
        self.at = pl.ds(start, size)
        self.in_row = start + _iota(size, 1) < width
        self.in_column = start + _iota(size, 0) < width
        self.real = in_range & self.in_row

    def rows(self, reference: Any) -> Array:
        return pallas.load(reference.at[:, self.at], self.real).astype(jnp.float32)

    def line(self, reference: Any) -> Array:
        return pallas.load(reference.at[:, self.at], self.in_row).astype(jnp.float32)

    def store(self, reference: Any, value: Array) -> None:
        pallas.store(reference.at[:, self.at], value.astype(reference.dtype), self.real)


class _Rows:
    """A program's rows before the linear layer."""

    def __init__(self, norms: Norms, sizes: _Sizes, eps: float) -> None:
        self.norms, self.sizes, self.eps = norms, sizes, eps
        row = pl.program_id(0) * sizes.block_rows + _iota(sizes.block_rows, 0)
        self.in_range = row < sizes.rows
        self.mean, self.inverse = self._statistics()
        self.shift = jnp.zeros_like(self.mean) if norms.skip is None else self._first_mean()

    def columns(self, start: Any, size: int) -> _Columns:
        return _Columns(start, size, self.in_range, self.sizes.width)

    def spread(self, sums: Array, squares: Array) -> tuple[Array, Array]:
        """Mean and 1 / deviation from sums of elements and of squares."""
        mean = _row_sum(sums) / self.sizes.width
        variance = _row_sum(squares) / self.sizes.width - mean * mean
        return mean, 1.0 / jnp.sqrt(jnp.where(variance < 0.0, 0.0, variance) + self.eps)

    def _statistics(self) -> tuple[Array, Array]:
        """Mean and 1 / deviation of each row, of what is left when the first columns' mean is
        taken off: its mean is at most sqrt(width / block_in) deviations, so little cancels."""
        width, block = self.sizes.width, self.sizes.block_in
        part = self.columns(0, block)
        first = part.rows(self.norms.x)
        shift = _row_sum(first) / min(block, width)
        sums = jnp.where(part.real, first - shift, 0.0)
        squares = sums * sums
        for start in range(block, width, block):
            part = self.columns(start, block)
            value = jnp.where(part.real, part.rows(self.norms.x) - shift, 0.0)
            sums += value
            squares += value * value
        mean, inverse = self.spread(sums, squares)
        return shift + mean, inverse

    def activated(self, part: _Columns) -> tuple[Array, Array, Array, Array]:
        """Normalised rows, SiLU of their affine map, its slope, and the norm's weight."""
        inner = (part.rows(self.norms.x) - self.mean) * self.inverse
        scale = part.line(self.norms.weight)
        value, slope = ACTIVATIONS["SiLU"](inner * scale + part.line(self.norms.bias))
        return inner, value, slope, scale

    def _first_mean(self) -> Array:
        """The mean of SiLU and skip in the first columns of each row."""
        block = self.sizes.block_in
        part = self.columns(0, block)
        value = self.activated(part)[1] + part.rows(self.norms.skip)
        return _row_sum(jnp.where(part.real, value, 0.0)) / min(block, self.sizes.width)

    def skipped(self, part: _Columns, value: Array) -> Array:
        """SiLU and skip, less the mean of the first columns."""
        return jnp.where(part.real, value + part.rows(self.norms.skip) - self.shift, 0.0)

    def share(self) -> _Columns:
        """The columns that this program writes."""
        return self.columns(pl.program_id(1) * self.sizes.share, self.sizes.share)


def _norms(references: list[Any], skip: bool) -> Norms:
    """Those of a kernel's references that come first."""
    given = [references.pop(0) for _ in range(6 if skip else 3)]
    return Norms(*given, *[None] * (6 - len(given)))


def _product(left: Array, right: Array, transpose_right: bool = False) -> Array:
    return pallas.dot(left.astype(right.dtype), right, transpose_right=transpose_right)


def _feature(sizes: _Sizes, axis: int) -> Array:
    """Whether each of a program's features is real."""
    first = pl.program_id(1) * sizes.block_features
    return first + _iota(sizes.block_features, axis) < sizes.features


def _forward_kernel(
    *references: Any, sizes: _Sizes, eps: float, skip: bool, has_bias: bool
) -> None:
    """A tile of ``y`` and a share of the columns of ``h``."""
    *inputs, y, h = references
    norms = _norms(inputs, skip)
    weight, *bias = inputs
    rows = _Rows(norms, sizes, eps)
    down, across = _feature(sizes, 0), _feature(sizes, 1)
    number = _iota(sizes.block_rows, 0)

    def step(index: Any, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        part = rows.columns(index * sizes.block_in, sizes.block_in)
        right = pallas.load(weight.at[:, part.at], down & part.in_row)
        value = rows.activated(part)[1]
        total, *others = carry
        if skip:
            of_lines, sums, squares = others
            value = rows.skipped(part, value)
            sums += value
            squares += value * value
            scale = part.line(norms.skip_weight)
            value = value * scale
            # The norm's weight and bias as two more rows.
            lines = jnp.where(number == 1, part.line(norms.skip_bias), 0.0)
            lines = jnp.where(number == 0, scale, lines)
            others = [of_lines + _product(lines, right, True), sums, squares]
        value = jnp.where(part.in_row, value, 0.0)
        return total + _product(value, right, True), *others

    zeros = jnp.zeros((sizes.block_rows, sizes.block_features), jnp.float32)
    nothing = jnp.zeros((sizes.block_rows, sizes.block_in), jnp.float32)
    start = (zeros, zeros, nothing, nothing) if skip else (zeros,)
    steps = pl.cdiv(sizes.width, sizes.block_in)
    total, *others = jax.lax.fori_loop(0, steps, step, start)
    if skip:
        of_lines, sums, squares = others
        mean, inverse = rows.spread(sums, squares)
        of_scale, of_bias = (
            jnp.sum(jnp.where(number == line, of_lines, 0.0), axis=0, keepdims=True)
            for line in (0, 1)
        )
        total = (total - mean * of_scale) * inverse + of_bias
    if has_bias:
        total += pallas.load(bias[0], across).astype(jnp.float32)
    pallas.store(y, total.astype(y.dtype), rows.in_range & across)

    part = rows.share()
    value = rows.activated(part)[1]
    if skip:
        value = (rows.skipped(part, value) - mean) * inverse
        value = value * part.line(norms.skip_weight) + part.line(norms.skip_bias)
    part.store(h, value)


def _gradient_kernel(*references: Any, sizes: _Sizes, eps: float, skip: bool) -> None:
    """A tile of the gradient of the linear layer's input, and a share of the columns of the
    gradient of the skip connection."""
    inputs = list(references)
    norms = _norms(inputs, skip)
    weight, of_h, of_input, *of_skip = inputs
    rows = _Rows(norms, sizes, eps)
    across = _feature(sizes, 1)

    def step(
        index: Any, carry: tuple[dict[str, Array], dict[str, Array]]
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        part = rows.columns(index * sizes.block_in, sizes.block_in)
        right = pallas.load(weight.at[part.at, :], part.in_column & across)
        inner, value, slope, scale = rows.activated(part)
        g = part.rows(of_h)
        slope = jnp.where(part.real, slope * scale, 0.0)
        inner = jnp.where(part.real, inner, 0.0)
        lefts, terms = {"inner": inner, "ones": jnp.ones_like(inner)}, {}
        if skip:
            g = g * part.line(norms.skip_weight)
            value = rows.skipped(part, value)
            lefts |= {"slope": slope, "sum": value * slope}
            terms = {
                "sums": value,
                "squares": value * value,
                "given": g,
                "given sum": g * value,
                "slope": slope,
                "slope inner": slope * inner,
                "sum": value * slope,
                "sum inner": value * slope * inner,
            }
        lefts["steep"] = g * slope
        terms |= {"steep": g * slope, "steep inner": g * slope * inner}
        products, sums = carry
        return (
            {name: products[name] + _product(left, right) for name, left in lefts.items()},
            {name: sums[name] + term for name, term in terms.items()},
        )

    zeros = jnp.zeros((sizes.block_rows, sizes.block_features), jnp.float32)
    nothing = jnp.zeros((sizes.block_rows, sizes.block_in), jnp.float32)
    of, in_rows = ["steep", "inner", "ones"], ["steep", "steep inner"]
    if skip:
        of += ["slope", "sum"]
        in_rows += ["sums", "squares", "given", "given sum"]
        in_rows += ["slope", "slope inner", "sum", "sum inner"]
    start = dict.fromkeys(of, zeros), dict.fromkeys(in_rows, nothing)
    steps = pl.cdiv(sizes.width, sizes.block_in)
    products, sums = jax.lax.fori_loop(0, steps, step, start)
    means = {name: _row_sum(value) / sizes.width for name, value in sums.items()}
    level, along, total = means["steep"], means["steep inner"], products["steep"]
    if skip:
        mean, inverse = rows.spread(sums["sums"], sums["squares"])
        # The gradient of u is inverse * (g - base - u * rise).
        rise = (means["given sum"] - mean * means["given"]) * inverse * inverse
        base = means["given"] - mean * rise
        level = (level - base * means["slope"] - rise * means["sum"]) * inverse
        along = (along - base * means["slope inner"] - rise * means["sum inner"]) * inverse
        total = (total - base * products["slope"] - rise * products["sum"]) * inverse
    total = (total - level * products["ones"] - along * products["inner"]) * rows.inverse
    pallas.store(of_input, total.astype(of_input.dtype), rows.in_range & across)

    if skip:
        part = rows.share()
        value = rows.skipped(part, rows.activated(part)[1])
        g = part.rows(of_h) * part.line(norms.skip_weight)
        part.store(of_skip[0], (g - base - value * rise) * inverse)


def _inputs(norms: Norms, sizes: _Sizes) -> tuple[list[Array], list[Any], Any]:
    """The norms' arrays and their blocks, and the block of an array like ``x``: whole rows, of
    which a kernel takes some columns."""
    columns = padded(sizes.width)
    whole = pl.BlockSpec((sizes.block_rows, columns), lambda i, j: (i, 0))
    line = pl.BlockSpec((1, columns), lambda i, j: (0, 0))
    given = [array for array in norms if array is not None]
    arrays = [array if array.ndim == 2 else array[None] for array in given]
    return arrays, [whole if array.ndim == 2 else line for array in given], whole


@partial(jax.jit, static_argnames=_STATIC)
def forward(
    norms: Norms,
    weight: Array,
    bias: Array | None,
    *,
    eps: float,
    config: Config,
    device: Device,
) -> tuple[Array, Array]:
    """``y`` and ``h`` of ``x`` (rows, width), rows > 0; ``device`` keys the compiled code."""
    rows, width = norms.x.shape
    features = len(weight)
    sizes = _sizes(rows, width, features, config)
    arrays, specs, whole = _inputs(norms, sizes)
    arrays.append(weight)
    specs.append(pl.BlockSpec((sizes.block_features, padded(width)), lambda i, j: (j, 0)))
    if bias is not None:
        arrays.append(bias[None])
        specs.append(pl.BlockSpec((1, sizes.block_features), lambda i, j: (0, j)))
    y, h = pallas.call(
        partial(
            _forward_kernel,
            sizes=sizes,
            eps=eps,
            skip=norms.skip is not None,
            has_bias=bias is not None,
        ),
        out_shape=[
            jax.ShapeDtypeStruct((rows, features), weight.dtype),
            jax.ShapeDtypeStruct((rows, width), norms.weight.dtype),
        ],
        grid=sizes.grid,
        in_specs=specs,
        out_specs=[_tile(sizes), whole],
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        name="norm_silu_linear",
    )(*arrays)
    return y, h


def _tile(sizes: _Sizes) -> Any:
    return pl.BlockSpec((sizes.block_rows, sizes.block_features), lambda i, j: (i, j))


@partial(jax.jit, static_argnames=_STATIC)
def gradient(
    of_h: Array,
    norms: Norms,
    weight: Array,
    *,
    eps: float,
    config: Config,
    device: Device,
) -> tuple[Array, Array | None]:
    """The gradients of the linear layer's input and of the skip connection, in the dtype of
    ``of_h``, for ``weight`` (width, features)."""
    rows, width = norms.x.shape
    features = weight.shape[1]
    sizes = _sizes(rows, width, features, config)
    arrays, specs, whole = _inputs(norms, sizes)
    skip = norms.skip is not None
    shapes = [(rows, features), (rows, width)][: 1 + skip]
    of_input, *of_skip = pallas.call(
        partial(_gradient_kernel, sizes=sizes, eps=eps, skip=skip),
        out_shape=[jax.ShapeDtypeStruct(shape, of_h.dtype) for shape in shapes],
        grid=sizes.grid,
        in_specs=[
            *specs,
            pl.BlockSpec((padded(width), sizes.block_features), lambda i, j: (0, j)),
            whole,
        ],
        out_specs=[_tile(sizes), whole][: 1 + skip],
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        name="linear_norm_silu_gradient",
    )(*arrays, weight, of_h)
    return of_input, of_skip[0] if skip else None
