"""Layer norm, SiLU, skip and layer norm in NumPy float64: the meaning of the op.

With norm(a) = (a - mean a) / sqrt(mean (a - mean a)^2 + eps) of each row:

    v = norm(x) * weight + bias
    u = v sigmoid(v) + skip
    y = norm(u) * skip_weight + skip_bias
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..core.problem import Case

Array = NDArray[Any]


def make_inputs(case: Case, seed: int = 0) -> dict[str, Array]:
    """Rows with means of their own."""
    generator = np.random.default_rng(seed)
    rows, width = case.dims["rows"], case.dims["width"]

    def draw(*shape: int) -> Array:
        return generator.standard_normal(shape)

    return {
        "x": 2.0 * draw(rows, width) + draw(rows, 1),
        "weight": 1.0 + 0.3 * draw(width),
        "bias": 0.3 * draw(width),
        "skip": draw(rows, width) - draw(rows, 1),
        "skip_weight": 1.0 + 0.3 * draw(width),
        "skip_bias": 0.3 * draw(width),
    }


def _norm(x: Array, eps: float) -> tuple[Array, Array]:
    """The normalised rows, and the factor that made them."""
    centred = x - x.mean(-1, keepdims=True)
    factor = 1.0 / np.sqrt((centred * centred).mean(-1, keepdims=True) + eps)
    return centred * factor, factor


def _of_norm(z: Array, factor: Array, of_z: Array) -> Array:
    along = z * (of_z * z).mean(-1, keepdims=True)
    return (of_z - of_z.mean(-1, keepdims=True) - along) * factor


def forward(inputs: dict[str, Array], *, eps: float = 1e-5) -> dict[str, Array]:
    """``y``, in the shape of ``x``."""
    v = _norm(inputs["x"], eps)[0] * inputs["weight"] + inputs["bias"]
    z = _norm(v / (1.0 + np.exp(-v)) + inputs["skip"], eps)[0]
    return {"y": z * inputs["skip_weight"] + inputs["skip_bias"]}


def backward(
    inputs: dict[str, Array], cotangents: dict[str, Array], *, eps: float = 1e-5
) -> dict[str, Array]:
    """The gradients of all inputs for the cotangent of ``y``."""
    inner, factor = _norm(inputs["x"], eps)
    v = inner * inputs["weight"] + inputs["bias"]
    gate = 1.0 / (1.0 + np.exp(-v))
    outer, outer_factor = _norm(v * gate + inputs["skip"], eps)
    of_y = np.asarray(cotangents["y"], np.float64)
    of_u = _of_norm(outer, outer_factor, of_y * inputs["skip_weight"])
    of_v = of_u * gate * (1.0 + v * (1.0 - gate))
    return {
        "x": _of_norm(inner, factor, of_v * inputs["weight"]),
        "weight": (of_v * inner).sum(0),
        "bias": of_v.sum(0),
        "skip": of_u,
        "skip_weight": (of_y * outer).sum(0),
        "skip_bias": of_y.sum(0),
    }
