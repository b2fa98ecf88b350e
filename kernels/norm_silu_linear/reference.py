"""Layer norm, SiLU, skip, layer norm and a linear layer in NumPy float64: the meaning of the op.

With norm(a) = (a - mean a) / sqrt(mean (a - mean a)^2 + eps) of each row:

    v = norm(x) * norm_weight + norm_bias
    h = v sigmoid(v), or with a skip connection norm(v sigmoid(v) + skip) * skip_weight + skip_bias
    y = h weight^T + bias
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..core.problem import Case

Array = NDArray[Any]


def make_inputs(case: Case, seed: int = 0) -> dict[str, Array]:
    """Rows with means of their own; a linear layer as torch starts it."""
    generator = np.random.default_rng(seed)
    rows, width, features = (case.dims[name] for name in ("rows", "width", "features"))

    def draw(*shape: int) -> Array:
        return generator.standard_normal(shape)

    inputs = {
        "x": 2.0 * draw(rows, width) + draw(rows, 1),
        "norm_weight": 1.0 + 0.3 * draw(width),
        "norm_bias": 0.3 * draw(width),
        "weight": draw(features, width) / np.sqrt(width),
        "bias": 0.3 * draw(features),
    }
    if case.flags.get("skip", False):
        inputs |= {
            "skip": draw(rows, width) - draw(rows, 1),
            "skip_weight": 1.0 + 0.3 * draw(width),
            "skip_bias": 0.3 * draw(width),
        }
    return inputs


def _norm(x: Array, eps: float) -> tuple[Array, Array]:
    """The normalised rows, and the factor that made them."""
    centred = x - x.mean(-1, keepdims=True)
    factor = 1.0 / np.sqrt((centred * centred).mean(-1, keepdims=True) + eps)
    return centred * factor, factor


def _of_norm(z: Array, factor: Array, of_z: Array) -> Array:
    along = z * (of_z * z).mean(-1, keepdims=True)
    return (of_z - of_z.mean(-1, keepdims=True) - along) * factor


def forward(
    inputs: dict[str, Array], *, skip: bool = False, eps: float = 1e-5
) -> dict[str, Array]:
    """``y`` and ``h``."""
    v = _norm(inputs["x"], eps)[0] * inputs["norm_weight"] + inputs["norm_bias"]
    h = v / (1.0 + np.exp(-v))
    if skip:
        h = _norm(h + inputs["skip"], eps)[0] * inputs["skip_weight"] + inputs["skip_bias"]
    return {"y": h @ inputs["weight"].T + inputs["bias"], "h": h}


def of_rows(inputs: dict[str, Array], of_h: Array, *, skip: bool, eps: float) -> dict[str, Array]:
    """The gradients of all but the linear layer for that of ``h``."""
    inner, factor = _norm(inputs["x"], eps)
    v = inner * inputs["norm_weight"] + inputs["norm_bias"]
    gate = 1.0 / (1.0 + np.exp(-v))
    found = {}
    of_u = of_h
    if skip:
        outer, outer_factor = _norm(v * gate + inputs["skip"], eps)
        of_u = _of_norm(outer, outer_factor, of_h * inputs["skip_weight"])
        found = {
            "skip": of_u,
            "skip_weight": (of_h * outer).sum(0),
            "skip_bias": of_h.sum(0),
        }
    of_v = of_u * gate * (1.0 + v * (1.0 - gate))
    return {
        "x": _of_norm(inner, factor, of_v * inputs["norm_weight"]),
        "norm_weight": (of_v * inner).sum(0),
        "norm_bias": of_v.sum(0),
        **found,
    }


def backward(
    inputs: dict[str, Array],
    cotangents: dict[str, Array],
    *,
    skip: bool = False,
    eps: float = 1e-5,
) -> dict[str, Array]:
    """The gradients of all inputs for the cotangents of ``y`` and ``h``."""
    of_y = np.asarray(cotangents["y"], np.float64)
    h = forward(inputs, skip=skip, eps=eps)["h"]
    of_h = of_y @ inputs["weight"] + cotangents["h"]
    return {
        **of_rows(inputs, of_h, skip=skip, eps=eps),
        "weight": of_y.T @ h,
        "bias": of_y.sum(0),
    }


def linear_norm_silu_gradient(
    inputs: dict[str, Array], of_h: Array, *, skip: bool = False, eps: float = 1e-5
) -> dict[str, Array]:
    """Where ``x`` came from a linear layer whose weight is the transpose of ``weight``: the
    gradient of that layer's input for that of ``h``, and the gradient of ``skip``."""
    found = of_rows(inputs, of_h, skip=skip, eps=eps)
    of_input = {"input": found["x"] @ inputs["weight"].T}
    return of_input | ({"skip": found["skip"]} if skip else {})
