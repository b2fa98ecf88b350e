"""Norm, shuffle, activation, dropout, residual and FiLM in NumPy float64: the meaning of the op.

For feature maps x (batch, channels, *sides) with moments over batch and sides of each channel
("batch"; given ones where not training) or over channels and sides of each group ("group"), S the
pixel (un)shuffle, m the dropout's factors (0 or 1 / (1 - dropout), a function of seed, sample and
the element's place in the sample: `core.dropout`), a and b factors of each sample and channel:

    v = S((x - mean) / sqrt(var + eps) * weight + bias)
    y = a * m * activation(v) + b + residual
    y = a * activation(m * v + residual) + b        with residual_first
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..core import activations
from ..core import dropout as counter
from ..core.problem import Case
from .spec import parts, shuffled

Array = NDArray[Any]
_EVERY = ("x", "weight", "bias", "residual", "scale", "shift")


def make_inputs(case: Case, seed: int = 0) -> dict[str, Array]:
    """Feature maps whose channels have means of their own, and what may be added to them."""
    generator = np.random.default_rng(seed)
    batch, channels = case.dims["batch"], case.dims["channels"]
    sides = [case.dims["height"], case.dims["width"]]
    x = generator.standard_normal((batch, channels, *sides))
    x = 2.0 * x + generator.normal(size=(channels, 1, 1))
    shuffle = int(case.flags.get("shuffle") or 0)
    kept, sides = shuffled(channels, sides, shuffle)
    kept //= parts(str(case.flags.get("activation", "Identity")))
    return {
        "x": x,
        "weight": 1.0 + 0.3 * generator.standard_normal(channels),
        "bias": 0.3 * generator.standard_normal(channels),
        "residual": generator.standard_normal((batch, kept, *sides)),
    }


def _line(values: Array, sides: int) -> Array:
    """(channels,) or (batch, channels), to be broadcast against feature maps."""
    return values.reshape(*values.shape, *[1] * sides)


def shuffle_pixels(x: Array, factor: int) -> Array:
    """The pixel shuffle of torch by ``factor``; below 0, its inverse."""
    by = abs(factor)
    if by < 2:
        return x
    batch, channels, height, width = x.shape
    if factor > 0:
        x = x.reshape(batch, channels // by**2, by, by, height, width)
        return x.transpose(0, 1, 4, 2, 5, 3).reshape(batch, -1, height * by, width * by)
    x = x.reshape(batch, channels, height // by, by, width // by, by)
    return x.transpose(0, 1, 3, 5, 2, 4).reshape(batch, -1, height // by, width // by)


def _normalized(
    inputs: dict[str, Array], norm: str, num_groups: int, training: bool, eps: float
) -> tuple[Array, Array, tuple[int, ...]]:
    """z, the factor that made it, and the shape and axes of what shares moments."""
    x = inputs["x"].astype(np.float64)
    batch, channels, *sides = x.shape
    if norm == "none" or (norm == "batch" and not training):
        if norm == "none":
            return x, np.ones(1), ()
        factor = 1.0 / np.sqrt(inputs["running_var"] + eps)
        mean, factor = _line(inputs["running_mean"], len(sides)), _line(factor, len(sides))
        return (x - mean) * factor, factor, ()
    axes: tuple[int, ...] = (0, *range(2, x.ndim))
    if norm == "group":
        x = x.reshape(batch, num_groups, channels // num_groups, *sides)
        axes = tuple(range(2, x.ndim))
    centred = x - x.mean(axes, keepdims=True)
    factor = 1.0 / np.sqrt((centred * centred).mean(axes, keepdims=True) + eps)
    return centred * factor, factor, axes


def _dropped(shape: tuple[int, ...], dropout: float, seed: int) -> Array:
    if not dropout:
        return np.ones(shape)
    return counter.scale(dropout, seed, shape[0], int(np.prod(shape[1:]))).reshape(shape)


def _activated(activation: str, v: Array) -> Array:
    return np.moveaxis(activations.apply(activation, np.moveaxis(v, 1, -1)), -1, 1)


def _pulled(activation: str, v: Array, cotangent: Array) -> Array:
    moved = np.moveaxis(v, 1, -1), np.moveaxis(cotangent, 1, -1)
    return np.moveaxis(activations.pull_back(activation, *moved), -1, 1)


def _run(
    inputs: dict[str, Array],
    of_y: Array | None,
    *,
    norm: str = "batch",
    num_groups: int = 1,
    training: bool = True,
    momentum: float = 0.1,
    activation: str = "Identity",
    eps: float = 1e-5,
    shuffle: int = 0,
    dropout: float = 0.0,
    residual_first: bool = False,
    seed: int = 0,
    channels_last: bool = False,
) -> dict[str, Array]:
    given = inputs["x"]
    sides = given.ndim - 2
    z, factor, axes = _normalized(inputs, norm, num_groups, training, eps)
    flat = z.reshape(given.shape)
    weight = _line(inputs.get("weight", np.ones(1)), sides)
    v = shuffle_pixels(flat * weight + _line(inputs.get("bias", np.zeros(1)), sides), shuffle)
    result = _activated(activation, v).shape
    residual = inputs.get("residual", np.zeros(result))
    scale = _line(inputs.get("scale", np.ones((1, 1))), sides)
    shift = _line(inputs.get("shift", np.zeros((1, 1))), sides)
    mask = _dropped(result, dropout, seed)
    if residual_first:
        argument = mask * v + residual
        made = _activated(activation, argument)
        y = scale * made + shift
    else:
        argument = v
        made = mask * _activated(activation, argument)
        y = scale * made + shift + residual
    if of_y is None:
        return {"y": y}
    over = tuple(range(2, given.ndim))
    of_scale, of_shift = (of_y * made).sum(over), of_y.sum(over)
    of_made = of_y * scale
    if residual_first:
        of_residual = _pulled(activation, argument, of_made)
        of_v = mask * of_residual
    else:
        of_residual = of_y
        of_v = _pulled(activation, argument, mask * of_made)
    of_v = shuffle_pixels(of_v, -shuffle)
    of_z = (of_v * weight).reshape(z.shape)
    if axes:
        of_z = of_z - of_z.mean(axes, keepdims=True) - z * (of_z * z).mean(axes, keepdims=True)
    summed = (0, *over)
    return {
        "x": (of_z * factor).reshape(given.shape),
        "weight": (of_v * flat).sum(summed),
        "bias": of_v.sum(summed),
        "residual": of_residual,
        "scale": of_scale,
        "shift": of_shift,
    }


def forward(inputs: dict[str, Array], **options: Any) -> dict[str, Array]:
    """``y``; ``options`` are those of the public function, ``channels_last`` changes nothing."""
    return _run(inputs, None, **options)


def backward(
    inputs: dict[str, Array], cotangents: dict[str, Array], **options: Any
) -> dict[str, Array]:
    """The gradients of all inputs for the cotangent of ``y``."""
    gradients = _run(inputs, np.asarray(cotangents["y"], np.float64), **options)
    return {name: gradients[name] for name in _EVERY}
