"""Norm, activation, dropout and residual for JAX: the public function, the plain path, the
derivatives."""

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
from . import pallas_kernel, spec

Seed = tuple[Array, Array] | None


class Options(NamedTuple):
    """What a call fixes beside its arrays: hashable, so it can be static."""

    norm: str
    activation: str
    eps: float
    dropout: float
    implementation: str | None


class Arrays(NamedTuple):
    """The arrays of a call, as rows; ``weight`` and ``bias`` are always there."""

    x: Array
    weight: Array
    bias: Array
    residual: Array | None


def norm_activation(
    x: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    residual: Array | None = None,
    *,
    norm: str = "layer",
    activation: str = "Identity",
    eps: float | None = None,
    dropout: float = 0.0,
    seed: Array | int | None = None,
    implementation: str | None = None,
) -> Array:
    r"""Normalise each row, then apply an activation, dropout and a residual, in one kernel.

    .. math::

        y = m \odot \phi\!\left(\frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} \odot \gamma
            + \beta\right) + r

    over the last axis. :math:`\phi` is any activation of the library without weights of its own;
    ``GLU``, ``SiGLU`` and ``SwiGLU`` halve the axis, :math:`\phi(a, b) = a \, \sigma(b)` and
    :math:`a \operatorname{silu}(b)`. :math:`m` is 0 with probability ``dropout``, otherwise
    1 / (1 - ``dropout``); it is made from a counter, in the backward pass again, and never stored.

    Parameters
    ----------
    x
        Shape (..., C); float32, bfloat16, float16 or float64. Arithmetic is in float32 (float64
        for float64), the result in the dtype of ``x``.
    weight, bias
        :math:`\gamma` and :math:`\beta`, shape (C,). None: ones and zeros.
    residual
        :math:`r`, the shape and dtype of the result.
    norm
        ``"layer"`` (Ba et al., arXiv 1607.06450), ``"rms"`` (Zhang and Sennrich, arXiv
        1910.07467: :math:`\mu = 0`, :math:`\sigma^2` the mean square) or ``"none"`` (the fraction
        is x).
    activation
        A name of `ml_networks.kernels.core.activations.NAMES`. Default ``"Identity"``.
    eps
        Default 1e-5 for ``"layer"`` and, as in torch, the machine epsilon of the arithmetic for
        ``"rms"``.
    dropout
        Probability in [0, 1), a Python number.
    seed
        The dropped elements are a function of ``seed``, row and column alone, the same in every
        implementation and framework (`ml_networks.kernels.core.dropout`). An integer, an array of
        one integer or of two uint32 words, or a key of `jax.random`. Needed where ``dropout`` is
        not 0.
    implementation
        ``"xla"``, ``"pallas"``, or None to let dispatch choose.

    Returns
    -------
    Array
        Shape (..., C), or (..., C / 2) after a gated activation.

    Raises
    ------
    TypeError
        If ``x`` is not a floating-point array or ``residual`` has another dtype.
    ValueError
        If a shape does not fit, ``dropout`` is outside [0, 1) or has no ``seed``, or ``norm`` or
        ``activation`` has no such name.
    UnsupportedImplementationError
        If the implementation asked for cannot run here.

    Notes
    -----
    NaN and infinity in a row make a normalised row NaN. Repeated calls give the same bits,
    gradients included.
    """
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"x must be a floating-point array, got {x.dtype}")
    given = {"weight": weight, "bias": bias, "residual": residual}
    shapes = {k: None if v is None else tuple(jnp.shape(v)) for k, v in given.items()}
    width = spec.check_arguments(x.shape, shapes, norm, activation, dropout)
    if residual is not None and residual.dtype != x.dtype:
        raise TypeError(f"residual is {residual.dtype}; it must be {x.dtype} like x")
    if dropout and seed is None:
        raise ValueError(f"dropout is {dropout} and there is no seed; give seed=")
    if eps is None:
        exact = jnp.float64 if x.dtype == jnp.float64 else jnp.float32
        eps = float(jnp.finfo(exact).eps) if norm == "rms" else 1e-5
    options = Options(norm, activation, float(eps), float(dropout), implementation)
    columns, rows = x.shape[-1], math.prod(x.shape[:-1])
    arrays = Arrays(
        x.reshape(rows, columns),
        jnp.ones(columns, x.dtype) if weight is None else jnp.asarray(weight),
        jnp.zeros(columns, x.dtype) if bias is None else jnp.asarray(bias),
        None if residual is None else residual.reshape(rows, width),
    )
    words = jax_functions.seed_words(seed) if dropout else None
    decision = _decide(arrays, options, "forward")
    with usage.timed(decision):
        if not rows or not _any_fused(decision, arrays, options):
            y = _plain(arrays, words, options)
        else:
            y = _fused(arrays, words, options)
    return y.reshape(*x.shape[:-1], width)


def _decide(arrays: Arrays, options: Options, direction: str) -> dispatch.Decision:
    rows, columns = arrays.x.shape
    flags = {
        "norm": options.norm,
        "activation": options.activation,
        "dropout": options.dropout,
        "residual": arrays.residual is not None and direction == "forward",
    }
    width = columns // spec.parts(options.activation)
    problem = spec.problem_of(rows, width, arrays.x.dtype.name, direction, flags)
    return dispatch.decide(problem, jax_device(), BINDING, options.implementation)


def _any_fused(forward: dispatch.Decision, arrays: Arrays, options: Options) -> bool:
    """A forward pass that XLA fuses as well may still have a backward kernel."""
    if forward.implementation != "xla":
        return True
    if options.implementation == "xla" or forward.source in ("cpu", "float64"):
        return False
    return _decide(arrays, options, "backward").implementation != "xla"


def _normalized(x: Array, norm: str, eps: float) -> Array:
    if norm == "none":
        return x
    if norm == "layer":
        x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + eps)


@partial(jax.jit, static_argnames="options")
def _plain(arrays: Arrays, seed: Seed, options: Options) -> Array:
    """The op in ordinary JAX operations, differentiable any number of times."""
    dtype = jnp.float64 if arrays.x.dtype == jnp.float64 else jnp.float32
    x, weight, bias = (value.astype(dtype) for value in arrays[:3])
    y = _normalized(x, options.norm, options.eps) * weight + bias
    y = jax_functions.apply(options.activation, y)
    if seed is not None:
        y = y * jax_functions.dropout_scale(options.dropout, seed, *y.shape).astype(dtype)
    if arrays.residual is not None:
        y = y + arrays.residual.astype(dtype)
    return y.astype(arrays.x.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _fused(arrays: Arrays, seed: Seed, options: Options) -> Array:
    decision = _decide(arrays, options, "forward")
    if decision.implementation == "xla":
        return _plain(arrays, seed, options)
    return pallas_kernel.forward(
        *arrays, seed, options=options[:4], config=decision.config, device=jax_device()
    )


def _fused_forward(
    arrays: Arrays, seed: Seed, options: Options
) -> tuple[Array, tuple[Arrays, Seed]]:
    return _fused(arrays, seed, options), (arrays, seed)


def _fused_backward(
    options: Options, saved: tuple[Arrays, Seed], of_y: Array
) -> tuple[Arrays, None]:
    arrays, seed = saved
    of_x, of_weight, of_bias = _gradient(arrays[:3], seed, of_y, options)
    of_residual = None if arrays.residual is None else of_y
    return Arrays(of_x, of_weight, of_bias, of_residual), None


_fused.defvjp(_fused_forward, _fused_backward)

Three = tuple[Array, Array, Array]


@partial(jax.jit, static_argnames="options")
def _plain_gradient(arrays: Three, seed: Seed, of_y: Array, options: Options) -> Three:
    def function(x: Array, weight: Array, bias: Array) -> Array:
        return _plain(Arrays(x, weight, bias, None), seed, options)

    return jax.vjp(function, *arrays)[1](of_y)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _gradient(arrays: Three, seed: Seed, of_y: Array, options: Options) -> Three:
    """The gradients of x, weight and bias; their own derivative goes through the plain path."""
    decision = _decide(Arrays(*arrays, None), options, "backward")
    with usage.timed(decision):
        if decision.implementation == "xla":
            return _plain_gradient(arrays, seed, of_y, options)
        of_x, *others = pallas_kernel.backward(
            *arrays, seed, of_y, options=options[:4], config=decision.config, device=jax_device()
        )
        of_weight, of_bias = (
            other.astype(value.dtype) for other, value in zip(others, arrays[1:], strict=True)
        )
        return of_x, of_weight, of_bias


def _gradient_forward(
    arrays: Three, seed: Seed, of_y: Array, options: Options
) -> tuple[Three, tuple[Three, Seed, Array]]:
    return _gradient(arrays, seed, of_y, options), (arrays, seed, of_y)


def _gradient_backward(
    options: Options, saved: tuple[Three, Seed, Array], cotangents: Three
) -> tuple[Three, None, Array]:
    arrays, seed, of_y = saved

    def function(three: Three, cotangent: Array) -> Three:
        return _plain_gradient(three, seed, cotangent, options)

    of_arrays, of_cotangent = jax.vjp(function, arrays, of_y)[1](cotangents)
    return of_arrays, None, of_cotangent


_gradient.defvjp(_gradient_forward, _gradient_backward)


def _call(
    inputs: Mapping[str, Array], flags: Mapping[str, Any], implementation: str | None
) -> dict[str, Any]:
    options: dict[str, Any] = {name: jnp.asarray(value) for name, value in inputs.items()}
    return {"y": norm_activation(**options, **flags, implementation=implementation)}


BINDING = Binding(
    op=spec.NAME,
    framework="jax",
    implementations=("xla", "pallas"),
    call=_call,
    differentiable=("x", "weight", "bias", "residual"),
    kernel_module="pallas_kernel",
)
