"""Convolution, pixel (un)shuffle and activation in NumPy float64: the meaning of the op.

With s the shuffle, X the input continued beyond its edges by the padding mode, and W and b those
of the sample where each sample has its own:

    y = activation(s(z)),    z[o, p] = b[o] + sum_(c, k) W[o, c, k] X[c, p stride + k dilation]
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..core import activations
from ..core.problem import Case
from .spec import Geometry, Options, geometry

Array = NDArray[Any]


def make_inputs(case: Case, seed: int = 0) -> dict[str, Array]:
    """Feature maps and weights as in a layer just made."""
    generator = np.random.default_rng(seed)
    dims, sides = case.dims, int(case.flags.get("sides", 2) or 2)
    inputs = dims["in_channels"] // int(case.flags.get("groups", 1) or 1)
    own = (dims["batch"],) if case.flags.get("per_sample") else ()
    window = (dims["kernel"],) * sides
    outputs = dims["out_channels"]
    size = (dims["height"], dims["width"])[-sides:]
    scale = np.sqrt(inputs * dims["kernel"] ** sides)
    return {
        "x": generator.standard_normal((dims["batch"], dims["in_channels"], *size)),
        "weight": generator.standard_normal((*own, outputs, inputs, *window)) / scale,
        "bias": 0.3 * generator.standard_normal((*own, outputs)),
    }


def selection(count: int, start: int, step: int, size: int, mode: str) -> Array:
    """(count, size): a row with a one where the element ``start + i step`` lies, or none."""
    index = start + step * np.arange(count)
    inside = (index >= 0) & (index < size)
    if mode == "replicate":
        index = np.clip(index, 0, size - 1)
    elif mode == "circular":
        index = index % size
    elif mode == "reflect":
        index = np.abs(index)
        index = np.where(index >= size, 2 * (size - 1) - index, index)
    chosen = index[:, None] == np.arange(size)
    return np.where(inside[:, None] | (mode != "zeros"), chosen, False).astype(np.float64)


def _taps(sizes: Geometry, options: Options) -> Iterator[tuple[tuple[int, ...], Array, Array]]:
    """Each element of the window, with the rows and the columns of the input that it takes."""
    for tap in itertools.product(*map(range, sizes.window)):
        rows, columns = (
            selection(
                sizes.convolved[i],
                tap[i] * options.dilation - sizes.padding[i],
                options.stride,
                sizes.size[i],
                options.padding_mode,
            )
            for i in (0, 1)
        )
        yield tap, rows, columns


def _shuffle(z: Array, sizes: Geometry, scale: int) -> Array:
    """(batch, channels, rows, columns) as the op orders them."""
    batch, channels, rows, columns = z.shape
    fy, fx = sizes.factor
    if scale > 0:
        z = z.reshape(batch, channels // (fy * fx), fy, fx, rows, columns)
        z = z.transpose(0, 1, 4, 2, 5, 3)
        return z.reshape(batch, -1, rows * fy, columns * fx)
    z = z.reshape(batch, channels, rows // fy, fy, columns // fx, fx).transpose(0, 1, 3, 5, 2, 4)
    return z.reshape(batch, -1, rows // fy, columns // fx)


def _flat(maps: Array) -> Array:
    """Positions along one axis."""
    return maps.reshape(*maps.shape[:3], -1)


class _Call:
    """Arguments as (batch, groups, ...) arrays of two sides."""

    def __init__(self, inputs: dict[str, Array], options: Options) -> None:
        x, weight = inputs["x"], inputs["weight"]
        sides = x.ndim - 2
        self.options, groups = options, options.groups
        self.sizes = geometry(x.shape, weight.shape, options)
        self.own = weight.ndim == sides + 3
        self.x = x.reshape(len(x), groups, -1, *self.sizes.size)
        one = weight if self.own else weight[None]
        self.weight = one.reshape(len(one), groups, -1, one.shape[2], *self.sizes.window)
        bias = inputs["bias"] if self.own else inputs["bias"][None]
        self.bias = bias.reshape(len(bias), groups, -1, 1)

    def convolve(self) -> Array:
        """(batch, channels, rows, columns)."""
        z: Array = self.bias
        for (row, column), rows, columns in _taps(self.sizes, self.options):
            z = z + self.weight[..., row, column] @ _flat(rows @ self.x @ columns.T)
        return z.reshape(len(self.x), -1, *self.sizes.convolved)

    def activated(self, z: Array) -> Array:
        """Channels last, as `core.activations` takes gated ones."""
        return _shuffle(z, self.sizes, self.options.shuffle).transpose(0, 2, 3, 1)


def forward(
    inputs: dict[str, Array], *, per_sample: bool = False, sides: int = 2, **options: Any
) -> dict[str, Array]:
    """``y``; ``per_sample`` and ``sides`` are what the shapes say."""
    call = _Call(inputs, Options(**options))
    y = activations.apply(call.options.activation, call.activated(call.convolve()))
    return {"y": y.transpose(0, 3, 1, 2).reshape(call.sizes.result)}


def backward(
    inputs: dict[str, Array],
    cotangents: dict[str, Array],
    *,
    per_sample: bool = False,
    sides: int = 2,
    **options: Any,
) -> dict[str, Array]:
    """The gradients of ``x``, ``weight`` and ``bias`` for the cotangent of ``y``."""
    call = _Call(inputs, Options(**options))
    sizes, z = call.sizes, call.convolve()
    result = (*sizes.result[:2], *(1, *sizes.result[2:])[-2:])
    of_y = np.asarray(cotangents["y"], np.float64).reshape(result).transpose(0, 2, 3, 1)
    pulled = activations.pull_back(call.options.activation, call.activated(z), of_y)
    order = _shuffle(np.arange(z.size).reshape(z.shape), sizes, call.options.shuffle)
    of_z: Array = np.empty(z.size)
    of_z[order.ravel()] = pulled.transpose(0, 3, 1, 2).ravel()
    of_z = of_z.reshape(len(z), call.options.groups, -1, math.prod(sizes.convolved))
    of_x, of_weight = np.zeros(call.x.shape), np.zeros((len(z), *call.weight.shape[1:]))
    for (row, column), rows, columns in _taps(sizes, call.options):
        taken = _flat(rows @ call.x @ columns.T)
        of_weight[..., row, column] = of_z @ taken.swapaxes(2, 3)
        share = call.weight[..., row, column].swapaxes(2, 3) @ of_z
        of_x += rows.T @ share.reshape(*share.shape[:3], *sizes.convolved) @ columns
    of_bias = of_z.sum(3)
    if not call.own:
        of_weight, of_bias = of_weight.sum(0), of_bias.sum(0)
    return {
        "x": of_x.reshape(inputs["x"].shape),
        "weight": of_weight.reshape(inputs["weight"].shape),
        "bias": of_bias.reshape(inputs["bias"].shape),
    }
