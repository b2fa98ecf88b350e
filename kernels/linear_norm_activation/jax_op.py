"""Linear, norm, activation, dropout and residual for JAX: the public function, the plain path, the
derivatives. The plain path is XLA's product and `norm_activation`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from ..core import dispatch, jax_functions, usage
from ..core.device import jax_device
from ..core.registry import Binding
from ..norm_activation.jax_op import norm_activation
from . import pallas_kernel, spec

Seed = tuple[Array, Array] | None


class Options(NamedTuple):
    """What a call fixes beside its arrays: hashable, so it can be static."""

    norm: str
    norm_first: bool
    activation: str
    eps: float
    dropout: float
    implementation: str | None


class Arrays(NamedTuple):
    """The arrays of a call, as rows; biases and the norm's weight are always there."""

    x: Array
    weight: Array
    bias: Array
    norm_weight: Array
    norm_bias: Array
    residual: Array | None


def linear_norm_activation(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    norm_weight: Array | None = None,
    norm_bias: Array | None = None,
    residual: Array | None = None,
    *,
    norm: str = "none",
    norm_first: bool = False,
    activation: str = "Identity",
    eps: float | None = None,
    dropout: float = 0.0,
    seed: Array | int | None = None,
    implementation: str | None = None,
) -> Array:
    r"""A linear layer with norm, activation, dropout and residual, in one kernel if it is narrow.

    .. math::

        y = m \odot \phi(N(x W^\top + b)) + r \qquad\text{or}\qquad
        y = m \odot \phi(N(x) W^\top + b) + r

    with :math:`N` a norm of the last axis with weight and bias, :math:`\phi` an activation and
    :math:`m` the dropout, as in :func:`norm_activation`. Wide layers (more than 256 outputs or
    inputs) and gated activations stay with XLA's product, behind which `norm_activation` runs.

    Parameters
    ----------
    x
        Shape (..., I); float32, bfloat16, float16 or float64. Sums are in float32 (float64 for
        float64), the result in the dtype of ``x``.
    weight, bias
        :math:`W` (O, I) and :math:`b` (O,).
    norm_weight, norm_bias
        Of the norm: shape (O,), or (I,) where ``norm_first``. None: ones and zeros.
    residual
        :math:`r`, the shape and dtype of the result.
    norm
        ``"layer"``, ``"rms"`` or ``"none"``.
    norm_first
        The second formula: the norm precedes the linear layer.
    activation, eps, dropout, seed
        As in :func:`norm_activation`.
    implementation
        ``"xla"``, ``"pallas"``, or None to let dispatch choose.

    Returns
    -------
    Array
        Shape (..., O), or (..., O / 2) after a gated activation.

    Raises
    ------
    TypeError
        If ``x`` is not a floating-point array or ``residual`` has another dtype.
    ValueError
        If a shape does not fit, ``dropout`` is outside [0, 1) or has no ``seed``, or ``norm`` or
        ``activation`` has no such name.
    UnsupportedImplementationError
        If the implementation asked for cannot run here.
    """
    x, weight = jnp.asarray(x), jnp.asarray(weight)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"x must be a floating-point array, got {x.dtype}")
    given = {
        "weight": weight,
        "bias": bias,
        "norm_weight": norm_weight,
        "norm_bias": norm_bias,
        "residual": residual,
    }
    shapes = {k: None if v is None else tuple(jnp.shape(v)) for k, v in given.items()}
    width = spec.check_arguments(x.shape, shapes, norm, norm_first, activation, dropout)
    if residual is not None and residual.dtype != x.dtype:
        raise TypeError(f"residual is {residual.dtype}; it must be {x.dtype} like x")
    if dropout and seed is None:
        raise ValueError(f"dropout is {dropout} and there is no seed; give seed=")
    if eps is None:
        exact = jnp.float64 if x.dtype == jnp.float64 else jnp.float32
        eps = float(jnp.finfo(exact).eps) if norm == "rms" else 1e-5
    options = Options(norm, norm_first, activation, float(eps), float(dropout), implementation)
    outputs, inputs = weight.shape
    rows, normed = math.prod(x.shape[:-1]), inputs if norm_first else outputs
    arrays = Arrays(
        x.reshape(rows, inputs),
        weight.astype(x.dtype),
        jnp.zeros(outputs, x.dtype) if bias is None else jnp.asarray(bias),
        jnp.ones(normed, x.dtype) if norm_weight is None else jnp.asarray(norm_weight),
        jnp.zeros(normed, x.dtype) if norm_bias is None else jnp.asarray(norm_bias),
        None if residual is None else residual.reshape(rows, width),
    )
    words = jax_functions.seed_words(seed) if dropout else None
    decision = _decide(arrays, options)
    with usage.timed(decision):
        if decision.implementation == "xla" or not rows:
            y = _plain(arrays, words, options)
        else:
            y = _fused(arrays, words, options)
    return y.reshape(*x.shape[:-1], width)


def _decide(arrays: Arrays, options: Options) -> dispatch.Decision:
    rows, inputs = arrays.x.shape
    flags = {
        "norm": options.norm,
        "norm_first": options.norm_first,
        "activation": options.activation,
        "dropout": options.dropout,
        "residual": arrays.residual is not None,
    }
    width = arrays.weight.shape[0] // spec.parts(options.activation)
    problem = spec.problem_of(rows, inputs, width, arrays.x.dtype.name, flags)
    return dispatch.decide(problem, jax_device(), BINDING, options.implementation)


def _linear(x: Array, weight: Array, bias: Array) -> Array:
    return x @ weight.T + bias.astype(x.dtype)


def _normed(x: Array, weight: Array, bias: Array, options: Options) -> Array:
    """The norm that precedes the linear layer."""
    implementation = "xla" if options.implementation == "xla" else None
    return norm_activation(
        x, weight, bias, norm=options.norm, eps=options.eps, implementation=implementation
    )


def _tail(
    z: Array, weight: Array, bias: Array, residual: Array | None, seed: Seed, options: Options
) -> Array:
    """What follows the linear layer."""
    rest: dict[str, Any] = {"activation": options.activation, "dropout": options.dropout}
    rest["seed"] = None if seed is None else jnp.stack(seed)
    rest["implementation"] = "xla" if options.implementation == "xla" else None
    if options.norm_first:
        return norm_activation(z, None, None, residual, norm="none", **rest)
    return norm_activation(z, weight, bias, residual, norm=options.norm, eps=options.eps, **rest)


def _plain(arrays: Arrays, seed: Seed, options: Options) -> Array:
    """XLA's product, and `norm_activation`, whose implementation is its own affair unless XLA was
    asked for."""
    x, weight, bias, scale, shift, residual = arrays
    h = _normed(x, scale, shift, options) if options.norm_first else x
    return _tail(_linear(h, weight, bias), scale, shift, residual, seed, options)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _fused(arrays: Arrays, seed: Seed, options: Options) -> Array:
    config = _decide(arrays, options).config
    return pallas_kernel.forward(
        *arrays, seed, options=options[:5], config=config, device=jax_device()
    )


def _fused_forward(
    arrays: Arrays, seed: Seed, options: Options
) -> tuple[Array, tuple[Arrays, Seed]]:
    return _fused(arrays, seed, options), (arrays, seed)


def _fused_backward(
    options: Options, saved: tuple[Arrays, Seed], of_y: Array
) -> tuple[Arrays, None]:
    """The plain path's: XLA's products, one of them the layer's own again, and the backward
    kernel of `norm_activation`."""
    arrays, seed = saved
    return jax.vjp(lambda arrays: _plain(arrays, seed, options), arrays)[1](of_y)[0], None


_fused.defvjp(_fused_forward, _fused_backward)


def _call(
    inputs: Mapping[str, Array], flags: Mapping[str, Any], implementation: str | None
) -> dict[str, Any]:
    options: dict[str, Any] = {name: jnp.asarray(value) for name, value in inputs.items()}
    return {"y": linear_norm_activation(**options, **flags, implementation=implementation)}


BINDING = Binding(
    op=spec.NAME,
    framework="jax",
    implementations=("xla", "pallas"),
    call=_call,
    differentiable=("x", "weight", "bias", "norm_weight", "norm_bias", "residual"),
    kernel_module="pallas_kernel",
)
