"""Synchronisation for JAX: the public function, the plain path, the derivatives."""

from __future__ import annotations

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

    neurons: int
    dtype: str
    elapsed: int
    implementation: str | None


class _Walk(NamedTuple):
    """What the walk over ticks reads: products (T, B, n), r (n,), 1 / sqrt(beta) (T, n), and alpha
    before the first tick (B, n)."""

    products: Array
    r: Array
    scale: Array
    before: Array


def synchronisation(
    activations: Array,
    left: Array,
    right: Array,
    decay: Array,
    *,
    previous: Array | None = None,
    elapsed: int = 0,
    implementation: str | None = None,
) -> Array:
    r"""How much pairs of neurons have been active together, over time.

    For the pair (i, j) with :math:`r = e^{-decay}` and over the ticks t (Darlow et al., 2025,
    arXiv 2505.05522):

    .. math::

        \alpha_t = r \alpha_{t-1} + z_t^i z_t^j, \quad
        \beta_t = r \beta_{t-1} + 1, \quad
        s_t = \alpha_t / \sqrt{\beta_t}

    Parameters
    ----------
    activations
        :math:`z`, (T, B, D), one tick at least; float32, bfloat16, float16 or float64.
    left, right
        The neurons i and j of each pair, integers in [0, D), (n,). They are not checked.
    decay
        Of each pair, (n,), at least 0.
    previous, elapsed
        To go on after ``elapsed`` ticks, a Python integer: ``previous`` is the last s until then,
        (B, n). Default: nothing came before. Calls for one tick each give what one call for all
        of them does.
    implementation
        ``"xla"``, ``"pallas"``, or None to let dispatch choose.

    Returns
    -------
    Array
        s after each tick, (T, B, n), in the wider dtype of ``activations`` and ``decay``.
        Arithmetic is in float32 (float64 for float64).

    Raises
    ------
    TypeError
        If ``activations``, ``decay`` or ``previous`` is not floating-point, or ``left`` or
        ``right`` holds no integers.
    ValueError
        If a shape does not fit, or ``elapsed`` is negative or does not go with ``previous``.
    UnsupportedImplementationError
        If the implementation asked for cannot run here.

    Notes
    -----
    NaN and infinity stay with the pairs they are in, from their tick on. The kernels give the
    same bits in every call, gradients included.
    """
    floating = {"activations": activations, "decay": decay, "previous": previous}
    for name, value in floating.items():
        if not (name == "previous" and value is None) and not _is(value, jnp.floating):
            got = getattr(value, "dtype", type(value).__name__)
            raise TypeError(f"{name} must be a floating-point array, got {got}")
    for name, value in {"left": left, "right": right}.items():
        if not _is(value, jnp.integer):
            got = getattr(value, "dtype", type(value).__name__)
            raise TypeError(f"{name} must be an array of integers, got {got}")
    given = {"left": left, "right": right, "decay": decay, "previous": previous}
    shapes = {k: None if v is None else tuple(v.shape) for k, v in given.items()}
    spec.check_arguments(tuple(activations.shape), shapes, elapsed)
    dtype = jnp.promote_types(activations.dtype, decay.dtype).name
    options = _Options(activations.shape[2], dtype, elapsed, implementation)
    pairs = jnp.asarray(left), jnp.asarray(right)
    arrays = jnp.asarray(activations), *pairs, jnp.asarray(decay), previous
    decision = _decide((*activations.shape[:2], len(left)), "forward", options)
    with usage.timed(decision):
        if decision.implementation == "xla" or not activations.shape[1] * len(left):
            return _plain(arrays, options)
        return _through(_fused_walk, _fused_products, arrays, options)


def _is(value: Any, kind: Any) -> bool:
    return hasattr(value, "dtype") and jnp.issubdtype(value.dtype, kind)


def _decide(walked: tuple[int, ...], direction: str, options: _Options) -> dispatch.Decision:
    """``walked`` are the ticks, the batch and the pairs."""
    shape = *walked[:2], options.neurons
    problem = spec.problem_of(shape, walked[2], options.dtype, direction, options.elapsed)
    return dispatch.decide(problem, jax_device(), BINDING, options.implementation)


def _through(walk: Any, products: Any, arrays: Any, options: _Options) -> Array:
    activations, left, right, decay, previous = arrays
    found = products(activations, left, right)
    return walk(_prepared(found, decay, previous, options), options)


@partial(jax.jit, static_argnums=1)
def _plain(arrays: Any, options: _Options) -> Array:
    return _through(_plain_walk, _plain_products, arrays, options)


# No kernel within: which one, and for what device, is for each call to decide.
@partial(jax.jit, static_argnums=3)
def _prepared(found: Array, decay: Array, previous: Array | None, options: _Options) -> _Walk:
    exact = jnp.promote_types(options.dtype, jnp.float32)
    ticks, elapsed = len(found), options.elapsed
    decay, found = decay.astype(exact), found.astype(exact)
    steps = jnp.arange(elapsed + ticks, dtype=exact)
    betas = jnp.cumsum(jnp.exp(-decay * steps[:, None]), 0)
    before = jnp.zeros_like(found[0])
    if previous is not None:
        before = previous.astype(exact) * jnp.sqrt(betas[elapsed - 1])
    return _Walk(found, jnp.exp(-decay), jax.lax.rsqrt(betas[elapsed:]), before)


@jax.jit
def _plain_products(activations: Array, left: Array, right: Array) -> Array:
    exact = jnp.promote_types(activations.dtype, jnp.float32)
    return activations[..., left].astype(exact) * activations[..., right].astype(exact)


def _plain_walk(given: _Walk, options: _Options) -> Array:
    def step(alpha: Array, product: Array) -> tuple[Array, Array]:
        alpha = given.r * alpha + product
        return alpha, alpha

    alphas = jax.lax.scan(step, given.before, given.products)[1]
    return (alphas * given.scale[:, None]).astype(options.dtype)


@jax.custom_vjp
def _fused_products(activations: Array, left: Array, right: Array) -> Array:
    """The products, whose gradient is summed over the pairs of a neuron in a fixed order."""
    return _plain_products(activations, left, right)


def _products_forward(
    activations: Array, left: Array, right: Array
) -> tuple[Array, tuple[Array, Array, Array]]:
    return _plain_products(activations, left, right), (activations, left, right)


def _products_backward(
    saved: tuple[Array, Array, Array], of_products: Array
) -> tuple[Array, None, None]:
    return _of_activations(*saved, of_products), None, None


_fused_products.defvjp(_products_forward, _products_backward)


def _plain_of_activations(
    activations: Array, left: Array, right: Array, of_products: Array
) -> Array:
    return jax.vjp(lambda z: _plain_products(z, left, right), activations)[1](of_products)[0]


@jax.custom_vjp
def _of_activations(activations: Array, left: Array, right: Array, of_products: Array) -> Array:
    device = jax_device()
    if device.platform == "tpu":  # has no gather, and its scatter repeats
        return _plain_of_activations(activations, left, right, of_products)
    rows = activations.reshape(-1, activations.shape[-1])
    flat = of_products.reshape(len(rows), -1)
    found = pallas_kernel.collect(rows, flat, left, right, device=device)
    return found.reshape(activations.shape)


def _of_activations_forward(*arrays: Array) -> tuple[Array, tuple[Array, ...]]:
    return _of_activations(*arrays), arrays


def _of_activations_backward(saved: tuple[Array, ...], cotangent: Array) -> tuple[Any, ...]:
    activations, left, right, of_products = saved
    _, pull = jax.vjp(
        lambda z, g: _plain_of_activations(z, left, right, g), activations, of_products
    )
    of_activations, of_of_products = pull(cotangent)
    return of_activations, None, None, of_of_products


_of_activations.defvjp(_of_activations_forward, _of_activations_backward)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _fused_walk(given: _Walk, options: _Options) -> Array:
    decision = _decide(given.products.shape, "forward", options)
    return pallas_kernel.forward(
        *given, dtype=options.dtype, config=decision.config, device=jax_device()
    )


def _walk_forward(given: _Walk, options: _Options) -> tuple[Array, tuple[_Walk, Array]]:
    s = _fused_walk(given, options)
    return s, (given, s)


def _walk_backward(options: _Options, saved: tuple[_Walk, Array], of_s: Array) -> tuple[_Walk]:
    return (_gradient(*saved, of_s, options),)


_fused_walk.defvjp(_walk_forward, _walk_backward)


@partial(jax.jit, static_argnums=2)
def _plain_gradient(given: _Walk, of_s: Array, options: _Options) -> _Walk:
    return jax.vjp(lambda walk: _plain_walk(walk, options), given)[1](of_s)[0]


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _gradient(given: _Walk, s: Array, of_s: Array, options: _Options) -> _Walk:
    """The gradients of what the walk read; their own derivative goes through the plain path, as a
    function of that alone."""
    decision = _decide(s.shape, "backward", options)
    with usage.timed(decision):
        if decision.implementation == "xla":
            return _plain_gradient(given, of_s, options)
        _, r, scale, before = given
        of_products, of_r, of_before = pallas_kernel.backward(
            s, r, scale, before, of_s, config=decision.config, device=jax_device()
        )
        of_scale = (of_s.astype(scale.dtype) * s.astype(scale.dtype)).sum(1) / scale
        return _Walk(of_products, of_r, of_scale, of_before)


def _gradient_forward(
    given: _Walk, s: Array, of_s: Array, options: _Options
) -> tuple[_Walk, tuple[_Walk, Array]]:
    return _gradient(given, s, of_s, options), (given, of_s)


def _gradient_backward(
    options: _Options, saved: tuple[_Walk, Array], cotangents: _Walk
) -> tuple[_Walk, Array, Array]:
    given, of_s = saved
    _, pull = jax.vjp(lambda walk, g: _plain_gradient(walk, g, options), given, of_s)
    of_given, of_of_s = pull(cotangents)
    return of_given, jnp.zeros_like(of_s), of_of_s


_gradient.defvjp(_gradient_forward, _gradient_backward)


def _call(
    inputs: Mapping[str, Array], flags: Mapping[str, Any], implementation: str | None
) -> dict[str, Any]:
    options: dict[str, Any] = {name: jnp.asarray(value) for name, value in inputs.items()}
    return {"s": synchronisation(**options, **flags, implementation=implementation)}


BINDING = Binding(
    op=spec.NAME,
    framework="jax",
    implementations=("xla", "pallas"),
    call=_call,
    differentiable=("activations", "decay", "previous"),
    kernel_module="pallas_kernel",
)
