"""A whole narrow multi-layer perceptron for JAX: the public function, the plain path, the
derivatives. The plain path is one `linear_norm_activation` after another."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from ..core import dispatch, jax_functions, usage
from ..core.device import jax_device
from ..core.registry import Binding
from ..linear_norm_activation.jax_op import linear_norm_activation
from . import pallas_kernel, spec
from .pallas_kernel import Arrays, Kept, Seed


class Options(NamedTuple):
    """What a call fixes beside its arrays: hashable, so it can be static."""

    norm: str
    activation: str
    output_activation: str
    eps: float
    dropout: float
    implementation: str | None


def fused_mlp(
    x: Array,
    weights: Sequence[Array],
    biases: Sequence[Array] | None = None,
    norm_weights: Sequence[Array] | None = None,
    norm_biases: Sequence[Array] | None = None,
    *,
    norm: str = "none",
    activation: str = "Identity",
    output_activation: str = "Identity",
    eps: float | None = None,
    dropout: float = 0.0,
    seed: Array | int | None = None,
    implementation: str | None = None,
) -> Array:
    r"""A multi-layer perceptron of equal hidden layers, all of it in one kernel if it is narrow.

    .. math::

        h_l = m_l \odot \phi(N_l(h_{l-1} W_l^\top + b_l)), \quad l = 1 \dots L, \qquad
        y = m_{L+1} \odot \psi(h_L W_{L+1}^\top + b_{L+1})

    with :math:`h_0 = x`, :math:`N` a norm of the last axis with weight and bias, :math:`\phi` and
    :math:`\psi` activations and :math:`m` the dropout, as in :func:`norm_activation`. Wide
    networks (more than 128 features anywhere) and gated activations run layer by layer through
    :func:`linear_norm_activation`. In the literature a fully fused MLP (Müller et al., arXiv
    2106.12372).

    Parameters
    ----------
    x
        Shape (..., I); float32, bfloat16, float16 or float64. Sums are in float32 (float64 for
        float64), the result in the dtype of ``x``.
    weights
        :math:`W_1` (H, I), :math:`W_2` to :math:`W_L` (H, H), :math:`W_{L+1}` (O, H); two or
        more. A gated activation takes twice the rows.
    biases
        :math:`b`, one for each weight. None: zeros.
    norm_weights, norm_biases
        Of the norms, one (H,) for each hidden layer. None: ones and zeros.
    norm
        ``"layer"``, ``"rms"`` or ``"none"``, after each hidden linear layer.
    activation, output_activation
        :math:`\phi` and :math:`\psi`: names of `ml_networks.kernels.core.activations.NAMES`.
    eps, dropout, seed
        As in :func:`norm_activation`; layer l takes the seed plus :math:`(l - 1) 2^{32}`.
    implementation
        ``"xla"``, ``"pallas"``, or None to let dispatch choose.

    Returns
    -------
    Array
        Shape (..., O).

    Raises
    ------
    TypeError
        If ``x`` is not a floating-point array.
    ValueError
        If a shape does not fit, ``dropout`` is outside [0, 1) or has no ``seed``, or ``norm`` or
        an activation has no such name.
    UnsupportedImplementationError
        If the implementation asked for cannot run here.

    Notes
    -----
    Repeated calls give the same bits, gradients included.
    """
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"x must be a floating-point array, got {x.dtype}")
    vectors = {"biases": biases, "norm_weights": norm_weights, "norm_biases": norm_biases}
    shapes = {k: None if v is None else [jnp.shape(one) for one in v] for k, v in vectors.items()}
    sides = [jnp.shape(weight) for weight in weights]
    spec.check_arguments(x.shape, sides, shapes, norm, activation, output_activation, dropout)
    if dropout and seed is None:
        raise ValueError(f"dropout is {dropout} and there is no seed; give seed=")
    if eps is None:
        exact = jnp.float64 if x.dtype == jnp.float64 else jnp.float32
        eps = float(jnp.finfo(exact).eps) if norm == "rms" else 1e-5
    options = Options(
        norm, activation, output_activation, float(eps), float(dropout), implementation
    )
    rows, columns = math.prod(x.shape[:-1]), [side[0] for side in sides]

    def each(given: Sequence[Array] | None, sizes: Sequence[int], value: float) -> tuple[Any, ...]:
        if given is None:
            return tuple(jnp.full(size, value, x.dtype) for size in sizes)
        return tuple(jnp.asarray(one) for one in given)

    arrays = Arrays(
        x.reshape(rows, x.shape[-1]),
        tuple(jnp.asarray(weight).astype(x.dtype) for weight in weights),
        each(biases, columns, 0.0),
        each(norm_weights, columns[:-1], 1.0),
        each(norm_biases, columns[:-1], 0.0),
    )
    words = jax_functions.seed_words(seed) if dropout else None
    decision = _decide(arrays, options, "forward")
    with usage.timed(decision):
        if decision.implementation == "xla" or not rows:
            y = _plain(arrays, words, options)
        else:
            y = _fused(arrays, words, options)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def _decide(arrays: Arrays, options: Options, direction: str) -> dispatch.Decision:
    sides = [weight.shape for weight in arrays.weights]
    flags = options._asdict()
    implementation = flags.pop("implementation")
    del flags["eps"]
    dtype = arrays.x.dtype.name
    problem = spec.problem_of(arrays.x.shape[0], sides, dtype, direction, flags)
    return dispatch.decide(problem, jax_device(), BINDING, implementation)


def _plain(arrays: Arrays, seed: Seed, options: Options) -> Array:
    """One `linear_norm_activation` after another, whose implementation is its own affair unless
    XLA was asked for."""
    x, weights, *vectors = arrays
    last = len(weights) - 1
    rest: dict[str, Any] = {"eps": options.eps, "dropout": options.dropout}
    rest["implementation"] = "xla" if options.implementation == "xla" else None
    for layer, weight in enumerate(weights):
        if seed is not None:
            rest["seed"] = jnp.stack((seed[0], seed[1] + jnp.uint32(layer)))
        given = [kind[layer] if layer < len(kind) else None for kind in vectors]
        norm, activation = options.norm, options.activation
        if layer == last:
            norm, activation = "none", options.output_activation
        x = linear_norm_activation(x, weight, *given, norm=norm, activation=activation, **rest)
    return x


@partial(jax.jit, static_argnames="options")
def _plain_gradient(arrays: Arrays, seed: Seed, of_y: Array, options: Options) -> Arrays:
    return jax.vjp(lambda arrays: _plain(arrays, seed, options), arrays)[1](of_y)[0]


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _fused(arrays: Arrays, seed: Seed, options: Options) -> Array:
    return _run(arrays, seed, options, keep=False)[0]


def _run(arrays: Arrays, seed: Seed, options: Options, *, keep: bool) -> tuple[Array, Kept]:
    config = _decide(arrays, options, "forward").config
    return pallas_kernel.forward(
        arrays, seed, options=options[:5], keep=keep, config=config, device=jax_device()
    )


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _run_and_keep(arrays: Arrays, seed: Seed, options: Options) -> tuple[Array, Kept]:
    """For a second derivative: `_gradient`, which takes what is kept, stands for all of it."""
    return _run(arrays, seed, options, keep=True)


def _run_and_keep_forward(
    arrays: Arrays, seed: Seed, options: Options
) -> tuple[tuple[Array, Kept], tuple[Arrays, Seed]]:
    return _run_and_keep(arrays, seed, options), (arrays, seed)


def _run_and_keep_backward(
    options: Options, saved: tuple[Arrays, Seed], cotangents: tuple[Array, Kept]
) -> tuple[Arrays, None]:
    return _plain_gradient(*saved, cotangents[0], options._replace(implementation="xla")), None


_run_and_keep.defvjp(_run_and_keep_forward, _run_and_keep_backward)


def _fused_forward(
    arrays: Arrays, seed: Seed, options: Options
) -> tuple[Array, tuple[Arrays, Kept, Seed]]:
    y, kept = _run_and_keep(arrays, seed, options)
    return y, (arrays, kept, seed)


def _fused_backward(
    options: Options, saved: tuple[Arrays, Kept, Seed], of_y: Array
) -> tuple[Arrays, None]:
    return _gradient(*saved, of_y, options), None


_fused.defvjp(_fused_forward, _fused_backward)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _gradient(arrays: Arrays, kept: Kept, seed: Seed, of_y: Array, options: Options) -> Arrays:
    """The gradients of ``arrays``; their own derivative goes through the plain path."""
    decision = _decide(arrays, options, "backward")
    with usage.timed(decision):
        if decision.implementation == "xla":
            return _plain_gradient(arrays, seed, of_y, options)
        return pallas_kernel.backward(
            arrays,
            kept,
            seed,
            of_y,
            options=options[:5],
            config=decision.config,
            device=jax_device(),
        )


def _gradient_forward(
    arrays: Arrays, kept: Kept, seed: Seed, of_y: Array, options: Options
) -> tuple[Arrays, tuple[Arrays, Seed, Array]]:
    return _gradient(arrays, kept, seed, of_y, options), (arrays, seed, of_y)


def _gradient_backward(
    options: Options, saved: tuple[Arrays, Seed, Array], cotangents: Arrays
) -> tuple[Arrays, None, None, Array]:
    arrays, seed, of_y = saved

    def function(arrays: Arrays, cotangent: Array) -> Arrays:
        return _plain_gradient(arrays, seed, cotangent, options._replace(implementation="xla"))

    of_arrays, of_cotangent = jax.vjp(function, arrays, of_y)[1](cotangents)
    return of_arrays, None, None, of_cotangent


_gradient.defvjp(_gradient_forward, _gradient_backward)


def _call(
    inputs: Mapping[str, Array], flags: Mapping[str, Any], implementation: str | None
) -> dict[str, Any]:
    given = {name: jnp.asarray(value) for name, value in inputs.items()}
    weights = [given["first_weight"], *given["hidden_weight"], given["last_weight"]]
    biases = [*given["bias"], given["last_bias"]]
    norms = list(given["norm_weight"]), list(given["norm_bias"])
    options: dict[str, Any] = {**flags, "implementation": implementation}
    return {"y": fused_mlp(given["x"], weights, biases, *norms, **options)}


BINDING = Binding(
    op=spec.NAME,
    framework="jax",
    implementations=("xla", "pallas"),
    call=_call,
    differentiable=(
        "x",
        "first_weight",
        "hidden_weight",
        "last_weight",
        "bias",
        "last_bias",
        "norm_weight",
        "norm_bias",
    ),
    kernel_module="pallas_kernel",
)
