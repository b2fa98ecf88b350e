"""The toy op's Triton kernels."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ml_networks.kernels.core.ahead_of_time import Compilation
from ml_networks.kernels.core.device import Device
from ml_networks.kernels.core.problem import Problem

from .spec import Config

_POINTERS = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16"}


@triton.jit
def forward_kernel(x, y, scale, elements, x_stride, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < elements
    value = tl.load(x + at * x_stride, mask=inside).to(tl.float32)
    tl.store(y + at, scale * value * value, mask=inside)


@triton.jit
def backward_kernel(x, dy, dx, scale, elements, x_stride, dy_stride, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < elements
    value = tl.load(x + at * x_stride, mask=inside).to(tl.float32)
    gradient = tl.load(dy + at * dy_stride, mask=inside).to(tl.float32)
    tl.store(dx + at, 2 * scale * value * gradient, mask=inside)


def forward(x: torch.Tensor, scale: float, config: Config) -> torch.Tensor:
    """Launch the forward kernel on a vector."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    n = x.numel()
    if n:
        forward_kernel[(triton.cdiv(n, config.block),)](
            x, y, scale, n, x.stride(0), BLOCK=config.block, num_warps=config.num_warps
        )
    return y


def backward(x: torch.Tensor, dy: torch.Tensor, scale: float, config: Config) -> torch.Tensor:
    """Launch the backward kernel on a vector."""
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    n = x.numel()
    if n:
        backward_kernel[(triton.cdiv(n, config.block),)](
            x,
            dy,
            dx,
            scale,
            n,
            x.stride(0),
            dy.stride(0),
            BLOCK=config.block,
            num_warps=config.num_warps,
        )
    return dx


def compilations(problem: Problem, config: Config, device: Device) -> list[Compilation]:
    """What one call launches."""
    pointer = _POINTERS[problem.dtype]
    scalars = {"scale": "fp32", "elements": "i32", "x_stride": "i32"}
    blocks = triton.cdiv(problem["elements"], config.block)
    if problem.direction == "forward":
        return [
            Compilation(
                forward_kernel,
                {"x": pointer, "y": pointer, **scalars, "BLOCK": "constexpr"},
                {"BLOCK": config.block},
                divisible=("x", "y"),
                num_warps=config.num_warps,
                programs=blocks,
            )
        ]
    arrays = dict.fromkeys(("x", "dy", "dx"), pointer)
    return [
        Compilation(
            backward_kernel,
            {**arrays, **scalars, "dy_stride": "i32", "BLOCK": "constexpr"},
            {"BLOCK": config.block},
            divisible=("x", "dy", "dx"),
            num_warps=config.num_warps,
            programs=blocks,
        )
    ]
