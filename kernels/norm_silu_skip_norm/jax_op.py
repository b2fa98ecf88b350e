"""Layer norm, SiLU, skip and layer norm for JAX: the public function, the plain path, the
derivatives."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from ..core import dispatch, usage
from ..core.device import jax_device
from ..core.registry import Binding
from . import pallas_kernel, spec


class _Options(NamedTuple):
    """What a call fixes beside its arrays: hashable, so it can be static."""

    eps: float
    implementation: str | None


class _Arrays(NamedTuple):
    """The arrays of a call, ``x`` and ``skip`` as rows."""

    x: Array
    weight: Array
    bias: Array
    skip: Array
    skip_weight: Array
    skip_bias: Array


def norm_silu_skip_norm(
    x: Array,
    weight: Array,
    bias: Array,
    skip: Array,
    skip_weight: Array,
    skip_bias: Array,
    *,
    eps: float = 1e-5,
    implementation: str | None = None,
) -> Array:
    r"""Layer norm, SiLU, a skip connection and its layer norm, in one kernel.

    .. math::

        y = \operatorname{norm}\bigl(\operatorname{silu}(\operatorname{norm}(x) \odot \gamma
            + \beta) + s\bigr) \odot \gamma_s + \beta_s, \qquad
        \operatorname{norm}(a) = \frac{a - \mu_a}{\sqrt{\sigma_a^2 + \epsilon}}

    over the last axis (Ba et al., arXiv 1607.06450): a level of the synapses of the Continuous
    Thought Machine (Darlow et al., 2025, arXiv 2505.05522).

    Parameters
    ----------
    x
        Shape (..., C); float32, bfloat16, float16 or float64. Arithmetic is in float32 (float64
        for float64), the result in the dtype of ``x``.
    weight, bias
        :math:`\gamma` and :math:`\beta`, shape (C,).
    skip
        :math:`s`, the shape and dtype of ``x``.
    skip_weight, skip_bias
        :math:`\gamma_s` and :math:`\beta_s`, shape (C,).
    eps
        :math:`\epsilon` of both norms. Default 1e-5.
    implementation
        ``"xla"``, ``"pallas"``, or None to let dispatch choose.

    Returns
    -------
    Array
        Shape (..., C).

    Raises
    ------
    TypeError
        If an argument is not a floating-point array, or ``skip`` has another dtype than ``x``.
    ValueError
        If a shape does not fit.
    UnsupportedImplementationError
        If the implementation asked for cannot run here.

    Notes
    -----
    NaN and infinity in a row make it NaN. Repeated calls give the same bits, gradients included.
    """
    given = {
        "x": x,
        "weight": weight,
        "bias": bias,
        "skip": skip,
        "skip_weight": skip_weight,
        "skip_bias": skip_bias,
    }
    given = {name: jnp.asarray(value) for name, value in given.items()}
    for name, value in given.items():
        if not jnp.issubdtype(value.dtype, jnp.floating):
            raise TypeError(f"{name} must be a floating-point array, got {value.dtype}")
    arrays = _Arrays(**given)
    if arrays.skip.dtype != arrays.x.dtype:
        raise TypeError(f"skip is {arrays.skip.dtype}; it must be {arrays.x.dtype} like x")
    shape = arrays.x.shape
    spec.check_arguments(shape, {k: v.shape for k, v in given.items() if k != "x"})
    options = _Options(float(eps), implementation)
    rows = math.prod(shape[:-1]), shape[-1]
    arrays = arrays._replace(x=arrays.x.reshape(rows), skip=arrays.skip.reshape(rows))
    decision = _decide(arrays.x, "forward", options)
    with usage.timed(decision):
        function = _plain if decision.implementation == "xla" or not rows[0] else _fused
        return function(arrays, options).reshape(shape)


def _decide(x: Array, direction: str, options: _Options) -> dispatch.Decision:
    rows, width = x.shape
    problem = spec.problem_of(rows, width, x.dtype.name, direction, {"affine": True})
    return dispatch.decide(problem, jax_device(), BINDING, options.implementation)


@partial(jax.jit, static_argnames="options")
def _plain(arrays: _Arrays, options: _Options) -> Array:
    """The op in ordinary JAX operations, differentiable any number of times."""
    dtype = jnp.promote_types(arrays.x.dtype, jnp.float32)
    x, weight, bias, skip, skip_weight, skip_bias = (value.astype(dtype) for value in arrays)

    def norm(value: Array) -> Array:
        value = value - value.mean(-1, keepdims=True)
        return value * jax.lax.rsqrt((value * value).mean(-1, keepdims=True) + options.eps)

    y = norm(jax.nn.silu(norm(x) * weight + bias) + skip) * skip_weight + skip_bias
    return y.astype(arrays.x.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _fused(arrays: _Arrays, options: _Options) -> Array:
    config = _decide(arrays.x, "forward", options).config
    return pallas_kernel.forward(*arrays, eps=options.eps, config=config, device=jax_device())


def _fused_forward(arrays: _Arrays, options: _Options) -> tuple[Array, _Arrays]:
    return _fused(arrays, options), arrays


def _fused_backward(options: _Options, arrays: _Arrays, of_y: Array) -> tuple[_Arrays]:
    return (_gradient(arrays, of_y, options),)


_fused.defvjp(_fused_forward, _fused_backward)


@partial(jax.jit, static_argnames="options")
def _plain_gradient(arrays: _Arrays, of_y: Array, options: _Options) -> _Arrays:
    return jax.vjp(lambda given: _plain(given, options), arrays)[1](of_y)[0]


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _gradient(arrays: _Arrays, of_y: Array, options: _Options) -> _Arrays:
    """The gradients of all inputs; their own derivative goes through the plain path."""
    decision = _decide(arrays.x, "backward", options)
    with usage.timed(decision):
        if decision.implementation == "xla":
            return _plain_gradient(arrays, of_y, options)
        of_x, of_skip, *sums = pallas_kernel.backward(
            *arrays[:5], of_y, eps=options.eps, config=decision.config, device=jax_device()
        )
        weights = arrays.weight, arrays.bias, arrays.skip_weight, arrays.skip_bias
        of_weight, of_bias, of_skip_weight, of_skip_bias = (
            total.astype(value.dtype) for total, value in zip(sums, weights, strict=True)
        )
        return _Arrays(of_x, of_weight, of_bias, of_skip, of_skip_weight, of_skip_bias)


def _gradient_forward(
    arrays: _Arrays, of_y: Array, options: _Options
) -> tuple[_Arrays, tuple[_Arrays, Array]]:
    return _gradient(arrays, of_y, options), (arrays, of_y)


def _gradient_backward(
    options: _Options, saved: tuple[_Arrays, Array], cotangents: _Arrays
) -> tuple[_Arrays, Array]:
    return jax.vjp(partial(_plain_gradient, options=options), *saved)[1](cotangents)


_gradient.defvjp(_gradient_forward, _gradient_backward)


def _call(
    inputs: Mapping[str, Array], flags: Mapping[str, Any], implementation: str | None
) -> dict[str, Any]:
    options: dict[str, Any] = {**inputs, **flags}
    return {"y": norm_silu_skip_norm(**options, implementation=implementation)}


BINDING = Binding(
    op=spec.NAME,
    framework="jax",
    implementations=("xla", "pallas"),
    call=_call,
    differentiable=("x", "weight", "bias", "skip", "skip_weight", "skip_bias"),
    kernel_module="pallas_kernel",
)
