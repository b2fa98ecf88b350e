"""Norm, SiLU, skip, norm and a linear layer for JAX: the public functions, the plain path, the
derivatives. Inside, arrays are rows (rows, width).

The plain path is XLA's product behind `norm_activation` or `norm_silu_skip_norm`, whose
implementation is their own affair unless XLA was asked for.
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
from ..core.device import jax_device
from ..core.registry import Binding
from ..norm_activation.jax_op import norm_activation
from ..norm_silu_skip_norm.jax_op import norm_silu_skip_norm
from . import pallas_kernel, spec
from .pallas_kernel import Norms


class _Options(NamedTuple):
    """What a call fixes beside its arrays: hashable, so it can be static."""

    eps: float
    implementation: str | None


class _Arrays(NamedTuple):
    """The arrays of a call; the linear layer's bias is None where there is none."""

    norms: Norms
    weight: Array
    bias: Array | None = None


_Pair = tuple[Array, Array]


def norm_silu_linear(
    x: Array,
    norm_weight: Array,
    norm_bias: Array,
    weight: Array,
    bias: Array | None = None,
    skip: Array | None = None,
    skip_weight: Array | None = None,
    skip_bias: Array | None = None,
    *,
    eps: float = 1e-5,
    implementation: str | None = None,
) -> tuple[Array, Array]:
    r"""Layer norm and SiLU, if given a skip connection and its layer norm, and a linear layer.

    .. math::

        h = \operatorname{silu}(\operatorname{norm}(x) \odot \gamma + \beta)
        \quad\text{or}\quad
        h = \operatorname{norm}\bigl(\operatorname{silu}(\operatorname{norm}(x) \odot \gamma
            + \beta) + s\bigr) \odot \gamma_s + \beta_s,
        \qquad y = h W^\top + b

    with :math:`\operatorname{norm}(a) = (a - \mu_a) / \sqrt{\sigma_a^2 + \epsilon}` over the last
    axis (Ba et al., arXiv 1607.06450): from one linear layer of the synapses of the Continuous
    Thought Machine to the next (Darlow et al., 2025, arXiv 2505.05522). One kernel where rows are
    few; above 64 the norms and the product run apart.

    Parameters
    ----------
    x
        Shape (..., C); float32, bfloat16, float16 or float64. Arithmetic of the kernels is in
        float32.
    norm_weight, norm_bias
        :math:`\gamma` and :math:`\beta`, (C,), any floating-point dtype.
    weight, bias
        :math:`W` (F, C) and :math:`b` (F,), in the dtype of ``x``.
    skip
        :math:`s`, the shape of ``x``, any floating-point dtype. None: the first form.
    skip_weight, skip_bias
        :math:`\gamma_s` and :math:`\beta_s`, (C,), together with ``skip``.
    eps
        :math:`\epsilon` of both norms. Default 1e-5.
    implementation
        ``"xla"``, ``"pallas"``, or None to let dispatch choose.

    Returns
    -------
    y
        Shape (..., F), in the dtype of ``weight``.
    h
        Shape (..., C), in the dtype of ``norm_weight``.

    Raises
    ------
    TypeError
        If an argument is not a floating-point array, or those of x, weight and bias differ.
    ValueError
        If a shape does not fit, or only some of the skip connection's arrays are given.
    UnsupportedImplementationError
        If the implementation asked for cannot run here.

    Notes
    -----
    NaN and infinity in a row make it NaN. Repeated calls give the same bits, gradients included.
    Gradients are those of the norms and of the linear layer apart, and
    :func:`linear_norm_silu_gradient` has a kernel of its own.
    """
    given = _checked(
        x=x,
        norm_weight=norm_weight,
        norm_bias=norm_bias,
        weight=weight,
        bias=bias,
        skip=skip,
        skip_weight=skip_weight,
        skip_bias=skip_bias,
    )
    arrays, leading = _rows_of(given), given["x"].shape[:-1]
    options = _Options(float(eps), implementation)
    decision = _decide(arrays, len(arrays.weight), "forward", options)
    with usage.timed(decision):
        plain = decision.implementation == "xla" or not len(arrays.norms.x)
        y, h = (_plain if plain else _fused)(arrays, options)
    return y.reshape(*leading, y.shape[1]), h.reshape(given["x"].shape)


def linear_norm_silu_gradient(
    of_h: Array,
    x: Array,
    norm_weight: Array,
    norm_bias: Array,
    weight: Array,
    skip: Array | None = None,
    skip_weight: Array | None = None,
    skip_bias: Array | None = None,
    *,
    eps: float = 1e-5,
    implementation: str | None = None,
) -> tuple[Array, Array | None]:
    r"""Pull a gradient back through skip, norms and SiLU, and the linear layer before them.

    With :math:`h(x, s)` as in :func:`norm_silu_linear` and :math:`x = u W^\top + b`: the gradients
    of :math:`u` and :math:`s` for that of h. For loops that are differentiated by hand, whose
    weights' gradients are taken once for all rounds.

    Parameters
    ----------
    of_h
        Gradient of h, (..., C), any floating-point dtype.
    x, norm_weight, norm_bias, skip, skip_weight, skip_bias, eps, implementation
        As in :func:`norm_silu_linear`; ``x`` is the linear layer's result.
    weight
        :math:`W` of the linear layer, (C, F), in the dtype of ``x``.

    Returns
    -------
    of_u
        (..., F), in the dtype of ``of_h``.
    of_skip
        (..., C), in the dtype of ``of_h``; None without a skip connection.

    Raises
    ------
    TypeError, ValueError, UnsupportedImplementationError
        As in :func:`norm_silu_linear`.

    Notes
    -----
    Its own derivative goes through the plain path. Repeated calls give the same bits.
    """
    given = _checked(
        x=x,
        norm_weight=norm_weight,
        norm_bias=norm_bias,
        weight=weight,
        skip=skip,
        skip_weight=skip_weight,
        skip_bias=skip_bias,
        of_h=of_h,
    )
    arrays, shape = _rows_of(given), given["x"].shape
    options = _Options(float(eps), implementation)
    of_rows = given["of_h"].reshape(arrays.norms.x.shape)
    of_u, of_skip = _gradient(of_rows, arrays, options)
    of_u = of_u.reshape(*shape[:-1], arrays.weight.shape[1])
    return of_u, None if of_skip is None else of_skip.reshape(shape)


_OPTIONAL = ("bias", "skip", "skip_weight", "skip_bias")


def _checked(**given: Any) -> dict[str, Any]:
    """The arguments as arrays, None where there is none; those of a gradient have ``of_h``."""
    arrays: dict[str, Any] = {}
    for name, value in given.items():
        absent = value is None
        arrays[name] = None if absent else jnp.asarray(value)
        if absent and name in _OPTIONAL:
            continue
        if absent or not jnp.issubdtype(arrays[name].dtype, jnp.floating):
            got = None if absent else arrays[name].dtype
            raise TypeError(f"{name} must be a floating-point array, got {got}")
    dtype = arrays["x"].dtype
    for name in ("weight", "bias"):
        value = arrays.get(name)
        if value is not None and value.dtype != dtype:
            raise TypeError(f"{name} is {value.dtype}; it must be {dtype} like x")
    others = {name: value for name, value in arrays.items() if name not in ("x", "weight")}
    shapes = {name: None if value is None else value.shape for name, value in others.items()}
    spec.check_arguments(
        arrays["x"].shape, shapes, arrays["weight"].shape, transposed="of_h" in arrays
    )
    return arrays


def _rows_of(given: Mapping[str, Any]) -> _Arrays:
    shape = given["x"].shape
    rows = math.prod(shape[:-1]), shape[-1]
    norms = Norms(
        given["x"].reshape(rows),
        given["norm_weight"],
        given["norm_bias"],
        None if given["skip"] is None else given["skip"].reshape(rows),
        given["skip_weight"],
        given["skip_bias"],
    )
    return _Arrays(norms, given["weight"], given.get("bias"))


def _decide(
    arrays: _Arrays, features: int, direction: str, options: _Options
) -> dispatch.Decision:
    (rows, width), dtype = arrays.norms.x.shape, arrays.norms.x.dtype.name
    skip = arrays.norms.skip is not None
    problem = spec.problem_of(rows, width, features, dtype, direction, skip)
    return dispatch.decide(problem, jax_device(), BINDING, options.implementation)


def _finish(norms: Norms, options: _Options) -> Array:
    """``h``, in the dtype of the norm's weight."""
    x = norms.x.astype(norms.weight.dtype)
    own: dict[str, Any] = {"eps": options.eps}
    own["implementation"] = "xla" if options.implementation == "xla" else None
    if norms.skip is None:
        return norm_activation(x, norms.weight, norms.bias, norm="layer", activation="SiLU", **own)
    skip = norms.skip.astype(x.dtype)
    after = norms.skip_weight, norms.skip_bias
    return norm_silu_skip_norm(x, norms.weight, norms.bias, skip, *after, **own)


def _plain(arrays: _Arrays, options: _Options) -> _Pair:
    """The op by other ops, differentiable any number of times."""
    h = _finish(arrays.norms, options)
    y = h.astype(arrays.weight.dtype) @ arrays.weight.T
    return y if arrays.bias is None else y + arrays.bias, h


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _fused(arrays: _Arrays, options: _Options) -> _Pair:
    config = _decide(arrays, len(arrays.weight), "forward", options).config
    return pallas_kernel.forward(*arrays, eps=options.eps, config=config, device=jax_device())


def _fused_forward(arrays: _Arrays, options: _Options) -> tuple[_Pair, _Arrays]:
    return _fused(arrays, options), arrays


def _fused_backward(options: _Options, arrays: _Arrays, cotangents: _Pair) -> tuple[_Arrays]:
    """Through the norms' ops and the linear layer, whose own derivatives exist."""
    return jax.vjp(lambda arrays: _plain(arrays, options), arrays)[1](cotangents)


_fused.defvjp(_fused_forward, _fused_backward)


def _plain_gradient(of_h: Array, arrays: _Arrays, options: _Options) -> tuple[Array, Array | None]:
    norms, weight = arrays.norms, arrays.weight
    dtype = norms.weight.dtype
    x, skip = norms.x.astype(dtype), None if norms.skip is None else norms.skip.astype(dtype)

    def function(x: Array, skip: Array | None) -> Array:
        return _finish(norms._replace(x=x, skip=skip), options)

    of_x, of_skip = jax.vjp(function, x, skip)[1](of_h.astype(dtype))
    of_input = of_x.astype(weight.dtype) @ weight
    given = of_h.dtype
    return of_input.astype(given), None if of_skip is None else of_skip.astype(given)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _gradient(of_h: Array, arrays: _Arrays, options: _Options) -> tuple[Array, Array | None]:
    """The gradients of the linear layer's input and of the skip, None without one; their own
    derivative goes through the plain path."""
    decision = _decide(arrays, arrays.weight.shape[1], "backward", options)
    with usage.timed(decision):
        if decision.implementation == "xla" or not len(of_h):
            return _plain_gradient(of_h, arrays, options)
        norms, weight, _ = arrays
        return pallas_kernel.gradient(
            of_h, norms, weight, eps=options.eps, config=decision.config, device=jax_device()
        )


def _gradient_forward(
    of_h: Array, arrays: _Arrays, options: _Options
) -> tuple[tuple[Array, Array | None], tuple[Array, _Arrays]]:
    return _gradient(of_h, arrays, options), (of_h, arrays)


def _gradient_backward(
    options: _Options, saved: tuple[Array, _Arrays], cotangents: tuple[Array, Array | None]
) -> tuple[Array, _Arrays]:
    return jax.vjp(partial(_plain_gradient, options=options), *saved)[1](cotangents)


_gradient.defvjp(_gradient_forward, _gradient_backward)


def _call(
    inputs: Mapping[str, Array], flags: Mapping[str, Any], implementation: str | None
) -> dict[str, Any]:
    options: dict[str, Any] = {"eps": flags.get("eps", 1e-5), **inputs}
    y, h = norm_silu_linear(**options, implementation=implementation)
    return {"y": y, "h": h}


BINDING = Binding(
    op=spec.NAME,
    framework="jax",
    implementations=("xla", "pallas"),
    call=_call,
    differentiable=(
        "x",
        "norm_weight",
        "norm_bias",
        "weight",
        "bias",
        "skip",
        "skip_weight",
        "skip_bias",
    ),
    kernel_module="pallas_kernel",
)
