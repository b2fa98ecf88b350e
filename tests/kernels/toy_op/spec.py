"""What the toy op is: ``y = scale * x^2``."""

from __future__ import annotations

from dataclasses import dataclass

from ml_networks.kernels.core.device import Device
from ml_networks.kernels.core.problem import Case, Choice, Problem

NAME = "toy_square"
DIMENSIONS = ("elements",)
DIRECTIONS = ("forward", "backward")
CASES = (
    Case("small", "small", {"elements": 64}, {"scale": 2.0}),
    Case("odd", "ragged", {"elements": 77}, {"scale": -0.5}),
    Case("large", "large", {"elements": 1 << 22}, {"scale": 1.5}),
)


@dataclass(frozen=True)
class Config:
    """Elements a program, and warps to do them."""

    block: int = 128
    num_warps: int = 4


def flops(problem: Problem) -> int:
    """Two multiplications an element."""
    return 2 * problem["elements"]


def bytes_moved(problem: Problem) -> int:
    """Read and write each element; the backward pass reads the gradient too."""
    arrays = 2 if problem.direction == "forward" else 3
    return arrays * problem["elements"] * problem.itemsize


def not_supported_reasons(problem: Problem, implementation: str, device: Device) -> list[str]:
    """One made-up limit, to see a reason travel."""
    if problem["elements"] > 1 << 40:
        return ["more than 2^40 elements"]
    return []


def heuristic(problem: Problem, device: Device, implementations: tuple[str, ...]) -> Choice:
    """The kernel from 1000 elements up, if it may."""
    kernel = implementations[-1]
    if kernel in ("torch", "xla"):
        return Choice(kernel, None, "the only one that can run")
    if problem["elements"] < 1000 and len(implementations) > 1:
        return Choice(implementations[0], None, "too small for a kernel")
    return Choice(kernel, Config(), "one pass")


def search_space(problem: Problem, device: Device, implementation: str) -> list[Config]:
    """Three block sizes."""
    return [Config(block) for block in (64, 128, 256)]
