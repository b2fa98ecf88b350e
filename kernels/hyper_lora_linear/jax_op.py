"""Hypernetwork low-rank linear for JAX: the public function and the plain path."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from ..core import dispatch, usage
from ..core.arguments import jax_arrays
from ..core.device import jax_device
from ..core.problem import Problem
from ..core.registry import Binding
from . import spec


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
    decision = _decide(arrays, "forward", implementation)
    with usage.timed(decision):
        return _plain(*arrays.values(), scale=float(scale))


def _decide(
    arrays: Mapping[str, Any], direction: str, implementation: str | None
) -> dispatch.Decision:
    x, (width_out, width_in) = arrays["x"], arrays["weight"].shape
    rank = arrays["u_bias"].shape[0] // width_out
    sizes = (math.prod(x.shape[:-1]), width_in, width_out, rank, arrays["context"].shape[-1])
    problem = Problem(
        spec.NAME,
        tuple(zip(spec.DIMENSIONS, sizes, strict=True)),
        x.dtype.name,
        (),
        direction,
    )
    return dispatch.decide(problem, jax_device(), BINDING, implementation)


def _generator(weight: Array, bias: Array, features: int) -> Array:
    """A generator as a shared adapter (features, rank * context + rank): all pairs of rank and
    context, then the biases."""
    shapes = (features, weight.size // features), (features, bias.size // features)
    return jnp.concatenate((weight.reshape(shapes[0]), bias.reshape(shapes[1])), 1)


def _middle(p: Array, context: Array, gate: Array) -> Array:
    """From the rows through the generator of V to those that meet the generator of U, both
    (rows, rank * context + rank)."""
    rows, features = context.shape
    rank = p.shape[1] // (features + 1)
    pairs = p[:, :-rank].reshape(rows, rank, features)
    t = gate * ((pairs * context[:, None]).sum(-1) + p[:, -rank:])
    wide = (t[:, :, None] * context[:, None]).reshape(rows, rank * features)
    return jnp.concatenate((wide, t), 1)


@partial(jax.jit, static_argnames="scale")
def _plain(
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
    scale: float,
) -> Array:
    """The op in ordinary JAX operations, differentiable any number of times."""
    width_out, width_in = weight.shape
    count = math.prod(x.shape[:-1])
    rows, c = x.reshape(count, width_in), context.reshape(count, context.shape[-1])
    gate = jax.nn.sigmoid(c @ gate_weight.T + gate_bias)
    q = _middle(rows @ _generator(v_weight, v_bias, width_in), c, gate)
    y = rows @ weight.T + scale * (q @ _generator(u_weight, u_bias, width_out).T)
    if bias is not None:
        y = y + bias
    return y.reshape(*x.shape[:-1], width_out)


def _call(
    inputs: Mapping[str, Array], flags: Mapping[str, Any], implementation: str | None
) -> dict[str, Array]:
    scale = float(flags.get("scale", 1.0))
    return {"y": hyper_lora_linear(**inputs, scale=scale, implementation=implementation)}


BINDING = Binding(
    op=spec.NAME,
    framework="jax",
    implementations=("xla",),
    call=_call,
    differentiable=("x", "context", "gate_weight", "u_weight", "u_bias", "v_weight", "v_bias"),
    kernel_module="pallas_kernel",
)
