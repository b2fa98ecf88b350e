"""The neuron-level model in NumPy float64: the meaning of the op.

For every row and neuron, with x its values along the history and the neuron's own weights:

    (a, g) = x W1 + b1        h = a sigmoid(g)
    (v, u) = h W2 + b2        z = v sigmoid(u)

Without a second layer z is the only unit of h.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..core.problem import Case

Array = NDArray[Any]


def make_inputs(case: Case, seed: int = 0) -> dict[str, Array]:
    """A history as a loop keeps it, time first, and weights; all layers of order 1."""
    generator = np.random.default_rng(seed)
    rows, neurons, memory, hidden = case.dims.values()
    width = hidden or 1
    inputs = {
        "history": generator.standard_normal((memory, rows, neurons)),
        "weight1": generator.standard_normal((neurons, memory, 2 * width)) / np.sqrt(memory),
        "bias1": 0.5 * generator.standard_normal((neurons, 2 * width)),
    }
    if hidden:
        inputs["weight2"] = generator.standard_normal((neurons, hidden, 2)) / np.sqrt(hidden)
        inputs["bias2"] = 0.5 * generator.standard_normal((neurons, 2))
    return inputs


def _sigmoid(x: Array) -> Array:
    e = np.exp(-np.abs(x))
    return np.where(x >= 0, 1.0, e) / (1.0 + e)


def _layer(x: Array, weight: Array, bias: Array) -> tuple[Array, Array, Array]:
    """Value, opened gate and their product, (rows, neurons, units) each."""
    y = np.einsum("bni,nio->bno", x, weight) + bias
    units = weight.shape[-1] // 2
    value, opened = y[..., :units], _sigmoid(y[..., units:])
    return value, opened, value * opened


def _layer_gradient(
    of_h: Array, x: Array, weight: Array, value: Array, opened: Array
) -> tuple[Array, Array, Array]:
    """The gradients of x, weight and bias for that of the layer's product."""
    of_y = np.concatenate((of_h * opened, of_h * value * opened * (1.0 - opened)), -1)
    of_x = np.einsum("bno,nio->bni", of_y, weight)
    return of_x, np.einsum("bni,bno->nio", x, of_y), of_y.sum(0)


def forward(inputs: dict[str, Array]) -> dict[str, Array]:
    """``z``, (rows, neurons)."""
    h = _layer(inputs["history"].transpose(1, 2, 0), inputs["weight1"], inputs["bias1"])[2]
    if "weight2" in inputs:
        h = _layer(h, inputs["weight2"], inputs["bias2"])[2]
    return {"z": h[..., 0]}


def backward(inputs: dict[str, Array], cotangents: dict[str, Array]) -> dict[str, Array]:
    """The gradients of all inputs for the cotangent of ``z``."""
    gradients = {}
    x, of_h = (
        inputs["history"].transpose(1, 2, 0),
        np.asarray(cotangents["z"], np.float64)[..., None],
    )
    value, opened, h = _layer(x, inputs["weight1"], inputs["bias1"])
    if "weight2" in inputs:
        weight2 = inputs["weight2"]
        outer = _layer(h, weight2, inputs["bias2"])
        of_h, gradients["weight2"], gradients["bias2"] = _layer_gradient(
            of_h, h, weight2, *outer[:2]
        )
    of_x, gradients["weight1"], gradients["bias1"] = _layer_gradient(
        of_h, x, inputs["weight1"], value, opened
    )
    return {**gradients, "history": of_x.transpose(2, 0, 1)}
