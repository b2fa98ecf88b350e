"""Synchronisation for torch: the public functions, the plain path, the custom ops."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..core import arguments, dispatch, torch_functions, usage
from ..core.device import torch_device
from ..core.registry import Binding
from . import spec


def synchronisation(
    activations: Tensor,
    left: Tensor,
    right: Tensor,
    decay: Tensor,
    *,
    previous: Tensor | None = None,
    elapsed: int = 0,
    implementation: str | None = None,
) -> Tensor:
    r"""How much pairs of neurons have been active together, over time, in one kernel.

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
        The neurons i and j of each pair, integers in [0, D), (n,). They are not checked: that
        would wait for the GPU.
    decay
        Of each pair, (n,), at least 0.
    previous, elapsed
        To go on after ``elapsed`` ticks: ``previous`` is the last s until then, (B, n). Default:
        nothing came before. Calls for one tick each give what one call for all of them does.

    implementation
        ``"torch"``, ``"triton"``, or None to let dispatch choose.

    Returns
    -------
    Tensor
        s after each tick, (T, B, n), in the wider dtype of ``activations`` and ``decay``.
        Arithmetic is in float32 (float64 for float64), also under autocast.

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
    same bits in every call, gradients included. Under the transforms of ``torch.func`` the plain
    path runs.
    """
    given = {"left": left, "right": right, "decay": decay, "previous": previous}
    _check_types(activations, given)
    shapes = {k: None if v is None else tuple(v.shape) for k, v in given.items()}
    spec.check_arguments(tuple(activations.shape), shapes, elapsed)
    if _takes_plain_path(
        activations, left, decay, elapsed, implementation
    ) or torch_functions.transformed(activations, decay, previous):
        return _plain(activations, left, right, decay, previous, elapsed)
    return _forward_op(activations, left, right, decay, previous, elapsed, implementation)[0]


def _check_types(activations: Tensor, given: Mapping[str, Tensor | None]) -> None:
    floating = {"activations": activations, "decay": given["decay"], "previous": given["previous"]}
    for name, value in floating.items():
        optional = name == "previous" and value is None
        if not optional and not (isinstance(value, Tensor) and value.is_floating_point()):
            got = getattr(value, "dtype", type(value).__name__)
            raise TypeError(f"{name} must be a floating-point tensor, got {got}")
    for name in ("left", "right"):
        value = given[name]
        if not isinstance(value, Tensor) or value.dtype not in (torch.int32, torch.int64):
            got = getattr(value, "dtype", type(value).__name__)
            raise TypeError(f"{name} must be a tensor of int32 or int64, got {got}")


def _dtype(activations: Tensor, decay: Tensor) -> torch.dtype:
    return torch.promote_types(activations.dtype, decay.dtype)


def _takes_plain_path(
    activations: Tensor, left: Tensor, decay: Tensor, elapsed: int, implementation: str | None
) -> bool:
    on_cpu = activations.device.type == "cpu"
    if torch.compiler.is_compiling():
        # The custom op decides at run time: a new shape then changes no traced code.
        return implementation == "torch" or (on_cpu and implementation is None)
    if on_cpu and not usage.recording() and not dispatch.is_overridden(BINDING, implementation):
        return True
    decision = _decide(activations, left, decay, elapsed, "forward", implementation)
    return decision.implementation == "torch" and not usage.recording()


def _decide(
    activations: Tensor,
    left: Tensor,
    decay: Tensor,
    elapsed: int,
    direction: str,
    implementation: str | None,
) -> dispatch.Decision:
    dtype = str(_dtype(activations, decay)).removeprefix("torch.")
    shape, pairs = tuple(activations.shape), left.shape[0]
    problem = spec.problem_of(shape, pairs, dtype, direction, elapsed)
    return dispatch.decide(problem, torch_device(activations.device), BINDING, implementation)


def _betas(decay: Tensor, ticks: int) -> Tensor:
    """Beta after 1 ... ``ticks`` ticks, (ticks, n)."""
    steps = torch.arange(ticks, device=decay.device, dtype=decay.dtype)
    return torch.exp(-decay * steps[:, None]).cumsum(0)


def _plain(
    activations: Tensor,
    left: Tensor,
    right: Tensor,
    decay: Tensor,
    previous: Tensor | None,
    elapsed: int,
) -> Tensor:
    """The op in ordinary torch operations, differentiable any number of times."""
    dtype = _dtype(activations, decay)
    exact = torch.promote_types(dtype, torch.float32)
    pairs = torch.cat([left, right])
    one, other = activations.index_select(2, pairs).to(exact).chunk(2, 2)
    alpha, *products = (one * other).unbind()
    decay = decay.to(exact)
    r, betas = torch.exp(-decay), _betas(decay, elapsed + len(activations))
    if previous is not None:
        alpha = torch.addcmul(alpha, r, previous.to(exact) * betas[elapsed - 1].sqrt())
    alphas = [alpha]
    for product in products:
        alphas.append(torch.addcmul(product, r, alphas[-1]))
    return (torch.stack(alphas) * betas[elapsed:, None].rsqrt()).to(dtype)


@torch.library.custom_op("ml_networks::synchronisation", mutates_args=())
def _forward_op(
    activations: Tensor,
    left: Tensor,
    right: Tensor,
    decay: Tensor,
    previous: Tensor | None,
    elapsed: int,
    implementation: str | None,
) -> tuple[Tensor, Tensor]:
    """s, and 1 / sqrt(beta) of each tick (T, n), empty where the plain path ran."""
    decision = _decide(activations, left, decay, elapsed, "forward", implementation)
    with usage.timed(decision):
        if decision.implementation == "torch" or not activations.shape[1] * left.shape[0]:
            s = _plain(activations, left, right, decay, previous, elapsed)
            return s, _scale(decay, elapsed, len(activations))
        from . import triton_kernel

        return triton_kernel.forward(
            activations, left, right, decay, previous, elapsed, decision.config
        )


def _scale(decay: Tensor, elapsed: int, ticks: int) -> Tensor:
    exact = decay.to(torch.promote_types(decay.dtype, torch.float32))
    return _betas(exact, elapsed + ticks)[elapsed:].rsqrt()


@_forward_op.register_fake
def _(
    activations: Tensor, left: Tensor, right: Tensor, decay: Tensor, *_: Any
) -> tuple[Tensor, Tensor]:
    ticks, batch, _neurons = activations.shape
    dtype = _dtype(activations, decay)
    s = activations.new_empty((ticks, batch, left.shape[0]), dtype=dtype)
    exact = torch.promote_types(decay.dtype, torch.float32)
    return s, decay.new_empty((ticks, left.shape[0]), dtype=exact)


@torch.library.custom_op("ml_networks::synchronisation_backward", mutates_args=())
def _backward_op(
    activations: Tensor,
    left: Tensor,
    right: Tensor,
    decay: Tensor,
    previous: Tensor | None,
    s: Tensor,
    scale: Tensor,
    of_s: Tensor,
    elapsed: int,
    implementation: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of activations, decay and previous, the last empty without a previous."""
    decision = _decide(activations, left, decay, elapsed, "backward", implementation)
    with usage.timed(decision):
        if decision.implementation == "torch" or not of_s.numel():
            return _plain_gradient(
                activations, left, right, decay, previous, s, scale, of_s, elapsed
            )
        from . import triton_kernel

        return triton_kernel.backward(
            activations,
            left,
            right,
            decay,
            previous,
            s,
            scale,
            of_s,
            elapsed,
            torch_functions.neuron_table(left, right, activations.shape[2]),
            decision.config,
        )


def _plain_gradient(
    activations: Tensor,
    left: Tensor,
    right: Tensor,
    decay: Tensor,
    previous: Tensor | None,
    s: Tensor,
    scale: Tensor,
    of_s: Tensor,
    elapsed: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients in ordinary torch operations: the backward op's plain path."""
    exact = scale.dtype
    r, ticks = torch.exp(-decay.to(exact)), len(activations)
    scaled = of_s.to(exact) * scale[:, None]
    beta, slope = torch.zeros_like(r), torch.zeros_like(r)
    for _ in range(elapsed):
        beta, slope = r * beta + 1.0, beta + r * slope
    root = beta.sqrt()
    before = torch.zeros_like(scaled[0]) if previous is None else previous.to(exact) * root
    alphas = torch.cat([before[None], s.to(exact) / scale[:, None]])
    betas = torch.cat([beta[None], scale**-2])
    of_alphas = torch.empty_like(scaled)
    of_alpha, of_beta = torch.zeros_like(before), torch.zeros_like(before)
    of_r = torch.zeros_like(before)
    for tick in reversed(range(ticks)):
        of_alpha = torch.addcmul(scaled[tick], r, of_alpha)
        of_beta = r * of_beta - 0.5 * scaled[tick] * alphas[tick + 1] * scale[tick].square()
        of_r = of_r + of_alpha * alphas[tick] + of_beta * betas[tick]
        of_alphas[tick] = of_alpha
    of_before = r * of_alpha
    of_previous = activations.new_empty(0)
    if previous is not None:
        of_previous = (of_before * root).to(previous.dtype)
        of_r = of_r + (r * of_beta + 0.5 * of_before * previous.to(exact) / root) * slope
    of_decay = (-r * of_r.sum(0)).to(decay.dtype)
    pairs = torch.cat([left, right])
    one, other = activations.index_select(2, pairs).to(exact).chunk(2, 2)
    of_pairs = torch.cat([of_alphas * other, of_alphas * one], 2)
    of_activations = torch.zeros_like(
        activations, dtype=exact, memory_format=torch.contiguous_format
    ).index_add_(2, pairs, of_pairs)
    # A custom op may return none of its inputs.
    of_activations = torch.empty_like(activations).copy_(of_activations)
    return of_activations, of_decay, of_previous


@_backward_op.register_fake
def _(
    activations: Tensor,
    left: Tensor,
    right: Tensor,
    decay: Tensor,
    previous: Tensor | None,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    of_previous = activations.new_empty(0) if previous is None else torch.empty_like(previous)
    return torch.empty_like(activations), torch.empty_like(decay), of_previous


def _setup_forward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    activations, left, right, decay, previous, *ctx.options = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(activations, left, right, decay, previous, *output)


def _forward_gradient(ctx: Any, of_s: Tensor, _: Tensor) -> tuple[Any, ...]:
    *inputs, s, scale = ctx.saved_tensors
    of_activations, of_decay, of_previous = _backward_op(*inputs, s, scale, of_s, *ctx.options)
    of_previous = None if inputs[4] is None else of_previous
    return of_activations, None, None, of_decay, of_previous, None, None


_forward_op.register_autograd(_forward_gradient, setup_context=_setup_forward)


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.elapsed, _ = inputs
    ctx.save_for_backward(*tensors)


def _second_gradient(ctx: Any, *cotangents: Tensor) -> tuple[Any, ...]:
    """The derivative of the backward op, through the plain path. What it knows of s is a function
    of its other inputs."""
    activations, left, right, decay, previous, _, _, of_s = ctx.saved_tensors

    def gradients(*given: Tensor) -> list[Tensor]:
        activations, decay, previous, of_s = given
        s = _plain(activations, left, right, decay, previous, ctx.elapsed)
        wanted = [value for value in (activations, decay, previous) if value is not None]
        return list(torch.autograd.grad(s, wanted, of_s, create_graph=True))

    given = activations, decay, previous, of_s
    kept = cotangents if previous is not None else cotangents[:2]
    found = arguments.plain_vjp(gradients, given, kept)
    of_activations, of_decay, of_previous, of_of_s = found
    return of_activations, None, None, of_decay, of_previous, None, None, of_of_s, None, None


_backward_op.register_autograd(_second_gradient, setup_context=_setup_backward)


def _call(
    inputs: Mapping[str, Tensor], flags: Mapping[str, Any], implementation: str | None
) -> dict[str, Tensor]:
    options: dict[str, Any] = {**inputs, **flags}
    return {"s": synchronisation(**options, implementation=implementation)}


BINDING = Binding(
    op=spec.NAME,
    framework="torch",
    implementations=("torch", "triton"),
    call=_call,
    differentiable=("activations", "decay", "previous"),
    kernel_module="triton_kernel",
)
