"""Low-rank linear for JAX: the public function, the plain path, the derivatives.

Inside, rows are (samples * n, features) and a gate is (samples or 1, rank or 1).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
from jax import Array

from ..core import dispatch, usage
from ..core.arguments import jax_arrays
from ..core.device import jax_device
from ..core.problem import Problem
from ..core.registry import Binding
from . import pallas_kernel, spec


def lora_linear(
    x: Array,
    weight: Array,
    bias: Array | None,
    u: Array,
    v: Array,
    gate: Array | None = None,
    *,
    scale: float = 1.0,
    implementation: str | None = None,
) -> Array:
    r"""Apply a linear map plus a low-rank update: :math:`y = W x + b + s\, U (g \odot V^\top x)`.

    ``samples`` below is the length of the first axis of ``x``: adapters and gates may be shared or
    differ between samples. Gradients flow to every array; under ``jax.jit`` a base weight whose
    gradient nobody asks for costs nothing.

    Parameters
    ----------
    x
        (..., in); float32, bfloat16, float16 or float64.
    weight
        :math:`W`, (out, in).
    bias
        :math:`b`, (out,) or None.
    u
        :math:`U`, (out, rank), or (samples, out, rank).
    v
        :math:`V`, (in, rank), or (samples, in, rank).
    gate
        :math:`g`: a scalar (), one value per rank (rank,) or (1, rank), one per sample (samples,)
        or (samples, 1), or (samples, rank). None is 1.
    scale
        :math:`s`, a Python number.
    implementation
        ``"xla"``, ``"pallas"``, or None to let dispatch choose.

    Returns
    -------
    Array
        (..., out), in the dtype of ``x``.

    Raises
    ------
    TypeError
        If an argument is not a floating-point array, or their dtypes differ.
    ValueError
        If shapes do not fit together, or a gate (n,) could mean ranks as well as samples.
    UnsupportedImplementationError
        If the implementation asked for cannot run here.

    Notes
    -----
    Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685.
    """
    arrays = jax_arrays({"x": x, "weight": weight, "bias": bias, "u": u, "v": v, "gate": gate})
    x, weight, bias, u, v, gate = arrays
    shapes = (None if array is None else array.shape for array in arrays)
    gate_shape = spec.check_shapes(*shapes)  # type: ignore[arg-type]
    if gate is not None and gate_shape is not None:
        gate = gate.reshape(gate_shape)
    samples = x.shape[0] if x.ndim > 1 else 1
    options = Options(samples, float(scale), implementation)
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    inputs = Inputs(rows, weight, bias, u, v, gate)
    decision = _decide(inputs, options, "forward")
    with usage.timed(decision):
        plain = decision.implementation == "xla" or not rows.size
        y = (_plain if plain else _fused)(inputs, options)
    return y.reshape(*x.shape[:-1], weight.shape[0])


class Inputs(NamedTuple):
    """The arrays of a call, or their gradients."""

    rows: Array
    weight: Array
    bias: Array | None
    u: Array
    v: Array
    gate: Array | None


class Options(NamedTuple):
    """What a call fixes beside its arrays: hashable, so it can be static."""

    samples: int
    scale: float
    implementation: str | None


def _decide(inputs: Inputs, options: Options, direction: str) -> dispatch.Decision:
    u, v = inputs.u, inputs.v
    width_out, width_in = inputs.weight.shape
    rows = inputs.rows.shape[0] // max(options.samples, 1)
    sizes = (options.samples, rows, width_in, width_out, u.shape[-1])
    mixed = (("mixed", True),) if u.ndim != v.ndim else ()
    problem = Problem(
        spec.NAME,
        tuple(zip(spec.DIMENSIONS, sizes, strict=True)),
        inputs.rows.dtype.name,
        (("per_sample", u.ndim == 3 or v.ndim == 3), *mixed),
        direction,
    )
    return dispatch.decide(problem, jax_device(), BINDING, options.implementation)


@partial(jax.jit, static_argnames="options")
def _plain(inputs: Inputs, options: Options) -> Array:
    """The op in ordinary JAX operations, differentiable any number of times."""
    rows, weight, bias, u, v, gate = inputs
    y = rows @ weight.T
    if bias is not None:
        y = y + bias
    t = rows.reshape(options.samples, -1 if rows.size else 0, rows.shape[1]) @ v
    if gate is not None:
        t = t * gate[:, None]
    return y + (options.scale * (t @ u.mT)).reshape(y.shape)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _fused(inputs: Inputs, options: Options) -> Array:
    return _fused_forward(inputs, options)[0]


def _fused_forward(inputs: Inputs, options: Options) -> tuple[Array, tuple[Inputs, Array]]:
    y, t = _kernel(inputs, options)
    return y, (inputs, t)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _kernel(inputs: Inputs, options: Options) -> tuple[Array, Array]:
    """y, and t for the backward pass; only a second derivative comes through here, and takes the
    plain path."""
    decision = _decide(inputs, options, "forward")
    return pallas_kernel.forward(
        *inputs,
        samples=options.samples,
        scale=options.scale,
        config=decision.config,
        device=jax_device(),
    )


def _kernel_forward(inputs: Inputs, options: Options) -> tuple[tuple[Array, Array], Inputs]:
    return _kernel(inputs, options), inputs


def _kernel_backward(
    options: Options, inputs: Inputs, cotangents: tuple[Array, Array]
) -> tuple[Inputs]:
    # No cotangent of t arrives: the gradient's own derivative takes t again from the rows.
    (found,) = jax.vjp(partial(_plain, options=options), inputs)[1](cotangents[0])
    return (found,)


_kernel.defvjp(_kernel_forward, _kernel_backward)


def _fused_backward(options: Options, residuals: Any, dy: Array) -> tuple[Inputs]:
    inputs, t = residuals
    # Under jit XLA drops what nobody asks for: a frozen weight's gradient costs nothing.
    of_weight = dy.T @ inputs.rows
    of_bias = None if inputs.bias is None else dy.sum(0)
    of_rows, of_u, of_v, of_gate = _gradient(dy, inputs, t, options)
    return (Inputs(of_rows, of_weight, of_bias, of_u, of_v, of_gate),)


_fused.defvjp(_fused_forward, _fused_backward)

Gradients = tuple[Array, Array, Array, Array | None]
"""Of the rows, u, v and the gate."""


@partial(jax.jit, static_argnames="options")
def _plain_gradient(dy: Array, inputs: Inputs, options: Options) -> Gradients:
    (found,) = jax.vjp(partial(_plain, options=options), inputs)[1](dy)
    return found.rows, found.u, found.v, found.gate


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _gradient(dy: Array, inputs: Inputs, t: Array, options: Options) -> Gradients:
    """The gradients; their own derivative goes through the plain path."""
    decision = _decide(inputs, options, "backward")
    with usage.timed(decision):
        if decision.implementation == "xla":
            return _plain_gradient(dy, inputs, options)
        rows, weight, _, u, v, gate = inputs
        return pallas_kernel.backward(
            *(dy, rows, weight, u, v, gate, t),
            samples=options.samples,
            scale=options.scale,
            config=decision.config,
            device=jax_device(),
        )


def _gradient_forward(
    dy: Array, inputs: Inputs, t: Array, options: Options
) -> tuple[Gradients, tuple[Array, Inputs, Array]]:
    return _gradient(dy, inputs, t, options), (dy, inputs, t)


def _gradient_backward(
    options: Options, residuals: tuple[Array, Inputs, Array], cotangents: Gradients
) -> tuple[Array, Inputs, Array]:
    dy, inputs, t = residuals
    pull = jax.vjp(partial(_plain_gradient, options=options), dy, inputs)[1]
    # The plain gradient takes t again from the rows.
    return *pull(cotangents), jax.numpy.zeros_like(t)


_gradient.defvjp(_gradient_forward, _gradient_backward)


def _call(
    inputs: Mapping[str, Array], flags: Mapping[str, Any], implementation: str | None
) -> dict[str, Array]:
    scale = flags.get("scale", 1.0)
    return {"y": lora_linear(**inputs, scale=scale, implementation=implementation)}


BINDING = Binding(
    op=spec.NAME,
    framework="jax",
    implementations=("xla", "pallas"),
    call=_call,
    differentiable=("x", "u", "v", "gate"),
    kernel_module="pallas_kernel",
)
