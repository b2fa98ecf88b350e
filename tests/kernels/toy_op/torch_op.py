"""The toy op in torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ml_networks.kernels.core import device, dispatch, usage
from ml_networks.kernels.core.problem import Problem
from ml_networks.kernels.core.registry import Binding

from .spec import NAME


def _decide(
    x: torch.Tensor, scale: float, direction: str, implementation: str | None
) -> dispatch.Decision:
    dtype = str(x.dtype).removeprefix("torch.")
    problem = Problem(NAME, (("elements", x.numel()),), dtype, (("scale", scale),), direction)
    return dispatch.decide(problem, device.torch_device(x.device), BINDING, implementation)


class _Kernel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, scale: float, config: Any) -> torch.Tensor:
        from . import triton_kernel

        ctx.save_for_backward(x)
        ctx.scale = scale
        return triton_kernel.forward(x, scale, config)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        from . import triton_kernel

        (x,) = ctx.saved_tensors
        decision = _decide(x, ctx.scale, "backward", "triton")
        with usage.timed(decision):
            return triton_kernel.backward(x, dy, ctx.scale, decision.config), None, None


def toy_square(
    x: torch.Tensor, *, scale: float = 1.0, implementation: str | None = None
) -> torch.Tensor:
    """``scale * x^2`` of a vector."""
    decision = _decide(x, scale, "forward", implementation)
    with usage.timed(decision):
        if decision.implementation == "triton":
            return _Kernel.apply(x, scale, decision.config)
        return scale * x * x


def _call(
    inputs: Mapping[str, Any], flags: Mapping[str, Any], implementation: str | None
) -> dict[str, torch.Tensor]:
    return {"y": toy_square(inputs["x"], **flags, implementation=implementation)}


BINDING = Binding(NAME, "torch", ("torch", "triton"), _call, ("x",), "triton_kernel")
