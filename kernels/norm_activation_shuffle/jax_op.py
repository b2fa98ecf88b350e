"""Norm, shuffle, activation, dropout, residual and FiLM for JAX: the public function, the plain
path, the derivatives. All of it computes channels-last."""

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
Moments = tuple[Array, Array] | None


class Options(NamedTuple):
    """What a call fixes beside its arrays: hashable, so it can be static. ``norm`` is ``"given"``
    where moments are."""

    norm: str
    num_groups: int
    activation: str
    eps: float
    shuffle: int
    dropout: float
    residual_first: bool
    implementation: str | None


class Arrays(NamedTuple):
    """The arrays of a call that have gradients, ``x`` and ``residual`` as (batch, height, width,
    channels); ``weight`` and ``bias`` are always there."""

    x: Array
    weight: Array
    bias: Array
    residual: Array | None
    scale: Array | None
    shift: Array | None


def norm_activation_shuffle(
    x: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    residual: Array | None = None,
    scale: Array | None = None,
    shift: Array | None = None,
    running_mean: Array | None = None,
    running_var: Array | None = None,
    *,
    norm: str = "batch",
    num_groups: int = 1,
    training: bool = True,
    momentum: float = 0.1,
    activation: str = "Identity",
    eps: float = 1e-5,
    shuffle: int = 0,
    dropout: float = 0.0,
    residual_first: bool = False,
    seed: Array | int | None = None,
    implementation: str | None = None,
) -> Array | tuple[Array, Array, Array]:
    r"""Everything after a convolution in as few passes over its feature maps as possible.

    .. math::

        v &= S\!\left(\frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} \, \gamma + \beta\right) \\
        y &= a \, m \odot \phi(v) + b + r
        \qquad\text{or}\qquad y = a \, \phi(m \odot v + r) + b

    the second with ``residual_first``. :math:`S` is the pixel shuffle in torch's order or its
    inverse, :math:`\phi` any activation of the library without weights of its own; ``GLU``,
    ``SiGLU`` and ``SwiGLU`` halve the channels after the shuffle. :math:`m` is 0 with probability
    ``dropout``, otherwise 1 / (1 - ``dropout``), made from a counter, in the backward pass again,
    and never stored. :math:`a` and :math:`b` are those of FiLM (Perez et al., arXiv 1709.07871).

    Parameters
    ----------
    x
        Shape (N, C, \*sides); float32, bfloat16, float16 or float64. Arithmetic is in float32
        (float64 for float64), the result in the dtype of ``x``. Computed channels-last: the moves
        of axes cancel against those of channels-last convolutions.
    weight, bias
        :math:`\gamma` and :math:`\beta`, shape (C,). None: ones and zeros.
    residual
        :math:`r`, the shape and dtype of the result. None: zero.
    scale, shift
        :math:`a` and :math:`b`, shape (N, C') with the C' channels of the result. None: ones and
        zeros.
    running_mean, running_var
        Shape (C,), for ``norm="batch"``: while training, new ones are returned, moved by
        ``momentum`` towards the batch's mean and unbiased variance; otherwise they normalise.
    norm
        ``"batch"`` (Ioffe and Szegedy, arXiv 1502.03167), ``"group"`` (Wu and He, arXiv
        1803.08494; C groups are instance norm, one group is layer norm over channels and sides)
        or ``"none"`` (the fraction is x).
    num_groups
        Of ``norm="group"``. Default 1.
    training
        Whether ``norm="batch"`` takes the moments of the batch. Default True.
    momentum
        Default 0.1.
    activation
        A name of `ml_networks.kernels.core.activations.NAMES`. Default ``"Identity"``.
    eps
        Default 1e-5.
    shuffle
        The factor s of the shuffle, (N, C, H, W) to (N, C / s², s H, s W); below 0 the unshuffle
        by \|s\|; default 0, none.
    dropout
        Probability in [0, 1), a Python number.
    residual_first
        Whether the residual is added before the activation. Not with a gated one.
    seed
        The dropped elements are a function of ``seed``, sample, and place in the sample's
        (C', \*sides) alone, the same in every implementation and framework
        (`ml_networks.kernels.core.dropout`). An integer, an array of one integer or of two uint32
        words, or a key of `jax.random`. Needed where ``dropout`` is not 0.
    implementation
        ``"xla"``, ``"pallas"``, or None to let dispatch choose.

    Returns
    -------
    Array
        Shape (N, C', \*sides'); with running statistics and ``training`` a tuple of it and the
        new running mean and variance.

    Raises
    ------
    TypeError
        If ``x`` is not a floating-point array or ``residual`` has another dtype.
    ValueError
        If a shape does not fit, batch statistics are asked for of one value, ``dropout`` is
        outside [0, 1) or has no ``seed``, or ``norm`` or ``activation`` has no such name.
    UnsupportedImplementationError
        If the implementation asked for cannot run here.

    Notes
    -----
    Repeated calls give the same bits, gradients included.
    """
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"x must be a floating-point array, got {x.dtype}")
    given = {
        "weight": weight,
        "bias": bias,
        "residual": residual,
        "scale": scale,
        "shift": shift,
        "running_mean": running_mean,
        "running_var": running_var,
    }
    sizes = spec.check_arguments(
        x.shape,
        {
            name: None if value is None else tuple(jnp.shape(value))
            for name, value in given.items()
        },
        norm=norm,
        num_groups=num_groups,
        training=training,
        activation=activation,
        shuffle=shuffle,
        dropout=dropout,
        residual_first=residual_first,
    )
    if residual is not None and residual.dtype != x.dtype:
        raise TypeError(f"residual is {residual.dtype}; it must be {x.dtype} like x")
    if dropout and seed is None:
        raise ValueError(f"dropout is {dropout} and there is no seed; give seed=")
    inside = norm if norm != "batch" or training else "given"
    fixed = inside, num_groups, activation, float(eps), shuffle, float(dropout), residual_first
    options = Options(*fixed, implementation)
    exact = jnp.promote_types(x.dtype, jnp.float32)
    channels = x.shape[1]
    arrays = Arrays(
        _channels_last(x),
        jnp.ones(channels, x.dtype) if weight is None else jnp.asarray(weight),
        jnp.zeros(channels, x.dtype) if bias is None else jnp.asarray(bias),
        None if residual is None else _channels_last(residual),
        scale if scale is None else jnp.asarray(scale),
        shift if shift is None else jnp.asarray(shift),
    )
    moments = None
    if inside == "given" and running_mean is not None and running_var is not None:
        moments = jnp.asarray(running_mean, exact), jnp.asarray(running_var, exact)
    words = jax_functions.seed_words(seed) if dropout else None
    decision = _decide(arrays, options, "forward")
    with usage.timed(decision):
        if not x.size or not _any_fused(decision, arrays, options):
            y, mean, var = _plain(arrays, moments, words, options)
        else:
            y, mean, var = _fused(arrays, moments, words, options)
    y = jnp.moveaxis(y, -1, 1).reshape(sizes.result)
    if inside != "batch" or running_mean is None or running_var is None:
        return y
    if not x.size:
        return y, running_mean, running_var
    unbiased = var * (sizes.averaged / (sizes.averaged - 1))
    moved = [
        (1 - momentum) * old + momentum * jax.lax.stop_gradient(new).astype(old.dtype)
        for old, new in ((running_mean, mean), (running_var, unbiased))
    ]
    return y, moved[0], moved[1]


def _channels_last(x: Array) -> Array:
    """(N, C, *sides) as (N, height, width, C)."""
    if x.ndim != 4:
        height = x.shape[2] if x.ndim > 3 else 1
        x = x.reshape(*x.shape[:2], height, math.prod(x.shape[2:]) // max(height, 1))
    return jnp.moveaxis(x, 1, -1)


def _decide(arrays: Arrays, options: Options, direction: str) -> dispatch.Decision:
    batch, height, width, channels = arrays.x.shape
    flags = {
        "norm": "batch" if options.norm == "given" else options.norm,
        "num_groups": options.num_groups,
        "training": options.norm != "given",
        "activation": options.activation,
        "shuffle": options.shuffle,
        "dropout": options.dropout,
        "residual": arrays.residual is not None,
        "residual_first": options.residual_first,
        "film": arrays.scale is not None or arrays.shift is not None,
        "channels_last": True,
    }
    shape = batch, channels, height, width
    problem = spec.problem_of(shape, arrays.x.dtype.name, direction, flags)
    return dispatch.decide(problem, jax_device(), BINDING, options.implementation)


def _any_fused(forward: dispatch.Decision, arrays: Arrays, options: Options) -> bool:
    """A forward pass that XLA fuses as well may still have a backward kernel."""
    if forward.implementation != "xla":
        return True
    if options.implementation == "xla" or forward.source in ("cpu", "float64"):
        return False
    return _decide(arrays, options, "backward").implementation != "xla"


def _moments(x: Array, options: Options) -> tuple[Array, Array]:
    """Mean and biased variance: (channels,) of the batch, or (batch, groups)."""
    batch, height, width, channels = x.shape
    axes: tuple[int, ...] = (0, 1, 2)
    if options.norm == "group":
        x = x.reshape(batch, height, width, options.num_groups, channels // options.num_groups)
        axes = (1, 2, 4)
    return x.mean(axes), x.var(axes)


def _lines(
    moments: Moments, weight: Array, bias: Array, options: Options, dtype: Any
) -> pallas_kernel.Lines:
    """Moments, weight and bias as (1 or batch, channels)."""
    channels = weight.shape[0]
    affine = weight.astype(dtype)[None], bias.astype(dtype)[None]
    if moments is None:
        one = jnp.ones((1, channels), dtype)
        return pallas_kernel.Lines(jnp.zeros_like(one), one, *affine)
    mean, var = moments
    inverse = jax.lax.rsqrt(var + options.eps)
    if options.norm == "group":
        members = channels // options.num_groups
        mean, inverse = (jnp.repeat(value, members, 1) for value in (mean, inverse))
    return pallas_kernel.Lines(mean.reshape(-1, channels), inverse.reshape(-1, channels), *affine)


@partial(jax.jit, static_argnames="options")
def _plain(
    arrays: Arrays, moments: Moments, seed: Seed, options: Options
) -> tuple[Array, Array, Array]:
    """The op in ordinary JAX operations, differentiable any number of times; and its moments."""
    dtype = jnp.promote_types(arrays.x.dtype, jnp.float32)
    x = arrays.x.astype(dtype)
    if options.norm in ("batch", "group"):
        moments = _moments(x, options)
    mean, inverse, weight, bias = (
        line[:, None, None] for line in _lines(moments, arrays.weight, arrays.bias, options, dtype)
    )
    y = _shuffled((x - mean) * (inverse * weight) + bias, options.shuffle)
    added: Any = 0.0 if arrays.residual is None else arrays.residual.astype(dtype)
    if options.residual_first:
        y = jax_functions.apply(options.activation, _dropped(y, seed, options) + added)
    else:
        y = _dropped(jax_functions.apply(options.activation, y), seed, options)
    if arrays.scale is not None:
        y = y * arrays.scale.astype(dtype)[:, None, None]
    if arrays.shift is not None:
        y = y + arrays.shift.astype(dtype)[:, None, None]
    y = y if options.residual_first else y + added
    empty = jnp.zeros(0, dtype)
    if options.norm not in ("batch", "group") or moments is None:
        return y.astype(arrays.x.dtype), empty, empty
    return y.astype(arrays.x.dtype), *moments


def _shuffled(x: Array, factor: int) -> Array:
    batch, height, width, channels = x.shape
    by = abs(factor)
    if by < 2:
        return x
    kept, (rows, columns) = spec.shuffled(channels, [height, width], factor)
    if factor > 0:
        x = x.reshape(batch, height, width, kept, by, by).transpose(0, 1, 4, 2, 5, 3)
    else:
        x = x.reshape(batch, rows, by, columns, by, channels).transpose(0, 1, 3, 5, 2, 4)
    return x.reshape(batch, rows, columns, kept)


def _dropped(y: Array, seed: Seed, options: Options) -> Array:
    if seed is None:
        return y
    batch, height, width, channels = y.shape
    sample = height * width * channels
    scale = jax_functions.dropout_scale(options.dropout, seed, batch, sample)
    scale = jnp.moveaxis(scale.reshape(batch, channels, height, width), 1, -1)
    return y * scale.astype(y.dtype)


def _flat(x: Array) -> Array:
    """(batch, positions, channels)."""
    return x.reshape(len(x), -1, x.shape[-1])


def _kernel_options(options: Options) -> pallas_kernel.Options:
    return pallas_kernel.Options(options.activation, options.dropout, options.residual_first)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _fused(
    arrays: Arrays, moments: Moments, seed: Seed, options: Options
) -> tuple[Array, Array, Array]:
    decision = _decide(arrays, options, "forward")
    if decision.implementation == "xla":
        return _plain(arrays, moments, seed, options)
    shared: dict[str, Any] = {"config": decision.config, "device": jax_device()}
    x, empty = _flat(arrays.x), jnp.zeros(0, jnp.float32)
    made = empty, empty
    if options.norm in ("batch", "group"):
        groups = options.num_groups if options.norm == "group" else None
        moments = made = pallas_kernel.moments(x, num_groups=groups, **shared)
    y = pallas_kernel.forward(
        x,
        _lines(moments, arrays.weight, arrays.bias, options, jnp.float32),
        None if arrays.residual is None else _flat(arrays.residual),
        seed,
        options=_kernel_options(options),
        **shared,
    )
    return y.reshape(*arrays.x.shape[:3], -1), *made


Saved = tuple[Arrays, Moments, Seed]


def _fused_forward(
    arrays: Arrays, moments: Moments, seed: Seed, options: Options
) -> tuple[tuple[Array, Array, Array], Saved]:
    result = _fused(arrays, moments, seed, options)
    kept = result[1:] if options.norm in ("batch", "group") else moments
    return result, (arrays, kept, seed)


def _fused_backward(
    options: Options, saved: Saved, cotangents: tuple[Array, Array, Array]
) -> tuple[Arrays, Moments, None]:
    arrays, moments, seed = saved
    found = _gradient(arrays, moments, seed, cotangents[0], options)
    if arrays.residual is not None and not options.residual_first:
        found = found._replace(residual=cotangents[0])
    given = moments if options.norm == "given" else None
    return found, jax.tree.map(jnp.zeros_like, given), None


_fused.defvjp(_fused_forward, _fused_backward)


@partial(jax.jit, static_argnames="options")
def _plain_gradient(
    arrays: Arrays, moments: Moments, seed: Seed, of_y: Array, options: Options
) -> Arrays:
    return jax.vjp(lambda values: _plain(values, moments, seed, options)[0], arrays)[1](of_y)[0]


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _gradient(
    arrays: Arrays, moments: Moments, seed: Seed, of_y: Array, options: Options
) -> Arrays:
    """The gradients of all arrays; their own derivative goes through the plain path."""
    decision = _decide(arrays, options, "backward")
    with usage.timed(decision):
        if decision.implementation == "xla":
            return _plain_gradient(arrays, moments, seed, of_y, options)
        first = arrays.residual if options.residual_first else None
        of_x, of_weight, of_bias, of_residual = pallas_kernel.backward(
            _flat(arrays.x),
            _lines(moments, arrays.weight, arrays.bias, options, jnp.float32),
            None if first is None else _flat(first),
            seed,
            _flat(of_y),
            options=_kernel_options(options),
            norm=options.norm,
            num_groups=options.num_groups,
            config=decision.config,
            device=jax_device(),
        )
        if arrays.residual is not None:
            of_residual = of_y if of_residual is None else of_residual.reshape(of_y.shape)
        return Arrays(
            of_x.reshape(arrays.x.shape),
            of_weight.astype(arrays.weight.dtype),
            of_bias.astype(arrays.bias.dtype),
            of_residual,
            None,
            None,
        )


Linear = tuple[Arrays, Moments, Seed, Array]


def _gradient_forward(
    arrays: Arrays, moments: Moments, seed: Seed, of_y: Array, options: Options
) -> tuple[Arrays, Linear]:
    return _gradient(arrays, moments, seed, of_y, options), (arrays, moments, seed, of_y)


def _gradient_backward(
    options: Options, saved: Linear, cotangents: Arrays
) -> tuple[Arrays, Moments, None, Array]:
    arrays, moments, seed, of_y = saved

    def function(values: Arrays, cotangent: Array) -> Arrays:
        return _plain_gradient(values, moments, seed, cotangent, options)

    of_arrays, of_cotangent = jax.vjp(function, arrays, of_y)[1](cotangents)
    return of_arrays, jax.tree.map(jnp.zeros_like, moments), None, of_cotangent


_gradient.defvjp(_gradient_forward, _gradient_backward)


def _call(
    inputs: Mapping[str, Array], flags: Mapping[str, Any], implementation: str | None
) -> dict[str, Any]:
    options: dict[str, Any] = {name: jnp.asarray(value) for name, value in inputs.items()}
    options |= {name: value for name, value in flags.items() if name != "channels_last"}
    return {"y": norm_activation_shuffle(**options, implementation=implementation)}


BINDING = Binding(
    op=spec.NAME,
    framework="jax",
    implementations=("xla", "pallas"),
    call=_call,
    differentiable=("x", "weight", "bias", "residual"),
    kernel_module="pallas_kernel",
)
