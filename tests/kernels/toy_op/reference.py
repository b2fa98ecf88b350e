"""The toy op in NumPy float64."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ml_networks.kernels.core.problem import Case


def make_inputs(case: Case, seed: int) -> dict[str, np.ndarray]:
    """A random ``x``."""
    generator = np.random.default_rng(seed)
    return {"x": generator.standard_normal(case.dims["elements"])}


def forward(inputs: Mapping[str, np.ndarray], *, scale: float) -> dict[str, np.ndarray]:
    """``scale * x^2``."""
    return {"y": scale * inputs["x"] ** 2}


def backward(
    inputs: Mapping[str, np.ndarray], cotangents: Mapping[str, np.ndarray], *, scale: float
) -> dict[str, np.ndarray]:
    """``2 * scale * x * dy``."""
    return {"x": 2 * scale * inputs["x"] * cotangents["y"]}
