"""The neuron-level model for JAX: the public functions, the plain path, the derivatives."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
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


def neuron_level_model(
    trace: Array,
    weight1: Array,
    bias1: Array,
    weight2: Array | None = None,
    bias2: Array | None = None,
    *,
    implementation: str | None = None,
) -> Array:
    r"""Map the recent past of every neuron to its activation, by the neuron's own small network.

    For each row and each of the D neurons, with M past values :math:`x`:

    .. math::

        (a, g) = x W_1 + b_1,\quad h = a \odot \sigma(g),\qquad
        (v, u) = h W_2 + b_2,\quad z = v \, \sigma(u)

    Without a second layer :math:`z` is the only unit of :math:`h`. The weights are laid out neuron
    by neuron, in advance of all ticks.

    Parameters
    ----------
    trace
        :math:`x`, (..., D, M), oldest first; float32, bfloat16, float16 or float64.
    weight1, bias1
        :math:`W_1`, (D, M, 2 H), the values' columns before the gates', and :math:`b_1`, (D, 2 H).
    weight2, bias2
        :math:`W_2`, (D, H, 2), and :math:`b_2`, (D, 2); None: no second layer, and H = 1.
    implementation
        ``"xla"``, ``"pallas"``, or None to let dispatch choose.

    Returns
    -------
    Array
        :math:`z`, (..., D), in the dtype of ``trace``.

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
    The kernels keep nothing but the arguments for the backward pass. Repeated calls give the same
    bits, gradients included.

    Darlow et al., "Continuous Thought Machines", arXiv 2505.05522.
    """
    named = _named("trace", trace, weight1, bias1, weight2, bias2)
    arrays = dict(zip(named, jax_arrays(named), strict=True))
    spec.check_shapes({name: a if a is None else a.shape for name, a in arrays.items()})
    leading, kept = arrays["trace"].shape[:-2], arrays["trace"].shape[-2:]
    history = arrays.pop("trace").reshape(math.prod(leading), *kept).transpose(1, 2, 0)
    z = _at_tick(Inputs(history, **arrays), jnp.int32(0), implementation)
    return z.reshape(*leading, kept[0])


def neuron_level_model_at_tick(
    history: Array,
    tick: Array | int,
    weight1: Array,
    bias1: Array,
    weight2: Array | None = None,
    bias2: Array | None = None,
    *,
    implementation: str | None = None,
) -> Array:
    r"""Do as :func:`neuron_level_model` with the traces at one tick of a history, where they lie.

    Parameters
    ----------
    history
        Pre-activations (D, L, B), oldest first: a neuron's last M values of all B rows are then
        one run of memory. float32, bfloat16, float16 or float64.
    tick
        The traces are ``history[:, tick : tick + M]``; an integer from 0 to L - M, which may be
        traced. One beyond counts as the nearest.
    weight1, bias1, weight2, bias2, implementation
        As in :func:`neuron_level_model`.

    Returns
    -------
    Array
        (B, D), in the dtype of ``history``.

    Raises
    ------
    TypeError, ValueError, UnsupportedImplementationError
        As in :func:`neuron_level_model`.
    """
    named = _named("history", history, weight1, bias1, weight2, bias2)
    inputs = Inputs(*_checked(named, tick))
    return _at_tick(inputs, jnp.asarray(tick, jnp.int32), implementation)


def neuron_level_model_trace_gradient(
    of_z: Array,
    history: Array,
    tick: Array | int,
    weight1: Array,
    bias1: Array,
    weight2: Array | None = None,
    bias2: Array | None = None,
    *,
    into: Array,
    implementation: str | None = None,
) -> Array:
    """Add the gradient of the traces at a tick to that of the history.

    For loops over ticks that are differentiated by hand; the gradients of the weights are taken
    once for all ticks, by :func:`neuron_level_model_weight_gradient`.

    Parameters
    ----------
    of_z
        Gradient of :func:`neuron_level_model_at_tick`'s result, (B, D).
    history, tick, weight1, bias1, weight2, bias2, implementation
        As in :func:`neuron_level_model_at_tick`.
    into
        The gradient of the history until now, (D, L, B), of any floating-point dtype. Where XLA
        needs it no more, as in a loop's carry, its memory is the result's.

    Returns
    -------
    Array
        ``into`` with the gradient added to ``into[:, tick : tick + M]``.

    Raises
    ------
    TypeError, ValueError, UnsupportedImplementationError
        As in :func:`neuron_level_model`.
    """
    named = {"of_z": of_z, **_named("history", history, weight1, bias1, weight2, bias2)}
    into = jnp.asarray(into)
    if not jnp.issubdtype(into.dtype, jnp.floating):
        raise TypeError(f"into must be a floating-point array, got {into.dtype}")
    of_z, *arrays = _checked(named, tick, into)
    inputs = Inputs(*arrays)
    return _trace_gradient(into, of_z, inputs, jnp.asarray(tick, jnp.int32), implementation)


def neuron_level_model_weight_gradient(
    of_z: Array,
    history: Array,
    weight1: Array,
    bias1: Array,
    weight2: Array | None = None,
    bias2: Array | None = None,
    *,
    implementation: str | None = None,
) -> tuple[Array, ...]:
    """Return the gradients of the weights for those of the results of
    :func:`neuron_level_model_at_tick` at all ticks of a history.

    Parameters
    ----------
    of_z
        (L - M + 1, B, D), of each tick.
    history, weight1, bias1, weight2, bias2, implementation
        As in :func:`neuron_level_model_at_tick`.

    Returns
    -------
    tuple of Array
        Of ``weight1`` and ``bias1`` and, where given, of ``weight2`` and ``bias2``.

    Raises
    ------
    TypeError, ValueError, UnsupportedImplementationError
        As in :func:`neuron_level_model`.
    """
    named = {"of_z": of_z, **_named("history", history, weight1, bias1, weight2, bias2)}
    of_z, *arrays = _checked(named)
    return _weight_gradient(of_z, Inputs(*arrays), jnp.int32(0), implementation)


class Inputs(NamedTuple):
    """The arrays of a call, or their gradients; the history is (neurons, length, rows)."""

    history: Array
    weight1: Array
    bias1: Array
    weight2: Array | None
    bias2: Array | None


def _named(
    name: str,
    values: Array,
    weight1: Array,
    bias1: Array,
    weight2: Array | None,
    bias2: Array | None,
) -> dict[str, Array | None]:
    weights = {"weight1": weight1, "bias1": bias1, "weight2": weight2, "bias2": bias2}
    return {name: values, **weights}


def _checked(
    named: Mapping[str, Array | None], tick: Array | int = 0, into: Array | None = None
) -> list[Any]:
    arrays = jax_arrays(named)
    shapes = {k: None if v is None else v.shape for k, v in zip(named, arrays, strict=True)}
    spec.check_history(shapes if into is None else {**shapes, "into": into.shape}, tick)
    return arrays


def _decide(
    inputs: Inputs, implementation: str | None, direction: str, ticks: int = 1
) -> dispatch.Decision:
    neurons, _, rows = inputs.history.shape
    hidden = 0 if inputs.weight2 is None else inputs.weight2.shape[1]
    sizes = ticks * rows, neurons, inputs.weight1.shape[1], hidden
    problem = Problem(
        spec.NAME,
        tuple(zip(spec.DIMENSIONS, sizes, strict=True)),
        inputs.history.dtype.name,
        (),
        direction,
    )
    return dispatch.decide(problem, jax_device(), BINDING, implementation)


def _at_tick(inputs: Inputs, tick: Array, implementation: str | None) -> Array:
    decision = _decide(inputs, implementation, "forward")
    with usage.timed(decision):
        plain = decision.implementation == "xla" or not inputs.history.size
        return _plain(inputs, tick) if plain else _fused(inputs, tick, implementation)


def _windows(history: Array, tick: Array, memory: int, ticks: int | None = None) -> Array:
    """The traces of a tick, (neurons, memory, rows), or of some, (neurons, memory, ticks,
    rows)."""
    span = memory if ticks is None else memory + ticks - 1
    if history.shape[1] != span:
        history = jax.lax.dynamic_slice_in_dim(history, tick, span, 1)
    if ticks is None:
        return history
    some = partial(jax.lax.dynamic_slice_in_dim, history, slice_size=ticks, axis=1)
    return jax.vmap(some, out_axes=1)(jnp.arange(memory))


def _model(x: Array, *weights: Array | None) -> Array:
    """z, (neurons, ...), of traces (neurons, memory, ...)."""
    weight1, bias1, *last = weights
    assert weight1 is not None
    assert bias1 is not None

    def along(bias: Array) -> Array:
        return bias.reshape(len(bias), *(1,) * (x.ndim - 2), -1)

    h = jax.nn.glu(jnp.einsum("ni...,nio->n...o", x, weight1) + along(bias1))
    if last[0] is not None and last[1] is not None:
        h = jax.nn.glu(jnp.einsum("n...i,nio->n...o", h, last[0]) + along(last[1]))
    return h[..., 0]


@jax.jit
def _plain(inputs: Inputs, tick: Array) -> Array:
    """The op in ordinary JAX operations, differentiable any number of times."""
    window = _windows(inputs.history, tick, inputs.weight1.shape[1])
    return _model(window, *inputs[1:]).T


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _fused(inputs: Inputs, tick: Array, implementation: str | None) -> Array:
    decision = _decide(inputs, implementation, "forward")
    history, *weights = inputs
    return pallas_kernel.forward(
        history, tick, *weights, config=decision.config, device=jax_device()
    )


def _fused_forward(
    inputs: Inputs, tick: Array, implementation: str | None
) -> tuple[Array, tuple[Inputs, Array]]:
    return _fused(inputs, tick, implementation), (inputs, tick)


def _fused_backward(
    implementation: str | None, saved: tuple[Inputs, Array], of_z: Array
) -> tuple[Inputs, None]:
    inputs, tick = saved
    history = inputs.history
    of_history = _trace_gradient(None, of_z, inputs, tick, implementation)
    if of_history.shape != history.shape:
        zeros = jnp.zeros_like(history)
        of_history = jax.lax.dynamic_update_slice_in_dim(zeros, of_history, tick, 1)
    of_weights = _weight_gradient(of_z[None], inputs, tick, implementation)
    # Under jit XLA drops the kernel whose gradients nobody asks for.
    named = dict(zip(("weight1", "bias1", "weight2", "bias2"), of_weights, strict=False))
    return inputs._replace(history=of_history, **named), None


_fused.defvjp(_fused_forward, _fused_backward)


@jax.jit
def _plain_trace_gradient(into: Array | None, of_z: Array, inputs: Inputs, tick: Array) -> Array:
    window = _windows(inputs.history, tick, inputs.weight1.shape[1])
    (found,) = jax.vjp(lambda x: _model(x, *inputs[1:]), window)[1](of_z.T)
    if into is None:
        return found
    before = jax.lax.dynamic_slice_in_dim(into, tick, window.shape[1], 1)
    total = before + found.astype(into.dtype)
    return jax.lax.dynamic_update_slice_in_dim(into, total, tick, 1)


@jax.jit
def _plain_weight_gradient(of_z: Array, inputs: Inputs, tick: Array) -> tuple[Array, ...]:
    windows = _windows(inputs.history, tick, inputs.weight1.shape[1], len(of_z))
    pull = jax.vjp(lambda *weights: _model(windows, *weights), *inputs[1:])[1]
    found = pull(of_z.transpose(2, 0, 1))
    return tuple(value for value in found if value is not None)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _trace_gradient(
    into: Array | None, of_z: Array, inputs: Inputs, tick: Array, implementation: str | None
) -> Array:
    """The gradient of the traces (neurons, memory, rows), or ``into`` with that added; its own
    derivative goes through the plain path."""
    decision = _decide(inputs, implementation, "backward")
    with usage.timed(decision):
        if decision.implementation == "xla" or not inputs.history.size:
            return _plain_trace_gradient(into, of_z, inputs, tick)
        history, *weights = inputs
        return pallas_kernel.trace_gradient(
            into, of_z, history, tick, *weights, config=decision.config, device=jax_device()
        )


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _weight_gradient(
    of_z: Array, inputs: Inputs, tick: Array, implementation: str | None
) -> tuple[Array, ...]:
    """The gradients of the weights, of a tick and those that follow; their own derivative goes
    through the plain path."""
    decision = _decide(inputs, implementation, "weight_gradient", len(of_z))
    with usage.timed(decision):
        if decision.implementation == "xla" or not of_z.size:
            return _plain_weight_gradient(of_z, inputs, tick)
        history, *weights = inputs
        return pallas_kernel.weight_gradient(
            of_z, history, tick, *weights, config=decision.config, device=jax_device()
        )


def _with_plain_derivative(gradient: Any, plain: Callable[..., Any]) -> None:
    def forward(*given: Any) -> Any:
        return gradient(*given), given[:-1]

    def backward(_: str | None, saved: Any, cotangents: Any) -> Any:
        return jax.vjp(plain, *saved)[1](cotangents)

    gradient.defvjp(forward, backward)


_with_plain_derivative(_trace_gradient, _plain_trace_gradient)
_with_plain_derivative(_weight_gradient, _plain_weight_gradient)


def _call(
    inputs: Mapping[str, Array], flags: Mapping[str, Any], implementation: str | None
) -> dict[str, Any]:
    weights: dict[str, Any] = dict(inputs)
    history = weights.pop("history")
    trace = jnp.moveaxis(history, 0, -1)
    return {"z": neuron_level_model(trace, **weights, implementation=implementation)}


BINDING = Binding(
    op=spec.NAME,
    framework="jax",
    implementations=("xla", "pallas"),
    call=_call,
    differentiable=("history", "weight1", "bias1", "weight2", "bias2"),
    kernel_module="pallas_kernel",
)
