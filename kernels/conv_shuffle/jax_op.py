"""Convolution, pixel (un)shuffle and activation for JAX: the public function, the plain path, the
derivatives. All of it computes channels-last; a sequence is an image of one row."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from ..core import dispatch, jax_functions, usage
from ..core.arguments import jax_arrays
from ..core.device import jax_device
from ..core.registry import Binding
from . import pallas_kernel, spec
from .spec import Geometry, Options


class Arrays(NamedTuple):
    """The arrays of a call: (batch, height, width, channels), ([batch,] *window, in, out) and
    ([batch,] out)."""

    x: Array
    weight: Array
    bias: Array


class Call(NamedTuple):
    """What a call fixes beside its arrays: hashable, so it can be static."""

    sizes: Geometry
    options: Options
    sides: int
    implementation: str | None


def conv_shuffle(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    *,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
    shuffle: int = 0,
    activation: str = "Identity",
    implementation: str | None = None,
) -> Array:
    r"""A convolution, a pixel shuffle or unshuffle and an activation, in one kernel if narrow.

    .. math::

        y = \phi(s(z)), \qquad
        z_{b,o,p} = \beta_o + \sum_{c,k} W_{o,c,k}\, \bar x_{b,\,c,\,p\,t + k\,d}

    with :math:`\bar x` the input continued beyond its edges, t the stride, d the dilation,
    :math:`s` the (un)shuffle and :math:`\phi` an activation. Weights with a batch axis
    (:math:`W_{b,o,c,k}`, :math:`\beta_{b,o}`) give each sample its own convolution, as
    hypernetworks do. Shared weights of more than 64 input channels a group, and gated activations,
    stay with XLA.

    Parameters
    ----------
    x
        Shape (B, C, H, W) or (B, C, L); float32, bfloat16, float16 or float64. The kernel's sums
        are in float32.
    weight
        :math:`W`: (O, C / groups, k, k) or (O, C / groups, k); with a batch axis (B, O, ...).
    bias
        :math:`\beta`: (O,), or (B, O) with per-sample weights. None: 0.
    stride, padding, dilation, groups
        As in a convolution, the same along both sides.
    padding_mode
        ``"zeros"``, ``"reflect"``, ``"replicate"`` or ``"circular"``.
    shuffle
        f > 0 makes of f^2 channels an image f times as large along each side (of f channels a
        sequence f times as long), in the order of torch's ``PixelShuffle``; f < 0 is the inverse;
        0: neither.
    activation
        A name of `core.activations.NAMES`; gated ones ("GLU", "SiGLU", "SwiGLU") halve the
        channels.
    implementation
        ``"xla"``, ``"pallas"``, or None to let dispatch choose.

    Returns
    -------
    Array
        Shape (B, O', H', W') or (B, O', L').

    Raises
    ------
    TypeError
        If an argument is not a floating-point array, or dtypes differ.
    ValueError
        If a shape does not fit, a number is out of range, or a name is unknown.
    UnsupportedImplementationError
        If the implementation asked for cannot run here.
    """
    options = Options(stride, padding, dilation, groups, padding_mode, shuffle, activation)
    x, weight, bias = jax_arrays({"x": x, "weight": weight, "bias": bias})
    spec.check_arguments(x.shape, weight.shape, None if bias is None else bias.shape, options)
    sides, own = x.ndim - 2, weight.ndim > x.ndim
    call = Call(spec.geometry(x.shape, weight.shape, options), options, sides, implementation)
    if sides == 1:
        x, weight = x[:, :, None], weight[..., None, :]
    if bias is None:
        bias = jnp.zeros(weight.shape[: 1 + own], x.dtype)
    kernel = jnp.moveaxis(weight, (-4, -3), (-1, -2))
    arrays = Arrays(jnp.moveaxis(x, 1, -1), kernel, bias)
    decision = _decide(arrays, call)
    with usage.timed(decision):
        run = _plain if decision.implementation == "xla" or not len(x) else _fused
        y = jnp.moveaxis(run(arrays, call), -1, 1)
    return y[:, :, 0] if sides == 1 else y


def _decide(arrays: Arrays, call: Call) -> dispatch.Decision:
    own, dtype = arrays.bias.ndim == 2, arrays.x.dtype.name
    problem = spec.problem_of(call.sizes, call.sides, own, dtype, "forward", call.options)
    return dispatch.decide(problem, jax_device(), BINDING, call.implementation)


_PAD_MODES = {"reflect": "reflect", "replicate": "edge", "circular": "wrap"}


def _convolved(x: Array, weight: Array, bias: Array, call: Call) -> Array:
    options, edges = call.options, [(p, p) for p in call.sizes.padding]
    if options.padding_mode != "zeros" and options.padding:
        x = jnp.pad(x, [(0, 0), *edges, (0, 0)], mode=_PAD_MODES[options.padding_mode])
        edges = [(0, 0)] * 2
    y = jax.lax.conv_general_dilated(
        x,
        weight,
        (options.stride,) * 2,
        edges,
        rhs_dilation=(options.dilation,) * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=options.groups,
    )
    return y + bias


def _shuffled(z: Array, call: Call) -> Array:
    batch, rows, columns, channels = z.shape
    fy, fx = call.sizes.factor
    if call.options.shuffle > 0:
        kept = channels // (fy * fx)
        z = z.reshape(batch, rows, columns, kept, fy, fx).transpose(0, 1, 4, 2, 5, 3)
        return z.reshape(batch, rows * fy, columns * fx, kept)
    if call.options.shuffle < 0:
        z = z.reshape(batch, rows // fy, fy, columns // fx, fx, channels)
        z = z.transpose(0, 1, 3, 5, 2, 4)
        return z.reshape(batch, rows // fy, columns // fx, channels * fy * fx)
    return z


def _plain(arrays: Arrays, call: Call) -> Array:
    """The op in ordinary JAX operations, differentiable any number of times."""
    x, weight, bias = arrays
    if bias.ndim == 1:
        z = _convolved(x, weight, bias, call)
    else:

        def one(x: Array, weight: Array, bias: Array) -> Array:
            return _convolved(x[None], weight, bias, call)[0]

        z = jax.vmap(one)(x, weight, bias)
    return jax_functions.apply(call.options.activation, _shuffled(z, call))


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _fused(arrays: Arrays, call: Call) -> Array:
    config = _decide(arrays, call).config
    return pallas_kernel.forward(
        *arrays, sizes=call.sizes, options=call.options, config=config, device=jax_device()
    )


def _fused_forward(arrays: Arrays, call: Call) -> tuple[Array, Arrays]:
    return _fused(arrays, call), arrays


def _fused_backward(call: Call, arrays: Arrays, of_y: Array) -> tuple[Arrays]:
    """The plain path's: XLA's convolutions, with slope and order fused around them."""
    return (jax.vjp(lambda arrays: _plain(arrays, call), arrays)[1](of_y)[0],)


_fused.defvjp(_fused_forward, _fused_backward)


def _call(
    inputs: Mapping[str, Array], flags: Mapping[str, Any], implementation: str | None
) -> dict[str, Any]:
    # What the shapes of the inputs say.
    options = {name: value for name, value in flags.items() if name in Options._fields}
    arguments: dict[str, Any] = {name: jnp.asarray(value) for name, value in inputs.items()}
    return {"y": conv_shuffle(**arguments, **options, implementation=implementation)}


BINDING = Binding(
    op=spec.NAME,
    framework="jax",
    implementations=("xla", "pallas"),
    call=_call,
    differentiable=("x", "weight", "bias"),
    kernel_module="pallas_kernel",
)
