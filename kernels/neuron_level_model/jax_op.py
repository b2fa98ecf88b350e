"""The neuron-level model for JAX: the public function, the plain path, the derivatives.

Inside, traces are (rows, neurons, memory).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from ..core import dispatch, usage
from ..core.arguments import jax_arrays
from ..core.device import jax_device
from ..core.problem import Problem
from ..core.registry import Binding
from . import pallas_kernel, spec


def neuron_level_model(
    trace: Array,
    weight1: Array,
    bias1: Array,
    weight2: Array | None = None,
    bias2: Array | None = None,
    *,
    implementation: str | None = None,
) -> Array:
    r"""Map the recent past of every neuron to its activation, by the neuron's own small network.

    For each row and each of the D neurons, with M past values :math:`x`:

    .. math::

        (a, g) = x W_1 + b_1,\quad h = a \odot \sigma(g),\qquad
        (v, u) = h W_2 + b_2,\quad z = v \, \sigma(u)

    Without a second layer :math:`z` is the only unit of :math:`h`. The weights are laid out neuron
    by neuron, in advance of all ticks.

    Parameters
    ----------
    trace
        :math:`x`, (..., D, M), oldest first; float32, bfloat16, float16 or float64.
    weight1, bias1
        :math:`W_1`, (D, M, 2 H), the values' columns before the gates', and :math:`b_1`, (D, 2 H).
    weight2, bias2
        :math:`W_2`, (D, H, 2), and :math:`b_2`, (D, 2); None: no second layer, and H = 1.
    implementation
        ``"xla"``, ``"pallas"``, or None to let dispatch choose.

    Returns
    -------
    Array
        :math:`z`, (..., D), in the dtype of ``trace``.

    Raises
    ------
    TypeError
        If an argument is not a floating-point array, or their dtypes differ.
    ValueError
        If shapes do not fit together.
    UnsupportedImplementationError
        If the implementation asked for cannot run here.

    Notes
    -----
    The kernels keep nothing but the arguments for the backward pass. Repeated calls give the same
    bits, gradients included.

    Darlow et al., "Continuous Thought Machines", arXiv 2505.05522.
    """
    named = {
        "trace": trace,
        "weight1": weight1,
        "bias1": bias1,
        "weight2": weight2,
        "bias2": bias2,
    }
    arrays = dict(zip(named, jax_arrays(named), strict=True))
    spec.check_shapes({name: a if a is None else a.shape for name, a in arrays.items()})
    leading, kept = arrays["trace"].shape[:-2], arrays["trace"].shape[-2:]
    arrays["trace"] = arrays["trace"].reshape(math.prod(leading), *kept)
    inputs = Inputs(**arrays)
    decision = _decide(inputs, implementation, "forward")
    with usage.timed(decision):
        plain = decision.implementation == "xla" or not inputs.trace.size
        z = _plain(inputs) if plain else _fused(inputs, implementation)
    return z.reshape(*leading, kept[0])


class Inputs(NamedTuple):
    """The arrays of a call, or their gradients."""

    trace: Array
    weight1: Array
    bias1: Array
    weight2: Array | None
    bias2: Array | None


def _decide(inputs: Inputs, implementation: str | None, direction: str) -> dispatch.Decision:
    hidden = 0 if inputs.weight2 is None else inputs.weight2.shape[1]
    problem = Problem(
        spec.NAME,
        tuple(zip(spec.DIMENSIONS, (*inputs.trace.shape, hidden), strict=True)),
        inputs.trace.dtype.name,
        (),
        direction,
    )
    return dispatch.decide(problem, jax_device(), BINDING, implementation)


@jax.jit
def _plain(inputs: Inputs) -> Array:
    """The op in ordinary JAX operations, differentiable any number of times."""
    layers = [(inputs.weight1, inputs.bias1)]
    if inputs.weight2 is not None and inputs.bias2 is not None:
        layers.append((inputs.weight2, inputs.bias2))
    x = inputs.trace
    for weight, bias in layers:
        x = jax.nn.glu(jnp.einsum("bni,nio->bno", x, weight) + bias)
    return x[..., 0]


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _fused(inputs: Inputs, implementation: str | None) -> Array:
    decision = _decide(inputs, implementation, "forward")
    return pallas_kernel.forward(*inputs, config=decision.config, device=jax_device())


def _fused_forward(inputs: Inputs, implementation: str | None) -> tuple[Array, Inputs]:
    return _fused(inputs, implementation), inputs


def _fused_backward(implementation: str | None, inputs: Inputs, of_z: Array) -> tuple[Inputs]:
    of_trace = _trace_gradient(of_z, inputs, implementation)
    of_weights = _weight_gradient(of_z, inputs, implementation)
    # Under jit XLA drops the kernel whose gradients nobody asks for.
    return (inputs._replace(trace=of_trace, **dict(zip(_WEIGHTS, of_weights, strict=False))),)


_WEIGHTS = "weight1", "bias1", "weight2", "bias2"


_fused.defvjp(_fused_forward, _fused_backward)


@jax.jit
def _plain_gradient(of_z: Array, inputs: Inputs) -> Inputs:
    (found,) = jax.vjp(_plain, inputs)[1](of_z)
    return found


def _plain_trace_gradient(of_z: Array, inputs: Inputs) -> Array:
    return _plain_gradient(of_z, inputs).trace


def _plain_weight_gradient(of_z: Array, inputs: Inputs) -> tuple[Array, ...]:
    return tuple(a for a in _plain_gradient(of_z, inputs)[1:] if a is not None)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _trace_gradient(of_z: Array, inputs: Inputs, implementation: str | None) -> Array:
    """The gradient of the traces; its own derivative goes through the plain path."""
    decision = _decide(inputs, implementation, "backward")
    with usage.timed(decision):
        if decision.implementation == "xla":
            return _plain_trace_gradient(of_z, inputs)
        return pallas_kernel.trace_gradient(
            of_z, *inputs, config=decision.config, device=jax_device()
        )


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _weight_gradient(of_z: Array, inputs: Inputs, implementation: str | None) -> tuple[Array, ...]:
    """The gradients of the weights; their own derivative goes through the plain path."""
    decision = _decide(inputs, implementation, "weight_gradient")
    with usage.timed(decision):
        if decision.implementation == "xla":
            return _plain_weight_gradient(of_z, inputs)
        return pallas_kernel.weight_gradient(
            of_z, *inputs, config=decision.config, device=jax_device()
        )


def _with_plain_derivative(gradient: Any, plain: Callable[[Array, Inputs], Any]) -> None:
    def forward(of_z: Array, inputs: Inputs, implementation: str | None) -> Any:
        return gradient(of_z, inputs, implementation), (of_z, inputs)

    def backward(_: str | None, saved: tuple[Array, Inputs], cotangents: Any) -> Any:
        return jax.vjp(plain, *saved)[1](cotangents)

    gradient.defvjp(forward, backward)


_with_plain_derivative(_trace_gradient, _plain_trace_gradient)
_with_plain_derivative(_weight_gradient, _plain_weight_gradient)


def _call(
    inputs: Mapping[str, Array], flags: Mapping[str, Any], implementation: str | None
) -> dict[str, Any]:
    weights: dict[str, Any] = dict(inputs)
    history = weights.pop("history")
    trace = jnp.moveaxis(history, 0, -1)
    return {"z": neuron_level_model(trace, **weights, implementation=implementation)}


BINDING = Binding(
    op=spec.NAME,
    framework="jax",
    implementations=("xla", "pallas"),
    call=_call,
    differentiable=("history", "weight1", "bias1", "weight2", "bias2"),
    kernel_module="pallas_kernel",
)
