"""Hypernetwork low-rank linear for JAX: the public function, the plain path, the derivatives.

Inside, rows are (n, features) and contexts (n, context).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
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


def hyper_lora_linear(
    x: Array,
    weight: Array,
    bias: Array | None,
    context: Array,
    gate_weight: Array,
    gate_bias: Array,
    u_weight: Array,
    u_bias: Array,
    v_weight: Array,
    v_bias: Array,
    *,
    scale: float = 1.0,
    implementation: str | None = None,
) -> Array:
    r"""Apply a linear map plus a low-rank update that each row generates from its own context.

    With :math:`c` the context of a row and :math:`U, V` the generated vectors as matrices
    (out, rank) and (in, rank):

    .. math::

        U = W_u c + b_u,\quad V = W_v c + b_v,\quad g = \sigma(w_g c + b_g),\qquad
        y = W x + b + s\, g\, U V^\top x

    U and V are never made: with :math:`\tilde c = [c; 1]`, both products go through the generators
    themselves, as shared adapters of rank ``rank * (context + 1)``.

    Parameters
    ----------
    x
        (..., in); float32, bfloat16, float16 or float64.
    weight
        :math:`W`, (out, in).
    bias
        :math:`b`, (out,) or None.
    context
        :math:`c`, (..., context), with the leading axes of ``x``.
    gate_weight, gate_bias
        :math:`w_g`, (1, context), and :math:`b_g`, (1,).
    u_weight, u_bias
        :math:`W_u`, (out * rank, context), and :math:`b_u`, (out * rank,): a linear layer whose
        output is U, rank fastest.
    v_weight, v_bias
        :math:`W_v`, (in * rank, context), and :math:`b_v`, (in * rank,).
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
        If shapes do not fit together.
    UnsupportedImplementationError
        If the implementation asked for cannot run here.

    Notes
    -----
    Ha, Dai, Le, "HyperNetworks", arXiv 1609.09106, for weights made by a network; Hu et al.,
    "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685, for the update's form.
    """
    named = {
        "x": x,
        "weight": weight,
        "bias": bias,
        "context": context,
        "gate_weight": gate_weight,
        "gate_bias": gate_bias,
        "u_weight": u_weight,
        "u_bias": u_bias,
        "v_weight": v_weight,
        "v_bias": v_bias,
    }
    arrays = dict(zip(named, jax_arrays(named), strict=True))
    spec.check_shapes({name: a if a is None else a.shape for name, a in arrays.items()})
    leading = arrays["x"].shape[:-1]
    for name in ("x", "context"):
        arrays[name] = arrays[name].reshape(math.prod(leading), arrays[name].shape[-1])
    inputs = Inputs(*arrays.values())
    options = Options(float(scale), implementation)
    decision = _decide(inputs, options, "forward")
    with usage.timed(decision):
        plain = decision.implementation == "xla" or not inputs.rows.size
        y = (_plain if plain else _fused)(inputs, options)
    return y.reshape(*leading, weight.shape[0])


class Inputs(NamedTuple):
    """The arrays of a call, or their gradients."""

    rows: Array
    weight: Array
    bias: Array | None
    context: Array
    gate_weight: Array
    gate_bias: Array
    u_weight: Array
    u_bias: Array
    v_weight: Array
    v_bias: Array


class Options(NamedTuple):
    """What a call fixes beside its arrays: hashable, so it can be static."""

    scale: float
    implementation: str | None


def _decide(inputs: Inputs, options: Options, direction: str) -> dispatch.Decision:
    width_out, width_in = inputs.weight.shape
    rank = inputs.v_bias.shape[0] // width_in
    sizes = (inputs.rows.shape[0], width_in, width_out, rank, inputs.context.shape[1])
    problem = Problem(
        spec.NAME,
        tuple(zip(spec.DIMENSIONS, sizes, strict=True)),
        inputs.rows.dtype.name,
        (),
        direction,
    )
    return dispatch.decide(problem, jax_device(), BINDING, options.implementation)


@partial(jax.jit, static_argnames="options")
def _plain(inputs: Inputs, options: Options) -> Array:
    """The op in ordinary JAX operations, differentiable any number of times."""
    rows, weight, bias, context, gate_weight, gate_bias, *generators = inputs
    width_out, width_in = weight.shape
    u = pallas_kernel.generator(generators[0], generators[1], width_out)
    v = pallas_kernel.generator(generators[2], generators[3], width_in)
    c = pallas_kernel.with_one(context)[:, None]
    gate = jax.nn.sigmoid(context @ gate_weight.T + gate_bias)
    p = (rows @ v).reshape(rows.shape[0], v.shape[1] // c.shape[2], c.shape[2])
    t = gate * (p * c).sum(2)
    q = (t[:, :, None] * c).reshape(rows.shape[0], v.shape[1])
    y = rows @ weight.T + options.scale * (q @ u.T)
    return y if bias is None else y + bias


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _fused(inputs: Inputs, options: Options) -> Array:
    return _fused_forward(inputs, options)[0]


def _fused_forward(inputs: Inputs, options: Options) -> tuple[Array, tuple[Inputs, Array]]:
    y, p = _kernel(inputs, options)
    return y, (inputs, p)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _kernel(inputs: Inputs, options: Options) -> tuple[Array, Array]:
    """y, and p for the backward pass; only a second derivative comes through here, and takes the
    plain path."""
    decision = _decide(inputs, options, "forward")
    return pallas_kernel.forward(
        *inputs, scale=options.scale, config=decision.config, device=jax_device()
    )


def _kernel_forward(inputs: Inputs, options: Options) -> tuple[tuple[Array, Array], Inputs]:
    return _kernel(inputs, options), inputs


def _kernel_backward(
    options: Options, inputs: Inputs, cotangents: tuple[Array, Array]
) -> tuple[Inputs]:
    # No cotangent of p arrives: the gradient's own derivative takes p again from the rows.
    (found,) = jax.vjp(partial(_plain, options=options), inputs)[1](cotangents[0])
    return (found,)


_kernel.defvjp(_kernel_forward, _kernel_backward)


def _fused_backward(options: Options, residuals: Any, dy: Array) -> tuple[Inputs]:
    inputs, p = residuals
    # Under jit XLA drops what nobody asks for: a frozen weight's gradient costs nothing.
    of_weight = dy.T @ inputs.rows
    of_bias = None if inputs.bias is None else dy.sum(0)
    of_rows, *rest = _gradient(dy, inputs, p, options)
    return (Inputs(of_rows, of_weight, of_bias, *rest),)


_fused.defvjp(_fused_forward, _fused_backward)

Gradients = tuple[Array, ...]
"""Of the rows, context and the six generator arrays."""


@partial(jax.jit, static_argnames="options")
def _plain_gradient(dy: Array, inputs: Inputs, options: Options) -> Gradients:
    (found,) = jax.vjp(partial(_plain, options=options), inputs)[1](dy)
    return found.rows, *found[3:]


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _gradient(dy: Array, inputs: Inputs, p: Array, options: Options) -> Gradients:
    """The gradients; their own derivative goes through the plain path."""
    decision = _decide(inputs, options, "backward")
    with usage.timed(decision):
        if decision.implementation == "xla":
            return _plain_gradient(dy, inputs, options)
        rows, weight, _, *rest = inputs
        return pallas_kernel.backward(
            *(dy, rows, weight, *rest, p),
            scale=options.scale,
            config=decision.config,
            device=jax_device(),
        )


def _gradient_forward(
    dy: Array, inputs: Inputs, p: Array, options: Options
) -> tuple[Gradients, tuple[Array, Inputs, Array]]:
    return _gradient(dy, inputs, p, options), (dy, inputs, p)


def _gradient_backward(
    options: Options, residuals: tuple[Array, Inputs, Array], cotangents: Gradients
) -> tuple[Array, Inputs, Array]:
    dy, inputs, p = residuals
    pull = jax.vjp(partial(_plain_gradient, options=options), dy, inputs)[1]
    # The plain gradient takes p again from the rows.
    return *pull(cotangents), jnp.zeros_like(p)


_gradient.defvjp(_gradient_forward, _gradient_backward)


def _call(
    inputs: Mapping[str, Array], flags: Mapping[str, Any], implementation: str | None
) -> dict[str, Array]:
    scale = float(flags.get("scale", 1.0))
    return {"y": hyper_lora_linear(**inputs, scale=scale, implementation=implementation)}


BINDING = Binding(
    op=spec.NAME,
    framework="jax",
    implementations=("xla", "pallas"),
    call=_call,
    differentiable=("x", "context", "gate_weight", "u_weight", "u_bias", "v_weight", "v_bias"),
    kernel_module="pallas_kernel",
)
