"""Low-rank linear for torch: the public function, the plain path, the custom ops.

The custom ops work on rows (samples * n, features) and a gate (samples or 1, rank or 1).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..core import dispatch, torch_functions, usage
from ..core.arguments import plain_vjp, torch_tensors
from ..core.device import torch_device
from ..core.problem import Problem
from ..core.registry import Binding
from . import spec


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    u: Tensor,
    v: Tensor,
    gate: Tensor | None = None,
    *,
    scale: float = 1.0,
    implementation: str | None = None,
) -> Tensor:
    r"""Apply a linear map plus a low-rank update: :math:`y = W x + b + s\, U (g \odot V^\top x)`.

    ``samples`` below is the length of the first axis of ``x``: adapters and gates may be shared or
    differ between samples. Gradients flow to every tensor; a base weight that needs none costs
    nothing.

    Parameters
    ----------
    x
        (..., in), any strides; float32, bfloat16, float16 or float64.
    weight
        :math:`W`, (out, in).
    bias
        :math:`b`, (out,) or None.
    u
        :math:`U`, (out, rank), or (samples, out, rank).
    v
        :math:`V`, (in, rank), or (samples, in, rank).
    gate
        :math:`g`: a scalar (), one value per rank (rank,) or (1, rank), one per sample (samples,)
        or (samples, 1), or (samples, rank). None is 1.
    scale
        :math:`s`, a Python number.
    implementation
        ``"torch"``, ``"triton"``, or None to let dispatch choose.

    Returns
    -------
    Tensor
        (..., out), in the dtype of ``x``.

    Raises
    ------
    TypeError
        If an argument is not a floating-point tensor, or their dtypes differ outside autocast.
    ValueError
        If shapes do not fit together, or a gate (n,) could mean ranks as well as samples.
    UnsupportedImplementationError
        If the implementation asked for cannot run here.

    Notes
    -----
    Under ``torch.autocast`` all tensors but float64 ones are cast to its dtype, as
    ``torch.nn.functional.linear`` does. Under ``torch.func.vmap`` a mapped ``x`` becomes samples,
    with adapters that are shared or mapped likewise; under other transforms the plain path runs.

    Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685.
    """
    named = {"x": x, "weight": weight, "bias": bias, "u": u, "v": v, "gate": gate}
    tensors = torch_tensors(named)
    x, weight, bias, u, v, gate = tensors
    shapes = (None if tensor is None else tensor.shape for tensor in tensors)
    gate_shape = spec.check_shapes(*shapes)  # type: ignore[arg-type]
    if gate is not None and gate_shape is not None and gate.shape != gate_shape:
        gate = gate.reshape(gate_shape)
    samples = x.shape[0] if x.ndim > 1 else 1
    rows = x if x.ndim == 2 else x.reshape(x.shape[:-1].numel(), x.shape[-1])
    y = _run(rows, weight, bias, u, v, gate, samples, float(scale), implementation)
    return y if x.ndim == 2 else y.reshape(*x.shape[:-1], weight.shape[0])


def _run(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    u: Tensor,
    v: Tensor,
    gate: Tensor | None,
    samples: int,
    scale: float,
    implementation: str | None,
) -> Tensor:
    on_cpu = rows.is_cpu
    if torch.compiler.is_compiling():
        # The custom op decides at run time: a new shape then changes no traced code.
        plain = implementation == "torch" or (on_cpu and implementation is None)
    elif on_cpu and not usage.recording() and not dispatch.is_overridden(BINDING, implementation):
        plain = True
    elif torch_functions.transformed(rows, weight, bias, u, v, gate):
        plain = not _can_fold(rows, weight, bias, u, v, gate)
    else:
        decision = _decide(rows, weight, u, v, samples, "forward", implementation)
        if decision.implementation == "torch":
            with usage.timed(decision):
                return _plain(rows, weight, bias, u, v, gate, samples, scale)
        plain = False
    if plain:
        return _plain(rows, weight, bias, u, v, gate, samples, scale)
    given = [value for value in (rows, weight, bias, u, v, gate) if value is not None]
    save = torch.is_grad_enabled() and any(value.requires_grad for value in given)
    return _forward_op(rows, weight, bias, u, v, gate, samples, scale, save, implementation)[0]


def _can_fold(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    u: Tensor,
    v: Tensor,
    gate: Tensor | None,
) -> bool:
    """Whether a mapped axis can become samples: of the adapters all or none may be mapped, and
    those of the examples cannot differ between the samples of an example too."""
    mapped = torch_functions.mapped
    if mapped(weight, bias) or not mapped(rows, u, v, gate) or not u.ndim == v.ndim == 2:
        return False
    return mapped(u) == mapped(v) and (not mapped(u) or gate is None or gate.shape[0] == 1)


def _decide(
    rows: Tensor,
    weight: Tensor,
    u: Tensor,
    v: Tensor,
    samples: int,
    direction: str,
    implementation: str | None,
) -> dispatch.Decision:
    width_out, width_in = weight.shape
    sizes = (samples, rows.shape[0] // max(samples, 1), width_in, width_out, u.shape[-1])
    mixed = (("mixed", True),) if u.ndim != v.ndim else ()
    problem = Problem(
        spec.NAME,
        tuple(zip(spec.DIMENSIONS, sizes, strict=True)),
        str(rows.dtype).removeprefix("torch."),
        (("per_sample", u.ndim == 3 or v.ndim == 3), *mixed),
        direction,
    )
    return dispatch.decide(problem, torch_device(rows.device), BINDING, implementation)


def _by_sample(rows: Tensor, samples: int) -> Tensor:
    """(samples, n, width); n is 0 where there are no samples."""
    return rows.reshape(samples, rows.shape[0] // max(samples, 1), rows.shape[1])


def _plain(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    u: Tensor,
    v: Tensor,
    gate: Tensor | None,
    samples: int,
    scale: float,
) -> Tensor:
    """The op in ordinary torch operations, differentiable any number of times."""
    y = functional.linear(rows, weight, bias)
    if u.ndim == v.ndim == 2 and (gate is None or gate.shape[0] == 1):
        t = rows @ v
        return torch.addmm(y, t if gate is None else t * gate, u.mT, alpha=scale)
    t = _by_sample(rows, samples) @ v
    if gate is not None:
        t = t * gate.unsqueeze(1)
    if u.ndim == 2:
        return torch.addmm(y, t.flatten(0, 1), u.mT, alpha=scale)
    return torch.baddbmm(_by_sample(y, samples), t, u.mT, alpha=scale).flatten(0, 1)


Gradients = tuple[Tensor, Tensor, Tensor, Tensor]
"""Of the rows (empty if not wanted), u, v, and the gate (empty without one)."""


def _plain_gradient(
    dy: Tensor,
    rows: Tensor,
    weight: Tensor,
    u: Tensor,
    v: Tensor,
    gate: Tensor | None,
    samples: int,
    scale: float,
    wants_x: bool,
) -> Gradients:
    """The gradients in ordinary torch operations: the backward op's plain path, and the function
    that its own derivative is taken of."""
    x, of_y = _by_sample(rows, samples), _by_sample(dy, samples)
    t, h = x @ v, scale * (of_y @ u)
    dgate = dy.new_empty(0) if gate is None else (t * h).sum(1).sum_to_size(gate.shape)
    if gate is not None:
        t, h = t * gate.unsqueeze(1), h * gate.unsqueeze(1)
    t = scale * t
    du = of_y.mT @ t if u.ndim == 3 else dy.mT @ t.flatten(0, 1)
    dv = x.mT @ h if v.ndim == 3 else rows.mT @ h.flatten(0, 1)
    dx = dy @ weight + (h @ v.mT).flatten(0, 1) if wants_x else dy.new_empty(0)
    return dx, du, dv, dgate


@torch.library.custom_op("ml_networks::lora_linear", mutates_args=())
def _forward_op(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    u: Tensor,
    v: Tensor,
    gate: Tensor | None,
    samples: int,
    scale: float,
    save: bool,
    implementation: str | None,
) -> tuple[Tensor, Tensor]:
    decision = _decide(rows, weight, u, v, samples, "forward", implementation)
    with usage.timed(decision):
        if decision.implementation == "torch" or rows.shape[0] == 0:
            y = _plain(rows, weight, bias, u, v, gate, samples, scale)
            # What the backward kernel needs; the plain one takes it again.
            t = (
                (_by_sample(rows, samples) @ v).flatten(0, 1)
                if save
                else u.new_empty(0, u.shape[-1])
            )
            return y, t
        from . import triton_kernel

        return triton_kernel.forward(
            *(rows, weight, bias, u, v, gate, samples, scale, save),
            decision.config,
            torch_device(rows.device),
        )


@_forward_op.register_fake
def _(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    u: Tensor,
    v: Tensor,
    gate: Tensor | None,
    samples: int,
    scale: float,
    save: bool,
    implementation: str | None,
) -> tuple[Tensor, Tensor]:
    count = rows.shape[0]
    return (
        rows.new_empty((count, weight.shape[0])),
        rows.new_empty((count if save else 0, u.shape[-1])),
    )


@_forward_op.register_vmap
def _(
    info: Any,
    axes: tuple[Any, ...],
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    u: Tensor,
    v: Tensor,
    gate: Tensor | None,
    samples: int,
    scale: float,
    save: bool,
    implementation: str | None,
) -> tuple[tuple[Tensor, Tensor], tuple[int, None]]:
    """Of what `_can_fold` lets through."""
    size = info.batch_size
    x = torch_functions.folded(rows, axes[0], size)
    count = x.shape[0] // size
    if gate is not None and axes[5] is not None:
        gate = gate.movedim(axes[5], 0)
    elif gate is not None:
        gate = gate.expand(size, *gate.shape)
    if axes[3] is not None:
        x, u, v = x.unflatten(0, (size, count)), u.movedim(axes[3], 0), v.movedim(axes[4], 0)
        gate = None if gate is None else gate.squeeze(1)
    elif gate is not None:
        x = x.unflatten(0, (size * samples, count // max(samples, 1)))
        gate = gate.expand(size, samples, -1).flatten(0, 1)
    y = lora_linear(x, weight, bias, u, v, gate, scale=scale, implementation=implementation)
    return (y.reshape(size, count, y.shape[-1]), y.new_empty(0)), (0, None)


@torch.library.custom_op("ml_networks::lora_linear_backward", mutates_args=())
def _backward_op(
    dy: Tensor,
    rows: Tensor,
    weight: Tensor,
    u: Tensor,
    v: Tensor,
    gate: Tensor | None,
    t: Tensor,
    samples: int,
    scale: float,
    wants_x: bool,
    implementation: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    decision = _decide(rows, weight, u, v, samples, "backward", implementation)
    with usage.timed(decision):
        if decision.implementation == "torch" or rows.shape[0] == 0:
            return _plain_gradient(dy, rows, weight, u, v, gate, samples, scale, wants_x)
        from . import triton_kernel

        dx, du, dv, dgate = triton_kernel.backward(
            *(dy, rows, weight, u, v, gate, t, samples, scale, wants_x),
            decision.config,
            torch_device(rows.device),
        )
        return dx, du, dv, dgate if gate is None else dgate.sum_to_size(gate.shape).to(dy.dtype)


@_backward_op.register_fake
def _(
    dy: Tensor,
    rows: Tensor,
    weight: Tensor,
    u: Tensor,
    v: Tensor,
    gate: Tensor | None,
    t: Tensor,
    samples: int,
    scale: float,
    wants_x: bool,
    implementation: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        dy.new_empty(tuple(rows.shape) if wants_x else (0,)),
        dy.new_empty(tuple(u.shape)),
        dy.new_empty(tuple(v.shape)),
        dy.new_empty((0,) if gate is None else tuple(gate.shape)),
    )


def _setup_forward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    rows, weight, bias, u, v, gate, *ctx.options = inputs
    ctx.has_bias = bias is not None
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(rows, weight, u, v, gate, output[1])


def _forward_gradient(ctx: Any, dy: Tensor, _: None) -> tuple[Tensor | None, ...]:
    rows, weight, u, v, gate, t = ctx.saved_tensors
    samples, scale, _save, implementation = ctx.options
    needs_x, needs_weight, needs_bias, *needs_adapter = ctx.needs_input_grad[:6]
    dx = du = dv = dgate = None
    if needs_x or any(needs_adapter):
        dx, du, dv, dgate = _backward_op(
            dy, rows, weight, u, v, gate, t, samples, scale, needs_x, implementation
        )
    dweight = dy.mT @ rows if needs_weight else None
    dbias = dy.sum(0) if needs_bias and ctx.has_bias else None
    dgate = None if gate is None else dgate
    return dx if needs_x else None, dweight, dbias, du, dv, dgate, None, None, None, None


_forward_op.register_autograd(_forward_gradient, setup_context=_setup_forward)


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: Gradients) -> None:
    dy, rows, weight, u, v, gate, _ = inputs[:7]
    ctx.options = inputs[7:10]
    ctx.save_for_backward(dy, rows, weight, u, v, gate)


def _second_gradient(ctx: Any, *of_gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    """The derivative of the backward op, through the plain path."""
    found = plain_vjp(
        lambda *inputs: _plain_gradient(*inputs, *ctx.options), ctx.saved_tensors, of_gradients
    )
    return *found, None, None, None, None, None


_backward_op.register_autograd(_second_gradient, setup_context=_setup_backward)


def _call(
    inputs: Mapping[str, Tensor], flags: Mapping[str, Any], implementation: str | None
) -> dict[str, Tensor]:
    scale = flags.get("scale", 1.0)
    return {"y": lora_linear(**inputs, scale=scale, implementation=implementation)}


BINDING = Binding(
    op=spec.NAME,
    framework="torch",
    implementations=("torch", "triton"),
    call=_call,
    differentiable=("x", "u", "v", "gate"),
    kernel_module="triton_kernel",
)
