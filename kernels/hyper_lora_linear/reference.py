"""Hypernetwork low-rank linear in NumPy float64: the meaning of the op.

Every row x, with its context c, has adapters and a gate of its own, spelled out here:

    U = (u_weight c + u_bias) as (out, rank),  V = (v_weight c + v_bias) as (in, rank)
    gate = sigmoid(gate_weight c + gate_bias)
    y = W x + bias + scale * gate * U V^T x
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..core.problem import Case

Array = NDArray[Any]


def make_inputs(case: Case, seed: int = 0) -> dict[str, Array]:
    """Inputs: x (rows, in), context (rows, context) and generators like fresh linear layers."""
    generator = np.random.default_rng(seed)
    rows, width_in, width_out, rank, context = case.dims.values()
    scaled = {
        "x": ((rows, width_in), 1.0),
        "weight": ((width_out, width_in), width_in**-0.5),
        "bias": ((width_out,), 1.0),
        "context": ((rows, context), 1.0),
        "gate_weight": ((1, context), context**-0.5),
        "gate_bias": ((1,), 1.0),
        "u_weight": ((width_out * rank, context), (context * rank) ** -0.5),
        "u_bias": ((width_out * rank,), rank**-0.5),
        "v_weight": ((width_in * rank, context), (context * width_in) ** -0.5),
        "v_bias": ((width_in * rank,), width_in**-0.5),
    }
    return {
        name: size * generator.standard_normal(shape) for name, (shape, size) in scaled.items()
    }


def _parts(inputs: dict[str, Array]) -> tuple[Array, ...]:
    """Rows x, c, U (rows, out, rank), V (rows, in, rank), gate (rows,)."""
    width_out, width_in = inputs["weight"].shape
    x = inputs["x"].reshape(-1, width_in)
    c = inputs["context"].reshape(-1, inputs["context"].shape[-1])
    u = (c @ inputs["u_weight"].T + inputs["u_bias"]).reshape(len(c), width_out, -1)
    v = (c @ inputs["v_weight"].T + inputs["v_bias"]).reshape(len(c), width_in, -1)
    gate = 1.0 / (1.0 + np.exp(-(c @ inputs["gate_weight"][0] + inputs["gate_bias"])))
    return x, c, u, v, gate


def forward(inputs: dict[str, Array], *, scale: float = 1.0) -> dict[str, Array]:
    """``y`` in the leading shape of ``x``."""
    x, _, u, v, gate = _parts(inputs)
    t = np.einsum("nk,nkr->nr", x, v)
    y = x @ inputs["weight"].T + inputs["bias"]
    y = y + scale * gate[:, None] * np.einsum("nor,nr->no", u, t)
    return {"y": y.reshape(*inputs["x"].shape[:-1], -1)}


def backward(
    inputs: dict[str, Array], cotangents: dict[str, Array], *, scale: float = 1.0
) -> dict[str, Array]:
    """The gradient of every input for the cotangent of ``y``."""
    x, c, u, v, gate = _parts(inputs)
    dy = cotangents["y"].reshape(len(x), -1)
    t = np.einsum("nk,nkr->nr", x, v)
    h = scale * np.einsum("no,nor->nr", dy, u)
    dgate = np.einsum("nr,nr->n", t, h) * gate * (1.0 - gate)
    du = (scale * gate[:, None, None] * dy[:, :, None] * t[:, None]).reshape(len(x), -1)
    dv = (gate[:, None, None] * x[:, :, None] * h[:, None]).reshape(len(x), -1)
    dx = dy @ inputs["weight"] + np.einsum("nr,nkr->nk", gate[:, None] * h, v)
    dc = du @ inputs["u_weight"] + dv @ inputs["v_weight"]
    dc = dc + dgate[:, None] * inputs["gate_weight"]
    return {
        "x": dx.reshape(inputs["x"].shape),
        "weight": dy.T @ x,
        "bias": dy.sum(0),
        "context": dc.reshape(inputs["context"].shape),
        "gate_weight": (dgate @ c)[None],
        "gate_bias": dgate.sum()[None],
        "u_weight": du.T @ c,
        "u_bias": du.sum(0),
        "v_weight": dv.T @ c,
        "v_bias": dv.sum(0),
    }
