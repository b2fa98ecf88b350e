"""Linear, norm, activation, dropout and residual in NumPy float64: the meaning of the op.

With N a norm (layer or rms, with its weight and bias; see `forward`) and m the dropout's factors
(`core.dropout`):

    y = m * activation(N(x W^T + b)) + residual
    y = m * activation(N(x) W^T + b) + residual        where norm_first
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
    """Rows and weights as in a layer just made, and everything that may be added."""
    generator = np.random.default_rng(seed)
    rows, inputs = case.dims["rows"], case.dims["in_features"]
    width = case.dims["width"]
    outputs = width * parts(str(case.flags.get("activation", "Identity")))
    normed = inputs if case.flags.get("norm_first") else outputs
    return {
        "x": generator.standard_normal((rows, inputs)),
        "weight": generator.standard_normal((outputs, inputs)) / np.sqrt(inputs),
        "bias": 0.3 * generator.standard_normal(outputs),
        "norm_weight": 1.0 + 0.3 * generator.standard_normal(normed),
        "norm_bias": 0.3 * generator.standard_normal(normed),
        "residual": generator.standard_normal((rows, width)),
    }


def _norm(inputs: dict[str, Array], x: Array, norm: str, eps: float) -> tuple[Array, Array, Array]:
    """The normalised rows before and after weight and bias, and what they were scaled by."""
    z, scale = x, np.ones((*x.shape[:-1], 1))
    if norm != "none":
        z = x - x.mean(-1, keepdims=True) if norm == "layer" else x
        scale = 1.0 / np.sqrt((z * z).mean(-1, keepdims=True) + eps)
        z = z * scale
    return z * inputs["norm_weight"] + inputs["norm_bias"], z, scale


def _pull_norm(
    inputs: dict[str, Array], z: Array, scale: Array, of_normed: Array, norm: str
) -> dict[str, Array]:
    of_z = of_normed * inputs["norm_weight"]
    of_x = of_z
    if norm != "none":
        of_x = of_z - z * (of_z * z).mean(-1, keepdims=True)
        if norm == "layer":
            of_x = of_x - of_z.mean(-1, keepdims=True)
    return {
        "x": of_x * scale,
        "norm_weight": (of_normed * z).sum(0),
        "norm_bias": of_normed.sum(0),
    }


def _dropped(shape: tuple[int, ...], dropout: float, seed: int) -> Array:
    return counter.scale(dropout, seed, shape[0], shape[1]) if dropout else np.ones(shape)


def _linear(inputs: dict[str, Array], x: Array) -> Array:
    return x @ inputs["weight"].T + inputs["bias"]


def forward(
    inputs: dict[str, Array],
    *,
    norm: str = "none",
    norm_first: bool = False,
    activation: str = "Identity",
    eps: float = 1e-5,
    dropout: float = 0.0,
    seed: int = 0,
) -> dict[str, Array]:
    """``y`` (rows, width)."""
    x = inputs["x"]
    if norm_first:
        v = _linear(inputs, _norm(inputs, x, norm, eps)[0])
    else:
        v = _norm(inputs, _linear(inputs, x), norm, eps)[0]
    y = activations.apply(activation, v)
    return {"y": y * _dropped(y.shape, dropout, seed) + inputs["residual"]}


def backward(
    inputs: dict[str, Array],
    cotangents: dict[str, Array],
    *,
    norm: str = "none",
    norm_first: bool = False,
    activation: str = "Identity",
    eps: float = 1e-5,
    dropout: float = 0.0,
    seed: int = 0,
) -> dict[str, Array]:
    """The gradients of all inputs for the cotangent of ``y``."""
    x, of_y = inputs["x"], np.asarray(cotangents["y"], np.float64)
    dropped = of_y * _dropped(of_y.shape, dropout, seed)
    if norm_first:
        h, z, scale = _norm(inputs, x, norm, eps)
        of_linear = activations.pull_back(activation, _linear(inputs, h), dropped)
        found = _pull_norm(inputs, z, scale, of_linear @ inputs["weight"], norm)
    else:
        h = x
        v, z, scale = _norm(inputs, _linear(inputs, x), norm, eps)
        found = _pull_norm(inputs, z, scale, activations.pull_back(activation, v, dropped), norm)
        of_linear = found["x"]
        found["x"] = of_linear @ inputs["weight"]
    return {**found, "weight": of_linear.T @ h, "bias": of_linear.sum(0), "residual": of_y}
