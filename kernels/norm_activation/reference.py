"""Norm, activation, dropout and residual in NumPy float64: the meaning of the op.

For each row x of C elements, with m the dropout's factors (0 or 1 / (1 - dropout), a function of
seed, row and column: `core.dropout`):

    layer:  z = (x - mean x) / sqrt(mean (x - mean x)^2 + eps)
    rms:    z = x / sqrt(mean x^2 + eps)
    none:   z = x
    y = m * activation(z * weight + bias) + residual
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..core import activations
from ..core import dropout as counter
from ..core.problem import Case
from .spec import parts

Array = NDArray[Any]


def make_inputs(case: Case, seed: int = 0) -> dict[str, Array]:
    """Rows with means of their own, and everything that may be added to them."""
    generator = np.random.default_rng(seed)
    rows, width = case.dims["rows"], case.dims["width"]
    columns = width * parts(str(case.flags.get("activation", "Identity")))
    return {
        "x": 2.0 * generator.standard_normal((rows, columns)) + generator.normal(size=(rows, 1)),
        "weight": 1.0 + 0.3 * generator.standard_normal(columns),
        "bias": 0.3 * generator.standard_normal(columns),
        "residual": generator.standard_normal((rows, width)),
    }


def _normalized(x: Array, norm: str, eps: float) -> tuple[Array, Array]:
    """z, and the factor that made it."""
    if norm == "none":
        return x, np.ones((*x.shape[:-1], 1))
    centred = x - x.mean(-1, keepdims=True) if norm == "layer" else x
    scale = 1.0 / np.sqrt((centred * centred).mean(-1, keepdims=True) + eps)
    return centred * scale, scale


def _dropped(shape: tuple[int, ...], dropout: float, seed: int) -> Array:
    if not dropout:
        return np.ones(shape)
    rows = int(np.prod(shape[:-1]))
    return counter.scale(dropout, seed, rows, shape[-1]).reshape(shape)


def forward(
    inputs: dict[str, Array],
    *,
    norm: str = "layer",
    activation: str = "Identity",
    eps: float = 1e-5,
    dropout: float = 0.0,
    seed: int = 0,
) -> dict[str, Array]:
    """``y``, in the shape of ``x`` with its last axis halved by a gated activation."""
    z = _normalized(inputs["x"], norm, eps)[0]
    y = activations.apply(activation, z * inputs["weight"] + inputs["bias"])
    return {"y": y * _dropped(y.shape, dropout, seed) + inputs["residual"]}


def backward(
    inputs: dict[str, Array],
    cotangents: dict[str, Array],
    *,
    norm: str = "layer",
    activation: str = "Identity",
    eps: float = 1e-5,
    dropout: float = 0.0,
    seed: int = 0,
) -> dict[str, Array]:
    """The gradients of all inputs for the cotangent of ``y``."""
    z, scale = _normalized(inputs["x"], norm, eps)
    of_y = np.asarray(cotangents["y"], np.float64)
    dropped = of_y * _dropped(of_y.shape, dropout, seed)
    of_v = activations.pull_back(activation, z * inputs["weight"] + inputs["bias"], dropped)
    of_z = of_v * inputs["weight"]
    of_x = of_z
    if norm != "none":
        of_x = of_z - z * (of_z * z).mean(-1, keepdims=True)
        if norm == "layer":
            of_x = of_x - of_z.mean(-1, keepdims=True)
    leading = tuple(range(z.ndim - 1))
    return {
        "x": of_x * scale,
        "weight": (of_v * z).sum(leading),
        "bias": of_v.sum(leading),
        "residual": of_y,
    }
