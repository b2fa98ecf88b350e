"""The toy op in JAX."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax

from ml_networks.kernels.core import device, dispatch, usage
from ml_networks.kernels.core.problem import Problem
from ml_networks.kernels.core.registry import Binding

from .spec import NAME


def _decide(
    x: jax.Array, scale: float, direction: str, implementation: str | None
) -> dispatch.Decision:
    flags = (("scale", scale),)
    problem = Problem(NAME, (("elements", x.size),), str(x.dtype), flags, direction)
    return dispatch.decide(problem, device.jax_device(), BINDING, implementation)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _kernel(x: jax.Array, scale: float, config: Any) -> jax.Array:
    from . import pallas_kernel

    return pallas_kernel.forward(x, scale, config)


def _kernel_forward(x: jax.Array, scale: float, config: Any) -> tuple[jax.Array, jax.Array]:
    return _kernel(x, scale, config), x


def _kernel_backward(scale: float, config: Any, x: jax.Array, dy: jax.Array) -> tuple[jax.Array]:
    from . import pallas_kernel

    return (pallas_kernel.backward(x, dy, scale, config),)


_kernel.defvjp(_kernel_forward, _kernel_backward)


def toy_square(
    x: jax.Array, *, scale: float = 1.0, implementation: str | None = None
) -> jax.Array:
    """``scale * x^2`` of a vector."""
    decision = _decide(x, scale, "forward", implementation)
    with usage.timed(decision):
        if decision.implementation == "pallas":
            return _kernel(x, scale, decision.config)
        return scale * x * x


def _call(
    inputs: Mapping[str, Any], flags: Mapping[str, Any], implementation: str | None
) -> dict[str, jax.Array]:
    return {"y": toy_square(inputs["x"], **flags, implementation=implementation)}


BINDING = Binding(NAME, "jax", ("xla", "pallas"), _call, ("x",), "pallas_kernel")
