"""Synchronisation in NumPy float64: the meaning of the op.

For the pair (i, j) with r = exp(-decay), over the ticks t = 0, 1, ...:

    alpha_t = r alpha_{t-1} + z_t^i z_t^j
    beta_t = r beta_{t-1} + 1
    s_t = alpha_t / sqrt(beta_t)

from alpha = beta = 0, or after ``elapsed`` earlier ticks from their beta and
alpha = previous sqrt(beta).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..core.problem import Case

Array = NDArray[Any]


def make_inputs(case: Case, seed: int = 0) -> dict[str, Array]:
    """Activations, pairs of which some share a neuron and one is a neuron with itself, decays
    from none to almost at once."""
    generator = np.random.default_rng(seed)
    ticks, batch, neurons, pairs = (case.dims[n] for n in ("ticks", "batch", "neurons", "pairs"))
    left, right = generator.integers(0, neurons, (2, pairs))
    right[0] = left[0]
    decay = np.abs(generator.standard_normal(pairs))
    decay[:3] = [0.0, 15.0, 1e-4][:pairs]
    return {
        "activations": generator.standard_normal((ticks, batch, neurons)),
        "left": left,
        "right": right,
        "decay": decay,
        "previous": generator.standard_normal((batch, pairs)),
    }


def _before(r: Array, elapsed: int) -> tuple[Array, Array]:
    """Beta after ``elapsed`` ticks, and its derivative by r."""
    beta = slope = np.zeros_like(r)
    for _ in range(elapsed):
        beta, slope = r * beta + 1.0, beta + r * slope
    return beta, slope


def forward(inputs: dict[str, Array], *, elapsed: int = 0) -> dict[str, Array]:
    """``s``, (ticks, batch, pairs)."""
    z, left, right = inputs["activations"], inputs["left"], inputs["right"]
    r = np.exp(-inputs["decay"])
    beta, _ = _before(r, elapsed)
    alpha = inputs["previous"] * np.sqrt(beta) if elapsed else np.zeros(1)
    found = []
    for tick in z:
        alpha = r * alpha + tick[:, left] * tick[:, right]
        beta = r * beta + 1.0
        found.append(alpha / np.sqrt(beta))
    return {"s": np.stack(found)}


def backward(
    inputs: dict[str, Array], cotangents: dict[str, Array], *, elapsed: int = 0
) -> dict[str, Array]:
    """The gradients of activations, decay and previous for the cotangent of ``s``.

    That of r is collected forwards in time, beside the derivatives of alpha and beta by r.
    """
    z, left, right = inputs["activations"], inputs["left"], inputs["right"]
    of_s = np.asarray(cotangents["s"], np.float64)
    r = np.exp(-inputs["decay"])
    first, slope = _before(r, elapsed)
    root = np.sqrt(first)
    previous = inputs["previous"] if elapsed else np.zeros(of_s.shape[1:])
    alpha, beta = previous * root, first
    alpha_slope = 0.5 * previous * slope / root if elapsed else np.zeros_like(alpha)
    of_r, betas = np.zeros_like(r), []
    for tick, cotangent in zip(z, of_s, strict=True):
        alpha_slope, slope = alpha + r * alpha_slope, beta + r * slope
        alpha, beta = r * alpha + tick[:, left] * tick[:, right], r * beta + 1.0
        by_r = alpha_slope / np.sqrt(beta) - 0.5 * alpha * slope / beta**1.5
        of_r += (cotangent * by_r).sum(0)
        betas.append(beta)
    of_alpha = np.zeros(of_s.shape[1:])
    of_z = np.zeros(z.shape)
    for t in reversed(range(len(z))):
        of_alpha = of_s[t] / np.sqrt(betas[t]) + r * of_alpha
        for pair, (i, j) in enumerate(zip(left, right, strict=True)):
            of_z[t, :, i] += of_alpha[:, pair] * z[t, :, j]
            of_z[t, :, j] += of_alpha[:, pair] * z[t, :, i]
    return {"activations": of_z, "decay": -r * of_r, "previous": r * of_alpha * root}
