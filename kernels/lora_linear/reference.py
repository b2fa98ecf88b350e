"""Low-rank linear in NumPy float64: the meaning of the op.

For every row x of sample b (the index of the first axis):

    t = V_b^T x                        (rank)
    y = W x + bias + scale * U_b (gate_b * t)

u and v are (features, rank), shared by all samples, or (samples, features, rank).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..core.problem import Case

Array = NDArray[Any]


def make_inputs(case: Case, seed: int = 0) -> dict[str, Array]:
    """Inputs: x (samples, rows, in), or (samples, in) where a sample is one row."""
    generator = np.random.default_rng(seed)
    samples, rows, width_in, width_out, rank = case.dims.values()
    own = (samples,) if case.flags.get("per_sample") else ()
    gates = {"rank": (rank,), "sample": (samples,), "sample_rank": (samples, rank)}
    shapes: dict[str, tuple[int, ...]] = {
        "x": (samples, width_in) if rows == 1 else (samples, rows, width_in),
        "weight": (width_out, width_in),
        "u": (*own, width_out, rank),
        "v": (*own, width_in, rank),
        "bias": (width_out,),
        "gate": gates[str(case.flags["gate"])],
    }
    inputs = {name: generator.standard_normal(shape) for name, shape in shapes.items()}
    for name, fan_in in (("weight", width_in), ("u", rank), ("v", width_in)):
        inputs[name] /= np.sqrt(fan_in)
    return inputs


def _parts(inputs: dict[str, Array]) -> tuple[Array, Array, Array, Array]:
    """Rows x (samples, rows, in), u and v with a sample axis of 1 or samples, and the gate, (1 or
    samples, 1 or rank)."""
    x, u, v = inputs["x"], inputs["u"], inputs["v"]
    x = x.reshape(x.shape[0], -1, x.shape[-1])
    u, v = (a if a.ndim == 3 else a[None] for a in (u, v))
    gate = inputs["gate"]
    if gate.ndim == 1:
        gate = gate[None] if gate.shape[0] == u.shape[-1] else gate[:, None]
    return x, u, v, gate.reshape(gate.shape if gate.ndim == 2 else (1, 1))


def forward(inputs: dict[str, Array], *, scale: float = 1.0, **_: Any) -> dict[str, Array]:
    """``y`` in the leading shape of ``x``."""
    x, u, v, gate = _parts(inputs)
    t = np.einsum("bnk,bkr->bnr", x, np.broadcast_to(v, (len(x), *v.shape[1:])))
    gated = scale * gate[:, None] * t
    y = x @ inputs["weight"].T
    y = y + np.einsum("bnr,bor->bno", gated, np.broadcast_to(u, (len(x), *u.shape[1:])))
    return {"y": (y + inputs["bias"]).reshape(*inputs["x"].shape[:-1], -1)}


def backward(
    inputs: dict[str, Array], cotangents: dict[str, Array], *, scale: float = 1.0, **_: Any
) -> dict[str, Array]:
    """The gradient of every input for the cotangent of ``y``."""
    x, u, v, gate = _parts(inputs)
    dy = cotangents["y"].reshape(*x.shape[:2], -1)
    every_u, every_v = (np.broadcast_to(a, (len(x), *a.shape[1:])) for a in (u, v))
    t = np.einsum("bnk,bkr->bnr", x, every_v)
    h = scale * np.einsum("bno,bor->bnr", dy, every_u)
    du = scale * np.einsum("bno,bnr->bor", dy, gate[:, None] * t)
    dv = np.einsum("bnk,bnr->bkr", x, gate[:, None] * h)
    dx = dy @ inputs["weight"] + np.einsum("bnr,bkr->bnk", gate[:, None] * h, every_v)
    dgate = np.einsum("bnr,bnr->br", t, h)
    for axis, size in enumerate(gate.shape):
        dgate = dgate.sum(axis, keepdims=True) if size == 1 else dgate
    return {
        "x": dx.reshape(inputs["x"].shape),
        "weight": np.einsum("bno,bnk->ok", dy, x),
        "u": du if inputs["u"].ndim == 3 else du.sum(0),
        "v": dv if inputs["v"].ndim == 3 else dv.sum(0),
        "bias": dy.sum((0, 1)),
        "gate": dgate.reshape(inputs["gate"].shape),
    }
