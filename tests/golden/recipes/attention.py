"""Self-attention layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Case = Callable[[Any], tuple[Any, ...]]


def _attention(cls: str, shape: tuple[int, ...], *arguments: int) -> Case:
    return lambda ml: (getattr(ml, cls)(shape[1], *arguments), (torch.randn(shape),), {})


def _from_config(ml: Any) -> tuple[Any, ...]:
    module = ml.Attention2d(4, attn_cfg=ml.AttentionConfig(nhead=2, patch_size=2))
    return module, (torch.randn(2, 4, 4, 2),), {}


CASES: dict[str, Case] = {
    "1d": _attention("Attention1d", (2, 6, 5), 3),
    "1d-patch": _attention("Attention1d", (2, 4, 9), 2, 3),
    "1d-grid": _attention("Attention1d", (2, 4, 3, 2), 1),
    "2d": _attention("Attention2d", (2, 6, 3, 5), 2),
    "2d-patch": _attention("Attention2d", (2, 4, 4, 6), 4, 2),
    "2d-config": _from_config,
}
