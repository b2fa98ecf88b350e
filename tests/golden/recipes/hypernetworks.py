"""Hypernetworks in the form of 0.2.6: a condition in, named tensors out.

Left out, because 0.2.6 cannot run them: encodings in a HyperNet (the encoding alone is here).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Case = Callable[[Any], tuple[Any, ...]]

SHAPES = {"weight": (3, 2), "bias": (3,), "kernel": (2, 1, 3)}


def _linear(ml: Any) -> tuple[Any, ...]:
    return ml.HyperNet(4, SHAPES), (torch.randn(5, 4),), {}


def _mlp(ml: Any) -> tuple[Any, ...]:
    cfg = ml.MLPConfig(6, 2, "Tanh", ml.LinearConfig("SiLU", "layer"))
    return ml.HyperNet(4, SHAPES, cfg), (torch.randn(5, 4),), {}


def _encode(mode: str | None) -> Case:
    return lambda ml: (ml.encode_input, (torch.rand(3, 4),), {"mode": mode})


CASES: dict[str, Case] = {
    "linear": _linear,
    "mlp": _mlp,
    "encode-angle": _encode("cos|sin"),
    "encode-complement": _encode("z|1-z"),
    "encode-none": _encode(None),
}
