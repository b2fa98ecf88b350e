"""Hypernetwork low-rank linear for torch: the public function and the plain path."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..core import dispatch, usage
from ..core.arguments import torch_tensors
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
    ``torch.nn.functional.linear`` does.

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
    tensors = torch_tensors(named)
    spec.check_shapes({name: t if t is None else t.shape for name, t in named.items()})
    on_cpu = x.device.type == "cpu"
    if on_cpu and not usage.recording() and not dispatch.is_overridden(BINDING, implementation):
        return _plain(*tensors, scale=float(scale))
    decision = _decide(x, weight, context, u_bias, "forward", implementation)
    with usage.timed(decision):
        return _plain(*tensors, scale=float(scale))


def _decide(
    x: Tensor,
    weight: Tensor,
    context: Tensor,
    u_bias: Tensor,
    direction: str,
    implementation: str | None,
) -> dispatch.Decision:
    width_out, width_in = weight.shape
    rank = u_bias.shape[0] // width_out
    sizes = (x.shape[:-1].numel(), width_in, width_out, rank, context.shape[-1])
    problem = Problem(
        spec.NAME,
        tuple(zip(spec.DIMENSIONS, sizes, strict=True)),
        str(x.dtype).removeprefix("torch."),
        (),
        direction,
    )
    return dispatch.decide(problem, torch_device(x.device), BINDING, implementation)


def _generator(weight: Tensor, bias: Tensor, features: int) -> Tensor:
    """A generator as a shared adapter (features, rank * context + rank): all pairs of rank and
    context, then the biases."""
    return torch.cat((weight.reshape(features, -1), bias.reshape(features, -1)), 1)


def _middle(p: Tensor, context: Tensor, gate: Tensor) -> Tensor:
    """From the rows through the generator of V to those that meet the generator of U, both
    (..., rank * context + rank)."""
    rank = p.shape[-1] // (context.shape[-1] + 1)
    pairs = p[..., :-rank].unflatten(-1, (rank, context.shape[-1]))
    t = gate * ((pairs * context.unsqueeze(-2)).sum(-1) + p[..., -rank:])
    return torch.cat(((t.unsqueeze(-1) * context.unsqueeze(-2)).flatten(-2), t), -1)


def _plain(
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
    scale: float,
) -> Tensor:
    """The op in ordinary torch operations, differentiable any number of times."""
    y = functional.linear(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1]) if x.numel() else x.new_empty(0, x.shape[-1])
    c = context.reshape(rows.shape[0], context.shape[-1])
    gate = torch.sigmoid(functional.linear(c, gate_weight, gate_bias))
    q = _middle(rows @ _generator(v_weight, v_bias, x.shape[-1]), c, gate)
    u = _generator(u_weight, u_bias, y.shape[-1])
    return torch.addmm(y.reshape(-1, y.shape[-1]), q, u.mT, alpha=scale).reshape(y.shape)


def _call(
    inputs: Mapping[str, Tensor], flags: Mapping[str, Any], implementation: str | None
) -> dict[str, Tensor]:
    scale = float(flags.get("scale", 1.0))
    return {"y": hyper_lora_linear(**inputs, scale=scale, implementation=implementation)}


BINDING = Binding(
    op=spec.NAME,
    framework="torch",
    implementations=("torch",),
    call=_call,
    differentiable=("x", "context", "gate_weight", "u_weight", "u_bias", "v_weight", "v_bias"),
    kernel_module="triton_kernel",
)
