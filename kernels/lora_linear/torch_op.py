"""Low-rank linear for torch: the public function and the plain path."""

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
    ``torch.nn.functional.linear`` does.

    Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685.
    """
    named = {"x": x, "weight": weight, "bias": bias, "u": u, "v": v, "gate": gate}
    tensors = torch_tensors(named)
    x, weight, bias, u, v, gate = tensors
    shapes = (None if tensor is None else tensor.shape for tensor in tensors)
    gate_shape = spec.check_shapes(*shapes)  # type: ignore[arg-type]
    if gate is not None and gate_shape is not None:
        gate = gate.reshape(gate_shape)
    return _run(x, weight, bias, u, v, gate, float(scale), implementation)


def _run(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    u: Tensor,
    v: Tensor,
    gate: Tensor | None,
    scale: float,
    implementation: str | None,
) -> Tensor:
    on_cpu = x.device.type == "cpu"
    if on_cpu and not usage.recording() and not dispatch.is_overridden(BINDING, implementation):
        return _plain(x, weight, bias, u, v, gate, scale)
    decision = _decide(x, weight, u, v, "forward", implementation)
    with usage.timed(decision):
        return _plain(x, weight, bias, u, v, gate, scale)


def _decide(
    x: Tensor, weight: Tensor, u: Tensor, v: Tensor, direction: str, implementation: str | None
) -> dispatch.Decision:
    width_out, width_in = weight.shape
    samples = x.shape[0] if x.ndim > 1 else 1
    sizes = (samples, x.shape[1:-1].numel(), width_in, width_out, u.shape[-1])
    problem = Problem(
        spec.NAME,
        tuple(zip(spec.DIMENSIONS, sizes, strict=True)),
        str(x.dtype).removeprefix("torch."),
        (("per_sample", u.ndim == 3 or v.ndim == 3),),
        direction,
    )
    return dispatch.decide(problem, torch_device(x.device), BINDING, implementation)


def _plain(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    u: Tensor,
    v: Tensor,
    gate: Tensor | None,
    scale: float,
) -> Tensor:
    """The op in ordinary torch operations, differentiable any number of times. ``gate`` is
    (samples or 1, rank or 1)."""
    y = functional.linear(x, weight, bias)
    samples = x.shape[0] if x.ndim > 1 else 1
    rows = x.reshape(samples, x.shape[1:-1].numel(), x.shape[-1])
    t = rows @ v
    if gate is not None:
        t = t * gate.unsqueeze(1)
    if u.ndim == 2:
        wide = torch.addmm(y.reshape(-1, y.shape[-1]), t.flatten(0, 1), u.mT, alpha=scale)
    else:
        wide = torch.baddbmm(y.reshape(*t.shape[:2], y.shape[-1]), t, u.mT, alpha=scale)
    return wide.reshape(y.shape)


def _call(
    inputs: Mapping[str, Tensor], flags: Mapping[str, Any], implementation: str | None
) -> dict[str, Tensor]:
    scale = flags.get("scale", 1.0)
    return {"y": lora_linear(**inputs, scale=scale, implementation=implementation)}


BINDING = Binding(
    op=spec.NAME,
    framework="torch",
    implementations=("torch",),
    call=_call,
    differentiable=("x", "u", "v", "gate"),
    kernel_module="triton_kernel",
)
