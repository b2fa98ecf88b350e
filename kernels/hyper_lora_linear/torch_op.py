"""Hypernetwork low-rank linear for torch: the public function, the plain path, the custom ops.

The custom ops work on rows (n, features) and contexts (n, context).
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


def hyper_lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    context: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    u_weight: Tensor,
    u_bias: Tensor,
    v_weight: Tensor,
    v_bias: Tensor,
    *,
    scale: float = 1.0,
    implementation: str | None = None,
) -> Tensor:
    r"""Apply a linear map plus a low-rank update that each row generates from its own context.

    With :math:`c` the context of a row and :math:`U, V` the generated vectors as matrices
    (out, rank) and (in, rank):

    .. math::

        U = W_u c + b_u,\quad V = W_v c + b_v,\quad g = \sigma(w_g c + b_g),\qquad
        y = W x + b + s\, g\, U V^\top x

    U and V are never made: with :math:`\tilde c = [c; 1]`, both products go through the generators
    themselves, as shared adapters of rank ``rank * (context + 1)``.

    Parameters
    ----------
    x
        (..., in), any strides; float32, bfloat16, float16 or float64.
    weight
        :math:`W`, (out, in).
    bias
        :math:`b`, (out,) or None.
    context
        :math:`c`, (..., context), with the leading axes of ``x``.
    gate_weight, gate_bias
        :math:`w_g`, (1, context), and :math:`b_g`, (1,).
    u_weight, u_bias
        :math:`W_u`, (out * rank, context), and :math:`b_u`, (out * rank,): a linear layer whose
        output is U, rank fastest.
    v_weight, v_bias
        :math:`W_v`, (in * rank, context), and :math:`b_v`, (in * rank,).
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
        If shapes do not fit together.
    UnsupportedImplementationError
        If the implementation asked for cannot run here.

    Notes
    -----
    Under ``torch.autocast`` all tensors but float64 ones are cast to its dtype, as
    ``torch.nn.functional.linear`` does. Under ``torch.func.vmap`` the mapped axis becomes rows
    where only ``x`` and ``context`` are mapped; under other transforms the plain path runs.

    Ha, Dai, Le, "HyperNetworks", arXiv 1609.09106, for weights made by a network; Hu et al.,
    "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685, for the update's form.
    """
    named: dict[str, Tensor | None] = {
        "x": x,
        "weight": weight,
        "bias": bias,
        "context": context,
        "gate_weight": gate_weight,
        "gate_bias": gate_bias,
        "u_weight": u_weight,
        "u_bias": u_bias,
        "v_weight": v_weight,
        "v_bias": v_bias,
    }
    tensors = dict(zip(named, torch_tensors(named), strict=True))
    spec.check_shapes({name: t if t is None else t.shape for name, t in named.items()})
    if x.ndim == 2:
        return _run(list(tensors.values()), float(scale), implementation)
    count = x.shape[:-1].numel()
    tensors["x"] = tensors["x"].reshape(count, x.shape[-1])
    tensors["context"] = tensors["context"].reshape(count, context.shape[-1])
    y = _run(list(tensors.values()), float(scale), implementation)
    return y.reshape(*x.shape[:-1], weight.shape[0])


def _run(tensors: list[Any], scale: float, implementation: str | None) -> Tensor:
    rows, weight, _, context, *_, v_bias = tensors
    on_cpu = rows.is_cpu
    if torch.compiler.is_compiling():
        # The custom op decides at run time: a new shape then changes no traced code.
        plain = implementation == "torch" or (on_cpu and implementation is None)
    elif on_cpu and not usage.recording() and not dispatch.is_overridden(BINDING, implementation):
        plain = True
    elif torch_functions.transformed(*tensors):
        others = (t for t in tensors if t is not rows and t is not context)
        fits = torch_functions.mapped(rows, context) and not torch_functions.mapped(*others)
        plain = not fits
    else:
        decision = _decide(rows, weight, context, v_bias, "forward", implementation)
        if decision.implementation == "torch":
            with usage.timed(decision):
                return _plain(*tensors, scale=scale)
        plain = False
    if plain:
        return _plain(*tensors, scale=scale)
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    return _forward_op(*tensors, scale, save, implementation)[0]


def _decide(
    rows: Tensor,
    weight: Tensor,
    context: Tensor,
    v_bias: Tensor,
    direction: str,
    implementation: str | None,
) -> dispatch.Decision:
    width_out, width_in = weight.shape
    rank = v_bias.shape[0] // width_in
    sizes = (rows.shape[0], width_in, width_out, rank, context.shape[-1])
    problem = Problem(
        spec.NAME,
        tuple(zip(spec.DIMENSIONS, sizes, strict=True)),
        str(rows.dtype).removeprefix("torch."),
        (),
        direction,
    )
    return dispatch.decide(problem, torch_device(rows.device), BINDING, implementation)


def _generator(weight: Tensor, bias: Tensor, features: int) -> Tensor:
    """A generator as a shared adapter, (features, rank * (context + 1))."""
    return torch.cat((weight, bias.unsqueeze(1)), 1).reshape(features, -1)


def _with_one(context: Tensor) -> Tensor:
    """c~ = [c; 1], as (n, 1, context + 1)."""
    return functional.pad(context, (0, 1), value=1.0).unsqueeze(1)


def _plain(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    context: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    u_weight: Tensor,
    u_bias: Tensor,
    v_weight: Tensor,
    v_bias: Tensor,
    *,
    scale: float,
) -> Tensor:
    """The op in ordinary torch operations, differentiable any number of times."""
    y = functional.linear(rows, weight, bias)
    c = _with_one(context)
    gate = torch.sigmoid(functional.linear(context, gate_weight, gate_bias))
    p = (rows @ _generator(v_weight, v_bias, rows.shape[1])).unflatten(1, (-1, c.shape[2]))
    t = gate * (p * c).sum(2)
    u = _generator(u_weight, u_bias, y.shape[1])
    return torch.addmm(y, (t.unsqueeze(2) * c).flatten(1), u.mT, alpha=scale)


Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
"""Of the rows (empty if not wanted), context and the six generator arrays."""


def _plain_gradient(
    dy: Tensor,
    rows: Tensor,
    weight: Tensor,
    context: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    u_weight: Tensor,
    u_bias: Tensor,
    v_weight: Tensor,
    v_bias: Tensor,
    scale: float,
    wants_x: bool,
) -> Gradients:
    """The gradients in ordinary torch operations: the backward op's plain path, and the function
    that its own derivative is taken of."""
    c = _with_one(context)
    gate = torch.sigmoid(functional.linear(context, gate_weight, gate_bias))
    u = _generator(u_weight, u_bias, dy.shape[1])
    v = _generator(v_weight, v_bias, rows.shape[1])
    p = (rows @ v).unflatten(1, (-1, c.shape[2]))
    t = (p * c).sum(2)
    dq = (scale * (dy @ u)).unflatten(1, (-1, c.shape[2]))
    ds = (dq * c).sum(2)
    dt = (gate * ds).unsqueeze(2)
    dlogit = (ds * t).sum(1, keepdim=True) * gate * (1 - gate)
    s = (gate * t).unsqueeze(2)
    dcontext = (dq * s + p * dt).sum(1)[:, :-1] + dlogit * gate_weight
    dp = (dt * c).flatten(1)
    du = (dy.mT @ (scale * (s * c).flatten(1))).reshape(-1, c.shape[2])
    dv = (rows.mT @ dp).reshape(-1, c.shape[2])
    dx = dy @ weight + dp @ v.mT if wants_x else dy.new_empty(0)
    return (
        dx,
        dcontext,
        dlogit.mT @ context,
        dlogit.sum(0),
        *(du[:, :-1].contiguous(), du[:, -1].contiguous()),
        *(dv[:, :-1].contiguous(), dv[:, -1].contiguous()),
    )


@torch.library.custom_op("ml_networks::hyper_lora_linear", mutates_args=())
def _forward_op(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    context: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    u_weight: Tensor,
    u_bias: Tensor,
    v_weight: Tensor,
    v_bias: Tensor,
    scale: float,
    save: bool,
    implementation: str | None,
) -> tuple[Tensor, Tensor]:
    decision = _decide(rows, weight, context, v_bias, "forward", implementation)
    generators = (context, gate_weight, gate_bias, u_weight, u_bias, v_weight, v_bias)
    with usage.timed(decision):
        if decision.implementation == "torch" or rows.shape[0] == 0:
            y = _plain(rows, weight, bias, *generators, scale=scale)
            # What the backward kernel needs; the plain one takes it again.
            v = _generator(v_weight, v_bias, rows.shape[1])
            return y, (rows if save else rows[:0]) @ v
        from . import triton_kernel

        config, device = decision.config, torch_device(rows.device)
        return triton_kernel.forward(rows, weight, bias, *generators, scale, save, config, device)


@_forward_op.register_fake
def _(rows: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    context, v_bias, save = rest[0], rest[6], rest[8]
    width = v_bias.shape[0] // rows.shape[1] * (context.shape[1] + 1)
    return (
        rows.new_empty((rows.shape[0], weight.shape[0])),
        rows.new_empty((rows.shape[0] if save else 0, width)),
    )


@_forward_op.register_vmap
def _(
    info: Any, axes: tuple[Any, ...], *arguments: Any
) -> tuple[tuple[Tensor, Tensor], tuple[int, None]]:
    """Of x and context alone: `_run` lets nothing else through."""
    *tensors, scale, _save, implementation = arguments
    size = info.batch_size
    for index in (0, 3):
        tensors[index] = torch_functions.folded(tensors[index], axes[index], size)
    y = hyper_lora_linear(*tensors, scale=scale, implementation=implementation)
    return (torch_functions.unfolded(y, size), y.new_empty(0)), (0, None)


@torch.library.custom_op("ml_networks::hyper_lora_linear_backward", mutates_args=())
def _backward_op(
    dy: Tensor,
    rows: Tensor,
    weight: Tensor,
    context: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    u_weight: Tensor,
    u_bias: Tensor,
    v_weight: Tensor,
    v_bias: Tensor,
    p: Tensor,
    scale: float,
    wants_x: bool,
    implementation: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    decision = _decide(rows, weight, context, v_bias, "backward", implementation)
    generators = (context, gate_weight, gate_bias, u_weight, u_bias, v_weight, v_bias)
    with usage.timed(decision):
        if decision.implementation == "torch" or rows.shape[0] == 0:
            return _plain_gradient(dy, rows, weight, *generators, scale, wants_x)
        from . import triton_kernel

        config, device = decision.config, torch_device(rows.device)
        gradients: Any = triton_kernel.backward(
            dy, rows, weight, *generators, p, scale, wants_x, config, device
        )
        return gradients


@_backward_op.register_fake
def _(dy: Tensor, rows: Tensor, weight: Tensor, *rest: Any) -> Gradients:
    shapes = [tuple(tensor.shape) for tensor in rest[:7]]
    wants_x = rest[9]
    gradients: Any = (
        dy.new_empty(tuple(rows.shape) if wants_x else (0,)),
        *map(dy.new_empty, shapes),
    )
    return gradients


def _setup_forward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    rows, weight, bias, *generators = inputs[:10]
    ctx.options = inputs[10:]
    ctx.has_bias = bias is not None
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(rows, weight, *generators, output[1])


def _forward_gradient(ctx: Any, dy: Tensor, _: None) -> tuple[Tensor | None, ...]:
    rows, weight, *generators, p = ctx.saved_tensors
    scale, _save, implementation = ctx.options
    needs_x, needs_weight, needs_bias, *needs_rest = ctx.needs_input_grad[:10]
    gradients: tuple[Tensor | None, ...] = (None,) * 8
    if needs_x or any(needs_rest):
        gradients = _backward_op(dy, rows, weight, *generators, p, scale, needs_x, implementation)
    dx, *rest = gradients
    dweight = dy.mT @ rows if needs_weight else None
    dbias = dy.sum(0) if needs_bias and ctx.has_bias else None
    return dx if needs_x else None, dweight, dbias, *rest, None, None, None


_forward_op.register_autograd(_forward_gradient, setup_context=_setup_forward)


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: Gradients) -> None:
    ctx.options = inputs[11:13]
    ctx.save_for_backward(*inputs[:10])


def _second_gradient(ctx: Any, *of_gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    """The derivative of the backward op, through the plain path."""
    found = plain_vjp(
        lambda *inputs: _plain_gradient(*inputs, *ctx.options), ctx.saved_tensors, of_gradients
    )
    return *found, None, None, None, None


_backward_op.register_autograd(_second_gradient, setup_context=_setup_backward)


def _call(
    inputs: Mapping[str, Tensor], flags: Mapping[str, Any], implementation: str | None
) -> dict[str, Tensor]:
    scale = float(flags.get("scale", 1.0))
    return {"y": hyper_lora_linear(**inputs, scale=scale, implementation=implementation)}


BINDING = Binding(
    op=spec.NAME,
    framework="torch",
    implementations=("torch", "triton"),
    call=_call,
    differentiable=("x", "context", "gate_weight", "u_weight", "u_bias", "v_weight", "v_bias"),
    kernel_module="triton_kernel",
)
